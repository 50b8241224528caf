//! Every kernel against its meaning, written beside it in plain Rust with sums in f64.
//!
//! The kernels run as host C++ on the CPU, under several orders of threads, whose results have to
//! be the same to the bit. Where there is no C++ compiler they fail, unless `HAT_NO_EMULATOR`
//! was set when they were built: then they count as ignored.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod artefacts;
mod attention;
mod bounds;
mod choice;
mod floats;
mod fragments;
mod gemv;
mod model;
mod mutants;
mod norm;
mod on_driver;
mod panels;
mod peak;
mod rehearsal;
mod rows;
mod sanitizer;
mod sequences;
mod stand;
