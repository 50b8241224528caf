//! Choice of the pending rows that run in the next step: rows computed catch up with rows wanted.
//!
//! A step has a row budget. Verifies, which somebody waits for, go before chunks of prompts. Among
//! either, the device goes first that has been served the fewest rows, and of its works the
//! oldest, so a device with a hundred sessions gets what one with a single session gets while
//! both wait. A device that comes back from a pause starts level with those that wait, not with a
//! credit. (Start-time fair queueing. Turns with a quantum, as in deficit round robin, need one of
//! the largest work, and would run sixty verifies of one device before the next one's first.)
//!
//! Prompts do not starve behind verifies: the one whose turn it is waits [`PROMPT_PATIENCE`] steps
//! at most, and then goes before them.
//!
//! A [`Bound`] says how long a step with prompts may take. A chunk of a prompt is then cut: its
//! first rows run in this step, and the rest is the newest work of its device, so that a client's
//! chunk size decides neither how long others wait for the step nor whose turn is next. Verifies
//! and prompts then take turns instead of sharing steps: a verify waits for at most one step of
//! prompts, and its own is as short as without them. (For the same time between tokens, prompts
//! get as much of the time as if both shared each step where a round is short, and more where it
//! is long: a verify's way through a shared step costs it all of the prompts' time once more.)
//!
//! A step costs as many looks as it has works, and a few more: nobody looks over all that waits.
//! Integers only: no clock, no transport, no model.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use rustc_hash::FxHashMap;

/// A session in the scheduler's eyes.
pub type SessionKey = u64;
/// A device in the scheduler's eyes: sessions with the same key share its turn.
pub type DeviceKey = u64;

/// Steps for which the prompt whose turn it is waits behind verifies.
pub const PROMPT_PATIENCE: u32 = 8;
/// Devices whose work does not fit what is left of a step, until nobody else is asked.
const MISSES_MAX: usize = 16;

/// Fewest rows of a prompt's piece, where the prompt has so many left, however long they take.
pub const PIECE_ROWS_MIN: u32 = 4;

/// A prompt chunk, or the rows of one verify.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchItem {
    /// The session of the rows.
    pub session: SessionKey,
    /// The device of the session: always the same for one session.
    pub device: DeviceKey,
    /// Their number.
    pub rows: u32,
    /// Rows of the session before these.
    pub context: u32,
    /// Somebody waits for a token: runs before prompt chunks.
    pub urgent: bool,
    /// True if its rows need not run in one step. An urgent work is never cut.
    pub divisible: bool,
    /// Works of different classes never share a step (they leave at different layers).
    pub class: u32,
}

/// The time that a step may take, and what rows take of it, all in one unit: picoseconds, say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound {
    /// A step with rows of prompts.
    pub step: u64,
    /// A step, whatever is in it.
    pub fixed: u64,
    /// A row.
    pub row: u64,
    /// A row, for each row that it attends to.
    pub row_context: u64,
    /// Rows of one prompt in a step at most, whatever they take.
    pub piece: u32,
}

impl Bound {
    /// No bound but the row budget; nothing is cut.
    pub const NONE: Self =
        Self { step: u64::MAX, fixed: 0, row: 0, row_context: 0, piece: u32::MAX };

    /// A step may take any time, but no more than this many rows of one prompt (Sarathi-Serve,
    /// arXiv 2403.02310).
    #[must_use]
    pub const fn of_rows(piece: u32) -> Self {
        Self { piece, ..Self::NONE }
    }

    /// True if the time of a step with prompts is bounded.
    fn is_timed(&self) -> bool {
        self.step < u64::MAX
    }

    /// `rows` rows behind `context` rows; a row sees half of the others as well.
    fn cost(&self, rows: u32, context: u32) -> u64 {
        let (rows, context) = (u64::from(rows), u64::from(context));
        let attended = rows.saturating_mul(2 * context + rows) / 2;
        rows.saturating_mul(self.row).saturating_add(attended.saturating_mul(self.row_context))
    }

    /// The most of `rows` rows behind `context` rows that take no longer than `left`.
    fn rows_within(&self, left: u64, rows: u32, context: u32) -> u32 {
        let (mut fits, mut beyond) = (0, rows + 1);
        while beyond - fits > 1 {
            let middle = fits + (beyond - fits) / 2;
            if self.cost(middle, context) <= left { fits = middle } else { beyond = middle }
        }
        fits
    }
}

/// The rest of the step at hand.
struct Room {
    bound: Bound,
    rows: u32,
    time: u64,
    /// No row of a prompt is in it yet: the first piece joins however long it takes.
    no_prompt: bool,
}

impl Room {
    fn new(bound: Bound, rows: u32) -> Self {
        Self { bound, rows, time: bound.step.saturating_sub(bound.fixed), no_prompt: true }
    }

