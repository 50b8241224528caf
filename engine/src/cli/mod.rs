//! Flags of the daemon, and what they turn into.

mod chat;
mod check;
mod doctor;
mod generate;
pub(crate) mod log;
mod model;
mod other;
mod prompt;
#[cfg(test)]
mod readme;
mod secret;
mod serve;
mod terminal;
mod words;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand};
use hat_compute::open::ComputeConfig;
use hat_engine::options::{
    Address, ChunkPolicy, CloudAddress, Codec, DraftMode, GpuWeights, InputError, LinkKind,
    Processor, SamplerConfig, Verify,
};
use hat_engine::{Cloud, CloudConfig, Engine, EngineConfig, Error};
use hat_loader::Role;
use hat_program::outln;
use hat_program::pull;

use self::model::{BundleArgs, ModelArg};

/// A large language model split between this device and a cloud.
#[derive(Parser)]
#[command(name = "hat-engine", version)]
pub(crate) struct Cli {
    /// Directory of models and bundles.
    #[arg(long, global = true, env = "HAT_CACHE_DIR", value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    #[command(flatten)]
    log: log::LogArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// One question to the default model, device and cloud in one process over loopback.
    Demo(generate::DemoArgs),
    /// A conversation on this terminal.
    Chat(chat::ChatArgs),
    /// One answer to one prompt.
    Generate(generate::GenerateArgs),
    /// The cloud role: serves the middle layers.
    Cloud(serve::CloudArgs),
    /// The device role: serves the HTTP API, and asks a cloud.
    Device(serve::DeviceArgs),
    /// Splits a model into the cache, fetching the default one, and prints the directory.
    Pull(PullArgs),
    /// A check of this machine, link and bundle, with one answer.
    Doctor(doctor::DoctorArgs),
    /// Any other word `X` starts the program hat-X.
    #[command(external_subcommand)]
    Other(Vec<OsString>),
}

impl Cli {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        if let Command::Other(words) = &self.command {
            return other::run(words);
        }
        self.log.install(matches!(self.command, Command::Cloud(_) | Command::Device(_)));
        #[cfg(target_os = "linux")]
        if let Err(error) = hat_program::shrunk::install("hat-engine") {
            tracing::warn!(%error, "a mapped file that becomes shorter will not be named");
        }
        let cache = match self.cache_dir {
            Some(dir) => dir,
            None => pull::cache_dir()?,
        };
        match self.command {
            Command::Demo(args) => args.run(&cache),
            Command::Chat(args) => args.run(&cache),
            Command::Generate(args) => args.run(&cache),
            Command::Cloud(args) => args.run(&cache),
            Command::Device(args) => args.run(&cache),
            Command::Pull(args) => {
                let bundle = args.bundle.named(args.model)?;
                outln!("{}", bundle.directory(&cache)?.display())?;
                Ok(())
            }
            Command::Doctor(args) => args.run(&cache),
            Command::Other(_) => unreachable!("it has been run"),
        }
    }
}

/// Splits a model into the cache, fetching the default one, and prints the directory.
#[derive(Args)]
struct PullArgs {
    #[command(flatten)]
    model: ModelArg,
    #[command(flatten)]
    bundle: BundleArgs,
}

