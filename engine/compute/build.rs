//! `HAT_NO_EMULATOR`, for machines without a C++ compiler, leaves out the tests that need the
//! emulator of CUDA's kernels: they count as ignored.

fn main() {
    println!("cargo::rerun-if-env-changed=HAT_NO_EMULATOR");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(no_emulator)");
    if std::env::var_os("HAT_NO_EMULATOR").is_some() {
        println!("cargo::rustc-cfg=no_emulator");
    }
}
