//! Products of block types on CUDA, emulated, against the CPU: arithmetic id 1 to the bit, for few
//! rows and for many.
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
