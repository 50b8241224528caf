//! Prompt lookup: what followed the same words before, in the prompt or in the answer.
//!
//! An index from each run of one, two and three tokens to where it stood last, and from there to
//! where it stood before that. It grows by three entries a token, so the context bounds it, and a
//! look-up costs a few hops however long the text is. The idea is prompt lookup decoding (Saxena
//! 2023), here with several earlier places and a match length that goes beyond the index.

use std::collections::HashMap;

use hat_plan::TokenId;

use super::tree::Proposal;
use super::{CLASSES, DrafterKind, Source};

/// Longest run of tokens that is indexed.
const NGRAM_MAX: usize = 3;
/// Tokens of one branch at most.
pub(crate) const BRANCH_MAX: usize = 10;
/// Branches of one look-up at most.
pub(crate) const BRANCHES_MAX: usize = 4;
/// Earlier places that are looked at for one run.
const PLACES_MAX: usize = 8;
/// Matches longer than this count as this long.
const MATCH_MAX: usize = 8;
/// No place; also fills the key of a run shorter than [`NGRAM_MAX`].
const NONE: u32 = u32::MAX;

/// The tokens so far, and where each run of them stood before.
#[derive(Debug, Default)]
pub struct Lookup {
    tokens: Vec<TokenId>,
    /// Index of the last token of each run's latest place. The runs that end at the newest token
    /// are not in it yet: nothing follows them.
    latest: HashMap<[TokenId; NGRAM_MAX], u32>,
    /// Previous place of each token, and of each length of the run that ends with it.
    before: Vec<[u32; NGRAM_MAX]>,
}

/// An earlier place of the words at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    /// Index of the token that followed.
    next: usize,
    /// Tokens before it that match, at most [`MATCH_MAX`].
    matched: usize,
}

impl Lookup {
    /// An index with room for this many tokens.
    pub(crate) fn with_room(tokens: usize) -> Self {
        Self {
            tokens: Vec::with_capacity(tokens),
            latest: HashMap::with_capacity(NGRAM_MAX * tokens),
            before: Vec::with_capacity(tokens),
        }
    }

    /// Appends a token.
    pub fn push(&mut self, token: TokenId) {
        if let Some(last) = self.tokens.len().checked_sub(1) {
            for len in 1..=NGRAM_MAX.min(self.tokens.len()) {
                let place = u32::try_from(last).expect("a context is far below 2^32");
                let before = self.latest.insert(key(&self.tokens[last + 1 - len..]), place);
                self.before[last][len - 1] = before.unwrap_or(NONE);
            }
        }
        self.tokens.push(token);
        self.before.push([NONE; NGRAM_MAX]);
    }

    /// Branches that may follow the last token: longest match first, then the latest place. Each
    /// begins differently. `probability` says how often a draft of a class was right.
    pub fn propose(
        &self,
        branches_max: usize,
        probability: impl Fn(Source) -> f32,
        mut branch: impl FnMut(&[Proposal]),
    ) {
        let mut firsts = [NONE; BRANCHES_MAX];
        let mut places = [Place { next: 0, matched: 0 }; BRANCHES_MAX];
        let mut found = 0;
        for len in (1..=NGRAM_MAX).rev() {
            for place in self.places(len).take(PLACES_MAX) {
                let first = self.tokens[place.next];
                if found == branches_max.min(BRANCHES_MAX) {
                    break;
                }
                if !firsts[..found].contains(&first) {
                    (firsts[found], places[found]) = (first, place);
                    found += 1;
                }
            }
        }
        let mut left = 1.0;
        for (rank, place) in places[..found].iter().enumerate() {
            let mut proposals =
                [Proposal { token: 0, probability: 0.0, source: source(0, 0) }; BRANCH_MAX];
            for depth in 0..BRANCH_MAX {
                // Behind the newest token the branch itself goes on: a loop stays a loop.
                let token = match self.tokens.get(place.next + depth) {
                    Some(token) => *token,
                    None => proposals[place.next + depth - self.tokens.len()].token,
                };
                let source = source(rank, place.matched + depth);
                proposals[depth] = Proposal { token, probability: probability(source), source };
            }
            proposals[0].probability = proposals[0].probability.min(left);
            left -= proposals[0].probability;
            branch(&proposals);
        }
    }

    /// Earlier places of the last `len` tokens, the latest first.
    fn places(&self, len: usize) -> impl Iterator<Item = Place> {
        let known = self.tokens.len() >= len;
        let run = if known { &self.tokens[self.tokens.len() - len..] } else { &[] };
        let mut place = self.latest.get(&key(run)).copied().filter(|_| known);
        std::iter::from_fn(move || {
            let at = place? as usize;
            place = Some(self.before[at][len - 1]).filter(|place| *place != NONE);
            Some(Place { next: at + 1, matched: self.matched(at) })
        })
    }

