//! What both roles say about themselves on the wire, and how they open a link.

use std::net::{SocketAddr, ToSocketAddrs};
use std::ops::Range;
use std::sync::Arc;

use hat_loader::{Bundle, Submodel};
use hat_transport::clock::Clock;
use hat_transport::frame::BODY_BYTES_MAX;
use hat_transport::link::memory::MemoryNet;
use hat_transport::link::{self, Link, LinkKind};
pub use hat_transport::message::Role;
use hat_transport::message::{CloseCode, Hello, KV_F16};
use hat_transport::turn::{Endpoint, EndpointConfig};

use crate::Error;
use crate::backend::{ARITHMETIC_CPU, ARITHMETIC_CUDA, PAGE_SIZE};
use crate::config::{CloudConfig, EngineConfig};
use crate::pack::Codec;
use crate::sequence::PENDING_ROWS_MAX;

/// What HELLO says unless a backend says otherwise.
pub const ARITHMETIC_ID: u32 = ARITHMETIC_CPU;
/// What this version knows the meaning of.
const ARITHMETICS: [u32; 2] = [ARITHMETIC_CPU, ARITHMETIC_CUDA];
/// K and V are stored as f16.
pub const KV_TYPE_F16: u8 = KV_F16;

/// What of a bundle the protocol speaks about.
#[derive(Clone, Debug)]
pub struct BundleFacts {
    /// Width of a row.
    pub hidden_size: usize,
    /// Positions of the model.
    pub context: u32,
    /// Layers that the cloud holds, or that the device wants computed.
    pub layers: Range<u32>,
    /// Both halves of one model share it.
    pub model_id: [u8; 32],
    /// The device runs the last layers, so all rows come back.
    pub has_tail: bool,
}

impl BundleFacts {
    /// A cloud that holds all of its bundle.
    #[must_use]
    pub fn for_cloud(bundle: &Bundle) -> Self {
        Self::new(bundle, bundle.split().layers(Submodel::Middle))
    }

    /// A device that runs the first `split_layer` layers and the bundle's tail.
    #[must_use]
    pub fn for_device(bundle: &Bundle, split_layer: usize) -> Self {
        let layers = bundle.config().num_hidden_layers;
        Self::new(bundle, split_layer..layers - bundle.manifest().tail_layers)
    }

    fn new(bundle: &Bundle, layers: Range<usize>) -> Self {
        let layer = |index: usize| u32::try_from(index).expect("layer counts are small");
        Self {
            hidden_size: bundle.config().hidden_size,
            context: u32::try_from(bundle.config().max_position_embeddings).unwrap_or(u32::MAX),
            layers: layer(layers.start)..layer(layers.end),
            model_id: *bundle.model_id().as_bytes(),
            has_tail: bundle.manifest().tail_layers > 0,
        }
    }
}

/// A HELLO with everything that follows from the model and from this program.
#[must_use]
pub fn hello(role: Role, model_id: [u8; 32], hidden_size: usize, layers: Range<u32>) -> Hello {
    let layer = |layer: u32| u16::try_from(layer).expect("a model has fewer than 65,536 layers");
    Hello {
        model_id,
        arithmetic_id: ARITHMETIC_ID,
        hidden_size: u32::try_from(hidden_size).expect("rows are narrower than 2^32"),
        entry_layer: layer(layers.start),
        exit_layer: layer(layers.end),
        codecs: Codec::ALL.iter().fold(0, |set, codec| set | 1 << codec.id()),
        rows_pending_max: u16::try_from(PENDING_ROWS_MAX).expect("64"),
        page_size: u16::try_from(PAGE_SIZE).expect("32"),
        kv_type: KV_TYPE_F16,
        ..Hello::new(role)
    }
}

/// Whether the peer's layers compute in an arithmetic that this version knows and `wanted` allows:
/// that one alone, or any.
///
/// # Errors
/// The reason, for people.
pub fn check_arithmetic(there: u32, wanted: Option<u32>) -> Result<(), String> {
    match wanted {
        None if ARITHMETICS.contains(&there) => Ok(()),
        Some(wanted) if wanted == there => Ok(()),
        Some(wanted) => Err(format!("arithmetic {there} there, {wanted} is wanted here")),
        None => Err(format!(
            "arithmetic {there} there, {ARITHMETICS:?} are known here: run the same version on \
             both sides"
        )),
    }
}

