//! Choice of a backend, and the submodels loaded on it.

use std::ops::Range;

#[cfg(feature = "cuda")]
use hat_cuda::driver::Cuda;
#[cfg(feature = "cuda")]
use hat_cuda::gpu::Gpu as _;
use hat_loader::{Bundle, DrafterFile};

use hat_plan::{ARITHMETIC_CPU, DeviceForward, DraftForward, MiddleForward};

use crate::backend::cpu::{CpuBackend, CpuConfig, Level};
#[cfg(feature = "cuda")]
use crate::backend::cuda::CudaBackend;
use crate::{DeviceModel, DraftModel, LoadError, MiddleModel};

/// Memory in which a GPU has its weights. A GPU with memory of its own always has them there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum GpuWeights {
    /// In the bundle's mapped file, where a GPU without memory of its own can read them there: no
    /// second copy.
    #[default]
    InPlace,
    /// In memory that was allocated for the GPU, which its caches may serve better.
    Copied,
}

impl GpuWeights {
    /// The value of `--weights`.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "in-place" => Some(Self::InPlace),
            "copied" => Some(Self::Copied),
            _ => None,
        }
    }
}

/// Processor that computes. A GPU is taken only if it is asked for; `cuda/HARDWARE.md` lists what
/// has run on which.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Processor {
    /// The fastest CPU level that this machine has.
    #[default]
    Auto,
    /// The portable CPU level.
    Portable,
    /// The GPU of this number, or an error.
    #[cfg(feature = "cuda")]
    Cuda(usize),
    /// The GPU of this number, or, where it can't be used, what [`Processor::Auto`] is. A device or
    /// a cloud that loses its GPU goes on with the CPU: a cloud's sessions are replayed, a device's
    /// requests that run end with an error (`docs/KERNELS.md`).
    #[cfg(feature = "cuda")]
    CudaElseCpu(usize),
}

impl Processor {
    /// The value of `--processor`.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "auto" => Some(Self::Auto),
            "portable" => Some(Self::Portable),
            #[cfg(feature = "cuda")]
            name => {
                let (kind, ordinal) = name.split_once(':').unwrap_or((name, "0"));
                let ordinal = ordinal.parse().ok()?;
                match kind {
                    "cuda" => Some(Self::Cuda(ordinal)),
                    "cuda-else-cpu" => Some(Self::CudaElseCpu(ordinal)),
                    _ => None,
                }
            }
            #[cfg(not(feature = "cuda"))]
            _ => None,
        }
    }

    /// True if it takes the CPU where there is no GPU.
    #[must_use]
    pub fn falls_back(self) -> bool {
        match self {
            Self::Auto | Self::Portable => false,
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => false,
            #[cfg(feature = "cuda")]
            Self::CudaElseCpu(_) => true,
        }
    }
}

/// Settings of the backend that a model computes on.
#[derive(Clone, Copy, Debug)]
pub struct ComputeConfig {
    /// Processor to use.
    pub processor: Processor,
    /// Memory in which a GPU has its weights.
    pub weights: GpuWeights,
    /// Compute threads of a CPU backend, the caller's among them; at least 1.
    pub threads: usize,
    /// Niceness of these threads, on top of the process's.
    pub nice: u8,
}

impl ComputeConfig {
    /// The same on another processor.
    fn on(self, processor: Processor) -> Self {
        Self { processor, ..self }
    }
}

/// The backend of a configuration.
pub enum Chosen {
    /// A level of the CPU.
    Cpu(CpuBackend),
    /// A GPU.
    #[cfg(feature = "cuda")]
    Cuda(Box<CudaBackend<Cuda>>),
}

/// Runs `$use` with the backend in `$chosen`, whatever its type.
#[cfg(feature = "cuda")]
#[macro_export]
macro_rules! with_backend {
    ($chosen:expr, $backend:ident => $use:expr) => {
        match $chosen {
            $crate::open::Chosen::Cpu($backend) => $use,
            $crate::open::Chosen::Cuda(backend) => {
                let $backend = *backend;
                $use
            }
        }
    };
}

/// Runs `$use` with the backend in `$chosen`, whatever its type.
#[cfg(not(feature = "cuda"))]
#[macro_export]
macro_rules! with_backend {
    ($chosen:expr, $backend:ident => $use:expr) => {
        match $chosen {
            $crate::open::Chosen::Cpu($backend) => $use,
        }
    };
}

