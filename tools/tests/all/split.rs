//! `hat-split` with flags that can't work, and on a disk that is full: a limit on the size of files
//! stands for it.
#![cfg(unix)]
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/golden/gguf/llama_bpe.gguf")
}

/// Splits a small model with files of at most `blocks` times 512 bytes.
fn split(out: &Path, blocks: u32) -> Output {
    Command::new("/bin/sh")
        // The signal that comes with the limit ends a process; a full disk sends none.
        .args(["-c", &format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"")])
        .arg(env!("CARGO_BIN_EXE_hat-split"))
        .arg(model())
        .args(["--split-layer", "0", "--out"])
        .arg(out)
        .output()
        .unwrap()
}

/// A wrong flag is refused before the default model is fetched and before anything is written.
#[test]
fn a_wrong_flag_has_no_effect() {
    let home = tempfile::tempdir().unwrap();
    let full = tempfile::tempdir().unwrap();
    std::fs::write(full.path().join("file"), "").unwrap();
    std::fs::write(full.path().join("bad"), "no drafter").unwrap();
    let [out, taken] = [home.path().join("out"), full.path().to_owned()];
    let bad = full.path().join("bad").to_string_lossy().into_owned();
    let model = model().to_string_lossy().into_owned();
    for (line, out, words) in [
        (&["default", "--split-layer", "99"][..], &out, &["--split-layer", "has 30"][..]),
        (&["default", "--tail-layers", "28"], &out, &["--tail-layers", "has 30"]),
        (&["default", "--pre", "llama3"], &out, &["--pre", "leave it out"]),
        (&["default"], &taken, &["--out", "not empty"]),
        (&["default", "--adapter", "/no/drafter"], &out, &["--adapter: /no/drafter: No such"]),
        (&[&model, "--split-layer", "0", "--adapter", &bad], &out, &["--adapter", "safetensors"]),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hat-split"));
        command.env("PATH", "/nowhere").env("HOME", home.path()).env_remove("XDG_CACHE_HOME");
        let output = command.args(line).arg("--out").arg(out).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(words.iter().all(|word| said.contains(word)), "{line:?}: {said}");
        assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 0, "{line:?}: {said}");
    }
}

#[test]
fn a_full_disk_leaves_nothing_of_a_bundle() {
    let parent = tempfile::tempdir().unwrap();
    let out = parent.path().join("bundle");
    let mut refused = Vec::new();
    // The file that does not fit is another one each time.
    let mut blocks = 0;
    let said = loop {
        let output = split(&out, blocks);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() {
            break said;
        }
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("File too large") && !said.contains("panicked"), "{said}");
        assert!(said.contains(parent.path().to_str().unwrap()), "{said}");
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 0, "{blocks}: {said}");
        let name = ["device/weights", "cloud/weights", "bundle.json", "tokenizer.json"]
            .into_iter()
            .find(|name| said.contains(name));
        refused.extend(name);
        assert!(blocks < 1 << 20, "{said}");
        blocks = (blocks * 3 / 2).max(blocks + 1);
    };
    assert!(refused.contains(&"device/weights"), "{refused:?}");
    assert!(out.join("device/bundle.json").is_file() && out.join("cloud/bundle.json").is_file());
    assert!(!said.contains("File too large"), "{said}");
    assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 1);
}
