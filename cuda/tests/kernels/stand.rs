//! The bed of the kernel tests: a GPU, random numbers, comparison.

use std::path::Path;

use hat_cuda::gpu::{Gpu as _, Number};
use hat_cuda::testkit::emulator::{Build, Counts, Schedule};
use hat_cuda::testkit::test_gpu::{Kind, TestGpu, TestMemory};

/// Environment variable with another folder of kernels for the emulator, for tests of the tests.
pub const KERNELS: &str = "HAT_TEST_KERNELS";

/// Environment variable with the folder into which the emulator writes launches.
pub const RECORD: &str = "HAT_TEST_RECORD";

/// The folder of what is compiled for tests.
pub fn build() -> Build {
    let mut build = Build::new(Path::new(env!("CARGO_TARGET_TMPDIR")));
    if let Some(kernels) = std::env::var_os(KERNELS) {
        build.kernels = kernels.into();
    }
    build
}

/// The GPU that the environment names, or else the emulator; nothing where that can't be built.
pub fn gpu() -> Option<TestGpu> {
    let mut gpu = TestGpu::from_environment(&build())?;
    if let (Kind::Emulator(emulator), Some(folder)) = (&mut gpu.kind, std::env::var_os(RECORD)) {
        emulator.record_to(Path::new(&folder));
    }
    Some(gpu)
}

/// Runs a case under every schedule; the results have to be the same bytes.
pub fn same_under_all_schedules<T: PartialEq + std::fmt::Debug>(
    gpu: &mut TestGpu,
    mut case: impl FnMut(&mut TestGpu) -> T,
) -> T {
    gpu.set_schedule(Schedule::ALL[0]);
    let first = case(gpu);
    for schedule in &Schedule::ALL[1..] {
        gpu.set_schedule(*schedule);
        let other = case(gpu);
        assert!(other == first, "{schedule:?} changes the result");
    }
    first
}

/// The emulator's counts so far. A test that shows nothing without it stands in a module
/// `emulated`, by whose name `cuda/run-on-gpu.sh` leaves it out.
pub fn counts(gpu: &TestGpu) -> Counts {
    gpu.counts().expect("on a GPU, tests in modules `emulated` are left out")
}

/// Memory that holds these numbers.
pub fn memory<T: Number>(gpu: &mut TestGpu, numbers: &[T]) -> TestMemory {
    let mut memory = gpu.alloc(size_of_val(numbers), "a test").unwrap();
    gpu.upload(numbers, &mut memory, 0).unwrap();
    memory
}

/// Memory for so many numbers, poisoned.
pub fn room<T: Number>(gpu: &mut TestGpu, count: usize) -> TestMemory {
    gpu.alloc(count * size_of::<T>(), "a test").unwrap()
}

/// Content of memory, from its begin.
pub fn numbers<T: Number + Default>(
    gpu: &mut TestGpu,
    memory: &TestMemory,
    count: usize,
) -> Vec<T> {
    let mut out = vec![T::default(); count];
    gpu.download(memory, 0, &mut out).unwrap();
    out
}

/// The bits of numbers: what is compared where nothing may differ.
pub fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

/// Random numbers that are the same everywhere (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A random number in `0..limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// A random number in `-1..1`.
    pub fn number(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// `count` random numbers in `-scale..scale`.
    pub fn numbers(&mut self, count: usize, scale: f32) -> Vec<f32> {
        (0..count).map(|_| self.number() * scale).collect()
    }
}

/// Fails at the first number that is further from the expected one than
/// `absolute + relative * |expected|`, or is NaN.
#[track_caller]
pub fn assert_close(what: &str, got: &[f32], expected: &[f64], absolute: f64, relative: f64) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let (got, bound) = (f64::from(*got), absolute + relative * expected.abs());
        let within = (got - expected).abs() <= bound;
        assert!(within, "{what}: number {i} is {got}, expected {expected} within {bound}");
    }
}
