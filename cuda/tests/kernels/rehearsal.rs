//! `cuda/run-on-gpu.sh` as on a machine with a GPU: in a folder that `cuda/pack.sh` made, over a
//! made-up driver, with no compiler in `PATH`, and programs that do not know where the source is.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::on_driver::fake_driver;

/// The commands that the script may call.
const TOOLS: [&str; 17] = [
    "bash", "cat", "cut", "date", "dirname", "env", "grep", "gzip", "head", "mkdir", "mktemp",
    "realpath", "rm", "sed", "tail", "tar", "timeout",
];

/// A stand-in that runs the program under no tool.
const SANITIZER: &str = r#"#!/usr/bin/env bash
[ "$1 $3 $4" = "--tool --error-exitcode 9" ] || exit 2
shift 4
exec "$@"
"#;

/// No part comes near its share of these seconds.
const BUDGET: &[&str] = &["--budget", "6000"];

/// Longest that anything here is waited for.
const WAIT_MAX: Duration = Duration::from_secs(600);

/// A machine with a folder, the tools, and perhaps a driver.
struct Machine {
    folder: tempfile::TempDir,
    driver: PathBuf,
}

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn executable(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(path, mode).unwrap();
}

#[track_caller]
fn succeeds(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

impl Machine {
    fn new(driver: PathBuf) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let tools = folder.path().join("tools");
        std::fs::create_dir(&tools).unwrap();
        for tool in TOOLS {
            let found = std::env::split_paths(&std::env::var_os("PATH").unwrap())
                .map(|folder| folder.join(tool))
                .find(|path| path.is_file());
            std::os::unix::fs::symlink(found.expect(tool), tools.join(tool)).unwrap();
        }
        executable(&tools.join("compute-sanitizer"), SANITIZER);
        Self { folder, driver }
    }

    /// The programs, packed and then moved, so that nothing of it is where it was made.
    fn packed(self) -> Self {
        let packed = self.folder.path().join("packed");
        succeeds(Command::new(source("pack.sh")).arg(&packed).args(["--profile", "dev"]));
        std::fs::rename(packed, self.folder.path().join("moved")).unwrap();
        self
    }

    /// Scripts instead of the programs: one that does not end, and others that say nothing.
    fn with_stand_ins(self) -> Self {
        let moved = self.folder.path().join("moved");
        let programs = moved.join("programs");
        std::fs::create_dir_all(&programs).unwrap();
        for name in ["kernels", "backend", "bits", "bench"] {
            executable(&programs.join(name), "#!/usr/bin/env bash\n");
        }
        executable(&programs.join("hat-engine"), "#!/usr/bin/env bash\nwhile :; do :; done\n");
        std::fs::write(moved.join("built"), "of nothing\n").unwrap();
        std::fs::copy(source("run-on-gpu.sh"), moved.join("run-on-gpu.sh")).unwrap();
        let archive = moved.join("programs.tar.gz");
        succeeds(
            Command::new("tar").arg("-C").arg(&moved).arg("-czf").arg(archive).arg("programs"),
        );
        self
    }

    /// The script, with a driver of this kind.
    fn run(&self, kind: &str, out: &str, arguments: &[&str]) -> Child {
        let mut command = Command::new(self.folder.path().join("tools/bash"));
        command.arg(self.folder.path().join("moved/run-on-gpu.sh")).arg("--out");
        command.arg(self.folder.path().join(out)).args(arguments);
        command.args(["--tokens", "6", "--", "--small"]);
        command.env_clear().env("PATH", self.folder.path().join("tools"));
        command.env("LD_LIBRARY_PATH", &self.driver).env("HAT_FAKE_DRIVER", kind);
        command.stdout(Stdio::piped()).spawn().unwrap()
    }

    /// The status with which it ends.
    fn status(&self, kind: &str, out: &str, arguments: &[&str]) -> Option<i32> {
        self.run(kind, out, arguments).wait_with_output().unwrap().status.code()
    }

    /// The page's section of a part, with its heading.
    fn page(&self, out: &str, part: &str) -> String {
        let page = self.folder.path().join(out).join("HARDWARE.md");
        let page = std::fs::read_to_string(page).unwrap_or_default();
        let mut sections = page.split("\n### ").skip(1);
        let found = sections.find(|section| section.starts_with(&format!("{part}: ")));
        found.unwrap_or_default().to_owned()
    }
}

/// Tests of kernels, backend and bits that a GPU runs at least.
const TESTS_MIN: [u64; 3] = [36, 9, 6];

/// Parts in their order, and what the page has of each right after it.
const PARTS: [(&str, &[&str]); 7] = [
    ("doctor", &["0: Fake GPU: sm_86", "everything works"]),
    ("kernels", &["left out by name (on_driver "]),
    ("ptx", &["left out by name (on_driver "]),
    ("lossless", &["18 of 18 split answers are the whole model's to the bit"]),
    ("bench", &["peaks: ", "tree 32/8x128 2x5@40", "small q4_1 3x5@40 trees"]),
    (
        "sanitizers",
        &["memcheck: clean", "racecheck: clean", "initcheck: clean", "synccheck: clean"],
    ),
    ("rest", &["small q8_0 3x4@40 + 33@24"]),
];

