//! Numbers of drafts that pay: as many as give the most tokens a second, by what was measured.
//!
//! A round of `k` drafts is expected to yield `1 + p_1 + .. + p_k` tokens (the decided one, and
//! each draft with its probability) and to take
//! `device(k + 1) + wait(k + 1) + step(k + 1) + tokens * head + drafting`, as `Estimator::round`
//! has it. Zero drafts may win. Rows that go up while others are away pay by other rules, since
//! nobody waits for them unless verification comes by: see `Estimator::draft_batch`. Pure: the
//! caller measures.

use super::lookup::BRANCHES_MAX;
use super::tree::Proposal;
use super::{BINS, CLASSES, DrafterKind, Source};
use crate::estimate::{Average, Estimator};
use crate::sequence::PENDING_ROWS_MAX;

/// Sizes and thresholds of drafting.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DraftPolicy {
    /// Nodes of a tree at most, the decided token at its root not counted.
    pub nodes_max: usize,
    /// Drafts of the trained drafter for one node at most.
    pub width: usize,
    /// Branches of prompt lookup at most.
    pub branches_max: usize,
    /// Nodes that are computed together: more is fewer steps, less is a better choice of nodes.
    pub level_nodes: usize,
    /// Nodes that are added at a time to a tree that is away: they make a step of their own.
    pub batch_nodes: usize,
    /// Rows of one session that may be undecided in the cloud.
    pub pending_max: usize,
    /// Drafts of a chain at most (Kangaroo, arXiv 2404.18911, whose adapter HAT uses).
    pub chain_max: usize,
    /// Probability of a chain's drafts: the first that is less probable is the last, as in HAT
    /// (arXiv 2503.18989).
    pub chain_probability_min: f32,
    /// True if that last draft goes up, too. (HAT keeps it to draft on from.)
    pub sends_unsure: bool,
    /// True if each level of a tree leaves while the next is computed; otherwise all leave
    /// together.
    pub sends_levels: bool,
}

impl DraftPolicy {
    /// The engine's own.
    pub const DEFAULT: Self = Self {
        nodes_max: 32,
        width: 8,
        branches_max: BRANCHES_MAX,
        level_nodes: 8,
        batch_nodes: 16,
        pending_max: PENDING_ROWS_MAX,
        chain_max: 6,
        chain_probability_min: 0.6,
        sends_unsure: true,
        sends_levels: true,
    };

    /// Nodes of the next level of a tree that has `nodes` nodes: a small tree chooses more often.
    #[must_use]
    pub const fn level(&self, nodes: usize) -> usize {
        if nodes < self.level_nodes { self.level_nodes.div_ceil(2) } else { self.level_nodes }
    }
}

/// Drafts have to promise this much more than none: what is measured is noisy, and a row that
/// brings nothing costs others too.
const GAIN_MIN: f64 = 1.03;

/// Number of drafts of a tree that pay, after so many seconds of `drafting`. `probabilities` are
/// those of its nodes, in the order in which it grew, the root left out. While too little is known
/// the answer is none: plain rounds teach.
pub(crate) fn drafts_that_pay(
    estimator: &Estimator,
    probabilities: impl IntoIterator<Item = f32>,
    drafting: f64,
) -> usize {
    let head = estimator.head.mean();
    let Some(plain) = estimator.round(1) else { return 0 };
    let plain = plain + head + drafting;
    let (mut best, mut rate_max) = (0, GAIN_MIN / plain.max(f64::MIN_POSITIVE));
    let mut tokens = 1.0;
    for (drafts, probability) in (1..).zip(probabilities) {
        tokens += f64::from(probability);
        let Some(round) = estimator.round(drafts + 1) else { break };
        let rate = tokens / (round + drafting + tokens * head);
        if rate > rate_max {
            (best, rate_max) = (drafts, rate);
        }
    }
    best
}

