//! Standard output that takes no more: a reader that went away ends each command quietly, and a
//! full disk is an error that names it.
#![cfg(target_os = "linux")]
use std::fs::OpenOptions;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use hat_program::pull;

/// Every command that prints and ends by itself.
const COMMANDS: &[&[&str]] = &[
    &["--help"],
    &["--version"],
    &["help", "device"],
    &["generate", "--help"],
    &["demo", "--max-tokens", "8"],
    &["generate", "-p", "Hello", "--max-tokens", "8"],
    &["generate", "-p", "Hello", "--max-tokens", "8", "--json"],
    &["generate", "-p", "Hello", "--max-tokens", "8", "--json", "--whole"],
    &["doctor"],
    &["pull"],
];

fn run(args: &[&str], stdout: Stdio) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hat-engine"));
    command.args(args).stdin(Stdio::null()).stdout(stdout).stderr(Stdio::piped());
    command.spawn().unwrap().wait_with_output().unwrap()
}

/// The end of a pipe that nobody reads from.
fn closed() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

fn full() -> Stdio {
    OpenOptions::new().write(true).open("/dev/full").unwrap().into()
}

#[test]
fn a_closed_pipe_ends_quietly_and_a_full_disk_is_named() {
    pull::default_bundle(&pull::cache_dir().unwrap(), 2, 0).unwrap();
    for args in COMMANDS {
        let output = run(args, closed());
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(0), "{args:?} into a closed pipe: {said}");
        let complaint = said.lines().find(|line| line.starts_with("hat-engine:"));
        assert!(complaint.is_none() && !said.contains("panicked"), "{args:?}: {said}");

        let output = run(args, full());
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?} onto a full disk: {said}");
        let last = said.lines().last().unwrap_or_default();
        let expected = "hat-engine: standard output: No space left on device (os error 28)";
        assert_eq!(last, expected, "{args:?}: {said}");
    }
}

#[test]
fn a_chat_ends_when_nobody_reads_it() {
    for (stdout, code) in [(closed(), 0), (full(), 1)] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_hat-engine"))
            .args(["chat", "--max-tokens", "4"])
            .stdin(Stdio::piped())
            .stdout(stdout)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // It stays open: the chat ends by itself, not since its questions do.
        let mut stdin = child.stdin.take().unwrap();
        std::io::Write::write_all(&mut stdin, b"Hello\n").unwrap();
        let deadline = Instant::now() + Duration::from_secs(120);
        while child.try_wait().unwrap().is_none() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = child.kill(); // one that is over already is not harmed
        assert_eq!(child.wait().unwrap().code(), Some(code));
    }
}

#[test]
fn a_standard_error_that_nobody_reads_is_no_reason_to_fail() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hat-engine"));
    command.args(["demo", "--max-tokens", "4"]).stderr(closed()).stdin(Stdio::null());
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stdout.starts_with(b"> Why is the sky blue"));
}
