//! The device role: one engine thread that owns backend, connection and link.

mod calls;
mod dial;
mod resolve;
mod run;
mod start;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Sender, TrySendError, bounded, unbounded};
use hat_compute::open;
use hat_loader::{Bundle, Fitting, LlamaConfig, Role, SamplingDefaults};
use hat_transport::clock::{Clock, SystemClock};
use hat_transport::link::memory::MemoryNet;
use hat_transport::link::{LinkKind, Waker};

use crate::cloud::Cloud;
use crate::config::{CloudAddress, Codec, EngineConfig};
use crate::generation::CancelOnDrop;
use crate::text::{Rendered, Text};
use crate::verify::Verify;
use crate::{Error, Event, Generation, Request, endpoint, spawn};
use hat_core::RequestError;
use hat_core::answer::Prepared;
use hat_core::draft::ModelDrafter;
use hat_core::draft::drafter::Drafter;
use hat_core::metrics::EngineMetrics;
use hat_core::sample::SamplerConfig;
use hat_core::sequence::PENDING_ROWS_MAX;
use hat_plan::DeviceForward;

/// A request on its way to the engine thread.
pub(crate) struct Submission {
    pub(crate) prepared: Prepared,
    pub(crate) rendered: Rendered,
    pub(crate) events: Sender<Result<Event, Error>>,
    pub(crate) cancelled: Arc<AtomicBool>,
    pub(crate) asked: std::time::Instant,
    /// Held until the request has a session.
    pub(crate) waits: Option<Waits>,
}

/// Counts a request while it waits.
pub(crate) struct Waits(Arc<Shared>);

impl Waits {
    fn new(shared: &Arc<Shared>) -> Self {
        shared.waiting.fetch_add(1, Ordering::Relaxed);
        Self(shared.clone())
    }
}

impl Drop for Waits {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// State shared by callers and the engine thread.
pub(crate) struct Shared {
    pub(crate) text: Text,
    pub(crate) config: LlamaConfig,
    pub(crate) context: u32,
    pub(crate) sessions_max: u32,
    pub(crate) connected: AtomicBool,
    /// Requests without a session so far, in the queue or on the engine thread.
    waiting: AtomicU64,
    pub(crate) stop: AtomicBool,
    /// True if the engine thread takes no more requests, since it ends.
    pub(crate) ended: AtomicBool,
    metrics: Mutex<EngineMetrics>,
    /// Description of the present backends.
    describe: Mutex<Described>,
    pub(crate) clock: Arc<dyn Clock>,
}

/// Descriptions of the backends, one line each for people.
#[derive(Default)]
pub(crate) struct Described {
    device: String,
    drafter: Option<String>,
}

impl Shared {
    /// Locked once a look, and when another backend takes over.
    fn describe(&self) -> MutexGuard<'_, Described> {
        self.describe.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locked once a request, and once a look.
    fn metrics(&self) -> MutexGuard<'_, EngineMetrics> {
        self.metrics.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A device: the text side of a split model. Dropping it cancels what runs and stops its thread,
/// and its cloud if it started one.
pub struct Engine {
    shared: Arc<Shared>,
    submissions: Sender<Submission>,
    waker: Waker,
    thread: Option<JoinHandle<()>>,
    model_name: String,
    sampling: SamplingDefaults,
    /// Origin of the trained drafter.
    drafter: Option<String>,
    split_layer: usize,
    wire: Codec,
    queue_max: u32,
    cloud: Option<Cloud>, // dropped last: the engine thread still sends it a CLOSE
}

impl Engine {
    /// Opens the bundle, starts the engine thread, and begins to connect to the cloud. A cloud
    /// that is away is no error here: requests wait for it as long as the configuration says.
    ///
    /// With a processor that falls back ([`crate::options::Processor::CudaElseCpu`]) an engine that
    /// loses its GPU ends the requests that run, and serves the next ones from the CPU.
    ///
    /// # Errors
    /// [`Error::Load`], [`Error::Input`], [`Error::Io`]; and what
    /// [`Cloud::start`] says if the engine starts its own.
    pub fn open(config: EngineConfig) -> Result<Self, Error> {
        config.check()?;
        let bundle = open_bundle(&config.bundle, &config.verify, config.threads)?;
        let split_layer = split_layer(&config, &bundle)?;
        let model = load(&config, &bundle, split_layer)?;
        let drafter = load_drafter(&config, &bundle, split_layer, model.arithmetic_id())?;
        let (drafter, origin) = drafter.unzip();
        let mut engine = Self::serve_loaded(config, &bundle, model, drafter)?;
        engine.drafter = origin;
        engine.split_layer = split_layer;
        Ok(engine)
    }