/// Options of a role's process.
#[derive(Args, Clone)]
pub(crate) struct RunArgs {
    /// Network backend: mio (epoll), uring (io_uring) or memory (both roles in one process).
    #[arg(long, env = "HAT_LINK", default_value = "mio", value_parser = parse_link)]
    link: LinkKind,
    /// Compute threads [default: one for each core].
    #[arg(long, env = "HAT_THREADS", value_name = "N")]
    threads: Option<usize>,
    /// Niceness of compute threads above the process's own, 0 to 19.
    #[arg(long, env = "HAT_NICE", default_value_t = 0, value_name = "N",
        value_parser = clap::value_parser!(u8).range(0..=19))]
    nice: u8,
    /// Kernels: auto for the CPU's best, portable for comparison, cuda or cuda:GPU for a GPU,
    /// cuda-else-cpu for a GPU where there is one, and the CPU once it is lost. What
    /// has run on which GPU is in cuda/HARDWARE.md.
    #[arg(long, env = "HAT_PROCESSOR", default_value = "auto", value_parser = parse_processor)]
    processor: Processor,
    /// Weights of a GPU that shares the host's memory: in-place reads the bundle's mapped file,
    /// copied makes a second copy that its caches may serve better.
    #[arg(long, env = "HAT_WEIGHTS", default_value = "in-place", value_parser = parse_weights)]
    weights: GpuWeights,
    /// Skip hashing the bundle's files. A changed file then gives wrong text.
    #[arg(long, env = "HAT_NO_VERIFY")]
    no_verify: bool,
}

fn parse_weights(text: &str) -> Result<GpuWeights, String> {
    GpuWeights::from_name(text).ok_or_else(|| format!("{text:?} is neither in-place nor copied"))
}

fn parse_link(text: &str) -> Result<LinkKind, String> {
    match text {
        "mio" => Ok(LinkKind::Mio),
        "uring" | "io_uring" => Ok(LinkKind::IoUring),
        "memory" => Ok(LinkKind::Memory),
        _ => Err(format!("{text:?} is none of mio, uring, memory")),
    }
}

fn parse_processor(text: &str) -> Result<Processor, String> {
    Processor::from_name(text).ok_or_else(|| {
        format!(
            "{text:?} is none of auto, portable, cuda, cuda:GPU, cuda-else-cpu, cuda-else-cpu:GPU"
        )
    })
}

/// Options of the device role about its cloud.
#[derive(Args, Clone)]
pub(crate) struct DeviceRunArgs {
    #[command(flatten)]
    pub(crate) bundle: BundleArgs,
    #[command(flatten)]
    pub(crate) run: RunArgs,
    /// Address of the cloud: HOST, HOST:PORT or PORT, with 7433 as the default port, and on this
    /// machine until there is TLS [default: a cloud in this process].
    #[arg(long, env = "HAT_CLOUD", value_name = "ADDR", value_parser = parse_cloud)]
    cloud: Option<Address>,
    /// Row codec on the wire: f32, f16, int8 or int4 [default: the bundle's, which is int8].
    #[arg(long, env = "HAT_WIRE", value_parser = parse_codec)]
    wire: Option<Codec>,
    /// Rows of a prompt's chunks, or auto for sizes planned from the measured link, device and
    /// cloud.
    #[arg(long, env = "HAT_CHUNKS", default_value = "auto", value_name = "N|auto")]
    chunks: ChunkPolicy,
    /// Refuse a cloud of any other arithmetic: 1 is the CPUs', 2 is CUDA's.
    #[arg(long, env = "HAT_CLOUD_ARITHMETIC", value_name = "ID")]
    cloud_arithmetic: Option<u32>,
    /// Reuse of prompt pages that the cloud still holds, under names made with a key that stays in
    /// the state directory.
    #[arg(long, env = "HAT_PREFIX", default_value = "on", action = clap::ArgAction::Set,
        value_parser = parse_switch, value_name = "on|off")]
    prefix: bool,
    /// Seconds for which a request waits while the cloud can't be reached.
    #[arg(long, env = "HAT_RECONNECT_S", default_value = "30", value_name = "S")]
    reconnect_s: u64,
}

/// The address of a cloud in another process.
fn parse_cloud(text: &str) -> Result<Address, String> {
    let address = Address::parse(text, Address::CLOUD_PORT).map_err(|error| error.to_string())?;
    let checked = address.check_port("cloud").and_then(|()| address.check_local("cloud"));
    checked.map(|()| address).map_err(reason)
}

