//! gemv and linear, which have to give the bits of docs/ARITHMETIC.md.

use half::f16;
use hat_cuda::gpu::Memory as _;
use hat_cuda::product::{Product, Write, gemv, linear, tiled};
use hat_cuda::quantise_rows::{Q8, Q8Mut, quantise_q8};
use hat_cuda::table::{Table, WeightDType};
use hat_cuda::testkit::test_gpu::TestGpu;

use crate::panels::Matrix;
use crate::stand::{Random, bits, counts, gpu, memory, numbers, room, same_under_all_schedules};

const KINDS: [WeightDType; 4] =
    [WeightDType::Q8_0, WeightDType::Q4_0, WeightDType::Q4_1, WeightDType::Q6K];

/// Launcher that multiplies.
#[derive(Clone, Copy, Debug)]
enum By {
    Gemv,
    Tiles,
    Rows,
}

/// Rows as int8 blocks, as docs/ARITHMETIC.md says.
struct Blocks {
    q: Vec<i8>,
    d: Vec<f32>,
    s: Vec<f32>,
}

fn blocks(x: &[f32]) -> Blocks {
    let mut to = Blocks { q: Vec::new(), d: Vec::new(), s: Vec::new() };
    for block in x.chunks(32) {
        let largest = block.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        let tiny = largest < 1e-30;
        let d = if tiny { 0.0 } else { largest / 127.0 };
        let scale = if tiny { 0.0 } else { 127.0 / largest };
        let q = block.iter().map(|x| (x * scale).round_ties_even().clamp(-127.0, 127.0) as i8);
        to.q.extend(q);
        let sum: i32 = to.q[to.q.len() - 32..].iter().map(|q| i32::from(*q)).sum();
        to.d.push(d);
        to.s.push(d * sum as f32);
    }
    to
}

/// The chain of each output, one block of K after the other.
fn expected(x: &[f32], matrix: &Matrix, bias: Option<&[f32]>, old: Option<&[f32]>) -> Vec<u32> {
    let (units, x) = (matrix.columns / 32, blocks(x));
    let rows = x.d.len() / units;
    let mut out = Vec::new();
    for row in 0..rows {
        for output in 0..matrix.rows {
            let mut sum = 0f32;
            for unit in 0..units {
                let at = row * units + unit;
                let (w, q) = (&matrix.units[output * units + unit], &x.q[at * 32..][..32]);
                let part = |half: usize| -> i32 {
                    (half * 16..half * 16 + 16).map(|i| w.w[i] * i32::from(q[i])).sum()
                };
                let whole = w.sub[0] * part(0) + w.sub[1] * part(1);
                sum = (whole as f32).mul_add(w.d * x.d[at], sum);
                if matrix.numbers == WeightDType::Q4_1 {
                    sum = w.m.mul_add(x.s[at], sum);
                }
            }
            sum = bias.map_or(sum, |bias| sum + bias[output]);
            out.push(old.map_or(sum, |old| old[out.len()] + sum).to_bits());
        }
    }
    out
}

fn run(
    gpu: &mut TestGpu,
    by: By,
    x: &[f32],
    matrix: &Matrix,
    bias: Option<&[f32]>,
    old: Option<&[f32]>,
) -> Vec<u32> {
    let rows = x.len() / matrix.columns;
    let from = memory(gpu, x);
    let (mut q, mut d) = (room::<i8>(gpu, x.len()), room::<f32>(gpu, x.len() / 32));
    let mut s = room::<f32>(gpu, x.len() / 32);
    let to = Q8Mut { q: q.slice_mut(), d: d.slice_mut(), s: s.slice_mut() };
    quantise_q8(gpu, from.slice(), to).unwrap();
    let weight = memory(gpu, &matrix.bytes);
    let bias = bias.map(|bias| memory(gpu, bias));
    let count = rows * matrix.rows;
    let mut out = match old {
        Some(old) => memory(gpu, old),
        None => room::<f32>(gpu, count),
    };
    let to = Product {
        x: Q8 { q: q.slice(), d: d.slice(), s: s.slice() },
        weight: Table::new(weight.slice(), matrix.numbers, matrix.rows, matrix.columns),
        bias: bias.as_ref().map(|bias| bias.slice()),
        write: if old.is_some() { Write::Add } else { Write::Store },
        out: out.slice_mut(),
    };
    match by {
        By::Gemv => gemv(gpu, rows, to),
        By::Tiles => tiled(gpu, rows, to),
        By::Rows => linear(gpu, rows, to),
    }
    .unwrap();
    bits(&numbers(gpu, &out, count))
}

/// A product as a backend makes it.
pub fn product(gpu: &mut TestGpu, x: &[f32], matrix: &Matrix) -> Vec<u32> {
    run(gpu, By::Rows, x, matrix, None, None)
}

