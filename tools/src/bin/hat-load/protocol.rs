//! Messages between the tool and its devices and cloud: lines of JSON over pipes.

use hat_engine::Request;
use hat_engine::options::DraftMode;
use serde::{Deserialize, Serialize};

/// Report of a child process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Report {
    /// Address at which a cloud listens, and one line about its backend.
    Listening(String, String),
    /// Totals of a cloud so far.
    Counters(Counters),
    /// A device is connected.
    Ready,
    /// A request is over.
    Ended(Outcome),
    /// The process could not begin.
    Failed(String),
    /// The process will report nothing more.
    Gone,
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

/// End of a request.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) enum End {
    /// The request ended with its answer.
    Done,
    /// The request was cancelled, as planned.
    #[default]
    Cancelled,
    /// The request was under way when its device was ended, as planned.
    Lost,
    /// Device or cloud had no room for it.
    Refused(String),
    /// The request ended in an error.
    Failed(String),
}

/// Measurements of one request. Times are a caller's, from its call on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Outcome {
    pub(crate) ask: u64,
    pub(crate) end: End,
    /// Time from when it was due to its call, milliseconds.
    pub(crate) late_ms: f64,
    pub(crate) ttft_us: Option<u64>,
    /// Between tokens; those of one round trip come together, with gaps of about 0.
    pub(crate) gaps_us: Vec<u32>,
    /// If they were wanted.
    pub(crate) token_ids: Vec<u32>,
    /// Figures of a complete answer; of others 0.
    pub(crate) predicted_n: u32,
    pub(crate) rounds: u32,
    pub(crate) pages_reused: u32,
    pub(crate) bytes_up: u64,
    pub(crate) bytes_down: u64,
}

impl Outcome {
    /// A request that came to nothing.
    pub(crate) fn of(ask: u64, end: End) -> Self {
        Self { ask, end, ..Self::default() }
    }
}