fn every_part_is_on_the_page_as_soon_as_it_ends(machine: &Machine) {
    let mut script = machine.run("", "all", BUDGET);
    let mut lines = BufReader::new(script.stdout.take().unwrap()).lines().map(Result::unwrap);
    for (part, expected) in PARTS {
        let line = lines.next().unwrap();
        let section = machine.page("all", part);
        assert!(line.starts_with(&format!("{part}: passed")), "{line}\n{section}");
        for words in expected {
            assert!(section.contains(words), "{part}: `{words}` is not in\n{section}");
        }
    }
    for part in ["kernels", "ptx"] {
        assert_tests(&machine.page("all", part));
    }
    assert_eq!(lines.count(), 1);
    assert!(script.wait().unwrap().success());
}

/// All programs ran their tests, and what the first one left out has a name.
#[track_caller]
fn assert_tests(section: &str) {
    let results = section.lines().filter(|line| line.contains("test result"));
    // The one test that PTX begins with comes before them.
    let results: Vec<&str> = results.filter(|line| !line.contains(" 1 passed")).collect();
    let number = |line: &str, of: &str| -> u64 {
        let before = line.split(of).next().unwrap();
        before.rsplit(' ').next().unwrap().parse().unwrap()
    };
    let passed: Vec<u64> = results.iter().map(|line| number(line, " passed")).collect();
    let enough = passed.iter().zip(TESTS_MIN).all(|(passed, least)| *passed >= least);
    assert!(passed.len() == TESTS_MIN.len() && enough, "{section}");
    let named = section.lines().find(|line| line.contains("left out by name")).unwrap();
    let left_out = number(results[0], " filtered out");
    assert!(left_out > 20 && named.ends_with(&format!(": {left_out}")), "{section}");
}

fn a_part_that_fails_stops_no_other(machine: &Machine) {
    let arguments = [&["--parts", "ptx sanitizers"], BUDGET].concat();
    assert_eq!(machine.status("bad-ptx", "bad", &arguments), Some(1));
    let (ptx, next) = (machine.page("bad", "ptx"), machine.page("bad", "sanitizers"));
    assert!(next.starts_with("sanitizers: passed"), "{next}");
    let log =
        "the PTX of attend_prefill (CUDA_ERROR_INVALID_PTX): ptxas application ptx input, line 9";
    assert!(ptx.starts_with("ptx: FAILED") && ptx.contains(log), "{ptx}");
    assert!(ptx.contains("test result: FAILED. 0 passed; 1 failed"), "{ptx}");
}

fn a_run_that_is_killed_leaves_what_it_had(machine: &Machine) {
    let arguments = [&["--parts", "doctor sanitizers"], BUDGET].concat();
    let mut script = machine.run("", "killed", &arguments);
    let begun = Instant::now();
    while machine.page("killed", "doctor").is_empty() {
        assert!(begun.elapsed() < WAIT_MAX, "no page");
        std::thread::sleep(Duration::from_millis(20));
    }
    script.kill().unwrap();
    script.wait().unwrap();
    let doctor = machine.page("killed", "doctor");
    assert!(doctor.starts_with("doctor: passed"), "{doctor}");
}

#[test]
#[ignore = "packs and runs all programs; .ci/run runs it"]
fn a_packed_folder_needs_a_driver_alone() {
    let Some(driver) = fake_driver(&[]) else { return };
    let machine = Machine::new(driver).packed();
    a_part_that_fails_stops_no_other(&machine);
    every_part_is_on_the_page_as_soon_as_it_ends(&machine);
    a_run_that_is_killed_leaves_what_it_had(&machine);
}

#[test]
fn a_part_that_does_not_end_is_cut_and_the_next_one_runs() {
    let machine = Machine::new(PathBuf::new()).with_stand_ins();
    let arguments = ["--parts", "doctor kernels", "--budget", "100"];
    assert_eq!(machine.status("", "cut", &arguments), Some(1));
    let (doctor, kernels) = (machine.page("cut", "doctor"), machine.page("cut", "kernels"));
    assert!(
        doctor.starts_with("doctor: CUT at its limit, ") && doctor.contains(" of 6 s"),
        "{doctor}"
    );
    assert!(kernels.starts_with("kernels: passed"), "{kernels}");
    // Without a second to spend nothing begins, and the page says so.
    let arguments = ["--parts", "kernels", "--budget", "1"];
    assert_eq!(machine.status("", "spent", &arguments), Some(1));
    let kernels = machine.page("spent", "kernels");
    assert!(kernels.starts_with("kernels: NOT BEGUN"), "{kernels}");
}
