//! `hat-load` as a process: its devices say what the whole model says, what is wrong is named, and
//! no process is left behind however it ends.
#![cfg(target_os = "linux")]
use std::collections::BTreeSet;
use std::net::TcpListener;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hat-load"));
    command.args(args);
    command
}

fn said(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// The figures of a run that has to end well.
fn figures(args: &[&str]) -> Value {
    let output = command(args).arg("--json").output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", said(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    serde_json::from_str(text.lines().last().unwrap()).unwrap()
}

#[test]
fn four_processes_answer_as_the_whole_model() {
    let folder = tempfile::tempdir().unwrap();
    let plots = folder.path().to_str().unwrap();
    let figures = figures(&[
        "--devices",
        "4",
        "--requests",
        "16",
        "--prompt-tokens",
        "20..200",
        "--max-tokens",
        "24",
        "--check-whole",
        "--wire",
        "int8",
        "--chunks",
        "32",
        "--plot",
        plots,
    ]);
    let all = &figures["all"];
    assert_eq!((&all["requests"], &all["done"]), (&16.into(), &16.into()));
    assert_eq!(all["tokens"], 16 * 24);
    let whole = &figures["whole"];
    assert_eq!((&whole["answers"], &whole["different"]), (&16.into(), &0.into()));
    assert_eq!(whole["tokens"], 16 * 24);
    let each = figures["each"].as_array().unwrap();
    assert_eq!(each.len(), 4);
    assert!(each.iter().all(|device| device["done"].as_u64().unwrap() >= 1), "{each:?}");
    assert!(figures["fairness"]["gap_max_over_median"].as_f64().unwrap() >= 1.0);
    let cloud = &figures["cloud"];
    assert_eq!((&cloud["opened"], &cloud["sessions"]), (&16.into(), &0.into()));
    assert!(cloud["rows"].as_u64().unwrap() >= 16 * (20 + 23), "{cloud}");
    assert!(cloud["memory"][3]["own_mb"].as_f64().unwrap() > 0.1, "{cloud}");
    for plot in ["ttft", "gap", "tbt", "memory"] {
        let svg = std::fs::read_to_string(folder.path().join(format!("{plot}.svg"))).unwrap();
        assert!(svg.contains("4 devices"), "{plot}");
    }
}

#[test]
fn devices_come_and_go_and_answers_are_given_up() {
    let figures = figures(&[
        "--devices",
        "6",
        "--rate",
        "60",
        "--seconds",
        "4",
        "--life-s",
        "1.5",
        "--cancel",
        "0.3",
        "--distinct",
        "8",
        "--check-whole",
    ]);
    let all = &figures["all"];
    let count = |name: &str| all[name].as_u64().unwrap();
    // 240 are expected; so far off is one in a million.
    assert!((160..=330).contains(&count("requests")), "{all}");
    assert!(count("done") > 60 && count("cancelled") > 20 && count("failed") == 0, "{all}");
    assert!(figures["replaced"].as_u64().unwrap() >= 4, "{figures}");
    assert_eq!(figures["whole"]["different"], 0);
    assert!(figures["whole"]["beginnings"].as_u64().unwrap() > 10, "{figures}");
}

#[test]
fn devices_share_a_cloud_that_is_too_small() {
    let figures = figures(&[
        "--devices",
        "5",
        "--requests",
        "15",
        "--sessions-max",
        "2",
        "--max-tokens",
        "8",
        "--check-whole",
    ]);
    assert_eq!((&figures["all"]["done"], &figures["whole"]["different"]), (&15.into(), &0.into()));
    assert!(figures["cloud"]["refused"].as_u64().unwrap() >= 1, "{figures}");
}

#[test]
fn what_is_wrong_is_named() {
    let cases: [(&[&str], &[&str]); 14] = [
        (&["--devices", "0"], &["--devices"]),
        (&["--devices", "99999"], &["--devices", "10000"]),
        (&["--rate", "0"], &["--rate", "0.001 to 100000"]),
        (&["--rate", "NaN"], &["--rate", "0.001 to 100000"]),
        (&["--rate", "-3"], &["--rate", "0.001 to 100000"]),
        (&["--requests", "0"], &["--requests"]),
        (&["--seconds", "inf"], &["--seconds", "0.1 to 1000000"]),
        (&["--cancel", "1.5"], &["--cancel", "0 to 1"]),
        (&["--prompt-tokens", "9..3"], &["--prompt-tokens", "rising"]),
        (&["--wire", "int3"], &["--wire", "f32, f16, int8 and int4"]),
        (&["--draft", "fast"], &["--draft", "auto, off, lookup"]),
        (&["--bundle", "/no/such/bundle"], &["--bundle", "/no/such/bundle: no such file"]),
        (&["--prompts", "/no/such/file"], &["--prompts", "/no/such/file"]),
        (&["--cloud", "127.0.0.1:1", "--cloud-threads", "2"], &["--cloud-threads"]),
    ];
    for (args, parts) in cases {
        let output = command(args).output().unwrap();
        let said = said(&output);
        assert!(!output.status.success(), "{args:?}");
        assert!(parts.iter().all(|part| said.contains(part)), "{args:?}: {said}");
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompts.jsonl");
    std::fs::write(&file, "{\"prompt\": \"a\"}\n\n{\"text\": \"b\"}\n").unwrap();
    let output = command(&["--prompts", file.to_str().unwrap()]).output().unwrap();
    assert!(said(&output).contains("line 3"), "{}", said(&output));
}

#[test]
fn a_cloud_that_is_away_is_named() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let args = ["--cloud", &free, "--connect-s", "0.4", "--devices", "2"];
    let output = command(&args).output().unwrap();
    assert!(!output.status.success());
    let text = said(&output);
    assert!(text.contains(&free) && text.contains("0.4 s"), "{text}");
    // A process that listens and says nothing is no cloud either.
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = mute.local_addr().unwrap().to_string();
    let args = ["--cloud", &address, "--connect-s", "0.4", "--devices", "1"];
    let output = command(&args).output().unwrap();
    assert!(!output.status.success() && said(&output).contains(&address), "{}", said(&output));
}

/// Ids of the processes of this program whose parent is `parent`.
fn children(parent: u32) -> BTreeSet<u32> {
    let of = |entry: std::fs::DirEntry| -> Option<u32> {
        let id: u32 = entry.file_name().to_str()?.parse().ok()?;
        let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
        let (_, after_name) = stat.rsplit_once(')')?;
        let of_parent: u32 = after_name.split_whitespace().nth(1)?.parse().ok()?;
        (of_parent == parent).then_some(id)
    };
    std::fs::read_dir("/proc").unwrap().filter_map(|entry| of(entry.unwrap())).collect()
}

/// True if a process of this program has this id and has not ended.
fn lives(id: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    stat.contains("hat-load") && !stat.contains(") Z ")
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A run with three devices under way, and the ids of its processes.
fn under_way() -> (Child, BTreeSet<u32>) {
    let mut command = command(&["--devices", "3", "--seconds", "600", "--max-tokens", "1000"]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut ids = BTreeSet::new();
    until("a cloud and three devices", || {
        ids = children(child.id());
        ids.len() == 4
    });
    // They are at work, not only started.
    std::thread::sleep(Duration::from_millis(700));
    assert!(ids.iter().all(|id| lives(*id)));
    (child, ids)
}

#[test]
fn an_interrupt_ends_all_processes_and_shows_what_was_measured() {
    let (child, ids) = under_way();
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &id]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert!(!output.status.success());
    assert!(said(&output).contains("interrupted"), "{}", said(&output));
    assert!(String::from_utf8(output.stdout).unwrap().contains("| all |"));
    assert!(!ids.iter().any(|id| lives(*id)));
}

#[test]
fn a_killed_tool_leaves_no_process_behind() {
    let (mut child, ids) = under_way();
    child.kill().unwrap();
    child.wait().unwrap();
    until("all children end", || !ids.iter().any(|id| lives(*id)));
}
