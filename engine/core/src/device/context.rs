//! Things that all requests of a device share, lent to one of them at a time.

use std::collections::VecDeque;
use std::time::Duration;

use hat_plan::{RowMove, TokenId};
use hat_transport::codec::Codec;
use hat_transport::conn::Traffic;
use hat_transport::message::{Arrivals, Computed, Hello, Role};
use hat_transport::planted::Planted;

use super::request::RequestId;
use super::select;
use super::{DeviceConfig, RequestEvent};
use crate::chunk::{ChunkPolicy, Planner};
use crate::draft::tree::Proposal;
use crate::draft::{Acceptance, DraftPolicy};
use crate::estimate::Estimator;
use crate::page::pages_for;
use crate::sequence::{BatchBuffers, PENDING_ROWS_MAX};
use crate::wire::{self, BundleFacts};

/// Facts of this device's model and configuration that requests compute by.
#[derive(Clone, Copy)]
pub(super) struct Facts {
    pub(super) hidden_size: usize,
    pub(super) has_tail: bool,
    pub(super) codec: Codec,
    pub(super) chunks: ChunkPolicy,
    /// Rows of one step of the device.
    pub(super) step_rows_max: u32,
    /// Requests that run at once.
    pub(super) sessions_max: usize,
    /// True if a chunk is computed as a whole before any of it leaves.
    pub(super) whole_chunks: bool,
    /// Layers here before the cloud's, and the cloud's.
    pub(super) layers: (u32, u32),
}

impl Facts {
    pub(super) fn row_bytes(&self) -> usize {
        self.codec.row_bytes(self.hidden_size)
    }
}

/// Buffers that all requests use in turn.
pub(super) struct Scratch {
    pub(super) plan: BatchBuffers,
    /// Of the rows that are computed next.
    pub(super) tokens: Vec<TokenId>,
    pub(super) kept: Vec<usize>, // nodes of a tree
    pub(super) proposals: Vec<(usize, Proposal)>,
    pub(super) logits: Vec<f32>, // [vocab_size]
    /// The token with the largest logit, and that logit.
    pub(super) argmax: Option<(TokenId, f32)>,
    pub(super) rows: Vec<f32>, // [rows of one OUTPUT frame, hidden_size]
}

/// Everything that was measured, over all requests.
#[derive(Default)]
pub(super) struct Learned {
    /// Acceptance rates of drafted tokens.
    pub(super) acceptance: Acceptance,
    /// Times of rounds and of chunks.
    pub(super) estimator: Estimator,
    pub(super) planner: Planner,
    /// The link's counters at the last look; `None` without a connection.
    pub(super) traffic: Option<Traffic>,
    /// Bytes from the cloud, and how long they took, that the estimator knows of.
    arrived: (u64, Duration),
}

impl Learned {
    /// The device's layers took so long for this many rows behind `prefix` others.
    pub(super) fn note_input(&mut self, rows: usize, prefix: u32, took: Duration) {
        let rows = u32::try_from(rows).expect("a piece or a level is small");
        self.estimator.device.note(rows, prefix, took.as_secs_f64());
    }

    /// Notes the rate at which the cloud saw this device's frames come in.
    pub(super) fn note_arrivals(&mut self, arrivals: Arrivals) {
        self.estimator.up.note(u64::from(arrivals.bytes), f64::from(arrivals.us) * 1e-6);
    }

    /// A chunk of a prompt has been computed, long before the prompt's first output.
    pub(super) fn note_computed(&mut self, computed: &Computed) {
        self.note_arrivals(computed.arrivals);
        // Ids count the positions of a prompt from 1 on; later rows all come back.
        let step_s = f64::from(computed.step_us) * 1e-6;
        self.estimator.step.note(computed.step_rows, computed.first_id - 1, step_s);
    }

