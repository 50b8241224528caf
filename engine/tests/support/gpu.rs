//! The GPU of a test: the one that `HAT_TEST_GPU` names, or the emulator.

use std::io::Write as _;
use std::path::Path;

use hat_cuda::driver::Cuda;
use hat_cuda::emulator::{Build, Emulator, EmulatorError};
use hat_cuda::test_gpu::TestGpu;
use hat_engine::backend::cuda::CudaBackend;

/// In the environment: the number of the GPU that the tests run on. Without it, the emulator.
const GPU: &str = "HAT_TEST_GPU";

/// A backend on it; nothing where there is neither.
pub fn backend() -> Option<CudaBackend<TestGpu>> {
    if let Some(ordinal) = std::env::var_os(GPU) {
        let ordinal = ordinal.to_str().and_then(|text| text.parse().ok());
        let cuda = Cuda::open(ordinal.expect("HAT_TEST_GPU is a number")).unwrap();
        return Some(CudaBackend::new(TestGpu::Cuda(Box::new(cuda))));
    }
    emulator().map(|emulator| CudaBackend::new(TestGpu::Emulator(emulator)))
}

/// The emulator; nothing, and a word about it, where no compiler is.
pub fn emulator() -> Option<Emulator> {
    match Emulator::new(&Build::new(Path::new(env!("CARGO_TARGET_TMPDIR")))) {
        Ok(emulator) => Some(emulator),
        Err(error @ EmulatorError::NoCompiler) => {
            assert!(std::env::var_os("HAT_REQUIRE_EMULATOR").is_none(), "{error}");
            let _ = writeln!(std::io::stderr(), "{error}: the CUDA backend was not tried");
            None
        }
        Err(error) => panic!("{error}"),
    }
}