    /// Rows of `item` that fit; 0 if it has to wait.
    fn fits(&self, item: &BatchItem) -> u32 {
        if item.urgent || !self.bound.is_timed() {
            let piece = if item.divisible { self.bound.piece } else { u32::MAX };
            let rows = item.rows.min(piece);
            return if rows <= self.rows { rows } else { 0 };
        }
        let most = self.rows.min(item.rows);
        let in_time = self.bound.rows_within(self.time, most, item.context);
        let least = PIECE_ROWS_MIN.min(item.rows);
        let rows = if self.no_prompt { in_time.max(least) } else { in_time }.min(most);
        match item.divisible {
            true if rows >= least => rows,
            false if item.rows <= self.rows && (self.no_prompt || rows == item.rows) => item.rows,
            _ => 0,
        }
    }

    fn take(&mut self, item: &BatchItem) {
        self.rows -= item.rows;
        self.time = self.time.saturating_sub(self.bound.cost(item.rows, item.context));
        self.no_prompt &= item.urgent;
    }
}

/// Works that wait, and whose turn it is.
#[derive(Debug, Default)]
pub struct Scheduler {
    rows_max: u32,
    /// Number of the next work to arrive.
    arrivals: u64,
    /// The work of each session that has one.
    waiting: FxHashMap<SessionKey, Waiting>,
    verifies: Tier,
    prompts: Tier,
    /// Steps that passed over the prompt whose turn it was.
    passed_over: u32,
    /// Rests of works of the step at hand that were cut.
    cut: Vec<BatchItem>,
    /// Devices of the step at hand whose work did not fit.
    missed: Vec<Candidate>,
    /// Devices that were looked at, ever.
    #[cfg(test)]
    looks: u64,
}

/// A work that waits, and when it came.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    item: BatchItem,
    arrival: u64,
}

impl Scheduler {
    /// A scheduler of steps of at most `rows_max` rows.
    #[must_use]
    pub fn new(rows_max: u32) -> Self {
        Self { rows_max, missed: Vec::with_capacity(MISSES_MAX), ..Self::default() }
    }

    /// Works that wait.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.waiting.len()
    }

    /// Works of prompts that wait.
    #[must_use]
    pub fn prompts(&self) -> usize {
        self.prompts.works
    }

    /// True if a work of the session, or what is left of one, waits.
    #[must_use]
    pub fn holds(&self, session: SessionKey) -> bool {
        self.waiting.contains_key(&session)
    }

    /// Takes the next work of a session that has none waiting: a session runs once a step, in
    /// order, since what its next frame commits may move rows that this step writes.
    ///
    /// # Panics
    /// If the session has a work waiting; or if the work could never run: no rows, or more than
    /// the budget.
    pub fn enqueue(&mut self, item: BatchItem) {
        assert!(item.rows > 0 && item.rows <= self.rows_max, "{item:?} does not fit a step");
        assert!(!self.holds(item.session), "{item:?} comes while another waits");
        let waiting = Waiting { item, arrival: self.arrivals };
        self.arrivals += 1;
        self.waiting.insert(item.session, waiting);
        self.tier(item.urgent).edit(item.device, |share| {
            share.items.insert((item.class, waiting.arrival), item.session);
        });
    }

    /// Chooses the works of the next step into `step`. One that is cut comes with its first rows;
    /// the others wait for a later step, and nothing of the session runs before them.
    pub fn schedule(&mut self, bound: Bound, step: &mut Vec<BatchItem>) {
        step.clear();
        let prompt = self.prompts.next();
        let is_bounded = bound.is_timed();
        let patience = if is_bounded { 1 } else { PROMPT_PATIENCE };
        let is_due = prompt.is_some() && self.passed_over >= patience;
        let leader = match (prompt.filter(|_| is_due), self.verifies.next()) {
            (Some(due), _) => due,
            (None, Some(verify)) => verify,
            (None, None) => match prompt {
                Some(prompt) => prompt,
                None => return,
            },
        };
        let class = leader.class;
        let mut room = Room::new(bound, self.rows_max);
        if is_due && !is_bounded {
            self.take(false, class, 1, &mut room, step);
        }
        if !is_due || !is_bounded {
            self.take(true, class, usize::MAX, &mut room, step);
        }
        if step.is_empty() || !is_bounded {
            self.take(false, class, usize::MAX, &mut room, step);
        }
        if let Some(candidate) = prompt {
            let ran = step.iter().any(|item| item.session == candidate.session);
            self.passed_over = if ran { 0 } else { self.passed_over + 1 };
        }
        let mut cut = std::mem::take(&mut self.cut);
        cut.drain(..).for_each(|rest| self.enqueue(rest));
        self.cut = cut;
    }

    /// Puts works of one urgency and class into `step`, `items_max` at most, as there is room.
    fn take(
        &mut self,
        urgent: bool,
        class: u32,
        items_max: usize,
        room: &mut Room,
        step: &mut Vec<BatchItem>,
    ) {
        let end = step.len().saturating_add(items_max);
        let tier = if urgent { &mut self.verifies } else { &mut self.prompts };
        while step.len() < end && room.rows > 0 && self.missed.len() < MISSES_MAX {
            let Some(candidate) = tier.next_of(class) else { break };
            #[cfg(test)]
            {
                self.looks += 1;
            }
            let whole = self.waiting[&candidate.session].item;
            let rows = room.fits(&whole);
            if rows == 0 {
                tier.set_aside(&candidate);
                self.missed.push(candidate);
                continue;
            }
            let item = BatchItem { rows, ..whole };
            tier.serve(&candidate, rows);
            room.take(&item);
            let (left, context) = (whole.rows - rows, whole.context + rows);
            self.waiting.remove(&item.session);
            self.cut.extend((left > 0).then_some(BatchItem { rows: left, context, ..whole }));
            step.push(item);
        }
        for candidate in self.missed.drain(..) {
            tier.bring_back(&candidate);
        }
    }

    /// Forgets the work of a session, and what is left of one.
    pub fn forget(&mut self, session: SessionKey) {
        let Some(Waiting { item, arrival }) = self.waiting.remove(&session) else { return };
        self.tier(item.urgent).edit(item.device, |share| {
            share.items.remove(&(item.class, arrival));
        });
    }

    fn tier(&mut self, urgent: bool) -> &mut Tier {
        if urgent { &mut self.verifies } else { &mut self.prompts }
    }
}

