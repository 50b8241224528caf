//! Which backend computes, and what a bundle says about its tokenizer.

use std::ops::Range;

#[cfg(feature = "cuda")]
use hat_cuda::driver::Cuda;
#[cfg(feature = "cuda")]
use hat_cuda::gpu::Gpu as _;
use hat_loader::{Adapter, Bundle};

use crate::Error;
use crate::backend::ARITHMETIC_CPU;
use crate::backend::cpu::{CpuBackend, CpuConfig, Level};
#[cfg(feature = "cuda")]
use crate::backend::{BackendError, cuda::CudaBackend};
use crate::config::{CloudConfig, EngineConfig, GpuWeights, Processor};
use crate::model::{
    DeviceForward, DeviceModel, DraftForward, DraftModel, MiddleForward, MiddleModel,
};
use crate::token::TokenSettings;

/// Steps whose rows a stage may hold for the next one: one whose job it can't send yet, one in the
/// queue between them, one that the next stage computes; and one to spare.
const LENT_MAX: usize = 4;

/// The backend of a configuration.
pub enum Chosen {
    /// A level of the CPU.
    Cpu(CpuBackend),
    /// A GPU.
    #[cfg(feature = "cuda")]
    Cuda(Box<CudaBackend<Cuda>>),
}

/// Runs `$use` with the backend in `$chosen`, whatever its type.
macro_rules! with_backend {
    ($chosen:expr, $backend:ident => $use:expr) => {
        match $chosen {
            $crate::processor::Chosen::Cpu($backend) => $use,
            #[cfg(feature = "cuda")]
            $crate::processor::Chosen::Cuda(backend) => {
                let $backend = *backend;
                $use
            }
        }
    };
}
pub(crate) use with_backend;

/// The backend of a configuration: a GPU if one is asked for.
///
/// # Errors
/// [`Error::Field`] if there are no threads, [`Error::Backend`] with the reason why a GPU, or a
/// level of the CPU, can't be had.
pub fn choose(
    processor: Processor,
    weights: GpuWeights,
    (threads, nice): (usize, u8),
) -> Result<Chosen, Error> {
    #[cfg(not(feature = "cuda"))]
    let _ = weights;
    match processor {
        #[cfg(feature = "cuda")]
        Processor::Cuda(ordinal) => Ok(Chosen::Cuda(Box::new(cuda(ordinal, weights)?))),
        #[cfg(feature = "cuda")]
        Processor::CudaElseCpu(ordinal) => match cuda(ordinal, weights) {
            Ok(backend) => Ok(Chosen::Cuda(Box::new(backend))),
            Err(error) => {
                tracing::warn!(%error, "the CPU computes instead");
                Ok(Chosen::Cpu(cpu_at(processor, threads, nice)?))
            }
        },
        processor => Ok(Chosen::Cpu(cpu_at(processor, threads, nice)?)),
    }
}

#[cfg(feature = "cuda")]
fn cuda(ordinal: usize, weights: GpuWeights) -> Result<CudaBackend<Cuda>, Error> {
    let mut gpu = Cuda::open(ordinal).map_err(|error| BackendError::Config {
        backend: "cuda",
        field: "processor",
        reason: error.to_string(),
    })?;
    if weights == GpuWeights::Copied {
        gpu.copy_weights();
    }
    Ok(CudaBackend::new(gpu))
}

/// The device's layers on the backend of a configuration.
///
/// # Errors
/// As [`choose`] and [`DeviceModel::load`].
pub fn device(
    config: &EngineConfig,
    bundle: &Bundle,
    split_layer: usize,
    pages: usize,
) -> Result<Box<dyn DeviceForward>, Error> {
    let rows = config.limits.step_rows_max as usize;
    let at = (config.threads, config.nice);
    let load = |processor| -> Result<Box<dyn DeviceForward>, Error> {
        with_backend!(choose(processor, config.weights, at)?, backend => {
            Ok(Box::new(DeviceModel::load(backend, bundle, split_layer, rows, pages)?))
        })
    };
    or_on_cpu(config.processor, load)
}

