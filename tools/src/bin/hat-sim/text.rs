//! A text that is known only by how well it can be predicted.
//!
//! At each position of an answer a trained drafter has a confidence, and is right that often; the
//! right token may also be its second draft, its third, and so on. Confidences are logistic in
//! their logits around a middle that a published number of tokens a round fixes; the spread over
//! positions, the fall with each draft step and the shares of the later drafts are those of our
//! measured drafter. Prompt lookup is right in runs: a copied run begins now and then, and goes on
//! with one probability. Both are functions of the seed, the request and the position, so all
//! policies meet the same texts.
//!
//! Tokens are numbers. A prompt's are all different; each of an answer's stood before. Within a run
//! it is the one that followed the last token where that stood last, so that the engine's own
//! lookup finds as much as was stated; otherwise it is any other.

use std::collections::HashMap;

use hat_core::draft::tree::Proposal;
use hat_core::draft::{DraftPolicy, Source};
use hat_plan::TokenId;
use hat_tools::random::{Purpose, unit};

use crate::costs::Drafters;
use crate::policy::HEADS_NODES;

/// Drafts of one drafter for one position that are modelled. (The engine takes up to
/// `DraftPolicy::width` of them, 8.)
pub(crate) const WIDTH_MAX: usize = 5;
/// Drafts of prompt lookup at most.
pub(crate) const LOOKUP_MAX: usize = 10;
/// Tokens of a prompt that its device has sent before are numbered from here.
const KNOWN_FIRST: TokenId = 1 << 12;
/// Tokens of the first request's prompt are numbered from here, of each further one so many later.
const PROMPT_FIRST: TokenId = 1 << 16;
const PROMPT_STRIDE: TokenId = 1 << 13;
/// Tokens that are wrong are numbered from here.
const WRONG_FIRST: TokenId = 1 << 31;
/// Requests whose tokens can be told apart.
pub(crate) const REQUESTS_MAX: usize = 1 << 17;

/// Predictability of texts.
#[derive(Clone, Debug)]
pub(crate) struct Predictability {
    /// Middle of the logits of an adapter's confidences at the first draft step.
    adapter: f64,
    /// The same of heads.
    heads: f64,
    spread: f64,
    fall: f64,
    ranks: Vec<f64>,
    /// A copied run begins, and goes on.
    begins: f64,
    goes_on: f64,
}

/// One answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Text<'a> {
    pub(crate) predictability: &'a Predictability,
    pub(crate) seed: u64,
    pub(crate) request: u64,
}

/// Prompt and answer of a request.
#[derive(Clone, Debug)]
pub(crate) struct Tokens {
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) prompt_rows: usize,
}

/// The request whose prompt a token is of; `None` if it is of many.
pub(crate) fn request_of(token: TokenId) -> Option<usize> {
    let of_prompt = (PROMPT_FIRST..WRONG_FIRST).contains(&token);
    of_prompt.then(|| ((token - PROMPT_FIRST) / PROMPT_STRIDE) as usize)
}

/// Candidates of a trained drafter for one position: probabilities, best first, and the index of
/// the right one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Opinion {
    probabilities: [f64; WIDTH_MAX],
    width: usize,
    right: Option<usize>,
}

impl Opinion {
    pub(crate) fn confidence(&self) -> f64 {
        self.probabilities[0]
    }

    /// True if the right token is among the first `width` candidates.
    pub(crate) fn holds(&self, width: usize) -> bool {
        self.right.is_some_and(|rank| rank < width)
    }

    /// The first `width` drafts where `right_token` is right, below token `parent`.
    pub(crate) fn proposals(
        &self,
        right_token: TokenId,
        parent: TokenId,
        width: usize,
    ) -> impl Iterator<Item = Proposal> + use<> {
        let Self { right, probabilities, .. } = *self;
        (0..self.width.min(width)).map(move |rank| Proposal {
            token: if right == Some(rank) { right_token } else { wrong(parent, rank) },
            probability: probabilities[rank] as f32,
            source: Source::of_model(rank, probabilities[rank] as f32),
        })
    }
}

/// The number of a wrong token: the same for the same draft below the same token.
fn wrong(parent: u32, rank: usize) -> u32 {
    let share = unit(0, Purpose::Wrong, u64::from(parent), rank as u64);
    WRONG_FIRST + (share * f64::from(1u32 << 30)) as u32
}

