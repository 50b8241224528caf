//! Kernels that take each row, or each number, by itself: embed, silu_mul, rope_angles,
//! quantise_rows.

use hat_cuda::gpu::Memory as _;
use hat_cuda::quantise_rows::{Q8Mut, quantise_q8};
use hat_cuda::rope_angles::rope_angles;
use hat_cuda::table::{Table, WeightDType};
use hat_cuda::testkit::test_gpu::TestGpu;

use crate::panels::Matrix;
use crate::stand::{
    Random, assert_close, bits, gpu, memory, numbers, room, same_under_all_schedules,
};

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn embed_gives_the_tables_numbers() {
    let Some(mut gpu) = gpu() else { return };
    let mut random = Random(10);
    use WeightDType::{Bf16, F16, F32, Q4_0, Q4_1, Q6K, Q8_0};
    for kind in [F32, F16, Bf16, Q8_0, Q4_0, Q4_1, Q6K] {
        let (vocabulary, columns) = (35, if kind == Q6K { 768 } else { 576 });
        let matrix = Matrix::random(kind, vocabulary, columns, &mut random);
        let table_bytes = memory(&mut gpu, &matrix.bytes);
        let table = Table::new(table_bytes.slice(), kind, vocabulary, columns);
        let tokens = [0u32, 34, 15, 16, 7, 7];
        let out = same_under_all_schedules(&mut gpu, |gpu| {
            let mut staging = room::<u32>(gpu, tokens.len());
            let mut out = room::<f32>(gpu, tokens.len() * columns);
            hat_cuda::embed::embed(gpu, &tokens, table, &mut staging, out.slice_mut()).unwrap();
            bits(&numbers::<f32>(gpu, &out, tokens.len() * columns))
        });
        // `d q` is exact in f32 and rounded nowhere; `d q + m` is rounded once or twice.
        for (out, token) in out.chunks(columns).zip(tokens) {
            let out: Vec<f32> = out.iter().map(|bits| f32::from_bits(*bits)).collect();
            let relative = if kind == Q4_1 { 1e-6 } else { 0.0 };
            let what = format!("embed {kind:?} of {token}");
            assert_close(&what, &out, matrix.row(token as usize), relative / 10.0, relative);
        }
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
#[should_panic(expected = "token 35 of 35")]
fn a_token_beyond_the_table_is_refused() {
    let Some(mut gpu) = gpu() else { panic!("token 35 of 35: no compiler") };
    let table_bytes = room::<u8>(&mut gpu, 48 * 34);
    let table = Table::new(table_bytes.slice(), WeightDType::Q8_0, 35, 32);
    let (mut staging, mut out) = (room::<u32>(&mut gpu, 1), room::<f32>(&mut gpu, 32));
    let _ = hat_cuda::embed::embed(&mut gpu, &[35], table, &mut staging, out.slice_mut());
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn silu_mul_means_what_it_says() {
    let Some(mut gpu) = gpu() else { return };
    let mut random = Random(11);
    for count in [4, 1024, 5 * 1536] {
        let mut gate = random.numbers(count, 8.0);
        (gate[0], gate[1], gate[2]) = (-90.0, 90.0, 0.0);
        let up = random.numbers(count, 2.0);
        let out = same_under_all_schedules(&mut gpu, |gpu| {
            let (mut gate, up) = (memory(gpu, &gate), memory(gpu, &up));
            hat_cuda::silu_mul::silu_mul(gpu, gate.slice_mut(), up.slice()).unwrap();
            bits(&numbers::<f32>(gpu, &gate, count))
        });
        let expected = gate.iter().zip(&up).map(|(gate, up)| gate / (1.0 + exp(-gate)) * up);
        assert_eq!(out, bits(&expected.collect::<Vec<f32>>()));
        let out: Vec<f32> = out.into_iter().map(f32::from_bits).collect();
        let one = |(gate, up): (&f32, &f32)| {
            let gate = f64::from(*gate);
            gate / (1.0 + (-gate).exp()) * f64::from(*up)
        };
        let expected: Vec<f64> = gate.iter().zip(&up).map(one).collect();
        assert_close("silu_mul", &out, &expected, 1e-7, 5e-7);
    }
}

/// docs/ARITHMETIC.md, `exp`, step by step in f32.
fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    let low = (2f64.ln() - f64::from(std::f32::consts::LN_2)) as f32;
    let inside = x.clamp(-87.336_54, 89.0);
    let shifted = inside.mul_add(std::f32::consts::LOG2_E, ROUND);
    let whole = shifted - ROUND;
    let r = whole.mul_add(-low, whole.mul_add(-std::f32::consts::LN_2, inside));
    let factorials = [5040.0, 720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0f32];
    let sum = factorials.iter().fold(0.0f32, |sum, n| sum.mul_add(r, 1.0 / n));
    let (n, half) = (whole as i32, (whole as i32) >> 1);
    if x < -87.336_54 { 0.0 } else { sum * 2f32.powi(half) * 2f32.powi(n - half) }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn rope_angles_are_cosines_and_sines() {
    let Some(mut gpu) = gpu() else { return };
    // The last is next to a whole number of half turns: its sine is 4e-8.
    let positions = [0u32, 1, 5, 1499, 1 << 20, 5_419_351];
    let inv_freq: Vec<f32> = (0..32).map(|i| 10_000f32.powf(-(i as f32) / 32.0)).collect();
    let out = same_under_all_schedules(&mut gpu, |gpu| {
        let (positions, inv_freq) = (memory(gpu, &positions), memory(gpu, &inv_freq));
        let mut angles = room::<f32>(gpu, 6 * 64);
        rope_angles(gpu, positions.slice(), inv_freq.slice(), angles.slice_mut()).unwrap();
        bits(&numbers::<f32>(gpu, &angles, 6 * 64))
    });
    let out: Vec<f32> = out.into_iter().map(f32::from_bits).collect();
    for (position, out) in positions.iter().zip(out.chunks(64)) {
        let angles = inv_freq.iter().map(|inv_freq| f64::from(*position as f32 * inv_freq));
        let expected: Vec<f64> = angles.clone().map(f64::cos).chain(angles.map(f64::sin)).collect();
        assert_close("rope_angles", out, &expected, 1e-15, 6e-8);
    }
}

/// q, d and s of rows.
fn quantised(gpu: &mut TestGpu, x: &[f32]) -> (Vec<i8>, Vec<f32>, Vec<f32>) {
    let blocks = x.len() / 32;
    let from = memory(gpu, x);
    let (mut q, mut d) = (room::<i8>(gpu, x.len()), room::<f32>(gpu, blocks));
    let mut s = room::<f32>(gpu, blocks);
    let to = Q8Mut { q: q.slice_mut(), d: d.slice_mut(), s: s.slice_mut() };
    quantise_q8(gpu, from.slice(), to).unwrap();
    (numbers(gpu, &q, x.len()), numbers(gpu, &d, blocks), numbers(gpu, &s, blocks))
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn int8_blocks_are_those_of_the_arithmetic() {
    let Some(mut gpu) = gpu() else { return };
    let mut random = Random(12);
    let mut x = random.numbers(7 * 32, 5.0);
    x[32..64].fill(0.0);
    x[64..96].iter_mut().for_each(|x| *x *= 1e-32);
    (x[96], x[97]) = (-7.0, 7.0);
    let (q, d, s) = same_under_all_schedules(&mut gpu, |gpu| quantised(gpu, &x));
    for (b, block) in x.chunks(32).enumerate() {
        // docs/ARITHMETIC.md, `linear`, step by step in f32.
        let largest = block.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        let zero = largest < 1e-30;
        let expected_d = if zero { 0.0 } else { largest / 127.0 };
        let number = |x: &f32| {
            let q = if zero { 0.0 } else { (x * (127.0 / largest)).round_ties_even() };
            q.clamp(-127.0, 127.0) as i8
        };
        let expected: Vec<i8> = block.iter().map(number).collect();
        assert_eq!(&q[b * 32..][..32], &expected[..], "block {b}");
        let sum: i32 = expected.iter().map(|q| i32::from(*q)).sum();
        assert_eq!((d[b], s[b]), (expected_d, expected_d * sum as f32), "block {b}");
    }
}