/// A trained drafter for a device's bundle: where the device's layers compute in CUDA's arithmetic
/// on the same GPU, with a stream of its own, else on the CPU. Drafts decide no text, so a GPU
/// without a kernel or room for it is no error.
///
/// # Errors
/// As [`cpu`] and [`DraftModel::new`].
pub fn drafter(
    config: &EngineConfig,
    bundle: &Bundle,
    adapter: &Adapter,
    arithmetic_id: u32,
    rows: usize,
    pages: usize,
) -> Result<Box<dyn DraftForward>, Error> {
    let at = (config.threads, config.nice);
    let load = |processor| -> Result<Box<dyn DraftForward>, Error> {
        with_backend!(choose(processor, config.weights, at)?, backend => {
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
        Err(error @ Error::Backend(_)) if is_on_gpu => {
            tracing::warn!(%error, "the trained drafter computes on the CPU");
            load(Processor::Auto)
        }
        loaded => loaded,
    }
}

/// All stages of a cloud's layers: `runs` are their layers.
///
/// # Errors
/// As [`choose`] and [`MiddleModel::load`].
pub fn middle(
    config: &CloudConfig,
    bundle: &Bundle,
    runs: &[Range<usize>],
    threads: usize,
    pages: usize,
) -> Result<Vec<Box<dyn MiddleForward>>, Error> {
    let rows = config.limits.step_rows_max as usize;
    let load = |processor| -> Result<Vec<Box<dyn MiddleForward>>, Error> {
        let mut stages: Vec<Box<dyn MiddleForward>> = Vec::with_capacity(runs.len());
        for (stage, run) in runs.iter().enumerate() {
            let gpu = config.gpus.get(stage % config.gpus.len().max(1));
            let at = (threads, config.nice);
            let chosen = choose(on_gpu(processor, gpu), config.weights, at)?;
            stages.push(with_backend!(chosen, backend => {
                Box::new(MiddleModel::load(backend, bundle, run.clone(), rows, pages)?)
            }));
        }
        let first = stages[0].arithmetic_id();
        if stages.iter().any(|stage| stage.arithmetic_id() != first) {
            // Some of the GPUs are there: all stages or none.
            return Err(Error::field("gpus", "not all of them can be used; the log says why"));
        }
        for number in 1..stages.len() {
            let (before, after) = stages.split_at_mut(number);
            before[number - 1].link(&*after[0], LENT_MAX)?;
        }
        Ok(stages)
    };
    or_on_cpu(config.processor, load)
}

/// What `load` makes of a processor; or of the CPU, if the processor falls back and its GPU is too
/// small or has no kernel for the model.
fn or_on_cpu<T>(
    processor: Processor,
    load: impl Fn(Processor) -> Result<T, Error>,
) -> Result<T, Error> {
    match load(processor) {
        Err(error @ (Error::Backend(_) | Error::Field { field: "gpus", .. }))
            if processor.falls_back() =>
        {
            tracing::warn!(%error, "the CPU computes instead");
            load(Processor::Auto)
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

/// The CPU backend of a configuration; for a processor that is none, the best level.
///
/// # Errors
/// [`Error::Field`] if there are no threads, [`Error::Backend`] if the level is not there.
pub fn cpu(processor: Processor, threads: usize) -> Result<CpuBackend, Error> {
    cpu_at(processor, threads, 0)
}

/// As [`cpu`], with threads that are so much nicer than the process.
fn cpu_at(processor: Processor, threads: usize, nice: u8) -> Result<CpuBackend, Error> {
    if threads == 0 {
        return Err(Error::field("threads", "0 threads compute nothing; at least 1"));
    }
    let level = match processor {
        Processor::Portable => Level::Portable,
        _ => Level::Auto,
    };
    Ok(CpuBackend::niced(CpuConfig { threads, level }, nice)?)
}

/// What a device's bundle says about its tokenizer.
#[must_use]
pub fn token_settings(bundle: &Bundle) -> TokenSettings {
    let text = bundle.token_settings().cloned().unwrap_or_default();
    TokenSettings {
        vocab_size: bundle.config().vocab_size,
        chat_template: text.chat_template,
        bos_token: text.bos_token,
        eos_token: text.eos_token,
        eos_token_ids: bundle.config().eos_token_ids.clone(),
        template_limit: None,
        control_tokens: bundle.manifest().control_tokens.clone(),
        add_bos: None, // tokenizer.json's post-processor knows
    }
}
