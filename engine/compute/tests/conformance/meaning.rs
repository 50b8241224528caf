//! The reference against numbers made by hand, and every other backend against the reference.

use hat_compute::backend::Backend;
use hat_compute::backend::cpu::{CpuBackend, CpuConfig, Level};
use hat_compute::backend::reference::Reference;
use hat_loader::{DType, Layout, TensorBytes, layout};
use hat_plan::{AttendShape, BackendError, KvShape, RowMove};

use crate::cases::*;

/// Allowed distance of a number from the reference: `of_terms` times the sum of the magnitudes that
/// make it, plus `of_result` times itself, plus `absolute`.
struct Tolerance {
    op: &'static str,
    dtype: Option<DType>,
    of_terms: f64,
    of_result: f64,
    absolute: f64,
}

const fn tolerance(op: &'static str, dtype: Option<DType>, allow: [f64; 3]) -> Tolerance {
    let [of_terms, of_result, absolute] = allow;
    Tolerance { op, dtype, of_terms, of_result, absolute }
}

/// Sums of k terms in f32 are off by some 2^-24 of the terms; activations are given so that int8
/// holds them exactly. Attention rounds K to f16 after a rotation in f32 instead of f64, so a K
/// at a tie may fall to the other side (2^-11 of it).
const TOLERANCES: [Tolerance; 12] = [
    tolerance("linear", Some(DType::F32), [1e-6, 0.0, 1e-30]),
    tolerance("linear", Some(DType::F16), [1e-6, 0.0, 1e-30]),
    tolerance("linear", Some(DType::Bf16), [1e-6, 0.0, 1e-30]),
    tolerance("linear", Some(DType::Q8_0), [1e-6, 0.0, 1e-30]),
    tolerance("linear", Some(DType::Q4_0), [1e-6, 0.0, 1e-30]),
    tolerance("linear", Some(DType::Q4_1), [1e-6, 0.0, 1e-30]),
    tolerance("linear", Some(DType::Q6K), [1e-6, 0.0, 1e-30]),
    tolerance("embed", None, [0.0, 0.0, 0.0]),
    tolerance("rms_norm", None, [0.0, 5e-7, 1e-30]),
    tolerance("rope_angles", None, [0.0, 1.2e-7, 1e-12]),
    tolerance("silu_mul", None, [0.0, 5e-7, 1e-30]),
    tolerance("attend", None, [0.0, 0.0, 2e-3]),
];

/// Panics at the first number that is too far off; gives back the largest part of what is allowed.
fn close(op: &str, dtype: Option<DType>, got: &[f32], want: &[f32], terms: Option<&[f32]>) -> f64 {
    let found = TOLERANCES.iter().find(|t| t.op == op && t.dtype == dtype);
    let tolerance = found.expect("a line of the table");
    assert_eq!(got.len(), want.len());
    let mut worst = 0f64;
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let (got, want) = (f64::from(*got), f64::from(*want));
        let allowed = tolerance.of_terms * terms.map_or(0.0, |terms| f64::from(terms[i]))
            + tolerance.of_result * want.abs()
            + tolerance.absolute;
        let off = (got - want).abs();
        assert!(off <= allowed, "{op} {dtype:?}: number {i} is {got}, not {want} +- {allowed:e}");
        worst = worst.max(if allowed > 0.0 { off / allowed } else { 0.0 });
    }
    worst
}

/// Rows that int8 blocks of 32 hold exactly: whole numbers up to 127, times a power of two.
fn exact_activations(rows: usize, k: usize, random: &mut Random) -> Vec<f32> {
    let mut x: Vec<f32> = (0..rows * k).map(|_| (random.below(255) as f32) - 127.0).collect();
    for (i, block) in x.chunks_mut(32).enumerate() {
        let scale = [1.0, 0.25, 2f32.powi(-10), 64.0][i % 4];
        block.iter_mut().for_each(|x| *x *= scale);
        match i % 16 {
            7 => block.fill(0.0),
            8 => block.fill(127.0 * scale),
            9 => block.fill(-127.0 * scale),
            _ => block[i % block.len()] = 127.0 * scale,
        }
    }
    x
}

