//! Messages between the tool and its devices and cloud: lines of JSON over pipes, or the same
//! values over channels where a device is a thread.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::ValueEnum;
use hat_engine::options::{ChunkPolicy, Codec, DraftMode, LinkKind};
use hat_engine::{CloudConfig, EngineConfig, Request};
use serde::{Deserialize, Serialize};

/// Kind of the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
pub(crate) enum Link {
    /// epoll.
    Mio,
    /// io_uring where there is one.
    Uring,
}

impl From<Link> for LinkKind {
    fn from(link: Link) -> Self {
        match link {
            Link::Mio => Self::Mio,
            Link::Uring => Self::IoUring,
        }
    }
}

/// Settings of a device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct DeviceSetup {
    pub(crate) bundle: PathBuf,
    pub(crate) cloud: String,
    /// A name of [`Codec`].
    pub(crate) wire: String,
    /// A name of [`ChunkPolicy`].
    pub(crate) chunks: String,
    pub(crate) link: Link,
    pub(crate) threads: usize,
    /// Longest time to connect before it gives up, in ms.
    pub(crate) connect_ms: u64,
}

impl DeviceSetup {
    pub(crate) fn config(&self) -> anyhow::Result<EngineConfig> {
        let wire = Codec::from_name(&self.wire).context("wire: no codec has this name")?;
        let chunks: ChunkPolicy = self.chunks.parse()?;
        let config = EngineConfig::new(&self.bundle).cloud(&self.cloud).wire(wire).chunks(chunks);
        Ok(config.link(self.link.into()).threads(self.threads))
    }

    pub(crate) fn connect(&self) -> Duration {
        Duration::from_millis(self.connect_ms)
    }
}

/// Settings of a cloud.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct CloudSetup {
    pub(crate) bundle: PathBuf,
    pub(crate) link: Link,
    pub(crate) threads: usize,
    pub(crate) sessions_max: Option<u32>,
    pub(crate) kv_rows_max: Option<u32>,
    /// Room for so many devices, if that is more than it has anyway.
    pub(crate) devices: u32,
}

impl CloudSetup {
    pub(crate) fn config(&self) -> CloudConfig {
        let mut config =
            CloudConfig::new(&self.bundle).link(self.link.into()).threads(self.threads);
        let limits = &mut config.limits;
        limits.sessions_max = self.sessions_max.unwrap_or(limits.sessions_max);
        limits.kv_rows_max = self.kv_rows_max.unwrap_or(limits.kv_rows_max);
        // A device that comes back stands beside its own lost connection for a while.
        limits.connections_max = limits.connections_max.max(4 * self.devices);
        config
    }
}

/// Report of a cloud.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum CloudSaid {
    /// Address at which it listens, and one line about its backend.
    Listening(String, String),
    /// Reason that it can't listen.
    Failed(String),
    /// Totals so far.
    Counters(Counters),
}

/// See `CloudCounters`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Counters {
    pub(crate) steps: u64,
    pub(crate) rows: u64,
    pub(crate) step_us: u64,
    pub(crate) opened: u64,
    pub(crate) refused: u64,
    pub(crate) sessions: u64,
    pub(crate) pages_free: u64,
}

/// Prompt of a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Prompt {
    /// Text of the prompt as it is.
    Tokens(Vec<u32>),
    /// A user's message, through the chat template.
    Chat(String),
}

/// One request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Ask {
    pub(crate) id: u64,
    pub(crate) prompt: Prompt,
    pub(crate) max_tokens: u32,
    /// True if an end-of-sequence token ends the answer.
    pub(crate) eos: bool,
    /// A name of [`DraftMode`].
    pub(crate) draft: String,
    /// Give the answer up after this many tokens.
    pub(crate) cancel_after: Option<u32>,
    /// True if the answer's tokens are wanted.
    pub(crate) keep: bool,
}

impl Ask {
    pub(crate) fn request(&self) -> anyhow::Result<Request> {
        let request = match &self.prompt {
            Prompt::Tokens(tokens) => Request::tokens(tokens.clone()),
            Prompt::Chat(text) => Request::chat(text),
        };
        let draft: DraftMode = self.draft.parse()?;
        let request = request.max_tokens(self.max_tokens).draft(draft);
        Ok(if self.eos { request } else { request.ignore_eos() })
    }
}

/// Report of a device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Said {
    /// The device is connected.
    Ready,
    /// The device could not begin.
    Failed(String),
    /// A request is over.
    Ended(Outcome),
    /// The device will report nothing more.
    Gone,
}

/// End of a request.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) enum End {
    /// The request ended with its answer.
    Done,
    /// The request was cancelled, as planned.
    #[default]
    Cancelled,
    /// The cloud had no room at any try.
    Refused(String),
    /// The request ended in an error.
    Failed(String),
}

/// Measurements of one request. Times are a caller's, from its call on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Outcome {
    pub(crate) ask: u64,
    pub(crate) end: End,
    pub(crate) ttft_us: Option<u64>,
    /// Between tokens; those of one round trip come together, with gaps of about 0.
    pub(crate) gaps_us: Vec<u32>,
    /// If they were wanted.
    pub(crate) token_ids: Vec<u32>,
    /// Number of tries after `Busy`.
    pub(crate) retries: u32,
    /// Figures of a complete answer; of others 0.
    pub(crate) prompt_n: u32,
    pub(crate) predicted_n: u32,
    pub(crate) rounds: u32,
    pub(crate) pages_reused: u32,
    pub(crate) bytes_up: u64,
    pub(crate) bytes_down: u64,
}
