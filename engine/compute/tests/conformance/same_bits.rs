//! Bits don't depend on the level, the threads, the batch, the chunks, the pages or the tree.

use hat_compute::backend::cpu::{CpuBackend, CpuConfig, Level, Op};
use hat_compute::backend::{Backend, LinearArgs, TopLogit, Write};
use hat_loader::DType;
use hat_plan::{AttendShape, Computes as _, PAGE_SIZE, RowMove};
use proptest::prelude::*;

use crate::cases::*;

/// The backends that must agree: the portable level on one thread first.
fn backends() -> Vec<CpuBackend> {
    let mut all = Vec::new();
    for level in [Level::Portable, Level::Avx2, Level::Avx512, Level::Neon] {
        for threads in 1..=3 {
            match CpuBackend::new(CpuConfig { threads, level }) {
                Ok(backend) => all.push(backend),
                Err(error) => eprintln!("not run: {error}"),
            }
        }
    }
    all
}

fn best() -> CpuBackend {
    CpuBackend::new(CpuConfig { threads: 2, level: Level::Auto }).expect("every CPU has a level")
}

/// NaN matters too: the pattern is compared.
fn same(what: &str, a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len(), "{what}");
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert_eq!(a.to_bits(), b.to_bits(), "{what}: number {i}: {a:e} and {b:e}");
    }
}

/// Runs `op` on each backend and compares all with the first.
fn agree(
    what: &str,
    all: &mut [CpuBackend],
    mut op: impl FnMut(&mut CpuBackend) -> Vec<f32>,
) -> Vec<f32> {
    let (first, rest) = all.split_first_mut().expect("some backends");
    let want = op(first);
    for b in rest {
        let got = op(b);
        same(&format!("{what}: {} and {}", b.describe(), first.describe()), &got, &want);
    }
    want
}

#[test]
fn linear_at_every_level_thread_count_and_row_grouping() {
    let (mut all, mut random) = (backends(), Random::new(11));
    for dtype in DTYPES {
        let block = dtype.block_weights();
        for (rows, n, k) in
            [(1, 1, 1), (5, 17, 2), (9, 100, 3), (33, 16, 2), (64, 33, 1), (131, 48, 1)]
        {
            let k = if block == 1 { k * 33 } else { k * block };
            let weight = matrix(dtype, n, k, &mut random);
            let (bias, old) = (vector(&random.numbers(n)), random.numbers(rows * n));
            let x = activations(rows, k, &mut random);
            let what = format!("linear {dtype:?} {rows} x {n} x {k}");
            let together =
                agree(&what, &mut all, |b| linear(b, &weight, Some(&bias), &x, Some(&old)));
            for b in [&mut best()] {
                for row in 0..rows {
                    let (x, old) = (&x[row * k..][..k], &old[row * n..][..n]);
                    let alone = linear(b, &weight, Some(&bias), x, Some(old));
                    same(&format!("{what}: row {row} alone"), &alone, &together[row * n..][..n]);
                }
            }
        }
    }
}

/// Large enough that all threads take part.
#[test]
fn linear_split_among_threads() {
    let (mut all, mut random) = (backends(), Random::new(12));
    for (dtype, rows) in [(DType::Q4_1, 1), (DType::Q8_0, 3), (DType::Q6K, 2), (DType::F16, 4)] {
        let weight = matrix(dtype, 520, 512, &mut random);
        let x = activations(rows, 512, &mut random);
        agree("linear split", &mut all, |b| linear(b, &weight, None, &x, None));
    }
}