/// The first output that differs, in words.
#[track_caller]
fn assert_bits(what: &str, got: &[u32], expected: &[u32]) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let wrong = got.iter().zip(expected).position(|(got, expected)| got != expected);
    if let Some(at) = wrong {
        let [got, expected] = [got[at], expected[at]].map(f32::from_bits);
        panic!("{what}: number {at} is {got}, expected {expected}");
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn quantise_gives_the_bits_of_the_arithmetic() {
    let Some(mut gpu) = gpu() else { return };
    let mut random = Random(19);
    let mut x = random.numbers(64 * 32, 3.0);
    // Whole numbers and halves of them, ties among them; a tiny block, one of the smallest
    // magnitude that counts, one of zeros.
    x[..32].iter_mut().zip(0..).for_each(|(x, i)| *x = i as f32 - 15.5);
    x[31] = 127.0;
    x[32..64].fill(9e-31);
    x[64..96].fill(-1e-30);
    x[96..128].fill(-0.0);
    let from = memory(&mut gpu, &x);
    let (mut q, mut d) = (room::<i8>(&mut gpu, x.len()), room::<f32>(&mut gpu, 64));
    let mut s = room::<f32>(&mut gpu, 64);
    let to = Q8Mut { q: q.slice_mut(), d: d.slice_mut(), s: s.slice_mut() };
    quantise_q8(&mut gpu, from.slice(), to).unwrap();
    let expected = blocks(&x);
    assert_eq!(numbers::<i8>(&mut gpu, &q, x.len()), expected.q);
    assert_eq!(bits(&numbers(&mut gpu, &d, 64)), bits(&expected.d));
    assert_eq!(bits(&numbers(&mut gpu, &s, 64)), bits(&expected.s));
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn gemv_and_linear_give_the_bits_of_the_arithmetic() {
    let Some(mut gpu) = gpu() else { return };
    let mut random = Random(20);
    let few = [(1usize, 16usize, 32usize), (3, 40, 544), (9, 33, 288), (19, 17, 96)];
    let many = [(1, 16, 32), (17, 40, 544), (70, 33, 96), (33, 144, 160)];
    for kind in KINDS {
        for (by, shapes) in [(By::Gemv, few), (By::Tiles, many)] {
            for (rows, outputs, columns) in shapes {
                let columns = columns.next_multiple_of(kind.block());
                let matrix = Matrix::random(kind, outputs, columns, &mut random);
                let x = random.numbers(rows * columns, 2.0);
                let got =
                    same_under_all_schedules(&mut gpu, |gpu| run(gpu, by, &x, &matrix, None, None));
                let what = format!("{by:?} {kind:?} [{rows}] [{outputs}, {columns}]");
                assert_bits(&what, &got, &expected(&x, &matrix, None, None));
            }
        }
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn the_largest_sums_are_exact() {
    let Some(mut gpu) = gpu() else { return };
    for kind in KINDS {
        // Rows of the least, the largest and the middle numbers, with the largest scales.
        let matrix = Matrix::of(kind, 24, 256, |row| {
            let mut quants = [[0x00, 0xff, 0x80, 0x7f, 0x08, 0xf7][row % 6]; 34];
            quants[32..].fill([0x80, 0x7f][row / 6 % 2]);
            quants[33] ^= if row < 12 { 0 } else { 0xff };
            (f16::from_f32(0.03), f16::from_f32(-0.7), quants)
        });
        // All one sign, both signs, and one sign for each 16.
        let sign = |i: usize| match i / 256 {
            0 => 1.0,
            1 => -1.0,
            2 => (i % 2) as f32 * 2.0 - 1.0,
            _ => (i / 16 % 2) as f32 * 2.0 - 1.0,
        };
        let x: Vec<f32> = (0..4 * 256).map(|i| sign(i) * 0.37).collect();
        let expected = expected(&x, &matrix, None, None);
        for by in [By::Gemv, By::Tiles] {
            let got = run(&mut gpu, by, &x, &matrix, None, None);
            assert_bits(&format!("{by:?} {kind:?}"), &got, &expected);
        }
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn gemv_and_linear_add_their_bias_and_their_result() {
    let Some(mut gpu) = gpu() else { return };
    let mut random = Random(21);
    let matrix = Matrix::random(WeightDType::Q4_1, 41, 96, &mut random);
    let (x, bias) = (random.numbers(2 * 96, 2.0), random.numbers(41, 3.0));
    let old = random.numbers(2 * 41, 3.0);
    for (bias, old) in [(Some(&bias[..]), Some(&old[..])), (Some(&bias[..]), None)] {
        let expected = expected(&x, &matrix, bias, old);
        for by in [By::Gemv, By::Tiles] {
            let got = run(&mut gpu, by, &x, &matrix, bias, old);
            assert_bits(&format!("{by:?} with bias and old"), &got, &expected);
        }
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn a_row_does_not_depend_on_how_many_there_are() {
    let Some(mut gpu) = gpu() else { return };
    let mut random = Random(22);
    for kind in KINDS {
        let matrix = Matrix::random(kind, 40, 512, &mut random);
        let x = random.numbers(20 * 512, 2.0);
        for rows in [1, 8, 9, 16, 20] {
            let together = run(&mut gpu, By::Rows, &x[..rows * 512], &matrix, None, None);
            let last = &x[(rows - 1) * 512..rows * 512];
            let alone = run(&mut gpu, By::Rows, last, &matrix, None, None);
            assert_bits(&format!("{kind:?}, {rows} rows"), &together[(rows - 1) * 40..], &alone);
        }
    }
}

mod emulated {
    use super::*;

    #[test]
    #[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
    fn loads_of_staged_weights_and_rows_meet_in_no_bank() {
        let Some(mut gpu) = gpu() else { return };
        let mut random = Random(23);
        for kind in KINDS {
            let matrix = Matrix::random(kind, 128, 256, &mut random);
            for (by, rows) in [(By::Gemv, 8), (By::Gemv, 16), (By::Tiles, 64)] {
                let x = random.numbers(rows * 256, 2.0);
                let before = counts(&gpu);
                run(&mut gpu, by, &x, &matrix, None, None);
                let after = counts(&gpu);
                assert!(after.mma > before.mma);
                let conflicts = after.bank_conflicts - before.bank_conflicts;
                assert_eq!(conflicts, 0, "{by:?} {kind:?}, {rows} rows");
            }
        }
    }
}
