//! Rounds of drafting over a recorded greedy answer: what would have been accepted.
//!
//! A device computes the shallow rows of its own drafts exactly, so what a drafter says below
//! right guesses is known from the recording. Below a wrong guess it isn't: there the probabilities
//! that it gives at the same depth of the right path stand in. They decide only which nodes a
//! wrong branch takes from the budget, never what is accepted.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use crate::shard::Recording;

/// A token and how likely the drafter takes it to be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Guess {
    pub(super) token: u32,
    pub(super) probability: f32,
}

/// Guesses by draft step and position; a drafter that reads no deep rows has one step for all.
pub(super) struct Guesses {
    /// `[steps][positions]`, best first.
    pub(super) steps: Vec<Vec<Vec<Guess>>>,
}

impl Guesses {
    fn at(&self, position: usize, depth: usize) -> Option<&[Guess]> {
        let step = &self.steps[(depth - 1).min(self.steps.len() - 1)];
        step.get(position).map(Vec::as_slice)
    }
}

/// How a round drafts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rule {
    pub(super) name: &'static str,
    /// Nodes, those of the lookup included.
    pub(super) nodes: usize,
    /// How the drafter grows its nodes.
    pub(super) growth: Growth,
    /// Most tokens of prompt lookup.
    pub(super) lookup: usize,
}

/// How a drafter grows its nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Growth {
    /// Not at all: lookup alone.
    None,
    /// Its first guesses, one below the other.
    Chain,
    /// The most probable first.
    Tree,
}

/// An answer and what was guessed.
pub(super) struct Trial<'a> {
    pub(super) source: &'a str,
    prompt: usize,
    tokens: &'a [u32],
    guesses: Option<Guesses>,
}

/// Tokens emitted after the first, and round trips that took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Score {
    pub(super) tokens: usize,
    pub(super) rounds: usize,
    /// Nodes that were sent.
    pub(super) nodes: usize,
}

/// Longest run of words that prompt lookup goes by.
const WORDS_MAX: usize = 3;

impl<'a> Trial<'a> {
    pub(super) fn new(recording: &'a Recording, guesses: Option<Guesses>) -> Self {
        let facts = &recording.facts;
        let (source, prompt) = (facts.source.as_str(), facts.prompt);
        Self { source, prompt, tokens: &recording.tokens, guesses }
    }

    fn answer(&self) -> &[u32] {
        &self.tokens[self.prompt..]
    }

    /// Of the positions where draft step `step` has its say: how many, how often its first
    /// guess was right, and how often one of its first five.
    pub(super) fn hits(&self, step: usize) -> [usize; 3] {
        let mut hits = [0; 3];
        let Some(guesses) = &self.guesses else { return hits };
        for position in step - 1..self.answer().len() - 1 {
            let Some(at) = guesses.at(position, step) else { break };
            let right = self.answer()[position + 1];
            let rank = at.iter().position(|guess| guess.token == right);
            hits[0] += 1;
            hits[1] += usize::from(rank == Some(0));
            hits[2] += usize::from(rank.is_some_and(|rank| rank < 5));
        }
        hits
    }

    /// Plays the whole answer. The first token comes with the prompt and does not count.
    pub(super) fn play(&self, rule: &Rule) -> Score {
        let answer = self.answer();
        let mut score = Score { tokens: answer.len() - 1, ..Score::default() };
        let mut last = 0; // the token that is decided already
        while last + 1 < answer.len() {
            let copied = self.look_up(last, rule.lookup.min(rule.nodes));
            let left = answer[last + 1..].iter();
            let by_lookup = copied.iter().zip(left).take_while(|(a, b)| a == b).count();
            let left = rule.nodes - copied.len();
            let (by_drafter, nodes) = match (&self.guesses, rule.growth) {
                (None, _) | (_, Growth::None) => (0, 0),
                (Some(guesses), Growth::Chain) => self.chain(guesses, last, left),
                (Some(guesses), Growth::Tree) => self.tree(guesses, last, left),
            };
            score.rounds += 1;
            score.nodes += copied.len() + nodes;
            last += by_lookup.max(by_drafter) + 1;
        }
        score
    }

    /// How many first guesses in a row are right.
    fn chain(&self, guesses: &Guesses, last: usize, nodes: usize) -> (usize, usize) {
        let right = |depth: &usize| {
            let guess = guesses.at(last + depth - 1, *depth).and_then(|at| at.first());
            let wanted = self.answer().get(last + depth);
            guess.zip(wanted).is_some_and(|(guess, wanted)| guess.token == *wanted)
        };
        ((1..=nodes).take_while(right).count(), nodes)
    }

