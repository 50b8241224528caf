//! Modules of each crate, from the roots that cargo finds by itself down through each `mod name;`.
//! A file that no root reaches is dead.

use std::collections::BTreeMap;

use crate::source::Source;
use crate::{Finding, Tree};

/// Facts of each Rust file that is reached.
pub(crate) struct Modules {
    files: BTreeMap<String, Kind>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// Part of a library crate.
    Library,
    /// Part of a binary alone.
    Binary,
    /// A test or bench, or under `#[cfg(test)]`.
    Test,
}

impl Modules {
    /// Follows all modules; a `mod` without a file and a file without a `mod` are findings.
    pub(crate) fn find(tree: &Tree, findings: &mut Vec<Finding>) -> Self {
        let mut modules = Self { files: BTreeMap::new() };
        for file in tree.keys().filter(|file| file.ends_with(".rs")) {
            if let Some(kind) = root_kind(file, tree) {
                modules.follow(file, kind, true, tree, findings);
            }
        }
        for file in tree.keys().filter(|file| file.ends_with(".rs")) {
            if !modules.files.contains_key(file) {
                let reason = "no crate reaches this file: delete it, or declare its module";
                findings.push(Finding::new(file, 0, reason));
            }
        }
        modules
    }

    pub(crate) fn is_library(&self, file: &str) -> bool {
        self.files.get(file) == Some(&Kind::Library)
    }

    pub(crate) fn is_test(&self, file: &str) -> bool {
        self.files.get(file) == Some(&Kind::Test)
    }

    fn follow(
        &mut self,
        file: &str,
        kind: Kind,
        root: bool,
        tree: &Tree,
        findings: &mut Vec<Finding>,
    ) {
        // The same file may be reached twice; what is stricter counts.
        if self.files.get(file).is_some_and(|known| *known <= kind) {
            return;
        }
        self.files.insert(file.to_owned(), kind);
        let Some(text) = tree.get(file) else { return };
        let source = Source::new(text);
        for module in &source.modules {
            let test = module.attributes.contains("cfg(test)") || source.is_test(module.offset);
            let kind = if test { Kind::Test } else { kind };
            let candidates = candidates(file, root, &module.path, &module.attributes);
            match candidates.iter().find(|path| tree.contains_key(*path)) {
                Some(path) => self.follow(path, kind, false, tree, findings),
                None => {
                    let line = crate::source::line_of(text, module.offset);
                    let reason =
                        format!("mod {}: no file {}", module.path.join("::"), candidates[0]);
                    findings.push(Finding::new(file, line, reason));
                }
            }
        }
    }
}

/// Kind of the crate whose root cargo takes this file for.
fn root_kind(file: &str, tree: &Tree) -> Option<Kind> {
    let (folder, name) = file.rsplit_once('/')?;
    let is_crate = |folder: &str| tree.contains_key(&format!("{folder}/Cargo.toml"));
    let (parent, last) = folder.rsplit_once('/').unwrap_or(("", folder));
    match (last, name) {
        ("src", "lib.rs") if is_crate(parent) => Some(Kind::Library),
        ("src", "main.rs") if is_crate(parent) => Some(Kind::Binary),
        ("bin", _) => Some(Kind::Binary),
        (_, "main.rs") if parent.ends_with("src/bin") => Some(Kind::Binary),
        ("tests" | "examples" | "benches", _) if is_crate(parent) => Some(Kind::Test),
        (_, "main.rs") if ["/tests", "/benches"].iter().any(|end| parent.ends_with(end)) => {
            Some(Kind::Test)
        }
        (_, "build.rs") if is_crate(folder) => Some(Kind::Binary),
        // A flat crate, whose manifest names its files: benches.
        (_, _) if is_crate(folder) => is_named(folder, name, tree),
        (_, "main.rs") if is_crate(parent) => is_named(parent, &format!("{last}/main.rs"), tree),
        _ => None,
    }
}

/// Kind of the target that the manifest in `folder` gives `path` to.
fn is_named(folder: &str, path: &str, tree: &Tree) -> Option<Kind> {
    let manifest = &tree[&format!("{folder}/Cargo.toml")];
    manifest.contains(&format!("path = \"{path}\"")).then_some(Kind::Test)
}

/// Possible paths of a module's file.
fn candidates(file: &str, root: bool, path: &[String], attributes: &str) -> Vec<String> {
    let (folder, name) = file.rsplit_once('/').unwrap_or(("", file));
    if let Some(named) =
        attributes.split("path = \"").nth(1).and_then(|rest| rest.split('"').next())
    {
        return vec![normal(&format!("{folder}/{named}"))];
    }
    let own = name.trim_end_matches(".rs");
    let base = if root || own == "mod" { folder.to_owned() } else { format!("{folder}/{own}") };
    let path = path.join("/");
    vec![format!("{base}/{path}.rs"), format!("{base}/{path}/mod.rs")]
}

/// A path without `.` and `..`.
pub(crate) fn normal(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}