impl Predictability {
    /// Middles and rates that give the stated tokens a round.
    pub(crate) fn fit(drafters: &Drafters) -> Self {
        let mut predictability = Self {
            adapter: 0.0,
            heads: 0.0,
            spread: drafters.spread,
            fall: drafters.fall,
            ranks: drafters.ranks.clone(),
            begins: 0.1,
            goes_on: drafters.lookup_goes_on,
        };
        predictability.adapter = bisect(-8.0, 8.0, drafters.adapter.tokens, |middle| {
            Self { adapter: middle, ..predictability.clone() }.tokens_a_round(chain)
        });
        predictability.heads = bisect(-8.0, 8.0, drafters.heads.tokens, |middle| {
            Self { adapter: middle, ..predictability.clone() }
                .tokens_a_round(|text, at| tree(text, at, HEADS_NODES))
        });
        predictability.begins = bisect(0.0, 1.0, drafters.lookup_tokens, |begins| {
            Self { begins, ..predictability.clone() }.tokens_a_round(lookup)
        });
        predictability
    }

    /// The same texts, drafted by an adapter whose tree of this many nodes gives this many tokens a
    /// round: for a what-if.
    pub(crate) fn with_tree(&self, nodes: usize, tokens: f64) -> Self {
        let with = |middle| Self { adapter: middle, ..self.clone() };
        with(bisect(-8.0, 8.0, tokens, |middle| {
            with(middle).tokens_a_round(|text, at| tree(text, at, nodes))
        }))
    }

    /// Tokens a round when `drafts` says how many drafts are right at a position.
    fn tokens_a_round(&self, drafts: impl Fn(&Text<'_>, u32) -> u32) -> f64 {
        const TOKENS: u32 = 128;
        const TEXTS: u64 = 48;
        let (mut tokens, mut rounds) = (0, 0);
        for request in 0..TEXTS {
            let text = Text { predictability: self, seed: 0x5EED, request };
            let mut last = 0; // decided already
            while last + 1 < TOKENS {
                let next = (last + 1 + drafts(&text, last)).min(TOKENS - 1);
                tokens += next - last;
                rounds += 1;
                last = next;
            }
        }
        f64::from(tokens) / f64::from(rounds)
    }
}

/// Drafts of an adapter's chain that are right.
fn chain(text: &Text<'_>, last: u32) -> u32 {
    for step in 1..=DraftPolicy::DEFAULT.chain_max as u32 {
        let opinion = text.opinion(last + step, step, false);
        if opinion.confidence() < f64::from(DraftPolicy::DEFAULT.chain_probability_min)
            || !opinion.holds(1)
        {
            return step - 1;
        }
    }
    DraftPolicy::DEFAULT.chain_max as u32
}

/// Drafts of a tree of this many nodes that are right.
fn tree(text: &Text<'_>, last: u32, nodes: usize) -> u32 {
    let mut tree = hat_core::draft::Tree::default();
    tree.reset(last, 16);
    let mut right = 0u32;
    let mut node = 0;
    while node < tree.nodes().len() {
        let at = tree.nodes()[node];
        let is_right = at.token == last + at.depth;
        if is_right {
            right = right.max(at.depth);
        }
        let opinion = if is_right {
            text.opinion(last + at.depth + 1, at.depth + 1, false)
        } else {
            text.opinion_on_wrong(at.token, at.depth + 1, false)
        };
        let position = last + at.depth + 1;
        for proposal in opinion.proposals(position, at.token, WIDTH_MAX) {
            tree.offer(node, [proposal]);
        }
        if tree.nodes().len() <= nodes {
            let len = tree.nodes().len();
            tree.grow(len + 1, 0.0);
        }
        node += 1;
    }
    right
}

/// Drafts of prompt lookup that are right.
fn lookup(text: &Text<'_>, last: u32) -> u32 {
    let right = |step: &u32| text.is_copied(last + step);
    (1..=LOOKUP_MAX as u32).take_while(right).count() as u32
}

impl Text<'_> {
    /// Candidates of the drafter for answer position `position` at draft step `step` (from 1), all
    /// tokens before it right.
    pub(crate) fn opinion(&self, position: u32, step: u32, heads: bool) -> Opinion {
        let (request, position) = (self.request, u64::from(position));
        let quantile = unit(self.seed, Purpose::Confidence, request, position);
        let mut opinion = self.predictability.opinion(quantile, step, heads);
        let draw = unit(self.seed, Purpose::Rank, request, position);
        let mut sum = 0.0;
        opinion.right = opinion.probabilities[..opinion.width].iter().position(|probability| {
            sum += probability;
            draw < sum
        });
        opinion
    }

