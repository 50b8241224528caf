//! linear_float and round_rows: products of f16 and bf16 matrices.

use half::{bf16, f16};
use hat_cuda::gpu::Memory as _;
use hat_cuda::product::{Product, Write, linear_float};
use hat_cuda::quantise_rows::round_rows;
use hat_cuda::table::{Table, WeightDType};
use hat_cuda::testkit::test_gpu::TestGpu;

use crate::panels::Matrix;
use crate::stand::{
    Random, assert_close, bits, gpu, memory, numbers, room, same_under_all_schedules,
};

const KINDS: [WeightDType; 2] = [WeightDType::F16, WeightDType::Bf16];

fn rounded(kind: WeightDType, x: f32) -> u16 {
    match kind {
        WeightDType::F16 => f16::from_f32(x).to_bits(),
        _ => bf16::from_f32(x).to_bits(),
    }
}

fn meant(kind: WeightDType, bits: u16) -> f64 {
    match kind {
        WeightDType::F16 => f16::from_bits(bits).to_f64(),
        _ => bf16::from_bits(bits).to_f64(),
    }
}

fn run(
    gpu: &mut TestGpu,
    x: &[f32],
    matrix: &Matrix,
    bias: Option<&[f32]>,
    old: Option<&[f32]>,
) -> Vec<f32> {
    let rows = x.len() / matrix.columns;
    let (from, mut half) = (memory(gpu, x), room::<u16>(gpu, x.len()));
    round_rows(gpu, matrix.numbers, from.slice(), half.slice_mut()).unwrap();
    let weight = memory(gpu, &matrix.bytes);
    let bias = bias.map(|bias| memory(gpu, bias));
    let count = rows * matrix.rows;
    let mut out = match old {
        Some(old) => memory(gpu, old),
        None => room::<f32>(gpu, count),
    };
    let to = Product {
        x: half.slice(),
        weight: Table::new(weight.slice(), matrix.numbers, matrix.rows, matrix.columns),
        bias: bias.as_ref().map(|bias| bias.slice()),
        write: if old.is_some() { Write::Add } else { Write::Store },
        out: out.slice_mut(),
    };
    linear_float(gpu, rows, to).unwrap();
    numbers(gpu, &out, count)
}

fn expected(x: &[f32], matrix: &Matrix, bias: Option<&[f32]>, old: Option<&[f32]>) -> Vec<f64> {
    let mut out = Vec::new();
    for x in x.chunks(matrix.columns) {
        for row in 0..matrix.rows {
            let product =
                |(x, w): (&f32, &f64)| meant(matrix.numbers, rounded(matrix.numbers, *x)) * w;
            let sum: f64 = x.iter().zip(matrix.row(row)).map(product).sum();
            let bias = bias.map_or(0.0, |bias| f64::from(bias[row]));
            out.push(sum + bias + old.map_or(0.0, |old| f64::from(old[out.len()])));
        }
    }
    out
}

/// A matrix of whole numbers.
fn whole(kind: WeightDType, rows: usize, columns: usize, random: &mut Random) -> Matrix {
    let mut number = || f16::from_f32(random.below(17) as f32 - 8.0);
    Matrix::of(kind, rows, columns, |_| (number(), f16::ZERO, [0; 34]))
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn rounding_is_to_the_nearest_and_to_infinity() {
    let Some(mut gpu) = gpu() else { return };
    let mut random = Random(70);
    let mut x = random.numbers(2000, 70_000.0);
    x[..8].copy_from_slice(&[65504.0, 65520.0, -65536.0, 1e-7, -0.0, 6e-8, 3.4e38, f32::INFINITY]);
    for kind in KINDS {
        let (from, mut half) = (memory(&mut gpu, &x), room::<u16>(&mut gpu, x.len()));
        round_rows(&mut gpu, kind, from.slice(), half.slice_mut()).unwrap();
        let expected: Vec<u16> = x.iter().map(|x| rounded(kind, *x)).collect();
        assert_eq!(numbers::<u16>(&mut gpu, &half, x.len()), expected, "{kind:?}");
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn products_of_whole_numbers_are_exact() {
    let Some(mut gpu) = gpu() else { return };
    let mut random = Random(71);
    for kind in KINDS {
        for (rows, outputs, columns) in [(1, 16, 8), (3, 40, 72), (70, 33, 96), (33, 144, 160)] {
            let matrix = whole(kind, outputs, columns, &mut random);
            let x =
                random.numbers(rows * columns, 8.0).iter().map(|x| x.round()).collect::<Vec<_>>();
            let got =
                same_under_all_schedules(&mut gpu, |gpu| bits(&run(gpu, &x, &matrix, None, None)));
            let expected: Vec<f32> =
                expected(&x, &matrix, None, None).iter().map(|x| *x as f32).collect();
            let wrong = got
                .iter()
                .zip(&expected)
                .position(|(got, expected)| f32::from_bits(*got) != *expected);
            assert_eq!(wrong, None, "{kind:?} [{rows}] [{outputs}, {columns}]");
        }
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn products_of_floats_mean_what_they_say() {
    let Some(mut gpu) = gpu() else { return };
    let mut random = Random(72);
    for kind in KINDS {
        let matrix = Matrix::random(kind, 40, 552, &mut random);
        let (x, bias) = (random.numbers(9 * 552, 1.0), random.numbers(40, 3.0));
        let old = random.numbers(9 * 40, 3.0);
        for old in [None, Some(&old[..])] {
            let got = run(&mut gpu, &x, &matrix, Some(&bias), old);
            let expected = expected(&x, &matrix, Some(&bias), old);
            assert_close(&format!("{kind:?}"), &got, &expected, 3e-5, 1e-6);
        }
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn a_row_of_floats_does_not_depend_on_how_many_there_are() {
    let Some(mut gpu) = gpu() else { return };
    let mut random = Random(73);
    for kind in KINDS {
        let matrix = Matrix::random(kind, 40, 256, &mut random);
        let x = random.numbers(70 * 256, 2.0);
        let before = gpu.counts();
        let together = run(&mut gpu, &x, &matrix, None, None);
        if let (Some(before), Some(after)) = (before, gpu.counts()) {
            assert_eq!(before.bank_conflicts, after.bank_conflicts);
            assert!(after.mma > before.mma);
        }
        for row in [0, 17, 33, 69] {
            let alone = run(&mut gpu, &x[row * 256..][..256], &matrix, None, None);
            assert_eq!(bits(&alone), bits(&together[row * 40..][..40]), "{kind:?}, row {row}");
        }
    }
}
