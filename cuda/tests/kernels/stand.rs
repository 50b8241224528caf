//! What the tests stand on: a GPU, random numbers, comparison.

use std::io::Write as _;
use std::path::Path;

use hat_cuda::emulator::{Build, Emulator, EmulatorError, EmulatorMemory, Schedule};
use hat_cuda::gpu::{Gpu as _, Number};

/// The emulator, or nothing (and a word about it) where it can't be built.
pub fn emulator() -> Option<Emulator> {
    let build = Build::new(Path::new(env!("CARGO_TARGET_TMPDIR")));
    match Emulator::new(&build) {
        Ok(emulator) => Some(emulator),
        Err(error @ EmulatorError::NoCompiler) => {
            let required = std::env::var_os("HAT_REQUIRE_EMULATOR").is_some();
            assert!(!required, "{error}");
            // Not `eprintln`, which a passing test keeps to itself.
            let _ = writeln!(std::io::stderr(), "{error}: kernels were not tried");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Runs a case under every schedule; the results have to be the same bytes.
pub fn same_under_all_schedules<T: PartialEq + std::fmt::Debug>(
    emulator: &mut Emulator,
    mut case: impl FnMut(&mut Emulator) -> T,
) -> T {
    emulator.set_schedule(Schedule::ALL[0]);
    let first = case(emulator);
    for schedule in &Schedule::ALL[1..] {
        emulator.set_schedule(*schedule);
        let other = case(emulator);
        assert!(other == first, "{schedule:?} changes the result");
    }
    first
}

/// Memory that holds these numbers.
pub fn memory<T: Number>(emulator: &mut Emulator, numbers: &[T]) -> EmulatorMemory {
    let mut memory = emulator.alloc(size_of_val(numbers), "a test").unwrap();
    emulator.upload(numbers, &mut memory, 0).unwrap();
    memory
}

/// Memory for so many numbers, poisoned.
pub fn room<T: Number>(emulator: &mut Emulator, count: usize) -> EmulatorMemory {
    emulator.alloc(count * size_of::<T>(), "a test").unwrap()
}

/// What memory holds, from its begin.
pub fn numbers<T: Number + Default>(
    emulator: &mut Emulator,
    memory: &EmulatorMemory,
    count: usize,
) -> Vec<T> {
    let mut out = vec![T::default(); count];
    emulator.download(memory, 0, &mut out).unwrap();
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

    /// In `-1..1`.
    pub fn number(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// So many in `-scale..scale`.
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
