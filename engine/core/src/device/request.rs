//! One request: what survives a lost session, and the session itself.
//!
//! The line between [`Request`] and [`OpenSession`] is the line of a replay: a session that is lost
//! is replaced by [`Session::Closed`], and everything that died with it is gone.
//!
//! The work of a request stands by phase, each with its own types: `prompt` its decided rows,
//! `tree` its drafts, `verify` what comes back.

use std::time::{Duration, Instant};

use hat_transport::conn::{ConnectionId, FrameSink};
use hat_transport::frame::{HEADER_BYTES, Kind, Priority};

use super::budget::{Budget, Waits};
use super::context::Common;
use super::feed::Drafting;
use super::select::Ask;
use super::session::OpenSession;
use super::violation::CloudViolation;
use crate::answer::{Answer, Prepared};
use crate::chunk::CHUNK_ROWS_DEFAULT;
use crate::draft::drafter::Drafter;
use crate::draft::{DraftMode, Lookup};
use crate::error::RequestError;
use crate::metrics::Meter;
use crate::prefix::{PageId, PageNames, PageStore, PrefixScope};
use crate::request::FinishReason;
use crate::sequence::Sequence;
use hat_plan::{PAGE_SIZE, TokenId};

/// Number of a request: in the order in which they began to run, and never used again.
pub type RequestId = u64;

/// Prompt and answer so far, and what grows with them.
#[derive(Default)]
pub(super) struct Path {
    pub(super) tokens: Vec<TokenId>,
    /// Names of the pages that `tokens` fill; `None` if the cloud is asked for none.
    pub(super) names: Option<PageNames>,
    /// Most names of pages in a frame to the cloud.
    pub(super) names_max: usize,
    /// Runs of tokens that stood in prompt and answer; `None` if this request has no drafts.
    pub(super) lookup: Option<Lookup>,
}

impl Path {
    /// A token was decided.
    fn push(&mut self, token: TokenId) {
        self.tokens.push(token);
        if let Some(names) = &mut self.names {
            names.push(token);
        }
        if let Some(lookup) = &mut self.lookup {
            lookup.push(token);
        }
    }

    /// Rows that there are.
    pub(super) fn rows(&self) -> u32 {
        u32::try_from(self.tokens.len()).expect("within the context")
    }

    /// Names of the full pages of the first `rows` rows.
    pub(super) fn pages_of(&self, rows: usize) -> &[PageId] {
        self.names.as_ref().map_or(&[], |names| names.of_rows(rows, self.names_max))
    }

    /// Names of the pages that a session may find: all that are full without the last row, which
    /// decides a token and is always computed.
    pub(super) fn pages_to_find(&self) -> &[PageId] {
        self.pages_of(self.tokens.len() - 1)
    }
}

/// A request's session in the cloud.
pub(super) enum Session {
    /// There is none; it is opened as soon as the cloud is connected and `not_before` has passed.
    Closed { not_before: Option<Instant> },
    /// `OPEN` is on its way.
    Opening { wire_id: u32 },
    /// Rows go up, outputs come back.
    Open(Box<OpenSession>),
}

impl Session {
    /// Id on the wire; `None` if the cloud knows of no session.
    pub(super) fn wire_id(&self) -> Option<u32> {
        match self {
            Self::Closed { .. } => None,
            Self::Opening { wire_id } => Some(*wire_id),
            Self::Open(open) => Some(open.wire_id),
        }
    }

    pub(super) fn open(&self) -> Option<&OpenSession> {
        match self {
            Self::Open(open) => Some(open),
            _ => None,
        }
    }

    pub(super) fn open_mut(&mut self) -> Option<&mut OpenSession> {
        match self {
            Self::Open(open) => Some(open),
            _ => None,
        }
    }

    /// Finds frames of this kind that may not come now.
    pub(super) fn expects(&self, kind: Kind) -> Result<(), CloudViolation> {
        let answers_open = matches!(kind, Kind::Opened | Kind::Busy);
        match self {
            Self::Opening { .. } if !answers_open && kind != Kind::SessionError => {
                Err(CloudViolation::BeforeOpened { kind })
            }
            Self::Open(_) if answers_open => Err(CloudViolation::AfterOpened { kind }),
            _ => Ok(()),
        }
    }
}

/// One request that runs.
pub(super) struct Request {
    pub(super) id: RequestId,
    pub(super) prepared: Prepared,
    /// Time of the request.
    pub(super) asked: Instant,
    pub(super) answer: Answer,
    pub(super) meter: Meter,
    pub(super) path: Path,
    /// KV of the device's own layers.
    pub(super) kv: Sequence,
    pub(super) drafting: Drafting,
    pub(super) budget: Budget,
    /// Pieces of others that were computed while one of its own could have been.
    pub(super) passed: u32,
    /// Round trips completed.
    pub(super) round: u32,
    pub(super) session: Session,
}

