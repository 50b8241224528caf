//! A draft tree as it grows: the most probable draft first, whoever made it.
//!
//! Drafters offer *branches*, runs of tokens each with the probability that it follows the one
//! before. A candidate's cumulative probability is the product along its path, so growing by the
//! best candidate keeps every prefix of the nodes a tree, and the best one of its size. A token
//! that several drafters draft at one place is one node. Pure: no backend, no clock.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::ops::Range;

use hat_plan::{PENDING_ROWS_MAX, TokenId};

use super::Source;

/// Most nodes of a tree, its root included: this many rows may pend in the cloud.
pub const NODES_MAX: usize = PENDING_ROWS_MAX;

/// One token of a tree.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Node {
    /// The token.
    pub token: TokenId,
    /// Index of its parent, below its own; the root's is itself.
    pub parent: usize,
    /// Tokens between it and the root.
    pub depth: u32,
    /// Probability that verification comes by, as its drafters see it. `0..=1`
    pub probability: f32,
    /// Drafter that proposed it; `None` for the root, which is decided.
    pub source: Option<Source>,
}

/// One token of a branch: what follows, and how probably.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Proposal {
    /// The token.
    pub token: TokenId,
    /// Probability that it follows, given that the token before it is right. `0..=1`
    pub probability: f32,
    /// Drafter that proposed it.
    pub source: Source,
}

/// Nodes and candidates. Reused from round to round; allocates only while it is new.
#[derive(Debug, Default)]
pub struct Tree {
    nodes: Vec<Node>,
    /// Candidates that became nodes, and which; several may have become one.
    taken: Vec<(Candidate, usize)>,
    candidates: BinaryHeap<Candidate>,
    proposals: Vec<Proposal>,
    depth_max: u32,
}

/// The next token of a branch, whose tokens before are nodes.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    probability: f32,
    parent: usize,
    proposal: usize,
    end: usize, // of the branch, in `proposals`
}

impl Tree {
    /// Begins anew below the decided token `root`. Nodes will be at most `depth_max` deep.
    pub fn reset(&mut self, root: TokenId, depth_max: u32) {
        self.clear();
        self.depth_max = depth_max;
        let (parent, depth, probability, source) = (0, 0, 1.0, None);
        self.nodes.push(Node { token: root, parent, depth, probability, source });
    }

    /// Forgets everything, the root as well.
    pub fn clear(&mut self) {
        self.nodes.clear();
        self.taken.clear();
        self.candidates.clear();
        self.proposals.clear();
    }

    /// The nodes, the root first and parents before children.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Offers a branch below node `parent`: it becomes nodes as far as [`Tree::grow`] gets to it.
    pub fn offer(&mut self, parent: usize, branch: impl IntoIterator<Item = Proposal>) {
        let first = self.proposals.len();
        self.proposals.extend(branch);
        self.consider(parent, first, self.proposals.len());
    }

    /// Makes nodes of the best candidates until there are `nodes_max` nodes, the root included,
    /// or the next candidate's probability is below `floor`. Returns the new nodes' indices.
    pub fn grow(&mut self, nodes_max: usize, floor: f32) -> Range<usize> {
        let before = self.nodes.len();
        while self.nodes.len() < nodes_max.min(NODES_MAX) {
            let Some(candidate) = self.candidates.peek().copied() else { break };
            if candidate.probability < floor {
                break;
            }
            self.candidates.pop();
            let proposal = self.proposals[candidate.proposal];
            let node = match self.child(candidate.parent, proposal.token) {
                Some(known) => known,
                None => {
                    self.nodes.push(Node {
                        token: proposal.token,
                        parent: candidate.parent,
                        depth: self.nodes[candidate.parent].depth + 1,
                        probability: candidate.probability,
                        source: Some(proposal.source),
                    });
                    self.nodes.len() - 1
                }
            };
            self.taken.push((candidate, node));
            self.consider(node, candidate.proposal + 1, candidate.end);
        }
        before..self.nodes.len()
    }

    /// Makes candidates again of all nodes from `len` on; what is left is a tree, since parents
    /// come first.
    pub fn truncate(&mut self, len: usize) {
        let len = len.max(1);
        self.nodes.truncate(len);
        self.candidates.retain(|candidate| candidate.parent < len);
        let back = self.taken.iter().filter(|(from, node)| from.parent < len && *node >= len);
        self.candidates.extend(back.map(|(candidate, _)| *candidate));
        self.taken.retain(|(_, node)| *node < len);
    }

    /// Drops all nodes from `len` on, and all candidates.
    pub fn end(&mut self, len: usize) {
        self.nodes.truncate(len);
        self.taken.clear();
        self.candidates.clear();
    }

