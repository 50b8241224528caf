//! Each rule on a small tree that breaks it, and a good tree that it leaves alone.

mod documents;

use super::*;

/// A tree that has nothing to be said of, with these files changed or added.
fn tree(files: &[(&str, &str)]) -> Tree {
    let mut tree: Tree = [
        (
            "README.md",
            "    cargo run --release -p hat-engine -- demo\n    cargo test --workspace\n",
        ),
        ("CHANGELOG.md", ""),
        ("LICENSE-MIT", ""),
        ("LICENSE-APACHE", ""),
        ("CONTRIBUTING.md", ""),
        ("SECURITY.md", ""),
        ("docs/ARCHITECTURE.md", "Begin at `engine/src/lib.rs`; [protocol](PROTOCOL.md#hello).\n"),
        ("docs/PROTOCOL.md", "Numbers: <https://www.rfc-editor.org/rfc/rfc3720>.\n"),
        (".ci/run", ""),
        ("engine/Cargo.toml", "[package]\n"),
        ("engine/src/lib.rs", "//! Text.\nmod page;\nmod pack;\n"),
        ("engine/src/page.rs", "pub fn pages() {}\n"),
        ("engine/src/pack.rs", ""),
        ("engine/src/main.rs", "fn main() { outln!(\"hello\"); }\n"),
        ("transport/Cargo.toml", ""),
        ("transport/src/lib.rs", "mod frame;\nmod link;\n"),
        ("transport/src/frame.rs", ""),
        ("transport/src/link/mod.rs", ""),
    ]
    .into_iter()
    .map(|(file, text)| (file.to_owned(), text.to_owned()))
    .collect();
    for (file, text) in files {
        tree.insert((*file).to_owned(), (*text).to_owned());
    }
    tree
}

/// `file:line: reason` of all findings.
fn said(files: &[(&str, &str)]) -> Vec<String> {
    check(&tree(files)).iter().map(|f| format!("{}:{}: {}", f.file, f.line, f.reason)).collect()
}

/// Exactly one finding, at this place, whose reason has this text.
#[track_caller]
fn one(files: &[(&str, &str)], place: &str, reason: &str) {
    let said = said(files);
    assert_eq!(said.len(), 1, "{said:#?}");
    assert!(said[0].starts_with(&format!("{place}: ")), "{said:?} is not at {place}");
    assert!(said[0].contains(reason), "{said:?} does not say {reason}");
}

const LIB: &str = "engine/src/lib.rs";
const PAGE: &str = "engine/src/page.rs";
const FRAME: &str = "transport/src/frame.rs";

#[test]
fn a_good_tree_has_nothing_to_be_said_of() {
    assert_eq!(said(&[]), Vec::<String>::new());
}

#[test]
fn riddles() {
    for opening in ["What waits", "Whether it waits.", "So many of them", "Why."] {
        let text = format!("\nstruct A {{\n    /// {opening}\n    b: u8,\n}}\n");
        one(&[(PAGE, &text)], "engine/src/page.rs:3", "what the thing is");
    }
    let below = "/// Reads.\n///\n/// # Errors\n/// What the disk says.\npub fn f() {}\n";
    one(&[(PAGE, below)], "engine/src/page.rs:4", "`What ..`");
    let good = "//! Howl.\n\n/// Pages,\n/// Which are free.\n// What\npub fn pages() {}\n";
    assert!(said(&[(PAGE, good)]).is_empty());
    one(&[(PAGE, "//! How pages\npub fn f() {}")], "engine/src/page.rs:1", "`How ..`");
}

#[test]
fn sizes() {
    let long = format!("// {}\n", "é".repeat(98));
    one(&[(PAGE, &long)], "engine/src/page.rs:1", "101 columns");
    let fits = format!("// {}\n", "é".repeat(97));
    assert!(said(&[(PAGE, &fits)]).is_empty());
    one(&[(PAGE, &"\n".repeat(601))], "engine/src/page.rs:0", "601 lines");
    let lib = format!("mod page;\nmod pack;\n{}", "\n".repeat(149));
    one(&[(LIB, &lib)], "engine/src/lib.rs:0", "151 lines, at most 150");
    one(&[("cuda/kernels/a.cu", &"\n".repeat(401))], "cuda/kernels/a.cu:0", "at most 400");
}