/// The backend of a configuration: a GPU if one is asked for.
///
/// # Errors
/// [`LoadError::Field`] as [`check_threads`], [`LoadError::Backend`] with the reason why a GPU,
/// or a level of the CPU, can't be had.
pub fn choose(config: &ComputeConfig) -> Result<Chosen, LoadError> {
    match config.processor {
        #[cfg(feature = "cuda")]
        Processor::Cuda(ordinal) => Ok(Chosen::Cuda(Box::new(cuda(ordinal, config.weights)?))),
        #[cfg(feature = "cuda")]
        Processor::CudaElseCpu(ordinal) => match cuda(ordinal, config.weights) {
            Ok(backend) => Ok(Chosen::Cuda(Box::new(backend))),
            Err(error) => {
                tracing::warn!(%error, "the CPU computes instead");
                Ok(Chosen::Cpu(cpu_of(config)?))
            }
        },
        _ => Ok(Chosen::Cpu(cpu_of(config)?)),
    }
}

#[cfg(feature = "cuda")]
fn cuda(ordinal: usize, weights: GpuWeights) -> Result<CudaBackend<Cuda>, LoadError> {
    let mut gpu = Cuda::open(ordinal).map_err(|error| hat_plan::BackendError::Config {
        backend: "cuda",
        field: "processor",
        reason: error.to_string(),
    })?;
    if weights == GpuWeights::Copied {
        gpu.copy_weights();
    }
    Ok(CudaBackend::new(gpu))
}

/// The device's layers, for steps of at most `rows` rows and a KV store of `pages` pages.
///
/// # Errors
/// As [`choose`] and [`DeviceModel::load`].
pub fn device(
    config: &ComputeConfig,
    bundle: &Bundle,
    split_layer: usize,
    rows: usize,
    pages: usize,
) -> Result<Box<dyn DeviceForward>, LoadError> {
    or_on_cpu(config, |config| -> Result<Box<dyn DeviceForward>, LoadError> {
        with_backend!(choose(config)?, backend => {
            Ok(Box::new(DeviceModel::load(backend, bundle, split_layer, rows, pages)?))
        })
    })
}

/// A trained drafter for a device's bundle: where the device's layers compute in CUDA's arithmetic
/// on the same GPU, with a stream of its own, else on the CPU. Drafts decide no text, so a GPU
/// without a kernel or room for it is no error.
///
/// # Errors
/// As [`cpu`] and [`DraftModel::new`].
pub fn drafter(
    config: &ComputeConfig,
    bundle: &Bundle,
    adapter: &DrafterFile,
    arithmetic_id: u32,
    rows: usize,
    pages: usize,
) -> Result<Box<dyn DraftForward>, LoadError> {
    let load = |processor| -> Result<Box<dyn DraftForward>, LoadError> {
        with_backend!(choose(&config.on(processor))?, backend => {
            Ok(Box::new(DraftModel::new(backend, bundle, adapter, rows, pages)?))
        })
    };
    let is_on_gpu = arithmetic_id != ARITHMETIC_CPU;
    let processor = match config.processor {
        Processor::Portable => Processor::Portable,
        processor if is_on_gpu => processor,
        _ => Processor::Auto,
    };
    match load(processor) {
        Err(error @ LoadError::Backend(_)) if is_on_gpu => {
            tracing::warn!(%error, "the trained drafter computes on the CPU");
            load(Processor::Auto)
        }
        loaded => loaded,
    }
}

/// All stages of a cloud's layers: `runs` are their layers, `gpus` take them in turn. Each hands
/// the next one rows of `steps` steps at most at a time.
///
/// # Errors
/// As [`choose`] and [`MiddleModel::load`]; [`LoadError::Field`] if not all GPUs can be used.
pub fn middle(
    config: &ComputeConfig,
    gpus: &[usize],
    bundle: &Bundle,
    runs: &[Range<usize>],
    rows: usize,
    pages: usize,
    steps: usize,
) -> Result<Vec<Box<dyn MiddleForward>>, LoadError> {
    or_on_cpu(config, |config| {
        let mut stages: Vec<Box<dyn MiddleForward>> = Vec::with_capacity(runs.len());
        for (stage, run) in runs.iter().enumerate() {
            let gpu = gpus.get(stage % gpus.len().max(1));
            let chosen = choose(&config.on(on_gpu(config.processor, gpu)))?;
            stages.push(with_backend!(chosen, backend => {
                Box::new(MiddleModel::load(backend, bundle, run.clone(), rows, pages)?)
            }));
        }
        let first = stages[0].arithmetic_id();
        if stages.iter().any(|stage| stage.arithmetic_id() != first) {
            // Some of the GPUs are there: all stages or none.
            let reason = "not all of them can be used; the log says why".to_owned();
            return Err(LoadError::Field { field: "gpus", reason });
        }
        for number in 1..stages.len() {
            let (before, after) = stages.split_at_mut(number);
            before[number - 1].link(&*after[0], steps)?;
        }
        Ok(stages)
    })
}

