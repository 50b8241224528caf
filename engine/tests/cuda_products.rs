//! Products on CUDA, emulated, against the CPU: of block types arithmetic id 1 to the bit, for few rows
//! and for many; of f16 and bf16 matrices as near as activations of 16 bits are.
//!
//! Without a C++ compiler nothing is tried, and standard error says so; with
//! `HAT_REQUIRE_EMULATOR` set that is a failure.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "conformance/cases.rs"]
#[allow(dead_code, reason = "the cases of all operations; here are products")]
mod cases;

use std::io::Write as _;
use std::path::Path;

use cases::{Random, activations, embed, linear, matrix, vector};
use hat_cuda::emulator::{Build, Emulator, EmulatorError};
use hat_engine::backend::cpu::{CpuBackend, CpuConfig, Level};
use hat_engine::backend::cuda::CudaBackend;
use hat_loader::DType;

const BLOCKS: [DType; 4] = [DType::Q8_0, DType::Q4_0, DType::Q4_1, DType::Q6K];

fn backends() -> Option<(CudaBackend<Emulator>, CpuBackend)> {
    let cpu = CpuBackend::new(CpuConfig { threads: 1, level: Level::Portable }).unwrap();
    match Emulator::new(&Build::new(Path::new(env!("CARGO_TARGET_TMPDIR")))) {
        Ok(emulator) => Some((CudaBackend::new(emulator), cpu)),
        Err(error @ EmulatorError::NoCompiler) => {
            assert!(std::env::var_os("HAT_REQUIRE_EMULATOR").is_none(), "{error}");
            let _ = writeln!(std::io::stderr(), "{error}: the CUDA backend was not tried");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

#[test]
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
                let what = dtype.name();
                assert!(bits(&got) == bits(&expected), "{what} [{rows}] [{n}, {k}]");
            }
        }
    }
}

#[test]
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
fn tables_of_blocks_have_the_bits_of_the_cpu() {
    let Some((mut cuda, mut cpu)) = backends() else { return };
    let mut random = Random::new(61);
    let tokens = [0, 1, 15, 16, 38, 38, 7];
    for dtype in BLOCKS {
        let table = matrix(dtype, 39, 512, &mut random);
        let [got, expected] = [embed(&mut cuda, &table, &tokens), embed(&mut cpu, &table, &tokens)];
        assert!(bits(&got) == bits(&expected), "{}", dtype.name());
    }
}
