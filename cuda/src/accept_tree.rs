//! Launcher of `accept_tree.cu`.

use crate::abi;
use crate::gpu::{Gpu, GpuError, Launch, Memory, count};
use crate::kernel::Kernel;

/// Most nodes of one tree.
pub const NODES_MAX: usize = abi::HAT_TREE_NODES as usize;

/// Draft trees, one after another. `indptr` is `[trees + 1]`, the others `[nodes]`.
#[derive(Clone, Copy, Debug)]
pub struct Trees<'a> {
    /// Nodes of tree `i` are `indptr[i]..indptr[i + 1]`, the root first.
    pub indptr: &'a [u32],
    /// Index within the tree, below the node's own; the root's is 0.
    pub parents: &'a [u32],
    /// The node's token.
    pub tokens: &'a [u32],
    /// The target's choice after the node.
    pub choices: &'a [u32],
}

/// What the target takes of one tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accepted {
    /// Nodes within the tree, the root first.
    pub path: Vec<u32>,
    /// The token after the last one.
    pub next: u32,
}

/// The longest path of each tree on which each node is the target's choice after the one before;
/// of equal children the first. Waits for it.
///
/// # Errors
/// If the GPU says no.
///
/// # Panics
/// If the arrays are no trees.
pub fn accept_tree(gpu: &mut impl Gpu, trees: &Trees<'_>) -> Result<Vec<Accepted>, GpuError> {
    let Trees { indptr, parents, tokens, choices } = *trees;
    let nodes = parents.len();
    let count_of_trees = indptr.len().saturating_sub(1);
    if count_of_trees == 0 {
        return Ok(Vec::new());
    }
    check(trees);
    // One buffer each way: the arrays stand one after another.
    let mut from = gpu.alloc(4 * (indptr.len() + 3 * nodes), "draft trees")?;
    let mut to = gpu.alloc(4 * (nodes + 2 * count_of_trees), "accepted paths")?;
    let mut at = 0;
    for part in [indptr, parents, tokens, choices] {
        gpu.upload(part, &mut from, at)?;
        at += part.len();
    }
    let input = from.slice::<u32>();
    let node_input =
        |i: usize| input.range(indptr.len() + i * nodes..indptr.len() + (i + 1) * nodes);
    let mut output = to.slice_mut::<u32>();
    let params = abi::hat_accept_tree {
        indptr: input.range(0..indptr.len()).pointer(),
        parents: node_input(0).pointer(),
        tokens: node_input(1).pointer(),
        choices: node_input(2).pointer(),
        path: output.range(0..nodes).pointer(),
        path_len: output.range(nodes..nodes + count_of_trees).pointer(),
        next: output.range(nodes + count_of_trees..nodes + 2 * count_of_trees).pointer(),
    };
    let launch = Launch { kernel: Kernel::AcceptTree, grid: [count(count_of_trees), 1, 1] };
    // SAFETY: `check` holds every index within its tree, and parents below their children, so a
    // path is no longer than its tree.
    unsafe { gpu.launch(launch, &params) }?;
    let mut out = vec![0u32; nodes + 2 * count_of_trees];
    gpu.download(&to, 0, &mut out)?;
    let accepted = |tree: usize| Accepted {
        path: out[indptr[tree] as usize..][..out[nodes + tree] as usize].to_vec(),
        next: out[nodes + count_of_trees + tree],
    };
    Ok((0..count_of_trees).map(accepted).collect())
}

fn check(trees: &Trees<'_>) {
    let Trees { indptr, parents, tokens, choices } = *trees;
    let nodes = parents.len();
    assert!(tokens.len() == nodes && choices.len() == nodes, "arrays of {nodes} nodes");
    assert!(indptr[0] == 0 && indptr[indptr.len() - 1] as usize == nodes, "trees of {nodes} nodes");
    for pair in indptr.windows(2) {
        assert!(pair[0] < pair[1] && pair[1] as usize <= nodes, "a tree {pair:?} of {nodes} nodes");
        let tree = &parents[pair[0] as usize..pair[1] as usize];
        assert!(tree.len() <= NODES_MAX && tree[0] == 0, "a tree of {} nodes", tree.len());
        let below = tree.iter().zip(0..).skip(1).all(|(parent, node)| *parent < node);
        assert!(below, "a parent that is not before its child: {tree:?}");
    }
}
