//! What decides tokens: top_k, accept_tree.

use hat_cuda::accept_tree::{Accepted, Trees, accept_tree};
use hat_cuda::gpu::Memory as _;
use hat_cuda::top_k::TopK;

use crate::stand::{Random, gpu, memory, same_under_all_schedules};

/// The k largest by sorting: value falling, column rising.
fn expected(row: &[f32], k: usize) -> (Vec<f32>, Vec<u32>) {
    let mut all: Vec<(f32, u32)> = row.iter().copied().zip(0..).collect();
    all.sort_by(|a, b| b.0.partial_cmp(&a.0).unwrap().then(a.1.cmp(&b.1)));
    all.truncate(k);
    all.into_iter().unzip()
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn top_k_is_a_sort() {
    let Some(mut gpu) = gpu() else { return };
    let mut random = Random(30);
    for (rows, columns, k) in [(1, 1, 1), (2, 2048, 5), (3, 2049, 64), (2, 5000, 1), (1, 64, 64)] {
        let mut x = random.numbers(rows * columns, 4.0);
        // Many ties, within a slice and across; but the last row is led by its end.
        x.iter_mut().for_each(|x| *x = (*x * 8.0).round() / 8.0);
        x[rows * columns - 1] = 9.0;
        let top = same_under_all_schedules(&mut gpu, |gpu| {
            let from = memory(gpu, &x);
            let mut top = TopK::new(gpu, rows, columns, k).unwrap();
            top.run(gpu, rows, k, from.slice()).unwrap()
        });
        for (r, row) in x.chunks(columns).enumerate() {
            let (values, found) = expected(row, k);
            assert_eq!(top.columns[r * k..][..k], found, "row {r} of [{rows}, {columns}]");
            assert_eq!(top.values[r * k..][..k], values);
        }
        assert!(top.finite.iter().all(|finite| *finite));
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn top_k_says_which_rows_are_not_finite() {
    let Some(mut gpu) = gpu() else { return };
    let mut x = Random(31).numbers(4 * 3000, 1.0);
    (x[2999], x[3000 + 5], x[3 * 3000]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
    let from = memory(&mut gpu, &x);
    let mut top = TopK::new(&mut gpu, 4, 3000, 2).unwrap();
    let found = top.run(&mut gpu, 4, 2, from.slice()).unwrap();
    assert_eq!(found.finite, [false, false, true, false]);
}

/// The walk, node by node.
fn walk(parents: &[u32], tokens: &[u32], choices: &[u32]) -> Accepted {
    let mut path = vec![0u32];
    loop {
        let at = path[path.len() - 1];
        let next = choices[at as usize];
        let is_child = |node: &usize| parents[*node] == at && tokens[*node] == next;
        match (1..parents.len()).find(is_child) {
            Some(child) => path.push(child as u32),
            None => return Accepted { path, next },
        }
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn accept_tree_walks_like_the_device() {
    let Some(mut gpu) = gpu() else { return };
    let mut random = Random(32);
    let (mut indptr, mut parents, mut tokens, mut choices) = (vec![0u32], vec![], vec![], vec![]);
    let mut expected = Vec::new();
    for tree in 0..60 {
        let nodes = [1, 2, 5, 31, 32, 33, 64][tree % 7];
        // Chains and bushes; few tokens, so that walks go deep and siblings are equal.
        let bushy = tree % 3 + 1;
        let first = parents.len();
        for node in 0..nodes {
            let back = 1 + random.next() as usize % bushy.min(node.max(1));
            let parent = match tree % 4 {
                // Siblings far apart.
                0 if node > 0 => random.below(node.min(3)),
                _ => node.saturating_sub(back),
            };
            parents.push(parent as u32);
            tokens.push(u32::from(random.next().is_multiple_of(8)));
            choices.push(u32::from(random.next().is_multiple_of(8)));
        }
        indptr.push(parents.len() as u32);
        expected.push(walk(&parents[first..], &tokens[first..], &choices[first..]));
    }
    let trees = Trees { indptr: &indptr, parents: &parents, tokens: &tokens, choices: &choices };
    let accepted = same_under_all_schedules(&mut gpu, |gpu| accept_tree(gpu, &trees).unwrap());
    assert_eq!(accepted, expected);
    let deepest = expected.iter().map(|accepted| accepted.path.len()).max();
    assert!(deepest > Some(5), "the walks are too short to show anything: {deepest:?}");
}
