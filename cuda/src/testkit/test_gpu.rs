//! The bed of kernel tests: the emulator, or a GPU, chosen when they start.
//!
//! One type for both, so that a test's body is written once and runs wherever there is a GPU.

use std::io::Write as _;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::driver::{Cuda, CudaMemory, Options};
use crate::gpu::{Gpu, GpuError, HostMap, Launch, Memory, Number, Reach};
use crate::kernel::Kernel;
use crate::testkit::emulator::{Build, Counts, Emulator, EmulatorError, EmulatorMemory, Schedule};

/// Environment variable with the number of the GPU that tests run on. Without it, the emulator.
pub const GPU: &str = "HAT_TEST_GPU";
/// In the environment: `ptx` for PTX through the compiler of that GPU's driver, also where there is
/// machine code for the GPU.
const FORM: &str = "HAT_CUDA_FORM";

/// Result of a build with the C++ compiler; `None`, and a line on standard error that `what` was
/// not tried, where there is no compiler and `HAT_NO_EMULATOR` was set when this was built.
///
/// # Panics
/// If there is none and it was not set, and at every other error.
#[track_caller]
pub fn compiled<T>(result: Result<T, EmulatorError>, what: &str) -> Option<T> {
    match result {
        Ok(compiled) => Some(compiled),
        Err(error @ EmulatorError::NoCompiler) if cfg!(no_emulator) => {
            // Not `eprintln`, which a passing test keeps to itself.
            let _ = writeln!(std::io::stderr(), "{error}: {what} not tried");
            None
        }
        Err(error @ EmulatorError::NoCompiler) => {
            panic!(
                "{error}: install one, or build with HAT_NO_EMULATOR=1 to leave out what needs it"
            )
        }
        Err(error) => panic!("{error}"),
    }
}

/// A GPU or the emulator, and the count of what it was asked for.
pub struct TestGpu {
    /// The one or the other.
    pub kind: Kind,
    tally: Arc<Tally>,
}

/// Machine that a test runs on.
pub enum Kind {
    /// The kernels as host C++.
    Emulator(Emulator),
    /// A GPU behind a driver.
    Cuda(Box<Cuda>),
}

/// Downloads and launches so far, the same for both kinds.
#[derive(Debug)]
pub struct Tally {
    downloads: AtomicU64,
    downloaded_bytes: AtomicU64,
    /// By the number of the kernel.
    launches: Vec<AtomicU64>,
}

impl Tally {
    fn new() -> Self {
        let launches = Kernel::ALL.iter().map(|_| AtomicU64::new(0)).collect();
        Self { downloads: AtomicU64::new(0), downloaded_bytes: AtomicU64::new(0), launches }
    }

    /// Copies to the host, for each of which the stream is waited for, and their bytes.
    pub fn downloads(&self) -> (u64, u64) {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        (read(&self.downloads), read(&self.downloaded_bytes))
    }

    /// Launches of one kernel.
    pub fn launches(&self, kernel: Kernel) -> u64 {
        self.launches[kernel as usize].load(Ordering::Relaxed)
    }
}

/// Its memory.
pub enum TestMemory {
    /// Memory of the emulator.
    Emulator(EmulatorMemory),
    /// Memory of a GPU.
    Cuda(CudaMemory),
}

/// A call of the one or the other.
macro_rules! either {
    ($kind:expr, $Type:ident::$gpu:ident => $call:expr) => {
        match $kind {
            $Type::Emulator($gpu) => $call,
            $Type::Cuda($gpu) => $call,
        }
    };
    ($kind:expr, $gpu:ident, $($memory:ident),+ => $call:expr) => {
        match ($kind, $($memory),+) {
            (Kind::Emulator($gpu), $(TestMemory::Emulator($memory)),+) => $call,
            (Kind::Cuda($gpu), $(TestMemory::Cuda($memory)),+) => $call,
            _ => panic!("memory of another GPU"),
        }
    };
}

impl Memory for TestMemory {
    fn address(&self) -> u64 {
        either!(self, TestMemory::memory => memory.address())
    }

    fn bytes(&self) -> usize {
        either!(self, TestMemory::memory => memory.bytes())
    }
}

impl TestGpu {
    /// One of which nothing was asked.
    #[must_use]
    pub fn new(kind: Kind) -> Self {
        Self { kind, tally: Arc::new(Tally::new()) }
    }

