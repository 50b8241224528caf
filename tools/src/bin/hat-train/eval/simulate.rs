//! Rounds of drafting over a recorded greedy answer: what would have been accepted.
//!
//! Trees, prompt lookup and the rates that are learned are the engine's own; how they take turns is
//! what its device does. A device computes the shallow rows of its own drafts exactly, so what a
//! drafter says below right guesses is known from the recording. Below a wrong guess it isn't:
//! there the guesses at the same depth of the right path stand in. They decide only which nodes a
//! wrong branch takes from the budget, never what is accepted.

use std::ops::Range;

use hat_engine::draft::{Acceptance, Lookup, Source, Tree, tree};

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
    /// What follows `position`, `depth` tokens below the last decided one. Below the last step its
    /// guesses stand in.
    fn at(&self, position: usize, depth: usize) -> Option<&[Guess]> {
        let step = &self.steps[(depth - 1).min(self.steps.len() - 1)];
        step.get(position).map(Vec::as_slice)
    }
}

/// How a round drafts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rule {
    /// Most nodes, whoever guessed them.
    pub(super) nodes: usize,
    /// How the drafter grows its nodes.
    pub(super) growth: Growth,
    /// Most branches of prompt lookup.
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
    Tree {
        /// Guesses for each node.
        width: usize,
        /// Nodes that are computed together.
        level: usize,
    },
}

impl Growth {
    const fn width_and_level(self) -> (usize, usize) {
        match self {
            Self::None => (0, usize::MAX),
            Self::Chain => (1, 1),
            Self::Tree { width, level } => (width, level),
        }
    }
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
    /// Nodes that were sent, roots not counted.
    pub(super) nodes: usize,
}

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
    /// `acceptance` is what the answers before have taught.
    pub(super) fn play(&self, rule: &Rule, acceptance: &mut Acceptance) -> Score {
        let answer = self.answer();
        let known = if rule.lookup > 0 { &self.tokens[..=self.prompt] } else { &[] };
        let mut lookup: Lookup = known.iter().copied().collect();
        let mut tree = Tree::default();
        let mut score = Score { tokens: answer.len() - 1, ..Score::default() };
        let mut last = 0; // the token that is decided already
        while last + 1 < answer.len() {
            // The last token of the answer needs no row.
            let depth_max = answer.len() - 2 - last;
            tree.reset(answer[last], u32::try_from(depth_max).expect("a context fits u32"));
            let rate = |source| acceptance.rate(source);
            lookup.propose(rule.lookup, rate, |branch| tree.offer(0, branch.iter().copied()));
            self.grow(rule, last, acceptance, &mut tree);
            score.rounds += 1;
            score.nodes += tree.nodes().len() - 1;
            let end = last + 1 + walk(&tree, &answer[last + 1..], acceptance);
            if rule.lookup > 0 {
                answer[last + 1..=end].iter().for_each(|token| lookup.push(*token));
            }
            last = end;
        }
        score
    }

    /// Grows the tree below the decided token `last`, in turns with the drafter.
    fn grow(&self, rule: &Rule, last: usize, acceptance: &Acceptance, tree: &mut Tree) {
        let nodes_max = rule.nodes + 1;
        let (_, level) = rule.growth.width_and_level();
        let mut new = 0..1;
        while !new.is_empty() && new.end < nodes_max {
            let end = new.end;
            self.propose(rule.growth, last, new, acceptance, tree);
            new = tree.grow(nodes_max.min(end.saturating_add(level)), 0.0);
        }
    }

    /// Offers what the drafter guesses below `nodes`.
    fn propose(
        &self,
        growth: Growth,
        last: usize,
        nodes: Range<usize>,
        acceptance: &Acceptance,
        tree: &mut Tree,
    ) {
        let Some(guesses) = &self.guesses else { return };
        let (width, _) = growth.width_and_level();
        for node in nodes {
            let depth = tree.nodes()[node].depth as usize;
            let at = guesses.at(last + depth, depth + 1).unwrap_or_default();
            for (rank, Guess { token, probability }) in at.iter().copied().take(width).enumerate() {
                let source = Source::adapter(rank, probability);
                let mut guess = tree::Guess { token, probability, source };
                if growth != Growth::Chain {
                    guess.probability = acceptance.corrected(&guess);
                }
                tree.offer(node, [guess]);
            }
        }
    }
}

/// How many drafts in a row are what was said, `said`; every test teaches `acceptance`.
fn walk(tree: &Tree, said: &[u32], acceptance: &mut Acceptance) -> usize {
    let mut node = 0;
    for (accepted, token) in said.iter().enumerate() {
        let children = tree.nodes().iter().skip(1).filter(|child| child.parent == node);
        for child in children {
            if let Some(source) = child.source {
                acceptance.note(source, child.token == *token);
            }
        }
        match tree.child(node, *token) {
            Some(child) => node = child,
            None => return accepted,
        }
    }
    unreachable!("a tree is not as deep as the answer is long")
}

#[cfg(test)]
mod tests {
    use hat_engine::draft::Drafter;

    use super::*;

    const TREE: Growth = Growth::Tree { width: 4, level: 8 };

    fn guess(pairs: &[(u32, f32)]) -> Vec<Guess> {
        pairs
            .iter()
            .map(|(token, probability)| Guess { token: *token, probability: *probability })
            .collect()
    }