/// The worth of asking the trained drafter for one request, by what that has brought.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Asking {
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
    /// A round in which it was asked has brought this many tokens in so many seconds. `plain` is
    /// what a second brings without drafts, if that is known.
    pub(crate) fn note(&mut self, tokens: usize, seconds: f64, plain: Option<f64>) {
        self.tokens.note(tokens as f64);
        self.seconds.note(seconds);
        let pays = plain.is_none_or(|plain| self.tokens.mean() >= plain * self.seconds.mean());
        self.pause = if pays { 0 } else { (2 * self.pause).clamp(1, PAUSE_MAX) };
        self.left = self.pause;
    }

    /// True if it is to be asked in the round that begins.
    pub(crate) fn is_worth_it(&mut self) -> bool {
        let asks = self.left == 0;
        self.left = self.left.saturating_sub(1);
        asks
    }
}

/// Shares of drafts that were right, by drafter and class.
#[derive(Clone, Debug)]
pub(crate) struct Acceptance {
    rates: [[f32; CLASSES]; DrafterKind::ALL.len()],
}

impl Default for Acceptance {
    fn default() -> Self {
        let middle = |class: usize| middle_of_bin(class % BINS);
        Self { rates: [LOOKUP_FIRST, std::array::from_fn(middle)] }
    }
}

/// Initial acceptance rates of lookup, by match length 1 to 8: first choices, then the others.
const LOOKUP_FIRST: [f32; CLASSES] = [
    0.25, 0.4, 0.55, 0.65, 0.72, 0.78, 0.82, 0.85, //
    0.08, 0.2, 0.4, 0.6, 0.7, 0.75, 0.8, 0.82,
];

/// The probability that drafts of a class of the trained drafter claim, by and large.
fn middle_of_bin(bin: usize) -> f32 {
    (bin as f32 + 0.5) / BINS as f32
}

/// Weight of one test: a single token says little, and a round tests several.
const PRESENT: f32 = 0.02;

impl Acceptance {
    /// Share of the drafts from `source` that are right. `0..=1`
    pub(crate) fn rate(&self, source: Source) -> f32 {
        self.rates[source.drafter as usize][usize::from(source.class)]
    }

    /// Probability of a draft of the trained drafter: its claim, times the share of its class that
    /// was right over the share that was claimed.
    pub(crate) fn corrected(&self, proposal: &Proposal) -> f32 {
        let claimed = middle_of_bin(usize::from(proposal.source.class) % BINS);
        (proposal.probability * self.rate(proposal.source) / claimed).min(1.0)
    }

    /// A draft from `source` was compared with the decided token.
    pub(crate) fn note(&mut self, source: Source, right: bool) {
        let rate = &mut self.rates[source.drafter as usize][usize::from(source.class)];
        *rate += PRESENT * (f32::from(u8::from(right)) - *rate);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::estimate::tests::{SIZES, shown, step};

    /// Milliseconds: steps as `fixed + rows * each`, a wait, a head.
    fn estimator((fixed, each): (f64, f64), wait_ms: f64, head_ms: f64) -> Estimator {
        shown(&SIZES, |rows| fixed + each * rows as f64, wait_ms, head_ms)
    }

    fn falling(first: f32, by: f32) -> impl Iterator<Item = f32> {
        (0..32).map(move |depth| first * by.powi(depth))
    }

    #[test]
    fn nothing_is_drafted_before_anything_is_known() {
        let nothing = Estimator::default();
        assert_eq!(drafts_that_pay(&nothing, falling(1.0, 1.0), 0.0), 0);
        assert_eq!(nothing.plain_rate(), None);
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
            // No link at all: only sure drafts.
            ((2.0, 2.0, 0.0, 1.0), (0.5, 0.8), 0),
            ((2.0, 2.0, 0.0, 1.0), (0.98, 0.98), 9),
            // A hopeless drafter.
            ((7.0, 0.5, 40.0, 1.0), (0.01, 0.5), 0),
            // A tree of many faint drafts.
            ((7.0, 0.1, 100.0, 1.0), (0.05, 1.0), 32),
        ];
        for (index, ((fixed, each, wait, head), (first, by), drafts)) in
            table.into_iter().enumerate()
        {
            let estimator = estimator((fixed, each), wait, head);
            let pay = drafts_that_pay(&estimator, falling(first, by), 0.0);
            assert_eq!(pay, drafts, "row {index}");
        }
    }

