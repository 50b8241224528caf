//! What the tool and its devices and cloud say to each other: lines of JSON over pipes, or the
//! same values over channels where a device is a thread.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::ValueEnum;
use hat_engine::options::{ChunkPolicy, Codec, DraftMode, LinkKind};
use hat_engine::{CloudConfig, EngineConfig, Request};
use serde::{Deserialize, Serialize};

/// What moves bytes.
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

/// How a device runs.
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
    /// How long it tries to connect before it gives up.
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

/// How a cloud runs.
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

/// What a cloud says when it listens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum CloudSaid {
    /// Where, and one line about its backend.
    Listening(String, String),
    /// Reason that it can't listen.
    Failed(String),
    /// What it has done so far.
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

/// What a device is asked.
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
    /// Whether an end-of-sequence token ends the answer.
    pub(crate) eos: bool,
    /// A name of [`DraftMode`].
    pub(crate) draft: String,
    /// Give the answer up after so many tokens.
    pub(crate) cancel_after: Option<u32>,
    /// Whether the answer's tokens are wanted.
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

/// What a device says.
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

/// How a request ended.
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

/// What one request showed. Times are what a caller sees, from its call on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Outcome {
    pub(crate) ask: u64,
    pub(crate) end: End,
    pub(crate) ttft_us: Option<u64>,
    /// Between tokens; those of one round trip come together, with gaps of about 0.
    pub(crate) gaps_us: Vec<u32>,
    /// If they were wanted.
    pub(crate) token_ids: Vec<u32>,
    /// How often it was tried again after `Busy`.
    pub(crate) retries: u32,
    /// Figures of a complete answer; of others 0.
    pub(crate) prompt_n: u32,
    pub(crate) predicted_n: u32,
    pub(crate) rounds: u32,
    pub(crate) pages_reused: u32,
    pub(crate) bytes_up: u64,
    pub(crate) bytes_down: u64,
}
