//! The rules, as data. A path stands for all that begins with it.

/// Lines of a file, by the end of its path; the first that fits counts.
pub(crate) const FILE_LINES_MAX: &[(&str, usize)] =
    &[("src/lib.rs", 150), (".cuh", 300), (".cu", 400), (".rs", 600)];

/// Columns of a line of Rust.
pub(crate) const COLUMNS_MAX: usize = 100;

/// Files that a tool writes: no rule on size or words.
pub(crate) const GENERATED: &[&str] = &["cuda/src/abi.rs", "cuda/kernels/gen/"];

/// Paths in which unsafe code may stand.
pub(crate) const UNSAFE_ROOMS: &[&str] = &[
    "loader/src/map.rs",
    "transport/src/codec/avx2.rs",
    "transport/src/pool.rs",
    "transport/src/link/uring.rs",
    "transport/src/link/uring/",
    "engine/compute/src/backend/cpu/avx2.rs",
    "engine/compute/src/backend/cpu/avx512.rs",
    "engine/compute/src/backend/cpu/neon.rs",
    "engine/compute/src/backend/cpu/simd.rs",
    "engine/compute/src/backend/cpu/threads.rs",
    "engine/program/src/shrunk.rs",
    "engine/compute/tests/counting/mod.rs",
    "engine/tests/all/chat.rs",
    "engine/tests/sessions.rs",
    "benches/peak.rs",
    "cuda/src/",
    "tools/src/bin/hat-kernels/nvrtc.rs",
    "tools/src/bin/tidy/", // it names what it looks for, here and below
];

/// Names that say nothing, as the stem of a file or folder.
pub(crate) const EMPTY_NAMES: &[&str] =
    &["utils", "util", "helpers", "helper", "common", "misc", "manager", "handler"];

/// Parts of the paths of tests and benches, which read clocks and print.
pub(crate) const TESTS: &[&str] = &["/tests/", "/tests.rs", "_tests.rs", "/golden.rs", "benches/"];

/// Parts of the paths of programs, and of what talks to cargo.
pub(crate) const PROGRAMS: &[&str] = &["/src/bin/", "/src/main.rs", "engine/src/cli/", "build.rs"];

/// Words that may not stand somewhere.
pub(crate) struct Ban {
    pub(crate) words: &'static [&'static str],
    /// Paths that they are kept out of; nothing stands for all libraries.
    pub(crate) paths: &'static [&'static str],
    /// Paths that are let off.
    pub(crate) except: &'static [&'static str],
    /// Reason, and the remedy.
    pub(crate) reason: &'static str,
}

/// Everything of ours that is Rust.
const ALL: &[&str] = &["engine/", "cuda/", "transport/", "loader/", "tools/"];

/// Policy and protocol: no IO, no clock, no thread, no backend.
const PURE: &[&str] = &[
    "transport/src/codec",
    "transport/src/frame",
    "transport/src/conn",
    "transport/src/message",
    "transport/emulator/src/schedule.rs",
    "transport/emulator/src/shape.rs",
];

/// The bans. Borders of crates are the manifests' ([`BORDERS`]).
pub(crate) const BANS: &[Ban] = &[
    Ban {
        words: &["println!", "print!", "eprintln!", "eprint!"],
        paths: ALL,
        except: &[
            "cuda/build.rs",
            "engine/build.rs",
            "engine/compute/build.rs",
            "tools/src/bin/tidy/",
        ],
        reason: "it panics when nobody reads: a program uses outln!, out! and note! of \
                 hat_program, and a library does not print",
    },
    Ban {
        words: &["Instant::now", "SystemTime::now"],
        paths: &[],
        except: &[
            "transport/src/clock.rs",
            "transport/src/link/",
            "transport/emulator/",
            "engine/src/http/",
        ],
        reason: "time is an argument: read the Clock once a turn, at the top of the loop",
    },
    Ban {
        words: &["thread::spawn", "thread::Builder", "thread::scope", "thread::sleep"],
        paths: &[],
        except: &[
            "engine/src/device/",
            "engine/src/cloud/",
            "engine/text/src/token/limited.rs",
            "engine/src/http/",
            "engine/compute/src/backend/cpu/threads.rs",
            "engine/src/watch.rs",
            "loader/src/hash.rs",
            "transport/src/link/",
            "transport/emulator/",
        ],
        reason: "only the two roles, http, the links, the link emulator, the CPU backend and the \
                 hash of files start threads or sleep",
    },
    Ban {
        words: &[
            "Backend",
            "crate::link",
            "dyn Link",
            "impl Link",
            "Clock",
            "std::net",
            "std::thread",
            "std::fs",
            "std::io",
        ],
        paths: PURE,
        except: &[],
        reason: "this module is pure: the caller supplies time, bytes and pages",
    },
    Ban {
        words: &["tokio", "axum"],
        paths: ALL,
        except: &["engine/src/http/", "tools/src/bin/tidy/"],
        reason: "there is no async runtime outside of engine/src/http",
    },
];

