//! The program with `--processor cuda`, on machines without a driver and over a made-up one that
//! runs the kernels on the emulator: what it says, what it computes, and what happens when the GPU
//! is lost in the middle of an answer. On a machine with a GPU the made-up driver stands first.
//!
//! Without a C++ compiler these tests fail, unless `HAT_NO_EMULATOR` was set when they were built:
//! then they count as ignored.
mod counts;
mod drafts;
mod in_place;
mod lost;
mod stages;

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use crate::support::Bundles;
use hat_cuda::testkit::emulator::Build;
use hat_cuda::testkit::test_gpu::compiled;
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_hat-engine");

fn driver() -> Option<PathBuf> {
    let build = Build::new(Path::new(env!("CARGO_TARGET_TMPDIR")));
    compiled(build.driver(&[]), "the CUDA processor")
}

/// Folder of libcuda, and the driver's planted fault.
#[derive(Clone)]
struct Driver<'a> {
    folder: &'a Path,
    kind: &'a str,
    after: usize,
    devices: usize,
    /// File of its counts.
    counts: Option<&'a Path>,
}

impl<'a> Driver<'a> {
    fn new(folder: &'a Path, kind: &'a str) -> Self {
        Self { folder, kind, after: 0, devices: 1, counts: None }
    }

    fn program(&self) -> Command {
        let mut command = Command::new(PROGRAM);
        // Of --whole too, which has no codec without.
        command.env("HAT_WIRE", "int8");
        command.env("LD_LIBRARY_PATH", self.folder).env("HAT_FAKE_DRIVER", self.kind);
        command.env("HAT_FAKE_AFTER", self.after.to_string());
        command.env("HAT_FAKE_DEVICES", self.devices.to_string());
        command.env("HAT_FAKE_COUNTS", self.counts.unwrap_or(Path::new("")));
        command
    }

    fn generate(&self, bundle: &Path, more: &[&str]) -> Command {
        let mut command = self.program();
        command.args(["generate", "--raw", "-p", "A tiny model says this and that and this."]);
        command.args(["--json", "--ignore-eos", "--max-tokens", "12", "--threads", "1"]);
        command.arg("--bundle").arg(bundle).args(more);
        command
    }
}

