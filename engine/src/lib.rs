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
//! # let model = hat_engine::internal::tiny_bundle(directory.path())?;
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
//! Nine names are the interface; what their fields and methods speak of is in [`options`].
//!
//! Map of the crate, upper rooms call lower ones only:
//!
//! | room | what |
//! |---|---|
//! | `main`, `http` | the daemon and the OpenAI-compatible API |
//! | [`Engine`], [`Cloud`] | `device`, `cloud`: the only rooms with a loop, a thread or a link |
//! | `answer`, `turns`, `sample`, `stop`, `token`, `metrics` | from logits to text |
//! | `draft` | guesses at the tokens to come |
//! | `chunk`, `estimate` | how a prompt is cut; estimates of device, link and cloud |
//! | `sched`, `sequence`, `page`, `prefix`, `wire` | rows: which run, where, how they go |
//! | `processor` | the models of `hat-compute`, loaded as a configuration says |

mod answer;
#[doc(hidden)]
pub mod chunk;
mod cloud;
mod config;
mod device;
#[doc(hidden)]
pub mod draft;
mod error;
#[doc(hidden)]
pub mod estimate;
#[cfg(feature = "http")]
pub mod http;
mod metrics;
#[cfg(feature = "daemon")]
#[doc(hidden)]
pub mod out;
mod page;
mod prefix;
mod processor;
#[cfg(feature = "daemon")]
#[doc(hidden)]
pub mod pull;
mod request;
#[doc(hidden)]
pub mod sample;
#[doc(hidden)]
pub mod sched;
mod sequence;
#[cfg(all(feature = "daemon", target_os = "linux"))]
#[doc(hidden)]
#[expect(unsafe_code, reason = "a signal's action; see the module")]
pub mod shrunk;
mod stop;
#[doc(hidden)]
pub mod token;
mod turns;
mod verify;
mod watch;
mod whole;
mod wire;

use hat_plan as backend;
use hat_plan as model;

pub use cloud::Cloud;
pub use config::{CloudConfig, EngineConfig};
pub use device::Engine;
pub use error::Error;
pub use request::{Event, Generation, Metrics, Request};

/// Types of the fields of configurations, requests and events.
pub mod options {
    pub use crate::cloud::CloudCounters;
    pub use crate::config::{
        Address, ChunkPolicy, CloudAddress, Codec, GpuWeights, Limits, LinkKind, PrefixSecret,
        Processor,
    };
    pub use crate::draft::{DraftMode, drafters::Drafters};
    pub use crate::error::ErrorKind;
    pub use crate::estimate::Estimates;
    pub use crate::metrics::{DraftCounts, EngineMetrics, Timings};
    pub use crate::request::{FinishReason, Message, Prompt, Role, TokenLogprob};
    pub use crate::sample::SamplerConfig;
    pub use crate::verify::Verify;
    pub use hat_plan::TokenId;
}

/// Items for our own tests, tools and benches; no part of the interface.
#[doc(hidden)]
pub mod internal {
    pub use crate::cloud::{open_bundle as open_cloud_bundle, pool_pages};
    pub use crate::page::pages_for;
    pub use crate::processor::token_settings;
    pub use crate::sequence::{PENDING_ROWS_MAX, Sequence};
    pub use crate::token::Tokenizer;
    pub use crate::whole::{Whole, through_codec, whole_answer};
    pub use crate::wire::{ARITHMETIC_ID, short as short_model_id};
    use std::path::{Path, PathBuf};

    /// A generated 4-layer model, split after its first layer, below `directory`.
    ///
    /// # Errors
    /// What writing files says.
    pub fn tiny_bundle(directory: &Path) -> Result<PathBuf, Box<dyn std::error::Error>> {
        let model = hat_loader::generated(&hat_loader::TinyModel::default());
        let out = directory.join("tiny");
        let options = hat_loader::BundleOptions {
            split_layer: 1,
            tail_layers: 0,
            weights: hat_loader::Weights::Keep,
        };
        hat_loader::write_bundles(&model, options, &out, &mut |_| {})?;
        Ok(out)
    }
}