    /// Number of tokens up to the one at `at` that equal those at the end.
    fn matched(&self, at: usize) -> usize {
        let end = self.tokens.iter().rev();
        let here = self.tokens[..=at].iter().rev();
        end.zip(here).take(MATCH_MAX).take_while(|(a, b)| a == b).count()
    }
}

fn key(run: &[TokenId]) -> [TokenId; NGRAM_MAX] {
    let mut key = [NONE; NGRAM_MAX];
    key[..run.len()].copy_from_slice(run);
    key
}

/// Class of a draft: the number of tokens that match before it, and whether it is the first
/// choice.
fn source(rank: usize, matched: usize) -> Source {
    let class = matched.clamp(1, MATCH_MAX) - 1 + if rank == 0 { 0 } else { MATCH_MAX };
    debug_assert!(class < CLASSES);
    Source { drafter: DrafterKind::Lookup, class: u8::try_from(class).expect("few classes") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lookup(tokens: &[TokenId]) -> Lookup {
        let mut lookup = Lookup::default();
        tokens.iter().for_each(|token| lookup.push(*token));
        lookup
    }

    /// Class of the first draft, and the tokens, of each branch.
    fn branches(lookup: &Lookup, branches_max: usize) -> Vec<(u8, Vec<TokenId>)> {
        let mut out = Vec::new();
        lookup.propose(
            branches_max,
            |_| 0.5,
            |branch| {
                let tokens = branch.iter().map(|proposal| proposal.token).collect();
                out.push((branch[0].source.class, tokens));
            },
        );
        out
    }

    #[test]
    fn the_longest_match_wins_and_then_the_latest() {
        // "1 2 3" stood at the start, followed by 4; "2 3" later, by 5; "3" last, by 6.
        let lookup = lookup(&[1, 2, 3, 4, 9, 2, 3, 5, 9, 3, 6, 8, 1, 2, 3]);
        let found = branches(&lookup, 4);
        assert_eq!(found.iter().map(|found| found.0).collect::<Vec<_>>(), [2, 9, 8]);
        assert_eq!(found[0].1, [4, 9, 2, 3, 5, 9, 3, 6, 8, 1]);
        assert_eq!(found[1].1[..3], [5, 9, 3]);
        assert_eq!(found[2].1[..3], [6, 8, 1]);
        assert_eq!(branches(&lookup, 1).len(), 1);
        // The later of two places with the same run.
        let again = self::lookup(&[1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3]);
        assert_eq!(branches(&again, 1)[0].1[0], 5);
    }

    #[test]
    fn nothing_is_proposed_for_what_never_stood_before() {
        for tokens in [&[][..], &[1], &[1, 2, 3], &[1, 1, 2]] {
            assert_eq!(branches(&lookup(tokens), 4), [], "{tokens:?}");
        }
    }

    #[test]
    fn a_loop_goes_on_behind_the_newest_token() {
        assert_eq!(branches(&lookup(&[7, 7]), 1), [(0, vec![7; 10])]);
        let found = branches(&lookup(&[1, 2, 3, 1, 2, 3, 1]), 1);
        assert_eq!(found, [(3, vec![2, 3, 1, 2, 3, 1, 2, 3, 1, 2])]);
    }

    #[test]
    fn matches_count_beyond_the_index() {
        let mut tokens: Vec<TokenId> = (0..20).collect();
        tokens.extend(10..17);
        assert_eq!(branches(&lookup(&tokens), 1), [(6, (17..20).chain(10..17).collect())]);
    }

    #[test]
    fn probabilities_of_first_tokens_sum_to_one_at_most() {
        let lookup = lookup(&[1, 2, 3, 4, 9, 2, 3, 5, 9, 3, 6, 8, 1, 2, 3]);
        let mut sum = 0.0;
        lookup.propose(4, |_| 0.6, |branch| sum += branch[0].probability);
        assert!((sum - 1.0).abs() < 1e-6, "{sum}");
    }

    /// Against a search through all of the text.
    #[test]
    fn the_index_finds_what_a_search_finds() {
        let mut state = 1u32;
        let mut index = Lookup::default();
        for _ in 0..400 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            index.push(state >> 29);
            let tokens = &index.tokens;
            for len in 1..=NGRAM_MAX.min(tokens.len()) {
                let run = &tokens[tokens.len() - len..];
                let searched: Vec<usize> = (len..tokens.len())
                    .rev()
                    .filter(|next| &tokens[next - len..*next] == run)
                    .collect();
                let found: Vec<usize> = index.places(len).map(|place| place.next).collect();
                assert_eq!(found, searched);
            }
        }
        assert!(index.latest.len() <= 3 * index.tokens.len());
    }
}
