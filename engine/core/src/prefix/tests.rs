//! Names, and a store against a model of it.

use std::collections::{HashMap, HashSet};

use proptest::prelude::*;

use super::*;

const SCOPE: PrefixScope =
    PrefixScope { entry_layer: 2, exit_layer: 30, codec: 1, kv_type: 1, arithmetic_id: 1 };

fn names(secret: u8, scope: PrefixScope, tokens: impl IntoIterator<Item = TokenId>) -> PageNames {
    let mut names = PageNames::new(&[secret; 32].into(), &[9; 32], 1, scope);
    names.extend(&tokens.into_iter().collect::<Vec<_>>());
    names
}

#[test]
fn a_secret_is_not_shown() {
    assert_eq!(format!("{:?}", PrefixSecret::from([77; 32])), "PrefixSecret(..)");
}

#[test]
fn names_depend_on_all_that_rows_depend_on() {
    let base = names(1, SCOPE, 0..100);
    assert_eq!(base.of_rows(100, 9).len(), 3);
    assert_eq!(base.of_rows(95, 9).len(), 2);
    assert_eq!(base.of_rows(100, 1).len(), 1);
    let mut other_model = PageNames::new(&[1; 32].into(), &[8; 32], 1, SCOPE);
    let mut other_device = PageNames::new(&[1; 32].into(), &[9; 32], 2, SCOPE);
    for other in [&mut other_model, &mut other_device] {
        other.extend(&(0..100).collect::<Vec<_>>());
    }
    let others = [
        names(2, SCOPE, 0..100),
        names(1, PrefixScope { entry_layer: 3, ..SCOPE }, 0..100),
        names(1, PrefixScope { exit_layer: 29, ..SCOPE }, 0..100),
        names(1, PrefixScope { codec: 0, ..SCOPE }, 0..100),
        names(1, PrefixScope { kv_type: 2, ..SCOPE }, 0..100),
        names(1, PrefixScope { arithmetic_id: 2, ..SCOPE }, 0..100),
        names(1, SCOPE, (0..100).map(|token| token.max(1))),
        other_model,
        other_device,
    ];
    let mut seen: HashSet<PageId> = base.of_rows(100, 9).iter().copied().collect();
    for other in &others {
        assert!(other.of_rows(100, 9).iter().all(|id| seen.insert(*id)));
    }
    // What comes later changes nothing before.
    let longer = names(1, SCOPE, (0..64).chain([7; 64]));
    assert_eq!(longer.of_rows(64, 9), base.of_rows(64, 9));
    assert_ne!(longer.of_rows(96, 9)[2], base.of_rows(96, 9)[2]);
}

#[test]
fn the_longest_unused_goes_first_and_the_later_page_of_a_path() {
    let mut store = PageStore::new(6);
    let [a, b] = [[[1; 16], [2; 16], [3; 16]], [[1; 16], [2; 16], [4; 16]]];
    let (pages, held) = store.admit(SCOPE, &a, 3).unwrap();
    assert_eq!(held, 0);
    store.keep(SCOPE, &a, &pages);
    store.pool.give_back(pages.clone());
    let (also, held) = store.admit(SCOPE, &b, 3).unwrap();
    assert_eq!((held, &also[..2]), (2, &pages[..2]));
    store.keep(SCOPE, &b, &also);
    store.pool.give_back(also);
    assert_eq!((store.pool.free(), store.pool.idle(), store.entries.len()), (2, 4, 4));
    // One page more than are free: the end of the older path goes.
    let (mine, _) = store.admit(SCOPE, &[], 3).unwrap();
    assert!(!store.entries.contains_key(&(SCOPE, a[2])));
    assert!(b.iter().all(|id| store.entries.contains_key(&(SCOPE, *id))));
    // Of one path the last.
    let (one, _) = store.admit(SCOPE, &[], 1).unwrap();
    assert_eq!(b.map(|id| store.entries.contains_key(&(SCOPE, id))), [true, true, false]);
    store.pool.give_back(one);
    // Another scope finds nothing; all that is idle gives way, and no more.
    let other = PrefixScope { codec: 0, ..SCOPE };
    assert!(store.admit(other, &b, 4).is_none());
    assert_eq!(store.entries.len(), 2);
    let (rest, held) = store.admit(other, &b, 3).unwrap();
    assert_eq!((held, store.entries.len(), store.pool.free(), store.pool.idle()), (0, 0, 0, 0));
    // Nothing is kept when all is forgotten, whoever holds it.
    store.keep(SCOPE, &a, &mine);
    store.pool.give_back(mine);
    store.keep(other, &b, &rest);
    store.clear();
    assert_eq!((store.by_use.len(), store.pool.free(), store.pool.idle()), (0, 3, 0));
    store.pool.give_back(rest);
    assert_eq!(store.pool.free(), 6);
}

