//! rms_norm.

use hat_cuda::gpu::Memory as _;
use hat_cuda::rms_norm::{RmsNorm, rms_norm};
use hat_cuda::testkit::test_gpu::TestGpu;

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

fn run(gpu: &mut TestGpu, x: &[f32], weight: &[f32]) -> Vec<f32> {
    let rows = x.len() / weight.len();
    let (x_memory, weight_memory) = (memory(gpu, x), memory(gpu, weight));
    let mut out = room::<f32>(gpu, x.len());
    let to = RmsNorm { weight: weight_memory.slice(), eps: EPS, out: out.slice_mut() };
    rms_norm(gpu, rows, x_memory.slice(), to).unwrap();
    numbers(gpu, &out, x.len())
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn rms_norm_means_what_it_says() {
    let Some(mut gpu) = gpu() else { return };
    let mut random = Random(1);
    for columns in [4, 64, 576, 1020, 4096, 9000] {
        let (x, weight) = (random.numbers(3 * columns, 3.0), random.numbers(columns, 1.0));
        let out = same_under_all_schedules(&mut gpu, |gpu| bits(&run(gpu, &x, &weight)));
        for (row, out) in x.chunks(columns).zip(out.chunks(columns)) {
            assert_eq!(out, bits(&expected(row, &weight)), "{columns} columns");
        }
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn a_row_does_not_depend_on_its_neighbours() {
    let Some(mut gpu) = gpu() else { return };
    let (mut random, columns) = (Random(3), 576);
    let (x, weight) = (random.numbers(5 * columns, 3.0), random.numbers(columns, 1.0));
    let together = run(&mut gpu, &x, &weight);
    for (row, together) in x.chunks(columns).zip(together.chunks(columns)) {
        let alone = run(&mut gpu, row, &weight);
        assert_eq!(bits(&alone), bits(together));
    }
}
