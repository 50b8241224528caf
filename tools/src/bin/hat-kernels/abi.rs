//! `abi.h` to `abi.rs`: what kernels and launchers agree on, said once, in C.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, bail};

/// The Rust text for a header, made by a process of its own: bindgen finds its library through
/// an environment variable alone.
pub(crate) fn rust(header: &Path, libclang: &Path) -> anyhow::Result<String> {
    let program = std::env::current_exe().context("this program's own path")?;
    let output = Command::new(program)
        .arg("--abi-text")
        .arg(header)
        .env("LIBCLANG_PATH", libclang)
        .output()
        .context("starting bindgen")?;
    if !output.status.success() {
        bail!("{}: {}", header.display(), String::from_utf8_lossy(&output.stderr).trim());
    }
    String::from_utf8(output.stdout).context("bindgen's text")
}

/// Text that the process prints.
pub(crate) fn text(header: &Path) -> anyhow::Result<String> {
    let path = header.to_str().context("the header's path is no UTF-8")?;
    let bindings = bindgen::Builder::default()
        .header(path)
        .allowlist_item("(hat|HAT)_.*")
        .use_core()
        // Both languages lay out pointers and 32-bit numbers alike; the kernels' tests launch all.
        .layout_tests(false)
        .derive_debug(false)
        .formatter(bindgen::Formatter::None)
        .generate()
        .context("bindgen")?
        .to_string();
    let file = syn::parse_file(&bindings).context("bindgen's text")?;
    let text = prettyplease::unparse(&file);
    Ok(format!("// Made by hat-kernels of cuda/kernels/abi.h; not to be edited.\n\n{text}"))
}
