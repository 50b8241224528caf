//! The cloud role: around a [`hat_core::cloud::CloudCore`] stand an io thread, the `shell`, which
//! owns link and clock; a thread for each pipeline stage (`step`), which owns a backend and a run
//! of layers, with bounded queues between them; and a thread that waits for their end, and begins
//! anew on the CPU where it may (`keep`).

mod memory;
mod shell;
mod step;
mod supervisor;

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use hat_compute::open::{self, ComputeConfig};
use hat_core::cloud::CloudFigures;
use hat_loader::{Bundle, Role, Submodel};
use hat_plan::{BackendFault, MiddleForward};

use self::step::SHARED_MAX;
use self::supervisor::{Run, Seen, Supervisor};
use crate::Error;
use crate::config::CloudConfig;

/// Figures of a cloud as its threads show them.
pub type CloudCounters = CloudFigures<AtomicU64>;

/// Totals of all runs so far.
fn figures(counters: &CloudCounters) -> CloudFigures {
    counters.zip(&CloudFigures::<u64>::default(), |counter, _| counter.load(Ordering::Relaxed))
}

/// Shows what a core has done.
fn publish(counters: &CloudCounters, figures: &CloudFigures) {
    counters.zip(figures, |counter, figure| counter.store(*figure, Ordering::Relaxed));
}

/// A running cloud. Dropping it stops it.
pub struct Cloud {
    address: SocketAddr,
    seen: Arc<Seen>,
    supervisor: Option<JoinHandle<Option<BackendFault>>>,
}

impl Cloud {
    /// Opens the bundle, listens, and serves on threads of its own. With a processor that falls
    /// back ([`crate::options::Processor::CudaElseCpu`]) a cloud that loses its GPU begins anew on
    /// the CPU, at the same address: its devices come back and replay.
    ///
    /// # Errors
    /// [`Error::Input`] for a listen address that other machines can reach, [`Error::Load`],
    /// [`Error::Io`] if the address cannot be had.
    pub fn start(config: CloudConfig) -> Result<Self, Error> {
        config.check()?;
        let bundle = open_bundle(&config)?;
        let pages = pool_pages(&config);
        let stages = load(&config, &bundle, pages)?;
        Self::serve_loaded(config, &bundle, stages, pages)
    }

    /// Serves a model that is loaded: its runs of layers, in order, are the stages of a pipeline.
    pub(crate) fn serve_loaded(
        config: CloudConfig,
        bundle: &Bundle,
        stages: Vec<Box<dyn MiddleForward>>,
        pages: u32,
    ) -> Result<Self, Error> {
        config.check()?;
        let seen = Arc::new(Seen::default());
        let run = Run::start(&config, bundle, stages, pages, &seen)?;
        let address = run.address;
        let supervisor = Supervisor { config, model_id: bundle.model_id(), seen: seen.clone() };
        let supervisor = spawn("hat-cloud", move || supervisor.supervise(run))?;
        Ok(Self { address, seen, supervisor: Some(supervisor) })
    }

    /// Address that it listens at; the port is the one that the system chose if 0 was configured.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// One line about the backend that computes now.
    #[must_use]
    pub fn describe(&self) -> String {
        self.seen.describe()
    }

    /// Totals so far.
    #[must_use]
    pub fn counters(&self) -> &CloudCounters {
        &self.seen.counters
    }