/// The sums of magnitudes `sum |x| |w|`.
fn terms(weight: &hat_loader::Tensor, x: &[f32]) -> Vec<f32> {
    let (n, k, dtype) = (weight.shape[0], weight.shape[1], weight.dtype);
    let row = dtype.row_bytes(k).expect("whole blocks");
    let (mut rows, mut numbers) = (vec![0; n * row], vec![0.0; n * k]);
    layout::unpack(dtype, n, k, &weight.bytes, &mut rows);
    for (row, numbers) in rows.chunks_exact(row).zip(numbers.chunks_exact_mut(k)) {
        layout::dequantise_row(dtype, k, row, numbers);
    }
    let bytes: Vec<u8> = numbers.iter().flat_map(|w| w.abs().to_le_bytes()).collect();
    let x: Vec<f32> = x.iter().map(|x| x.abs()).collect();
    linear(&mut Reference, &packed(DType::F32, n, k, &bytes), None, &x, None)
}

fn linear_conforms<B: Backend>(b: &mut B) {
    let mut random = Random::new(1);
    for dtype in DTYPES {
        let block = dtype.block_weights();
        for (rows, n, blocks) in
            [(1, 1, 1), (1, 33, 3), (2, 16, 2), (3, 15, 1), (4, 17, 5), (7, 48, 2), (33, 40, 2)]
        {
            let k = if block == 1 { blocks * 32 + 1 } else { blocks * block };
            let weight = matrix(dtype, n, k, &mut random);
            let x = exact_activations(rows, k, &mut random);
            let (bias, old) = (vector(&random.numbers(n)), random.numbers(rows * n));
            let mut sums = terms(&weight, &x);
            for (bias, old) in
                [(None, None), (Some(&bias), None), (None, Some(&old)), (Some(&bias), Some(&old))]
            {
                let old = old.map(|old| &old[..]);
                sums.iter_mut().for_each(|sum| *sum += 0.5); // bias and old content
                let got = linear(b, &weight, bias, &x, old);
                let want = linear(&mut Reference, &weight, bias, &x, old);
                close("linear", Some(dtype), &got, &want, Some(&sums));
            }
        }
    }
}

/// Ordinary activations: each is off by at most half a step of its block.
fn quantisation_conforms<B: Backend>(b: &mut B) {
    let mut random = Random::new(2);
    for dtype in DTYPES {
        let k = 512;
        let weight = matrix(dtype, 20, k, &mut random);
        let x = activations(9, k, &mut random);
        let mut steps = x.clone();
        for block in steps.chunks_exact_mut(32) {
            let amax = block.iter().fold(0f32, |max, x| max.max(x.abs()));
            block.fill(amax / 254.0 * 1.01 + 1e-30);
        }
        let allowed = terms(&weight, &steps);
        let got = linear(b, &weight, None, &x, None);
        let want = linear(&mut Reference, &weight, None, &x, None);
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            assert!((got - want).abs() <= allowed[i] + 1e-20, "{dtype:?} {i}: {got}, not {want}");
        }
    }
}

fn rows_conform<B: Backend>(b: &mut B) {
    let mut random = Random::new(3);
    for dtype in DTYPES {
        let table = matrix(dtype, 37, 512, &mut random);
        let tokens = [0, 36, 15, 16, 16, 31];
        let (got, want) = (embed(b, &table, &tokens), embed(&mut Reference, &table, &tokens));
        close("embed", None, &got, &want, None);
    }
    for columns in [1, 15, 16, 17, 64, 577] {
        let (x, weight) = (activations(9, columns, &mut random), random.numbers(columns));
        let got = rms_norm(b, &x, &weight, 1e-5);
        close("rms_norm", None, &got, &rms_norm(&mut Reference, &x, &weight, 1e-5), None);
        let gate: Vec<f32> = x.iter().map(|x| x * 20.0).collect();
        let up = random.numbers(gate.len());
        let got = silu_mul(b, &gate, &up, columns);
        close("silu_mul", None, &got, &silu_mul(&mut Reference, &gate, &up, columns), None);
    }
    let positions = [0, 1, 31, 32, 100, 8191, 131_071, 1 << 20];
    for head_dim in [2, 64, 128] {
        let inv_freq = inv_freq(head_dim);
        let got = rope_angles(b, &positions, &inv_freq);
        let want = rope_angles(&mut Reference, &positions, &inv_freq);
        close("rope_angles", None, &got, &want, None);
    }
}