    /// The GPU that `HAT_TEST_GPU` names, with its code in the form that `HAT_CUDA_FORM` names; or
    /// else the emulator; nothing where that can't be built.
    ///
    /// # Panics
    /// If there is no such GPU or form, and as [`compiled`].
    #[track_caller]
    pub fn from_environment(build: &Build) -> Option<Self> {
        let Some(ordinal) = std::env::var_os(GPU) else {
            let emulator = compiled(Emulator::new(build), "kernels")?;
            return Some(Self::new(Kind::Emulator(emulator)));
        };
        let ordinal = ordinal.to_str().and_then(|text| text.parse().ok());
        let ordinal = ordinal.unwrap_or_else(|| panic!("{GPU} is no number"));
        let ptx = match std::env::var(FORM).as_deref() {
            Ok("ptx") => true,
            Err(std::env::VarError::NotPresent) => false,
            other => panic!("{FORM}: {other:?}; only ptx is known"),
        };
        let cuda = Cuda::open_with(ordinal, Options { ptx, ..Options::default() });
        let cuda = cuda.unwrap_or_else(|error| panic!("{GPU}={ordinal}: {error}"));
        Some(Self::new(Kind::Cuda(Box::new(cuda))))
    }

    /// The count of what it is asked for, whoever owns it by then.
    #[must_use]
    pub fn tally(&self) -> Arc<Tally> {
        Arc::clone(&self.tally)
    }

    /// Copies weights from now on, also where a GPU could read them in place.
    pub fn copy_weights(&mut self) {
        if let Kind::Cuda(cuda) = &mut self.kind {
            cuda.copy_weights();
        }
    }

    /// The order of threads from now on, where there is a choice.
    pub fn set_schedule(&mut self, schedule: Schedule) {
        if let Kind::Emulator(emulator) = &mut self.kind {
            emulator.set_schedule(schedule);
        }
    }

    /// The emulator's counts.
    pub fn counts(&self) -> Option<Counts> {
        match &self.kind {
            Kind::Emulator(emulator) => Some(emulator.counts()),
            Kind::Cuda(_) => None,
        }
    }
}

impl Gpu for TestGpu {
    type Memory = TestMemory;

    fn describe(&self) -> String {
        either!(&self.kind, Kind::gpu => gpu.describe())
    }

    fn alloc(&mut self, bytes: usize, purpose: &'static str) -> Result<TestMemory, GpuError> {
        match &mut self.kind {
            Kind::Emulator(emulator) => emulator.alloc(bytes, purpose).map(TestMemory::Emulator),
            Kind::Cuda(cuda) => {
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
        either!(&mut self.kind, gpu, to => gpu.upload(from, to, at))
    }

    fn download<T: Number>(
        &mut self,
        from: &TestMemory,
        at: usize,
        to: &mut [T],
    ) -> Result<(), GpuError> {
        self.tally.downloads.fetch_add(1, Ordering::Relaxed);
        self.tally.downloaded_bytes.fetch_add(size_of_val(to) as u64, Ordering::Relaxed);
        either!(&mut self.kind, gpu, from => gpu.download(from, at, to))
    }

    unsafe fn launch<P: Copy>(&mut self, launch: Launch, params: &P) -> Result<(), GpuError> {
        self.tally.launches[launch.kernel as usize].fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise, handed on.
        either!(&mut self.kind, Kind::gpu => unsafe { gpu.launch(launch, params) })
    }

    fn reach(&mut self, other: &Self) -> Result<Reach, GpuError> {
        match (&mut self.kind, &other.kind) {
            (Kind::Emulator(emulator), Kind::Emulator(other)) => emulator.reach(other),
            (Kind::Cuda(cuda), Kind::Cuda(other)) => cuda.reach(other),
            _ => panic!("a GPU of another kind"),
        }
    }

    fn copy(
        &mut self,
        bytes: usize,
        from: &TestMemory,
        to: &mut TestMemory,
    ) -> Result<(), GpuError> {
        either!(&mut self.kind, gpu, from, to => gpu.copy(bytes, from, to))
    }

    fn fetch(
        &mut self,
        bytes: usize,
        from: &TestMemory,
        to: &mut TestMemory,
    ) -> Result<(), GpuError> {
        either!(&mut self.kind, gpu, from, to => gpu.fetch(bytes, from, to))
    }

    fn finish(&mut self) -> Result<(), GpuError> {
        either!(&mut self.kind, Kind::gpu => gpu.finish())
    }

    fn in_place(&mut self, map: &HostMap, range: Range<usize>) -> Option<TestMemory> {
        match &mut self.kind {
            Kind::Emulator(emulator) => emulator.in_place(map, range).map(TestMemory::Emulator),
            Kind::Cuda(cuda) => cuda.in_place(map, range).map(TestMemory::Cuda),
        }
    }
}
