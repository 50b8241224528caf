//! Sources of the prompt of `generate`: an argument, a file, standard input; never two at once.
#![cfg(target_os = "linux")]
use std::fs::File;
use std::io::Write as _;
use std::process::{Command, Output, Stdio};

use hat_program::pull;

const TEXT: &str = "- Name a colour,\n- and say why.";

fn generate(args: &[&str], stdin: impl Into<Stdio>) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hat-engine"));
    command.args(["generate", "--max-tokens", "2", "--json"]).args(args);
    command.stdin(stdin).output().unwrap()
}

/// The answer's token ids and the prompt's length, which name the prompt well enough.
fn answer(args: &[&str], stdin: impl Into<Stdio>) -> (serde_json::Value, serde_json::Value) {
    let output = generate(args, stdin);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {said}");
    let last = String::from_utf8(output.stdout).unwrap().lines().last().unwrap().to_owned();
    let object: serde_json::Value = serde_json::from_str(&last).unwrap();
    (object["logits_blake3"].clone(), object["timings"]["prompt_n"].clone())
}

fn refused(args: &[&str], stdin: impl Into<Stdio>, why: &str) {
    let output = generate(args, stdin);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.contains(why), "{args:?}: {said}");
    assert!(output.stdout.is_empty(), "{args:?}");
}

/// A pipe with a text in it and nobody who writes more.
fn piped(text: &str) -> Stdio {
    let (reader, mut writer) = std::io::pipe().unwrap();
    writer.write_all(text.as_bytes()).unwrap();
    reader.into()
}

#[test]
fn every_source_gives_the_same_prompt() {
    pull::default_bundle(&pull::cache_dir().unwrap(), 2, 0).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("prompt.txt");
    let line = format!("{TEXT}\n");
    std::fs::write(&path, &line).unwrap();
    let by_file = format!("@{}", path.display());
    let expected = answer(&["-p", TEXT], Stdio::null());
    for (args, stdin) in [
        (&["--", TEXT][..], Stdio::null()),
        (&["--prompt", TEXT], Stdio::null()),
        (&[&by_file], Stdio::null()),
        (&["-p", &by_file], Stdio::null()),
        (&["-"], piped(&line)),
        (&["-p", "-"], piped(TEXT)),
        (&[], piped(&line)),
        (&[], File::open(&path).unwrap().into()),
    ] {
        assert_eq!(answer(args, stdin), expected, "{args:?}");
    }
    // As it is: the line break at the end counts.
    let raw = answer(&["--raw", "-p", &line], Stdio::null());
    assert_eq!(answer(&["--raw"], piped(&line)), raw);
    assert_eq!(answer(&["--raw", &by_file], Stdio::null()), raw);
    assert_ne!(answer(&["--raw"], piped(TEXT)), raw);
    // A text that begins with the sign of a file.
    let mail = answer(&["@@bob says hi"], Stdio::null());
    assert_eq!(answer(&[], piped("@bob says hi")), mail);
}

#[test]
fn a_given_prompt_and_text_at_standard_input_are_one_too_many() {
    pull::default_bundle(&pull::cache_dir().unwrap(), 2, 0).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("text");
    std::fs::write(&path, "text").unwrap();
    let two = "leave one of them out";
    refused(&["-p", "Hello"], piped("text"), two);
    refused(&["Hello"], piped("text"), two);
    refused(&["Hello"], File::open(&path).unwrap(), two);
    refused(&[&format!("@{}", path.display())], piped("text"), two);
    refused(&["Hello", "-p", "Hello"], Stdio::null(), "cannot be used with");

    // Standard input of a script that says nothing: no terminal, and no text.
    let expected = answer(&["Hello"], Stdio::null());
    let (open, writer) = std::io::pipe().unwrap();
    assert_eq!(answer(&["Hello"], open), expected);
    drop(writer);
    assert_eq!(answer(&["Hello"], piped("")), expected);
    let read = File::open(&path).unwrap();
    std::io::copy(&mut &read, &mut std::io::sink()).unwrap();
    assert_eq!(answer(&["Hello"], read), expected);
}

#[test]
fn no_prompt_is_an_error() {
    let none = "no prompt is given";
    refused(&[], Stdio::null(), none);
    refused(&[], piped(""), none);
    refused(&[], piped("\n"), none);
    refused(&["-"], Stdio::null(), "standard input is empty");
    refused(&["--system", "-", "Hello"], Stdio::null(), "--system");
    refused(&["@no/such/file"], Stdio::null(), "@@ stands for a first @");
}