#[test]
fn words_in_the_wrong_place() {
    for call in ["println!()", "print!(\"x\")", "eprintln!()", "eprint!(\"x\")"] {
        let main = format!("fn main() {{ {call} }}");
        one(&[("engine/src/main.rs", &main)], "engine/src/main.rs:1", "panics when nobody reads");
        one(&[(PAGE, &main)], "engine/src/page.rs:1", "does not print");
    }
    one(&[(FRAME, "use std::fs;")], "transport/src/frame.rs:1", "is pure");
    one(&[(FRAME, "use crate::backend::Backend;")], "transport/src/frame.rs:1", "is pure");
    let now = "fn f() { let t = std::time::Instant::now(); }";
    one(&[(LIB, &format!("mod page;\nmod pack;\n{now}"))], "engine/src/lib.rs:3", "read the Clock");
    assert!(said(&[("transport/src/link/mod.rs", now)]).is_empty());
    assert!(said(&[("engine/src/main.rs", now)]).is_empty());
    one(&[("engine/src/main.rs", "use axum::Router;")], "engine/src/main.rs:1", "async runtime");
    one(&[(PAGE, concat!("// TO", "DO: all"))], "engine/src/page.rs:1", "write an issue");
    // Parts of words and comments are not the word.
    let text = "// Backend\n    //! std::fs\nfn f(a: BackendError) {} // std::io";
    assert!(said(&[(FRAME, text)]).is_empty());
}

#[test]
fn tests_are_let_off() {
    let inline = "fn f() {}\n#[cfg(test)]\nmod tests {\n    use std::fs;\n}\n";
    assert!(said(&[(FRAME, inline)]).is_empty());
    one(&[(FRAME, &format!("use std::fs;\n{inline}"))], "transport/src/frame.rs:1", "is pure");
    let tests = ("transport/src/frame/tests.rs", "use std::fs;");
    let file = [(FRAME, "#[cfg(test)]\nmod tests;\n"), tests];
    assert!(said(&file).is_empty());
    assert!(said(&[("engine/tests/all/main.rs", "fn f() { print!() }")]).is_empty());
}

#[test]
fn names_that_say_nothing() {
    let lib = "mod page;\nmod pack;\nmod utils;";
    one(&[(LIB, lib), ("engine/src/utils.rs", "")], "engine/src/utils.rs:0", "says nothing");
    one(&[(PAGE, concat!("pub fn g", "et_page() {}"))], "engine/src/page.rs:1", "leave out");
}

#[test]
fn unsafe_has_rooms() {
    one(&[(PAGE, "fn f() { unsafe { g() } }")], "engine/src/page.rs:1", "its rooms");
    assert!(said(&[(PAGE, "#![deny(unsafe_code)] // unsafe\n")]).is_empty());
    let room = [("loader/src/lib.rs", "mod map;"), ("loader/src/map.rs", "unsafe fn f() {}")];
    assert!(said(&room).is_empty());
}

#[test]
fn files_that_no_crate_reaches() {
    one(&[("engine/src/old.rs", "")], "engine/src/old.rs:0", "no crate reaches");
    one(&[("engine/src/page/old/mod.rs", "")], "engine/src/page/old/mod.rs:0", "no crate reaches");
    let nested = [
        (PAGE, "mod b;\nmod c;\n#[path = \"../x.rs\"]\nmod d;"),
        ("engine/src/page/b.rs", ""),
        ("engine/src/page/c/mod.rs", ""),
        ("engine/src/x.rs", ""),
    ];
    assert!(said(&nested).is_empty());
    let flat = [
        ("benches/Cargo.toml", "[[bench]]\npath = \"frame.rs\"\n"),
        ("benches/frame.rs", "fn main() { println!() }"),
    ];
    assert!(said(&flat).is_empty());
    one(&[flat[0], flat[1], ("benches/link.rs", "")], "benches/link.rs:0", "no crate reaches");
    let roots = ["engine/tests/x.rs", "engine/tests/x/main.rs", "engine/src/bin/x/main.rs"];
    roots.iter().for_each(|root| assert!(said(&[(root, "")]).is_empty(), "{root}"));
}