    fn trial<'a>(tokens: &'a [u32], prompt: usize, guesses: Option<Guesses>) -> Trial<'a> {
        Trial { source: "test", prompt, tokens, guesses }
    }

    fn play(trial: &Trial<'_>, nodes: usize, growth: Growth, lookup: usize) -> Score {
        trial.play(&Rule { nodes, growth, lookup }, &mut Acceptance::default())
    }

    #[test]
    fn a_chain_accepts_what_is_right_from_its_front() {
        // Answer 5 6 7 8 9 10; guesses at each position, the same at each depth.
        let tokens = [1, 5, 6, 7, 8, 9, 10];
        let right = [(6, 0.9), (7, 0.9), (0, 0.9), (9, 0.9), (0, 0.9)];
        let steps = vec![right.iter().map(|pair| guess(&[*pair])).collect()];
        let trial = trial(&tokens, 1, Some(Guesses { steps }));
        // 5: 6 and 7 are accepted, 8 follows; 8: 9 is accepted, and 10, the last, needs no draft.
        let score = Score { tokens: 5, rounds: 2, nodes: 2 + 1 };
        assert_eq!(play(&trial, 2, Growth::Chain, 0), score);
        assert_eq!(trial.hits(1), [5, 3, 3]);
        assert_eq!(trial.hits(2), [4, 2, 2]);
    }

    #[test]
    fn each_depth_asks_its_own_draft_step_and_deeper_ones_the_last() {
        let tokens = [1, 5, 6, 7, 8, 9, 10];
        let step = |said: [u32; 5]| said.iter().map(|token| guess(&[(*token, 0.9)])).collect();
        let steps = vec![step([6, 0, 0, 0, 0]), step([0, 7, 8, 0, 0])];
        let trial = trial(&tokens, 1, Some(Guesses { steps }));
        let score = Score { tokens: 5, rounds: 2, nodes: 3 };
        assert_eq!(play(&trial, 3, Growth::Chain, 0), score);
        assert_eq!([trial.hits(1), trial.hits(2)], [[5, 1, 1], [4, 2, 2]]);
    }

    #[test]
    fn a_tree_takes_the_most_probable_nodes() {
        let tokens = [1, 5, 6, 7, 2, 3];
        let steps = vec![vec![
            guess(&[(9, 0.6), (6, 0.3)]),
            guess(&[(7, 0.9), (8, 0.05)]),
            guess(&[(4, 0.5), (2, 0.4)]),
        ]];
        let trial = trial(&tokens, 1, Some(Guesses { steps }));
        let grown = |nodes| {
            let mut tree = Tree::default();
            tree.reset(5, 2);
            let rule = Rule { nodes, growth: TREE, lookup: 0 };
            trial.grow(&rule, 0, &Acceptance::default(), &mut tree);
            tree
        };
        // The first level takes both guesses for 5. Below 9 stands what follows 6: with 7 its
        // path is worth .54, below 6 it is worth .27, and 8 below 9 only .03.
        let tokens = |tree: &Tree| -> Vec<u32> {
            tree.nodes().iter().skip(1).map(|node| node.token).collect()
        };
        assert_eq!(tokens(&grown(1)), [9]);
        assert_eq!(tokens(&grown(4)), [9, 6, 7, 7]);
        assert_eq!(tokens(&grown(5)), [9, 6, 7, 7, 8]);
        let said = &trial.answer()[1..];
        let accepted = |nodes| walk(&grown(nodes), said, &mut Acceptance::default());
        assert_eq!([accepted(1), accepted(2), accepted(3), accepted(4)], [0, 1, 1, 2]);
    }

    #[test]
    fn lookup_copies_and_learns_from_one_answer_to_the_next() {
        let tokens = [7, 1, 2, 3, 4, 9, 2, 3, 8, 1, 2, 3, 4, 9, 5];
        let trial = trial(&tokens, 11, None); // the answer is 3 4 9 5
        let score = play(&trial, 6, Growth::None, 1);
        assert_eq!(score, Score { tokens: 3, rounds: 1, nodes: 2 });
        let rule = Rule { nodes: 6, growth: Growth::None, lookup: 1 };
        let mut acceptance = Acceptance::default();
        let class = |class| Source { drafter: Drafter::Lookup, class };
        let before = acceptance.rate(class(2));
        trial.play(&rule, &mut acceptance);
        assert!(acceptance.rate(class(2)) > before, "a match of three words was right");
    }

    #[test]
    fn drafter_and_lookup_share_one_tree() {
        // Lookup copies 4 9 after "1 2 3"; the drafter has only the first of these, and 6 6 6.
        let tokens = [7, 1, 2, 3, 4, 9, 8, 1, 2, 3, 4, 9, 6, 5];
        let guesses = || {
            let at = [(4, 0.9), (6, 0.2), (6, 0.9), (0, 0.1)];
            Some(Guesses { steps: vec![at.iter().map(|pair| guess(&[*pair])).collect()] })
        };
        let with = trial(&tokens, 9, guesses());
        let rounds = |lookup| play(&with, 8, TREE, lookup).rounds;
        assert_eq!([rounds(0), rounds(1)], [2, 1]);
        assert_eq!(play(&trial(&tokens, 9, None), 8, Growth::None, 1).rounds, 2);
    }
}