/// Several at once give what each gives alone, whatever the types that meet.
#[test]
fn fused_operations_have_the_bits_of_their_parts() {
    let (mut all, mut random) = (backends(), Random::new(16));
    for (a, b, c) in [
        (DType::Q4_1, DType::Q4_1, DType::Q8_0),
        (DType::F16, DType::Q6K, DType::Bf16),
        (DType::F32, DType::F32, DType::Q4_0),
    ] {
        for (rows, n, k) in [(1, 40, 256), (3, 520, 256), (130, 96, 256)] {
            let x = activations(rows, k, &mut random);
            let weights =
                [(a, n), (b, n), (c, n / 2 + 1)].map(|(dtype, n)| matrix(dtype, n, k, &mut random));
            let each = weights.each_ref();
            let alone = each.map(|weight| linear(&mut all[0], weight, None, &x, None));
            let gated = silu_mul(&mut all[0], &alone[0], &alone[1], n);
            for b in &mut all {
                let what = format!("{a:?} {rows} x {n}, {}", b.describe());
                for (together, alone) in linear_each(b, each, &x).iter().zip(&alone) {
                    same(&format!("linear_each {what}"), together, alone);
                }
                same(&format!("swiglu {what}"), &swiglu(b, each[0], each[1], &x), &gated);
            }
        }
    }
}

#[test]
fn the_largest_are_those_of_all() {
    let (mut all, mut random) = (backends(), Random::new(17));
    for dtype in [DType::Q8_0, DType::F32] {
        for (rows, n, k) in [(1, 5, 64), (3, 700, 64), (9, 1600, 96)] {
            let weight = matrix(dtype, n, k, &mut random);
            let mut x = activations(rows, k, &mut random);
            x[..k].fill(0.0); // a row of ties: the lowest columns come first
            let numbers = linear(&mut all[0], &weight, None, &x, None);
            for count in [1, 4, 11] {
                let mut want = Vec::new();
                for row in numbers.chunks_exact(n) {
                    let mut order: Vec<usize> = (0..n).collect();
                    order.sort_by(|a, b| row[*b].total_cmp(&row[*a]).then(a.cmp(b)));
                    let top = |i: &usize| TopLogit { value: row[*i], column: *i as u32 };
                    want.extend(order.iter().take(count).map(top));
                    want.extend((n..count).map(|_| TopLogit::NONE));
                }
                for b in &mut all {
                    let got = linear_top(b, &weight, &x, count).expect("finite");
                    assert_eq!(got, want, "{dtype:?} {rows} x {n}, {count}, {}", b.describe());
                }
            }
        }
    }
    let weight = matrix(DType::F32, 700, 64, &mut random);
    for bad in [f32::NAN, f32::INFINITY] {
        let mut x = random.numbers(2 * 64);
        x[70] = bad;
        for b in &mut all {
            assert_eq!(linear_top(b, &weight, &x, 3), None, "{bad}, {}", b.describe());
        }
    }
}

#[test]
fn quantised_rows_are_not_kept_beyond_a_change() {
    let (mut b, mut random) = (best(), Random::new(13));
    let tensor = matrix(DType::Q4_1, 16, 64, &mut random);
    let (first, second) = (random.numbers(2 * 64), random.numbers(2 * 64));
    let want = linear(&mut best(), &tensor, None, &second, None);
    let weight = b.weight(&tensor).unwrap();
    let (mut x, mut out) = (b.alloc(2, 64).unwrap(), b.alloc(2, 16).unwrap());
    for numbers in [&first, &second] {
        b.upload(numbers, &mut x);
        b.linear(1, &x, Write::Store, LinearArgs::of(&weight, &mut out));
    }
    b.linear(2, &x, Write::Store, LinearArgs::of(&weight, &mut out));
    same("after an upload", &read(&mut b, &out, 2, 16), &want);
}

