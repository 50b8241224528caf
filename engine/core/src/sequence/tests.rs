//! The tree against a plain model: a map from id to the full path.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn sequence() -> Sequence {
    Sequence::new(vec![7, 3, 9, 1, 5], 96)
}

#[test]
fn prompt_rows_never_pend() {
    let mut rows = sequence();
    assert_eq!(rows.append_committed(1, 40, 0), Ok(0));
    assert_eq!(rows.append_committed(41, 1, 40), Ok(40));
    assert_eq!((rows.committed(), rows.tip(), rows.pending()), (41, 41, 0));
    let error = rows.append_committed(42, 56, 41).unwrap_err();
    assert_eq!(error, SequenceError::Full { rows: 97, reserved: 96 });
}

#[test]
fn a_pending_row_needs_a_reserved_position() {
    let mut rows = sequence();
    rows.append_committed(1, 94, 0).unwrap();
    let full = SequenceError::Full { rows: 97, reserved: 96 };
    // Positions 94 and 95 are the last; there are slots behind them.
    assert_eq!(rows.append_pending(95, [94, 95, 96]), Err(full));
    assert_eq!(rows.pending(), 0);
    rows.append_pending(95, [94, 95, 94, 97]).unwrap();
    assert_eq!(rows.place(96).map(|(position, _)| position), Some(95));
    assert_eq!(rows.append_pending(99, [96]), Err(full));
    assert_eq!((rows.pending(), rows.last_id()), (4, 98));
}

#[test]
fn ids_and_parents_are_checked() {
    let mut rows = sequence();
    rows.append_committed(1, 3, 0).unwrap();
    assert_eq!(rows.append_committed(3, 1, 3), Err(SequenceError::BadId { id: 3, last: 3 }));
    assert_eq!(
        rows.append_committed(u32::MAX, 2, 3),
        Err(SequenceError::BadId { id: u32::MAX, last: 3 })
    );
    let bad = SequenceError::BadParent { id: 4, parent: 2, tip: 3 };
    assert_eq!(rows.append_committed(4, 1, 2), Err(bad));
    assert_eq!(rows.append_pending(4, [2]), Err(bad));
    rows.append_pending(4, [3, 4, 3]).unwrap();
    let bad = SequenceError::BadCommit { row: 99, tip: 3 };
    assert_eq!(rows.commit(99, &mut vec![]), Err(bad));
    let many = vec![3; 62];
    assert_eq!(rows.append_pending(7, &many), Err(SequenceError::TooManyPending { pending: 65 }));
    assert_eq!(rows.pending(), 3);
}

#[test]
fn commit_moves_the_path_and_keeps_the_branch_below() {
    let mut rows = sequence();
    rows.append_committed(1, 10, 0).unwrap();
    // 11 and 12 hang off the tip, 13 below 12, 14 below 13, 15 below 11.
    rows.append_pending(11, [10, 10, 12, 13, 11]).unwrap();
    let mut moves = vec![];
    rows.commit(13, &mut moves).unwrap();
    let to = |slot: u32| RowMove { from: (7, slot + 1), to: (7, slot) };
    assert_eq!(moves, [to(10), to(11), to(12)]);
    assert_eq!([11, 15].map(|id| rows.place(id)), [None; 2], "they are pruned");
    assert_eq!((rows.committed(), rows.tip(), rows.pending()), (12, 13, 1));
    assert_eq!(rows.place(14), Some((12, 12)));
}

#[test]
fn a_decided_row_makes_pending_rows_stale() {
    let mut rows = sequence();
    rows.append_committed(1, 10, 0).unwrap();
    rows.append_pending(11, [10, 11, 10]).unwrap();
    rows.commit(11, &mut vec![]).unwrap();
    assert_eq!(rows.pending(), 1, "12 is below 11");
    assert_eq!(rows.append_committed(14, 1, 11), Ok(11));
    assert_eq!((rows.committed(), rows.tip(), rows.pending()), (12, 14, 0));
    assert_eq!(rows.place(12), None);
}

#[test]
fn retracted_rows_never_were() {
    let mut rows = sequence();
    rows.append_committed(1, 10, 0).unwrap();
    rows.append_pending(11, [10, 11, 12]).unwrap();
    rows.retract(14);
    assert_eq!((rows.pending(), rows.last_id()), (3, 13));
    rows.retract(12);
    assert_eq!((rows.pending(), rows.last_id()), (1, 11));
    rows.append_pending(12, [11]).unwrap();
    assert_eq!(rows.place(12), Some((11, 11)));
}