/// Works of equal urgency, by device.
#[derive(Debug, Default)]
struct Tier {
    shares: FxHashMap<DeviceKey, Share>,
    /// Devices with works, by class: rows served, then arrival of the oldest work.
    ready: BTreeMap<u32, BTreeSet<(u64, u64, DeviceKey)>>,
    /// Devices without works that were served more than the level; they are not forgotten yet.
    ahead: BTreeSet<(u64, DeviceKey)>,
    /// Shares of devices that were forgotten, for newcomers.
    spare: Vec<Share>,
    /// Rows that the device chosen last had been served before: where newcomers start.
    level: u64,
    /// Works that wait.
    works: usize,
}

/// Rows that one device has had, and works that it has waiting.
#[derive(Debug, Default)]
struct Share {
    served: u64,
    /// Order by class and arrival.
    items: BTreeMap<(u32, u64), SessionKey>,
}

impl Share {
    /// The oldest work of each class: class and arrival.
    fn oldest(&self) -> impl Iterator<Item = (u32, u64)> {
        let last = self.items.keys().next_back().map(|(class, _)| *class);
        let mut next = self.items.keys().next().copied();
        std::iter::from_fn(move || {
            let (class, arrival) = next?;
            let is_last = last == Some(class);
            let above = (!is_last).then(|| self.items.range((class + 1, 0)..).next());
            next = above.flatten().map(|(key, _)| *key);
            Some((class, arrival))
        })
    }
}

/// A device's turn, and the work that it would run.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    class: u32,
    served: u64,
    arrival: u64,
    device: DeviceKey,
    session: SessionKey,
}

impl Tier {
    /// The next turn, of any class.
    fn next(&self) -> Option<Candidate> {
        let firsts = self.ready.iter().filter_map(|(class, of)| Some((*of.first()?, *class)));
        let (_, class) = firsts.min()?;
        self.next_of(class)
    }

    /// The next turn in a step of `class`.
    fn next_of(&self, class: u32) -> Option<Candidate> {
        let (served, arrival, device) = *self.ready.get(&class)?.first()?;
        let session = self.shares[&device].items[&(class, arrival)];
        Some(Candidate { class, served, arrival, device, session })
    }

    /// The work of `candidate` runs.
    fn serve(&mut self, candidate: &Candidate, rows: u32) {
        self.level = self.level.max(candidate.served);
        self.edit(candidate.device, |share| {
            share.items.remove(&(candidate.class, candidate.arrival));
            share.served += u64::from(rows);
        });
        while let Some(&(served, device)) = self.ahead.first()
            && served <= self.level
        {
            self.ahead.pop_first();
            self.spare.extend(self.shares.remove(&device));
        }
    }

    fn set_aside(&mut self, candidate: &Candidate) {
        let of_class = self.ready.get_mut(&candidate.class).expect("it was ready");
        of_class.remove(&(candidate.served, candidate.arrival, candidate.device));
    }

    fn bring_back(&mut self, candidate: &Candidate) {
        let of_class = self.ready.entry(candidate.class).or_default();
        of_class.insert((candidate.served, candidate.arrival, candidate.device));
    }

    /// Changes what a device has, and keeps its places in order.
    fn edit(&mut self, device: DeviceKey, edit: impl FnOnce(&mut Share)) {
        let Self { shares, ready, ahead, spare, level, works } = self;
        let newcomer = || Share { served: 0, ..spare.pop().unwrap_or_default() };
        let share = shares.entry(device).or_insert_with(newcomer);
        if share.items.is_empty() {
            ahead.remove(&(share.served, device));
            share.served = share.served.max(*level);
        }
        for (class, arrival) in share.oldest() {
            let of_class = ready.get_mut(&class).expect("it was ready");
            of_class.remove(&(share.served, arrival, device));
        }
        let before = share.items.len();
        edit(share);
        *works = *works + share.items.len() - before;
        for (class, arrival) in share.oldest() {
            ready.entry(class).or_default().insert((share.served, arrival, device));
        }
        if share.items.is_empty() {
            if share.served > *level {
                ahead.insert((share.served, device));
            } else {
                spare.extend(shares.remove(&device));
            }
        }
    }
}