    /// Makes `node` the root: keeps what hangs below it, and forgets the rest and all
    /// candidates. What was node `kept[i]` is node `i` then. Nodes will be at most `depth_max`
    /// deep; those that are deeper already stay.
    pub fn reroot(&mut self, node: usize, depth_max: u32, kept: &mut Vec<usize>) {
        self.taken.clear();
        self.candidates.clear();
        self.proposals.clear();
        self.depth_max = depth_max;
        let Node { token, depth, probability, .. } = self.nodes[node];
        kept.clear();
        kept.push(node);
        for index in node + 1..self.nodes.len() {
            // Parents come first, so a kept parent is known by now, and its new index too.
            let Some(parent) = kept.iter().position(|kept| *kept == self.nodes[index].parent)
            else {
                continue;
            };
            let below = self.nodes[index];
            self.nodes[kept.len()] = Node {
                parent,
                depth: below.depth - depth,
                probability: (below.probability / probability.max(f32::MIN_POSITIVE)).min(1.0),
                ..below
            };
            kept.push(index);
        }
        self.nodes.truncate(kept.len());
        self.nodes[0] = Node { token, parent: 0, depth: 0, probability: 1.0, source: None };
    }

    /// The child of `parent` with this token.
    #[must_use]
    pub fn child(&self, parent: usize, token: TokenId) -> Option<usize> {
        let children = self.nodes.iter().enumerate().skip(parent + 1);
        children
            .filter(|(_, node)| node.parent == parent)
            .find(|(_, node)| node.token == token)
            .map(|(index, _)| index)
    }

    fn consider(&mut self, parent: usize, proposal: usize, end: usize) {
        let Node { depth, probability, .. } = self.nodes[parent];
        if proposal < end && depth < self.depth_max {
            let probability = probability * self.proposals[proposal].probability.clamp(0.0, 1.0);
            self.candidates.push(Candidate { probability, parent, proposal, end });
        }
    }
}

