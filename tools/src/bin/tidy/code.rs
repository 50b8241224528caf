//! Rules on Rust files: sizes, words that may not stand somewhere, files that no crate reaches. A
//! file is read line by line, without comments and up to its own module of tests; what is between
//! quotes counts as code.

use crate::rules::{
    BANS, COLUMNS_MAX, EMPTY_NAMES, FILE_LINES_MAX, GENERATED, PROGRAMS, TESTS, UNDONE,
    UNSAFE_ROOMS,
};
use crate::{Finding, Tree};

pub(crate) fn check(file: &str, text: &str, tree: &Tree, findings: &mut Vec<Finding>) {
    if is_in(file, GENERATED) {
        return;
    }
    let mut report = |line: usize, reason: String| findings.push(Finding::new(file, line, reason));
    for (line, text) in (1..).zip(text.lines()) {
        let columns = text.chars().count();
        if columns > COLUMNS_MAX {
            report(line, format!("{columns} columns, at most {COLUMNS_MAX}: break the line"));
        }
        for word in UNDONE.iter().filter(|word| has(text, word)) {
            report(line, format!("`{word}`: do it, or write an issue"));
        }
    }
    if let Some(part) = file.trim_end_matches(".rs").split('/').find(|p| EMPTY_NAMES.contains(p)) {
        report(0, format!("`{part}` says nothing: name the file for what it does"));
    }
    for (line, _) in code(text, false).filter(|(_, text)| text.contains(concat!("fn g", "et_"))) {
        report(line, "leave out the `get_`".into());
    }
    if !is_in(file, UNSAFE_ROOMS) {
        for (line, _) in code(text, false).filter(|(_, text)| has(text, "unsafe")) {
            let reason = "`unsafe` outside of its rooms, which tools/src/bin/tidy/rules.rs lists";
            report(line, reason.into());
        }
    }
    let is_test = TESTS.iter().any(|part| file.contains(part));
    for ban in BANS {
        let applies = match ban.paths {
            [] => !is_test && !PROGRAMS.iter().any(|part| file.contains(part)),
            paths => !is_test && is_in(file, paths),
        };
        if !applies || is_in(file, ban.except) {
            continue;
        }
        for (line, text) in code(text, true) {
            for word in ban.words.iter().filter(|word| has(text, word)) {
                report(line, format!("`{word}`: {}", ban.reason));
            }
        }
    }
    if !is_reached(file, tree) {
        report(0, "no crate reaches this file: delete it, or declare its module".into());
    }
}

/// The size of a file of any kind that has a limit.
pub(crate) fn check_lines(file: &str, text: &str, findings: &mut Vec<Finding>) {
    let lines = text.lines().count();
    let limit = FILE_LINES_MAX.iter().find(|(end, _)| file.ends_with(end));
    if let Some((_, limit)) = limit.filter(|(_, limit)| lines > *limit && !is_in(file, GENERATED)) {
        let reason = format!("{lines} lines, at most {limit}: split it by concern");
        findings.push(Finding::new(file, 0, reason));
    }
}

/// Numbered lines without comments; up to an inline module of tests, if they are let off.
fn code(text: &str, without_tests: bool) -> impl Iterator<Item = (usize, &str)> {
    let tests = text.find("#[cfg(test)]\nmod tests {").filter(|_| without_tests);
    let lines = (1..).zip(text[..tests.unwrap_or(text.len())].lines());
    lines.map(|(number, line)| match line.trim_start().starts_with("//") {
        true => (number, ""),
        false => (number, line.split(" // ").next().unwrap_or_default()),
    })
}

/// True if a word stands in a line by itself. Ends that are no word characters need no boundary.
fn has(text: &str, word: &str) -> bool {
    let joins = |inner: Option<char>, outer: Option<char>| {
        inner.is_some_and(is_word_char) && outer.is_some_and(is_word_char)
    };
    text.match_indices(word).any(|(at, _)| {
        let (before, after) = (&text[..at], &text[at + word.len()..]);
        !joins(word.chars().next(), before.chars().next_back())
            && !joins(word.chars().next_back(), after.chars().next())
    })
}

pub(crate) fn is_word_char(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// True if a file is the root of a crate, or some file near it declares its module.
fn is_reached(file: &str, tree: &Tree) -> bool {
    let (folder, name) = file.rsplit_once('/').unwrap_or(("", file));
    let last = folder.rsplit('/').next().unwrap_or_default();
    let roots = ["lib.rs", "main.rs", "build.rs"];
    if roots.contains(&name) || ["bin", "tests"].contains(&last) {
        return true;
    }
    let (folder, stem) = match (name, folder.rsplit_once('/')) {
        ("mod.rs", Some((above, _))) => (above, last),
        _ => (folder, name.trim_end_matches(".rs")),
    };
    let near = |other: &str| {
        other.rsplit_once('/').is_some_and(|(place, _)| place == folder)
            || other.strip_suffix(".rs") == Some(folder)
    };
    let declared = format!("mod {stem};");
    // A path in an attribute or a manifest.
    let named = [format!("/{stem}/mod.rs\""), format!("/{name}\""), format!("\"{name}\"")];
    let code =
        tree.iter().filter(|(other, _)| other.ends_with(".rs") || other.ends_with("Cargo.toml"));
    code.into_iter().any(|(other, text)| {
        (near(other) && text.contains(&declared)) || named.iter().any(|named| text.contains(named))
    })
}

pub(crate) fn is_in(file: &str, paths: &[&str]) -> bool {
    paths.iter().any(|path| file.starts_with(path))
}
