//! What of the CUDA backend is the CPU's arithmetic to the bit, on the emulator: all but attention.
//!
//! Without a C++ compiler nothing is tried, and standard error says so; with
//! `HAT_REQUIRE_EMULATOR` set that is a failure.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(dead_code, reason = "the cases serve other tests too")]

#[path = "conformance/cases.rs"]
mod cases;

use std::io::Write as _;
use std::path::Path;

use cases::*;
use hat_cuda::emulator::{Build, Emulator, EmulatorError};
use hat_engine::backend::cpu::{CpuBackend, CpuConfig, Level};
use hat_engine::backend::cuda::CudaBackend;
use hat_engine::backend::{AttendShape, Backend as _};

fn both() -> Option<(CudaBackend<Emulator>, CpuBackend)> {
    let cpu = CpuBackend::new(CpuConfig { threads: 1, level: Level::Auto }).unwrap();
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

#[track_caller]
fn same(what: &str, cuda: &[f32], cpu: &[f32]) {
    assert_eq!(cuda.len(), cpu.len(), "{what}");
    for (i, (cuda, cpu)) in cuda.iter().zip(cpu).enumerate() {
        assert_eq!(cuda.to_bits(), cpu.to_bits(), "{what}: number {i}: {cuda:e}, the CPU {cpu:e}");
    }
}

#[test]
fn rows_have_the_bits_of_the_cpu() {
    let Some((mut cuda, mut cpu)) = both() else { return };
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