    /// Candidates of the drafter below a wrong token: none is right.
    pub(crate) fn opinion_on_wrong(&self, token: u32, step: u32, heads: bool) -> Opinion {
        let quantile = unit(self.seed, Purpose::Wrong, self.request, u64::from(token));
        self.predictability.opinion(quantile, step, heads)
    }

    /// A prompt of which `known_rows` rows are like all others', and an answer of `count` tokens.
    pub(crate) fn tokens(&self, prompt_rows: u32, known_rows: u32, count: u32) -> Tokens {
        let request = u32::try_from(self.request).expect("requests are few");
        let own = PROMPT_FIRST + request * PROMPT_STRIDE;
        let of_prompt = |at| if at < known_rows { KNOWN_FIRST + at } else { own + at };
        let mut tokens: Vec<TokenId> = (0..prompt_rows).map(of_prompt).collect();
        // Where each token stood last; the newest is not in it.
        let mut latest: HashMap<TokenId, usize> = HashMap::new();
        for (at, token) in tokens[..tokens.len() - 1].iter().enumerate() {
            latest.insert(*token, at);
        }
        // Where the last token of a run was copied from.
        let (mut copied, mut source) = (false, None);
        for position in 0..count {
            let last = tokens.len() - 1;
            let place = source.filter(|_| copied).or_else(|| latest.get(&tokens[last]).copied());
            copied = self.goes_on(copied, position);
            source = place.map(|at| at + 1);
            let follows = source.map(|at| tokens[at]);
            let next = follows.filter(|_| copied).unwrap_or_else(|| {
                let share = unit(self.seed, Purpose::Word, self.request, u64::from(position));
                let from = (share * last as f64) as usize;
                let others = tokens[from..last].iter().chain(&tokens[..from]);
                let mut others = others.filter(|token| Some(**token) != follows);
                *others.next().unwrap_or(&own)
            });
            latest.insert(tokens[last], last);
            tokens.push(next);
        }
        Tokens { tokens, prompt_rows: prompt_rows as usize }
    }

    /// True if the token at answer position `position` is of a run, the one before of one or not.
    fn goes_on(&self, copied: bool, position: u32) -> bool {
        let Predictability { begins, goes_on, .. } = *self.predictability;
        let draw = unit(self.seed, Purpose::Copied, self.request, u64::from(position));
        draw < if copied { goes_on } else { begins }
    }

    /// True if prompt lookup, asked at the position before, has the token at `position`.
    pub(crate) fn is_copied(&self, position: u32) -> bool {
        // A run that goes on is older than it is long only rarely: look back far enough.
        const BACK: u32 = 48;
        (position.saturating_sub(BACK)..=position)
            .fold(false, |copied, at| self.goes_on(copied, at))
    }
}

impl Predictability {
    fn opinion(&self, quantile: f64, step: u32, heads: bool) -> Opinion {
        let middle = if heads { self.heads } else { self.adapter };
        let quantile = quantile.clamp(1e-9, 1.0 - 1e-9);
        let logit = middle - self.fall * f64::from(step - 1)
            + self.spread * (quantile / (1.0 - quantile)).ln();
        let confidence = 1.0 / (1.0 + (-logit).exp());
        let mut probabilities = [0.0; WIDTH_MAX];
        probabilities[0] = confidence;
        for (probability, share) in probabilities[1..].iter_mut().zip(&self.ranks) {
            *probability = (1.0 - confidence) * share;
        }
        // A later draft that is more probable than the first would not be a later draft.
        probabilities.sort_by(|a, b| b.total_cmp(a));
        let width = WIDTH_MAX.min(1 + self.ranks.len());
        Opinion { probabilities, width, right: None }
    }
}