/// Result of `load` for a configuration; or for the CPU, if the processor falls back and its GPU is
/// too small or has no kernel for the model.
fn or_on_cpu<T>(
    config: &ComputeConfig,
    load: impl Fn(&ComputeConfig) -> Result<T, LoadError>,
) -> Result<T, LoadError> {
    match load(config) {
        Err(error @ (LoadError::Backend(_) | LoadError::Field { field: "gpus", .. }))
            if config.processor.falls_back() =>
        {
            tracing::warn!(%error, "the CPU computes instead");
            load(&config.on(Processor::Auto))
        }
        loaded => loaded,
    }
}

/// The same processor on another GPU.
#[cfg(feature = "cuda")]
fn on_gpu(processor: Processor, gpu: Option<&usize>) -> Processor {
    match (processor, gpu) {
        (Processor::Cuda(_), Some(&ordinal)) => Processor::Cuda(ordinal),
        (Processor::CudaElseCpu(_), Some(&ordinal)) => Processor::CudaElseCpu(ordinal),
        (processor, _) => processor,
    }
}

#[cfg(not(feature = "cuda"))]
fn on_gpu(processor: Processor, _: Option<&usize>) -> Processor {
    processor
}

/// The GPUs of this machine, a line for each, or one that says why there is none; and where none
/// can be used, what that means and what would help.
#[must_use]
pub fn gpus() -> Vec<String> {
    #[cfg(feature = "cuda")]
    let mut lines = match hat_cuda::driver::gpu_count() {
        Ok(0) => vec!["the NVIDIA driver finds no GPU".to_owned()],
        Ok(count) => {
            let opened = (0..count).map(|ordinal| (ordinal, Cuda::open(ordinal)));
            let mut can_be_used = false;
            let line = |(ordinal, gpu): (usize, Result<Cuda, _>)| match gpu {
                Ok(gpu) => {
                    can_be_used = true;
                    format!("{ordinal}: {}", gpu.describe())
                }
                Err(error) => format!("{ordinal}: {error}"),
            };
            let lines: Vec<String> = opened.map(line).collect();
            if can_be_used {
                return lines;
            }
            lines
        }
        Err(error) => vec![error.to_string()],
    };
    #[cfg(not(feature = "cuda"))]
    let mut lines = vec!["this program was built without the feature `cuda`".to_owned()];
    lines.push(
        "so the CPU computes, also with --processor cuda-else-cpu; --processor cuda is an error"
            .to_owned(),
    );
    #[cfg(feature = "cuda")]
    lines.push(
        "a GPU needs compute capability 8.0 and NVIDIA's driver for CUDA 12.0 or later; no toolkit"
            .to_owned(),
    );
    lines
}

/// Most compute threads of one model: more than any machine has cores for.
const THREADS_MAX: usize = 1024;

/// Refuses a number of compute threads that no machine can use.
///
/// # Errors
/// [`LoadError::Field`] `threads` for 0, and above 1,024.
pub fn check_threads(threads: usize) -> Result<(), LoadError> {
    let reason = match threads {
        0 => "0 threads compute nothing: at least 1".to_owned(),
        1..=THREADS_MAX => return Ok(()),
        _ => format!(
            "{threads} threads are more than any machine has use for: at most {THREADS_MAX}"
        ),
    };
    Err(LoadError::Field { field: "threads", reason })
}

/// A CPU backend; for a processor that is none, the best level.
///
/// # Errors
/// [`LoadError::Field`] if there are no threads, [`LoadError::Backend`] if the level is not there.
pub fn cpu(processor: Processor, threads: usize) -> Result<CpuBackend, LoadError> {
    cpu_of(&ComputeConfig { processor, weights: GpuWeights::default(), threads, nice: 0 })
}

fn cpu_of(config: &ComputeConfig) -> Result<CpuBackend, LoadError> {
    let ComputeConfig { processor, threads, nice, .. } = *config;
    check_threads(threads)?;
    let level = match processor {
        Processor::Portable => Level::Portable,
        _ => Level::Auto,
    };
    Ok(CpuBackend::niced(CpuConfig { threads, level }, nice)?)
}
