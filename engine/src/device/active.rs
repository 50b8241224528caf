//! One request that runs: where its rows are, and what has come back.

use std::ops::Range;
use std::time::{Duration, Instant};

use hat_transport::frame::Kind;

use crate::answer::Answer;
use crate::backend::TokenId;
use crate::draft::policy::Asking;
use crate::draft::trained::SessionId;
use crate::draft::{DraftMode, Lookup, Source, Tree};
use crate::error::RequestError;
use crate::metrics::Meter;
use crate::prefix::PageNames;
use crate::sequence::Sequence;

use super::Job;
use super::plan::Sizing;
use super::violation::CloudViolation;
use super::walk::Walk;

/// Where a request's session in the cloud stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// There is none; it is opened as soon as the cloud is connected and `not_before` has passed.
    Closed { not_before: Option<Instant> },
    /// `OPEN` is on its way.
    Opening,
    /// Rows go up, outputs come back.
    Open,
}

impl Phase {
    /// Finds frames of this kind that may not come now.
    pub(super) fn expects(self, kind: Kind) -> Result<(), CloudViolation> {
        let answers_open = matches!(kind, Kind::Opened | Kind::Busy);
        match self {
            Self::Opening if !answers_open && kind != Kind::SessionError => {
                Err(CloudViolation::BeforeOpened { kind })
            }
            Self::Open if answers_open => Err(CloudViolation::AfterOpened { kind }),
            _ => Ok(()),
        }
    }
}

/// Rows that are computed, and how many of them are sent: a chunk of decided rows, or the rows of
/// the draft tree's nodes, in order.
#[derive(Default)]
pub(super) struct Unsent {
    /// Id of the first row that is not sent; the ids of the others follow.
    pub(super) next_id: u32,
    /// Parent of the first row, if that is decided.
    pub(super) parent: u32,
    /// How many of them are decided, and so a chain; the others pend.
    pub(super) decided: usize,
    /// Parents of the rows of the chunk at hand that pend.
    pub(super) parents: Vec<u32>,
    /// Whether the last decided row leads to a token; those that pend do.
    pub(super) decides: bool,
    /// Whether more rows are being made that run together with these.
    pub(super) grows: bool,
    /// Rows. `[count, hidden_size]`
    pub(super) hidden: Vec<f32>,
    /// Row that the chunk at hand begins with.
    pub(super) begin: usize,
    /// Rows of `hidden` already sent.
    pub(super) sent: usize,
    /// Rows in `hidden`.
    pub(super) count: usize,
}

/// The draft tree below the last decided token; its rows stand in [`Unsent::hidden`].
#[derive(Default)]
pub(super) struct Drafts {
    /// Empty if the last decided token has no row, or one without drafts.
    pub(super) tree: Tree,
    /// Row ids of its nodes.
    pub(super) ids: Vec<u32>,
    /// So many of its nodes, the first ones, the trained drafter was asked about.
    pub(super) asked: usize,
    /// Whether the last guess of a chain was not sure enough to go on below it.
    pub(super) is_unsure: bool,
    /// Whether nothing is to be added before the walk has moved.
    pub(super) is_full: bool,
}

impl Drafts {
    pub(super) fn clear(&mut self) {
        self.tree.clear();
        self.ids.clear();
        self.asked = 0;
        self.is_unsure = false;
        self.is_full = false;
    }
}

/// Rows that were sent, whose way there and back is timed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timed {
    /// When the last of them was sent.
    pub(super) at: Instant,
    /// Id of the first.
    pub(super) first_id: u32,
    /// How many there are.
    pub(super) rows: usize,
}

/// Decided rows that the cloud runs in one step. They are computed here a piece at a time.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Chunk {
    /// All its rows.
    pub(super) rows: u32,
    /// Those that are not computed yet.
    pub(super) left: u32,
}

