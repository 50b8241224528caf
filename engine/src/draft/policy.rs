//! How many drafts pay: as many as give the most tokens a second, by what was measured.
//!
//! A round of `k` drafts is expected to yield `1 + p_1 + .. + p_k` tokens (the decided one, and
//! each draft with its probability) and to take
//! `device(k + 1) + wait(k + 1) + step(k + 1) + tokens * head + drafting`. All of these are moving
//! averages of what was seen, the first three as functions of the rows. Zero drafts may win.
//!
//! Others share the step and decide by the same rules. Whoever took their rows for given would
//! find that a few more of its own hardly lengthen a step that is long anyway; all would, and the
//! cloud would compute little but drafts. So `step` is that of a cloud whose rows all grow as
//! one's own do, and the time in its queue grows with it.
//!
//! Rows that go up while others are away pay by other rules, since nobody waits for them unless
//! the walk comes by: see [`Costs::wave`]. Pure: the caller measures.

use std::time::Instant;

use super::tree::Guess;
use super::{BINS, CLASSES, Drafter, Source};

/// Share of the past in a moving average of times, as in the paper (arXiv 2503.18989).
pub const PAST: f64 = 0.8;

/// Drafts have to promise this much more than none: what is measured is noisy, and a row that
/// brings nothing costs others too.
const GAIN_MIN: f64 = 1.03;

/// A moving average, of seconds mostly.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Average {
    value: Option<f64>,
}

impl Average {
    /// Takes one measurement.
    pub fn note(&mut self, value: f64) {
        let past = self.value.unwrap_or(value);
        self.value = Some(PAST * past + (1.0 - PAST) * value);
    }

    /// What it is now; 0 before the first measurement.
    #[must_use]
    pub fn mean(&self) -> f64 {
        self.value.unwrap_or(0.0)
    }
}

/// Row counts are averaged in cells: 1, 2, 3 to 4, 5 to 8, and so on to 512.
const CELLS: usize = 10;

/// Seconds as a function of rows: averages by size, lines between them.
#[derive(Clone, Debug, Default)]
pub struct ByRows {
    cells: [Option<Cell>; CELLS],
}

/// Means of the sizes and the times that fell into one cell.
#[derive(Clone, Copy, Debug)]
struct Cell {
    rows: f64,
    seconds: f64,
}

impl ByRows {
    /// So many rows took so long.
    pub fn note(&mut self, rows: usize, seconds: f64) {
        let index = rows.max(1).next_power_of_two().trailing_zeros() as usize;
        let rows = rows.max(1) as f64;
        let cell = &mut self.cells[index.min(CELLS - 1)];
        let past = cell.unwrap_or(Cell { rows, seconds });
        let mean = |past: f64, now: f64| PAST * past + (1.0 - PAST) * now;
        *cell = Some(Cell { rows: mean(past.rows, rows), seconds: mean(past.seconds, seconds) });
    }

    /// How long so many rows may take; `None` before the first measurement. Beyond the largest
    /// size that was seen the line goes on; a single size, or a smaller one, is scaled.
    #[must_use]
    pub fn seconds(&self, rows: usize) -> Option<f64> {
        let rows = rows as f64;
        let known = || self.cells.iter().flatten();
        let below = known().rfind(|cell| cell.rows <= rows);
        let above = known().find(|cell| cell.rows > rows);
        let (from, to) = match (below, above) {
            (Some(below), Some(above)) => (below, above),
            (Some(last), None) => match known().rev().nth(1) {
                Some(before) => (before, last),
                None => return Some(last.seconds * rows / last.rows),
            },
            (None, first) => return first.map(|first| first.seconds * rows / first.rows),
        };
        let slope = ((to.seconds - from.seconds) / (to.rows - from.rows)).max(0.0);
        Some(from.seconds + slope * (rows - from.rows))
    }
}

/// What was measured of one device and its cloud.
#[derive(Clone, Debug, Default)]
pub struct Costs {
    /// The device's own layers, by rows.
    pub device: ByRows,
    /// From the last byte sent to the first row back, the cloud's queue and step taken off.
    pub wait: ByRows,
    /// The cloud's step, by its rows: those of other sessions count.
    pub step: ByRows,
    /// Rows of other sessions in a step.
    others: Average,
    /// Rows of a step for each of one's own; 1 where there are no others.
    crowd: Average,
    /// Time in the cloud's queue for each second of the step after it.
    queue: Average,
    /// Tail layers, LM head and sampling of one visited row.
    pub head: Average,
    /// Tokens of a round.
    pub tokens: Average,
    /// Drafts that are added while rows are away: making them.
    pub wave: Average,
}

