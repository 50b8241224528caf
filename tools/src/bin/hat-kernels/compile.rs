//! Sources to artefacts: one cubin for each kernel file and architecture, PTX for the rest, and
//! the manifest that says what was made of what.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use serde::Serialize;

use crate::cubin::{self, Usage};
use crate::mix::{self, Mix};
use crate::nvrtc::{Nvrtc, Source, Target};
use crate::rules;
use crate::toolchain::{NVDISASM, NVRTC};

/// GPUs that get machine code: A100, A6000 and other Ampere, Orin, Ada, Hopper. PTX serves others.
pub(crate) const TARGETS: [Target; 6] = [
    Target::Cubin(80),
    Target::Cubin(86),
    Target::Cubin(87),
    Target::Cubin(89),
    Target::Cubin(90),
    Target::Ptx(80),
];

/// No contraction: a fused multiply-add is written where it is meant (docs/KERNELS.md).
const FLAGS: [&str; 2] = ["--std=c++17", "--fmad=false"];

/// Artefacts by file name; `manifest.json` is one of them.
pub(crate) type Artefacts = BTreeMap<String, Vec<u8>>;

/// Content of `manifest.json`.
#[derive(Serialize)]
struct Manifest<'a> {
    compiler: String,
    compiler_sha256: [&'static str; 2],
    /// Disassembler that counted the instructions.
    disassembler: &'static str,
    flags: Vec<&'static str>,
    /// BLAKE3 of each source and header.
    sources: BTreeMap<String, String>,
    #[serde(skip)]
    artefacts: &'a Described,
}

/// Facts of each artefact, by its file's name.
pub(crate) type Described = BTreeMap<String, Artefact>;

/// Artefact of a source for a target.
pub(crate) struct Artefact {
    blake3: String,
    /// Size of the file.
    pub(crate) bytes: usize,
    /// `sm_86`, `compute_80`.
    pub(crate) target: String,
    /// Empty for PTX, whose registers its reader decides.
    pub(crate) kernels: Vec<Usage>,
}

/// Most that a kernel may take, on any architecture; `budgets.json`.
type Budgets = BTreeMap<String, Budget>;

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Budget {
    registers: u32,
    shared_bytes: u64,
}

/// The tools.
pub(crate) struct Tools<'a> {
    /// The compiler, a library.
    pub(crate) nvrtc: &'a Path,
    /// The disassembler, a program.
    pub(crate) nvdisasm: &'a Path,
}

/// Compiles all of `kernels`, and returns the facts of each artefact.
pub(crate) fn all(kernels: &Path, tools: &Tools<'_>) -> anyhow::Result<(Artefacts, Described)> {
    let nvrtc = Nvrtc::open(tools.nvrtc)?;
    let (major, minor) = nvrtc.version()?;
    ensure!((major, minor) == (12, 6), "NVRTC is {major}.{minor}, not 12.6");
    let sources = read_sources(kernels)?;
    let headers: Vec<Source<'_>> = sources
        .iter()
        .filter(|(name, _)| !name.ends_with(".cu"))
        .map(|(name, text)| Source { name, text })
        .collect();
    let mut out = Artefacts::new();
    let mut described = Described::new();
    for (name, text) in sources.iter().filter(|(name, _)| name.ends_with(".cu")) {
        for target in TARGETS {
            let bytes = nvrtc.compile(Source { name, text }, &headers, target, &FLAGS)?;
            let kernels = match target {
                Target::Cubin(_) => usage(&bytes, target).with_context(|| name.clone())?,
                Target::Ptx(_) => Vec::new(),
            };
            let stem = name.trim_end_matches(".cu");
            let kind = if kernels.is_empty() { "ptx" } else { "cubin" };
            let file = format!("{stem}.{}.{kind}", target.name());
            let blake3 = blake3::hash(&bytes).to_hex().to_string();
            let artefact = Artefact { blake3, bytes: bytes.len(), target: target.name(), kernels };
            described.insert(file.clone(), artefact);
            out.insert(file, bytes);
        }
    }
    count_instructions(tools.nvdisasm, &out, &mut described)?;
    check_budgets(kernels, &described)?;
    rules::check(&kernels.join("mix.json"), &described)?;
    let hash = |text: &String| blake3::hash(text.as_bytes()).to_hex().to_string();
    let manifest = Manifest {
        compiler: NVRTC.package.to_owned(),
        compiler_sha256: NVRTC.sha256,
        disassembler: NVDISASM.package,
        flags: FLAGS.to_vec(),
        sources: sources.iter().map(|(name, text)| (name.clone(), hash(text))).collect(),
        artefacts: &described,
    };
    out.insert("manifest.json".to_owned(), manifest.text()?.into_bytes());
    Ok((out, described))
}