    /// True if it has stopped by itself.
    #[must_use]
    pub fn has_stopped(&self) -> bool {
        self.supervisor.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits until it stops by itself, which it does only when its link or its backend fails.
    /// Returns the fault if a backend was lost: another cloud may serve its sessions, which their
    /// devices replay.
    pub fn join(mut self) -> Option<BackendFault> {
        self.supervisor.take()?.join().ok()?
    }
}

impl Drop for Cloud {
    fn drop(&mut self) {
        self.seen.stop();
        if let Some(supervisor) = self.supervisor.take() {
            let _ = supervisor.join();
        }
    }
}

/// Opens a cloud's bundle and verifies its files.
///
/// # Errors
/// [`Error::Load`].
pub fn open_bundle(config: &CloudConfig) -> Result<Bundle, Error> {
    let path = &config.bundle;
    let mut bundle = Bundle::open(path).map_err(|error| Error::bundle(path, error))?;
    if bundle.role() != Role::Cloud {
        let reason = "it holds no middle layers; a cloud needs the cloud half";
        return Err(Error::bundle(path, reason));
    }
    config.verify.check(&mut bundle, config.threads)?;
    Ok(bundle)
}

/// Pages of the KV store: the configured rows, and room for pending rows.
#[must_use]
pub fn pool_pages(config: &CloudConfig) -> u32 {
    u32::try_from(config.limits.pages()).expect("row counts are u32")
}

/// The middle submodel as `config.stages` runs of layers, the compute threads shared among them.
///
/// # Errors
/// [`Error::Input`] if there are more stages than layers, [`Error::Load`].
fn load(
    config: &CloudConfig,
    bundle: &Bundle,
    pages: u32,
) -> Result<Vec<Box<dyn MiddleForward>>, Error> {
    let layers = bundle.split().layers(Submodel::Middle);
    let runs = runs_of_layers(layers, config.stages)?;
    let CloudConfig { processor, weights, nice, .. } = *config;
    let threads = config.threads.div_ceil(config.stages);
    let compute = ComputeConfig { processor, weights, threads, nice };
    let (rows, pages) = (config.limits.step_rows_max as usize, pages as usize);
    Ok(open::middle(&compute, &config.gpus, bundle, &runs, rows, pages, SHARED_MAX)?)
}

/// Cuts `layers` into `stages` runs whose lengths differ by one at most.
fn runs_of_layers(layers: Range<usize>, stages: usize) -> Result<Vec<Range<usize>>, Error> {
    let count = layers.len();
    if stages == 0 || stages > count {
        let reason = format!("{stages} stages cannot share {count} layers: from 1 to {count}");
        return Err(Error::field("stages", reason));
    }
    let cut = |stage: usize| layers.start + stage * count / stages;
    Ok((0..stages).map(|stage| cut(stage)..cut(stage + 1)).collect())
}

/// The one arithmetic of all stages.
fn arithmetic_of(stages: &[Box<dyn MiddleForward>]) -> Result<u32, Error> {
    let mut ids: Vec<u32> = stages.iter().map(|stage| stage.arithmetic_id()).collect();
    ids.dedup();
    match ids[..] {
        [id] => Ok(id),
        _ => Err(Error::field("stages", format!("compute in several arithmetics: {ids:?}"))),
    }
}

fn describe(stages: &[Box<dyn MiddleForward>]) -> String {
    match stages {
        [stage] => stage.describe(),
        [stage, ..] => {
            let mut text = format!("{} stages of {}", stages.len(), stage.describe());
            let mut ways: Vec<&str> =
                stages.iter().filter_map(|stage| stage.hands_over()).collect();
            ways.dedup();
            for way in ways {
                text += &format!(", rows {way}");
            }
            text
        }
        [] => unreachable!("a cloud has at least one stage"),
    }
}

/// A thread of a role.
pub(crate) fn spawn<T: Send + 'static>(
    name: &str,
    run: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>, Error> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(run)
        .map_err(|error| Error::io(format!("starting thread {name}"), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_share_the_layers_evenly() {
        assert_eq!(runs_of_layers(2..30, 1).unwrap().first(), Some(&(2..30)));
        assert_eq!(runs_of_layers(2..30, 4).unwrap(), [2..9, 9..16, 16..23, 23..30]);
        assert_eq!(runs_of_layers(1..4, 2).unwrap(), [1..2, 2..4]);
        assert_eq!(runs_of_layers(1..4, 3).unwrap(), [1..2, 2..3, 3..4]);
        for stages in [0, 4] {
            let text = runs_of_layers(1..4, stages).unwrap_err().to_string();
            assert!(text.contains("stages") && text.contains("3 layers"), "{text}");
        }
    }
}
