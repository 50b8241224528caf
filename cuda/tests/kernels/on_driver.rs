//! The way through the driver: on a GPU where there is one, else over a made-up libcuda.

mod in_place;
mod loading;
mod peers;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use hat_cuda::attend::{Cut, Parts, attend};
use hat_cuda::driver::{Cuda, LaunchCounts, OpenError, gpu_count};
use hat_cuda::gpu::{Gpu as _, GpuError, Memory as _};
use hat_cuda::plan::{AttendShape, PlanOnGpu};
use hat_cuda::rms_norm::{RmsNorm, rms_norm};
use hat_cuda::testkit::test_gpu::{GPU, Kind, TestGpu, compiled};

use crate::sequences::{Batch, Sequence, Store, chunk, expected};
use crate::stand::{Random, assert_close, build, memory, numbers, room};

/// Runs tests of this program in a process of its own.
pub fn tests(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(arguments).env_remove(GPU).envs(environment.iter().copied());
    command.output().unwrap()
}

#[track_caller]
pub fn assert_passed(output: &Output, at_least: usize) {
    let said = String::from_utf8_lossy(&output.stdout);
    let passed = said.split(" passed").next().and_then(|text| text.rsplit(' ').next());
    let passed: usize = passed.and_then(|number| number.parse().ok()).unwrap_or(0);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && passed >= at_least, "{said}\n{errors}");
}

/// A folder with a libcuda.so of ours; nothing where it can't be built.
pub fn fake_driver(flags: &[&str]) -> Option<PathBuf> {
    compiled(build().driver(flags), "the driver")
}

/// Environment variable of a child process with the body that it runs.
const BODY: &str = "HAT_TEST_BODY";
/// The status of a process whose body has ended; no test program ends with it by itself.
const BODY_ENDED: i32 = 86;

macro_rules! bodies {
    ($($group:ident: $($name:ident),*;)*) => {
        /// Parts of tests by name. Each runs in a process of its own, which looks for a driver
        /// once, at its start.
        const BODIES: &[(&str, fn())] =
            &[$($((concat!(stringify!($group), "::", stringify!($name)), $group::$name),)*)*];
    };
}

bodies! {
    made_up: no_driver, stub, old_driver, no_gpu, no_such_gpu, old_gpu, no_memory, graphs,
        long_runs, decoding, no_graphs, fault;
    in_place: reading_in_place, reading_copies, writing_in_place;
    loading: as_usual, as_ptx, asleep, refused, marks;
    peers: fetching, fetching_staged, fetching_at_home, foreign_memory,
        foreign_memory_with_access;
}

/// The process that [`body`] starts comes in here.
#[test]
fn each_body_has_a_name_of_its_own() {
    if let Ok(name) = std::env::var(BODY) {
        let (_, body) = BODIES.iter().find(|(known, _)| *known == name).expect("a known body");
        body();
        std::process::exit(BODY_ENDED);
    }
    for (index, (name, _)) in BODIES.iter().enumerate() {
        assert!(BODIES[..index].iter().all(|(earlier, _)| earlier != name), "{name}");
    }
}

/// Runs a body in a process of its own; what became of it.
fn body(name: &str, environment: &[(&str, &str)]) -> Output {
    let environment = [environment, &[(BODY, name)]].concat();
    tests(&["on_driver::each_body_has_a_name_of_its_own", "--exact"], &environment)
}