#[test]
fn rows_at_every_level_and_thread_count() {
    let (mut all, mut random) = (backends(), Random::new(14));
    for (rows, columns) in [(1, 1), (1, 15), (2, 16), (5, 17), (40, 577), (3, 8192)] {
        let x = activations(rows, columns, &mut random);
        let weight = random.numbers(columns);
        let norm = agree("rms_norm", &mut all, |b| rms_norm(b, &x, &weight, 1e-5));
        let alone = rms_norm(&mut all[0], &x[..columns], &weight, 1e-5);
        same("rms_norm alone", &alone, &norm[..columns]);
        if columns < 1000 {
            let gate: Vec<f32> = x.iter().map(|x| x * 60.0).collect();
            agree("silu_mul", &mut all, |b| silu_mul(b, &gate, &x, columns));
        }
    }
    for dtype in DTYPES {
        let table = matrix(dtype, 50, 256, &mut random);
        agree("embed", &mut all, |b| embed(b, &table, &[49, 0, 17, 16]));
    }
    let positions: Vec<u32> = (0..700).map(|i| i * 1499).collect();
    agree("rope_angles", &mut all, |b| rope_angles(b, &positions, &inv_freq(128)));
}

/// The tokens of one sequence computed in steps of these sizes, on these pages.
fn in_steps(
    b: &mut CpuBackend,
    shape: AttendShape,
    tokens: &[u32],
    steps: &[usize],
    pages: &[u32],
) -> Vec<f32> {
    let mut attention = Attention::new(b, shape, 16);
    let (mut out, mut first) = (Vec::new(), 0);
    for rows in steps {
        let plan = Plan::new().straight(first as u32..(first + rows) as u32, pages);
        let (q, k, v) = qkv(&tokens[first..first + rows], &shape);
        out.extend(attention.step(b, &plan, &q, &k, &v));
        first += rows;
    }
    out
}

const SHAPES: [AttendShape; 6] = [
    AttendShape { heads: 2, kv_heads: 2, head_dim: 32, window: None },
    AttendShape { heads: 9, kv_heads: 3, head_dim: 64, window: None },
    AttendShape { heads: 8, kv_heads: 2, head_dim: 128, window: Some(40) },
    AttendShape { heads: 8, kv_heads: 1, head_dim: 64, window: Some(1) },
    AttendShape { heads: 2, kv_heads: 1, head_dim: 80, window: Some(32) },
    AttendShape { heads: 1, kv_heads: 1, head_dim: 6, window: None },
];

