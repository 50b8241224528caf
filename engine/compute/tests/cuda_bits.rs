//! Tests that parts of the CUDA backend have the bits of the CPU's arithmetic 1, on the emulator or
//! on the GPU that `HAT_TEST_GPU` names: all but attention and products of float matrices. These
//! are as near as activations of 16 bits are.
//!
//! Without a C++ compiler these tests fail, unless `HAT_NO_EMULATOR` was set when they were built:
//! then they count as ignored.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "conformance/cases.rs"]
#[allow(dead_code, reason = "the cases serve other tests too")]
mod cases;
#[path = "support/gpu.rs"]
mod gpu;

use cases::*;
use gpu::{backend, gpu};
use hat_compute::backend::cpu::{CpuBackend, CpuConfig, Level};
use hat_compute::backend::cuda::CudaBackend;
use hat_compute::backend::{AttendArgs, Backend as _};
use hat_cuda::kernel::Kernel;
use hat_cuda::testkit::test_gpu::TestGpu;
use hat_loader::DType;
use hat_plan::{AttendShape, Computes as _, KvShape};

const BLOCKS: [DType; 4] = [DType::Q8_0, DType::Q4_0, DType::Q4_1, DType::Q6K];

fn backends() -> Option<(CudaBackend<TestGpu>, CpuBackend)> {
    let cpu = CpuBackend::new(CpuConfig { threads: 1, level: Level::Portable }).unwrap();
    Some((backend()?, cpu))
}