impl Costs {
    /// How long a round with so many rows may take, its visited rows not counted; `None` if too
    /// little is known.
    #[must_use]
    pub fn round(&self, rows: usize) -> Option<f64> {
        let crowd = self.crowd.mean().max(1.0);
        let step = self.step.seconds((rows as f64 * crowd).round() as usize)?;
        let cloud = step * (1.0 + self.queue.mean());
        Some(self.device.seconds(rows)? + self.wait.seconds(rows)? + cloud)
    }

    /// A step of `step_rows` rows, `own` of them one's own, took so long, and these waited `queue`
    /// seconds for it.
    pub fn note_step(&mut self, own: usize, step_rows: usize, seconds: f64, queue: f64) {
        self.step.note(step_rows, seconds);
        self.queue.note(queue / seconds.max(f64::MIN_POSITIVE));
        self.others.note(step_rows.saturating_sub(own) as f64);
        self.crowd.note(step_rows as f64 / own.max(1) as f64);
    }

    /// Tokens a second without any drafts; `None` if too little is known.
    #[must_use]
    pub fn plain_rate(&self) -> Option<f64> {
        let round = self.round(1)? + self.head.mean();
        (round > 0.0).then_some(1.0 / round)
    }

    /// How many drafts of a tree pay, after so many seconds of `drafting`. `probabilities` are
    /// those of its nodes, in the order in which it grew, the root left out. While too little is
    /// known the answer is none: plain rounds teach.
    #[must_use]
    pub fn drafts_that_pay(
        &self,
        probabilities: impl IntoIterator<Item = f32>,
        drafting: f64,
    ) -> usize {
        let head = self.head.mean();
        let Some(plain) = self.round(1) else { return 0 };
        let plain = plain + head + drafting;
        let (mut best, mut rate_max) = (0, GAIN_MIN / plain.max(f64::MIN_POSITIVE));
        let mut tokens = 1.0;
        for (drafts, probability) in (1..).zip(probabilities) {
            tokens += f64::from(probability);
            let Some(round) = self.round(drafts + 1) else { break };
            let rate = tokens / (round + drafting + tokens * head);
            if rate > rate_max {
                (best, rate_max) = (drafts, rate);
            }
        }
        best
    }

    /// A round has brought so many tokens.
    pub fn note_round(&mut self, tokens: usize) {
        self.tokens.note(tokens as f64);
    }

    /// How many rows, of at most `rows_max`, may be added while others are away, and how probable
    /// each has to be.
    ///
    /// They run in a step of their own. If the walk comes by, a wait is saved; if it leaves the
    /// tree before, the next root may find the cloud busy with them. It does not if that step is
    /// shorter than the link's way there and back, and so no longer step is sent. A row that the
    /// walk comes by saves the time that a token takes; it has to be worth more than the time that
    /// the row costs device and cloud.
    #[must_use]
    pub fn wave(&self, rows_max: usize) -> (usize, f32) {
        let none = (0, 0.0);
        let others = self.others.mean().round() as usize;
        let step = |rows: usize| self.step.seconds(rows + others);
        let device = |rows: usize| self.device.seconds(rows);
        let (Some(wait), Some(round)) = (self.wait.seconds(1), self.round(1)) else { return none };
        let Some(rows) = (1..=rows_max).rev().find(|rows| step(*rows).is_some_and(|s| s <= wait))
        else {
            return none;
        };
        let each = |of: &dyn Fn(usize) -> Option<f64>| {
            Some((of(rows.max(2))? - of(1)?).max(0.0) / (rows.max(2) - 1) as f64)
        };
        let (Some(step), Some(device)) = (each(&step), each(&device)) else { return none };
        let token = (round + self.head.mean()) / self.tokens.mean().max(1.0);
        (rows, ((step + device) / token.max(f64::MIN_POSITIVE)).min(1.0) as f32)
    }

    /// Whether the output of `rows` rows that were sent at `sent` will be back before another wave
    /// of drafts could be made.
    #[must_use]
    pub fn is_due(&self, now: Instant, sent: Instant, rows: usize) -> bool {
        let others = self.others.mean().round() as usize;
        let away = self.wait.seconds(rows).zip(self.step.seconds(rows + others));
        let (wait, step) = away.unwrap_or_default();
        let away = wait + step * (1.0 + self.queue.mean());
        now.duration_since(sent).as_secs_f64() + self.wave.mean() > away
    }
}