fn attend_conforms<B: Backend>(b: &mut B) {
    for (heads, kv_heads, head_dim, window) in [
        (1, 1, 32, None),
        (9, 3, 64, None),
        (4, 4, 128, None),
        (8, 1, 64, Some(5)),
        (4, 1, 80, Some(33)),
        (6, 2, 2, None),
    ] {
        let shape = AttendShape { heads, kv_heads, head_dim, window };
        let mut fast = Attention::new(b, shape, 8);
        let mut slow = Attention::new(&mut Reference, shape, 8);
        let mut step = |plan: &Plan, tokens: &[u32]| {
            let (q, k, v) = qkv(tokens, &shape);
            let q: Vec<f32> = q.iter().map(|q| q / 3.0).collect();
            let got = fast.step(b, plan, &q, &k, &v);
            let want = slow.step(&mut Reference, plan, &q, &k, &v);
            close("attend", None, &got, &want, None)
        };
        // Two sequences in one batch, pages out of order; then chunks; then a tree.
        let two = Plan::new().straight(0..33, &[5, 1]).straight(0..1, &[2]);
        step(&two, &(0..34).collect::<Vec<_>>());
        step(&Plan::new().straight(33..65, &[5, 1, 7]), &(100..132).collect::<Vec<_>>());
        let mut tree = Plan::new();
        tree.row(65, 65, 66, &[]);
        tree.row(66, 66, 67, &[]);
        tree.row(66, 67, 66, &[67]);
        tree.row(67, 68, 66, &[67, 68]);
        tree.end(&[5, 1, 7]);
        tree.row(1, 1, 2, &[]);
        tree.end(&[2]);
        step(&tree, &[200, 201, 202, 203, 204]);
        // The path 65, 67, 68 is kept.
        let moves = [RowMove { from: (7, 3), to: (7, 2) }, RowMove { from: (7, 4), to: (7, 3) }];
        fast.compact(b, &moves);
        slow.compact(&mut Reference, &moves);
        let plan = Plan::new().straight(68..70, &[5, 1, 7]);
        let (q, k, v) = qkv(&[300, 301], &shape);
        let got = fast.step(b, &plan, &q, &k, &v);
        let want = slow.step(&mut Reference, &plan, &q, &k, &v);
        close("attend", None, &got, &want, None);
    }
}

/// The suite that each backend passes.
fn conforms<B: Backend>(mut b: B) {
    linear_conforms(&mut b);
    quantisation_conforms(&mut b);
    rows_conform(&mut b);
    attend_conforms(&mut b);
    bad_tensors_are_refused(&mut b);
}

fn bad_tensors_are_refused<B: Backend>(b: &mut B) {
    let good = matrix(DType::Q4_1, 20, 64, &mut Random::new(4));
    let mut short = good.clone();
    short.bytes = TensorBytes::owned(vec![0; 2 * 2 * 320 - 1]);
    let mut cut = good.clone();
    cut.shape = vec![20, 65];
    let mut rows = good.clone();
    rows.layout = Layout::Rows;
    let mut huge = good.clone();
    huge.shape = vec![usize::MAX, 64];
    let mut cube = good.clone();
    cube.shape = vec![2, 2, 64];
    let mut vector = vector(&[1.0; 8]);
    vector.dtype = DType::F16;
    for tensor in [short, cut, rows, huge, cube, vector] {
        let Err(error) = b.weight(&tensor) else { panic!("{:?} is taken", tensor.shape) };
        assert!(
            matches!(&error, BackendError::Unsupported { tensor: name, .. } if *name == tensor.name)
        );
    }
    assert!(b.weight(&good).is_ok());
}

#[test]
fn the_reference_conforms_to_itself() {
    conforms(Reference);
}

#[test]
fn portable_means_what_the_reference_means() {
    conforms(CpuBackend::new(CpuConfig { threads: 1, level: Level::Portable }).unwrap());
}

