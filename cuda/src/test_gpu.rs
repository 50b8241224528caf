//! What tests run on: the emulator, or a GPU, chosen when they start.
//!
//! One type for both, so that a test's body is written once and runs wherever there is a GPU.

use std::io::Write as _;
use std::ops::Range;

use crate::driver::{Cuda, CudaMemory};
use crate::emulator::{Build, Counts, Emulator, EmulatorError, EmulatorMemory, Schedule};
use crate::gpu::{Gpu, GpuError, HostMap, Launch, Memory, Number, Reach};

/// In the environment: the number of the GPU that tests run on. Without it, the emulator.
pub const GPU: &str = "HAT_TEST_GPU";
/// In the environment when tests are built and run: those that need the emulator are ignored, and
/// what is left passes without a C++ compiler.
const LEFT_OUT: &str = "HAT_NO_EMULATOR";

/// What was made with the C++ compiler; nothing, and a line on standard error that `what` was not
/// tried, where there is none.
///
/// # Panics
/// If there is none and `HAT_NO_EMULATOR` is not set, and at every other error.
#[track_caller]
pub fn compiled<T>(result: Result<T, EmulatorError>, what: &str) -> Option<T> {
    match result {
        Ok(compiled) => Some(compiled),
        Err(error @ EmulatorError::NoCompiler) => {
            assert!(
                std::env::var_os(LEFT_OUT).is_some(),
                "{error}: install one, or set {LEFT_OUT}=1 to leave out what needs it"
            );
            // Not `eprintln`, which a passing test keeps to itself.
            let _ = writeln!(std::io::stderr(), "{error}: {what} not tried");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// What a test runs on.
pub enum TestGpu {
    /// The kernels as host C++.
    Emulator(Emulator),
    /// A GPU behind a driver.
    Cuda(Box<Cuda>),
}

/// Its memory.
pub enum TestMemory {
    /// Of the emulator.
    Emulator(EmulatorMemory),
    /// Of a GPU.
    Cuda(CudaMemory),
}

impl Memory for TestMemory {
    fn address(&self) -> u64 {
        match self {
            Self::Emulator(memory) => memory.address(),
            Self::Cuda(memory) => memory.address(),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Emulator(memory) => memory.bytes(),
            Self::Cuda(memory) => memory.bytes(),
        }
    }
}

impl TestGpu {
    /// The GPU that `HAT_TEST_GPU` names, or else the emulator; nothing where that can't be built.
    ///
    /// # Panics
    /// If there is no such GPU, and as [`compiled`].
    #[track_caller]
    pub fn from_environment(build: &Build) -> Option<Self> {
        let Some(ordinal) = std::env::var_os(GPU) else {
            return compiled(Emulator::new(build), "kernels").map(Self::Emulator);
        };
        let ordinal = ordinal.to_str().and_then(|text| text.parse().ok());
        let ordinal = ordinal.unwrap_or_else(|| panic!("{GPU} is no number"));
        let cuda = Cuda::open(ordinal).unwrap_or_else(|error| panic!("{GPU}={ordinal}: {error}"));
        Some(Self::Cuda(Box::new(cuda)))
    }

    /// The order of threads from now on, where there is a choice.
    pub fn set_schedule(&mut self, schedule: Schedule) {
        if let Self::Emulator(emulator) = self {
            emulator.set_schedule(schedule);
        }
    }

    /// What the emulator has counted.
    pub fn counts(&self) -> Option<Counts> {
        match self {
            Self::Emulator(emulator) => Some(emulator.counts()),
            Self::Cuda(_) => None,
        }
    }
}

impl Gpu for TestGpu {
    type Memory = TestMemory;

    fn describe(&self) -> String {
        match self {
            Self::Emulator(emulator) => emulator.describe(),
            Self::Cuda(cuda) => cuda.describe(),
        }
    }

    fn alloc(&mut self, bytes: usize, purpose: &'static str) -> Result<TestMemory, GpuError> {
        match self {
            Self::Emulator(emulator) => emulator.alloc(bytes, purpose).map(TestMemory::Emulator),
            Self::Cuda(cuda) => {
                let mut memory = cuda.alloc(bytes, purpose)?;
                // As the emulator does it: what nobody writes is NaN.
                cuda.upload(&vec![0xffu8; bytes], &mut memory, 0)?;
                Ok(TestMemory::Cuda(memory))
            }
        }
    }

    fn upload<T: Number>(
        &mut self,
        from: &[T],
        to: &mut TestMemory,
        at: usize,
    ) -> Result<(), GpuError> {
        match (self, to) {
            (Self::Emulator(emulator), TestMemory::Emulator(to)) => emulator.upload(from, to, at),
            (Self::Cuda(cuda), TestMemory::Cuda(to)) => cuda.upload(from, to, at),
            _ => panic!("memory of another GPU"),
        }
    }

    fn download<T: Number>(
        &mut self,
        from: &TestMemory,
        at: usize,
        to: &mut [T],
    ) -> Result<(), GpuError> {
        match (self, from) {
            (Self::Emulator(emulator), TestMemory::Emulator(from)) => {
                emulator.download(from, at, to)
            }
            (Self::Cuda(cuda), TestMemory::Cuda(from)) => cuda.download(from, at, to),
            _ => panic!("memory of another GPU"),
        }
    }

    unsafe fn launch<P: Copy>(&mut self, launch: Launch, params: &P) -> Result<(), GpuError> {
        match self {
            // SAFETY: the caller's promise, handed on.
            Self::Emulator(emulator) => unsafe { emulator.launch(launch, params) },
            // SAFETY: as above.
            Self::Cuda(cuda) => unsafe { cuda.launch(launch, params) },
        }
    }

    fn reach(&mut self, other: &Self) -> Result<Reach, GpuError> {
        match (self, other) {
            (Self::Emulator(emulator), Self::Emulator(other)) => emulator.reach(other),
            (Self::Cuda(cuda), Self::Cuda(other)) => cuda.reach(other),
            _ => panic!("a GPU of another kind"),
        }
    }

    fn copy(
        &mut self,
        bytes: usize,
        from: &TestMemory,
        to: &mut TestMemory,
    ) -> Result<(), GpuError> {
        use TestMemory as M;
        match (self, from, to) {
            (Self::Emulator(emulator), M::Emulator(from), M::Emulator(to)) => {
                emulator.copy(bytes, from, to)
            }
            (Self::Cuda(cuda), M::Cuda(from), M::Cuda(to)) => cuda.copy(bytes, from, to),
            _ => panic!("memory of another GPU"),
        }
    }

    fn fetch(
        &mut self,
        bytes: usize,
        from: &TestMemory,
        to: &mut TestMemory,
    ) -> Result<(), GpuError> {
        use TestMemory as M;
        match (self, from, to) {
            (Self::Emulator(emulator), M::Emulator(from), M::Emulator(to)) => {
                emulator.fetch(bytes, from, to)
            }
            (Self::Cuda(cuda), M::Cuda(from), M::Cuda(to)) => cuda.fetch(bytes, from, to),
            _ => panic!("memory of another kind of GPU"),
        }
    }

    fn finish(&mut self) -> Result<(), GpuError> {
        match self {
            Self::Emulator(emulator) => emulator.finish(),
            Self::Cuda(cuda) => cuda.finish(),
        }
    }

    fn in_place(&mut self, map: &HostMap, range: Range<usize>) -> Option<TestMemory> {
        match self {
            Self::Emulator(emulator) => emulator.in_place(map, range).map(TestMemory::Emulator),
            Self::Cuda(cuda) => cuda.in_place(map, range).map(TestMemory::Cuda),
        }
    }
}
