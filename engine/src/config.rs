//! Configuration of the two roles: parsed once, then correct by construction.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use hat_compute::open::ComputeConfig;
pub use hat_compute::open::{GpuWeights, Processor};
pub use hat_core::chunk::ChunkPolicy;
use hat_core::page::pages_for;
pub use hat_core::prefix::PrefixSecret;
use hat_core::sequence::PENDING_ROWS_MAX;
use hat_loader::Drafters;
use hat_plan::PAGE_SIZE;
pub use hat_transport::codec::Codec;
pub use hat_transport::link::LinkKind;
use hat_transport::link::memory::MemoryNet;

use crate::Error;
use crate::verify::Verify;

mod address;

pub use address::Address;
pub(crate) use address::{Unresolved, check_loopback};

/// The bounds of a device. Each queue and store has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceLimits {
    /// Requests that run at once.
    pub sessions_max: u32,
    /// Rows of one step, and so of one chunk.
    pub step_rows_max: u32,
    /// Requests that wait for a session.
    pub queue_max: u32,
    /// Positions of one request, prompt and answer together; the model's context bounds it too.
    pub context_max: u32,
    /// Positions of all requests together, rounded up to pages.
    pub kv_rows_max: u32,
}

/// The bounds of a cloud. Each queue and store has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CloudLimits {
    /// Sessions open at once.
    pub sessions_max: u32,
    /// Rows of one step, and so of one chunk.
    pub step_rows_max: u32,
    /// Positions of one session, prompt and answer together; the model's context bounds it too.
    pub context_max: u32,
    /// Positions of all sessions together, rounded up to pages.
    pub kv_rows_max: u32,
    /// Connections at once.
    pub connections_max: u32,
    /// Sessions of one connection at once: one device can't shut others out.
    pub sessions_per_device_max: u32,
}

/// Sessions that both roles have room for by default, each of the whole context.
const SESSIONS: u32 = 4;
/// Positions of one session by default.
const CONTEXT_MAX: u32 = 8192;

/// Bounds for a few sessions of one user.
impl Default for DeviceLimits {
    fn default() -> Self {
        Self {
            sessions_max: SESSIONS,
            step_rows_max: 512,
            queue_max: 32,
            context_max: CONTEXT_MAX,
            kv_rows_max: kv_rows(SESSIONS, CONTEXT_MAX),
        }
    }
}

/// Bounds for a small machine.
impl Default for CloudLimits {
    fn default() -> Self {
        Self {
            sessions_max: 1024,
            step_rows_max: 512,
            context_max: CONTEXT_MAX,
            kv_rows_max: kv_rows(SESSIONS, CONTEXT_MAX),
            connections_max: 256,
            sessions_per_device_max: 256,
        }
    }
}

impl DeviceLimits {
    /// Requests of `context` positions each that there is room for at once.
    #[must_use]
    pub fn sessions_of(&self, context: u32) -> u32 {
        sessions_in(self.kv_rows_max, context).min(self.sessions_max)
    }

    /// Pages of the KV store: the rows, and room for pending ones.
    pub(crate) fn pages(&self) -> usize {
        pages(self.kv_rows_max)
    }

    /// Refuses bounds under which nothing could ever run.
    pub(crate) fn check(&self) -> Result<(), Error> {
        check_bounds(&[
            ("sessions_max", self.sessions_max),
            ("step_rows_max", self.step_rows_max),
            ("queue_max", self.queue_max),
            ("context_max", self.context_max),
            ("kv_rows_max", self.kv_rows_max),
        ])
    }
}

impl CloudLimits {
    /// Sessions of `context` positions each that there is room for at once.
    #[must_use]
    pub fn sessions_of(&self, context: u32) -> u32 {
        sessions_in(self.kv_rows_max, context).min(self.sessions_max)
    }

    /// Pages of the KV store: the rows, and room for pending ones.
    pub(crate) fn pages(&self) -> usize {
        pages(self.kv_rows_max)
    }

    fn check(&self) -> Result<(), Error> {
        check_bounds(&[
            ("sessions_max", self.sessions_max),
            ("step_rows_max", self.step_rows_max),
            ("context_max", self.context_max),
            ("kv_rows_max", self.kv_rows_max),
            ("connections_max", self.connections_max),
            ("sessions_per_device_max", self.sessions_per_device_max),
        ])
    }
}