/// The reason alone: clap names the flag.
fn reason(error: Error) -> String {
    match error {
        Error::Input(InputError::Field { reason, .. }) => reason,
        other => other.to_string(),
    }
}

/// An error about a field, with the flag that sets it.
pub(crate) fn flagged(error: Error) -> anyhow::Error {
    match error {
        Error::Input(InputError::Field { field, reason }) => {
            anyhow::anyhow!("--{}: {reason}", field.replace('_', "-"))
        }
        other => other.into(),
    }
}

fn parse_codec(text: &str) -> Result<Codec, String> {
    Codec::from_name(text).ok_or_else(|| format!("{text:?} is none of f32, f16, int8, int4"))
}

fn parse_switch(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("{text:?} is neither on nor off")),
    }
}

impl DeviceRunArgs {
    /// Refuses flags that can't work, before anything is fetched, made or written for them.
    pub(crate) fn check(&self, cache: &Path) -> anyhow::Result<()> {
        self.flags(PathBuf::new(), cache).check().map_err(flagged)?;
        self.bundle.model().map(drop)
    }

    /// The same, for the model that was named without a flag.
    pub(crate) fn named(mut self, model: ModelArg) -> anyhow::Result<Self> {
        self.bundle = self.bundle.named(model)?;
        Ok(self)
    }

    /// All that [`EngineConfig`] has, from the flags. The bundle is made if it is not there.
    pub(crate) fn config(&self, cache: &Path) -> anyhow::Result<EngineConfig> {
        self.check(cache)?;
        let mut config = self.flags(self.bundle.half(cache, Role::Device)?, cache);
        // A cloud in this process holds nothing of earlier ones.
        if self.prefix
            && self.cloud.is_some()
            && let Ok(state) = serve::state_dir()
        {
            config.prefix_secret = secret::prefix_secret(&state)?;
        }
        Ok(config)
    }

    /// The flags, for a device on `bundle`.
    pub(crate) fn flags(&self, bundle: PathBuf, cache: &Path) -> EngineConfig {
        let mut config = EngineConfig::new(bundle)
            .link(self.run.link)
            .verify(self.run.verify(cache))
            .drafters(pull::drafters(cache))
            .chunks(self.chunks)
            .prefix(self.prefix)
            .threads(self.run.threads());
        config.wire = self.wire;
        config.processor = self.run.processor;
        config.nice = self.run.nice;
        config.weights = self.run.weights;
        config.split_layer = self.bundle.split_layer();
        config.cloud_arithmetic = self.cloud_arithmetic;
        config.reconnect = std::time::Duration::from_secs(self.reconnect_s);
        if let Some(address) = &self.cloud {
            config = config.cloud(address.to_string());
        }
        if let CloudAddress::InProcess(cloud) = &mut config.cloud {
            **cloud = self.run.cloud_config(std::mem::take(&mut cloud.bundle), cache);
        }
        config
    }

    /// The place of the cloud, and what computes there as far as it is known here.
    pub(crate) fn cloud_words(&self, engine: &Engine) -> String {
        match (engine.cloud(), &self.cloud) {
            (None, Some(address)) => format!("cloud: {address}, another process"),
            (cloud, _) => {
                let describe = cloud.map_or(String::new(), Cloud::describe);
                format!("cloud: in this process; {describe}")
            }
        }
    }

    pub(crate) fn chunks(&self) -> ChunkPolicy {
        self.chunks
    }

    /// `--wire`, if it was given.
    pub(crate) fn wire(&self) -> Option<Codec> {
        self.wire
    }
}

impl RunArgs {
    /// Verdicts are remembered beside the models.
    pub(crate) fn verify(&self, cache: &Path) -> Verify {
        let mut verify = Verify::default();
        verify.enabled = !self.no_verify;
        verify.memory = Some(cache.to_owned());
        verify
    }

