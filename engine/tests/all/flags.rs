//! Flags and variables of the daemon: what they take, and that nothing is done before all are
//! right.
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::support::{Bundles, said};

/// A home with nothing in it, and a program in it.
struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn command(&self, line: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hat-engine"));
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("HAT_") || name == "RUST_LOG" {
                command.env_remove(name);
            }
        }
        // Fetching a model would fail at once.
        command.env("PATH", "/nowhere").env("HOME", self.path());
        command.env_remove("XDG_CACHE_HOME").env_remove("XDG_STATE_HOME");
        command.args(line).stdin(Stdio::null());
        command
    }

    fn run(&self, line: &[&str]) -> Output {
        self.command(line).output().unwrap()
    }

    fn is_empty(&self) -> bool {
        std::fs::read_dir(self.path()).unwrap().next().is_none()
    }
}

fn text(output: &Output) -> String {
    assert!(output.status.success(), "{}", said(output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A wrong value anywhere in a line ends the command before a key, a model or a socket is made,
/// and the flag is named.
#[test]
fn a_wrong_flag_is_named_and_has_no_effect() {
    let socket = tempfile::tempdir().unwrap();
    let socket = socket.path().join("http.sock");
    let bundles = Bundles::generated(1, 0);
    let at = |name: &str| bundles.path.join(name).to_string_lossy().into_owned();
    let (bundle, cloud_half, device_half) = (at(""), at("cloud"), at("device"));
    let short = at("short-key");
    std::fs::write(&short, "short").unwrap();
    let unix = format!("unix:{}", socket.display());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = listener.local_addr().unwrap().to_string();
    for (line, words) in [
        (&["device", "--http", "0.0.0.0:8080"][..], &["--http", "ssh -L"][..]),
        (&["device", "--http", "http://localhost"], &["--http", "scheme"]),
        (&["device", "--http", "nowhere.invalid"], &["--http", "nowhere.invalid"]),
        (&["device", "--http", &taken], &["listening at", &taken, "in use"]),
        (&["device", "--http", &unix, "--threads", "0"], &["--threads", "at least 1"]),
        (&["device", "--http", &unix, "--threads", "100000"], &["--threads", "at most 1024"]),
        (&["device", "--http", &unix, "--cloud", "10.1.2.3"], &["--cloud", "ssh -L"]),
        (&["device", "--http", &unix, "--cloud", "a b"], &["--cloud", "host name"]),
        (&["device", "--http", &unix, "--cloud", "localhost:0"], &["--cloud", "port 0"]),
        (&["device", "--http", &unix, "--drain=-1"], &["--drain"]),
        (&["device", "--http", &unix, "--allow-host", "a:b:c"], &["--allow-host"]),
        (&["device", "--cloud", "7433", "--link", "memory"], &["--link", "--cloud"]),
        (&["device", "--bundle", "/nowhere/bundle"], &["/nowhere/bundle", "no such file"]),
        (&["device", "--bundle", &cloud_half], &["cloud half", "the device half is wanted"]),
        (&["cloud", &device_half], &["device half", "the cloud half is wanted"]),
        (&["device", "--bundle", &bundle, "--api-key-file", &short], &["16", "remove the file"]),
        (&["device", "--bundle", &bundle, "--split-layer", "3"], &["--split-layer", "cut after 1"]),
        (&["device", "--bundle", &bundle, "--tail-layers", "3"], &["--tail-layers", "has 0"]),
        (&["cloud", "--listen", "0.0.0.0"], &["--listen", "ssh -L"]),
        (&["cloud", "--listen", "[::]:7433"], &["--listen", "ssh -L"]),
        (&["cloud", "--idle-after=-3"], &["--idle-after"]),
        (&["cloud", "--sessions-max", "0"], &["--sessions-max"]),
        (&["cloud", "--kv-rows-max", "0"], &["--kv-rows-max"]),
        (&["cloud", "--stages", "0"], &["--stages"]),
        (&["cloud", "--threads", "0"], &["--threads", "at least 1"]),
        (&["cloud", "--threads", "5000"], &["--threads", "at most 1024"]),
        (&["cloud", "--link", "memory"], &["--link", "mio"]),
        (&["generate", "-p", "x", "--cloud", "box:70000"], &["--cloud", "65535"]),
        (&["generate", "-p", "x", "--temperature", "-1"], &["--temperature", "0..=100"]),
        (&["generate", "-p", "x", "--max-tokens", "0"], &["--max-tokens", "at least 1"]),
        (&["generate", "-p", "x", "--threads", "0", "--whole"], &["--threads"]),
        (&["chat", "--top-p", "2"], &["--top-p", "0..=1"]),
        (&["demo", "--max-tokens", "0"], &["--max-tokens"]),
        (&["doctor", "--cloud", "::1"], &["--cloud", "brackets"]),
        // The default model is not fetched to find out that it has fewer layers.
        (&["pull", "--split-layer", "99"], &["--split-layer", "the model has 30"]),
        (&["cloud", "--split-layer", "30"], &["--split-layer", "the model has 30"]),
        (&["device", "--tail-layers", "28"], &["--tail-layers", "the model has 30"]),
        (&["generate", "-p", "x", "--split-layer", "99"], &["--split-layer", "the model has 30"]),
        (&["chat", "--split-layer", "99"], &["--split-layer", "the model has 30"]),
        (&["doctor", "--split-layer", "99"], &["--split-layer", "the model has 30"]),
    ] {
        let home = Home::new();
        let output = home.run(line);
        assert!(!output.status.success(), "{line:?}");
        let said = said(&output);
        assert!(words.iter().all(|word| said.contains(word)), "{line:?}: {said}");
        assert!(home.is_empty() && !socket.exists(), "{line:?} left something: {said}");
    }
}

/// A variable that is set and empty is one that is not set, for every flag that has one.
#[test]
fn an_empty_variable_counts_as_unset() {
    let bundles = Bundles::generated(1, 0);
    let home = Home::new();
    let (path, line) = (bundles.path.to_string_lossy(), ["generate", "-p", "x", "--raw"]);
    let line = [&line[..], &["--max-tokens", "4", "--json", "--bundle", &path]].concat();
    let plain = text(&home.run(&line));
    let help = text(&home.run(&["device", "--help"])) + &text(&home.run(&["cloud", "--help"]));
    let mut command = home.command(&line);
    let mut count = 0;
    for name in help.split("[env: ").skip(1).filter_map(|rest| rest.split('=').next()) {
        command.env(name, "");
        count += 1;
    }
    assert!(count > 20, "{count} variables in the help");
    let ids = |text: &str| text.split("finish_reason").next().unwrap().to_owned();
    assert_eq!(ids(&text(&command.output().unwrap())), ids(&plain));
    let output = home.command(&line).env("HAT_CLOUD", "::1").output().unwrap();
    assert!(said(&output).contains("--cloud"), "one that is not empty counts: {}", said(&output));
}

/// No wait helps against a name that nobody has.
#[test]
fn an_unknown_host_ends_a_command_at_once() {
    let bundles = Bundles::generated(1, 0);
    let home = Home::new();
    let path = bundles.path.to_string_lossy();
    let line = ["generate", "-p", "x", "--raw", "--bundle", &path, "--cloud", "box.invalid"];
    // Were it retried, this would take an hour.
    let line = [&line[..], &["--reconnect-s", "3600"]].concat();
    let mut child = home.command(&line).stderr(Stdio::piped()).spawn().unwrap();
    let patience = Instant::now() + Duration::from_secs(120);
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > patience {
            child.kill().unwrap();
            panic!("it is retried");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("box.invalid is unknown"), "{}", said(&output));
}

/// A word that is no command starts the program of that name: one that stands beside this program,
/// or one in PATH.
#[cfg(unix)]
#[test]
fn another_word_starts_the_program_of_that_name() {
    use std::os::unix::fs::symlink;

    let home = Home::new();
    let words = ["hello", "a b", "--flag", "-x"];
    let output = home.run(&words);
    assert_eq!(output.status.code(), Some(1));
    let complaint = said(&output);
    assert!(complaint.contains("hat-hello") && complaint.contains("doctor"), "{complaint}");
    assert!(said(&home.run(&["../hello"])).contains("no command"));

    let found = tempfile::tempdir().unwrap();
    symlink("/bin/echo", found.path().join("hat-hello")).unwrap();
    symlink("/bin/false", found.path().join("hat-fail")).unwrap();
    let output = home.command(&words).env("PATH", found.path()).output().unwrap();
    assert_eq!(output.stdout, b"a b --flag -x\n", "{}", said(&output));
    let output = home.command(&["fail"]).env("PATH", found.path()).output().unwrap();
    assert_eq!((output.status.code(), said(&output).as_str()), (Some(1), ""));

    // A link on the same disk, since a program that has just been written may be busy.
    let beside = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let program = beside.path().join("hat-engine");
    std::fs::hard_link(env!("CARGO_BIN_EXE_hat-engine"), &program).unwrap();
    symlink("/bin/echo", beside.path().join("hat-fail")).unwrap();
    let mut command = Command::new(program);
    let output = command.args(["fail", "no"]).env("PATH", found.path()).output().unwrap();
    assert_eq!(output.stdout, b"no\n", "{}", said(&output));
}