/// Positions of a KV store for so many sessions of `context` positions each: a session has room
/// for the rows that pend beside its own, in whole pages.
#[must_use]
pub fn kv_rows(sessions: u32, context: u32) -> u32 {
    sessions.saturating_mul(u32::try_from(pages(context) * PAGE_SIZE).unwrap_or(u32::MAX))
}

/// Sessions of `context` positions each that a KV store of so many positions holds.
fn sessions_in(kv_rows_max: u32, context: u32) -> u32 {
    u32::try_from(pages(kv_rows_max) / pages(context)).unwrap_or(u32::MAX)
}

/// Pages for so many positions, and for the rows that pend beside them.
fn pages(rows: u32) -> usize {
    pages_for(rows as usize + PENDING_ROWS_MAX)
}

fn check_bounds(bounds: &[(&'static str, u32)]) -> Result<(), Error> {
    match bounds.iter().find(|(_, value)| *value == 0) {
        Some((field, _)) => Err(Error::field(field, "0 leaves room for nothing: at least 1")),
        None => Ok(()),
    }
}

/// Configuration of a device.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct EngineConfig {
    /// The device half of a bundle.
    pub bundle: PathBuf,
    /// True if the bundle's files are verified before the model is named to a cloud.
    pub verify: Verify,
    /// Address of the cloud, which runs the middle submodel.
    pub cloud: CloudAddress,
    /// Layers on the device before the cloud's; at most what the bundle holds. `None` is the
    /// bundle's own number.
    pub split_layer: Option<u32>,
    /// Codec of rows on the wire. `None` takes the one in the bundle's manifest: int8, unless its
    /// maker chose another.
    pub wire: Option<Codec>,
    /// Trained drafters for bundles that hold none for their model and split.
    pub drafters: Drafters,
    /// Policy that cuts prompts into chunks.
    pub chunks: ChunkPolicy,
    /// Reuse of a prompt's rows that the cloud still holds. With tail layers all rows go up.
    pub prefix: bool,
    /// Key of the names by which pages are asked for; devices that share it share their prompts'
    /// pages. `None` is a key for this engine alone.
    pub prefix_secret: Option<PrefixSecret>,
    /// Kind of the link.
    pub link: LinkKind,
    /// Compute threads.
    pub threads: usize,
    /// Niceness of compute threads, on top of the process's (`nice(2)`): 0 keeps the share of the
    /// cores that it was given, 19 is the most.
    pub nice: u8,
    /// Processor that computes.
    pub processor: Processor,
    /// Memory in which a GPU has its weights.
    pub weights: GpuWeights,
    /// Bounds.
    pub limits: DeviceLimits,
    /// The only arithmetic that the cloud's layers may compute in; any that is known without.
    /// 1 is that of the CPUs, 2 that of CUDA (`docs/ARITHMETIC.md`, `docs/KERNELS.md`).
    pub cloud_arithmetic: Option<u32>,
    /// Time without a token or new rows that a request spends waiting for a cloud that is away, or
    /// has no room, before it fails. Four times as much may go by in all while a cloud is there.
    pub reconnect: Duration,
    /// Network of memory links; set by the engine that starts its own cloud.
    pub(crate) memory: Option<MemoryNet>,
}

/// Address of the cloud, which runs the middle submodel.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum CloudAddress {
    /// Another process, at an [`Address`] of this machine: there is no TLS yet.
    Remote(String),
    /// A cloud of this engine's own, in this process, over a real loopback connection, from the
    /// cloud half beside the device half.
    InProcess(Box<CloudConfig>),
}

impl EngineConfig {
    /// A device on the bundle at `bundle`, with a cloud of its own from the directory `cloud`
    /// beside it.
    #[must_use]
    pub fn new(bundle: impl Into<PathBuf>) -> Self {
        let bundle = bundle.into();
        let sibling =
            bundle.parent().map_or_else(|| PathBuf::from("cloud"), |dir| dir.join("cloud"));
        Self {
            bundle,
            verify: Verify::default(),
            cloud: CloudAddress::InProcess(Box::new(CloudConfig::new(sibling))),
            split_layer: None,
            wire: None,
            drafters: Drafters::default(),
            chunks: ChunkPolicy::default(),
            prefix: true,
            prefix_secret: None,
            link: LinkKind::Mio,
            threads: default_threads(),
            nice: 0,
            processor: Processor::Auto,
            weights: GpuWeights::InPlace,
            limits: DeviceLimits::default(),
            cloud_arithmetic: None,
            reconnect: Duration::from_secs(30),
            memory: None,
        }
    }