/// What a round has brought so far.
#[derive(Clone, Copy, Debug)]
pub(super) struct Round {
    /// When its first row was begun.
    pub(super) began: Instant,
    /// Tokens of the answer before it.
    pub(super) tokens: usize,
    /// Whether the trained drafter is asked in it.
    pub(super) asked: bool,
    /// Seconds spent on drafts and their rows.
    pub(super) drafting: f64,
}

/// One request that runs.
pub(super) struct Active {
    pub(super) job: Job,
    pub(super) answer: Answer,
    pub(super) meter: Meter,
    pub(super) phase: Phase,
    /// The session's id on the wire; a new one at each opening.
    pub(super) wire_id: u32,
    /// Prompt and answer so far.
    pub(super) tokens: Vec<TokenId>,
    /// Names of the pages that `tokens` fill; `None` if the cloud is asked for none.
    pub(super) names: Option<PageNames>,
    /// Pieces of others that were computed while one of its own could have been.
    pub(super) passed: u32,
    /// Most names of pages in a frame to the cloud.
    pub(super) names_max: usize,
    /// Rows that the cloud held when the session opened: they are not sent.
    pub(super) held: u32,
    /// The chunk of decided rows at hand.
    pub(super) chunk: Chunk,
    /// KV of the device's own layers.
    pub(super) sequence: Sequence,
    pub(super) unsent: Unsent,
    pub(super) walk: Walk,
    pub(super) drafts: Drafts,
    /// The round at hand; `None` before the first.
    pub(super) round_now: Option<Round>,
    /// What asking the trained drafter has brought.
    pub(super) asking: Asking,
    /// Chunks of the prompt that are on their way.
    pub(super) sizing: Sizing,
    /// The last row of the path that the cloud has not been told to keep; 0 if there is none. It
    /// goes with the first frame of a chunk.
    pub(super) commit: u32,
    /// How many waits have ended.
    pub(super) round: u32,
    /// What stood in the prompt and in the answer; `None` if this request has no drafts.
    pub(super) lookup: Option<Lookup>,
    /// Its session with the trained drafter.
    pub(super) trained: Option<SessionId>,
    /// Whether the trained drafter holds rows of a tree.
    pub(super) has_draft_rows: bool,
    /// Positions that the trained drafter has taken.
    pub(super) fed: u32,
    /// Positions whose shallow rows stand at the front of `unsent.hidden`, decided, and have not
    /// been looked at for the trained drafter.
    pub(super) unfed: Range<u32>,
    /// The deep row of the last visited position; empty if it is not known. `[hidden_size]`
    pub(super) deep: Vec<f32>,
    /// Guesses right below the last decided token that were not sent: they are tested all the
    /// same, so that a drafter that is not asked can become better.
    pub(super) held_back: Vec<(TokenId, Source)>,
    /// Rows that lead to tokens; `None` if they are back, or can't be timed.
    pub(super) timed: Option<Timed>,
    /// The last row that was sent.
    pub(super) sent_id: u32,
    /// The last row that COMPUTED told of.
    pub(super) told_id: u32,
    /// Decided rows whose output has not come back; only the tail layers get all of them.
    pub(super) decided: Range<u32>,
    /// When to give up on a cloud that is away.
    pub(super) deadline: Option<Instant>,
    /// Time of the last answer of the cloud that was waited for, or of the last moment in which
    /// none was due.
    pub(super) heard: Instant,
    /// Times that the cloud lost the session since the last token.
    pub(super) lost_n: u32,
    /// The cloud is there and has no room: after how many ms it said it might.
    pub(super) busy_ms: Option<u32>,
}

/// A cloud that loses a session so often before it gives a token will not give one.
const LOST_MAX: u32 = 3;
/// The same for a cloud that forgets sessions in order: it restarts, or needs their pages.
const RETURNS_MAX: u32 = 16;

impl Active {
    /// Rows of the decided path that the device's own layers have computed and committed.
    pub(super) fn computed(&self) -> u32 {
        self.sequence.committed()
    }

