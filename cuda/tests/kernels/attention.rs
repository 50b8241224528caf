//! attend_verify, attend_prefill, rope_append, compact.

use half::f16;
use hat_cuda::attend::Cut;
use hat_cuda::gpu::Memory as _;
use hat_cuda::kv::RowMove;
use hat_cuda::plan::{AttendShape, PAGE_SIZE};
use hat_cuda::rope_append::{RopeAppend, rope_append};

use crate::sequences::{Batch, Row, Sequence, Store, attended, chunk, expected, tree};
use crate::stand::{
    Random, assert_close, bits, gpu, memory, numbers, room, same_under_all_schedules,
};

/// Weights are rounded to f16 before they meet V; V is within -1..1.
const TOLERANCE: f64 = 4e-4;

fn heads(heads: usize, kv_heads: usize, head_dim: usize) -> AttendShape {
    AttendShape { heads, kv_heads, head_dim, window: None }
}

/// q that f16 holds exactly, so that both sides see the same.
fn queries(rows: usize, heads: &AttendShape, random: &mut Random) -> Vec<f32> {
    let count = rows * heads.heads * heads.head_dim;
    (0..count).map(|_| f16::from_f32(random.number() * 3.0).to_f32()).collect()
}

/// Pages in a random order.
fn shuffled_pages(pages: u32, random: &mut Random) -> Vec<u32> {
    let mut free: Vec<u32> = (0..pages).collect();
    for i in (1..free.len()).rev() {
        free.swap(i, random.next() as usize % (i + 1));
    }
    free
}

fn rows_of(sequences: &[Sequence]) -> usize {
    sequences.iter().map(|sequence| sequence.rows.len()).sum()
}