#[test]
fn names_that_contradict_each_other_break_nothing() {
    let mut store = PageStore::new(4);
    let [x, y] = [[1; 16], [2; 16]];
    let (pages, _) = store.admit(SCOPE, &[x, x, x], 4).unwrap();
    store.keep(SCOPE, &[x, x, x], &pages);
    store.keep(SCOPE, &[y, y], &pages);
    assert_eq!(store.entries[&(SCOPE, x)].page, pages[0]);
    assert_eq!(store.entries[&(SCOPE, y)].page, pages[1]);
    store.pool.give_back(pages);
    let (pages, held) = store.admit(SCOPE, &[x, x, y], 4).unwrap();
    assert_eq!((held, pages[0], pages[1]), (3, pages[1], pages[0]));
    store.pool.give_back(pages);
    assert_eq!((store.pool.free(), store.pool.idle()), (2, 2));
}

/// Act of a session.
#[derive(Clone, Debug)]
enum Act {
    /// Opens with the path `0..pages` of one of a few trunks, and room for `extra` pages more.
    Open { trunk: u8, pages: usize, extra: usize },
    /// The session's first `pages` pages are computed and named.
    Name { session: prop::sample::Index, pages: usize },
    /// The session ends.
    End { session: prop::sample::Index },
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let any_session = any::<prop::sample::Index>;
    let act = prop_oneof![
        (0u8..3, 0usize..7, 1usize..4).prop_map(|(trunk, pages, extra)| Act::Open {
            trunk,
            pages,
            extra
        }),
        (any_session(), 0usize..9).prop_map(|(session, pages)| Act::Name { session, pages }),
        any_session().prop_map(|session| Act::End { session }),
    ];
    prop::collection::vec(act, 0..80)
}

struct Session {
    trunk: u8,
    pages: Vec<u32>,
    /// Leading pages that it must not write: shared, or named.
    full: usize,
}

fn id(trunk: u8, page: usize) -> PageId {
    // The trunks share their first two pages.
    let trunk = if page < 2 { 0 } else { trunk };
    let mut id = [trunk; 16];
    id[1] = u8::try_from(page).unwrap();
    id
}

const PAGES: u32 = 16;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// No page is lost, none is given twice, none that is shared can be written; a page stands
    /// for one id as long as anybody can find it; and what is kept refuses nobody.
    #[test]
    fn pages_are_shared_and_none_is_lost(acts in acts()) {
        let mut store = PageStore::new(PAGES as usize);
        let mut sessions: Vec<Session> = Vec::new();
        let mut holds: HashMap<u32, PageId> = HashMap::new(); // what was last written where
        for act in acts {
            match act {
                Act::Open { trunk, pages, extra } => {
                    let ids: Vec<PageId> = (0..pages).map(|page| id(trunk, page)).collect();
                    let held: HashSet<u32> =
                        sessions.iter().flat_map(|session| session.pages.clone()).collect();
                    let wanted = pages + extra;
                    let would_fit = wanted <= PAGES as usize - held.len();
                    let admitted = store.admit(SCOPE, &ids, wanted);
                    let is_due = admitted.is_some() || !would_fit;
                    prop_assert!(is_due, "somebody was refused for what is kept");
                    let Some((pages, full)) = admitted else { continue };
                    prop_assert_eq!(pages.len(), wanted);
                    for (page, id) in pages[..full].iter().zip(&ids) {
                        prop_assert_eq!(&holds[page], id);
                    }
                    for page in &pages[full..] {
                        prop_assert!(!held.contains(page), "page {} was given twice", page);
                        holds.remove(page);
                    }
                    sessions.push(Session { trunk, pages, full });
                }
                Act::Name { session, pages } if !sessions.is_empty() => {
                    let at = session.index(sessions.len());
                    let Session { trunk, pages: own, full } = &mut sessions[at];
                    let named = pages.min(own.len());
                    for (page, own) in own.iter().enumerate().take(named).skip(*full) {
                        holds.insert(*own, id(*trunk, page));
                    }
                    *full = named.max(*full);
                    let ids: Vec<PageId> = (0..named).map(|page| id(*trunk, page)).collect();
                    store.keep(SCOPE, &ids, own);
                }
                Act::End { session } if !sessions.is_empty() => {
                    let at = session.index(sessions.len());
                    store.pool.give_back(sessions.swap_remove(at).pages);
                }
                _ => {}
            }
            let mut writers: HashSet<u32> = HashSet::new();
            for session in &sessions {
                for page in &session.pages[session.full..] {
                    prop_assert!(writers.insert(*page), "two may write page {}", page);
                    prop_assert_eq!(store.pool.references(*page), 1);
                }
            }
            let held: HashSet<u32> =
                sessions.iter().flat_map(|session| session.pages.clone()).collect();
            prop_assert_eq!(store.pool.free() + store.pool.idle() + held.len(), PAGES as usize);
            let kept: HashSet<u32> = store.entries.values().map(|entry| entry.page).collect();
            prop_assert_eq!(kept.len(), store.entries.len(), "two ids, one page");
            prop_assert_eq!(store.by_use.len(), store.entries.len());
            prop_assert!(kept.is_disjoint(&writers), "a page that is kept can be written");
            prop_assert_eq!(kept.difference(&held).count(), store.pool.idle());
        }
    }
}
