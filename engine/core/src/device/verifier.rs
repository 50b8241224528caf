//! Rows that lead to tokens: which are away, which are back, and how far verification has come.
//!
//! Verification stands before one row, whose output decides the next token. If a row of that token
//! hangs below, verification goes on there; if not, it has left the tree and everything below is
//! stale. Rows of a prompt but the last are not in here: they lead to no token.

use crate::draft::Source;
use crate::sequence::{PENDING_ROWS_MAX, Sequence};
use hat_plan::TokenId;

/// A row that was sent, or will be.
#[derive(Debug)]
pub(super) struct Row {
    /// Its id on the wire.
    pub(super) id: u32,
    /// The id of the row before it.
    pub(super) parent: u32,
    /// Its token.
    pub(super) token: TokenId,
    /// Drafter of the token; `None` if it is decided: before the row was made, or since, and
    /// verification has begun anew here.
    pub(super) source: Option<Source>,
    /// True if the token was a draft when the row was made.
    was_drafted: bool,
    /// Number of the batch of rows that it was made in; see [`Verifier::push`].
    batch: u32,
    /// Round trips that end when it comes back.
    pub(super) round: u32,
    /// The cloud's output. `[hidden_size]`
    output: Option<Vec<f32>>,
}

impl Row {
    /// The cloud's output, with the tail layers applied if verification has passed it.
    pub(super) fn output(&self) -> Option<&[f32]> {
        self.output.as_deref()
    }
}

/// The rows below the last decided token, and the place of verification.
#[derive(Debug, Default)]
pub(super) struct Verifier {
    rows: Vec<Row>, // in order of ids
    at: Option<u32>,
    batch: u32,
    spare: Vec<Vec<f32>>,
}

/// A row whose output is back, and decides the next token.
pub(super) struct Visit<'a> {
    pub(super) id: u32,
    /// Round trips that ended with it.
    pub(super) round: u32,
    /// True if the tail layers have not seen it: its token was a draft when the row was made.
    pub(super) was_drafted: bool,
    /// For the caller to work on in place. `[hidden_size]`
    pub(super) output: &'a mut [f32],
}

/// Outcome of an output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// It was waited for.
    Awaited,
    /// Its row is not here: stale, or never known.
    Unknown,
    /// It had come before.
    Twice,
}

impl Verifier {
    /// Rows that are pushed from now on are made while those before are away.
    pub(super) fn begin_batch(&mut self) {
        self.batch = self.batch.wrapping_add(1);
    }

    /// A row goes up. If verification stands nowhere it stands before this one.
    pub(super) fn push(
        &mut self,
        id: u32,
        parent: u32,
        token: TokenId,
        source: Option<Source>,
        round: u32,
    ) {
        debug_assert!(self.rows.last().is_none_or(|last| last.id < id));
        let (was_drafted, batch) = (source.is_some(), self.batch);
        self.rows.push(Row { id, parent, token, source, was_drafted, batch, round, output: None });
        self.at.get_or_insert(id);
    }

    /// A row has come back.
    pub(super) fn take(&mut self, id: u32, output: &[f32]) -> Taken {
        let Ok(index) = self.rows.binary_search_by_key(&id, |row| row.id) else {
            return Taken::Unknown;
        };
        if self.rows[index].output.is_some() {
            return Taken::Twice;
        }
        let mut kept = self.spare.pop().unwrap_or_default();
        kept.clear();
        kept.extend_from_slice(output);
        self.rows[index].output = Some(kept);
        Taken::Awaited
    }

    /// True if a row is here and has not come back.
    pub(super) fn awaits(&self, id: u32) -> bool {
        let row = self.rows.binary_search_by_key(&id, |row| row.id);
        row.is_ok_and(|index| self.rows[index].output.is_none())
    }

