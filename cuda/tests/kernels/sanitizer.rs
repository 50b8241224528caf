//! Tests that take minutes: all launches under AddressSanitizer, and a list of mutants.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use hat_cuda::testkit::emulator::{Build, EmulatorError};
use hat_cuda::testkit::test_gpu::compiled;

use crate::mutants::{Mutant, mutants};
use crate::stand::{KERNELS, RECORD, build};

const SANITIZERS: &[&str] =
    &["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"];

/// Longest that a mutant may take; a loop without an end is a death too.
const MUTANT_MAX: Duration = Duration::from_secs(240);

/// A folder of this test alone, empty.
fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// Runs this program's tests by name; `None` if they take too long.
fn tests(names: &[String], environment: &[(&str, &Path)]) -> Option<Output> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(names).args(["--skip", "on_driver", "--skip", "artefacts"]);
    command.envs(environment.iter().copied()).stdout(Stdio::null()).stderr(Stdio::null());
    let (mut child, begun) = (command.spawn().unwrap(), Instant::now());
    while child.try_wait().unwrap().is_none() {
        if begun.elapsed() > MUTANT_MAX {
            child.kill().unwrap();
            child.wait().unwrap();
            return None;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Some(child.wait_with_output().unwrap())
}

/// Files with the launches of all tests.
fn recorded() -> Vec<PathBuf> {
    let folder = folder("recorded");
    let output = tests(&[], &[(RECORD, &folder)]);
    assert!(output.is_some_and(|output| output.status.success()), "the tests pass");
    let entries = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
    entries.collect()
}

/// Runs recorded launches under the sanitizers.
fn replay(build: &Build, launches: &[PathBuf]) -> Result<Output, EmulatorError> {
    let program = build.compile("replay.cpp", SANITIZERS, "exe")?;
    Ok(Command::new(program).args(launches).output().unwrap())
}

#[test]
#[ignore = "takes a minute; .ci/run runs it"]
fn all_launches_are_clean_under_the_sanitizers() {
    let Some(_) = compiled(build().compile("replay.cpp", SANITIZERS, "exe"), "the sanitizers")
    else {
        return;
    };
    let launches = recorded();
    assert!(launches.len() > 60, "{} launches", launches.len());
    for kernel in hat_cuda::kernel::Kernel::ALL {
        let name = kernel.name();
        let has = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with(name);
        assert!(launches.iter().any(has), "no launch of {name}");
    }
    let output = replay(&build(), &launches).unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
}

/// The kernels with one line changed, in a folder of their own.
fn changed(mutant: &Mutant) -> Build {
    let original = build();
    let kernels = folder("mutant");
    for entry in std::fs::read_dir(&original.kernels).unwrap() {
        let path = entry.unwrap().path();
        if !path.is_file() {
            continue;
        }
        let name = path.file_name().unwrap();
        let mut text = std::fs::read_to_string(&path).unwrap();
        if name == mutant.file.as_str() {
            let places = text.matches(&mutant.from).count();
            assert_eq!(places, 1, "{}: `{}`", mutant.file, mutant.from);
            text = text.replace(&mutant.from, &mutant.to);
        }
        std::fs::write(kernels.join(name), text).unwrap();
    }
    Build { kernels, ..original }
}

/// Verdict of the sanitizer on a mutant.
fn verdict(mutant: &Mutant, launches: &[PathBuf]) -> &'static str {
    let build = changed(mutant);
    let flags = ["-O2", "-fPIC", "-shared", "-fvisibility=hidden"];
    // What does not compile shows nothing of the tests.
    let library = build.compile("emulator.cpp", &flags, "so").unwrap();
    let found = tests(&mutant.tests, &[(KERNELS, &build.kernels)]);
    std::fs::remove_file(library).unwrap();
    match found {
        None => return "time",
        Some(output) if !output.status.success() => return "tests",
        Some(_) => {}
    }
    let output = replay(&build, launches).unwrap();
    std::fs::remove_file(build.compile("replay.cpp", SANITIZERS, "exe").unwrap()).unwrap();
    if output.status.success() { "lives" } else { "sanitizers" }
}

#[test]
#[ignore = "takes many minutes: a build for each mutant; docs/KERNELS.md has the table"]
fn mutants_die() {
    let launches = recorded();
    // Some of them, by their words, with `;` between.
    let only = std::env::var("HAT_TEST_MUTANTS").unwrap_or_default();
    let mut wrong = Vec::new();
    for mutant in &mutants() {
        if !only.split(';').any(|words| mutant.what.contains(words)) {
            continue;
        }
        let verdict = verdict(mutant, &launches);
        println!("| {} | {} | {verdict} |", mutant.file, mutant.what);
        if (verdict == "lives") != mutant.lives {
            wrong.push(format!("{}: {}: {verdict}", mutant.file, mutant.what));
        }
    }
    assert!(wrong.is_empty(), "not as the list says:\n{}", wrong.join("\n"));
}
