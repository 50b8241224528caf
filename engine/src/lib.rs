//! A large language model split between a *device* and a *cloud*, after HAT (arXiv 2503.18989).
//!
//! The device holds the embedding, the first decoder layers and the LM head; the cloud holds the
//! layers between, for many devices at once. Hidden states cross a framed protocol; text and
//! token ids are not transmitted; whoever runs the cloud can still read both. An answer is, to the
//! last bit of its logits, the whole model's with the same row codec (`docs/CHUNKS.md`).
//!
//! ```
//! use hat_engine::{Engine, EngineConfig, Event, Request};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir()?;
//! # let model = hat_loader::tiny_bundle(directory.path())?;
//! // A bundle's device half, with a cloud of the half beside it; `.cloud(ADDRESS)` takes another.
//! let engine = Engine::open(EngineConfig::new(model.join("device")))?;
//! let mut generation = engine.generate(Request::chat("Why is the sky blue?").max_tokens(16))?;
//! let mut tokens = 0;
//! for event in &mut generation {
//!     match event? {
//!         Event::Token { text, .. } => {
//!             print!("{text}");
//!             tokens += 1;
//!         }
//!         Event::Done { metrics, .. } => eprintln!("TTFT {} ms", metrics.timings.ttft_ms),
//!         _ => {}
//!     }
//! }
//! assert_eq!(tokens, 16);
//! # Ok(())
//! # }
//! ```
//!
//! Nine names are the interface; what their fields and methods speak of is in [`options`]. The
//! feature `http` adds the HTTP API; [`reference_run`] is the yardstick.
//!
//! Decisions of the two roles are in `hat-core`, their computations in `hat-compute`; here are
//! links, threads, clocks and loading. Map of the crate:
//!
//! | room | content |
//! |---|---|
//! | `main`, `http` | the daemon and the OpenAI-compatible API |
//! | [`Engine`], [`Cloud`] | `device`, `cloud`: the shells of the two cores |
//! | `text` | the tokenizer and its conversations; without the feature, `ids` |
//! | `endpoint`, `verify`, `watch` | links and files as configured |

mod cloud;
mod config;
mod device;
mod endpoint;
mod error;
mod generation;
#[cfg(feature = "http")]
pub mod http;
#[cfg(not(feature = "text"))]
mod ids;
pub mod reference_run;
#[cfg(feature = "testkit")]
pub mod testkit;
#[cfg(feature = "text")]
mod text;
mod verify;
mod watch;

#[cfg(not(feature = "text"))]
use ids as text;

pub use cloud::Cloud;
use cloud::spawn;
pub use config::{CloudConfig, EngineConfig};
pub use device::Engine;
pub use error::Error;
pub use generation::Generation;
pub use hat_core::request::{Event, Metrics, Request};

/// Types of the fields of configurations, requests and events.
pub mod options {
    pub use crate::cloud::CloudCounters;
    pub use crate::config::{
        Address, ChunkPolicy, CloudAddress, CloudLimits, Codec, DeviceLimits, GpuWeights, LinkKind,
        PrefixSecret, Processor, kv_rows,
    };
    pub use crate::error::ErrorKind;
    pub use crate::verify::Verify;
    pub use hat_compute::LoadError;
    pub use hat_core::draft::DraftMode;
    pub use hat_core::estimate::Estimates;
    pub use hat_core::metrics::{DraftCounts, EngineMetrics, Timings};
    pub use hat_core::request::{FinishReason, Message, Prompt, Role, TokenLogprob};
    pub use hat_core::sample::SamplerConfig;
    pub use hat_core::{InputError, PeerEvent, RequestError};
    pub use hat_loader::Drafters;
    pub use hat_plan::{BackendFault, TokenId};
}
