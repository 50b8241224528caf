//! A request and its session, as the world follows it.

use hat_engine::draft::policy::Asking;

use crate::load::Ask;
use crate::machine::Time;
use crate::policy::DRAFTS;
use crate::round::{Level, Making, Round};

/// A request and its session.
pub(crate) struct Request {
    pub(crate) device: usize,
    pub(crate) ask: Ask,
    /// Rows that the cloud holds already.
    pub(super) held: u32,
    pub(crate) sizes: Vec<u32>,
    pub(super) sent_rows: u32,
    pub(crate) emitted: u32,
    pub(crate) first_s: f64,
    pub(crate) last_s: f64,
    pub(super) round: Round,
    pub(crate) rounds: u32,
    pub(crate) rows_up: u64,
    pub(crate) bytes_up: u64,
    pub(crate) bytes_down: u64,
    /// When and how many rows were handed to the link whose reply teaches what waiting costs.
    pub(super) sent: Option<(Time, u32)>,
    /// The device's idle time when rows went away, and what one may draft in it.
    pub(super) idle_at_send: Time,
    pub(super) ahead: usize,
    /// What the head took for the rows that came back last.
    pub(super) head_s: f64,
    /// An `Extend` waits or runs.
    pub(super) extending: bool,
    /// Levels of the round's tree, whose rows are not all computed.
    pub(super) levels: Vec<Level>,
    /// Whether asking the adapter pays, and whether it was asked in this round.
    pub(super) asking: Asking,
    pub(super) asked: bool,
    /// When this round began, and after how many tokens.
    pub(super) began: (Time, u32),
}

impl Request {
    /// The rows of a round are to be computed: level by level, or all together. What was drafted
    /// ahead takes no time.
    pub(super) fn set_levels(&mut self, mut levels: Vec<Level>, each: bool) {
        let ahead = std::mem::take(&mut self.ahead).min(levels.len());
        levels[..ahead].iter_mut().for_each(|level| level.seconds = 0.0);
        if !each {
            let rows = levels.iter().map(|level| level.rows).sum();
            let seconds = levels.iter().map(|level| level.seconds).sum();
            levels = vec![Level { rows, seconds }];
        }
        self.levels = levels;
    }

    /// Adds drafts to a tree that is away, if a wave pays; `is_void` if that tree is no more,
    /// `is_due` if its rows will be back before a wave could be made. Returns the seconds.
    pub(super) fn extend(
        &mut self,
        making: &mut Making<'_>,
        is_void: bool,
        is_due: bool,
    ) -> Option<f64> {
        if is_void {
            return None;
        }
        let wave = making.estimator.wave(DRAFTS.wave_nodes);
        let took = if is_due { None } else { self.round.extend(making, wave) };
        if let Some(took) = took {
            making.estimator.note_wave(took);
        }
        self.extending = took.is_some();
        took
    }

    /// Nobody has worked on it.
    pub(super) fn new(ask: Ask) -> Self {
        Self {
            device: 0,
            ask,
            held: 0,
            sizes: vec![],
            sent_rows: 0,
            emitted: 0,
            first_s: 0.0,
            last_s: 0.0,
            round: Round::default(),
            rounds: 0,
            rows_up: 0,
            bytes_up: 0,
            bytes_down: 0,
            sent: None,
            idle_at_send: 0,
            ahead: 0,
            head_s: 0.0,
            extending: false,
            levels: vec![],
            asking: Asking::default(),
            asked: false,
            began: (0, 0),
        }
    }
}
