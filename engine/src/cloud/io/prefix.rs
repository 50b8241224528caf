//! Pages that sessions share: found when one opens, named when their rows are there.

use std::sync::atomic::Ordering;

use hat_transport::message::{End, Open};

use super::super::violation::SessionViolation;
use super::Io;
use crate::backend::PAGE_SIZE;
use crate::prefix::PrefixScope;
use crate::sched::SessionKey;

/// What the rows of a session to be depend on.
pub(in crate::cloud) fn scope_of(open: &Open<'_>) -> PrefixScope {
    PrefixScope {
        entry_layer: open.entry_layer,
        exit_layer: open.exit_layer,
        codec: open.codec,
        kv_type: open.kv_type,
        arithmetic_id: open.arithmetic_id,
    }
}

/// Whether an OPEN names no more pages than a prompt can fill: its last row is always computed.
pub(super) fn check_names(open: &Open<'_>) -> Result<(), SessionViolation> {
    let (named, rows_max) = (open.pages.len(), open.rows_max);
    let named_max = rows_max.saturating_sub(1) as usize / PAGE_SIZE;
    if named <= named_max {
        return Ok(());
    }
    Err(SessionViolation::Names { named, rows_max, named_max })
}

impl Io {
    /// The `wanted` pages of a session, for which there is room, and how many of them, the first
    /// ones, hold its prompt already.
    pub(super) fn reserve(&mut self, open: &Open<'_>, wanted: usize) -> (Vec<u32>, usize) {
        let (pages, held) = self
            .prefixes
            .admit(&mut self.pages, scope_of(open), open.pages, wanted)
            .expect("there is room");
        self.start.counters.pages_reused.fetch_add(held as u64, Ordering::Relaxed);
        (pages, held)
    }

    /// Names the pages of a session's prompt that its planned rows fill. Others may have them from
    /// now on: the rows of whoever asks run in a later step.
    pub(super) fn name_prompt(&mut self, key: SessionKey) {
        let Some(session) = self.sessions.get_mut(&key) else { return };
        let Some(names) = session.names_to_keep() else { return };
        self.prefixes.keep(&mut self.pages, session.scope, names, session.sequence.pages());
        session.names_were_kept();
    }

    /// A device is done with a session: its pages may be kept under the names that it gives.
    pub(super) fn end_named(
        &mut self,
        key: SessionKey,
        end: &End<'_>,
    ) -> Result<(), SessionViolation> {
        let session = self.sessions.get_mut(&key).expect("keys and sessions agree");
        if end.commit != 0 {
            session.take_commit(end.commit, &mut self.moves)?;
        }
        let full = session.sequence.full_pages().min(end.pages.len());
        let (names, pages) = (&end.pages[..full], session.sequence.pages());
        self.prefixes.keep(&mut self.pages, session.scope, names, pages);
        self.end(key);
        Ok(())
    }
}
