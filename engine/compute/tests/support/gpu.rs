//! The GPU of a test: the one that `HAT_TEST_GPU` names, or the emulator.

use std::path::Path;

use hat_compute::backend::cuda::CudaBackend;
use hat_cuda::testkit::emulator::Build;
use hat_cuda::testkit::test_gpu::TestGpu;

/// Nothing where there is neither.
pub fn gpu() -> Option<TestGpu> {
    TestGpu::from_environment(&Build::new(Path::new(env!("CARGO_TARGET_TMPDIR"))))
}

/// A backend on it.
pub fn backend() -> Option<CudaBackend<TestGpu>> {
    gpu().map(CudaBackend::new)
}
