//! Decided rows, a piece of a chunk at a time: how many of a prompt go next, by what was measured,
//! and how they are computed.

use std::ops::Range;
use std::time::{Duration, Instant};

use super::RequestEvent;
use super::context::{Common, Facts, Learned};
use super::request::Request;
use crate::chunk::{Ahead, CHUNK_ROWS_DEFAULT, ChunkPolicy, Limits};
use crate::error::RequestError;
use crate::request::Event;

/// Rows of a chunk that are computed, and sent, before the next ones are: the uplink does not wait
/// for a whole chunk, and is looked after in between.
const PIECE_ROWS: u32 = 64;

/// Decided rows that the cloud runs in one step. They are computed here a piece at a time.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Chunk {
    /// All its rows.
    pub(super) rows: u32,
    /// Number of rows that are not computed yet.
    pub(super) left: u32,
}

/// Decided rows that are being computed.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    /// Position of the first.
    first: u32,
    ids: Range<u32>,
    /// Id of the row before the first.
    parent: u32,
    /// True if the cloud holds them: they are not sent.
    is_cached: bool,
}

impl Request {
    /// Takes the next decided rows in, a piece of a chunk of the prompt or the last token alone,
    /// and plans their computation: of `scratch.tokens`, into [`Request::rows_mut`].
    pub(super) fn begin_piece(&mut self, now: Instant, cx: &mut Common) -> Option<Piece> {
        let cached = self.cached_left();
        if cached == 0 && self.session.open()?.chunk.left == 0 {
            let rows = self.chunk_rows(now, cx);
            self.session.open_mut()?.chunk = Chunk { rows, left: rows };
        }
        let open = self.session.open_mut()?;
        let first = self.kv.committed();
        let count = match cached {
            0 if cx.facts.whole_chunks => open.chunk.left,
            0 => cx.learned.piece_rows(first, open.chunk.left.min(PIECE_ROWS)),
            _ => cx.learned.piece_rows(first, cached.min(cx.facts.step_rows_max)),
        };
        open.drafts.clear();
        let (first_id, parent) = (self.kv.last_id() + 1, self.kv.tip());
        let place = self
            .kv
            .append_committed(first_id, count, parent)
            .expect("ids go on after the last one, and the session reserved all rows");
        let scratch = &mut cx.scratch;
        scratch.plan.clear();
        scratch.plan.push_committed(place, count);
        scratch.plan.end_sequence(self.kv.pages());
        scratch.tokens.clear();
        let tokens = first as usize..(first + count) as usize;
        scratch.tokens.extend_from_slice(&self.path.tokens[tokens]);
        open.outgoing.hidden.resize(count as usize * cx.facts.hidden_size, 0.0);
        Some(Piece { first, ids: first_id..first_id + count, parent, is_cached: cached > 0 })
    }

    /// The rows of a piece are computed, which took so long.
    pub(super) fn end_piece(
        &mut self,
        piece: Piece,
        took: Duration,
        cx: &mut Common,
    ) -> Result<(), RequestError> {
        let (in_prefill, total) = (self.in_prefill(), self.path.rows());
        let Some(open) = self.session.open_mut() else { return Ok(()) };
        let Piece { first, ids, parent, is_cached } = piece;
        let out = &mut open.outgoing;
        let end = first + u32::try_from(ids.len()).expect("a piece is small");
        cx.learned.note_input(ids.len(), first, took);
        if let Some(row) = first_not_finite(&out.hidden, cx.facts.hidden_size) {
            let row = u32::try_from(row).expect("below the chunk's rows");
            return Err(RequestError::NotFinite { position: first + row });
        }
        open.unfed = first..end;
        if is_cached {
            out.clear();
            return Ok(());
        }
        let decides = end == total;
        out.begin_decided(&ids, parent, decides);
        out.computed = ids.len();
        open.chunk.left -= end - first;
        let grows = open.chunk.left > 0;
        out.release(grows);
        open.expect_decided(ids.clone());
        if decides {
            let last_id = ids.end - 1;
            let before = if ids.len() > 1 { last_id - 1 } else { parent };
            let round = if in_prefill { 0 } else { self.round + 1 };
            let token = self.path.tokens[end as usize - 1];
            open.verifier.push(last_id, before, token, None, round);
        }
        if in_prefill && !grows {
            self.meter.counts.chunks.push(open.chunk.rows);
            cx.tell(self.id, RequestEvent::Said(Event::Prefill { sent: end, total }));
        }
        self.check();
        Ok(())
    }

    /// Rows of the next chunk. While too little is known for a plan, chunks have the default size;
    /// later ones of the same prompt may know more.
    fn chunk_rows(&mut self, now: Instant, cx: &mut Common) -> u32 {
        // Looked at for each chunk, whatever the policy: between two looks only the mean is seen.
        let unacked = cx.learned.note_link();
        let left = self.path.rows() - self.computed();
        let rows_max = cx.chunk_rows_max();
        let rows = match cx.facts.chunks {
            ChunkPolicy::Off => left,
            ChunkPolicy::Fixed(rows) => rows,
            policy @ (ChunkPolicy::Paper | ChunkPolicy::Auto) if self.in_prefill() => {
                let planned = self.planned_rows(policy, now, rows_max, unacked, cx);
                planned.unwrap_or(CHUNK_ROWS_DEFAULT)
            }
            _ => CHUNK_ROWS_DEFAULT,
        };
        rows.min(left).min(rows_max)
    }

    /// The first chunk of a plan for what is left of a prompt; `None` if too little is known.
    fn planned_rows(
        &mut self,
        policy: ChunkPolicy,
        now: Instant,
        rows_max: u32,
        unacked: u64,
        cx: &mut Common,
    ) -> Option<u32> {
        let Learned { estimator, planner, .. } = &mut cx.learned;
        let uplink_s = estimator.uplink_busy_s(unacked).unwrap_or(0.0);
        let (row_bytes, layers) = (cx.facts.row_bytes(), cx.facts.layers);
        let costs = estimator.cost_model(row_bytes, layers, cx.cloud.stages.into())?;
        let (done, left) = (self.computed(), self.path.rows() - self.computed());
        let open = self.session.open_mut()?;
        let mut ahead = open.ahead.map_or_else(Ahead::default, |(ahead, at)| {
            ahead.later(now.duration_since(at).as_secs_f64())
        });
        ahead.uplink_s = ahead.uplink_s.max(uplink_s);
        let limits = Limits { rows_max, ..Limits::default() };
        let plan = planner.plan(policy, &costs, &limits, ahead, done, left);
        let next = *plan.sizes.first()?;
        self.meter.planned(now, plan.sizes, plan.finish_s);
        open.ahead = Some((ahead.behind(&costs, next, done), now));
        Some(next)
    }

    /// The rows that are computed next, which are the last of those that are here.
    pub(super) fn rows_mut(&mut self, count: usize, facts: &Facts) -> &mut [f32] {
        let Some(open) = self.session.open_mut() else { return &mut [] };
        let hidden = &mut open.outgoing.hidden;
        let from = hidden.len() - count * facts.hidden_size;
        &mut hidden[from..]
    }
}

/// The first row that holds something that is no number.
pub(super) fn first_not_finite(hidden: &[f32], hidden_size: usize) -> Option<usize> {
    hidden.iter().position(|number| !number.is_finite()).map(|at| at / hidden_size)
}