/// A request after a computation.
pub(super) enum Outcome {
    /// It goes on.
    Goes,
    /// The answer is whole.
    Finished(FinishReason),
    /// It ends without an answer.
    Failed(RequestError),
}

impl From<Result<(), RequestError>> for Outcome {
    fn from(result: Result<(), RequestError>) -> Self {
        result.map_or_else(Self::Failed, |()| Self::Goes)
    }
}

impl Request {
    /// Rows of the decided path that the device's own layers have computed and committed.
    pub(super) fn computed(&self) -> u32 {
        self.kv.committed()
    }

    pub(super) fn draft_mode(&self) -> DraftMode {
        self.prepared.request.draft
    }

    /// True until the first token of the answer is decided.
    pub(super) fn in_prefill(&self) -> bool {
        self.answer.tokens().is_empty()
    }

    /// True if there is something to compute now.
    pub(super) fn wants_compute(&self) -> bool {
        self.session.open().is_some_and(|open| open.outgoing.is_sent() && open.verifier.is_over())
            && self.computed() < self.path.rows()
    }

    /// Its demand on the processor now, if there is one; `may_upload` says whether the uplink takes
    /// more of prompts.
    pub(super) fn ask(&self, may_upload: bool) -> Option<Ask> {
        let goes_up = self.is_decoding() || self.cached_left() > 0 || may_upload;
        (self.wants_compute() && goes_up)
            .then(|| Ask { rows: self.path.rows() - self.computed(), passed: self.passed })
    }

    /// True if there may be drafts to add to a tree whose rows are away.
    pub(super) fn wants_more_drafts(&self) -> bool {
        self.session.open().is_some_and(|open| {
            open.outgoing.is_sent()
                && !open.verifier.is_over()
                && !open.drafts.is_full
                && !open.drafts.tree.nodes().is_empty()
        }) && self.draft_mode().streams()
    }

    /// True if somebody waits for a token of what it has to send: its rows are a verify.
    pub(super) fn is_urgent(&self) -> bool {
        !self.in_prefill() && self.session.open().is_some_and(|open| open.outgoing.decided <= 1)
    }

    /// Tokens that a tree below the last decided one may reach down: the last token of the answer
    /// needs no row, and so no row may lead beyond it.
    pub(super) fn depth_max(&self) -> u32 {
        self.prepared.rows_max().saturating_sub(self.path.rows() + 1)
    }

    /// True if all that is to be computed is the last decided token, and not as the rest of a
    /// chunk: drafts may hang below it.
    pub(super) fn is_decoding(&self) -> bool {
        let is_whole = self.session.open().is_none_or(|open| open.chunk.left == 0);
        is_whole && !self.in_prefill() && self.computed() + 1 == self.path.rows()
    }

    /// Rows that the cloud holds and that are to be computed next; 0 if there are none left. Others
    /// are not kept waiting by all of them.
    pub(super) fn cached_left(&self) -> u32 {
        let cached = self.session.open().map_or(0, |open| open.cached);
        cached.saturating_sub(self.computed()).min(CHUNK_ROWS_DEFAULT)
    }

    /// Cause of its wait now; `may_upload` as in [`Request::ask`].
    pub(super) fn waits(&self, connected: bool, may_upload: bool) -> Waits {
        match (!connected || self.budget.refused.is_some(), self.ask(may_upload)) {
            (true, _) => Waits::Cloud,
            (false, Some(_)) => Waits::Turn,
            (false, None) => Waits::Answer,
        }
    }

    /// A token was decided.
    pub(super) fn push_token(&mut self, token: TokenId) {
        self.path.push(token);
        self.budget.fill();
    }

    /// Begins again from the tokens: the cloud no longer knows the session. What was emitted
    /// stays; the rows go up once more and the answer goes on after its last token.
    pub(super) fn restart(&mut self, not_before: Option<Instant>) {
        self.kv.begin_anew();
        self.meter.rows_lost();
        self.session = Session::Closed { not_before };
        self.check();
    }

