//! Standard output that takes no more, for each tool: a reader that went away ends it quietly, and
//! a full disk is an error that names it.
#![cfg(target_os = "linux")]
use std::fs::OpenOptions;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use hat_program::pull;

const LINK: &str = env!("CARGO_BIN_EXE_hat-link");
const LOAD: &str = env!("CARGO_BIN_EXE_hat-load");
const SIM: &str = env!("CARGO_BIN_EXE_hat-sim");
const SPLIT: &str = env!("CARGO_BIN_EXE_hat-split");
const TIDY: &str = env!("CARGO_BIN_EXE_tidy");
const TRAIN: &str = env!("CARGO_BIN_EXE_hat-train");

/// The end of a pipe that nobody reads from.
fn closed() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

fn full() -> Stdio {
    OpenOptions::new().write(true).open("/dev/full").unwrap().into()
}

fn run(program: &str, args: &[&str], stdout: Stdio) -> Output {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).stdout(stdout).stderr(Stdio::piped());
    command.spawn().unwrap().wait_with_output().unwrap()
}

fn check(program: &str, args: &[&str], prepare: &dyn Fn()) {
    let name = Path::new(program).file_name().unwrap().to_str().unwrap();
    prepare();
    let output = run(program, args, closed());
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{name} {args:?} into a closed pipe: {said}");
    let complaint = said.lines().find(|line| line.starts_with(&format!("{name}:")));
    assert!(complaint.is_none() && !said.contains("panicked"), "{name} {args:?}: {said}");

    prepare();
    let output = run(program, args, full());
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{name} {args:?} onto a full disk: {said}");
    let last = said.lines().last().unwrap_or_default();
    let expected = format!("{name}: standard output: No space left on device (os error 28)");
    assert_eq!(last, expected, "{args:?}: {said}");
}

#[test]
fn help_and_version_are_output_like_any_other() {
    for program in [LINK, LOAD, SIM, SPLIT, TRAIN] {
        check(program, &["--help"], &|| {});
        check(program, &["--version"], &|| {});
    }
    for command in ["paper", "ablation", "fleet", "calibrate"] {
        check(SIM, &[command, "--help"], &|| {});
    }
    for command in ["collect", "fit", "eval"] {
        check(TRAIN, &[command, "--help"], &|| {});
    }
}

#[test]
fn figures_are_output_like_any_other() {
    check(LINK, &["--calibrate", "--json"], &|| {});
    check(
        SIM,
        &["paper", "--workload", "specbench-7b", "--runs", "1", "--requests", "20", "--json"],
        &|| {},
    );
    let load = ["--devices", "1", "--requests", "1", "--json"];
    check(LOAD, &load, &|| {});
}

#[test]
fn a_report_is_output_like_any_other() {
    let folder = tempfile::tempdir().unwrap();
    let model = pull::default_model(&pull::cache_dir().unwrap()).unwrap();
    let out = folder.path().join("out");
    let (model, path) = (model.to_str().unwrap(), out.to_str().unwrap());
    for more in [&[][..], &["--report"], &["--json"]] {
        let args = [&[model, "--split-layer", "2", "--out", path], more].concat();
        check(SPLIT, &args, &|| {
            let _ = std::fs::remove_dir_all(&out);
        });
    }
}

#[test]
fn findings_are_output_like_any_other() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    check(TIDY, &[root.to_str().unwrap()], &|| {});
}