#[track_caller]
fn assert_ended(output: &Output) {
    let [said, errors] =
        [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    assert_eq!(output.status.code(), Some(BODY_ENDED), "{said}\n{errors}");
}

/// Runs the body `name` of [`made_up`] under a driver of this kind.
#[track_caller]
fn under(kind: &str, name: &str) {
    let Some(folder) = fake_driver(&[]) else { return };
    let environment = [("HAT_FAKE_DRIVER", kind), ("LD_LIBRARY_PATH", folder.to_str().unwrap())];
    assert_ended(&body(&format!("made_up::{name}"), &environment));
}

/// Runs the body `name` of the module `group` under a driver of this kind. What the driver has
/// counted: a word for each place of its table.
#[track_caller]
fn counts_under(kind: &str, group: &str, name: &str) -> Option<Vec<u64>> {
    let folder = fake_driver(&[])?;
    let counts = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("counts-{name}-{kind}"));
    let _ = std::fs::remove_file(&counts);
    let environment = [
        ("HAT_FAKE_DRIVER", kind),
        ("HAT_FAKE_COUNTS", counts.to_str().unwrap()),
        ("LD_LIBRARY_PATH", folder.to_str().unwrap()),
    ];
    assert_ended(&body(&format!("{group}::{name}"), &environment));
    let bytes = std::fs::read(&counts).unwrap();
    Some(
        bytes
            .chunks_exact(8)
            .map(|word| u64::from_ne_bytes(*word.first_chunk().unwrap()))
            .collect(),
    )
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn every_test_passes_through_the_driver() {
    let Some(folder) = fake_driver(&[]) else { return };
    // Of a GPU that gets PTX a few will do: only what is loaded is different.
    let runs: [(&str, &[&str], usize); 2] = [
        ("", &["--skip", "on_driver", "--skip", "sanitizer", "--skip", "emulated"], 25),
        ("other-gpu", &["norm::"], 2),
    ];
    for (kind, arguments, at_least) in runs {
        let library_path = folder.to_str().unwrap();
        let environment =
            [("HAT_FAKE_DRIVER", kind), ("LD_LIBRARY_PATH", library_path), (GPU, "0")];
        assert_passed(&tests(arguments, &environment), at_least);
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn a_machine_without_a_driver_is_told_so() {
    let output = body("made_up::no_driver", &[("LD_LIBRARY_PATH", "")]);
    // Where there is a driver, nothing can be shown here.
    if gpu_count().is_err() {
        assert_ended(&output);
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn a_stub_is_told_from_a_driver() {
    under("stub", "stub");
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn a_driver_that_lacks_a_function_is_a_stub() {
    let Some(folder) = fake_driver(&["-DcuMemFree_v2=cuSomethingElse"]) else { return };
    let environment = [("LD_LIBRARY_PATH", folder.to_str().unwrap())];
    assert_ended(&body("made_up::stub", &environment));
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn an_old_driver_is_told_what_it_lacks() {
    under("old-driver", "old_driver");
    under("other-gpu-old-driver", "old_driver");
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn gpus_that_are_not_there_or_too_old_are_named() {
    under("no-gpu", "no_gpu");
    under("", "no_such_gpu");
    under("old-gpu", "old_gpu");
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn a_lack_of_memory_leaves_the_gpu_usable() {
    under("no-memory", "no_memory");
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn a_fault_loses_the_gpu_for_good() {
    under("fault", "fault");
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn launches_that_come_again_become_a_graph() {
    under("", "graphs");
    under("no-graphs", "no_graphs");
    under("no-pinned", "graphs");
    under("", "long_runs");
    under("", "decoding");
}

/// Bodies that run under a driver that was made up for them.
mod made_up {
    use super::*;

    #[track_caller]
    fn assert_line(found: Result<Cuda, OpenError>, expected: &str) {
        let line = found.err().unwrap().to_string();
        assert!(line.contains(expected) && !line.contains('\n'), "{line}");
    }

    pub(super) fn no_driver() {
        assert_line(Cuda::open(0), "no NVIDIA driver: libcuda is not installed");
    }

    pub(super) fn stub() {
        assert_line(Cuda::open(0), "libcuda is no whole driver (");
    }

    pub(super) fn old_driver() {
        assert_line(Cuda::open(0), ": update the driver");
    }

    pub(super) fn no_gpu() {
        assert_line(Cuda::open(0), "the NVIDIA driver finds no GPU");
    }

    pub(super) fn no_such_gpu() {
        assert_line(Cuda::open(1), "GPU 1 of 1: there is none with this number");
    }

    pub(super) fn old_gpu() {
        assert_line(Cuda::open(0), "Fake GPU has compute capability 7.5; the kernels need 8.0");
    }

    pub(super) fn no_memory() {
        let mut gpu = Cuda::open(0).unwrap();
        let error = gpu.alloc(1 << 40, "K").err().unwrap();
        assert!(matches!(error, GpuError::OutOfMemory { bytes: 0x100_0000_0000, .. }), "{error}");
        assert!(!gpu.is_lost());
        assert!(gpu.alloc(0, "nothing").is_ok());
    }

    /// Three norms and one more, each of what the one before wrote, `times` times; the counts.
    fn norms(times: usize) -> LaunchCounts {
        let mut gpu = Cuda::open(0).unwrap();
        let mut memory = [(); 5].map(|()| gpu.alloc(256, "a test").unwrap());
        let mut weight = gpu.alloc(256, "a test").unwrap();
        gpu.upload(&[1.0f32; 64], &mut weight, 0).unwrap();
        for time in 0..times {
            // Other numbers at the same place: what is copied late must not be what came later.
            let numbers: Vec<f32> = (0..64).map(|i| (i * (time + 1)) as f32 - 7.0).collect();
            gpu.upload(&numbers, &mut memory[0], 0).unwrap();
            for step in 0..4 {
                let (from, to) = memory.split_at_mut(step + 1);
                let to = RmsNorm { weight: weight.slice(), eps: 1e-5, out: to[0].slice_mut() };
                rms_norm(&mut gpu, 1, from[step].slice(), to).unwrap();
            }
            let mut out = [0.0f32; 64];
            gpu.download(&memory[4], 0, &mut out).unwrap();
            let mean = numbers.iter().map(|x| x * x).sum::<f32>() / 64.0;
            for (out, x) in out.iter().zip(&numbers) {
                assert!((out - x / mean.sqrt()).abs() < 1e-3, "{out} at time {time}");
            }
        }
        gpu.launch_counts()
    }

    pub(super) fn graphs() {
        // The first time they are new, the second time captured.
        let expected = LaunchCounts { single: 4, graphs: 6, in_graphs: 24, captured: 1 };
        assert_eq!(norms(7), expected);
    }

    /// Many launches go out 64 at a time, the same ones each time.
    pub(super) fn long_runs() {
        let mut gpu = Cuda::open(0).unwrap();
        let [x, mut weight, mut out] = [(); 3].map(|()| gpu.alloc(256, "a test").unwrap());
        gpu.upload(&[1.0f32; 64], &mut weight, 0).unwrap();
        for time in 0..3 {
            for step in 0..150 {
                let eps = 1e-5 * (step + 1) as f32;
                let to = RmsNorm { weight: weight.slice(), eps, out: out.slice_mut() };
                rms_norm(&mut gpu, 1, x.slice(), to).unwrap();
            }
            let begun = gpu.launch_counts();
            assert_eq!(begun.single + begun.in_graphs, time * 150 + 128, "two runs of three");
            gpu.download(&out, 0, &mut [0.0f32; 64]).unwrap();
        }
        let expected = LaunchCounts { single: 150, graphs: 6, in_graphs: 300, captured: 3 };
        assert_eq!(gpu.launch_counts(), expected);
    }

    /// Attention of one token after another: within a bucket of pages all have one graph.
    pub(super) fn decoding() {
        let mut gpu = TestGpu::new(Kind::Cuda(Box::new(Cuda::open(0).unwrap())));
        let heads = AttendShape { heads: 2, kv_heads: 1, head_dim: 64, window: None };
        let (mut random, pages) = (Random(3), [2u32, 0, 3, 1]);
        let all = Sequence { rows: chunk(0, 128), pages: pages.to_vec() };
        let mut store = Store::new(4, 4, &heads);
        (0..4).for_each(|layer| store.fill(layer, &all, &mut random));
        let kv = store.on_gpu(&mut gpu);
        let mut plan = PlanOnGpu::new(&mut gpu, 1, 1, 4).unwrap();
        let mut parts = Parts::new(&mut gpu, &heads, 1, 1).unwrap();
        let mut outs = [(); 4].map(|()| room::<f32>(&mut gpu, 128));
        let q = random.numbers(128, 1.0);
        let q_memory = memory(&mut gpu, &q);
        let before = counts(&gpu);
        for position in [70, 71, 95, 96, 127] {
            let pages = pages[..position as usize / 32 + 1].to_vec();
            let sequence = Sequence { rows: chunk(position, position + 1), pages };
            let batch = Batch::new(std::slice::from_ref(&sequence));
            plan.write(&mut gpu, &batch.plan(), &heads, 4).unwrap();
            for (layer, out) in outs.iter_mut().enumerate() {
                let (q, out) = (q_memory.slice(), out.slice_mut());
                attend(&mut gpu, &plan, &heads, layer, Cut::Auto, q, &kv, &mut parts, out).unwrap();
            }
            let sequences = [sequence];
            for (layer, out) in outs.iter().enumerate() {
                let expected = expected(&store, layer, &heads, &sequences, &q);
                assert_close("decoding", &numbers(&mut gpu, out, 128), &expected, 2e-3, 0.0);
            }
        }
        let counts = counts(&gpu);
        assert_eq!(counts.captured - before.captured, 1);
        assert_eq!((counts.single - before.single, counts.graphs - before.graphs), (4, 4));
    }

    fn counts(gpu: &TestGpu) -> LaunchCounts {
        match &gpu.kind {
            Kind::Cuda(cuda) => cuda.launch_counts(),
            Kind::Emulator(_) => panic!("no driver"),
        }
    }

    pub(super) fn no_graphs() {
        assert_eq!(norms(7), LaunchCounts { single: 28, ..LaunchCounts::default() });
    }

    pub(super) fn fault() {
        let mut gpu = Cuda::open(0).unwrap();
        let [x, weight, mut out] = [(); 3].map(|()| gpu.alloc(16, "a test").unwrap());
        let to = RmsNorm { weight: weight.slice(), eps: 1e-5, out: out.slice_mut() };
        // The launch is only queued; what follows it says so.
        rms_norm(&mut gpu, 1, x.slice(), to).unwrap();
        let mut numbers = [0.0f32; 4];
        let first = gpu.download(&out, 0, &mut numbers).unwrap_err().to_string();
        assert!(first.contains("is lost to this process"), "{first}");
        assert!(first.contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{first}");
        assert!(gpu.is_lost());
        let again = gpu.alloc(4, "more").err().unwrap().to_string();
        assert_eq!(again, first);
    }
}
