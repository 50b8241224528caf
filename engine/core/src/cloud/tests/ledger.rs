//! A model that keeps accounts: a row comes back as a digest of the rows that its plan let it see,
//! in their order. A wrong page, slot, move, commit or parent changes it with certainty.

use std::collections::BTreeMap;

use hat_plan::{MiddleStep, PAGE_SIZE};

/// Width of rows: the first number is the row's content, the others are 0.
pub(super) const HIDDEN: usize = 4;

/// Digest held in each row of the KV store.
#[derive(Default)]
pub(super) struct Ledger(BTreeMap<(u32, u32), u32>);

/// Output of the last row of `path`.
pub(super) fn digest(path: impl IntoIterator<Item = u32>) -> u32 {
    path.into_iter().fold(1, |digest, row| (digest * 31 + row + 1) % (1 << 20))
}

impl Ledger {
    pub(super) fn run(&mut self, step: &mut MiddleStep) {
        for of in &step.moves {
            let row = self.0.get(&of.from).copied().unwrap_or(0);
            self.0.insert(of.to, row);
        }
        let plan = step.plan.batch();
        let mut seen = Vec::new();
        for sequence in 0..plan.q_indptr.len() - 1 {
            let pages =
                plan.page_indptr[sequence] as usize..plan.page_indptr[sequence + 1] as usize;
            let pages = &plan.page_indices[pages];
            let place = |slot: u32| {
                (pages[slot as usize / PAGE_SIZE], slot % u32::try_from(PAGE_SIZE).unwrap())
            };
            let rows = plan.q_indptr[sequence] as usize..plan.q_indptr[sequence + 1] as usize;
            for row in rows.clone() {
                self.0.insert(place(plan.slots[row]), step.hidden[row * HIDDEN] as u32);
            }
            for row in rows {
                let tail = plan.tail_indptr[row] as usize..plan.tail_indptr[row + 1] as usize;
                let slots = (0..plan.prefix_len[row]).chain(plan.tail_slots[tail].iter().copied());
                let of = |slot| self.0.get(&place(slot)).copied().unwrap_or(0);
                seen.push((row, digest(slots.map(of))));
            }
        }
        for (row, digest) in seen {
            step.hidden[row * HIDDEN] = digest as f32;
        }
    }
}
