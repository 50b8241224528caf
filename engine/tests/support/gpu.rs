//! The GPU of a test: the one that `HAT_TEST_GPU` names, or the emulator.

use std::path::Path;

use hat_cuda::emulator::{Build, Emulator};
use hat_cuda::test_gpu::{TestGpu, compiled};
use hat_engine::backend::cuda::CudaBackend;

fn build() -> Build {
    Build::new(Path::new(env!("CARGO_TARGET_TMPDIR")))
}

/// A backend on it; nothing where there is neither.
pub fn backend() -> Option<CudaBackend<TestGpu>> {
    TestGpu::from_environment(&build()).map(CudaBackend::new)
}

/// The emulator; nothing where no compiler is.
pub fn emulator() -> Option<Emulator> {
    compiled(Emulator::new(&build()), "the CUDA backend")
}
