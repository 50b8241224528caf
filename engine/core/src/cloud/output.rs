//! `OUTPUT` frames of one session out of a finished step, or `COMPUTED` if it wants none.

use hat_transport::message::{Arrivals, Computed, OutputHead};

use super::batch::StepBatch;
use super::session::{Planned, Spent, StepRows};
use crate::wire;
use hat_transport::codec::{Codec, CodecError};

/// Cuts the wanted rows of one session into frames and writes them.
pub(super) struct Outputs<'a> {
    rows: &'a StepRows,
    hidden: &'a [f32], // [rows of this session, hidden_size]
    hidden_size: usize,
    codec: Codec,
    frame_bytes_max: usize,
    head: OutputHead,
    done: usize,  // wanted rows already written
    frame: usize, // wanted rows of the frame at hand
}

impl<'a> Outputs<'a> {
    pub(super) fn of(
        batch: &'a StepBatch,
        index: usize,
        codec: Codec,
        (hidden_size, frame_bytes_max): (usize, usize),
        spent: Spent,
        arrivals: Arrivals,
    ) -> Self {
        let rows = batch.step.plan.rows_of(index);
        let Spent { queue_us, step_us, step_rows, .. } = spent;
        Self {
            rows: &batch.rows[index],
            hidden: &batch.step.hidden[rows.start * hidden_size..rows.end * hidden_size],
            hidden_size,
            codec: codec.down(),
            frame_bytes_max,
            head: OutputHead { count: 0, queue_us, step_us, step_rows, arrivals },
            done: 0,
            frame: 0,
        }
    }

    /// Confirmation of a chunk of which no row comes back; `None` if some do, or if it ran as zeros
    /// since something is wrong with it.
    pub(super) fn computed(&self) -> Option<Computed> {
        let OutputHead { queue_us, step_us, step_rows, arrivals, .. } = self.head;
        self.rows.ids.first()?;
        let Planned { first_id, rows, answers, is_all } = self.rows.planned;
        let count = u16::try_from(rows).ok().filter(|_| is_all && !answers)?;
        Some(Computed { first_id, count, queue_us, step_us, step_rows, arrivals })
    }

    /// Bytes of the next frame's body; `None` when all rows are out.
    pub(super) fn next_bytes(&mut self) -> Option<usize> {
        let left = self.rows.wanted.len() - self.done;
        self.frame =
            left.min(wire::rows_per_frame(self.codec, self.hidden_size, self.frame_bytes_max));
        self.head.count = u16::try_from(self.frame).expect("a frame holds few rows");
        let row_bytes = 4 + self.codec.row_bytes(self.hidden_size);
        (self.frame > 0).then(|| OutputHead::BYTES + self.frame * row_bytes)
    }

    /// Writes the frame's body.
    ///
    /// # Errors
    /// If a row holds a number that is not finite.
    pub(super) fn encode(&self, body: &mut [u8]) -> Result<(), CodecError> {
        let wanted = &self.rows.wanted[self.done..self.done + self.frame];
        let ids = &self.rows.wanted_ids[self.done..self.done + self.frame];
        let payload_start = self.head.encode(ids, body);
        let payload = &mut body[payload_start..];
        let row_bytes = self.codec.row_bytes(self.hidden_size);
        for (index, out) in wanted.iter().zip(payload.chunks_exact_mut(row_bytes)) {
            let row = &self.hidden[*index as usize * self.hidden_size..][..self.hidden_size];
            self.codec.encode(row, self.hidden_size, out)?;
        }
        Ok(())
    }

    /// Goes on behind the frame at hand.
    pub(super) fn advance(&mut self) {
        self.done += self.frame;
        self.head.arrivals = Arrivals::default();
    }
}
