//! Pages of prompts that somebody may ask for again: their names, and which are there.
//!
//! A page's [`PageId`] is a keyed hash over everything that its rows depend on, their tokens from
//! the first of the path on included. So equal ids stand for equal rows, and whoever lacks the
//! key can neither guess an id nor test a guess at the tokens. Only full pages of committed rows
//! have one: nobody writes them again.
//!
//! Pure: no clock, no link, no thread.

use std::array::TryFromSliceError;
use std::collections::BTreeMap;
use std::fmt;

use hat_plan::{PAGE_SIZE, TokenId};

use crate::page::PagePool;
use crate::sequence::Sequence;
use crate::wire::BundleFacts;
use hat_transport::codec::Codec;
use hat_transport::message::KV_F16;
pub use hat_transport::message::PageId;

/// The key of a device's, or of a tenant's, page ids. Nobody is shown it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PrefixSecret([u8; 32]);

impl From<[u8; 32]> for PrefixSecret {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl TryFrom<&[u8]> for PrefixSecret {
    type Error = TryFromSliceError;

    fn try_from(bytes: &[u8]) -> Result<Self, Self::Error> {
        bytes.try_into().map(Self)
    }
}

impl fmt::Debug for PrefixSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrefixSecret(..)")
    }
}

/// Scope that the rows of a session depend on, beside their tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PrefixScope {
    /// First layer that the cloud computes.
    pub(crate) entry_layer: u16,
    /// The layer after the last one.
    pub(crate) exit_layer: u16,
    /// Codec of rows on the wire.
    pub(crate) codec: u8,
    /// Number format of keys and values.
    pub(crate) kv_type: u8,
    /// The arithmetic of the cloud's layers.
    pub(crate) arithmetic_id: u32,
}

impl PrefixScope {
    /// Scope of a store whose sessions differ in nothing but the names of their pages.
    pub(crate) const ONE: Self =
        Self { entry_layer: 0, exit_layer: 0, codec: 0, kv_type: 0, arithmetic_id: 0 };
}

/// The ids of a path's full pages, as the path grows. Each token is hashed once.
#[derive(Clone)]
pub(crate) struct PageNames {
    hasher: blake3::Hasher,
    rows: usize,
    ids: Vec<PageId>,
}

impl PageNames {
    /// An empty path of rows that a device computes in `device_arithmetic_id` up to the cloud's
    /// first layer.
    pub(crate) fn new(
        secret: &PrefixSecret,
        model_id: &[u8; 32],
        device_arithmetic_id: u32,
        scope: PrefixScope,
    ) -> Self {
        let mut hasher = blake3::Hasher::new_keyed(&secret.0);
        hasher.update(model_id);
        hasher.update(&scope.entry_layer.to_le_bytes());
        hasher.update(&scope.exit_layer.to_le_bytes());
        hasher.update(&[scope.codec, scope.kv_type]);
        hasher.update(&scope.arithmetic_id.to_le_bytes());
        hasher.update(&device_arithmetic_id.to_le_bytes());
        Self { hasher, rows: 0, ids: Vec::new() }
    }

    /// Room for the names of a path of this many rows in all.
    pub(crate) fn reserve(&mut self, rows: usize) {
        self.ids.reserve((rows / PAGE_SIZE).saturating_sub(self.ids.len()));
    }

    /// The path goes on with `token`.
    pub(crate) fn push(&mut self, token: TokenId) {
        self.hasher.update(&token.to_le_bytes());
        self.rows += 1;
        if self.rows.is_multiple_of(PAGE_SIZE) {
            let hash = self.hasher.finalize();
            self.ids.push(*hash.as_bytes().first_chunk().expect("a hash has 32 bytes"));
        }
    }

    /// The path goes on with `tokens`.
    pub(crate) fn extend(&mut self, tokens: &[TokenId]) {
        tokens.iter().for_each(|token| self.push(*token));
    }

    /// Ids of the pages that the first `rows` rows fill, at most `pages_max` of them.
    pub(crate) fn of_rows(&self, rows: usize, pages_max: usize) -> &[PageId] {
        &self.ids[..(rows / PAGE_SIZE).min(pages_max).min(self.ids.len())]
    }
}

/// Names the pages of a device's paths.
pub struct PageNamer {
    secret: PrefixSecret,
    model_id: [u8; 32],
    /// The arithmetic of the device's own layers.
    pub(crate) arithmetic_id: u32,
    scope: PrefixScope,
}

impl PageNamer {
    /// `None` if all rows go up. Tail layers need all rows that come back, so with them they do.
    pub fn new(
        codec: Codec,
        facts: &BundleFacts,
        arithmetic_id: u32,
        secret: PrefixSecret,
    ) -> Option<Self> {
        if facts.has_tail {
            return None;
        }
        let layer = |layer: u32| u16::try_from(layer).expect("layers are few");
        let scope = PrefixScope {
            entry_layer: layer(facts.layers.start),
            exit_layer: layer(facts.layers.end),
            codec: codec.id(),
            kv_type: KV_F16,
            arithmetic_id: 0,
        };
        Some(Self { secret, model_id: facts.model_id, arithmetic_id, scope })
    }

    /// Names of the pages of `tokens`, which become at most `rows_max`, where the cloud computes in
    /// `cloud_arithmetic_id`.
    pub(crate) fn names(
        &self,
        cloud_arithmetic_id: u32,
        tokens: &[TokenId],
        rows_max: u32,
    ) -> PageNames {
        let scope = PrefixScope { arithmetic_id: cloud_arithmetic_id, ..self.scope };
        let mut names = PageNames::new(&self.secret, &self.model_id, self.arithmetic_id, scope);
        names.reserve(rows_max as usize);
        names.extend(tokens);
        names
    }
}

