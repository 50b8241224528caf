//! The rules, as data. A path that ends with `/` means all below it.

/// Lines of a file, by the end of its path; the first that fits counts.
pub(crate) const FILE_LINES_MAX: &[(&str, usize)] =
    &[("src/lib.rs", 150), (".cuh", 300), (".cu", 400), (".rs", 600)];

/// Lines of a function.
pub(crate) const FUNCTION_LINES_MAX: usize = 70;

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
    "engine/compute/src/backend/cpu/avx2/",
    "engine/compute/src/backend/cpu/avx512/",
    "engine/compute/src/backend/cpu/neon.rs",
    "engine/compute/src/backend/cpu/threads.rs",
    "engine/program/src/shrunk.rs",
    "engine/compute/tests/counting/mod.rs",
    "engine/tests/all/chat.rs",
    "engine/tests/sessions.rs",
    "benches/peak.rs",
    "cuda/src/",
];

/// Names that say nothing, as the stem of a file or folder.
pub(crate) const EMPTY_NAMES: &[&str] =
    &["utils", "util", "helpers", "helper", "common", "misc", "manager", "handler"];

/// Names that say nothing, as the end of a type's name.
pub(crate) const EMPTY_TYPES: &[&str] =
    &["Utils", "Util", "Helper", "Helpers", "Manager", "Handler"];

/// Part of the tree that a rule applies to.
pub(crate) enum Scope {
    /// All Rust code.
    Rust,
    /// Library crates: not binaries, tests, benches.
    Library,
    /// These paths.
    Paths(&'static [&'static str]),
}

/// Words that may not stand somewhere. They are looked for in code, not in comments or strings.
pub(crate) struct Ban {
    pub(crate) words: &'static [&'static str],
    pub(crate) scope: Scope,
    /// Paths that are let off.
    pub(crate) except: &'static [&'static str],
    /// True if tests are let off.
    pub(crate) except_tests: bool,
    /// Reason, and the remedy.
    pub(crate) reason: &'static str,
}

/// Policy and protocol: no IO, no clock, no thread, no backend.
const PURE: &[&str] = &[
    "transport/src/codec.rs",
    "transport/src/codec/",
    "transport/src/frame.rs",
    "transport/src/frame/",
    "transport/src/conn.rs",
    "transport/src/conn/",
    "transport/src/message.rs",
    "transport/src/message/",
    "transport/emulator/src/schedule.rs",
    "transport/emulator/src/shape.rs",
];

pub(crate) const BANS: &[Ban] = &[
    Ban {
        words: &["todo!", "unimplemented!", "dbg!"],
        scope: Scope::Rust,
        except: &[],
        except_tests: false,
        reason: "unfinished: finish it, or leave it out",
    },
    Ban {
        words: &["println!", "print!", "eprintln!", "eprint!"],
        scope: Scope::Rust,
        // They talk to cargo.
        except: &["cuda/build.rs", "engine/build.rs", "engine/compute/build.rs"],
        except_tests: true,
        reason: "it panics when nobody reads: a program uses outln!, out! and note! of \
                 hat_program, and a library does not print",
    },
    Ban {
        words: &["Instant::now", "SystemTime::now"],
        scope: Scope::Library,
        except: &[
            "transport/src/clock.rs",
            "transport/src/link/",
            "transport/emulator/",
            "engine/src/http/",
            "benches/",
        ],
        except_tests: true,
        reason: "time is an argument: read the Clock once a turn, at the top of the loop",
    },
    Ban {
        words: &["thread::spawn", "thread::Builder", "thread::scope", "thread::sleep"],
        scope: Scope::Library,
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
        except_tests: true,
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
        scope: Scope::Paths(PURE),
        except: &[],
        except_tests: true,
        reason: "this module is pure: the caller supplies time, bytes and pages",
    },
    Ban {
        words: &["tokio", "axum"],
        scope: Scope::Rust,
        except: &["engine/src/http/"],
        except_tests: true,
        reason: "there is no async runtime outside of engine/src/http",
    },
    Ban {
        words: &["anyhow"],
        scope: Scope::Library,
        except: &["benches/", "tools/", "engine/program/"],
        except_tests: true,
        reason: "libraries have typed errors; anyhow is for binaries",
    },
    Ban {
        words: &["Tensor", "tensor", "hat_loader", "hat_engine", "hat_cuda"],
        scope: Scope::Paths(&["transport/"]),
        except: &[],
        except_tests: false,
        reason: "transport knows bytes and a row count, no tensor and no other crate of ours",
    },
    Ban {
        words: &["hat_transport", "hat_engine", "Session", "Sequence"],
        scope: Scope::Paths(&["engine/compute/src/"]),
        except: &[],
        except_tests: true,
        reason: "hat-compute runs plans; it knows no link, session or text",
    },
    Ban {
        words: &["hat_transport", "hat_engine", "hat_compute", "hat_plan", "hat_cuda"],
        scope: Scope::Paths(&["loader/"]),
        except: &[],
        except_tests: false,
        reason: "the loader is a leaf: it knows no other crate of ours",
    },
    Ban {
        words: &[
            "hat_transport",
            "hat_engine",
            "hat_compute",
            "hat_loader",
            "PageTable",
            "Session",
        ],
        scope: Scope::Paths(&["cuda/"]),
        except: &[],
        except_tests: false,
        reason: "hat-cuda takes slices and numbers; it knows no model, session or page table",
    },
];

/// Words that may not stand in comments: work that is not done is an issue, not a comment.
pub(crate) const UNDONE: &[&str] = &[concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")];

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