/// Whether asking the trained drafter pays for one request, by what it has brought.
#[derive(Clone, Copy, Debug, Default)]
pub struct Asking {
    /// Tokens and seconds of rounds in which it was asked.
    tokens: Average,
    seconds: Average,
    /// Rounds to leave out after a round that did not pay; doubles each time.
    pause: u32,
    left: u32,
}

/// Longest time without asking, in rounds.
const PAUSE_MAX: u32 = 32;

impl Asking {
    /// A round in which it was asked has brought so many tokens in so many seconds. `plain` is what
    /// a second brings without drafts, if that is known.
    pub fn note(&mut self, tokens: usize, seconds: f64, plain: Option<f64>) {
        self.tokens.note(tokens as f64);
        self.seconds.note(seconds);
        let pays = plain.is_none_or(|plain| self.tokens.mean() >= plain * self.seconds.mean());
        self.pause = if pays { 0 } else { (2 * self.pause).clamp(1, PAUSE_MAX) };
        self.left = self.pause;
    }

    /// Whether to ask in the round that begins.
    pub fn is_worth_it(&mut self) -> bool {
        let asks = self.left == 0;
        self.left = self.left.saturating_sub(1);
        asks
    }
}

/// How often guesses of each drafter and class are right.
#[derive(Clone, Debug)]
pub struct Acceptance {
    rates: [[f32; CLASSES]; Drafter::ALL.len()],
}

impl Default for Acceptance {
    fn default() -> Self {
        let middle = |class: usize| middle_of_bin(class % BINS);
        Self { rates: [LOOKUP_FIRST, std::array::from_fn(middle)] }
    }
}

/// Where lookup begins, by match length 1 to 8: first choices, then the others.
const LOOKUP_FIRST: [f32; CLASSES] = [
    0.25, 0.4, 0.55, 0.65, 0.72, 0.78, 0.82, 0.85, //
    0.08, 0.2, 0.4, 0.6, 0.7, 0.75, 0.8, 0.82,
];

/// The probability that guesses of a class of the trained drafter claim, by and large.
fn middle_of_bin(bin: usize) -> f32 {
    (bin as f32 + 0.5) / BINS as f32
}

/// Weight of one test: a single token says little, and a round tests several.
const PRESENT: f32 = 0.02;

impl Acceptance {
    /// How often guesses from `source` are right. `0..=1`
    #[must_use]
    pub fn rate(&self, source: Source) -> f32 {
        self.rates[source.drafter as usize][usize::from(source.class)]
    }

    /// How probable a guess of the trained drafter is: what it says, times how often guesses of
    /// its class were right over how often they should have been.
    #[must_use]
    pub fn corrected(&self, guess: &Guess) -> f32 {
        let claimed = middle_of_bin(usize::from(guess.source.class) % BINS);
        (guess.probability * self.rate(guess.source) / claimed).min(1.0)
    }

