//! Each rule on a small tree that breaks it, and a good tree that it leaves alone.

mod documents;

use super::*;
use crate::source::Source;

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
        ("transport/src/lib.rs", "mod link;\n"),
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

#[test]
fn a_good_tree_has_nothing_to_be_said_of() {
    assert_eq!(said(&[]), Vec::<String>::new());
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
    let body = |lines: usize| format!("\nfn f(x: [u8; 3]) {{\n{}}}\n", "    x;\n".repeat(lines));
    assert!(said(&[(PAGE, &body(68))]).is_empty());
    one(&[(PAGE, &body(69))], "engine/src/page.rs:2", "fn f has 71 lines");
}

#[test]
fn braces_in_strings_and_comments_do_not_count() {
    let text = "fn f<'a>(c: &'a char) -> bool {\n    // }\n    /* } /* } */ } */\n    \
                let s = (\"}\", r#\"}\"}\"#, '}', '\\'', b'}');\n    *c == '{'\n}\nfn g() {}\n";
    let source = Source::new(text);
    let spans: Vec<&str> = source.functions.iter().map(|f| &text[f.span.clone()]).collect();
    assert_eq!(spans.len(), 2);
    assert!(spans[0].ends_with("'{'\n}") && spans[1] == "fn g() {}");
}

#[test]
fn words_in_the_wrong_place() {
    one(&[(PAGE, "fn f() {\n    todo!()\n}")], "engine/src/page.rs:2", "`todo!`: unfinished");
    one(&[(PAGE, "fn f() { println!(\"x\") }")], "engine/src/page.rs:1", "does not print");
    for call in ["println!()", "print!(\"x\")", "eprintln!()", "eprint!(\"x\")"] {
        let main = format!("fn main() {{ {call} }}");
        one(&[("engine/src/main.rs", &main)], "engine/src/main.rs:1", "panics when nobody reads");
    }
    one(&[(PAGE, "use std::fs;")], "engine/src/page.rs:1", "is pure");
    one(&[(PAGE, "use crate::backend::Backend;")], "engine/src/page.rs:1", "is pure");
    let now = "fn f() { let t = std::time::Instant::now(); }";
    one(&[(LIB, &format!("mod page;\nmod pack;\n{now}"))], "engine/src/lib.rs:3", "read the Clock");
    assert!(said(&[("transport/src/link/mod.rs", now)]).is_empty());
    one(
        &[("transport/src/link/mod.rs", "struct Tensor;")],
        "transport/src/link/mod.rs:1",
        "no tensor",
    );
    one(&[("engine/src/main.rs", "use axum::Router;")], "engine/src/main.rs:1", "async runtime");
    // Parts of words, comments and strings are not the word.
    let text = "// Backend, dbg!\nfn f(a: Linked) -> &'static str { \"todo!() std::fs\" }";
    assert!(said(&[(PAGE, text)]).is_empty());
}

#[test]
fn tests_are_let_off_where_the_rule_says_so() {
    let inline = "#[cfg(test)]\nmod tests {\n    use std::fs;\n    fn f() { println!() }\n}\n";
    assert!(said(&[(PAGE, inline)]).is_empty());
    let after = format!("{inline}use std::fs;\n");
    one(&[(PAGE, &after)], "engine/src/page.rs:6", "is pure");
    let file = [(PAGE, "#[cfg(test)]\nmod tests;\n"), ("engine/src/page/tests.rs", "use std::fs;")];
    assert!(said(&file).is_empty());
    one(
        &[(PAGE, "mod tests;\n"), ("engine/src/page/tests.rs", "fn f() { print!() }")],
        "engine/src/page/tests.rs:1",
        "does not print",
    );
    one(&[("engine/tests/a.rs", "fn f() { dbg!(1) }")], "engine/tests/a.rs:1", "unfinished");
    one(&[(PAGE, "#[ignore]\nfn f() {}")], "engine/src/page.rs:1", "says why");
}

#[test]
fn unsafe_has_rooms() {
    one(&[(PAGE, "fn f() { unsafe { g() } }")], "engine/src/page.rs:1", "its rooms");
    assert!(said(&[(PAGE, "#![deny(unsafe_code)] // unsafe\n")]).is_empty());
    let room = [
        ("loader/Cargo.toml", ""),
        ("loader/src/lib.rs", "mod map;"),
        ("loader/src/map.rs", "unsafe fn f() {}"),
    ];
    assert!(said(&room).is_empty());
}

#[test]
fn names_that_say_nothing() {
    let lib = "mod page;\nmod pack;\nmod utils;";
    one(&[(LIB, lib), ("engine/src/utils.rs", "")], "engine/src/utils.rs:0", "says nothing");
    one(&[(PAGE, "\npub struct PageManager {}")], "engine/src/page.rs:2", "`PageManager`");
    one(&[(PAGE, "fn get_page() {}")], "engine/src/page.rs:1", "leave out");
    one(&[(PAGE, concat!("// TO", "DO: all"))], "engine/src/page.rs:1", "write an issue");
}

#[test]
fn dead_and_missing_files() {
    one(&[("engine/src/old.rs", "")], "engine/src/old.rs:0", "no crate reaches");
    one(&[(PAGE, "mod pool;")], "engine/src/page.rs:1", "no file engine/src/page/pool.rs");
    let inline =
        [(PAGE, "mod a {\n    #[path = \"../x.rs\"]\n    mod b;\n}"), ("engine/src/x.rs", "")];
    let said_of = said(&inline);
    assert!(said_of.iter().all(|s| !s.contains("no file engine/src/page/a/b.rs")), "{said_of:?}");
    let nested = [
        (PAGE, "mod a { mod b; }\nmod c;"),
        ("engine/src/page/a/b.rs", ""),
        ("engine/src/page/c/mod.rs", ""),
    ];
    assert!(said(&nested).is_empty());
    let flat = [
        ("benches/Cargo.toml", "[[bench]]\npath = \"frame.rs\"\n"),
        ("benches/frame.rs", "fn main() { println!() }"),
    ];
    assert!(said(&flat).is_empty());
    one(&[flat[0], flat[1], ("benches/link.rs", "")], "benches/link.rs:0", "no crate reaches");
    let test = [("engine/tests/x/main.rs", "mod y;"), ("engine/tests/x/y.rs", "")];
    assert!(said(&test).is_empty());
    let bin =
        [("engine/src/bin/x/main.rs", "mod y;"), ("engine/src/bin/x/y.rs", "use anyhow::bail;")];
    assert!(said(&bin).is_empty());
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
        "don't know each other",
    );
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