/// The vector levels that this CPU has; the others say why not.
#[test]
fn vectors_mean_what_the_reference_means() {
    for level in [Level::Avx2, Level::Avx512, Level::Neon] {
        match CpuBackend::new(CpuConfig { threads: 2, level }) {
            Ok(backend) => conforms(backend),
            Err(error) => eprintln!("not run: {error}"),
        }
    }
}

#[test]
fn the_reference_gives_numbers_made_by_hand() {
    let b = &mut Reference;
    // 2 outputs over 3 inputs.
    let bytes: Vec<u8> =
        [1f32, 2.0, 3.0, -1.0, 0.5, 0.0].iter().flat_map(|w| w.to_le_bytes()).collect();
    let weight = packed(DType::F32, 2, 3, &bytes);
    assert_eq!(linear(b, &weight, None, &[1.0, 10.0, 100.0], None), [321.0, 4.0]);
    let bias = vector(&[1000.0, -4.0]);
    let old = [1.0, 2.0];
    assert_eq!(linear(b, &weight, Some(&bias), &[1.0, 10.0, 100.0], Some(&old)), [1322.0, 2.0]);
    assert_eq!(embed(b, &weight, &[1, 0]), [-1.0, 0.5, 0.0, 1.0, 2.0, 3.0]);
    // mean of squares 12.5, eps 12.5: scale 1/5.
    assert_eq!(rms_norm(b, &[3.0, 4.0], &[1.0, 10.0], 12.5), [0.6, 8.0]);
    let silu = silu_mul(b, &[0.0, 3f32.ln()], &[5.0, 2.0], 2);
    assert_eq!(silu[0], 0.0);
    assert!((silu[1] - 1.5 * 3f32.ln()).abs() < 1e-6); // 1 / (1 + 1/3) = 3/4
    let angles = rope_angles(b, &[2], &[0.5, 0.25]);
    assert_eq!(angles, [1f32.cos(), 0.5f32.cos(), 1f32.sin(), 0.5f32.sin()]);
}

#[test]
fn the_reference_attends_as_by_hand() {
    let b = &mut Reference;
    let shape = AttendShape { heads: 2, kv_heads: 1, head_dim: 4, window: None };
    let mut attention = Attention::new(b, shape, 1);
    // Position 0: no rotation. One key: the value itself.
    let out = attention.step(
        b,
        &Plan::new().straight(0..1, &[0]),
        &[1.0; 8],
        &[4.0, 0.0, 0.0, 0.0],
        &[1.0, 2.0, 3.0, 4.0],
    );
    assert_eq!(out, [1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0]);
    // Position 1: the query of head 1 is zero, so both keys weigh the same.
    let q = [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
    let out = attention.step(
        b,
        &Plan::new().straight(1..2, &[0]),
        &q,
        &[0.0, 2.0 * 3f32.ln(), 0.0, 0.0],
        &[5.0, 4.0, 3.0, 0.0],
    );
    assert_eq!(out[4..], [3.0, 3.0, 3.0, 2.0]);
    // Head 0: query and key 1 are both turned by the same angle, so their product is 2 ln 3, half
    // of it after the scale: weights 1/4 and 3/4 (K is rounded to f16).
    for (got, want) in out[..4].iter().zip([4.0, 3.5, 3.0, 1.0]) {
        assert!((got - want).abs() < 3e-3, "{got} {want}");
    }
}

#[test]
fn impossible_configurations_are_errors() {
    let error = CpuBackend::new(CpuConfig { threads: 0, level: Level::Auto }).err();
    assert_eq!(error.unwrap().to_string(), "cpu: threads: 0, but at least 1 is needed");
    let mut b = CpuBackend::new(CpuConfig { threads: 1, level: Level::Auto }).unwrap();
    assert!(matches!(b.alloc(usize::MAX, 2), Err(BackendError::OutOfMemory { .. })));
    assert!(matches!(b.alloc(1 << 50, 2), Err(BackendError::OutOfMemory { .. })));
    let shape = KvShape { layers: 1 << 20, pages: 1 << 20, kv_heads: 1 << 20, head_dim: 64 };
    assert!(matches!(b.kv(shape), Err(BackendError::OutOfMemory { .. })));
}