/// Chunks, trees, single rows; borders of pages and of splits; 1, 2 and 3 splits.
fn mixed(random: &mut Random, pages: u32) -> Vec<Sequence> {
    let mut free = shuffled_pages(pages, random);
    let rows = [
        tree(37, 8, random),
        tree(0, 5, random),
        tree(255, 3, random),
        tree(480, 64, random),
        chunk(0, 70),
        chunk(31, 33),
        chunk(511, 514),
        vec![Row::plain(0)],
        vec![Row::plain(63)],
        tree(96, 1, random),
    ];
    rows.map(|rows| Sequence::new(rows, &mut free)).into()
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn attention_means_what_it_says() {
    let Some(mut gpu) = gpu() else { return };
    let others = [heads(4, 2, 32), heads(3, 1, 96)];
    let usual = [heads(4, 4, 64), heads(9, 3, 64), heads(8, 1, 64), heads(4, 2, 128)];
    for heads in usual.into_iter().chain(others) {
        let mut random = Random(40);
        let sequences = mixed(&mut random, 90);
        let mut store = Store::new(2, 90, &heads);
        sequences.iter().for_each(|sequence| store.fill(1, sequence, &mut random));
        let q = queries(rows_of(&sequences), &heads, &mut random);
        let expected = expected(&store, 1, &heads, &sequences, &q);
        for cut in [Cut::Verify, Cut::Prefill] {
            let out = attended(&mut gpu, &store, 1, &heads, &sequences, &q, cut);
            assert_close(&format!("{cut:?} {heads:?}"), &out, &expected, TOLERANCE, 0.0);
        }
    }
    if let Some(counts) = gpu.counts() {
        assert_eq!(counts.bank_conflicts, 0, "{counts:?}");
        assert!(counts.mma > 10_000 && counts.async_copies > 10_000, "{counts:?}");
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn attention_is_the_same_under_all_schedules_and_cuts() {
    let Some(mut gpu) = gpu() else { return };
    for heads in [heads(4, 2, 64), heads(2, 1, 96)] {
        let mut random = Random(41);
        let mut free = shuffled_pages(48, &mut random);
        let rows = [tree(250, 12, &mut random), chunk(300, 340), vec![Row::plain(700)]];
        let sequences = rows.map(|rows| Sequence::new(rows, &mut free));
        let mut store = Store::new(1, 48, &heads);
        sequences.iter().for_each(|sequence| store.fill(0, sequence, &mut random));
        let q = queries(rows_of(&sequences), &heads, &mut random);
        let [verify, prefill, auto] = [Cut::Verify, Cut::Prefill, Cut::Auto].map(|cut| {
            same_under_all_schedules(&mut gpu, |gpu| {
                bits(&attended(gpu, &store, 0, &heads, &sequences, &q, cut))
            })
        });
        assert!(verify == prefill && verify == auto, "the cut changes the result");
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn a_row_sees_its_window_alone() {
    let Some(mut gpu) = gpu() else { return };
    for window in [1, 31, 32, 100, 300] {
        let heads = AttendShape { window: Some(window), ..heads(4, 2, 64) };
        let mut random = Random(42);
        let mut free = shuffled_pages(40, &mut random);
        let rows = [tree(290, 6, &mut random), chunk(0, 40), chunk(400, 410)];
        let sequences = rows.map(|rows| Sequence::new(rows, &mut free));
        let mut store = Store::new(1, 40, &heads);
        sequences.iter().for_each(|sequence| store.fill(0, sequence, &mut random));
        let q = queries(rows_of(&sequences), &heads, &mut random);
        let expected = expected(&store, 0, &heads, &sequences, &q);
        for cut in [Cut::Verify, Cut::Prefill] {
            let out = attended(&mut gpu, &store, 0, &heads, &sequences, &q, cut);
            assert_close(&format!("window {window} {cut:?}"), &out, &expected, TOLERANCE, 0.0);
        }
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn a_row_does_not_depend_on_its_batch_mates() {
    let Some(mut gpu) = gpu() else { return };
    let (mut random, heads) = (Random(43), heads(6, 2, 64));
    let sequences = mixed(&mut random, 90);
    let mut store = Store::new(1, 90, &heads);
    sequences.iter().for_each(|sequence| store.fill(0, sequence, &mut random));
    let q = queries(rows_of(&sequences), &heads, &mut random);
    let together = attended(&mut gpu, &store, 0, &heads, &sequences, &q, Cut::Auto);
    let width = heads.heads * heads.head_dim;
    let mut row_index = 0;
    for sequence in &sequences {
        for (i, row) in sequence.rows.iter().enumerate() {
            let range = row_index * width..(row_index + 1) * width;
            row_index += 1;
            if i % 5 != 0 {
                continue;
            }
            let alone = Sequence { rows: vec![row.clone()], pages: sequence.pages.clone() };
            let cut = if i % 2 == 0 { Cut::Verify } else { Cut::Prefill };
            let out = attended(&mut gpu, &store, 0, &heads, &[alone], &q[range.clone()], cut);
            assert_eq!(bits(&out), bits(&together[range]), "row {i}");
        }
    }
}

/// The same path, once as a chain and once as part of a tree whose other nodes stand between.
#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn a_row_does_not_depend_on_the_shape_of_its_tree() {
    let Some(mut gpu) = gpu() else { return };
    let (mut random, heads) = (Random(44), heads(4, 2, 128));
    let mut free = shuffled_pages(40, &mut random);
    let (context, depth) = (245u32, 20u32);
    let chain = Sequence::new(vec![Row::plain(context + depth - 1)], &mut free);
    // The path takes every third slot behind the context; what is between belongs to siblings.
    let keys: Vec<u32> = (0..context).chain((0..depth).map(|i| context + 3 * i + 1)).collect();
    let own = Row { slot: keys[keys.len() - 1], keys, prefix_len: context };
    let mut siblings = tree(context, 3 * depth, &mut random);
    siblings[30] = own.clone();
    let in_tree = Sequence::new(siblings, &mut free);
    let mut store = Store::new(1, 40, &heads);
    store.fill(0, &in_tree, &mut random);
    for (position, slot) in own.keys.iter().enumerate() {
        for head in 0..heads.kv_heads {
            let from = store.slot(0, &in_tree, *slot, head);
            let to = store.slot(0, &chain, position as u32, head);
            store.k.copy_within(from..from + heads.head_dim, to);
            store.v.copy_within(from..from + heads.head_dim, to);
        }
    }
    let q = queries(in_tree.rows.len(), &heads, &mut random);
    let width = heads.heads * heads.head_dim;
    let own_q = &q[30 * width..31 * width];
    let tree = [in_tree];
    let as_tree = attended(&mut gpu, &store, 0, &heads, &tree, &q, Cut::Auto);
    let as_chain = attended(&mut gpu, &store, 0, &heads, &[chain], own_q, Cut::Auto);
    assert_eq!(bits(&as_tree[30 * width..31 * width]), bits(&as_chain));
}

/// Rows of heads, rotated as docs/ARITHMETIC.md says. `angles` is `[rows][dim]`.
fn rotated(x: &[f32], angles: &[f32], dim: usize) -> Vec<f32> {
    let width = x.len() / (angles.len() / dim);
    let number = |at: usize| {
        let (row, i) = (at / width, at % dim);
        let (cos, sin) = angles[row * dim..][..dim].split_at(dim / 2);
        if i < dim / 2 {
            x[at].mul_add(cos[i], -(x[at + dim / 2] * sin[i]))
        } else {
            let i = i - dim / 2;
            x[at].mul_add(cos[i], x[at - dim / 2] * sin[i])
        }
    };
    (0..x.len()).map(number).collect()
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn rope_append_rotates_and_puts_rows_to_their_slots() {
    let Some(mut gpu) = gpu() else { return };
    for heads in [heads(9, 3, 64), heads(4, 4, 128), heads(2, 1, 96)] {
        let mut random = Random(45);
        let mut free = shuffled_pages(12, &mut random);
        let sequences =
            [tree(30, 5, &mut random), chunk(62, 66)].map(|rows| Sequence::new(rows, &mut free));
        let (rows, dim) = (rows_of(&sequences), heads.head_dim);
        let batch = Batch::new(&sequences);
        let store = Store::new(2, 12, &heads);
        let q = random.numbers(rows * heads.heads * dim, 2.0);
        let (k, v) = (
            random.numbers(rows * heads.kv_heads * dim, 2.0),
            random.numbers(rows * heads.kv_heads * dim, 2.0),
        );
        let angle = |i: usize| (i as f64 * 0.37).sin_cos();
        let angles: Vec<f32> = (0..rows)
            .flat_map(|row| {
                let cos = (0..dim / 2).map(move |i| angle(row * 64 + i).1 as f32);
                cos.chain((0..dim / 2).map(move |i| angle(row * 64 + i).0 as f32))
            })
            .collect();
        let (got_q, got_k, got_v) = same_under_all_schedules(&mut gpu, |gpu| {
            let (mut kv, plan) = (store.on_gpu(gpu), batch.on_gpu(gpu, &heads, 12));
            let mut q_memory = memory(gpu, &q);
            let (k, v) = (memory(gpu, &k), memory(gpu, &v));
            let angles = memory(gpu, &angles);
            let to = RopeAppend {
                angles: angles.slice(),
                q: q_memory.slice_mut(),
                k: k.slice(),
                v: v.slice(),
            };
            rope_append(gpu, &plan, &heads, 1, to, &mut kv).unwrap();
            let [k, v] = kv.memory().map(|memory| numbers::<u16>(gpu, memory, store.k.len()));
            (bits(&numbers::<f32>(gpu, &q_memory, q.len())), k, v)
        });
        let rotated = |x: &[f32]| rotated(x, &angles, dim);
        assert_eq!(got_q, bits(&rotated(&q)));
        let (mut expected_k, mut expected_v) = (store.k.clone(), store.v.clone());
        let (turned, mut row_index) = (rotated(&k), 0);
        for sequence in &sequences {
            for row in &sequence.rows {
                for head in 0..heads.kv_heads {
                    let from = (row_index * heads.kv_heads + head) * dim;
                    let to = store.slot(1, sequence, row.slot, head);
                    for i in 0..dim {
                        expected_k[to + i] = f16::from_f32(turned[from + i]);
                        expected_v[to + i] = f16::from_f32(v[from + i]);
                    }
                }
                row_index += 1;
            }
        }
        let half_bits = |numbers: &[f16]| numbers.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert!(got_k == half_bits(&expected_k) && got_v == half_bits(&expected_v), "{heads:?}");
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn compact_moves_rows_in_order() {
    let Some(mut gpu) = gpu() else { return };
    for heads in [heads(3, 3, 64), heads(2, 1, 128)] {
        let (mut random, pages) = (Random(46), 6);
        let mut store = Store::new(3, pages, &heads);
        for number in store.k.iter_mut().chain(&mut store.v) {
            *number = f16::from_f32(random.number());
        }
        // In the first group each move reads what the one before wrote, or is read before it is
        // written; the second has other pages.
        let moves = [
            ((0, 5), (0, 2)),
            ((0, 2), (1, 31)),
            ((1, 31), (0, 31)),
            ((2, 0), (0, 5)),
            ((3, 7), (4, 8)),
            ((4, 8), (3, 6)),
        ]
        .map(|(from, to)| RowMove { from, to });
        let (got_k, got_v) = same_under_all_schedules(&mut gpu, |gpu| {
            let mut kv = store.on_gpu(gpu);
            kv.compact(gpu, &moves, &[0, 4, 4, 6]).unwrap();
            let [k, v] = kv.memory().map(|memory| numbers::<u16>(gpu, memory, store.k.len()));
            (k, v)
        });
        for step in moves {
            for layer in 0..3 {
                for head in 0..heads.kv_heads {
                    let from = store.at(layer, step.from.0, step.from.1 as usize, head);
                    let to = store.at(layer, step.to.0, step.to.1 as usize, head);
                    store.k.copy_within(from..from + heads.head_dim, to);
                    store.v.copy_within(from..from + heads.head_dim, to);
                }
            }
        }
        let same = |got: &[u16], expected: &[f16]| {
            got.iter().zip(expected).all(|(got, expected)| *got == expected.to_bits())
        };
        assert!(same(&got_k, &store.k) && same(&got_v, &store.v), "{heads:?}");
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
#[should_panic(expected = "a slot of row 0 of 32")]
fn a_slot_beyond_its_pages_is_refused() {
    let Some(mut gpu) = gpu() else { panic!("a slot of row 0 of 32: no compiler") };
    let heads = heads(2, 1, 64);
    let row = Row { slot: 40, keys: (0..5).collect(), prefix_len: 5 };
    let sequence = Sequence { rows: vec![row], pages: vec![0] };
    assert!(PAGE_SIZE == 32 && room::<u8>(&mut gpu, 1).bytes() == 1);
    Batch::new(&[sequence]).on_gpu(&mut gpu, &heads, 1);
}