    /// The cloud at an address as [`Address`] has them, on port 7433 if there is none in it.
    #[must_use]
    pub fn cloud(mut self, address: impl Into<String>) -> Self {
        self.cloud = CloudAddress::Remote(address.into());
        self
    }

    /// Compute threads.
    #[must_use]
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = threads;
        if let CloudAddress::InProcess(cloud) = &mut self.cloud {
            cloud.threads = threads;
        }
        self
    }

    /// True if files are verified, on both sides if the cloud is in this process.
    #[must_use]
    pub fn verify(mut self, verify: Verify) -> Self {
        if let CloudAddress::InProcess(cloud) = &mut self.cloud {
            cloud.verify = verify.clone();
        }
        self.verify = verify;
        self
    }

    /// Sets the kind of the link, on both sides if the cloud is in this process.
    #[must_use]
    pub fn link(mut self, link: LinkKind) -> Self {
        self.link = link;
        if let CloudAddress::InProcess(cloud) = &mut self.cloud {
            cloud.link = link;
        }
        self
    }

    /// Layers on the device before the cloud's.
    #[must_use]
    pub fn split_layer(mut self, split_layer: u32) -> Self {
        self.split_layer = Some(split_layer);
        self
    }

    /// Trained drafters for bundles that hold none.
    #[must_use]
    pub fn drafters(mut self, drafters: Drafters) -> Self {
        self.drafters = drafters;
        self
    }

    /// Sets the codec of rows on the wire.
    #[must_use]
    pub fn wire(mut self, wire: Codec) -> Self {
        self.wire = Some(wire);
        self
    }

    /// The codec of its sessions, once the bundle has been asked.
    pub(crate) fn codec(&self) -> Codec {
        self.wire.unwrap_or_default()
    }

    /// Switches the reuse of a prompt's rows that the cloud still holds.
    #[must_use]
    pub fn prefix(mut self, prefix: bool) -> Self {
        self.prefix = prefix;
        self
    }

    /// Key of the names by which pages are asked for.
    #[must_use]
    pub fn prefix_secret(mut self, secret: impl Into<PrefixSecret>) -> Self {
        self.prefix_secret = Some(secret.into());
        self
    }

    /// Sets the policy that cuts prompts into chunks.
    #[must_use]
    pub fn chunks(mut self, chunks: ChunkPolicy) -> Self {
        self.chunks = chunks;
        self
    }

    /// The place of its computations.
    pub(crate) fn compute(&self) -> ComputeConfig {
        let Self { processor, weights, threads, nice, .. } = *self;
        ComputeConfig { processor, weights, threads, nice }
    }

    /// Refuses what can't work, before a file is opened.
    ///
    /// # Errors
    /// [`Error::Input`]: a bound of 0, a cloud at what is no address or on another machine (there
    /// is no TLS yet, so hidden states would cross the network in the clear), or a memory link to
    /// another process.
    pub fn check(&self) -> Result<(), Error> {
        self.limits.check()?;
        hat_compute::open::check_threads(self.threads)?;
        match &self.cloud {
            CloudAddress::InProcess(cloud) => cloud.check(),
            CloudAddress::Remote(_) if self.link == LinkKind::Memory && self.memory.is_none() => {
                let reason = "memory links ends in one process: leave out --cloud, or use mio";
                Err(Error::field("link", reason))
            }
            CloudAddress::Remote(text) => remote(text).map(drop),
        }
    }
}

/// The address of a cloud in another process.
///
/// # Errors
/// [`Error::Input`].
pub(crate) fn remote(text: &str) -> Result<Address, Error> {
    let address = Address::parse(text, Address::CLOUD_PORT)
        .map_err(|error| Error::field("cloud", error.to_string()))?;
    address.check_port("cloud")?;
    address.check_local("cloud")?;
    Ok(address)
}