fn said(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

/// The object that `--json` prints last.
#[track_caller]
fn object(output: &Output) -> Value {
    let (stdout, stderr) = said(output);
    assert!(output.status.success(), "{stderr}");
    serde_json::from_str(stdout.lines().last().unwrap()).unwrap()
}

/// Last line of a command that fails.
#[track_caller]
fn refusal(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let (_, stderr) = said(&output);
    assert!(!output.status.success() && !stderr.contains("panicked"), "{stderr}");
    stderr.lines().last().unwrap_or_default().to_owned()
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn the_split_engine_says_on_cuda_what_the_whole_model_says_there() {
    let Some(folder) = driver() else { return };
    let bundles = Bundles::with_kernels();
    // A GPU that has machine code of ours, and one that gets PTX.
    for kind in ["", "other-gpu"] {
        let driver = Driver::new(&folder, kind);
        let run = |more: &[&str]| object(&driver.generate(&bundles.path, more).output().unwrap());
        let whole = run(&["--processor", "cuda", "--whole"]);
        let split = run(&["--processor", "cuda"]);
        assert_eq!(split["token_ids"], whole["token_ids"], "{kind}");
        assert_eq!(split["logits_blake3"], whole["logits_blake3"], "{kind}");
        for answer in [&whole, &split] {
            assert_eq!(answer["timings"]["arithmetic_ids"], serde_json::json!([2]), "{kind}");
        }
        // Auto takes no GPU that it was not asked to take.
        let cpu = run(&["--whole"]);
        assert_eq!(cpu["timings"]["arithmetic_ids"], serde_json::json!([1]));
        assert_ne!(cpu["logits_blake3"], whole["logits_blake3"], "it was computed on the CPU");
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn why_a_gpu_cannot_be_used_is_one_line() {
    let bundles = Bundles::with_kernels();
    let ask = |driver: &Driver<'_>, processor: &str| {
        refusal(&mut driver.generate(&bundles.path, &["--processor", processor]))
    };
    let nowhere = tempfile::tempdir().unwrap();
    let no_driver = Driver::new(nowhere.path(), "");
    if hat_cuda::driver::gpu_count().is_err() {
        let line = ask(&no_driver, "cuda");
        assert!(line.contains("no NVIDIA driver: libcuda is not installed"), "{line}");
        // Where it is configured, the CPU computes instead; and without a word about CUDA, too.
        for processor in ["cuda-else-cpu", "auto"] {
            let more = ["--processor", processor];
            let answer = object(&no_driver.generate(&bundles.path, &more).output().unwrap());
            assert_eq!(answer["timings"]["arithmetic_ids"], serde_json::json!([1]), "{processor}");
        }
    }
    let line = ask(&no_driver, "gpu").to_lowercase();
    assert!(line.contains("help"), "{line}");

    let Some(folder) = driver() else { return };
    for (kind, processor, expected) in [
        ("stub", "cuda", "libcuda is no whole driver ("),
        ("old-driver", "cuda", "is for CUDA 11.4; the kernels' machine code needs 12.0: update"),
        ("other-gpu-old-driver", "cuda", "is for CUDA 12.2; PTX for this GPU needs 12.5: update"),
        ("no-gpu", "cuda", "the NVIDIA driver finds no GPU"),
        ("", "cuda:3", "GPU 3 of 1: there is none with this number"),
        ("old-gpu", "cuda", "has compute capability 7.5; the kernels need 8.0"),
        ("no-memory", "cuda", " bytes for weights could not be allocated"),
    ] {
        let line = ask(&Driver::new(&folder, kind), processor);
        assert!(line.contains(expected), "{kind}: {line}");
    }
    // A model without kernels, on a machine where the CPU may do it.
    let narrow = Bundles::generated(1, 0);
    let fine = Driver::new(&folder, "");
    let line = refusal(&mut fine.generate(&narrow.path, &["--processor", "cuda"]));
    assert!(line.contains("cuda: "), "{line}");
    let more = ["--processor", "cuda-else-cpu"];
    object(&fine.generate(&narrow.path, &more).output().unwrap());
}

/// A cloud process and where it listens. Killed when dropped.
struct CloudProcess {
    child: Child,
    /// Output up to the line in which it listens.
    first: String,
    address: String,
    stderr: BufReader<std::process::ChildStderr>,
}

impl CloudProcess {
    fn start(driver: &Driver<'_>, bundle: &Path, more: &[&str]) -> Option<Self> {
        let mut command = driver.program();
        command.args(["cloud", "--listen", "127.0.0.1:0", "--threads", "1", "--bundle"]);
        command.arg(bundle.join("cloud")).args(more).env("RUST_LOG", "error");
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let (mut first, mut stderr) = (String::new(), BufReader::new(child.stderr.take().unwrap()));
        // One that cannot start ends.
        while !first.contains("listening at ") {
            if stderr.read_line(&mut first).unwrap() == 0 {
                let _ = child.wait();
                return None;
            }
        }
        let address = first.trim().rsplit(' ').next().unwrap_or_default().to_owned();
        Some(Self { child, first, address, stderr })
    }

    /// Ends it; gives its output since it began to listen.
    fn kill(mut self) -> String {
        self.child.kill().unwrap();
        let mut text = String::new();
        self.stderr.read_to_string(&mut text).unwrap();
        text
    }

    /// Output since it began to listen, until it ends.
    fn rest(mut self) -> String {
        let mut text = String::new();
        self.stderr.read_to_string(&mut text).unwrap();
        assert!(!self.child.wait().unwrap().success(), "{text}");
        text
    }
}

impl Drop for CloudProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn a_gpu_that_is_lost_ends_the_cloud_or_hands_over_to_the_cpu() {
    let Some(folder) = driver() else { return };
    let bundles = Bundles::with_kernels();
    let device =
        |more: &[&str]| Driver::new(&folder, "").generate(&bundles.path, more).output().unwrap();
    let whole = object(&device(&["--whole"]));
    let lost = Driver { after: 60, ..Driver::new(&folder, "fault") };

    let cloud = CloudProcess::start(&lost, &bundles.path, &["--processor", "cuda"]).unwrap();
    let answer = device(&["--cloud", &cloud.address, "--reconnect-s", "1"]);
    assert!(!answer.status.success(), "{:?}", said(&answer));
    let text = cloud.rest();
    assert!(text.contains("the cloud stopped: cuda: ") && text.contains("is lost"), "{text}");

    let more = ["--processor", "cuda-else-cpu"];
    let cloud = CloudProcess::start(&lost, &bundles.path, &more).unwrap();
    let answer = object(&device(&["--cloud", &cloud.address]));
    assert_eq!(answer["timings"]["arithmetic_ids"], serde_json::json!([2, 1]));
    assert_eq!(answer["token_ids"].as_array().unwrap().len(), 12);
    // What comes after that is the CPU's from begin to end.
    let answer = object(&device(&["--cloud", &cloud.address, "--cloud-arithmetic", "1"]));
    assert_eq!(answer["token_ids"], whole["token_ids"]);
    assert_eq!(answer["logits_blake3"], whole["logits_blake3"]);
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn a_lack_of_memory_in_the_middle_costs_time_not_text() {
    let Some(folder) = driver() else { return };
    let bundles = Bundles::with_kernels();
    let fine = Driver::new(&folder, "");
    let device = |driver: &Driver<'_>, cloud: &Driver<'_>| {
        let cloud = CloudProcess::start(cloud, &bundles.path, &["--processor", "cuda"])?;
        let more = ["--cloud", &cloud.address];
        let answer = object(&driver.generate(&bundles.path, &more).output().unwrap());
        Some((answer, cloud.kill().matches("a step was not computed").count()))
    };
    let (expected, faults) = device(&fine, &fine).unwrap();
    assert_eq!(faults, 0);
    // What is allocated after the start is what runs short; how much that is before, is found.
    let (mut after, mut tried) = (1, 0);
    while tried < 3 {
        let short = Driver { after, ..Driver::new(&folder, "no-memory-once") };
        if let Some((answer, faults)) = device(&fine, &short) {
            assert_eq!(faults, 1, "after {after} allocations");
            assert_eq!(answer["token_ids"], expected["token_ids"], "after {after} allocations");
            assert_eq!(answer["logits_blake3"], expected["logits_blake3"]);
            tried += 1;
        }
        after += 1;
        assert!(after < 100, "the cloud never starts");
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn two_stages_share_a_gpu_and_say_the_same() {
    let Some(folder) = driver() else { return };
    let bundles = Bundles::with_kernels();
    let driver = Driver::new(&folder, "");
    let answers =
        [&["--processor", "cuda"][..], &["--processor", "cuda", "--gpus", "0,0"]].map(|more| {
            let cloud = CloudProcess::start(&driver, &bundles.path, more).unwrap();
            let more = ["--cloud", &cloud.address];
            object(&driver.generate(&bundles.path, &more).output().unwrap())
        });
    assert_eq!(answers[0]["logits_blake3"], answers[1]["logits_blake3"]);
    assert_eq!(answers[0]["token_ids"], answers[1]["token_ids"]);
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn doctor_says_what_gpus_there_are() {
    let bundles = Bundles::with_kernels();
    let lines = |driver: &Driver<'_>| {
        let mut command = driver.program();
        command.args(["doctor", "--verbose", "--threads", "1", "--bundle"]).arg(&bundles.path);
        let (stdout, stderr) = said(&command.output().unwrap());
        assert!(stdout.contains("everything works"), "{stdout}\n{stderr}");
        stdout
    };
    let nowhere = tempfile::tempdir().unwrap();
    if hat_cuda::driver::gpu_count().is_err() {
        let text = lines(&Driver::new(nowhere.path(), ""));
        assert!(text.contains("no NVIDIA driver: libcuda is not installed"), "{text}");
        // What computes instead, what would help, and what it takes.
        for part in [
            "so the CPU computes, also with --processor cuda-else-cpu",
            "needs compute capability 8.0 and NVIDIA's driver",
            " ms; cpu: ",
            "\n  cloud: in this process; cpu",
            "; beside them at most ",
            " for keys and values, ",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
    let Some(folder) = driver() else { return };
    let text = lines(&Driver::new(&folder, "no-gpu"));
    assert!(text.contains("the NVIDIA driver finds no GPU\n  so the CPU computes"), "{text}");
    let text = lines(&Driver::new(&folder, ""));
    assert!(
        text.contains("0: Fake GPU: sm_86") && text.contains("only with --processor"),
        "{text}"
    );
}