#[track_caller]
fn same(what: &str, cuda: &[f32], cpu: &[f32]) {
    assert_eq!(cuda.len(), cpu.len(), "{what}");
    for (i, (cuda, cpu)) in cuda.iter().zip(cpu).enumerate() {
        assert_eq!(cuda.to_bits(), cpu.to_bits(), "{what}: number {i}: {cuda:e}, the CPU {cpu:e}");
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn products_of_blocks_have_the_bits_of_the_cpu() {
    let Some((mut cuda, mut cpu)) = backends() else { return };
    let mut random = Random::new(60);
    for dtype in BLOCKS {
        for (rows, n, k) in [(1, 40, 256), (8, 33, 512), (13, 16, 256), (24, 150, 256)] {
            let weight = matrix(dtype, n, k, &mut random);
            let bias = vector(&random.numbers(n));
            let (x, old) = (activations(rows, k, &mut random), random.numbers(rows * n));
            for (bias, old) in [(None, None), (Some(&bias), Some(&old[..]))] {
                let got = linear(&mut cuda, &weight, bias, &x, old);
                let expected = linear(&mut cpu, &weight, bias, &x, old);
                same(&format!("{} [{rows}] [{n}, {k}]", dtype.name()), &got, &expected);
            }
        }
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn products_of_floats_are_as_near_as_their_activations() {
    let Some((mut cuda, mut cpu)) = backends() else { return };
    let mut random = Random::new(62);
    for (dtype, step) in [(DType::F16, 2f64.powi(-11)), (DType::Bf16, 2f64.powi(-8))] {
        for (rows, n, k) in [(1, 40, 200), (24, 33, 512)] {
            let weight = matrix(dtype, n, k, &mut random);
            let mut ones = vec![0.0; n * k];
            let x = random.numbers(rows * k);
            let got = linear(&mut cuda, &weight, None, &x, None);
            let expected = linear(&mut cpu, &weight, None, &x, None);
            // What each weight may add: its row of the identity.
            for (i, column) in ones.chunks_mut(n).enumerate() {
                let one: Vec<f32> = (0..k).map(|j| f32::from(u8::from(i == j))).collect();
                column.copy_from_slice(&linear(&mut cpu, &weight, None, &one, None));
            }
            for (at, (got, expected)) in got.iter().zip(expected).enumerate() {
                let (row, output) = (at / n, at % n);
                let size: f64 = (0..k)
                    .map(|i| f64::from(x[row * k + i]) * f64::from(ones[i * n + output]))
                    .map(|product| product * product)
                    .sum();
                // Roundings are independent: five deviations of their sum.
                let bound = 5.0 * step * size.sqrt() + 1e-6;
                let far = f64::from(got - expected).abs();
                assert!(far <= bound, "{} {row}, {output}: {far} of {bound}", dtype.name());
            }
        }
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn a_row_that_f16_does_not_hold_is_no_number() {
    let Some((mut cuda, _)) = backends() else { return };
    let weight = matrix(DType::F16, 16, 64, &mut Random::new(63));
    let mut x = vec![1.0; 3 * 64];
    x[64 + 7] = 70_000.0;
    let got = linear(&mut cuda, &weight, None, &x, None);
    let finite: Vec<bool> = got.chunks(16).map(|row| row.iter().all(|x| x.is_finite())).collect();
    assert_eq!(finite, [true, false, true]);
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn tables_of_blocks_have_the_bits_of_the_cpu() {
    let Some((mut cuda, mut cpu)) = backends() else { return };
    let mut random = Random::new(61);
    let tokens = [0, 1, 15, 16, 38, 38, 7];
    for dtype in BLOCKS {
        let table = matrix(dtype, 39, 512, &mut random);
        let [got, expected] = [embed(&mut cuda, &table, &tokens), embed(&mut cpu, &table, &tokens)];
        same(dtype.name(), &got, &expected);
    }
}

/// Several products of one input have the bits of each alone, and the input is quantised once for
/// all that take it so.
#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn several_products_quantise_their_input_once() {
    let Some((_, mut cpu)) = backends() else { return };
    let mut random = Random::new(64);
    for (dtypes, prepared) in
        [([DType::Q4_1, DType::Q4_1, DType::Q8_0], 1), ([DType::Q4_0, DType::F16, DType::Q6K], 2)]
    {
        let gpu = gpu().unwrap();
        let tally = gpu.tally();
        let quantised = || tally.launches(Kernel::QuantiseQ8);
        let mut cuda = CudaBackend::new(gpu);
        let weights = dtypes.map(|dtype| matrix(dtype, 40, 256, &mut random));
        let x = activations(5, 256, &mut random);
        let together = linear_each(&mut cuda, weights.each_ref(), &x);
        assert_eq!(quantised(), prepared, "{dtypes:?}");
        for ((weight, dtype), together) in weights.iter().zip(dtypes).zip(&together) {
            if dtype != DType::F16 {
                same(dtype.name(), together, &linear(&mut cpu, weight, None, &x, None));
            }
        }
        let [gate, _, up] = &weights;
        let gated = swiglu(&mut cuda, gate, up, &x);
        assert_eq!(quantised(), prepared + 1, "{dtypes:?}");
        same("swiglu", &gated, &swiglu(&mut cpu, gate, up, &x));
        let top = linear_top(&mut cuda, up, &x, 7);
        assert!(top.is_some() && top == linear_top(&mut cpu, up, &x, 7), "{dtypes:?}");
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn rows_have_the_bits_of_the_cpu() {
    let Some((mut cuda, mut cpu)) = backends() else { return };
    let mut random = Random::new(31);
    for (rows, columns) in [(1, 4), (2, 64), (5, 1020), (9, 576), (2, 8196)] {
        let x = activations(rows, columns, &mut random);
        let weight = random.numbers(columns);
        let what = format!("rms_norm {rows} x {columns}");
        let expected = rms_norm(&mut cpu, &x, &weight, 1e-5);
        same(&what, &rms_norm(&mut cuda, &x, &weight, 1e-5), &expected);
    }
    let positions: Vec<u32> = (0..700).map(|i| i * 1499).collect();
    let inv_freq = inv_freq(128);
    let expected = rope_angles(&mut cpu, &positions, &inv_freq);
    same("rope_angles", &rope_angles(&mut cuda, &positions, &inv_freq), &expected);
    let shape = AttendShape { heads: 6, kv_heads: 2, head_dim: 64, window: None };
    let plan = Plan::new().straight(0..31, &[0]);
    let q = activations(31, 6 * 64, &mut random);
    let expected = Attention::rotated(&mut cpu, shape, &plan, &q);
    same("rope_append", &Attention::rotated(&mut cuda, shape, &plan, &q), &expected);
    // One key has the weight 1: what comes out is v as it is stored.
    let (q, k, v) = qkv(&[7], &shape);
    let plan = Plan::new().straight(0..1, &[5]);
    let expected = Attention::new(&mut cpu, shape, 6).step(&mut cpu, &plan, &q, &k, &v);
    let stored = Attention::new(&mut cuda, shape, 6).step(&mut cuda, &plan, &q, &k, &v);
    same("v in its page", &stored, &expected);
    assert!(cuda.fault().is_none());
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
#[should_panic(expected = "the plan that was begun last")]
fn a_plan_that_another_has_replaced_is_refused() {
    let mut cuda = backend().unwrap();
    let shape = AttendShape { heads: 2, kv_heads: 1, head_dim: 64, window: None };
    let kv = cuda.kv(KvShape { layers: 1, pages: 1, kv_heads: 1, head_dim: 64 }).unwrap();
    let (q, mut out) = (cuda.alloc(1, 128).unwrap(), cuda.alloc(1, 128).unwrap());
    let plan = Plan::new().straight(0..1, &[0]);
    let [replaced, last] = [(); 2].map(|()| cuda.begin(plan.borrow(), &shape, &kv));
    cuda.attend(last, AttendArgs { layer: 0, q: &q, kv: &kv, out: &mut out });
    cuda.attend(replaced, AttendArgs { layer: 0, q: &q, kv: &kv, out: &mut out });
}
