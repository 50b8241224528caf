//! rms_norm.

use hat_cuda::gpu::Memory as _;
use hat_cuda::rms_norm::{RmsNorm, add_rms_norm, rms_norm};
use hat_cuda::test_gpu::TestGpu;

use crate::stand::{Random, bits, gpu, memory, numbers, room, same_under_all_schedules};

const EPS: f32 = 1e-5;

/// docs/ARITHMETIC.md, `rms_norm`, step by step in f32.
fn expected(x: &[f32], weight: &[f32]) -> Vec<f32> {
    let mut chains = [0f32; 16];
    for (i, x) in x.iter().enumerate() {
        chains[i % 16] = x.mul_add(*x, chains[i % 16]);
    }
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            chains[i] += chains[i + half];
        }
    }
    let scale = 1.0 / (chains[0] / x.len() as f32 + EPS).sqrt();
    x.iter().zip(weight).map(|(x, weight)| x * scale * weight).collect()
}

/// `out`, and `x` after it.
fn run(gpu: &mut TestGpu, x: &[f32], add: Option<&[f32]>, weight: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let rows = x.len() / weight.len();
    let (mut x_memory, weight_memory) = (memory(gpu, x), memory(gpu, weight));
    let mut out = room::<f32>(gpu, x.len());
    let to = RmsNorm { weight: weight_memory.slice(), eps: EPS, out: out.slice_mut() };
    match add {
        None => rms_norm(gpu, rows, x_memory.slice(), to).unwrap(),
        Some(add) => {
            let add = memory(gpu, add);
            add_rms_norm(gpu, rows, x_memory.slice_mut(), add.slice(), to).unwrap();
        }
    }
    (numbers(gpu, &out, x.len()), numbers(gpu, &x_memory, x.len()))
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn rms_norm_means_what_it_says() {
    let Some(mut gpu) = gpu() else { return };
    let mut random = Random(1);
    for columns in [4, 64, 576, 1020, 4096, 9000] {
        let (x, weight) = (random.numbers(3 * columns, 3.0), random.numbers(columns, 1.0));
        let (out, after) = same_under_all_schedules(&mut gpu, |gpu| {
            let (out, after) = run(gpu, &x, None, &weight);
            (bits(&out), bits(&after))
        });
        assert_eq!(after, bits(&x), "x is only read");
        for (row, out) in x.chunks(columns).zip(out.chunks(columns)) {
            assert_eq!(out, bits(&expected(row, &weight)), "{columns} columns");
        }
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn the_residual_is_added_first_and_kept() {
    let Some(mut gpu) = gpu() else { return };
    let (mut random, columns) = (Random(2), 576);
    let (x, add) = (random.numbers(2 * columns, 2.0), random.numbers(2 * columns, 2.0));
    let weight = random.numbers(columns, 1.0);
    let (out, after) = run(&mut gpu, &x, Some(&add), &weight);
    let sum: Vec<f32> = x.iter().zip(&add).map(|(x, add)| x + add).collect();
    assert_eq!(bits(&after), bits(&sum));
    let (alone, _) = run(&mut gpu, &sum, None, &weight);
    assert_eq!(bits(&out), bits(&alone));
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn a_row_does_not_depend_on_its_neighbours() {
    let Some(mut gpu) = gpu() else { return };
    let (mut random, columns) = (Random(3), 576);
    let (x, weight) = (random.numbers(5 * columns, 3.0), random.numbers(columns, 1.0));
    let (together, _) = run(&mut gpu, &x, None, &weight);
    for (row, together) in x.chunks(columns).zip(together.chunks(columns)) {
        let (alone, _) = run(&mut gpu, row, None, &weight);
        assert_eq!(bits(&alone), bits(together));
    }
}
