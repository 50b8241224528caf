//! The commands of README work as they are typed: each is read by this program, or starts one of
//! ours.

use std::path::Path;

use clap::Parser as _;

use super::{Cli, Command};

/// The indented lines of a Markdown text, without their remarks.
fn commands(text: &str) -> Vec<Vec<String>> {
    let lines = text.lines().filter_map(|line| line.strip_prefix("    "));
    lines.map(|line| words(line.split(" # ").next().unwrap_or(line))).collect()
}

/// The words of a command line, as far as README's go: spaces and double quotes.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    for (index, part) in line.split('"').enumerate() {
        match index % 2 {
            0 => words.extend(part.split_whitespace().map(str::to_owned)),
            _ => words.push(part.to_owned()),
        }
    }
    words
}

fn tool_exists(name: &str) -> bool {
    let bin = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools/src/bin");
    bin.join(format!("{name}.rs")).is_file() || bin.join(name).join("main.rs").is_file()
}

#[test]
fn the_commands_of_readme_are_commands() {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let text = std::fs::read_to_string(readme).unwrap();
    let mut count = 0;
    for line in commands(&text) {
        let Some(program) = line.first() else { continue };
        if program == "hat-engine" {
            let command = Cli::try_parse_from(&line).map_err(|error| error.to_string());
            let command = command.unwrap_or_else(|error| panic!("{line:?}: {error}")).command;
            if let Command::Other(words) = command {
                let word = words[0].to_string_lossy();
                assert!(tool_exists(&format!("hat-{word}")), "{line:?}");
            }
            count += 1;
        } else if program.starts_with("hat-") {
            assert!(tool_exists(program), "{line:?}");
        }
    }
    assert!(count >= 6, "{count} commands in README");
    // The programs are built and found before the first of them is used.
    let place = |words: &str| text.find(words).unwrap_or_else(|| panic!("no {words:?} in README"));
    assert!(place("    cargo build --release") < place("    export PATH="));
    assert!(place("    export PATH=") < place("    hat-engine "));
}

#[test]
fn a_line_is_read_as_a_shell_would() {
    assert_eq!(
        commands("    a -p \"b c\" d   # why\ntext\n    e\n"),
        [vec!["a", "-p", "b c", "d"], vec!["e"]]
    );
}
