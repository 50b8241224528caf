//! Code on its way to a GPU: its form, the compiler's words, the share of shared memory; and time
//! by the GPU's own clock.

use hat_cuda::driver::{Options, Wait};

use super::*;

const PTX: Options = Options { ptx: true, wait: Wait::Driver };

/// Runs the body `name` under a driver of this kind: modules of machine code and of PTX,
/// kernels that asked for all shared memory, and contexts whose threads sleep.
#[track_caller]
fn loaded_under(kind: &str, name: &str) -> Option<[u64; 4]> {
    let counts = counts_under(kind, "loading", name)?;
    Some([13, 14, 15, 16].map(|place| counts[place]))
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn code_is_loaded_in_the_form_that_is_asked_for() {
    // 15 kernel files; 8 kernels of attention, 8 of few rows and 6 of many have much shared memory.
    let Some(machine_code) = loaded_under("", "as_usual") else { return };
    assert_eq!(machine_code, [15, 0, 22, 0]);
    assert_eq!(loaded_under("", "as_ptx"), Some([0, 15, 22, 0]));
    assert_eq!(loaded_under("other-gpu", "as_usual"), Some([0, 15, 22, 0]));
    assert_eq!(loaded_under("", "asleep"), Some([15, 0, 22, 1]));
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn the_driver_s_compiler_is_quoted() {
    under_this("bad-ptx", "refused");
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn marks_stand_behind_the_work_before_them() {
    under_this("", "marks");
}

#[track_caller]
fn under_this(kind: &str, name: &str) {
    let _ = loaded_under(kind, name);
}

pub(super) fn as_usual() {
    drop(Cuda::open(0).unwrap());
}

pub(super) fn as_ptx() {
    let gpu = Cuda::open_with(0, PTX).unwrap();
    assert!(gpu.describe().contains("PTX of compute_80"), "{}", gpu.describe());
    assert!(gpu.usages().iter().all(|usage| usage.registers > 0 && usage.local_bytes == 0));
}

pub(super) fn asleep() {
    drop(Cuda::open_with(0, Options { ptx: false, wait: Wait::Asleep }).unwrap());
}

pub(super) fn refused() {
    let line = Cuda::open_with(0, PTX).err().unwrap().to_string();
    assert!(line.contains("the PTX of attend_prefill (CUDA_ERROR_INVALID_PTX): ptxas "), "{line}");
    assert!(line.contains("line 9; error   : Unknown symbol 'hat'; ptxas fatal"), "{line}");
    assert!(!line.contains('\n') && !line.contains('\0'), "{line}");
    // Machine code goes through no compiler.
    assert!(Cuda::open(0).is_ok());
}

pub(super) fn marks() {
    let mut gpu = Cuda::open(0).unwrap();
    let [x, weight, mut out] = [(); 3].map(|()| gpu.alloc(256, "a test").unwrap());
    let begin = gpu.mark().unwrap();
    let to = RmsNorm { weight: weight.slice(), eps: 1e-5, out: out.slice_mut() };
    rms_norm(&mut gpu, 1, x.slice(), to).unwrap();
    assert_eq!(gpu.launch_counts().single, 0, "it waits");
    let end = gpu.mark().unwrap();
    assert_eq!(gpu.launch_counts().single, 1, "the mark stands behind it");
    let seconds = gpu.seconds_between(&begin, &end).unwrap();
    assert!(seconds.is_finite() && seconds > 0.0, "{seconds}");
    // Backwards it is as long.
    assert_eq!(gpu.seconds_between(&end, &begin).unwrap(), -seconds);
}