/// Argument at which a rising function reaches a value.
fn bisect(mut low: f64, mut high: f64, value: f64, function: impl Fn(f64) -> f64) -> f64 {
    for _ in 0..24 {
        let middle = f64::midpoint(low, high);
        if function(middle) < value {
            low = middle;
        } else {
            high = middle;
        }
    }
    f64::midpoint(low, high)
}

#[cfg(test)]
mod tests {
    use hat_core::draft::Lookup;

    use super::*;
    use crate::costs::CostFile;

    fn drafters() -> Drafters {
        CostFile::open("specbench-7b").unwrap().drafters
    }

    #[test]
    fn the_stated_tokens_a_round_come_out() {
        let drafters = drafters();
        let predictability = Predictability::fit(&drafters);
        let by_heads = Predictability { adapter: predictability.heads, ..predictability.clone() };
        for (tokens, wanted) in [
            (predictability.tokens_a_round(chain), drafters.adapter.tokens),
            (predictability.tokens_a_round(lookup), drafters.lookup_tokens),
            (
                by_heads.tokens_a_round(|text, at| tree(text, at, HEADS_NODES)),
                drafters.heads.tokens,
            ),
        ] {
            assert!((tokens / wanted - 1.0).abs() < 0.01, "{tokens}, {wanted} wanted");
        }
    }

    /// The shape is that of our own drafter: first drafts right as often as measured
    /// (docs/DRAFTER.md), the trees come out as measured too.
    #[test]
    fn the_shape_is_that_of_the_measured_drafter() {
        let mut predictability = Predictability::fit(&drafters());
        let top1 = |predictability: &Predictability| {
            let text = Text { predictability, seed: 1, request: 1 };
            (1..4000).filter(|at| text.opinion(*at, 1, false).holds(1)).count() as f64 / 4000.0
        };
        predictability.adapter = bisect(-8.0, 8.0, 0.355, |middle| {
            top1(&Predictability { adapter: middle, ..predictability.clone() })
        });
        for (nodes, measured) in [(8, 1.77), (16, 1.91), (32, 2.04)] {
            let tokens = predictability.tokens_a_round(|text, at| tree(text, at, nodes));
            assert!(
                (tokens / measured - 1.0).abs() < 0.08,
                "{nodes}: {tokens}, {measured} measured"
            );
        }
    }

    #[test]
    fn probabilities_are_true() {
        let predictability = Predictability::fit(&drafters());
        let text = Text { predictability: &predictability, seed: 3, request: 5 };
        for width in 1..=WIDTH_MAX {
            let (mut hits, mut expected) = (0.0, 0.0);
            for position in 1..20_000 {
                let opinion = text.opinion(position, 2, false);
                hits += f64::from(u8::from(opinion.holds(width)));
                expected += opinion.probabilities[..width].iter().sum::<f64>();
            }
            assert!((hits / expected - 1.0_f64).abs() < 0.02, "{width}: {hits}, {expected}");
        }
    }

    /// The engine's lookup finds in the tokens what the rates say.
    #[test]
    fn lookup_finds_the_stated_tokens_a_round() {
        let drafters = drafters();
        let predictability = Predictability::fit(&drafters);
        let (mut decided, mut rounds, mut stated) = (0, 0, 0);
        for request in 0..40 {
            let text = Text { predictability: &predictability, seed: 2, request };
            let Tokens { tokens, prompt_rows } = text.tokens(300, 32, 128);
            assert_eq!((tokens.len(), request_of(tokens[0])), (428, None));
            assert_eq!(request_of(tokens[299]), Some(request as usize));
            let mut at = prompt_rows;
            while at + 1 < tokens.len() {
                let mut lookup = Lookup::default();
                tokens[..=at].iter().for_each(|token| lookup.push(*token));
                let mut right = 0;
                lookup.propose(
                    1,
                    |_| 0.5,
                    |branch| {
                        let pairs = branch.iter().zip(&tokens[at + 1..]);
                        right =
                            pairs.take_while(|(proposal, token)| proposal.token == **token).count();
                    },
                );
                stated += super::lookup(&text, (at - prompt_rows) as u32);
                let next = (at + 1 + right).min(tokens.len() - 1);
                (at, rounds, decided) = (next, rounds + 1, decided + next - at);
            }
        }
        let found = decided as f64 - f64::from(rounds);
        assert!((found / f64::from(stated) - 1.0).abs() < 0.05, "{found} of {stated}");
    }
}