    /// Rows that there are.
    pub(super) fn rows(&self) -> u32 {
        u32::try_from(self.tokens.len()).expect("within the context")
    }

    /// Whether there is something to compute now.
    pub(super) fn wants_compute(&self) -> bool {
        self.phase == Phase::Open
            && self.unsent.sent == self.unsent.count
            && self.walk.is_over()
            && self.computed() < self.rows()
    }

    /// True if the cloud has been asked for a session, and has not ended it.
    pub(super) fn has_session(&self) -> bool {
        !matches!(self.phase, Phase::Closed { .. })
    }

    /// Whether there may be drafts to add to a tree whose rows are away.
    pub(super) fn wants_more_drafts(&self) -> bool {
        self.phase == Phase::Open
            && self.unsent.sent == self.unsent.count
            && !self.walk.is_over()
            && !self.drafts.is_full
            && !self.drafts.tree.nodes().is_empty()
            && self.draft_mode().streams()
    }

    /// Tokens that a tree below the last decided one may reach down: the last token of the answer
    /// needs no row, and so no row may lead beyond it.
    pub(super) fn depth_max(&self) -> u32 {
        self.job.prepared.rows_max().saturating_sub(self.rows() + 1)
    }

    pub(super) fn draft_mode(&self) -> DraftMode {
        self.job.prepared.request.draft
    }

    /// Whether all that is to be computed is the last decided token: drafts may hang below it.
    pub(super) fn is_decoding(&self) -> bool {
        !self.answer.tokens().is_empty() && self.computed() + 1 == self.rows()
    }

    /// A token was decided.
    pub(super) fn push_token(&mut self, token: TokenId) {
        self.tokens.push(token);
        self.lost_n = 0;
        if let Some(names) = &mut self.names {
            names.push(token);
        }
        if let Some(lookup) = &mut self.lookup {
            lookup.push(token);
        }
    }

    /// Begins again from the tokens: the cloud no longer knows the session. What was emitted
    /// stays; the rows go up once more and the answer goes on after its last token.
    pub(super) fn restart(&mut self, not_before: Option<Instant>) {
        let pages = std::mem::replace(&mut self.sequence, Sequence::new(Vec::new(), 0));
        let rows_max = self.job.prepared.rows_max();
        self.sequence = Sequence::new(pages.into_pages(), rows_max);
        self.held = 0;
        self.chunk = Chunk::default();
        self.unsent.count = 0;
        self.unsent.sent = 0;
        self.unsent.grows = false;
        self.walk.clear();
        self.drafts.clear();
        self.round_now = None;
        self.sizing = Sizing::default();
        self.commit = 0;
        self.held_back.clear();
        self.timed = None;
        self.unfed = 0..0;
        self.deep.clear();
        self.sent_id = 0;
        self.told_id = 0;
        self.decided = 1..1;
        self.meter.rows_lost();
        self.phase = Phase::Closed { not_before };
    }

    /// The cloud lost the session: says whether it is worth another try.
    pub(super) fn may_lose_session(&mut self) -> bool {
        self.lost_n += 1;
        self.lost_n <= LOST_MAX
    }

    /// The cloud has forgotten the session: whether it is worth another try.
    pub(super) fn may_return(&mut self) -> bool {
        self.lost_n += 1;
        self.lost_n <= RETURNS_MAX
    }

    /// True if nothing goes on before the cloud has answered.
    pub(super) fn awaits_cloud(&self) -> bool {
        match self.phase {
            Phase::Closed { .. } => false,
            Phase::Opening => true,
            Phase::Open => self.unsent.sent == self.unsent.count && !self.wants_compute(),
        }
    }

    /// Starts the clock on a cloud that is away, if it does not run already.
    pub(super) fn start_deadline(&mut self, now: Instant, patience: Duration) {
        self.deadline.get_or_insert(now + patience);
    }

    /// Ends the request with an error.
    pub(super) fn fail(&self, error: RequestError) {
        let _ = self.job.events.send(Err(error.into()));
    }
}