    /// The cloud holds so many of the pages that were named. What it holds is not sent, and not
    /// computed either if this device, in `store`, and its drafter have their own pages of it.
    pub(super) fn opened(
        &mut self,
        pages: u16,
        store: &mut PageStore,
        drafter: Option<&mut Box<dyn Drafter>>,
    ) -> Result<(), CloudViolation> {
        let Session::Opening { wire_id } = self.session else { return Ok(()) };
        let Self { path, kv, drafting, .. } = &mut *self;
        let named = path.pages_to_find();
        let cached = usize::from(pages);
        if cached > named.len() {
            return Err(CloudViolation::PagesBeyond { cached, named: named.len() });
        }
        if path.names.is_some() {
            // What the cloud lacks has to be sent, and so computed.
            let mut here = cached;
            if let (Some(drafter), Some(session)) = (drafter, drafting.session) {
                // The drafter takes each row once: those that it has, or begins behind.
                if drafting.fed == 0 {
                    let rows = drafter.begin_behind(session, &named[..cached]) * PAGE_SIZE;
                    drafting.fed = u32::try_from(rows).expect("within the context");
                }
                here = here.min(drafting.fed as usize / PAGE_SIZE);
            }
            store.begin_behind(kv, &named[..here]);
        }
        let rows = u32::from(pages) * u32::try_from(PAGE_SIZE).expect("32");
        self.session = Session::Open(Box::new(OpenSession::new(wire_id, rows)));
        self.budget.refused = None;
        self.meter.counts.pages_reused += u32::from(pages);
        self.check();
        Ok(())
    }

    /// The answer is there: the pages of its path may serve the next.
    pub(super) fn keep_pages(&self, store: &mut PageStore, drafter: Option<&mut Box<dyn Drafter>>) {
        let Self { path, kv, drafting, .. } = self;
        store.keep(PrefixScope::ONE, path.pages_of(kv.committed() as usize), kv.pages());
        if let (Some(drafter), Some(session)) = (drafter, drafting.session) {
            drafter.keep(session, path.pages_of(drafting.fed as usize));
        }
    }

    /// True if there are decided rows that the trained drafter has not taken.
    pub(super) fn is_unfed(&self) -> bool {
        self.drafting.session.is_some()
            && (self.drafting.has_verdict()
                || self.session.open().is_some_and(|open| !open.unfed.is_empty()))
    }

    /// True if there are such rows, and all rows at hand are sent.
    pub(super) fn has_unfed(&self) -> bool {
        self.is_unfed() && self.session.open().is_some_and(|open| open.outgoing.is_sent())
    }

    /// Sends what may leave; returns true if all of it could.
    pub(super) fn send_frames(
        &mut self,
        now: Instant,
        to: ConnectionId,
        sink: &mut dyn FrameSink,
        cx: &Common,
    ) -> bool {
        let priority = if self.is_urgent() { Priority::Verify } else { Priority::Prompt };
        let (in_answer, computed) = (!self.in_prefill(), self.computed());
        let Some(open) = self.session.open_mut() else { return true };
        // A chunk of a longer prompt waits for those before it as well.
        let alone = in_answer || computed == open.cached + open.chunk.rows;
        while open.outgoing.has_released() {
            let sent = open.send_frame(now, to, priority, alone, sink, cx);
            let Some((rows, bytes)) = sent else { return false };
            self.budget.sends();
            self.meter.rows_sent(rows);
            self.meter.counts.bytes_up += bytes;
        }
        true
    }

    /// A message of `bytes` bytes went up.
    pub(super) fn note_message(&mut self, bytes: usize) {
        self.meter.counts.bytes_up += (HEADER_BYTES + bytes) as u64;
    }

    /// Since `began` drafts were made.
    pub(super) fn note_drafting(&mut self, took: Duration) {
        self.meter.counts.drafting_ms += took.as_secs_f64() * 1e3;
        if let Some(round) = self.session.open_mut().and_then(|open| open.round.as_mut()) {
            round.drafting += took.as_secs_f64();
        }
    }

    /// Keeps the path to row `id`, which pends, here now and in the cloud with the next rows. The
    /// moves in the KV store run before any other row is computed.
    pub(super) fn commit(&mut self, id: u32, cx: &mut Common) {
        let Some(open) = self.session.open_mut() else { return };
        self.kv.commit(id, &mut cx.moves).expect("verification stands on pending rows");
        open.outgoing.commit = id;
    }

    /// The invariants of its states.
    ///
    /// # Panics
    /// If one does not hold, in debug builds.
    pub(super) fn check(&self) {
        if cfg!(debug_assertions) {
            match &self.session {
                Session::Closed { .. } | Session::Opening { .. } => {
                    assert_eq!(self.kv.committed(), 0, "rows without a session");
                    assert_eq!(self.kv.pending(), 0, "drafts without a session");
                }
                Session::Open(open) => open.check(&self.kv, &self.path),
            }
        }
    }
}
