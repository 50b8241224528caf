//! Cuts a model into the two bundles of a device and a cloud.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use hat_engine::options::Codec;
use hat_loader::bundle::check_free;
use hat_loader::{
    BundleError, BundleOptions, DrafterFile, Report, RoleReport, TypeReport, Weights, file,
};
use hat_program::out::{self, OutError};
use hat_program::{note, outln, pull};

/// Cuts a model: OUT/device gets the embedding, the first and last layers, the LM head and the
/// tokenizer; OUT/cloud gets the layers between.
#[derive(Parser)]
#[command(name = "hat-split", version)]
struct Args {
    /// Model: a Hugging Face directory, a .gguf file, or `default`.
    model: String,
    /// Number of first layers on the device.
    #[arg(long, default_value_t = 2)]
    split_layer: usize,
    /// Number of last layers on the device.
    #[arg(long, default_value_t = 0)]
    tail_layers: usize,
    /// Type of the matrices.
    #[arg(long, value_enum, default_value_t = WeightsArg::Keep)]
    weights: WeightsArg,
    /// Directory to write; it must not exist, or be empty.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Trained drafter for the device half, as `hat-train fit` writes it for this model.
    #[arg(long, value_name = "FILE")]
    adapter: Option<PathBuf>,
    /// Pre-tokenizer of a GGUF file that does not name its own: a value of `tokenizer.ggml.pre`.
    #[arg(long, value_name = "NAME")]
    pre: Option<String>,
    /// Print the content of each half.
    #[arg(long)]
    report: bool,
    /// Print the report as one line of JSON.
    #[arg(long)]
    json: bool,
}

/// See [`Weights`].
#[derive(Clone, Copy, ValueEnum)]
enum WeightsArg {
    /// As in the model, bit for bit.
    Keep,
    /// f16 for all.
    F16,
    /// Eight bits at most.
    Q8,
    /// Four bits at most; eight for embedding and LM head.
    Q4,
}

impl From<WeightsArg> for Weights {
    fn from(arg: WeightsArg) -> Self {
        match arg {
            WeightsArg::Keep => Self::Keep,
            WeightsArg::F16 => Self::F16,
            WeightsArg::Q8 => Self::Q8,
            WeightsArg::Q4 => Self::Q4,
        }
    }
}

fn main() -> ExitCode {
    #[cfg(target_os = "linux")]
    let _ = hat_program::shrunk::install("hat-split");
    let args = match out::parse::<Args>() {
        Ok(args) => args,
        Err(ended) => return ended,
    };
    out::finish("hat-split", run(&args))
}

impl Args {
    fn options(&self) -> BundleOptions {
        BundleOptions {
            split_layer: self.split_layer,
            tail_layers: self.tail_layers,
            weights: self.weights.into(),
        }
    }

    /// True if the model is to be fetched unless it is in the cache.
    fn is_default(&self) -> bool {
        self.model == "default" && !Path::new(&self.model).exists()
    }

    /// Refuses settings that can't work, before anything is fetched or written.
    fn check(&self) -> anyhow::Result<()> {
        check_free(&self.out).context("--out")?;
        if let Some(path) = &self.adapter {
            let bytes = file::read(path, u64::MAX)
                .map_err(|error| BundleError::Io { path: path.clone(), error })
                .context("--adapter")?;
            DrafterFile::trained_for(path, &bytes).context("--adapter")?;
        }
        if !self.is_default() {
            return Ok(());
        }
        anyhow::ensure!(self.pre.is_none(), "--pre: the default model needs none; leave it out");
        pull::check_default(self.options())
    }
}

