//! Rows that lead to tokens: which are away, which are back, and how far the walk has come.
//!
//! The walk stands before one row, whose output decides the next token. If a row of that token
//! hangs below, the walk goes on there; if not, it has left the tree and everything below is
//! void. Rows of a prompt but the last are not in here: they lead to no token.

use crate::backend::TokenId;
use crate::draft::Source;

/// A row that was sent, or will be.
#[derive(Debug)]
pub(super) struct Row {
    /// Its id on the wire.
    pub(super) id: u32,
    /// The id of the row before it.
    pub(super) parent: u32,
    /// Its token.
    pub(super) token: TokenId,
    /// Who drafted the token; `None` if it was decided before the row was made.
    pub(super) source: Option<Source>,
    /// How many waits end when it comes back.
    pub(super) round: u32,
    /// What came back. `[hidden_size]`
    output: Option<Vec<f32>>,
}

impl Row {
    /// What came back for it, the tail layers applied if the walk has been there.
    pub(super) fn output(&self) -> Option<&[f32]> {
        self.output.as_deref()
    }
}

/// The rows below the last decided token, and the place of the walk.
#[derive(Debug, Default)]
pub(super) struct Walk {
    rows: Vec<Row>, // in order of ids
    at: Option<u32>,
    spare: Vec<Vec<f32>>,
}

/// What became of an output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// It was waited for.
    Awaited,
    /// Its row is not here: void, or never known.
    Unknown,
    /// It had come before.
    Twice,
}

impl Walk {
    /// A row goes up. If the walk stands nowhere it stands before this one.
    pub(super) fn push(
        &mut self,
        id: u32,
        parent: u32,
        token: TokenId,
        source: Option<Source>,
        round: u32,
    ) {
        debug_assert!(self.rows.last().is_none_or(|last| last.id < id));
        self.rows.push(Row { id, parent, token, source, round, output: None });
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

    /// The row that decides the next token, and its output for the caller to work on in place;
    /// `None` as long as it is not back.
    pub(super) fn next(&mut self) -> Option<(u32, u32, &mut [f32])> {
        let at = self.at?;
        let row = self.rows.iter_mut().find(|row| row.id == at)?;
        Some((row.id, row.round, row.output.as_deref_mut()?))
    }

    /// Drafted rows right below the place of the walk: their tokens and who drafted them.
    pub(super) fn drafts(&self) -> impl Iterator<Item = (TokenId, Source)> {
        let below = self.rows.iter().filter(|row| Some(row.parent) == self.at);
        below.filter_map(|row| Some((row.token, row.source?)))
    }

    /// `token` is decided: goes on to its row, if there is one below. Says whether.
    pub(super) fn step(&mut self, token: TokenId) -> bool {
        let below = self.rows.iter().find(|row| Some(row.parent) == self.at && row.token == token);
        match below {
            Some(row) => {
                self.at = Some(row.id);
                true
            }
            None => false,
        }
    }

    /// The rows from the root to where the walk stands, the last first.
    pub(super) fn path(&self) -> impl Iterator<Item = &Row> + Clone {
        let find = |id: u32| self.rows.iter().find(|row| row.id == id);
        std::iter::successors(self.at.and_then(find), move |row| find(row.parent))
    }

    /// Whether it stands nowhere: no row that is there decides the next token.
    pub(super) fn is_over(&self) -> bool {
        self.at.is_none()
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
    use crate::draft::Drafter;

    fn walk() -> Walk {
        let mut walk = Walk::default();
        let source = Some(Source { drafter: Drafter::Lookup, class: 0 });
        walk.push(10, 9, 5, None, 1);
        walk.push(11, 10, 6, source, 1);
        walk.push(12, 10, 7, source, 1);
        walk.push(13, 12, 8, source, 1);
        walk
    }

    #[test]
    fn the_walk_follows_decided_tokens_as_far_as_outputs_are_back() {
        let mut walk = walk();
        assert!(walk.next().is_none());
        assert_eq!(walk.take(12, &[12.0]), Taken::Awaited);
        assert!(walk.next().is_none(), "the first row is not back");
        assert_eq!(walk.take(10, &[10.0]), Taken::Awaited);
        assert_eq!(walk.next(), Some((10, 1, &mut [10.0][..])));
        assert_eq!(walk.drafts().map(|draft| draft.0).collect::<Vec<_>>(), [6, 7]);
        assert!(walk.step(7));
        assert_eq!(walk.next(), Some((12, 1, &mut [12.0][..])));
        assert!(walk.step(8));
        assert!(walk.next().is_none(), "13 is away");
        let path: Vec<_> = walk.path().map(|row| (row.id, row.output().is_some())).collect();
        assert_eq!(path, [(13, false), (12, true), (10, true)]);
        assert!(!walk.step(99));
    }

    #[test]
    fn outputs_are_taken_once_and_of_known_rows() {
        let mut walk = walk();
        assert_eq!(walk.take(9, &[0.0]), Taken::Unknown);
        assert_eq!(walk.take(14, &[0.0]), Taken::Unknown);
        assert_eq!(walk.take(11, &[0.0]), Taken::Awaited);
        assert_eq!(walk.take(11, &[0.0]), Taken::Twice);
        assert!(!walk.is_over());
        walk.clear();
        assert!(walk.is_over());
        assert_eq!(walk.take(11, &[0.0]), Taken::Unknown);
        walk.push(20, 19, 1, None, 2);
        walk.take(20, &[3.0, 4.0]);
        assert_eq!(walk.next(), Some((20, 2, &mut [3.0, 4.0][..])));
    }
}
