//! Works that wait for a step, steps that circulate, and when they moved.

use std::time::{Duration, Instant};

use hat_plan::RowMove;
use hat_transport::message::Hello;

use super::batch::StepBatch;
use super::pace::Pace;
use crate::sched::{BatchItem, Bound, Scheduler, SessionKey};

/// Planner of the next step.
#[derive(Default)]
pub(super) struct Planner {
    pub(super) scheduler: Scheduler,
    pub(super) pace: Pace,
    /// The bound of every step, if it is not measured.
    pub(super) bound: Option<Bound>,
    /// Moves of commits that came on their own, for the next step.
    pub(super) moves: Vec<RowMove>,
    /// Batches to be filled.
    idle: Vec<StepBatch>,
    /// Batches that were handed out.
    out: usize,
    /// Time at which a step ended, or began while none was on its way.
    moved_at: Option<Instant>,
    /// The step that was planned last takes so long that planning the next one ahead saves little.
    is_long: bool,
}

impl Planner {
    /// For a cloud that says `hello`.
    pub(super) fn new(hello: &Hello) -> Self {
        // One step in each stage, and one that is planned meanwhile.
        let batches = usize::from(hello.stages) + 1;
        Self {
            scheduler: Scheduler::new(hello.row_budget),
            idle: std::iter::repeat_with(StepBatch::default).take(batches).collect(),
            ..Self::default()
        }
    }

    /// A work waits.
    pub(super) fn enqueue(&mut self, now: Instant, item: BatchItem) {
        if item.urgent {
            self.pace.note_decoder(item.session, now);
        }
        self.scheduler.enqueue(item);
    }

    /// Forgets a session.
    pub(super) fn forget(&mut self, session: SessionKey) {
        self.scheduler.forget(session);
        self.pace.forget(session);
    }

    /// Steps that the first stage may have, the one that it runs included: while somebody decodes,
    /// or the step in it is long, it must have nothing at all to do before the next one is planned,
    /// so that what comes during a step is in the next one.
    pub(super) fn ahead(&mut self, now: Instant) -> u64 {
        if self.pace.is_decoding(now) || self.is_long { 1 } else { 2 }
    }

    /// A batch for the works of the next step, which go to `items`; `None` if none wait, or all
    /// batches are out.
    pub(super) fn begin(&mut self, now: Instant, items: &mut Vec<BatchItem>) -> Option<StepBatch> {
        if self.scheduler.queued() == 0 {
            return None;
        }
        let mut batch = self.idle.pop()?;
        batch.clear();
        batch.step.moves.append(&mut self.moves);
        let is_decoding = self.pace.is_decoding(now);
        let bound =
            self.bound.unwrap_or_else(|| self.pace.bound(is_decoding, self.scheduler.prompts()));
        self.scheduler.schedule(bound, items);
        Some(batch)
    }

    /// A batch is on its way.
    pub(super) fn hand_out(&mut self, now: Instant, batch: &StepBatch) {
        if self.out == 0 {
            self.moved_at = Some(now);
        }
        self.out += 1;
        self.is_long = self.pace.is_long(batch.step.plan.rows(), batch.attended);
    }

    /// A batch came back.
    pub(super) fn take_back(&mut self, now: Instant, batch: StepBatch) {
        self.moved_at = Some(now);
        self.out -= 1;
        self.idle.push(batch);
    }

    /// Notes the time of a step.
    pub(super) fn note_step(&mut self, batch: &StepBatch) {
        let rows = batch.step.plan.rows();
        self.pace.note_step(rows, batch.attended, batch.urgent_rows, batch.took);
    }

    /// Time at which the steps on their way count as stuck; `None` if there are none.
    pub(super) fn stuck_at(&self, within: Duration) -> Option<Instant> {
        self.moved_at.filter(|_| self.out > 0).map(|at| at + within)
    }
}