fn run(args: &Args) -> anyhow::Result<()> {
    args.check()?;
    let path = match args.is_default() {
        true => pull::default_model(&pull::cache_dir()?)?,
        false => PathBuf::from(&args.model),
    };
    let options = args.options();
    let report = pull::split(&path, args.pre.as_deref(), options, &args.out)?;
    let device = args.out.join("device");
    let has_drafter = match &args.adapter {
        Some(adapter) => {
            let added = hat_loader::add_drafter(&device, adapter);
            added.context("the bundles are written, but without the drafter")?;
            true
        }
        None => pull::add_drafter(&device),
    };
    if !has_drafter {
        note!(
            "hat-split: no trained drafter for {} after layer {}: each round trip brings fewer \
             tokens; hat-train makes one",
            report.model_name,
            report.split_layer
        );
    }
    if args.json {
        outln!("{}", serde_json::to_string(&report)?)?;
    } else if args.report {
        print_report(&report)?;
    } else {
        outln!("{} is split into {}", report.model_name, args.out.display())?;
    }
    Ok(())
}

fn print_report(report: &Report) -> Result<(), OutError> {
    outln!("model          {}", report.model_name)?;
    outln!("model id       {}", report.model_id)?;
    outln!("sampling       {}", report.sampling)?;
    outln!(
        "split          {} layers: {} first and {} last at the device",
        report.num_hidden_layers,
        report.split_layer,
        report.tail_layers
    )?;
    outln!(
        "on the wire    {} bytes a row as int8, {} as f16, each way (hidden_size {})",
        Codec::Int8.row_bytes(report.hidden_size),
        Codec::F16.row_bytes(report.hidden_size),
        report.hidden_size
    )?;
    print_text(report)?;
    print_types(&report.types)?;
    print_role("device", "embedding, final norm, LM head, tokenizer", &report.device)?;
    print_role("cloud", "neither embedding nor LM head nor tokenizer", &report.cloud)
}

/// The reading of the text side.
fn print_text(report: &Report) -> Result<(), OutError> {
    let text = &report.text;
    if let Some(pattern) = &text.pattern {
        outln!("words          cut as {pattern}")?;
    }
    let (count, retyped) = (text.control_tokens.len(), text.retyped_tokens);
    outln!("control tokens {count}, of which the file typed {retyped} otherwise")?;
    for (id, token) in &text.control_tokens {
        let end = if text.ends.contains(id) { "  ends an answer" } else { "" };
        outln!("  {id:>10} {token:?}{end}")?;
    }
    if text.merges_skipped > 0 {
        outln!("merges         {} skipped: they join no tokens", text.merges_skipped)?;
    }
    if text.tokens_doubled > 0 {
        outln!("tokens         {} with the text of an earlier one", text.tokens_doubled)?;
    }
    for (name, why) in &report.kept {
        outln!("kept           {name}: {why}")?;
    }
    Ok(())
}

/// The types of the tensors in the file and as stored.
fn print_types(types: &[TypeReport]) -> Result<(), OutError> {
    outln!("types          in the model, bits a weight; stored as, bits a weight; tensors")?;
    for row in types {
        let TypeReport { from, bits, stored, stored_bits, is_exact, tensors } = row;
        let exact = if *is_exact { "exact" } else { "rounded" };
        outln!(
            "  {from:<12} {bits:>6.3}  {stored:<5} {stored_bits:>6.3}  {exact:<7} {tensors:>6}"
        )?;
    }
    Ok(())
}

fn print_role(name: &str, holds: &str, role: &RoleReport) -> Result<(), OutError> {
    let layers: Vec<String> =
        role.layers.iter().map(|[start, end]| format!("{start}..{end}")).collect();
    let layers = if layers.is_empty() { "none".to_owned() } else { layers.join(" and ") };
    outln!("\n{name}: {} bytes", role.bytes)?;
    outln!("  holds        layers {layers}; {holds}")?;
    let types: Vec<String> =
        role.bytes_by_dtype.iter().map(|(dtype, bytes)| format!("{dtype} {bytes}")).collect();
    outln!("  tensors      {}: {} bytes", role.tensors, types.join(", "))?;
    for (file, bytes) in &role.files {
        outln!("  {file:<22} {bytes:>12}")?;
    }
    Ok(())
}
