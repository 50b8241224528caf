//! Opening of links, and the facts of bundles that the protocol speaks about.

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;

use hat_core::wire::BundleFacts;
use hat_loader::{Bundle, Submodel};
use hat_transport::clock::Clock;
use hat_transport::codec::Codec;
use hat_transport::endpoint::{Endpoint, EndpointConfig};
use hat_transport::link::memory::MemoryNet;
use hat_transport::link::{self, Link, LinkKind};
use hat_transport::message::Hello;

use crate::Error;
use crate::config::{CloudConfig, EngineConfig};

/// Facts of a cloud that holds all of its bundle.
#[must_use]
pub fn cloud_facts(bundle: &Bundle) -> BundleFacts {
    facts(bundle, bundle.split().layers(Submodel::Middle))
}

/// Facts of a device that runs the first `split_layer` layers and the bundle's tail.
#[must_use]
pub fn device_facts(bundle: &Bundle, split_layer: usize) -> BundleFacts {
    let layers = bundle.config().num_hidden_layers;
    facts(bundle, split_layer..layers - bundle.manifest().tail_layers)
}

fn facts(bundle: &Bundle, layers: Range<usize>) -> BundleFacts {
    let layer = |index: usize| u32::try_from(index).expect("layer counts are small");
    BundleFacts {
        hidden_size: bundle.config().hidden_size,
        context: u32::try_from(bundle.config().max_position_embeddings).unwrap_or(u32::MAX),
        layers: layer(layers.start)..layer(layers.end),
        model_id: *bundle.model_id().as_bytes(),
        has_tail: bundle.manifest().tail_layers > 0,
    }
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
    let window_bytes = &mut endpoint_config.connection.window_bytes;
    *window_bytes = two_chunks.max(*window_bytes);
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