/// Manifests, and which of our crates may not stand there.
pub(crate) const BORDERS: &[(&str, &[&str])] = &[
    ("loader/Cargo.toml", &["hat-transport", "hat-engine", "hat-compute", "hat-plan", "hat-cuda"]),
    ("transport/Cargo.toml", &["hat-loader", "hat-engine", "hat-compute", "hat-plan", "hat-cuda"]),
    ("cuda/Cargo.toml", &["hat-loader", "hat-engine", "hat-compute", "hat-transport"]),
    ("engine/compute/Cargo.toml", &["hat-transport", "hat-engine"]),
];

/// Words that may not stand in Rust: work that is not done is an issue, not a comment.
pub(crate) const UNDONE: &[&str] = &[concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")];

/// Openings that make a doc line a riddle: it is to say what the thing is.
pub(crate) const OPENINGS: &[&str] = &[
    "What",
    "Whatever",
    "Whether",
    "How",
    "However",
    "When",
    "Where",
    "Who",
    "Whoever",
    "Whom",
    "Whose",
    "Which",
    "Whichever",
    "Why",
    "Those",
    "So many",
    "So much",
];

/// Tests that stay as they are while the roles are redesigned: `.ci/lossless-frozen`.
pub(crate) const FROZEN: &[&str] = &["engine/tests/lossless.rs", "engine/tests/lossless/"];

/// Hosts that a document may link to. Package registries and mirrors are not among them: name
/// the package and its version.
pub(crate) const HOSTS: &[&str] = &[
    "github.com",
    "arxiv.org",
    "docs.rs",
    "doc.rust-lang.org",
    "www.apache.org",
    "json-schema.org",
    "www.rfc-editor.org",
    "www.kernel.org",
    "man7.org",
    "localhost",
    "www.w3.org", // the name space of SVG
    "127.0.0.1",
    "[::1]",
    "0.0.0.0",
    "cloud.example",
    "example.com",
    "example.org",
    "evil.example",
    "localhost.evil.example",
];

/// Registries by host, also without a scheme. In two parts, as below.
pub(crate) const REGISTRIES: &[&str] = &[
    concat!("crates", ".io"),
    concat!("pypi", ".org"),
    concat!("pythonhosted", ".org"),
    concat!("huggingface", ".co"),
    concat!("npmjs", ".org"),
];

/// Beginnings of paths that exist on one machine only. In two parts, so that this file has none.
pub(crate) const MACHINE_PATHS: &[&str] = &[
    concat!("/ho", "me/"),
    concat!("/ro", "ot/"),
    concat!("/Us", "ers/"),
    concat!("/wo", "rk/"),
    concat!("/tm", "p/"),
    concat!("C:", "\\"),
];

/// Commands that a newcomer types first.
pub(crate) const README_COMMANDS: &[&str] =
    &["cargo run --release -p hat-engine -- demo", "cargo test --workspace"];

/// Files that the house is not complete without.
pub(crate) const REQUIRED: &[&str] = &[
    "README.md",
    "CHANGELOG.md",
    "LICENSE-MIT",
    "LICENSE-APACHE",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/ARCHITECTURE.md",
    "docs/PROTOCOL.md",
    ".ci/run",
];

/// Folders at the top; a word in a document that begins with one is a path of ours.
pub(crate) const TOP: &[&str] =
    &["engine/", "cuda/", "transport/", "loader/", "tools/", "benches/", "docs/", ".ci/"];
