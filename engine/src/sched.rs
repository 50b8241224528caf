//! Which pending rows run in the next step: rows computed catch up with rows wanted.
//!
//! First come, first served for now, under one row budget, rows of a verify before prompt chunks.
//! Integers only: no clock, no transport, no model.

use std::collections::VecDeque;

/// A session in the scheduler's eyes.
pub type SessionKey = u64;

/// Rows that run together or not at all: a prompt chunk, or the rows of one verify.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Whose rows.
    pub session: SessionKey,
    /// How many.
    pub rows: u32,
    /// Somebody waits for a token: runs before prompt chunks.
    pub urgent: bool,
    /// Works of different classes never share a step (they leave at different layers).
    pub class: u32,
}

/// There is no room for more work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{queued} works are queued, the most there may be")]
pub struct QueueFull {
    /// Works queued.
    pub queued: usize,
}

/// Queue of work in order of arrival.
#[derive(Debug)]
pub struct Scheduler {
    rows_max: u32,
    queue_max: usize,
    queue: VecDeque<Work>,
}

impl Scheduler {
    /// A scheduler of steps of at most `rows_max` rows, with at most `queue_max` works waiting.
    #[must_use]
    pub fn new(rows_max: u32, queue_max: usize) -> Self {
        Self { rows_max, queue_max, queue: VecDeque::with_capacity(queue_max) }
    }

    /// The row budget of a step.
    #[must_use]
    pub fn rows_max(&self) -> u32 {
        self.rows_max
    }

    /// Works that wait.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// Takes work.
    ///
    /// # Errors
    /// [`QueueFull`].
    ///
    /// # Panics
    /// If the work could never run: no rows, or more than the budget.
    pub fn enqueue(&mut self, work: Work) -> Result<(), QueueFull> {
        assert!(work.rows > 0 && work.rows <= self.rows_max, "{work:?} does not fit a step");
        if self.queue.len() >= self.queue_max {
            return Err(QueueFull { queued: self.queue.len() });
        }
        self.queue.push_back(work);
        Ok(())
    }

    /// Chooses the works of the next step into `step`, each session's in order of arrival.
    pub fn plan(&mut self, step: &mut Vec<Work>) {
        step.clear();
        let Some(class) = self.oldest(true).or_else(|| self.oldest(false)) else { return };
        let mut budget = self.rows_max;
        for urgent in [true, false] {
            let mut index = 0;
            while index < self.queue.len() {
                let work = self.queue[index];
                let runs = work.urgent == urgent && work.class == class && work.rows <= budget;
                if runs && !waits_behind(&self.queue, step, index) {
                    budget -= work.rows;
                    step.push(work);
                    self.queue.remove(index);
                } else {
                    index += 1;
                }
            }
        }
    }

    /// Forgets all work of a session that has ended.
    pub fn forget(&mut self, session: SessionKey) {
        self.queue.retain(|work| work.session != session);
    }

    fn oldest(&self, urgent: bool) -> Option<u32> {
        self.queue.iter().find(|work| work.urgent == urgent).map(|work| work.class)
    }
}

/// Whether the same session has older work: still waiting, or in this very step. A session runs
/// once a step, since what its next frame commits may move rows that this step writes.
fn waits_behind(queue: &VecDeque<Work>, step: &[Work], index: usize) -> bool {
    let session = queue[index].session;
    queue.iter().take(index).chain(step).any(|work| work.session == session)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(session: SessionKey, rows: u32, urgent: bool) -> Work {
        Work { session, rows, urgent, class: 30 }
    }

    fn planned(scheduler: &mut Scheduler) -> Vec<(SessionKey, u32)> {
        let mut step = vec![];
        scheduler.plan(&mut step);
        step.iter().map(|work| (work.session, work.rows)).collect()
    }

    #[test]
    fn verify_rows_go_before_prompt_chunks_within_the_budget() {
        let mut scheduler = Scheduler::new(100, 8);
        for add in [work(1, 60, false), work(2, 60, false), work(3, 8, true), work(4, 30, false)] {
            scheduler.enqueue(add).unwrap();
        }
        assert_eq!(planned(&mut scheduler), [(3, 8), (1, 60), (4, 30)]);
        assert_eq!(planned(&mut scheduler), [(2, 60)]);
        assert_eq!(planned(&mut scheduler), []);
    }

    #[test]
    fn a_session_never_overtakes_itself() {
        let mut scheduler = Scheduler::new(100, 8);
        scheduler.enqueue(work(1, 80, false)).unwrap();
        scheduler.enqueue(work(1, 1, true)).unwrap();
        scheduler.enqueue(work(2, 1, true)).unwrap();
        scheduler.enqueue(work(1, 1, true)).unwrap();
        assert_eq!(planned(&mut scheduler), [(2, 1), (1, 80)]);
        assert_eq!(planned(&mut scheduler), [(1, 1)]);
        assert_eq!(planned(&mut scheduler), [(1, 1)]);
    }

    #[test]
    fn classes_do_not_mix_and_none_starves() {
        let mut scheduler = Scheduler::new(100, 8);
        scheduler.enqueue(Work { class: 29, ..work(1, 1, true) }).unwrap();
        scheduler.enqueue(work(2, 1, true)).unwrap();
        scheduler.enqueue(Work { class: 29, ..work(3, 1, true) }).unwrap();
        assert_eq!(planned(&mut scheduler), [(1, 1), (3, 1)]);
        assert_eq!(planned(&mut scheduler), [(2, 1)]);
    }

    #[test]
    fn the_queue_is_bounded_and_forgets() {
        let mut scheduler = Scheduler::new(100, 2);
        scheduler.enqueue(work(1, 1, true)).unwrap();
        scheduler.enqueue(work(2, 1, true)).unwrap();
        assert_eq!(scheduler.enqueue(work(3, 1, true)), Err(QueueFull { queued: 2 }));
        scheduler.forget(1);
        assert_eq!(planned(&mut scheduler), [(2, 1)]);
    }
}
