//! Rules on all text: documents that must be there, paths and links that must lead somewhere,
//! hosts and machine paths that must not be named.

use crate::code::{check_lines, is_word_char};
use crate::rules::{
    BANS, BORDERS, FROZEN, GENERATED, HOSTS, MACHINE_PATHS, OPENINGS, README_COMMANDS, REGISTRIES,
    REQUIRED, TOP, UNSAFE_ROOMS,
};
use crate::{Finding, Tree, code};

/// Lock files and the like are not written by us.
const NOT_OURS: &[&str] = &["Cargo.lock", "LICENSE-APACHE", "LICENSE-MIT"];
/// Data for tests: texts of others.
const DATA: &[&str] = &[".json", ".jsonl", ".txt"];

pub(crate) fn check(file: &str, text: &str, tree: &Tree, findings: &mut Vec<Finding>) {
    if NOT_OURS.contains(&file) || code::is_in(file, GENERATED) {
        return;
    }
    check_lines(file, text, findings);
    if file.ends_with(".rs") && !code::is_in(file, FROZEN) {
        check_openings(file, text, findings);
    }
    if DATA.iter().any(|end| file.ends_with(end)) {
        return;
    }
    let mut report = |offset: usize, reason: String| {
        findings.push(Finding::new(file, line_of(text, offset), reason));
    };
    for (offset, host) in hosts(text) {
        if !HOSTS.contains(&host) {
            report(
                offset,
                format!("host `{host}` is not on tidy's list: name what is there, not where"),
            );
        }
    }
    for registry in REGISTRIES {
        for (offset, _) in text.match_indices(registry) {
            report(offset, format!("`{registry}`: name the package, not its registry's host"));
        }
    }
    for start in MACHINE_PATHS {
        for (offset, _) in text.match_indices(start) {
            let before = text[..offset].chars().next_back();
            if before.is_none_or(|c| !c.is_alphanumeric() && !"_-.~}/".contains(c)) {
                report(offset, format!("`{start}..` exists on one machine only"));
            }
        }
    }
    if file.ends_with(".md") {
        check_links(file, text, tree, &mut report);
    }
}

/// The first word of a doc comment is none of [`OPENINGS`].
fn check_openings(file: &str, text: &str, findings: &mut Vec<Finding>) {
    let mut before = None;
    for (number, line) in (1..).zip(text.lines().map(str::trim_start)) {
        let mark = ["///", "//!"].into_iter().find(|mark| line.starts_with(mark));
        let first = mark.filter(|_| mark != before).map_or("", |mark| line[mark.len()..].trim());
        // A line below a heading begins anew.
        before = mark.filter(|mark| !line[mark.len()..].trim_start().starts_with("# "));
        let begins = |opening: &&&str| {
            first.strip_prefix(**opening).is_some_and(|rest| !rest.starts_with(is_word_char))
        };
        if let Some(opening) = OPENINGS.iter().find(begins) {
            let reason = format!("`{opening} ..`: a doc line says what the thing is");
            findings.push(Finding::new(file, number, reason));
        }
    }
}

/// `scheme://host` of each URL that names a host.
fn hosts(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.match_indices("://").filter_map(|(at, _)| {
        let scheme = text[..at].rsplit(|c: char| !c.is_ascii_alphanumeric()).next()?;
        let rest = &text[at + 3..];
        let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || ".-[]:".contains(c)));
        let host = &rest[..end.unwrap_or(rest.len())];
        let bracket = host.starts_with('[').then(|| host.find(']').map(|end| end + 1)).flatten();
        let host = &host[..bracket.or_else(|| host.find(':')).unwrap_or(host.len())];
        let host = host.trim_end_matches('.');
        let named = ["http", "https", "git", "ssh", "ftp"].contains(&scheme) && !host.is_empty();
        named.then_some((at, host))
    })
}