    pub(crate) fn cloud_config(&self, bundle: PathBuf, cache: &Path) -> CloudConfig {
        let mut config = CloudConfig::new(bundle).link(self.link).threads(self.threads());
        config.verify = self.verify(cache);
        config.processor = self.processor;
        config.nice = self.nice;
        config.weights = self.weights;
        config
    }

    pub(crate) fn threads(&self) -> usize {
        self.threads
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |cores| cores.get()))
    }

    /// Settings of the whole model's backend.
    pub(crate) fn compute(&self) -> ComputeConfig {
        let Self { processor, weights, nice, .. } = *self;
        ComputeConfig { processor, weights, threads: self.threads(), nice }
    }
}

/// Drafting of tokens ahead of the cloud.
#[derive(Args, Clone, Copy)]
pub(crate) struct DraftArgs {
    /// Drafting of tokens ahead of the cloud: auto for every drafter that pays, lookup for repeated
    /// words alone, off for none. The answer is the same.
    #[arg(long, env = "HAT_DRAFT", default_value = "auto", value_name = "auto|off|lookup")]
    pub(crate) draft: DraftMode,
}

/// Sampling.
///
/// Without a flag, `generate` is greedy and `chat` does what the model's makers recommend.
#[derive(Args, Clone)]
pub(crate) struct SamplerArgs {
    /// Sampling temperature; 0 is greedy. Without any flag of this group generate is greedy, and
    /// chat samples as the model's makers recommend.
    #[arg(long, value_name = "T", allow_hyphen_values = true)]
    temperature: Option<f32>,
    /// Keep the N likeliest tokens; 0 keeps all.
    #[arg(long, value_name = "N")]
    top_k: Option<u32>,
    /// Keep the likeliest tokens up to this probability together; 1 keeps all.
    #[arg(long, value_name = "P", allow_hyphen_values = true)]
    top_p: Option<f32>,
    /// Keep tokens at least this likely relative to the likeliest; 0 keeps all.
    #[arg(long, value_name = "P", allow_hyphen_values = true)]
    min_p: Option<f32>,
    /// Divisor of the logits of tokens that occurred; 1 changes nothing.
    #[arg(long, value_name = "X", allow_hyphen_values = true)]
    repetition_penalty: Option<f32>,
    /// Penalty subtracted once from the logits of tokens that occurred; 0 changes nothing.
    #[arg(long, value_name = "X", allow_hyphen_values = true)]
    presence_penalty: Option<f32>,
    /// Penalty subtracted from a token's logit for each time it occurred; 0 changes nothing.
    #[arg(long, value_name = "X", allow_hyphen_values = true)]
    frequency_penalty: Option<f32>,
    /// Bias added to the logit of token id TOKEN; may be repeated.
    #[arg(long, value_name = "TOKEN=BIAS", value_parser = parse_bias)]
    logit_bias: Vec<(u32, f32)>,
    /// Seed of sampling [default: 0 for generate, a new one for each answer of chat].
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

fn parse_bias(text: &str) -> Result<(u32, f32), String> {
    let (token, bias) = text.split_once('=').ok_or("expected TOKEN=BIAS")?;
    let token = token.parse().map_err(|error| format!("token {token:?}: {error}"))?;
    let bias = bias.parse().map_err(|error| format!("bias {bias:?}: {error}"))?;
    Ok((token, bias))
}

impl SamplerArgs {
    /// The sampler that the flags ask for; `silent` says what they leave out.
    pub(crate) fn config(&self, silent: &SamplerConfig) -> SamplerConfig {
        SamplerConfig {
            temperature: self.temperature.unwrap_or(silent.temperature),
            top_k: self.top_k.unwrap_or(silent.top_k),
            top_p: self.top_p.unwrap_or(silent.top_p),
            min_p: self.min_p.unwrap_or(silent.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(silent.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(silent.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(silent.frequency_penalty),
            logit_bias: self.logit_bias.clone(),
            seed: self.seed.unwrap_or(silent.seed),
            ..silent.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Every sampler field over its whole range, which is what `SamplerConfig::check` takes.
    fn samplers() -> impl Strategy<Value = SamplerConfig> {
        let bias = prop::collection::vec((0u32..1000, -100f32..=100.0), 0..4);
        let choice = (0f32..=100.0, any::<u32>(), 0f32..=1.0, 0f32..=1.0, any::<u64>());
        let penalties = (0.01f32..=100.0, -2f32..=2.0, -2f32..=2.0);
        (choice, penalties, bias).prop_map(|(choice, penalties, logit_bias)| {
            let (temperature, top_k, top_p, min_p, seed) = choice;
            let (repetition_penalty, presence_penalty, frequency_penalty) = penalties;
            SamplerConfig {
                temperature,
                top_k,
                top_p,
                min_p,
                repetition_penalty,
                presence_penalty,
                frequency_penalty,
                logit_bias,
                seed,
                ..SamplerConfig::default()
            }
        })
    }

    fn flags(sampler: &SamplerConfig, joined: bool) -> Vec<String> {
        let mut pairs = vec![
            ("--temperature", sampler.temperature.to_string()),
            ("--top-k", sampler.top_k.to_string()),
            ("--top-p", sampler.top_p.to_string()),
            ("--min-p", sampler.min_p.to_string()),
            ("--repetition-penalty", sampler.repetition_penalty.to_string()),
            ("--presence-penalty", sampler.presence_penalty.to_string()),
            ("--frequency-penalty", sampler.frequency_penalty.to_string()),
            ("--seed", sampler.seed.to_string()),
        ];
        for (token, bias) in &sampler.logit_bias {
            pairs.push(("--logit-bias", format!("{token}={bias}")));
        }
        match joined {
            true => pairs.into_iter().map(|(flag, value)| format!("{flag}={value}")).collect(),
            false => pairs.into_iter().flat_map(|(flag, value)| [flag.into(), value]).collect(),
        }
    }

    /// The sampler that a command line asks for.
    fn parsed(command: &[&str], flags: Vec<String>) -> Result<SamplerConfig, clap::Error> {
        let line = ["hat-engine"].iter().chain(command).map(|&word| word.to_owned()).chain(flags);
        Ok(match Cli::try_parse_from(line)?.command {
            Command::Generate(args) => args.sampler.config(&SamplerConfig::default()),
            Command::Chat(args) => args.sampler.config(&SamplerConfig::default()),
            _ => panic!("neither command has a sampler"),
        })
    }

    proptest! {
        #[test]
        fn every_legal_sampler_passes_the_command_line(sampler in samplers(), joined: bool) {
            sampler.check(1000).unwrap();
            for command in [&["generate", "-p", "x"][..], &["chat"]] {
                let got = parsed(command, flags(&sampler, joined));
                prop_assert_eq!(got.map_err(|error| error.to_string()), Ok(sampler.clone()));
            }
        }
    }

    #[test]
    fn a_flag_wins_over_what_the_model_recommends() {
        let model = SamplerConfig {
            temperature: 0.2,
            top_p: 0.9,
            penalty_last_n: 64,
            ..SamplerConfig::default()
        };
        let cli = Cli::try_parse_from(["hat-engine", "chat", "--temperature", "0", "--top-k", "5"]);
        let Ok(Cli { command: Command::Chat(args), .. }) = cli else { panic!("no chat") };
        let expected = SamplerConfig { temperature: 0.0, top_k: 5, ..model.clone() };
        assert_eq!(args.sampler.config(&model), expected);
    }

    #[test]
    fn the_ends_of_every_range_pass_the_command_line() {
        for value in ["-2", "-.5", "-1e-3", "-2.0", "2", "0", "-0"] {
            for flag in ["--presence-penalty", "--frequency-penalty"] {
                let flags = vec![flag.to_owned(), value.to_owned()];
                assert!(parsed(&["generate", "-p", "x"], flags).is_ok(), "{flag} {value}");
            }
        }
    }
}