/// Key of a page: ids of one scope never find pages of another, whatever a device says.
type Key = (PrefixScope, PageId);

/// A page that is there.
#[derive(Clone, Copy, Debug)]
struct Entry {
    page: u32,
    used: u64,
}

/// The pages of one KV store: those in use, and those that are kept by their ids. What nobody holds
/// goes first when pages are wanted, the longest unused before all others; of one path the later
/// pages, which are of no use without the earlier ones.
#[derive(Debug)]
pub(crate) struct PageStore {
    /// Its pages: who holds them, and which are free.
    pub(crate) pool: PagePool,
    entries: BTreeMap<Key, Entry>,
    by_use: BTreeMap<u64, Key>,
    uses: u64,
}

impl PageStore {
    /// A store of this many pages, all free.
    pub(crate) fn new(pages: usize) -> Self {
        Self {
            pool: PagePool::new(u32::try_from(pages).expect("row counts are u32")),
            entries: BTreeMap::new(),
            by_use: BTreeMap::new(),
            uses: 0,
        }
    }

    /// Pages for a session, `wanted` in all, its own holder's: the leading ones of `ids` that are
    /// there, then fresh ones, for which idle pages give way. Returns how many were there, too;
    /// `None` if there is no room, and nothing is changed then. There is room whenever there
    /// would be if no page were kept.
    ///
    /// # Panics
    /// If there are more `ids` than pages wanted.
    pub(crate) fn admit(
        &mut self,
        scope: PrefixScope,
        ids: &[PageId],
        wanted: usize,
    ) -> Option<(Vec<u32>, usize)> {
        assert!(ids.len() <= wanted, "{} page ids for {wanted} pages", ids.len());
        let found = ids.iter().map_while(|id| self.entries.get(&(scope, *id)));
        let mut pages: Vec<u32> = found.map(|entry| entry.page).collect();
        let held = pages.len();
        pages.iter().for_each(|page| self.pool.hold(*page));
        let fresh = wanted - held;
        if fresh > self.pool.available() {
            self.pool.give_back(pages);
            return None;
        }
        self.make_room(fresh);
        self.touch(scope, &ids[..held]);
        pages.extend(self.pool.take(fresh));
        Some((pages, held))
    }

    /// Lets a sequence begin behind the leading pages of `ids` that are there and that nobody else
    /// holds, in place of its rows so far; returns how many these are.
    ///
    /// # Panics
    /// If the sequence shares its pages: there might be no room for as many.
    pub(crate) fn begin_behind(&mut self, sequence: &mut Sequence, ids: &[PageId]) -> usize {
        let rows_max = sequence.rows_max();
        let own = std::mem::replace(sequence, Sequence::new(Vec::new(), 0)).into_pages();
        let wanted = own.len();
        self.pool.give_back(own);
        let idle = |id: &&PageId| {
            let entry = self.entries.get(&(PrefixScope::ONE, **id));
            entry.is_some_and(|entry| self.pool.references(entry.page) == 0)
        };
        let idle = ids.iter().take_while(idle).count();
        let (pages, held) = self
            .admit(PrefixScope::ONE, &ids[..idle], wanted)
            .expect("there is room for the pages that it had");
        *sequence = Sequence::on_cached(pages, rows_max, held);
        held
    }

    /// Keeps the pages of a path, of which `pages` are the first and are held. Ids that are known
    /// keep the page that they have, and pages that are kept their id.
    pub(crate) fn keep(&mut self, scope: PrefixScope, ids: &[PageId], pages: &[u32]) {
        for (id, page) in ids.iter().zip(pages) {
            if !self.pool.is_cached(*page) {
                self.entries.entry((scope, *id)).or_insert_with(|| {
                    self.pool.keep(*page);
                    Entry { page: *page, used: 0 }
                });
            }
        }
        self.touch(scope, ids);
    }

    /// Forgets all ids: what pages hold means nothing any more.
    pub(crate) fn clear(&mut self) {
        self.by_use.clear();
        std::mem::take(&mut self.entries).values().for_each(|entry| self.pool.release(entry.page));
    }

    /// Forgets these pages: what they hold is no good. Who holds them keeps them.
    pub(crate) fn forget(&mut self, pages: &[u32]) {
        let bad = |entry: &Entry| pages.contains(&entry.page);
        self.by_use.retain(|_, key| !bad(&self.entries[key]));
        self.entries.retain(|_, entry| {
            let is_bad = bad(entry);
            if is_bad {
                self.pool.release(entry.page);
            }
            !is_bad
        });
    }

    /// Evicts until `wanted` pages are free, or nothing is idle.
    fn make_room(&mut self, wanted: usize) {
        let missing = wanted.saturating_sub(self.pool.free());
        let page_of = |key: &Key| self.entries[key].page;
        let oldest: Vec<(u64, Key)> = self
            .by_use
            .iter()
            .filter(|(_, key)| self.pool.references(page_of(key)) == 0)
            .take(missing)
            .map(|(used, key)| (*used, *key))
            .collect();
        for (used, key) in oldest {
            self.by_use.remove(&used);
            let entry = self.entries.remove(&key).expect("both maps have the same keys");
            self.pool.release(entry.page);
        }
    }

    /// The pages were used now, the first one last: it outlives those behind it.
    fn touch(&mut self, scope: PrefixScope, ids: &[PageId]) {
        for id in ids.iter().rev() {
            let Some(entry) = self.entries.get_mut(&(scope, *id)) else { continue };
            self.by_use.remove(&entry.used);
            self.uses += 1;
            entry.used = self.uses;
            self.by_use.insert(self.uses, (scope, *id));
        }
    }
}

#[cfg(test)]
mod tests;