/// The more probable one is greater; among equals, the one offered first.
impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        let probability = self.probability.total_cmp(&other.probability);
        probability.then(other.proposal.cmp(&self.proposal)).then(other.parent.cmp(&self.parent))
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
    use crate::draft::DrafterKind;

    fn branch(class: u8, tokens: &[(TokenId, f32)]) -> Vec<Proposal> {
        let source = Source { drafter: DrafterKind::Lookup, class };
        tokens.iter().map(|&(token, probability)| Proposal { token, probability, source }).collect()
    }

    /// Token, parent and probability of each node.
    fn shape(tree: &Tree) -> Vec<(TokenId, usize, f32)> {
        tree.nodes().iter().map(|node| (node.token, node.parent, node.probability)).collect()
    }

    fn tree(depth_max: u32, branches: &[&[(TokenId, f32)]]) -> Tree {
        let mut tree = Tree::default();
        tree.reset(9, depth_max);
        for (class, tokens) in (0..).zip(branches) {
            tree.offer(0, branch(class, tokens));
        }
        tree
    }

    #[test]
    fn the_best_candidate_comes_first() {
        let mut tree = tree(10, &[&[(1, 0.5), (2, 0.5), (3, 0.5)], &[(4, 0.4), (5, 0.75)]]);
        assert_eq!(tree.grow(5, 0.0), 1..5);
        assert_eq!(
            shape(&tree),
            [(9, 0, 1.0), (1, 0, 0.5), (4, 0, 0.4), (5, 2, 0.3), (2, 1, 0.25)]
        );
        assert_eq!(tree.grow(64, 0.2), 5..5);
        assert_eq!(tree.grow(64, 0.0), 5..6);
        assert_eq!(tree.nodes()[5].depth, 3);
    }

    #[test]
    fn equal_tokens_at_one_place_are_one_node() {
        let mut tree = tree(10, &[&[(1, 0.5), (2, 0.8)], &[(1, 0.25), (3, 0.5)], &[(1, 0.25)]]);
        tree.grow(64, 0.0);
        assert_eq!(shape(&tree), [(9, 0, 1.0), (1, 0, 0.5), (2, 1, 0.4), (3, 1, 0.25)]);
        assert_eq!(tree.nodes()[1].source.map(|source| source.class), Some(0));
    }

    #[test]
    fn branches_below_nodes_join_in() {
        let mut tree = tree(10, &[&[(1, 0.5)]]);
        tree.grow(64, 0.0);
        tree.offer(1, branch(0, &[(2, 0.5), (3, 0.5)]));
        tree.offer(0, branch(0, &[(4, 0.2)]));
        assert_eq!(tree.grow(64, 0.0), 2..5);
        assert_eq!(tree.child(1, 2), Some(2));
        assert_eq!(tree.child(0, 4), Some(3));
        assert_eq!((tree.child(0, 2), tree.child(4, 9)), (None, None));
    }

    #[test]
    fn depth_and_size_are_bounded() {
        let long: Vec<(TokenId, f32)> = (0..200).map(|token| (token, 1.0)).collect();
        let mut tree = tree(5, &[&long]);
        tree.grow(1000, 0.0);
        assert_eq!(tree.nodes().len(), 6);
        tree.reset(9, 1000);
        tree.offer(0, branch(0, &long));
        tree.grow(1000, 0.0);
        assert_eq!(tree.nodes().len(), NODES_MAX);
        tree.reset(9, 0);
        tree.offer(0, branch(0, &long));
        assert_eq!(tree.grow(64, 0.0), 1..1);
    }

    #[test]
    fn a_truncated_tree_grows_as_before() {
        let branches: [&[(TokenId, f32)]; 3] =
            [&[(1, 0.5), (2, 0.5), (3, 0.5)], &[(4, 0.4), (5, 0.75)], &[(1, 0.3), (6, 0.9)]];
        // A branch that joined another may now be ahead of it: the same nodes, in another order.
        let nodes = |tree: &Tree| {
            let mut nodes: Vec<_> = tree
                .nodes()
                .iter()
                .map(|node| (node.token, node.depth, node.probability))
                .collect();
            nodes.sort_by(|a, b| a.partial_cmp(b).unwrap());
            nodes
        };
        let mut whole = tree(10, &branches);
        whole.grow(64, 0.0);
        assert_eq!(whole.nodes().len(), 7);
        for grown in 1..=7 {
            for len in 0..grown {
                let mut tree = tree(10, &branches);
                tree.grow(grown, 0.0);
                tree.truncate(len);
                assert_eq!(tree.nodes().len(), len.max(1));
                tree.grow(64, 0.0);
                assert_eq!(nodes(&tree), nodes(&whole), "{len} of {grown}");
            }
        }
        whole.end(2);
        assert_eq!(whole.grow(64, 0.0), 2..2);
        assert_eq!(shape(&whole), [(9, 0, 1.0), (1, 0, 0.5)]);
    }

    #[test]
    fn a_tree_that_is_cut_again_and_again_does_not_grow_in_memory() {
        let mut tree = tree(10, &[&[(1, 0.5), (2, 0.5), (3, 0.5)], &[(4, 0.4), (5, 0.75)]]);
        let mut sizes = (0..20).map(|_| {
            tree.grow(5, 0.0);
            tree.truncate(2);
            (tree.candidates.len(), tree.taken.len())
        });
        let first = sizes.next().unwrap();
        assert!(sizes.all(|size| size == first), "more than {first:?}");
    }

    #[test]
    fn below_a_new_root_nothing_is_lost() {
        let mut tree = tree(10, &[&[(1, 0.5), (2, 0.8), (3, 0.5)], &[(4, 0.4), (5, 0.75)]]);
        tree.offer(0, branch(2, &[(6, 0.01)]));
        tree.grow(5, 0.0);
        tree.offer(1, branch(2, &[(7, 0.3)]));
        tree.grow(6, 0.0);
        assert_eq!(tree.nodes().len(), 6);
        let mut kept = Vec::new();
        tree.reroot(1, 9, &mut kept);
        assert_eq!(kept, [1, 2, 5]);
        assert_eq!(shape(&tree), [(1, 0, 1.0), (2, 0, 0.8), (3, 1, 0.4)]);
        assert_eq!(tree.nodes().iter().map(|node| node.depth).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(tree.nodes()[0].source, None);
        assert_eq!(tree.grow(64, 0.0), 3..3, "candidates are gone");
        tree.offer(0, branch(0, &[(2, 0.9), (8, 0.5)]));
        assert_eq!(tree.grow(64, 0.0), 3..4);
        assert_eq!(shape(&tree)[3], (8, 1, 0.4));
        tree.reroot(0, 9, &mut kept);
        assert_eq!(kept, [0, 1, 2, 3]);
        tree.reroot(3, 0, &mut kept);
        assert_eq!(shape(&tree), [(8, 0, 1.0)]);
        tree.offer(0, branch(0, &[(2, 0.9)]));
        assert_eq!(tree.grow(64, 0.0), 1..1, "no room below");
    }

    /// No prefix-closed set of that size has a greater sum, by brute force.
    #[test]
    fn no_tree_of_the_size_is_better() {
        let branches: [&[(TokenId, f32)]; 4] = [
            &[(1, 0.6), (2, 0.9), (3, 0.3)],
            &[(4, 0.3), (5, 0.9), (6, 0.9)],
            &[(7, 0.2), (8, 0.1)],
            &[(9, 0.05), (10, 1.0), (11, 1.0)],
        ];
        for size in 0..=10usize {
            let mut tree = tree(10, &branches);
            tree.grow(size + 1, 0.0);
            let grown: f32 = tree.nodes().iter().skip(1).map(|node| node.probability).sum();
            let mut best = 0.0f32;
            for cut in 0..4usize.pow(4) {
                let lens: Vec<usize> = (0..4)
                    .map(|i| (cut / 4usize.pow(i) % 4).min(branches[i as usize].len()))
                    .collect();
                if lens.iter().sum::<usize>() <= size {
                    let sum = lens.iter().zip(branches).map(|(len, branch)| {
                        let mut product = 1.0;
                        branch[..*len].iter().fold(0.0, |sum, proposal| {
                            product *= proposal.1;
                            sum + product
                        })
                    });
                    best = best.max(sum.sum());
                }
            }
            assert!((grown - best).abs() < 1e-6, "{size} nodes: {grown}, but {best} is possible");
        }
    }
}
