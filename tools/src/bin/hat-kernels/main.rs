//! Compiles `cuda/kernels/*.cu` for every architecture, and `abi.h` to Rust, with pinned tools.
//!
//! `cargo run -p hat-tools --features kernels --bin hat-kernels` writes `cuda/kernels/gen/`,
//! `cuda/src/abi.rs` and the tables of `docs/KERNELS.md`; all are committed, so that nobody else
//! needs a compiler. With `--check` it writes nothing and fails if a file is not what the sources
//! give. In either way it fails if a kernel spills, is over its budget or is not made of the
//! instructions that it should be. It needs no GPU and no CUDA: NVRTC, nvdisasm and libclang come
//! as wheels through `python3 -m pip`.
//!
//! - [`toolchain`] fetches, and [`nvrtc`] is the compiler that it fetched; [`compile`] makes the
//!   artefacts and their manifest; [`cubin`] reads
//!   what a kernel takes, [`mix`] what it is made of; [`rules`] hold that; [`tables`] show it;
//!   [`abi`] makes Rust of the header.

mod abi;
mod compile;
mod cubin;
mod mix;
#[expect(unsafe_code, reason = "calls a C library")]
mod nvrtc;
mod rules;
mod tables;
mod toolchain;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::Parser;
use hat_program::{out, outln, pull};

use compile::Artefacts;

/// Compiles the CUDA kernels and writes the committed artefacts.
#[derive(Parser)]
#[command(name = "hat-kernels")]
struct Arguments {
    /// Write nothing; fail if a committed file differs from its sources' output.
    #[arg(long)]
    check: bool,
    /// The crate hat-cuda [default: beside this program's sources].
    #[arg(long, value_name = "DIR")]
    cuda: Option<PathBuf>,
    /// Folder of the compilers [default: the user's cache].
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// Print the Rust text of a header and end.
    #[arg(long, value_name = "HEADER", hide = true)]
    abi_text: Option<PathBuf>,
}

fn main() -> ExitCode {
    match out::parse() {
        Ok(arguments) => out::finish("hat-kernels", run(arguments)),
        Err(ended) => ended,
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    if let Some(header) = &arguments.abi_text {
        out!("{}", abi::text(header)?)?;
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
    let (nvrtc, nvdisasm) = (toolchain::NVRTC.file(&cache)?, toolchain::NVDISASM.program(&cache)?);
    let tools = compile::Tools { nvrtc: &nvrtc, nvdisasm: &nvdisasm };
    let (artefacts, described) = compile::all(&kernels, &tools)?;
    let abi = abi::rust(&kernels.join("abi.h"), &toolchain::LIBCLANG.file(&cache)?)?;
    let page = cuda.join("../docs/KERNELS.md");
    let old = fs::read_to_string(&page).with_context(|| page.display().to_string())?;
    let new = tables::page(&old, &artefacts, &described)?;
    let texts = [(cuda.join("src/abi.rs"), abi), (page, new)];
    if arguments.check {
        check(&cuda, &artefacts, &texts)?;
    } else {
        write(&cuda, &artefacts, &texts)?;
    }
    let bytes: usize = artefacts.values().map(Vec::len).sum();
    outln!("{} artefacts, {bytes} bytes", artefacts.len())?;
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

fn write(cuda: &Path, artefacts: &Artefacts, texts: &[(PathBuf, String)]) -> anyhow::Result<()> {
    let folder = cuda.join("kernels/gen");
    fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
    for name in committed(&folder)?.iter().filter(|name| !artefacts.contains_key(*name)) {
        fs::remove_file(folder.join(name)).with_context(|| format!("removing {name}"))?;
    }
    for (name, bytes) in artefacts {
        let path = folder.join(name);
        if fs::read(&path).ok().as_ref() != Some(bytes) {
            fs::write(&path, bytes).with_context(|| format!("writing {}", path.display()))?;
            outln!("{name}: {} bytes", bytes.len())?;
        }
    }
    for (path, text) in texts {
        if fs::read_to_string(path).ok().as_ref() != Some(text) {
            fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
        }
    }
    Ok(())
}

fn check(cuda: &Path, artefacts: &Artefacts, texts: &[(PathBuf, String)]) -> anyhow::Result<()> {
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
    for (path, text) in texts {
        if fs::read_to_string(path).ok().as_ref() != Some(text) {
            findings.push(format!("{} is not what the kernels give", path.display()));
        }
    }
    if !findings.is_empty() {
        let findings = findings.join("\n");
        bail!("stale (run hat-kernels without --check and commit):\n{findings}");
    }
    Ok(())
}
