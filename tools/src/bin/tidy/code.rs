//! Rules on Rust files: sizes, words, names, unsafe.

use crate::Finding;
use crate::modules::Modules;
use crate::rules::{
    BANS, COLUMNS_MAX, EMPTY_NAMES, EMPTY_TYPES, FILE_LINES_MAX, FUNCTION_LINES_MAX, GENERATED,
    Scope, UNDONE, UNSAFE_ROOMS,
};
use crate::source::{Source, is_word_char, line_of};

pub(crate) fn check(file: &str, text: &str, modules: &Modules, findings: &mut Vec<Finding>) {
    if is_in(file, GENERATED) {
        return;
    }
    let source = Source::new(text);
    check_size(file, text, &source, findings);
    check_names(file, &source, findings);
    let mut report = |offset: usize, reason: String| {
        findings.push(Finding::new(file, line_of(text, offset), reason));
    };
    for ban in BANS {
        let in_scope = match ban.scope {
            Scope::Rust => true,
            Scope::Library => modules.is_library(file),
            Scope::Paths(paths) => is_in(file, paths),
        };
        if !in_scope || is_in(file, ban.except) || (ban.except_tests && modules.is_test(file)) {
            continue;
        }
        for word in ban.words {
            for offset in occurrences(&source.code, word) {
                if !(ban.except_tests && source.is_test(offset)) {
                    report(offset, format!("`{word}`: {}", ban.reason));
                }
            }
        }
    }
    if !is_in(file, UNSAFE_ROOMS) {
        for offset in occurrences(&source.code, "unsafe") {
            let reason = "`unsafe` outside of its rooms, which tools/src/bin/tidy/rules.rs lists";
            report(offset, reason.into());
        }
    }
    for word in UNDONE {
        for offset in occurrences(&source.comments, word) {
            report(offset, format!("`{word}`: do it, or write an issue"));
        }
    }
    for offset in occurrences(&source.code, "#[ignore]") {
        report(offset, "an ignored test says why: #[ignore = \"..\"]".into());
    }
}

fn check_size(file: &str, text: &str, source: &Source, findings: &mut Vec<Finding>) {
    for (number, line) in text.lines().enumerate() {
        let columns = line.chars().count();
        if columns > COLUMNS_MAX {
            let reason = format!("{columns} columns, at most {COLUMNS_MAX}: break the line");
            findings.push(Finding::new(file, number + 1, reason));
        }
    }
    for function in &source.functions {
        let first = line_of(text, function.span.start);
        let lines = line_of(text, function.span.end - 1) + 1 - first;
        if lines > FUNCTION_LINES_MAX {
            let name = &function.name;
            let reason =
                format!("fn {name} has {lines} lines, at most {FUNCTION_LINES_MAX}: split it");
            findings.push(Finding::new(file, first, reason));
        }
    }
}

/// The size of a file of any kind that has a limit.
pub(crate) fn check_lines(file: &str, text: &str, findings: &mut Vec<Finding>) {
    let limit = FILE_LINES_MAX.iter().find(|(end, _)| file.ends_with(end));
    let lines = text.lines().count();
    if let Some(&(_, limit)) = limit
        && lines > limit
        && !is_in(file, GENERATED)
    {
        let reason = format!("{lines} lines, at most {limit}: split it by concern");
        findings.push(Finding::new(file, 0, reason));
    }
}

fn check_names(file: &str, source: &Source, findings: &mut Vec<Finding>) {
    for part in file.trim_end_matches(".rs").split('/') {
        if EMPTY_NAMES.contains(&part) {
            let reason = format!("`{part}` says nothing: name the file for what it does");
            findings.push(Finding::new(file, 0, reason));
        }
    }
    for keyword in ["struct", "enum", "trait", "type"] {
        for offset in occurrences(&source.code, keyword) {
            let name = word_after(&source.code, offset + keyword.len());
            if EMPTY_TYPES.iter().any(|end| name.ends_with(end)) {
                let reason = format!("`{name}` says nothing: name the type for what it does");
                findings.push(Finding::new(file, line_of(&source.code, offset), reason));
            }
        }
    }
    for function in &source.functions {
        if let Some(rest) = function.name.strip_prefix("get_") {
            let line = line_of(&source.code, function.span.start);
            let reason = format!("fn get_{rest}: leave out the `get_`");
            findings.push(Finding::new(file, line, reason));
        }
    }
}

fn word_after(code: &str, offset: usize) -> &str {
    let rest = code[offset..].trim_start();
    &rest[..rest.find(|c: char| !is_word_char(c)).unwrap_or(rest.len())]
}

/// Offsets at which a word stands by itself. Ends that are no word characters need no boundary.
pub(crate) fn occurrences<'a>(text: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let whole = move |at: usize| {
        let before = text[..at].chars().next_back();
        let after = text[at + word.len()..].chars().next();
        let joins = |inner: Option<char>, outer: Option<char>| {
            inner.is_some_and(is_word_char) && outer.is_some_and(is_word_char)
        };
        !joins(word.chars().next(), before) && !joins(word.chars().next_back(), after)
    };
    text.match_indices(word).map(|(at, _)| at).filter(move |&at| whole(at))
}

pub(crate) fn is_in(file: &str, paths: &[&str]) -> bool {
    paths.iter().any(|path| file == *path || (path.ends_with('/') && file.starts_with(path)))
}
