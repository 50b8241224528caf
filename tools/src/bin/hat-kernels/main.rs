//! Compiles `cuda/kernels/*.cu` for every architecture, and `abi.h` to Rust, with pinned tools.
//!
//! `cargo run -p hat-tools --features kernels --bin hat-kernels` writes `cuda/kernels/gen/` and
//! `cuda/src/abi.rs`; both are committed, so that nobody else needs a compiler. With `--check` it
//! writes nothing and fails if a file is not what the sources give. In either way it fails if a
//! kernel spills or is over its budget. It needs no GPU and no CUDA: NVRTC and libclang come as
//! wheels through `python3 -m pip`.
//!
//! - [`toolchain`] fetches; [`compile`] makes the artefacts and their manifest; [`cubin`] reads
//!   what a kernel takes; [`abi`] makes Rust of the header.

mod abi;
mod compile;
mod cubin;
mod toolchain;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clap::Parser;

use compile::Artefacts;
use hat_engine::pull;

/// Compiles the CUDA kernels and writes what is committed of them.
#[derive(Parser)]
#[command(name = "hat-kernels")]
struct Arguments {
    /// Write nothing; fail if a committed file differs from what its sources give.
    #[arg(long)]
    check: bool,
    /// The crate hat-cuda [default: beside this program's sources].
    #[arg(long, value_name = "DIR")]
    cuda: Option<PathBuf>,
    /// Where the compilers are kept [default: the user's cache].
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// Print the Rust text of a header and end.
    #[arg(long, value_name = "HEADER", hide = true)]
    abi_text: Option<PathBuf>,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    if let Some(header) = &arguments.abi_text {
        print!("{}", abi::text(header)?);
        return Ok(());
    }
    let cuda = match arguments.cuda {
        Some(cuda) => cuda,
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../cuda"),
    };
    let cache = match arguments.cache_dir {
        Some(cache) => cache,
        None => pull::cache_dir()?,
    };
    let kernels = cuda.join("kernels");
    let artefacts = compile::all(&kernels, &toolchain::NVRTC.file(&cache)?)?;
    let abi = abi::rust(&kernels.join("abi.h"), &toolchain::LIBCLANG.file(&cache)?)?;
    if arguments.check {
        check(&cuda, &artefacts, &abi)?;
    } else {
        write(&cuda, &artefacts, &abi)?;
    }
    let bytes: usize = artefacts.values().map(Vec::len).sum();
    println!("{} artefacts, {bytes} bytes", artefacts.len());
    Ok(())
}

/// Names of the committed artefacts.
fn committed(folder: &Path) -> anyhow::Result<Vec<String>> {
    let entries = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry?.file_name().into_string().ok());
    }
    Ok(names)
}

fn write(cuda: &Path, artefacts: &Artefacts, abi: &str) -> anyhow::Result<()> {
    let folder = cuda.join("kernels/gen");
    fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
    for name in committed(&folder)?.iter().filter(|name| !artefacts.contains_key(*name)) {
        fs::remove_file(folder.join(name)).with_context(|| format!("removing {name}"))?;
    }
    for (name, bytes) in artefacts {
        let path = folder.join(name);
        if fs::read(&path).ok().as_ref() != Some(bytes) {
            fs::write(&path, bytes).with_context(|| format!("writing {}", path.display()))?;
            println!("{name}: {} bytes", bytes.len());
        }
    }
    let path = cuda.join("src/abi.rs");
    fs::write(&path, abi).with_context(|| format!("writing {}", path.display()))
}

fn check(cuda: &Path, artefacts: &Artefacts, abi: &str) -> anyhow::Result<()> {
    let folder = cuda.join("kernels/gen");
    let mut findings = Vec::new();
    for (name, bytes) in artefacts {
        match fs::read(folder.join(name)) {
            Ok(found) if found == *bytes => {}
            Ok(_) => findings.push(format!("{name} is not what the sources give")),
            Err(error) => findings.push(format!("{name}: {error}")),
        }
    }
    for name in committed(&folder)?.iter().filter(|name| !artefacts.contains_key(*name)) {
        findings.push(format!("{name} is made of no source"));
    }
    if fs::read_to_string(cuda.join("src/abi.rs")).ok().as_deref() != Some(abi) {
        findings.push("src/abi.rs is not what abi.h gives".to_owned());
    }
    if !findings.is_empty() {
        let findings = findings.join("\n");
        bail!("stale (run hat-kernels without --check and commit):\n{findings}");
    }
    Ok(())
}