    /// Serves a model that is loaded.
    pub(crate) fn serve_loaded(
        mut config: EngineConfig,
        bundle: &Bundle,
        model: Box<dyn DeviceForward>,
        drafter: Option<Box<dyn Drafter>>,
    ) -> Result<Self, Error> {
        let split_layer = split_layer(&config, bundle)?;
        config.wire = config.wire.or_else(|| Codec::from_name(bundle.manifest().wire_asked()?));
        let wire = config.codec();
        let mut cloud = None;
        if let CloudAddress::InProcess(mut cloud_config) = config.cloud {
            if config.link == LinkKind::Memory {
                let net = MemoryNet::new();
                config.memory = Some(net.clone());
                cloud_config.memory = Some(net);
            }
            let started = Cloud::start(*cloud_config)?;
            config.cloud = CloudAddress::Remote(started.address().to_string());
            cloud = Some(started);
        }
        let model_config = bundle.config().clone();
        let context = usize::try_from(config.limits.context_max)
            .unwrap_or(usize::MAX)
            .min(model_config.max_position_embeddings);
        let shared = Arc::new(Shared {
            text: Text::open(bundle)?,
            context: u32::try_from(context).unwrap_or(u32::MAX),
            sessions_max: config.limits.sessions_max,
            config: model_config,
            connected: AtomicBool::new(false),
            waiting: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            metrics: Mutex::new(EngineMetrics::default()),
            describe: Mutex::default(),
            clock: Arc::new(SystemClock),
        });
        let queue_max = config.limits.queue_max;
        let (submissions, incoming) = bounded(queue_max as usize);
        let facts = endpoint::device_facts(bundle, split_layer);
        let layers = start::Layers { config, facts, model };
        let device = layers.open(bundle, drafter, shared.clone(), incoming)?;
        let waker = device.endpoint.waker();
        let thread = spawn("hat-device", move || device.run())?;
        Ok(Self {
            shared,
            submissions,
            waker,
            thread: Some(thread),
            model_name: bundle.manifest().model_name.clone(),
            sampling: bundle.sampling(),
            drafter: None,
            split_layer,
            wire,
            queue_max,
            cloud,
        })
    }

    /// Asks for an answer. Returns at once; the answer comes through the [`Generation`].
    ///
    /// # Errors
    /// [`Error::Input`] and [`Error::Template`] for a bad request; [`RequestError::Busy`] if too
    /// many wait already, and [`RequestError::Stopped`].
    pub fn generate(&self, request: Request) -> Result<Generation, Error> {
        let asked = self.shared.clock.now();
        let (prepared, rendered) = self.prepare(request)?;
        let prompt_tokens = prepared.prompt.len();
        // Bounded by the answer: one event a token, one a prompt chunk, one at the end.
        let (events, receiver) = unbounded();
        let cancelled = Arc::new(AtomicBool::new(false));
        let waits = Some(Waits::new(&self.shared));
        let submission =
            Submission { prepared, rendered, events, cancelled: cancelled.clone(), asked, waits };
        match self.submissions.try_send(submission) {
            Ok(()) => {
                fence(Ordering::SeqCst);
                if self.shared.ended.load(Ordering::SeqCst) {
                    return Err(Error::stopped("its thread has ended"));
                }
            }
            Err(TrySendError::Full(_)) => {
                let reason = format!("{} requests wait already", self.queue_max);
                return Err(RequestError::Busy { reason, retry_after_ms: 1000 }.into());
            }
            Err(TrySendError::Disconnected(_)) => {
                return Err(Error::stopped("its thread has ended"));
            }
        }
        self.waker.wake();
        let cancel = CancelOnDrop { cancelled, waker: self.waker.clone() };
        Ok(Generation { events: receiver, prompt_tokens, _cancel: cancel, finished: false })
    }

    pub(crate) fn prepare(&self, request: Request) -> Result<(Prepared, Rendered), Error> {
        self.shared.text.prepare(request, self.shared.context)
    }

    /// The name of the model, as its checkpoint gives it.
    #[must_use]
    pub fn model_name(&self) -> &str {
        &self.model_name
    }

    /// Sampling settings that the model's makers recommend, from its `generation_config.json` or
    /// GGUF metadata; greedy if they give none. Requests are greedy whatever it is, unless a caller
    /// takes it, as the HTTP API does where a request is silent.
    #[must_use]
    pub fn sampling(&self) -> SamplerConfig {
        let (model, off) = (&self.sampling, SamplerConfig::default());
        SamplerConfig {
            temperature: model.temperature.unwrap_or(off.temperature),
            top_k: model.top_k.unwrap_or(off.top_k),
            top_p: model.top_p.unwrap_or(off.top_p),
            min_p: model.min_p.unwrap_or(off.min_p),
            repetition_penalty: model.repetition_penalty.unwrap_or(off.repetition_penalty),
            penalty_last_n: model.repeat_last_n.unwrap_or(off.penalty_last_n),
            ..off
        }
    }

    /// The codec of its rows on the wire.
    #[must_use]
    pub fn wire(&self) -> Codec {
        self.wire
    }

    /// Positions of one session, prompt and answer together.
    #[must_use]
    pub fn context(&self) -> u32 {
        self.shared.context
    }