/// Links to files, and paths of ours in backticks, lead somewhere.
fn check_links(file: &str, text: &str, tree: &Tree, report: &mut impl FnMut(usize, String)) {
    let folder = file.rsplit_once('/').map_or("", |(folder, _)| folder);
    let exists = |path: &str| exists(tree, path);
    for (at, _) in text.match_indices("](") {
        let Some((target, _)) = text[at + 2..].split_once(')') else {
            continue;
        };
        let path = target.split(['#', ' ']).next().unwrap_or_default();
        if path.is_empty() || target.contains("://") {
            continue;
        }
        if !exists(&normal(&format!("{folder}/{path}"))) {
            report(at, format!("link to `{path}`: there is no such file"));
        }
    }
    let mut offset = 0;
    for (index, span) in text.split('`').enumerate() {
        if index % 2 == 1 && TOP.iter().any(|top| span.starts_with(top)) {
            for path in expand(span.split(':').next().unwrap_or_default()) {
                if !path.contains(['*', ' ', '<', '$']) && !exists(&path) {
                    report(offset, format!("`{path}`: there is no such file"));
                }
            }
        }
        offset += span.len() + 1;
    }
}

/// `a/{b,c}.rs` is `a/b.rs` and `a/c.rs`.
fn expand(path: &str) -> Vec<String> {
    let parts = path
        .split_once('{')
        .and_then(|(front, rest)| rest.split_once('}').map(|(list, back)| (front, list, back)));
    match parts {
        None => vec![path.to_owned()],
        Some((front, list, back)) => {
            list.split(',').flat_map(|item| expand(&format!("{front}{item}{back}"))).collect()
        }
    }
}

/// Each path that a rule names is there; a tree without these rules has none of them.
fn check_rules(tree: &Tree, findings: &mut Vec<Finding>) {
    const FILE: &str = "tools/src/bin/tidy/rules.rs";
    let Some(text) = tree.get(FILE) else { return };
    let lists = BANS.iter().flat_map(|ban| [ban.paths, ban.except]);
    let lists = lists.chain([UNSAFE_ROOMS, GENERATED]);
    let gone = |path: &&&str| !tree.keys().any(|file| file.starts_with(**path));
    for path in lists.flatten().filter(gone) {
        let line = text.lines().position(|line| line.contains(&format!("\"{path}\"")));
        let reason = format!("`{path}`: there is no such file, and a rule for it");
        findings.push(Finding::new(FILE, line.map_or(0, |line| line + 1), reason));
    }
}

/// A file, or a folder with files in it.
fn exists(tree: &Tree, path: &str) -> bool {
    let below = format!("{}/", path.trim_end_matches('/'));
    tree.contains_key(path) || tree.keys().any(|file| file.starts_with(&below))
}

/// Rules on the tree as a whole.
pub(crate) fn check_documents(tree: &Tree, findings: &mut Vec<Finding>) {
    for file in REQUIRED {
        if !tree.contains_key(*file) {
            findings.push(Finding::new(file, 0, "this file is missing"));
        }
    }
    check_rules(tree, findings);
    let readme = tree.get("README.md").map_or("", String::as_str);
    for command in README_COMMANDS {
        if !readme.contains(command) {
            findings.push(Finding::new(
                "README.md",
                0,
                format!("the command `{command}` is missing"),
            ));
        }
    }
    for (file, others) in BORDERS {
        let manifest = tree.get(*file).map_or("", String::as_str);
        let dependencies = manifest.split("[dev-dependencies]").next().unwrap_or_default();
        for (number, line) in (1..).zip(dependencies.lines()) {
            if let Some(other) = others.iter().find(|other| line.trim_start().starts_with(**other))
            {
                let reason = format!("{other}: this crate does not know that one");
                findings.push(Finding::new(file, number, reason));
            }
        }
    }
}

/// The line of an offset, from 1.
pub(crate) fn line_of(text: &str, offset: usize) -> usize {
    1 + text.as_bytes()[..offset].iter().filter(|&&byte| byte == b'\n').count()
}

/// A path without `.` and `..`.
fn normal(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}
