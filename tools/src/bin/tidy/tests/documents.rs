//! Documents against code: each flag, item, package, program and command that a guide names is
//! there. `CHANGELOG.md` is history and may name things that are gone.

use std::collections::BTreeSet;

use super::{Tree, read, this_root};
use crate::code::is_word_char;
use crate::prose::line_of;

/// Flags of other programs: cargo, pip, and the Python script beside the benches.
const OTHERS_FLAGS: &[&str] =
    &["--path", "--open", "--no-binary", "--what", "--formats", "--flash"];
/// Words in backticks that are no items: a formula, headers, an instruction, conventions.
const OTHERS_WORDS: &[&str] =
    &["q_i", "Allow", "header_crc", "n8", "_max", "timeout_ms", "sched_setattr"];

/// Text in which an item may be defined.
fn is_code(file: &str) -> bool {
    const ENDS: &[&str] =
        &[".rs", ".toml", ".sh", ".py", ".cu", ".cuh", ".h", ".cpp", ".json", ".html"];
    file.starts_with(".ci/") || ENDS.iter().any(|end| file.ends_with(end))
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !is_word_char(c)).filter(|word| !word.is_empty())
}

/// Flags that a text spells, `--name`.
fn spelled(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.match_indices("--").filter_map(|(at, _)| {
        let name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        let before = text[..at].chars().next_back();
        let rest = &text[at + 2..];
        let end = rest.find(|c| !name(c)).unwrap_or(rest.len());
        let flag = text[at..at + 2 + end].trim_end_matches('-');
        let stands_alone = before.is_none_or(|c| !is_word_char(c) && c != '-');
        (stands_alone && rest.starts_with(|c: char| c.is_ascii_lowercase())).then_some((at, flag))
    })
}

/// Flags that the fields of a clap struct make: `#[arg(.. long ..)]`, then `name: Type`.
fn of_fields(text: &str, flags: &mut BTreeSet<String>) {
    let mut is_long = false;
    for line in text.lines().map(str::trim) {
        if line.starts_with("#[arg(") || line == "long," {
            is_long |= words(line).any(|word| word == "long");
        } else if let Some((name, _)) = line.split_once(": ")
            && is_long
            && !line.starts_with('/')
        {
            let name = name.rsplit(' ').next().unwrap_or_default();
            flags.insert(format!("--{}", name.replace('_', "-")));
            is_long = false;
        }
    }
}

/// Words after `marker`, such as the package of `-p`.
fn after<'a>(text: &'a str, marker: &'a str) -> impl Iterator<Item = (usize, &'a str)> {
    text.match_indices(marker).filter_map(move |(at, _)| {
        let rest = &text[at + marker.len()..];
        let end = rest.find(|c: char| !is_word_char(c) && c != '-').unwrap_or(rest.len());
        let is_name = rest[..end].starts_with(|c: char| c.is_ascii_lowercase());
        is_name.then_some((at, &rest[..end]))
    })
}

/// Names of a tree's code.
struct Code<'a> {
    tree: &'a Tree,
    words: BTreeSet<&'a str>,
    flags: BTreeSet<String>,
    /// Names of packages and of the targets that a manifest lists.
    targets: BTreeSet<&'a str>,
}

impl<'a> Code<'a> {
    fn new(tree: &'a Tree) -> Self {
        let flags = OTHERS_FLAGS.iter().map(|flag| (*flag).to_owned()).collect();
        let words_too = OTHERS_WORDS.iter().copied().collect();
        let mut code = Self { tree, words: words_too, flags, targets: BTreeSet::new() };
        for (file, text) in tree.iter().filter(|(file, _)| is_code(file)) {
            code.words.extend(words(text));
            code.flags.extend(spelled(text).map(|(_, flag)| flag.to_owned()));
            of_fields(text, &mut code.flags);
            if file.ends_with("Cargo.toml") {
                code.targets.extend(after(text, "name = \"").map(|(_, name)| name));
            }
        }
        code
    }

    /// A program, test or bench that cargo finds by its file, or that a manifest lists.
    fn has_target(&self, name: &str) -> bool {
        let ends = [format!("/{name}.rs"), format!("/{name}/main.rs")];
        self.targets.contains(name)
            || self.tree.keys().any(|file| ends.iter().any(|end| file.ends_with(end)))
    }

    fn has_command(&self, command: &str) -> bool {
        let variant = format!("    {}{}(", command[..1].to_uppercase(), &command[1..]);
        let tool = format!("tools/src/bin/hat-{command}");
        self.tree["engine/src/cli/mod.rs"].contains(&variant)
            || self.tree.keys().any(|file| file.starts_with(&tool))
    }

    /// Names in a document that are not in the code.
    fn unknown(&self, document: &str) -> Vec<String> {
        let text = &self.tree[document];
        let mut gone: Vec<(usize, &str)> =
            spelled(text).filter(|(_, flag)| !self.flags.contains(*flag)).collect();
        let mut at = 0;
        for (index, span) in text.split('`').enumerate() {
            let item = span.split('(').next().unwrap_or_default();
            let is_item = index % 2 == 1
                && item.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
                && item.chars().all(|c| is_word_char(c) || c == ':');
            if is_item && !words(item).all(|word| self.words.contains(word)) {
                gone.push((at, span));
            }
            at += span.len() + 1;
        }
        gone.extend(after(text, " -p ").filter(|(_, name)| !self.targets.contains(name)));
        for kind in ["--bench ", "--bin ", "--test "] {
            gone.extend(after(text, kind).filter(|(_, name)| !self.has_target(name)));
        }
        for marker in ["`hat-engine ", "    hat-engine ", "hat-engine -- "] {
            gone.extend(after(text, marker).filter(|(_, name)| !self.has_command(name)));
        }
        let line = |(at, name)| format!("{document}:{}: `{name}`", line_of(text, at));
        gone.into_iter().map(line).collect()
    }
}

#[test]
fn names_in_documents_are_in_the_code() {
    let tree = read(&this_root()).unwrap();
    let documents = tree.keys().filter(|file| file.ends_with(".md") && *file != "CHANGELOG.md");
    let code = Code::new(&tree);
    let unknown: Vec<String> = documents.flat_map(|file| code.unknown(file)).collect();
    assert!(unknown.is_empty(), "these are not in the code: {unknown:#?}");
}

#[test]
fn a_name_that_is_gone_is_found() {
    let tree = |text: &str| {
        let files = [
            ("docs/A.md", text),
            ("engine/src/cli/mod.rs", "    Pull(X),\n    #[arg(long, env)]\n    no_fuss: bool,\n"),
            ("tools/Cargo.toml", "name = \"hat-tools\"\n"),
            ("tools/src/bin/hat-sim/main.rs", "struct World; // --hidden --bin\n"),
        ];
        files.map(|(file, text)| (file.to_owned(), text.to_owned())).into_iter().collect::<Tree>()
    };
    let good = "`World`, `World()`, `--no-fuss`, `--hidden`; `hat-engine pull`, \
                `hat-engine sim`, `cargo run -p hat-tools --bin hat-sim`, a -- b, `x + y`";
    let unknown = |text: &str| Code::new(&tree(text)).unknown("docs/A.md");
    assert_eq!(unknown(good), Vec::<String>::new());
    for gone in [
        "`Gone`",
        "`World::gone(a)`",
        "`--fuss`",
        "`hat-engine push`",
        "`cargo run -p hat-gone`",
        "`cargo run --bin gone`",
    ] {
        assert_eq!(unknown(gone).len(), 1, "{gone}");
    }
}