/// Whether the peer holds the other half of the same model, in an arithmetic that is known.
///
/// # Errors
/// The code and reason to close with.
pub fn check_same_model(
    peer: &Hello,
    model_id: &[u8; 32],
    hidden_size: usize,
) -> Result<(), (CloseCode, String)> {
    if peer.model_id != *model_id || peer.hidden_size as usize != hidden_size {
        let reason = format!(
            "two different models: {} (rows of {hidden_size}) here, {} (rows of {}) there; \
             split one model and give each side its half",
            short(model_id),
            short(&peer.model_id),
            peer.hidden_size
        );
        return Err((CloseCode::Incompatible, reason));
    }
    check_arithmetic(peer.arithmetic_id, None).map_err(|reason| (CloseCode::Incompatible, reason))
}

/// Whether `held` covers `wanted`.
///
/// # Errors
/// The reason, with both ranges.
pub fn check_layers(wanted: Range<u32>, held: &Range<u32>) -> Result<(), String> {
    if wanted.start < wanted.end && wanted.start >= held.start && wanted.end <= held.end {
        return Ok(());
    }
    Err(format!(
        "layers {}..{} are wanted, the cloud holds {}..{}",
        wanted.start, wanted.end, held.start, held.end
    ))
}

/// The first bytes of a model id, for people.
#[must_use]
pub fn short(model_id: &[u8; 32]) -> String {
    model_id[..6].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes in front of the rows in `ROWS` and `OUTPUT`, ids or parents not counted.
const HEAD_BYTES: usize = 32;

/// Rows that fit one frame, with four bytes each for an id or a parent.
#[must_use]
pub fn rows_per_frame(codec: Codec, hidden_size: usize) -> usize {
    ((BODY_BYTES_MAX - HEAD_BYTES) / (codec.row_bytes(hidden_size) + 4)).max(1)
}

/// A cloud's endpoint, listening. Returns the address with the port that the system chose.
///
/// # Errors
/// [`Error::Io`] if the address or the link cannot be had.
pub fn listen(
    config: &CloudConfig,
    clock: Arc<dyn Clock>,
    hello: Hello,
) -> Result<(Endpoint, SocketAddr), Error> {
    let link = open(config.link, Some(config.listen), config.memory.as_ref())
        .map_err(|error| Error::io(format!("listening at {}", config.listen), error))?;
    let mut endpoint_config = EndpointConfig::new(hello);
    endpoint_config.connections_max = config.limits.connections_max as usize;
    // A chunk is held until it runs; a window below one chunk would never see its end.
    let row_bytes = Codec::F32.row_bytes(hello.hidden_size as usize) + 4;
    let chunk_bytes = (config.limits.step_rows_max as usize).saturating_mul(row_bytes);
    let two_chunks = u32::try_from(chunk_bytes.saturating_mul(2)).unwrap_or(1 << 30).min(1 << 30);
    endpoint_config.window_bytes = endpoint_config.window_bytes.max(two_chunks);
    let endpoint = Endpoint::new(link, clock, endpoint_config);
    let address = endpoint.local_address().unwrap_or(config.listen);
    Ok((endpoint, address))
}

/// A device's endpoint, which only dials.
///
/// # Errors
/// [`Error::Io`] if the link cannot be had.
pub fn dialler(
    config: &EngineConfig,
    clock: Arc<dyn Clock>,
    hello: Hello,
) -> Result<Endpoint, Error> {
    let link = open(config.link, None, config.memory.as_ref())
        .map_err(|error| Error::io("opening the link", error))?;
    Ok(Endpoint::new(link, clock, EndpointConfig::new(hello)))
}

fn open(
    kind: LinkKind,
    listen: Option<SocketAddr>,
    memory: Option<&MemoryNet>,
) -> std::io::Result<Box<dyn Link>> {
    match (kind, memory) {
        (LinkKind::Memory, Some(net)) => Ok(Box::new(net.link(listen)?)),
        _ => Ok(link::open(kind, listen)?.link),
    }
}

/// The first address of `host:port`.
///
/// # Errors
/// The reason, for people.
pub fn resolve(host: &str) -> Result<SocketAddr, String> {
    let mut found = host
        .to_socket_addrs()
        .map_err(|error| format!("{host:?} is no host:port that can be resolved: {error}"))?;
    found.next().ok_or_else(|| format!("{host:?} has no address"))
}