    /// The row that decides the next token, and its output for the caller to work on in place;
    /// `None` as long as it is not back.
    pub(super) fn next(&mut self) -> Option<Visit<'_>> {
        let at = self.at?;
        let row = self.rows.iter_mut().find(|row| row.id == at)?;
        let output = row.output.as_deref_mut()?;
        Some(Visit { id: at, round: row.round, was_drafted: row.was_drafted, output })
    }

    /// The row before which verification stands.
    pub(super) fn at(&self) -> Option<u32> {
        self.at
    }

    /// Drafted rows right below the place of verification: their tokens and who drafted them.
    pub(super) fn drafts(&self) -> impl Iterator<Item = (TokenId, Source)> {
        let below = self.rows.iter().filter(|row| Some(row.parent) == self.at);
        below.filter_map(|row| Some((row.token, row.source?)))
    }

    /// `token` is decided: goes on to its row, if there is one below. True if that was made while
    /// the one above was away.
    pub(super) fn step(&mut self, token: TokenId) -> Option<bool> {
        let batch = self.rows.iter().find(|row| Some(row.id) == self.at).map(|row| row.batch);
        let mut below = self.rows.iter().filter(|row| Some(row.parent) == self.at);
        let row = below.find(|row| row.token == token)?;
        self.at = Some(row.id);
        Some(batch != Some(row.batch))
    }

    /// Makes the row before which verification stands the first one: those that do not hang below
    /// it are forgotten.
    pub(super) fn begin_here(&mut self) {
        let Some(at) = self.at else { return };
        let (mut kept, mut count) = ([0; PENDING_ROWS_MAX + 1], 0);
        let spare = &mut self.spare;
        self.rows.retain_mut(|row| {
            let keeps = row.id == at || kept[..count].contains(&row.parent);
            if keeps {
                (kept[count], count) = (row.id, count + 1);
            } else {
                spare.extend(row.output.take());
            }
            keeps
        });
        if let Some(first) = self.rows.first_mut() {
            first.source = None;
        }
    }

    /// The rows from the root to where verification stands, the last first.
    pub(super) fn path(&self) -> impl Iterator<Item = &Row> + Clone {
        let find = |id: u32| self.rows.iter().find(|row| row.id == id);
        std::iter::successors(self.at.and_then(find), move |row| find(row.parent))
    }

    /// True if no row that is there decides the next token.
    pub(super) fn is_over(&self) -> bool {
        self.at.is_none()
    }

    /// The invariants of the rows that lead to tokens.
    ///
    /// # Panics
    /// If one is not in `kv`, or they are out of order.
    pub(super) fn check(&self, kv: &Sequence) {
        let mut before = 0;
        for row in &self.rows {
            assert!(row.id > before, "row {} behind row {before}", row.id);
            assert!(row.id == kv.tip() || kv.place(row.id).is_some(), "row {} is stale", row.id);
            before = row.id;
        }
        assert!(self.at.is_none_or(|at| self.rows.iter().any(|row| row.id == at)), "it is nowhere");
    }

    /// Forgets all rows.
    pub(super) fn clear(&mut self) {
        self.spare.extend(self.rows.drain(..).filter_map(|row| row.output));
        self.at = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::draft::DrafterKind;

    fn verifier() -> Verifier {
        let mut verifier = Verifier::default();
        let source = Some(Source { drafter: DrafterKind::Lookup, class: 0 });
        verifier.push(10, 9, 5, None, 1);
        verifier.push(11, 10, 6, source, 1);
        verifier.push(12, 10, 7, source, 1);
        verifier.push(13, 12, 8, source, 1);
        verifier
    }

    fn visit(verifier: &mut Verifier) -> (u32, u32, bool, Vec<f32>) {
        let visit = verifier.next().expect("it is back");
        (visit.id, visit.round, visit.was_drafted, visit.output.to_vec())
    }

    #[test]
    fn verification_begins_anew_at_its_cursor() {
        let mut verifier = verifier();
        let source = Some(Source { drafter: DrafterKind::Lookup, class: 0 });
        verifier.begin_batch();
        verifier.push(14, 13, 9, source, 1);
        verifier.push(15, 11, 9, source, 1);
        for id in [10, 11, 12] {
            assert_eq!(verifier.take(id, &[0.0]), Taken::Awaited);
        }
        assert_eq!(verifier.step(7), Some(false));
        assert_eq!(verifier.step(8), Some(false));
        assert_eq!(verifier.at(), Some(13));
        verifier.begin_here();
        assert_eq!(verifier.take(11, &[0.0]), Taken::Unknown);
        assert_eq!(verifier.take(15, &[0.0]), Taken::Unknown);
        verifier.take(13, &[13.0]);
        assert_eq!(visit(&mut verifier), (13, 1, true, vec![13.0]));
        let path: Vec<_> = verifier.path().map(|row| (row.id, row.source.is_some())).collect();
        assert_eq!(path, [(13, false)]);
        assert_eq!(verifier.step(9), Some(true));
        assert_eq!(verifier.path().count(), 2);
    }

    #[test]
    fn verification_follows_decided_tokens_as_far_as_outputs_are_back() {
        let mut verifier = verifier();
        assert!(verifier.next().is_none());
        assert_eq!(verifier.take(12, &[12.0]), Taken::Awaited);
        assert!(verifier.next().is_none(), "the first row is not back");
        assert_eq!(verifier.take(10, &[10.0]), Taken::Awaited);
        assert_eq!(visit(&mut verifier), (10, 1, false, vec![10.0]));
        assert_eq!(verifier.drafts().map(|draft| draft.0).collect::<Vec<_>>(), [6, 7]);
        assert_eq!(verifier.step(7), Some(false));
        assert_eq!(visit(&mut verifier), (12, 1, true, vec![12.0]));
        assert!(verifier.step(8).is_some());
        assert!(verifier.next().is_none(), "13 is away");
        let path: Vec<_> = verifier.path().map(|row| (row.id, row.output().is_some())).collect();
        assert_eq!(path, [(13, false), (12, true), (10, true)]);
        assert!(verifier.step(99).is_none());
    }

    #[test]
    fn outputs_are_taken_once_and_of_known_rows() {
        let mut verifier = verifier();
        assert_eq!(verifier.take(9, &[0.0]), Taken::Unknown);
        assert_eq!(verifier.take(14, &[0.0]), Taken::Unknown);
        assert_eq!(verifier.take(11, &[0.0]), Taken::Awaited);
        assert_eq!(verifier.take(11, &[0.0]), Taken::Twice);
        assert!(!verifier.is_over());
        assert!(verifier.awaits(10) && !verifier.awaits(11) && !verifier.awaits(9));
        verifier.clear();
        assert!(verifier.is_over() && !verifier.awaits(10));
        assert_eq!(verifier.take(11, &[0.0]), Taken::Unknown);
        verifier.push(20, 19, 1, None, 2);
        verifier.take(20, &[3.0, 4.0]);
        assert_eq!(visit(&mut verifier), (20, 2, false, vec![3.0, 4.0]));
    }
}
