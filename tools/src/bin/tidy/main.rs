//! The tree's own style check: what `docs/STYLE.md` and `docs/ARCHITECTURE.md` promise and a
//! machine can see. `cargo run -p hat-tools --bin tidy [ROOT]` prints `file:line: reason` for each
//! finding and exits 1 if there is one.
//!
//! - [`rules`] is the table: words, where they may stand, why not elsewhere. Change it together
//!   with `docs/ARCHITECTURE.md`.
//! - [`code`] applies the table and the sizes to Rust files; [`prose`] looks at documents, links,
//!   hosts and paths.
//!
//! The rest is clippy's: `[workspace.lints]` and `clippy.toml`.

mod code;
mod prose;
mod rules;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use hat_program::out::{self, OutError};
use hat_program::{note, outln};

/// All text files of the tree, by path from its root with `/` between names.
type Tree = BTreeMap<String, String>;

/// A breach of a rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Finding {
    file: String,
    /// From 1; 0 for the file as a whole.
    line: usize,
    reason: String,
}

impl Finding {
    fn new(file: &str, line: usize, reason: impl Into<String>) -> Self {
        Self { file: file.to_owned(), line, reason: reason.into() }
    }
}

fn main() -> ExitCode {
    let root = match std::env::args_os().nth(1) {
        Some(root) => PathBuf::from(root),
        // The tools' manifest stands one below the root.
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join(".."),
    };
    let tree = match read(&root) {
        Ok(tree) => tree,
        Err(error) => {
            note!("{}: {error}", root.display());
            return ExitCode::from(2);
        }
    };
    let findings = check(&tree);
    let printed = print(&findings, tree.len());
    match findings.is_empty() || printed.is_err() {
        true => out::finish("tidy", printed.map_err(Into::into)),
        false => ExitCode::FAILURE,
    }
}

fn print(findings: &[Finding], files: usize) -> Result<(), OutError> {
    for Finding { file, line, reason } in findings {
        outln!("{file}:{line}: {reason}")?;
    }
    if findings.is_empty() {
        return outln!("tidy: {files} files, nothing to say");
    }
    outln!("tidy: {} findings", findings.len())
}

/// Every rule over every file, in order of file and line.
fn check(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (file, text) in tree {
        if file.ends_with(".rs") {
            code::check(file, text, tree, &mut findings);
        }
        prose::check(file, text, tree, &mut findings);
    }
    prose::check_documents(tree, &mut findings);
    findings.sort();
    findings.dedup();
    findings
}

/// The files that git knows or would add, as far as they are text.
fn read(root: &Path) -> std::io::Result<Tree> {
    let listed = Command::new("git")
        .arg("-C")
        .arg(root)
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .output()?;
    if !listed.status.success() {
        return Err(std::io::Error::other(String::from_utf8_lossy(&listed.stderr)));
    }
    let mut tree = Tree::new();
    for name in listed.stdout.split(|&byte| byte == 0) {
        let name = String::from_utf8_lossy(name).into_owned();
        // Deleted but not yet staged files are listed too, and folders for submodules.
        let path = root.join(&name);
        if name.is_empty() || !path.is_file() {
            continue;
        }
        if let Ok(text) = String::from_utf8(std::fs::read(path)?) {
            tree.insert(name, text);
        }
    }
    Ok(tree)
}