    #[test]
    fn more_waiting_never_means_fewer_drafts() {
        let mut before = 0;
        for wait_ms in [0.0, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0] {
            let estimator = estimator((5.0, 1.0), wait_ms, 1.0);
            let drafts = drafts_that_pay(&estimator, falling(0.6, 0.85), 0.0);
            assert!(drafts >= before, "{drafts} drafts at {wait_ms} ms, {before} before");
            before = drafts;
        }
        assert!(before > 5);
    }

    #[test]
    fn a_full_cloud_makes_rows_dear() {
        let step_ms = |rows| if rows > 64 { 40.0 } else { 5.0 };
        let mut estimator = shown(&[1, 16, 64, 128], step_ms, 5.0, 1.0);
        let alone = drafts_that_pay(&estimator, falling(0.5, 0.8), 0.0);
        estimator.note_returned(&step(2, 64, 5e-3, 0.0, 5e-3));
        assert!(drafts_that_pay(&estimator, falling(0.5, 0.8), 0.0) < alone);
    }

    /// Decisions of a device in a crowd of devices that decide the same.
    #[test]
    fn a_crowd_drafts_only_where_rows_are_cheap() {
        let in_crowd = |(fixed, each): (f64, f64), devices: usize| {
            let step_s = |rows: usize| (fixed + each * rows as f64) / 1e3;
            let mut estimator = estimator((fixed, each), 2.0, 1.0);
            for rows in [1, 2, 4, 8, 16, 32, 64, 128, 256, 512] {
                estimator.step.note(rows as u32, 0, step_s(rows));
            }
            for _ in 0..20 {
                let own = 1 + drafts_that_pay(&estimator, falling(0.5, 0.8), 0.0);
                let rows = devices * own;
                let queue_s = if devices > 1 { step_s(rows) } else { 0.0 };
                estimator.note_returned(&step(own, rows, step_s(rows), queue_s, 2e-3));
            }
            drafts_that_pay(&estimator, falling(0.5, 0.8), 0.0)
        };
        // A GPU's step takes what its weights take, a CPU's what its rows take.
        assert!(in_crowd((7.0, 1e-4), 30) >= in_crowd((7.0, 1e-4), 1));
        assert!(in_crowd((12.0, 2.2), 1) > 0);
        assert_eq!(in_crowd((12.0, 2.2), 30), 0);
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
        let proposal = |rank, probability| {
            let source = Source::of_model(rank, probability);
            Proposal { token: 1, probability, source }
        };
        assert_eq!(acceptance.corrected(&proposal(0, 0.55)), 0.55);
        for round in 0..2000 {
            acceptance.note(proposal(0, 0.55).source, round % 5 == 0);
        }
        let corrected = acceptance.corrected(&proposal(0, 0.55));
        assert!((0.15..0.25).contains(&corrected), "{corrected}");
        assert!(acceptance.corrected(&proposal(0, 0.6)) > corrected);
        assert_eq!(acceptance.corrected(&proposal(1, 0.55)), 0.55, "another class");
        assert_eq!(Source::of_model(0, 1.0).class, 7);
        assert_eq!(Source::of_model(3, 0.0).class, 8);
    }

    #[test]
    fn acceptance_moves_towards_what_is_seen() {
        let mut acceptance = Acceptance::default();
        let source = |class| Source { drafter: DrafterKind::Lookup, class };
        let before = acceptance.rate(source(2));
        (0..500).for_each(|_| acceptance.note(source(2), false));
        assert!(acceptance.rate(source(2)) < 0.01);
        assert_eq!(acceptance.rate(source(1)), LOOKUP_FIRST[1]);
        (0..500).for_each(|_| acceptance.note(source(2), true));
        assert!(acceptance.rate(source(2)) > before.max(0.99));
    }
}