    /// How deep the right path reaches into a tree of the most probable nodes.
    fn tree(&self, guesses: &Guesses, last: usize, nodes: usize) -> (usize, usize) {
        let mut heap = BinaryHeap::new();
        let push = |heap: &mut BinaryHeap<Candidate>, parent: &Candidate, rank: usize| {
            let depth = parent.depth + 1;
            if depth > super::DEPTH_MAX {
                return;
            }
            let at = guesses.at(last + depth - 1, depth);
            let Some(guess) = at.and_then(|at| at.get(rank)) else { return };
            let wanted = self.answer().get(last + depth);
            heap.push(Candidate {
                probability: parent.probability * guess.probability,
                above: parent.probability,
                depth,
                rank,
                parent_is_right: parent.is_right,
                is_right: parent.is_right && wanted == Some(&guess.token),
            });
        };
        let root = Candidate {
            probability: 1.0,
            above: 1.0,
            depth: 0,
            rank: 0,
            parent_is_right: true,
            is_right: true,
        };
        push(&mut heap, &root, 0);
        let (mut taken, mut deepest) = (0, 0);
        while taken < nodes {
            let Some(node) = heap.pop() else { break };
            taken += 1;
            if node.is_right {
                deepest = deepest.max(node.depth);
            }
            push(&mut heap, &node, 0);
            let parent = Candidate {
                probability: node.above,
                depth: node.depth - 1,
                is_right: node.parent_is_right,
                ..node
            };
            push(&mut heap, &parent, node.rank + 1);
        }
        (deepest, taken)
    }

    /// What followed the last words where they stood last before.
    fn look_up(&self, last: usize, most: usize) -> &[u32] {
        let said = &self.tokens[..=self.prompt + last];
        if most == 0 {
            return &[];
        }
        for words in (1..=WORDS_MAX.min(said.len() - 1)).rev() {
            let key = &said[said.len() - words..];
            let before = &said[..said.len() - 1];
            if let Some(found) = before.windows(words).rposition(|window| window == key) {
                let from = found + words;
                return &said[from..said.len().min(from + most)];
            }
        }
        &[]
    }
}

/// A node that may come into the tree.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    /// Of the whole path to it.
    probability: f32,
    /// Of the path to its parent.
    above: f32,
    depth: usize,
    /// Among its siblings.
    rank: usize,
    parent_is_right: bool,
    is_right: bool,
}

impl Candidate {
    fn key(&self) -> (f32, std::cmp::Reverse<usize>, std::cmp::Reverse<usize>) {
        (self.probability, std::cmp::Reverse(self.depth), std::cmp::Reverse(self.rank))
    }
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        let ((p, depth, rank), (q, other_depth, other_rank)) = (self.key(), other.key());
        p.total_cmp(&q).then(depth.cmp(&other_depth)).then(rank.cmp(&other_rank))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Candidate {}

#[cfg(test)]
mod tests {
    use super::*;

    fn guess(pairs: &[(u32, f32)]) -> Vec<Guess> {
        pairs
            .iter()
            .map(|(token, probability)| Guess { token: *token, probability: *probability })
            .collect()
    }

    fn trial<'a>(tokens: &'a [u32], prompt: usize, guesses: Option<Guesses>) -> Trial<'a> {
        Trial { source: "test", prompt, tokens, guesses }
    }

    const CHAIN: Rule = Rule { name: "chain", nodes: 2, growth: Growth::Chain, lookup: 0 };

    #[test]
    fn a_chain_accepts_what_is_right_from_its_front() {
        // Answer 5 6 7 8 9; guesses at each position, the same at each depth.
        let tokens = [1, 5, 6, 7, 8, 9];
        let right = [(6, 0.9), (7, 0.9), (0, 0.9), (9, 0.9)];
        let steps = vec![right.iter().map(|pair| guess(&[*pair])).collect()];
        let trial = trial(&tokens, 1, Some(Guesses { steps }));
        // 5: 6 and 7 are accepted, 8 follows; 8: 9 is accepted, and the answer is at its end.
        assert_eq!(trial.play(&CHAIN), Score { tokens: 4, rounds: 2, nodes: 4 });
        assert_eq!(trial.hits(1), [4, 3, 3]);
        assert_eq!(trial.hits(2), [3, 2, 2]);
    }

    #[test]
    fn a_tree_takes_the_most_probable_nodes() {
        let tokens = [1, 5, 6, 7];
        let steps = vec![vec![guess(&[(9, 0.6), (6, 0.3)]), guess(&[(7, 0.9), (8, 0.05)])]];
        let trial = trial(&tokens, 1, Some(Guesses { steps }));
        let rounds = |nodes| {
            let rule = Rule { name: "tree", nodes, growth: Growth::Tree, lookup: 0 };
            trial.play(&rule).rounds
        };
        // By probability: 9 (.6), 9-7 (.54), 6 (.3), 6-7 (.27).
        assert_eq!([rounds(1), rounds(2)], [2, 2]); // nothing is right, twice
        assert_eq!(rounds(3), 1); // 6, and 7 comes with it
        let Some(guesses) = &trial.guesses else { panic!("there are some") };
        assert_eq!([trial.tree(guesses, 0, 3), trial.tree(guesses, 0, 4)], [(1, 3), (2, 4)]);
    }

    #[test]
    fn lookup_copies_what_followed_the_longest_run_of_words() {
        let tokens = [7, 1, 2, 3, 4, 9, 2, 3, 8, 1, 2, 3, 4, 9];
        let trial = trial(&tokens, 11, None); // the answer is 3 4 9
        assert_eq!(trial.look_up(0, 6), [4, 9, 2, 3, 8, 1]);
        assert_eq!(trial.look_up(0, 2), [4, 9]);
        let rule = Rule { name: "lookup", nodes: 6, growth: Growth::None, lookup: 6 };
        assert_eq!(trial.play(&rule), Score { tokens: 2, rounds: 1, nodes: 6 });
    }
}