/// Resources of a cubin's kernels.
fn usage(cubin: &[u8], target: Target) -> anyhow::Result<Vec<Usage>> {
    let mut kernels = cubin::usage(cubin)?;
    if target == Target::Cubin(90) {
        // The first KB of a block's shared memory belongs to the system there.
        kernels.iter_mut().for_each(|usage| {
            usage.shared_bytes = usage.shared_bytes.saturating_sub(1024);
        });
    }
    Ok(kernels)
}

/// Disassembles all cubins, as many at a time as there are cores.
fn count_instructions(
    nvdisasm: &Path,
    bytes: &Artefacts,
    described: &mut Described,
) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let mut open: Vec<_> =
        described.iter_mut().filter(|(_, artefact)| !artefact.kernels.is_empty()).collect();
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let part = open.len().div_ceil(workers).max(1);
    let read = |(file, artefact): &mut (&String, &mut Artefact)| -> anyhow::Result<()> {
        let mut found = mix::of_cubin(nvdisasm, folder.path(), file, &bytes[file.as_str()])?;
        for usage in &mut artefact.kernels {
            let Mix { kernel, body } = found
                .remove(&usage.kernel)
                .with_context(|| format!("{file}: no code of {}", usage.kernel))?;
            (usage.mix, usage.body) = (kernel, body);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let parts = open.chunks_mut(part);
        let running: Vec<_> =
            parts.map(|part| scope.spawn(|| part.iter_mut().try_for_each(&read))).collect();
        running.into_iter().try_for_each(|thread| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })
}

impl Manifest<'_> {
    /// JSON with a line for each kernel.
    fn text(&self) -> anyhow::Result<String> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.truncate(text.strip_suffix("\n}").context("an object")?.len());
        text.push_str(",\n  \"artefacts\": {");
        let mut separator = "\n";
        for (file, artefact) in self.artefacts {
            let Artefact { blake3, bytes, target, kernels } = artefact;
            let head = serde_json::json!({ "blake3": blake3, "bytes": bytes, "target": target });
            let head = head.to_string();
            let head = head.trim_end_matches('}');
            write!(text, "{separator}    \"{file}\": {head},\"kernels\":[")?;
            let lines = kernels.iter().map(serde_json::to_string);
            let lines = lines.collect::<Result<Vec<_>, _>>()?.join(",\n      ");
            let break_line = if kernels.is_empty() { "" } else { "\n      " };
            write!(text, "{break_line}{lines}]}}")?;
            separator = ",\n";
        }
        text.push_str("\n  }\n}\n");
        Ok(text)
    }
}

/// Every `.cu`, `.cuh` and `.h` of the folder.
fn read_sources(folder: &Path) -> anyhow::Result<BTreeMap<String, String>> {
    let mut sources = BTreeMap::new();
    let entries = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        let is_source =
            path.extension().is_some_and(|end| end == "cu" || end == "cuh" || end == "h");
        if let (true, Some(name)) = (is_source, path.file_name().and_then(|name| name.to_str())) {
            let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            sources.insert(name.to_owned(), text);
        }
    }
    ensure!(!sources.is_empty(), "{}: no kernels", folder.display());
    Ok(sources)
}

/// Spills are never in the budget; registers and shared memory are written for each kernel.
fn check_budgets(kernels: &Path, artefacts: &Described) -> anyhow::Result<()> {
    let path = kernels.join("budgets.json");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let budgets: Budgets =
        serde_json::from_str(&text).with_context(|| path.display().to_string())?;
    let mut over = Vec::new();
    for (file, artefact) in artefacts {
        for usage in &artefact.kernels {
            let Usage { kernel, registers, stack_bytes, shared_bytes, .. } = usage;
            let Some(budget) = budgets.get(kernel) else {
                over.push(format!(
                    "{file}: {kernel} has no budget; it takes {registers} registers and \
                     {shared_bytes} bytes of shared memory"
                ));
                continue;
            };
            if *stack_bytes > 0 {
                over.push(format!("{file}: {kernel} spills: {stack_bytes} bytes of stack"));
            }
            if *registers > budget.registers {
                let most = budget.registers;
                over.push(format!("{file}: {kernel} takes {registers} registers of {most}"));
            }
            if *shared_bytes > budget.shared_bytes {
                let most = budget.shared_bytes;
                over.push(format!("{file}: {kernel}: {shared_bytes} bytes shared of {most}"));
            }
        }
    }
    let known = |name: &String| {
        artefacts.values().any(|found| found.kernels.iter().any(|usage| usage.kernel == *name))
    };
    over.extend(
        budgets
            .keys()
            .filter(|name| !known(name))
            .map(|name| format!("budgets.json: there is no kernel {name}")),
    );
    if !over.is_empty() {
        bail!("over budget (cuda/kernels/budgets.json):\n{}", over.join("\n"));
    }
    Ok(())
}