#[test]
fn documents() {
    let mut without = tree(&[("README.md", "cargo test --workspace")]);
    without.remove("docs/PROTOCOL.md");
    let findings = check(&without);
    let reasons: Vec<&str> = findings.iter().map(|f| f.reason.as_str()).collect();
    assert_eq!(findings.len(), 3, "{findings:?}");
    assert!(reasons.contains(&"this file is missing"));
    assert!(reasons.iter().any(|r| r.contains("-- demo")));
    assert!(reasons.iter().any(|r| r.contains("link to `PROTOCOL.md`")));
    let map = "docs/ARCHITECTURE.md";
    one(&[(map, "\n`engine/src/gone.rs`")], "docs/ARCHITECTURE.md:2", "no such file");
    one(&[(map, "`engine/src/{page,gone}.rs:12`")], "docs/ARCHITECTURE.md:1", "gone.rs");
    assert!(
        said(&[(map, "`engine/src/`, `engine/src/*.rs`, `engine/src`, `target/x.rs`")]).is_empty()
    );
    one(
        &[("loader/Cargo.toml", "\nhat-transport.workspace = true")],
        "loader/Cargo.toml:2",
        "does not know",
    );
    let of_tests = "\n[dev-dependencies]\nhat-compute.workspace = true";
    assert!(said(&[("cuda/Cargo.toml", of_tests)]).is_empty());
}

#[test]
fn hosts_and_machine_paths() {
    one(
        &[("docs/PROTOCOL.md", concat!("see https:/", "/mirror.example.net:80/x"))],
        "docs/PROTOCOL.md:1",
        "`mirror.example.net`",
    );
    let bare = concat!("from pypi", ".org");
    one(&[(".ci/run", bare)], ".ci/run:1", "name the package");
    let fine = "http://127.0.0.1:8080/v1 http://[::1]:80/ https://github.com/a/b. registry://x";
    assert!(said(&[("docs/PROTOCOL.md", fine)]).is_empty());
    let path = concat!("cd /ho", "me/me/x");
    one(&[(".ci/run", path)], ".ci/run:1", "one machine only");
    let part = concat!("$X/ho", "me/y a/tm", "p/b");
    assert!(said(&[(".ci/run", part)]).is_empty(), "part of a longer path");
    assert!(said(&[("engine/tests/data.json", path)]).is_empty(), "data is not ours");
}

#[test]
fn a_rule_for_a_file_that_is_gone_is_found() {
    const RULES: &str = "tools/src/bin/tidy/rules.rs";
    let said = said(&[(RULES, "const ROOMS: &[&str] = &[\n    \"loader/src/map.rs\",\n];\n")]);
    let map = format!("{RULES}:2: `loader/src/map.rs`: there is no such file, and a rule for it");
    assert!(said.contains(&map), "{said:#?}");
}

/// The tools' manifest stands one below the root.
fn this_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The whole check on the tree that this stands in: it can be read, and tidy itself is tidy.
#[test]
fn this_tree_is_tidy() {
    let tree = read(&this_root()).unwrap();
    assert!(tree.contains_key("tools/src/bin/tidy/rules.rs"));
    let said: Vec<String> =
        check(&tree).iter().map(|f| format!("{}:{}: {}", f.file, f.line, f.reason)).collect();
    assert!(said.is_empty(), "{said:#?}");
}