    /// A guess from `source` was compared with the decided token.
    pub fn note(&mut self, source: Source, right: bool) {
        let rate = &mut self.rates[source.drafter as usize][usize::from(source.class)];
        *rate += PRESENT * (f32::from(u8::from(right)) - *rate);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn by_rows(points: &[(usize, f64)]) -> ByRows {
        let mut by_rows = ByRows::default();
        points.iter().for_each(|&(rows, seconds)| by_rows.note(rows, seconds));
        by_rows
    }

    /// Milliseconds: device and step as `fixed + rows * each`, a wait, a head.
    fn costs(step: (f64, f64), wait_ms: f64, head_ms: f64) -> Costs {
        let line = |fixed: f64, each: f64| {
            by_rows(
                &[1, 2, 4, 8, 16, 32, 64].map(|rows| (rows, (fixed + each * rows as f64) / 1e3)),
            )
        };
        let mut costs = Costs {
            device: line(0.3, 0.1),
            wait: line(wait_ms, 0.0),
            step: line(step.0, step.1),
            ..Costs::default()
        };
        costs.head.note(head_ms / 1e3);
        costs
    }

    fn falling(first: f32, by: f32) -> impl Iterator<Item = f32> {
        (0..32).map(move |depth| first * by.powi(depth))
    }

    #[test]
    fn averages_forget_by_a_fifth() {
        let mut average = Average::default();
        assert_eq!(average.mean(), 0.0);
        average.note(1.0);
        assert_eq!(average.mean(), 1.0);
        average.note(2.0);
        assert!((average.mean() - 1.2).abs() < 1e-12);
    }

    #[test]
    fn times_between_and_beyond_what_was_seen() {
        assert_eq!(ByRows::default().seconds(3), None);
        assert_eq!(by_rows(&[(4, 2.0)]).seconds(8), Some(4.0));
        assert_eq!(by_rows(&[(4, 2.0)]).seconds(1), Some(0.5));
        let two = by_rows(&[(1, 2.0), (101, 12.0)]);
        for (rows, seconds) in [(1, 2.0), (11, 3.0), (101, 12.0), (201, 22.0)] {
            assert_eq!(two.seconds(rows), Some(seconds), "{rows} rows");
        }
        // A larger step that took less is noise, not a slope.
        assert_eq!(by_rows(&[(1, 2.0), (100, 1.0)]).seconds(50), Some(2.0));
        assert_eq!(by_rows(&[(5000, 1.0)]).seconds(5000), Some(1.0));
        let mut moving = by_rows(&[(1, 1.0)]);
        moving.note(1, 2.0);
        assert!(moving.seconds(1).is_some_and(|seconds| (seconds - 1.2).abs() < 1e-12));
    }

    #[test]
    fn nothing_is_drafted_before_anything_is_known() {
        assert_eq!(Costs::default().drafts_that_pay(falling(1.0, 1.0), 0.0), 0);
        assert_eq!(Costs::default().wave(16), (0, 0.0));
        assert_eq!(Costs::default().plain_rate(), None);
    }

    #[test]
    fn drafts_pay_where_waiting_is_dear() {
        // (step fixed, step each, wait, head), (first probability, factor), drafts
        let table = [
            // Rows nearly free: almost as long as anything may be right.
            ((7.0, 0.01, 40.0, 1.0), (0.5, 0.8), 19),
            // A row costs as much as a step: worth it only if a round trip costs more.
            ((0.1, 7.0, 1.0, 1.0), (0.5, 0.8), 0),
            ((0.1, 7.0, 40.0, 1.0), (0.5, 0.8), 4),
            ((0.1, 7.0, 400.0, 1.0), (0.5, 0.8), 11),
            // No link at all: only sure guesses.
            ((2.0, 2.0, 0.0, 1.0), (0.5, 0.8), 0),
            ((2.0, 2.0, 0.0, 1.0), (0.98, 0.98), 9),
            // A hopeless drafter.
            ((7.0, 0.5, 40.0, 1.0), (0.01, 0.5), 0),
            // A tree of many faint guesses.
            ((7.0, 0.1, 100.0, 1.0), (0.05, 1.0), 32),
        ];
        for (index, ((fixed, each, wait, head), (first, by), drafts)) in
            table.into_iter().enumerate()
        {
            let costs = costs((fixed, each), wait, head);
            assert_eq!(costs.drafts_that_pay(falling(first, by), 0.0), drafts, "row {index}");
        }
    }

    #[test]
    fn more_waiting_never_means_fewer_drafts() {
        let mut before = 0;
        for wait_ms in [0.0, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0] {
            let drafts = costs((5.0, 1.0), wait_ms, 1.0).drafts_that_pay(falling(0.6, 0.85), 0.0);
            assert!(drafts >= before, "{drafts} drafts at {wait_ms} ms, {before} before");
            before = drafts;
        }
        assert!(before > 5);
    }

    #[test]
    fn a_full_cloud_makes_rows_dear() {
        let mut costs = costs((5.0, 0.0), 5.0, 1.0);
        costs.step = by_rows(&[(1, 5e-3), (16, 5e-3), (64, 5e-3), (128, 40e-3)]);
        let alone = costs.drafts_that_pay(falling(0.5, 0.8), 0.0);
        costs.note_step(2, 64, 5e-3, 0.0);
        assert!(costs.drafts_that_pay(falling(0.5, 0.8), 0.0) < alone);
    }

    /// What a device decides in a crowd of devices that decide the same.
    #[test]
    fn a_crowd_drafts_only_where_rows_are_cheap() {
        let in_crowd = |step: (f64, f64), devices: usize| {
            let mut costs = costs(step, 2.0, 1.0);
            for rows in [1, 2, 4, 8, 16, 32, 64, 128, 256, 512] {
                costs.step.note(rows, (step.0 + step.1 * rows as f64) / 1e3);
            }
            for _ in 0..20 {
                let own = 1 + costs.drafts_that_pay(falling(0.5, 0.8), 0.0);
                let rows = devices * own;
                let seconds = (step.0 + step.1 * rows as f64) / 1e3;
                costs.note_step(own, rows, seconds, if devices > 1 { seconds } else { 0.0 });
            }
            costs.drafts_that_pay(falling(0.5, 0.8), 0.0)
        };
        // A GPU's step takes what its weights take, a CPU's what its rows take.
        assert!(in_crowd((7.0, 1e-4), 30) >= in_crowd((7.0, 1e-4), 1));
        assert!(in_crowd((12.0, 2.2), 1) > 0);
        assert_eq!(in_crowd((12.0, 2.2), 30), 0);
    }

    #[test]
    fn rows_in_the_shadow_of_others_pay_by_the_link() {
        // Steps of 5 ms and half a millisecond a row; device 0.3 ms and 0.1 ms a row.
        let of = |wait_ms| {
            let mut costs = costs((5.0, 0.5), wait_ms, 1.0);
            costs.note_round(3);
            costs.wave(16)
        };
        assert_eq!(of(3.0).0, 0, "any step is longer than the link's way");
        assert_eq!(of(8.0).0, 6);
        let (rows, floor) = of(100.0);
        assert_eq!(rows, 16);
        // 0.6 ms a row against (100 + 5.5 + 0.4 + 1) / 3 ms a token.
        assert!((floor - 0.6 / 35.63).abs() < 1e-3, "{floor}");
        assert!(of(40.0).1 > floor, "a nearer cloud asks for surer guesses");
    }

    #[test]
    fn what_is_nearly_back_is_waited_for() {
        let mut costs = costs((5.0, 0.0), 20.0, 1.0);
        costs.wave.note(4e-3);
        let sent = Instant::now();
        let after = |ms: u64| sent + std::time::Duration::from_millis(ms);
        assert!(!costs.is_due(after(20), sent, 8));
        assert!(costs.is_due(after(22), sent, 8));
    }

    #[test]
    fn a_drafter_that_does_not_pay_is_asked_ever_less() {
        let mut asking = Asking::default();
        let asked: Vec<u32> = (0..100)
            .filter(|_| {
                let asks = asking.is_worth_it();
                if asks {
                    asking.note(1, 0.012, Some(100.0));
                }
                asks
            })
            .collect();
        assert_eq!(asked, [0, 2, 5, 10, 19, 36, 69]);
        (0..9).for_each(|_| asking.note(4, 0.012, Some(100.0)));
        assert!((0..9).all(|_| asking.is_worth_it()), "it pays again");
        asking.note(1, 9.0, None);
        assert!(asking.is_worth_it(), "nothing to compare with");
    }

    #[test]
    fn what_the_trained_drafter_claims_is_corrected() {
        let mut acceptance = Acceptance::default();
        let guess = |rank, probability| {
            let source = Source::adapter(rank, probability);
            Guess { token: 1, probability, source }
        };
        assert_eq!(acceptance.corrected(&guess(0, 0.55)), 0.55);
        for round in 0..2000 {
            acceptance.note(guess(0, 0.55).source, round % 5 == 0);
        }
        let corrected = acceptance.corrected(&guess(0, 0.55));
        assert!((0.15..0.25).contains(&corrected), "{corrected}");
        assert!(acceptance.corrected(&guess(0, 0.6)) > corrected);
        assert_eq!(acceptance.corrected(&guess(1, 0.55)), 0.55, "another class");
        assert_eq!(Source::adapter(0, 1.0).class, 7);
        assert_eq!(Source::adapter(3, 0.0).class, 8);
    }

    #[test]
    fn acceptance_moves_towards_what_is_seen() {
        let mut acceptance = Acceptance::default();
        let source = |class| Source { drafter: Drafter::Lookup, class };
        let before = acceptance.rate(source(2));
        (0..500).for_each(|_| acceptance.note(source(2), false));
        assert!(acceptance.rate(source(2)) < 0.01);
        assert_eq!(acceptance.rate(source(1)), LOOKUP_FIRST[1]);
        (0..500).for_each(|_| acceptance.note(source(2), true));
        assert!(acceptance.rate(source(2)) > before.max(0.99));
    }
}