#[test]
fn a_plan_names_the_ancestors_of_a_tree_row() {
    let mut rows = sequence();
    rows.append_committed(1, 10, 0).unwrap();
    rows.append_pending(11, [10, 10, 12, 11]).unwrap();
    let mut plan = BatchBuffers::default();
    plan.clear();
    for id in 11..=14 {
        assert!(rows.push_row(id, &mut plan));
    }
    plan.end_sequence(rows.pages());
    let plan = plan.batch();
    assert_eq!(plan.positions, [10, 10, 11, 11]);
    assert_eq!(plan.slots, [10, 11, 12, 13]);
    assert_eq!(plan.prefix_len, [11, 10, 10, 11]);
    assert_eq!(plan.tail_indptr, [0, 0, 1, 3, 4]);
    assert_eq!(plan.tail_slots, [11, 11, 12, 13]);
    assert_eq!(plan.page_indices, [7, 3, 9, 1, 5]);
}

/// Step of a random program: grow somewhere, or commit something.
#[derive(Clone, Debug)]
enum Op {
    Decided(u32),
    Pend(Vec<u8>),
    Commit(u8),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        (1u32..5).prop_map(Op::Decided),
        proptest::collection::vec(any::<u8>(), 1..6).prop_map(Op::Pend),
        any::<u8>().prop_map(Op::Commit),
    ]
}

/// A KV store of ids, moved as the sequence says, must show every row its own path.
#[derive(Default)]
struct Model {
    kv: BTreeMap<(u32, u32), u32>,
    paths: BTreeMap<u32, Vec<u32>>,
}

impl Model {
    fn check(&self, rows: &Sequence) {
        let mut plan = BatchBuffers::default();
        for row in &rows.pending {
            plan.clear();
            assert!(rows.push_row(row.id, &mut plan));
            plan.end_sequence(rows.pages());
            let plan = plan.batch();
            let slots = (0..plan.prefix_len[0]).chain(plan.tail_slots.iter().copied());
            let seen: Vec<u32> = slots.map(|slot| self.kv[&rows.page_row(slot)]).collect();
            assert_eq!(seen, self.paths[&row.id], "row {}", row.id);
            assert_eq!(seen.len(), plan.positions[0] as usize + 1);
        }
        let committed: Vec<u32> =
            (0..rows.committed()).map(|slot| self.kv[&rows.page_row(slot)]).collect();
        assert_eq!(committed, self.paths.get(&rows.tip()).cloned().unwrap_or_default());
    }

    fn add(&mut self, rows: &Sequence, id: u32, parent: u32, slot: u32) {
        let mut path = self.paths.get(&parent).cloned().unwrap_or_default();
        path.push(id);
        self.paths.insert(id, path);
        self.kv.insert(rows.page_row(slot), id);
    }
}

proptest! {
    #[test]
    fn every_row_sees_its_own_path(ops in proptest::collection::vec(op(), 1..60)) {
        let mut rows = sequence();
        let mut model = Model::default();
        for op in ops {
            let id = rows.last_id() + 1;
            let known: Vec<u32> =
                std::iter::once(rows.tip()).chain(rows.pending.iter().map(|row| row.id)).collect();
            match op {
                Op::Decided(count) => {
                    let parent = rows.tip();
                    if let Ok(first) = rows.append_committed(id, count, parent) {
                        for offset in 0..count {
                            let above = if offset == 0 { parent } else { id + offset - 1 };
                            model.add(&rows, id + offset, above, first + offset);
                        }
                    }
                }
                Op::Pend(picks) => {
                    let parents: Vec<u32> = (id..)
                        .zip(&picks)
                        .map(|(new, pick)| {
                            let pick = usize::from(*pick) % (known.len() + (new - id) as usize);
                            known
                                .get(pick)
                                .copied()
                                .unwrap_or_else(|| id + (pick - known.len()) as u32)
                        })
                        .collect();
                    if rows.append_pending(id, &parents).is_ok() {
                        for (new, parent) in (id..).zip(parents) {
                            let slot = rows.place(new).unwrap().1;
                            model.add(&rows, new, parent, slot);
                        }
                    }
                }
                Op::Commit(pick) => {
                    let mut moves = vec![];
                    rows.commit(known[usize::from(pick) % known.len()], &mut moves).unwrap();
                    for step in moves {
                        let moved = model.kv[&step.from];
                        model.kv.insert(step.to, moved);
                    }
                }
            }
            model.check(&rows);
        }
    }
}

#[test]
fn rows_behind_a_held_prefix_go_on_from_its_last_id() {
    let mut sequence = Sequence::on_cached(vec![7, 8, 9, 10, 11], 90, 2);
    assert_eq!((sequence.committed(), sequence.tip(), sequence.last_id()), (64, 64, 64));
    assert!(sequence.append_committed(64, 1, 63).is_err());
    assert!(sequence.append_committed(65, 1, 0).is_err());
    let place = sequence.append_committed(65, 3, 64).unwrap();
    assert_eq!(place, 64);
    sequence.append_pending(68, [67, 67]).unwrap();
    let mut moves = Vec::new();
    sequence.commit(69, &mut moves).unwrap();
    assert_eq!(moves, [RowMove { from: (9, 4), to: (9, 3) }]);
    assert_eq!(
        sequence.append_committed(70, 23, 69),
        Err(SequenceError::Full { rows: 91, reserved: 90 })
    );
}