#[test]
fn attention_at_every_level_thread_count_and_length() {
    let mut all = backends();
    for shape in SHAPES {
        for length in [1, 31, 32, 33, 63, 64, 65] {
            let tokens: Vec<u32> = (0..length).collect();
            let one_by_one = vec![1; length as usize];
            let want = agree("attend", &mut all, |b| {
                in_steps(b, shape, &tokens, &[length as usize], &[0, 1, 2])
            });
            let got = in_steps(&mut best(), shape, &tokens, &one_by_one, &[3, 0, 15]);
            same("one by one, other pages", &got, &want);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Any chunks, any pages, any mates in the batch.
    #[test]
    fn attention_whatever_the_chunks_and_pages(
        shape in 0..SHAPES.len(),
        steps in proptest::collection::vec(1usize..40, 1..6),
        pages in Just((0u32..16).collect::<Vec<_>>()).prop_shuffle(),
        threads in 1usize..4,
    ) {
        let shape = SHAPES[shape];
        let length = steps.iter().sum();
        let tokens: Vec<u32> = (0..length as u32).map(|i| i * 7 % 50).collect();
        let straight: Vec<u32> = (0..pages_for(length) as u32).collect();
        let mut b = CpuBackend::new(CpuConfig { threads, level: Level::Auto }).unwrap();
        let want = in_steps(&mut best(), shape, &tokens, &[length], &straight);
        let got = in_steps(&mut b, shape, &tokens, &steps, &pages);
        same("steps", &got, &want);
    }

    /// A tree's rows see their ancestors as if these were a plain sequence; and once a path is
    /// kept, so do the rows after it.
    #[test]
    fn a_path_of_a_tree_has_the_bits_of_a_sequence(
        shape in 0..SHAPES.len(),
        prefix in 1usize..70,
        parents in proptest::collection::vec(0usize..1000, 1..40),
        seed: u64,
    ) {
        let shape = SHAPES[shape];
        let mut random = Random::new(seed);
        let nodes = parents.len();
        // Node i hangs below node parents[i] % (i + 1) - 1; -1 is the last row of the prefix.
        let parent = |i: usize| (parents[i] % (i + 1)).checked_sub(1);
        let path = |mut i: usize| {
            let mut path = vec![i];
            while let Some(up) = parent(i) {
                path.push(up);
                i = up;
            }
            path.reverse();
            path
        };
        let pages: Vec<u32> = (0..pages_for(prefix + nodes + 2) as u32).rev().collect();
        let tokens: Vec<u32> = (0..prefix as u32).collect();
        let drafts: Vec<u32> = (0..nodes).map(|_| 1000 + random.bits() % 1000).collect();
        let mut b = best();
        let mut attention = Attention::new(&mut b, shape, 16);
        let (q, k, v) = qkv(&tokens, &shape);
        attention.step(&mut b, &Plan::new().straight(0..prefix as u32, &pages), &q, &k, &v);
        let mut plan = Plan::new();
        for i in 0..nodes {
            let path = path(i);
            let tail: Vec<u32> = path.iter().map(|node| (prefix + node) as u32).collect();
            plan.row((prefix + path.len() - 1) as u32, (prefix + i) as u32, prefix as u32, &tail);
        }
        plan.end(&pages);
        let (q, k, v) = qkv(&drafts, &shape);
        let tree = attention.step(&mut b, &plan, &q, &k, &v);
        let width = shape.heads * shape.head_dim;
        let last = random.below(nodes);
        for node in [0, nodes - 1, last] {
            let path = path(node);
            let text: Vec<u32> =
                tokens.iter().copied().chain(path.iter().map(|node| drafts[*node])).collect();
            let straight: Vec<u32> = (0..pages_for(text.len()) as u32).collect();
            let want = in_steps(&mut best(), shape, &text, &[text.len()], &straight);
            let want = &want[(text.len() - 1) * width..];
            same("node", &tree[node * width..][..width], want);
        }
        // Keep the path to `last` and go on.
        let at = |slot: usize| (pages[slot / PAGE_SIZE], (slot % PAGE_SIZE) as u32);
        let kept = path(last);
        let moves: Vec<RowMove> = kept
            .iter()
            .enumerate()
            .map(|(i, node)| RowMove { from: at(prefix + node), to: at(prefix + i) })
            .collect();
        attention.compact(&mut b, &moves);
        let text: Vec<u32> = tokens
            .iter()
            .copied()
            .chain(kept.iter().map(|node| drafts[*node]))
            .chain([7, 8])
            .collect();
        let next = (text.len() - 2) as u32;
        let (q, k, v) = qkv(&text[text.len() - 2..], &shape);
        let got = attention.step(&mut b, &Plan::new().straight(next..next + 2, &pages), &q, &k, &v);
        let straight: Vec<u32> = (0..pages_for(text.len()) as u32).collect();
        let want = in_steps(&mut best(), shape, &text, &[text.len()], &straight);
        same("after the path is kept", &got, &want[next as usize * width..]);
    }
}

/// A row's bits don't change with sequences beside it.
#[test]
fn attention_with_others_in_the_batch() {
    let shape = SHAPES[1];
    let mut b = best();
    let mut attention = Attention::new(&mut b, shape, 16);
    let mut plan = Plan::new().straight(0..40, &[9, 3]);
    plan.end(&[]); // a sequence without rows
    let plan = plan.straight(0..1, &[4]).straight(0..70, &[0, 12, 1]);
    let tokens: Vec<u32> = (0..40).chain([5]).chain(500..570).collect();
    let (q, k, v) = qkv(&tokens, &shape);
    let got = attention.step(&mut b, &plan, &q, &k, &v);
    let width = shape.heads * shape.head_dim;
    for (first, tokens) in [(0, &tokens[..40]), (40, &tokens[40..41]), (41, &tokens[41..])] {
        let want = in_steps(&mut best(), shape, tokens, &[tokens.len()], &[0, 1, 2]);
        same("beside others", &got[first * width..][..want.len()], &want);
    }
}

/// The bits of arithmetic 1, of all operations together, on inputs that every platform makes alike.
/// A change that alters this number makes another arithmetic: see `docs/ARCHITECTURE.md`.
const ARITHMETIC_1: &str = "a79f9e29d6af59bbfc9b5915548f9b20";

#[test]
fn the_arithmetic_is_id_1() {
    for mut b in backends() {
        let b = &mut b;
        let (mut random, mut hash) = (Random::new(16), blake3::Hasher::new());
        let mut take = |numbers: Vec<f32>| {
            assert!(numbers.iter().all(|number| number.is_finite()));
            numbers.iter().for_each(|number| {
                hash.update(&number.to_le_bytes());
            });
        };
        for dtype in DTYPES {
            let (rows, n, k) = (7, 20, 512);
            let weight = matrix(dtype, n, k, &mut random);
            let (bias, old) = (vector(&random.numbers(n)), random.numbers(rows * n));
            let x = activations(rows, k, &mut random);
            take(linear(b, &weight, Some(&bias), &x, Some(&old)));
            take(embed(b, &weight, &[0, 19, 7]));
        }
        let x = activations(9, 577, &mut random);
        take(rms_norm(b, &x, &x[..577], 1e-5));
        take(rope_angles(b, &[0, 1, 77, 5000, 1 << 20], &inv_freq(64)));
        take(silu_mul(b, &x.iter().map(|x| x * 40.0).collect::<Vec<_>>(), &x, 577));
        for shape in SHAPES {
            let tokens: Vec<u32> = (0..70).collect();
            take(in_steps(b, shape, &tokens, &[40, 1, 29], &[2, 5, 1]));
        }
        assert_eq!(hash.finalize().to_hex()[..32], *ARITHMETIC_1, "{}", b.describe());
    }
}

/// One bit in one number of any operation is seen by comparisons like those above.
#[test]
fn a_planted_ulp_is_seen() {
    let mut random = Random::new(15);
    let weight = matrix(DType::Q4_1, 33, 64, &mut random);
    let (x, ones) = (random.numbers(3 * 64), vec![1.0; 64]);
    type Run<'a> = Box<dyn Fn(&mut CpuBackend) -> Vec<f32> + 'a>;
    let (shape, three) = (SHAPES[0], Plan::new().straight(0..3, &[0]));
    let runs: [(Op, Run<'_>); 7] = [
        (Op::Embed, Box::new(|b| embed(b, &weight, &[3, 4]))),
        (Op::RmsNorm, Box::new(|b| rms_norm(b, &x, &ones, 1e-5))),
        (Op::Linear, Box::new(|b| linear(b, &weight, None, &x, None))),
        (Op::RopeAngles, Box::new(|b| rope_angles(b, &[3, 9], &inv_freq(64)))),
        (Op::RopeAppend, Box::new(|b| Attention::rotated(b, shape, &three, &x))),
        (Op::Attend, Box::new(|b| in_steps(b, shape, &[1, 2, 3], &[3], &[0]))),
        (Op::SiluMul, Box::new(|b| silu_mul(b, &x, &x, 64))),
    ];
    for (op, run) in runs {
        let mut b = best();
        let want = run(&mut b);
        for element in [0, 17, 1_000_003] {
            b.plant_ulp(op, element, false);
            let struck = run(&mut b);
            let differ = |(a, b): (&f32, &f32)| a.to_bits() != b.to_bits();
            assert!(struck.iter().zip(&want).any(differ), "{op:?} {element}");
            same("the fault is gone", &run(&mut b), &want);
        }
        b.plant_ulp(op, 5, true);
        let (first, second) = (run(&mut b), run(&mut b));
        same("every time", &first, &second);
        assert!(first != want, "{op:?} every time");
    }
}