/// Configuration of a cloud.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CloudConfig {
    /// The cloud half of a bundle.
    pub bundle: PathBuf,
    /// True if the bundle's files are verified before the model is named to a device.
    pub verify: Verify,
    /// Address to listen at. Until TLS exists, loopback only.
    pub listen: SocketAddr,
    /// Kind of the link.
    pub link: LinkKind,
    /// Compute threads, shared among the stages.
    pub threads: usize,
    /// Niceness of compute threads, on top of the process's (`nice(2)`): 0 keeps the share of the
    /// cores that it was given, 19 is the most.
    pub nice: u8,
    /// Pipeline stages: runs of layers that compute at the same time, each on threads of its own.
    pub stages: usize,
    /// Processor that computes.
    pub processor: Processor,
    /// GPUs by number, one for each stage in turn; the processor's own if there are none here.
    pub gpus: Vec<usize>,
    /// Memory in which a GPU has its weights.
    pub weights: GpuWeights,
    /// Bounds.
    pub limits: CloudLimits,
    /// A session of which nothing was heard for so long gives its pages up when others need them,
    /// and a device that has taken nothing for so long, though its queue is full, is sent away.
    pub idle_after: Duration,
    /// Time in which a step has to end: if none does, the backend hangs, and the cloud stops.
    pub step_within: Duration,
    /// Network of memory links; set by the engine that starts its own cloud.
    pub(crate) memory: Option<MemoryNet>,
}

impl CloudConfig {
    /// A cloud on the bundle at `bundle`, on a loopback port that the system chooses.
    #[must_use]
    pub fn new(bundle: impl Into<PathBuf>) -> Self {
        Self {
            bundle: bundle.into(),
            verify: Verify::default(),
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            link: LinkKind::Mio,
            threads: default_threads(),
            nice: 0,
            stages: 1,
            processor: Processor::Auto,
            gpus: Vec::new(),
            weights: GpuWeights::InPlace,
            limits: CloudLimits::default(),
            idle_after: Duration::from_secs(10),
            step_within: Duration::from_secs(300),
            memory: None,
        }
    }

    /// Sets the address to listen at.
    #[must_use]
    pub fn listen(mut self, address: SocketAddr) -> Self {
        self.listen = address;
        self
    }

    /// Sets the kind of the link.
    #[must_use]
    pub fn link(mut self, link: LinkKind) -> Self {
        self.link = link;
        self
    }

    /// Compute threads.
    #[must_use]
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = threads;
        self
    }

    /// Pipeline stages.
    #[must_use]
    pub fn stages(mut self, stages: usize) -> Self {
        self.stages = stages;
        self
    }

    /// Refuses what must not be served.
    ///
    /// # Errors
    /// A listen address that other machines can reach: there is no TLS yet, so hidden states
    /// would cross the network in the clear and anybody could open sessions. A bound of 0.
    pub fn check(&self) -> Result<(), Error> {
        self.limits.check()?;
        hat_compute::open::check_threads(self.threads)?;
        if self.stages == 0 {
            return Err(Error::field("stages", "0 stages compute nothing: at least 1"));
        }
        check_loopback("listen", self.listen.ip())
    }
}

/// One compute thread for each core that this process may use.
fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device says how many answers it gives at once; the cloud that it asks by default holds
    /// as many, whatever the contexts.
    #[test]
    fn both_roles_hold_what_they_say() {
        let (device, cloud) = (DeviceLimits::default(), CloudLimits::default());
        assert_eq!(device.sessions_of(device.context_max), device.sessions_max);
        assert_eq!(cloud.sessions_of(cloud.context_max), device.sessions_max);
        for context in [2, 31, 32, 33, 100, 2048, 8191, 8192, 131_072] {
            for sessions in [1, 2, 3, 4, 7, 64] {
                let limits = |sessions_max| DeviceLimits {
                    sessions_max,
                    kv_rows_max: kv_rows(sessions, context),
                    ..DeviceLimits::default()
                };
                let held = limits(sessions).sessions_of(context);
                assert_eq!(held, sessions, "{sessions} of {context}");
                assert_eq!(limits(1024).sessions_of(context), sessions, "no more either");
            }
        }
    }
}