    /// Looks at what the link counts; returns the bytes that are not acknowledged.
    pub(super) fn note_link(&mut self) -> u64 {
        let Some(traffic) = self.traffic else { return 0 };
        let arrived = (traffic.arrived_bytes, traffic.arrived_in);
        let (bytes, time) = std::mem::replace(&mut self.arrived, arrived);
        let took = arrived.1.saturating_sub(time).as_secs_f64();
        self.estimator.down.note(arrived.0.saturating_sub(bytes), took);
        if let Some(rtt) = traffic.rtt {
            self.estimator.note_rtt(rtt.as_secs_f64());
        }
        traffic.unacked_bytes
    }

    /// For how long no more of a prompt is computed, since the uplink has enough; `None` if it may
    /// go on.
    pub(super) fn upload_pause(&self) -> Option<Duration> {
        let unacked = self.traffic?.unacked_bytes;
        select::upload_pause(unacked, |bytes| self.estimator.uplink_busy_s(bytes))
    }

    /// Rows of the next piece, at most `rows`, behind `prefix` others.
    pub(super) fn piece_rows(&self, prefix: u32, rows: u32) -> u32 {
        select::piece_rows(self.estimator.device_cost(), prefix, rows)
    }
}

/// Parts of the device that a request borrows for one call.
pub(super) struct Common {
    pub(super) facts: Facts,
    /// HELLO of the cloud, or of one that takes what this device makes.
    pub(super) cloud: Hello,
    pub(super) policy: DraftPolicy,
    pub(super) learned: Learned,
    pub(super) scratch: Scratch,
    /// Moves in the KV store that run, in order, before any row is computed.
    pub(super) moves: Vec<RowMove>,
    /// News for those who asked.
    pub(super) events: VecDeque<(RequestId, RequestEvent)>,
    /// A fault, in tests.
    pub(super) planted: Planted,
}

impl Common {
    pub(super) fn new(config: &DeviceConfig, bundle: &BundleFacts, vocab_size: usize) -> Self {
        let pages = pages_for(config.kv_rows_max + PENDING_ROWS_MAX);
        let layers = &bundle.layers;
        Self {
            facts: Facts {
                hidden_size: bundle.hidden_size,
                has_tail: bundle.has_tail,
                codec: config.codec,
                chunks: config.chunks,
                step_rows_max: config.step_rows_max,
                sessions_max: config.sessions_max,
                whole_chunks: false,
                layers: (layers.start, layers.end - layers.start),
            },
            cloud: Hello {
                row_budget: config.step_rows_max,
                ..wire::hello(Role::Cloud, bundle.model_id, bundle.hidden_size, layers.clone())
            },
            policy: DraftPolicy::DEFAULT,
            learned: Learned::default(),
            scratch: Scratch {
                plan: BatchBuffers::with_capacity(config.step_rows_max as usize, 1, pages),
                tokens: Vec::with_capacity(PENDING_ROWS_MAX),
                kept: Vec::with_capacity(PENDING_ROWS_MAX),
                proposals: Vec::with_capacity(PENDING_ROWS_MAX),
                logits: vec![0.0; vocab_size],
                argmax: None,
                rows: vec![0.0; bundle.hidden_size],
            },
            moves: Vec::with_capacity(PENDING_ROWS_MAX),
            events: VecDeque::new(),
            planted: Planted::default(),
        }
    }

    /// Tells who asked.
    pub(super) fn tell(&mut self, id: RequestId, event: RequestEvent) {
        self.events.push_back((id, event));
    }

    /// Most rows of a chunk.
    pub(super) fn chunk_rows_max(&self) -> u32 {
        let Facts { codec, hidden_size, sessions_max, step_rows_max, .. } = self.facts;
        wire::chunk_rows_max(self.cloud.row_budget, codec, hidden_size, sessions_max)
            .min(step_rows_max)
    }

    /// Rows that may pend in the cloud, or run in one step there.
    pub(super) fn pending_max(&self) -> usize {
        let pending_max = usize::from(self.cloud.rows_pending_max).min(self.policy.pending_max);
        pending_max.min(self.chunk_rows_max() as usize)
    }
}