    /// Answers at once; further requests wait for their turn.
    #[must_use]
    pub fn sessions_max(&self) -> u32 {
        self.shared.sessions_max
    }

    /// Requests that wait for a session now, in the order in which they came.
    #[must_use]
    pub fn waiting(&self) -> u64 {
        self.shared.waiting.load(Ordering::Relaxed)
    }

    /// True if the cloud is connected now.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.shared.connected.load(Ordering::Acquire)
    }

    /// Waits until the cloud is connected; returns true if it is.
    #[must_use]
    pub fn wait_connected(&self, timeout: Duration) -> bool {
        let end = self.shared.clock.now() + timeout;
        while !self.is_connected() && self.shared.clock.now() < end {
            std::thread::sleep(Duration::from_millis(2));
        }
        self.is_connected()
    }

    /// One line about the backend that computes now.
    #[must_use]
    pub fn describe(&self) -> String {
        self.shared.describe().device.clone()
    }

    /// One line about the trained drafter that drafts now, if one does.
    #[must_use]
    pub fn describe_drafter(&self) -> Option<String> {
        self.shared.describe().drafter.clone()
    }

    /// Origin of the trained drafter, for people: in the bundle, built in, or a file. `None` if
    /// there is none for this model and split.
    #[must_use]
    pub fn drafter_origin(&self) -> Option<&str> {
        self.drafter.as_deref()
    }

    /// Layers on the device before the cloud's.
    #[must_use]
    pub fn split_layer(&self) -> usize {
        self.split_layer
    }

    /// True if it has stopped by itself, since its link or its backend failed: it answers nothing
    /// any more.
    #[must_use]
    pub fn has_stopped(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// The cloud that this engine started, if it did.
    #[must_use]
    pub fn cloud(&self) -> Option<&Cloud> {
        self.cloud.as_ref()
    }

    /// Figures over all requests so far.
    #[must_use]
    pub fn metrics(&self) -> EngineMetrics {
        self.shared.metrics().clone()
    }

    #[cfg(feature = "http")]
    pub(crate) fn tokenizer(&self) -> &hat_text::Tokenizer {
        &self.shared.text.tokenizer
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.waker.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The device's layers on the processor of a configuration.
fn load(
    config: &EngineConfig,
    bundle: &Bundle,
    split_layer: usize,
) -> Result<Box<dyn DeviceForward>, Error> {
    let (rows, pages) = (config.limits.step_rows_max as usize, config.limits.pages());
    Ok(open::device(&config.compute(), bundle, split_layer, rows, pages)?)
}

/// A trained drafter, and its origin for people.
type LoadedDrafter = (Box<dyn Drafter>, String);

/// The trained drafter for a device's bundle and this split with its origin, if there is one, on
/// the GPU where the device's layers compute in CUDA's arithmetic.
///
/// # Errors
/// [`Error::Load`].
fn load_drafter(
    config: &EngineConfig,
    bundle: &Bundle,
    split_layer: usize,
    arithmetic_id: u32,
) -> Result<Option<LoadedDrafter>, Error> {
    let rows = (config.limits.step_rows_max as usize).max(PENDING_ROWS_MAX);
    let pages = config.limits.pages();
    let found = config.drafters.find(bundle, split_layer);
    let found = found.map_err(|error| Error::bundle(bundle.directory(), error))?;
    let Some(Fitting { origin, adapter }) = found else { return Ok(None) };
    let compute = config.compute();
    let model = open::drafter(&compute, bundle, &adapter, arithmetic_id, rows, pages)?;
    let hidden_size = bundle.config().hidden_size;
    let sessions = ModelDrafter::new(model, hidden_size, rows, pages);
    Ok(Some((Box::new(sessions), origin)))
}

/// Opens a device's bundle and verifies its files.
///
/// # Errors
/// [`Error::Load`].
pub(crate) fn open_bundle(
    path: &std::path::Path,
    verify: &Verify,
    threads: usize,
) -> Result<Bundle, Error> {
    let mut bundle = Bundle::open(path).map_err(|error| Error::bundle(path, error))?;
    if bundle.role() != Role::Device {
        return Err(Error::bundle(path, "it is the cloud half; a device needs the device half"));
    }
    verify.check(&mut bundle, threads)?;
    Ok(bundle)
}

/// The configured split, checked against what the bundle holds.
///
/// # Errors
/// [`Error::Input`] with both numbers.
pub(crate) fn split_layer(config: &EngineConfig, bundle: &Bundle) -> Result<usize, Error> {
    let held = bundle.manifest().split_layer;
    let split_layer = config.split_layer.map_or(held, |split_layer| split_layer as usize);
    if split_layer > held {
        let reason = format!(
            "{split_layer} layers were asked for, the bundle {} holds the first {held}: \
             split the model again with --split-layer {split_layer}",
            bundle.directory().display()
        );
        return Err(Error::field("split_layer", reason));
    }
    Ok(split_layer)
}
