//! gemv.

use hat_cuda::gemv::{Gemv, Write, gemv};
use hat_cuda::gpu::Memory as _;
use hat_cuda::quantise_rows::{Q8, Q8Mut, quantise_q8};
use hat_cuda::table::{Numbers, Table};
use hat_cuda::test_gpu::TestGpu;

use crate::panels::Matrix;
use crate::stand::{
    Random, assert_close, bits, gpu, memory, numbers, room, same_under_all_schedules,
};

/// `x` and what its blocks say.
fn run(
    gpu: &mut TestGpu,
    x: &[f32],
    matrix: &Matrix,
    bias: Option<&[f32]>,
    old: Option<&[f32]>,
) -> (Vec<f32>, Vec<f64>) {
    let rows = x.len() / matrix.columns;
    let from = memory(gpu, x);
    let (mut q, mut d) = (room::<i8>(gpu, x.len()), room::<f32>(gpu, x.len() / 32));
    let mut s = room::<f32>(gpu, x.len() / 32);
    let to = Q8Mut { q: q.slice_mut(), d: d.slice_mut(), s: s.slice_mut() };
    quantise_q8(gpu, from.slice(), to).unwrap();
    let weight = memory(gpu, &matrix.bytes);
    let bias_memory = bias.map(|bias| memory(gpu, bias));
    let numbers_out = rows * matrix.rows;
    let mut out = match old {
        Some(old) => memory(gpu, old),
        None => room::<f32>(gpu, numbers_out),
    };
    let to = Gemv {
        x: Q8 { q: q.slice(), d: d.slice(), s: s.slice() },
        weight: Table::new(weight.slice(), matrix.numbers, matrix.rows, matrix.columns),
        bias: bias_memory.as_ref().map(|bias| bias.slice()),
        write: if old.is_some() { Write::Add } else { Write::Store },
        out: out.slice_mut(),
    };
    gemv(gpu, rows, to).unwrap();
    let q: Vec<i8> = numbers(gpu, &q, x.len());
    let d: Vec<f32> = numbers(gpu, &d, x.len() / 32);
    let dequantised = q.iter().enumerate().map(|(i, q)| f64::from(*q) * f64::from(d[i / 32]));
    let dequantised: Vec<f64> = dequantised.collect();
    (numbers(gpu, &out, numbers_out), dequantised)
}

fn expected(x: &[f64], matrix: &Matrix, bias: Option<&[f32]>, old: Option<&[f32]>) -> Vec<f64> {
    let mut out = Vec::new();
    for x in x.chunks(matrix.columns) {
        for row in 0..matrix.rows {
            let sum: f64 = x.iter().zip(matrix.row(row)).map(|(x, w)| x * w).sum();
            let bias = bias.map_or(0.0, |bias| f64::from(bias[row]));
            out.push(sum + bias + old.map_or(0.0, |old| f64::from(old[out.len()])));
        }
    }
    out
}

#[test]
fn gemv_means_what_it_says() {
    let Some(mut gpu) = gpu() else { return };
    let mut random = Random(20);
    for kind in [Numbers::Q8_0, Numbers::Q4_0, Numbers::Q4_1] {
        for (rows, outputs, columns) in [(1, 16, 32), (1, 40, 576), (3, 33, 544), (9, 48, 1536)] {
            let matrix = Matrix::random(kind, outputs, columns, &mut random);
            let x = random.numbers(rows * columns, 2.0);
            let (out, meant) = same_under_all_schedules(&mut gpu, |gpu| {
                let (out, meant) = run(gpu, &x, &matrix, None, None);
                (bits(&out), meant)
            });
            let out: Vec<f32> = out.into_iter().map(f32::from_bits).collect();
            let what = format!("gemv {kind:?} [{rows}] [{outputs}, {columns}]");
            assert_close(&what, &out, &expected(&meant, &matrix, None, None), 2e-5, 2e-6);
        }
    }
}

#[test]
fn gemv_adds_its_bias_and_its_result() {
    let Some(mut gpu) = gpu() else { return };
    let mut random = Random(21);
    let matrix = Matrix::random(Numbers::Q4_1, 40, 96, &mut random);
    let (x, bias) = (random.numbers(2 * 96, 2.0), random.numbers(40, 3.0));
    let old = random.numbers(2 * 40, 3.0);
    let (out, meant) = run(&mut gpu, &x, &matrix, Some(&bias), Some(&old));
    let expected = expected(&meant, &matrix, Some(&bias), Some(&old));
    assert_close("gemv with bias and old", &out, &expected, 2e-5, 2e-6);
}

#[test]
fn a_row_does_not_depend_on_how_many_there_are() {
    let Some(mut gpu) = gpu() else { return };
    let mut random = Random(22);
    for kind in [Numbers::Q8_0, Numbers::Q4_0, Numbers::Q4_1] {
        let matrix = Matrix::random(kind, 40, 1056, &mut random);
        let x = random.numbers(11 * 1056, 2.0);
        let (together, _) = run(&mut gpu, &x, &matrix, None, None);
        for (x, together) in x.chunks(1056).zip(together.chunks(40)) {
            let (alone, _) = run(&mut gpu, x, &matrix, None, None);
            assert_eq!(bits(&alone), bits(together), "{kind:?}");
        }
    }
}
