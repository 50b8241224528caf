//! A tiny model through the launchers, as a backend runs it: whole, and split in two with chunks,
//! batch mates, draft trees, the f16 wire and compaction between. The logits have to be the same
//! to the bit.

use half::f16;
use hat_cuda::attend::{Cut, Parts, attend};
use hat_cuda::embed::embed;
use hat_cuda::gpu::Memory as _;
use hat_cuda::kv::{Kv, KvShape, RowMove};
use hat_cuda::plan::{AttendShape, PAGE_SIZE};
use hat_cuda::product::{Product, Write, linear};
use hat_cuda::quantise_rows::{Q8, Q8Mut, quantise_q8};
use hat_cuda::rms_norm::{RmsNorm, rms_norm};
use hat_cuda::rope_append::{RopeAppend, rope_append};
use hat_cuda::silu_mul::silu_mul;
use hat_cuda::table::{Table, WeightDType};
use hat_cuda::testkit::test_gpu::{TestGpu, TestMemory};
use hat_cuda::top_k::TopK;

use crate::panels::Matrix;
use crate::sequences::{Batch, Row, Sequence, chunk};
use crate::stand::{Random, bits, gpu, memory, numbers, room};

const HIDDEN: usize = 128;
const INNER: usize = 192;
const VOCABULARY: usize = 80;
const LAYERS: usize = 3;
const PAGES: usize = 24;
const HEADS: AttendShape = AttendShape { heads: 6, kv_heads: 2, head_dim: 64, window: None };
const EPS: f32 = 1e-5;

/// A matrix on the GPU.
struct Weight {
    bytes: TestMemory,
    numbers: WeightDType,
    rows: usize,
    columns: usize,
}

struct Layer {
    norms: [TestMemory; 2],
    q: Weight,
    k: Weight,
    v: Weight,
    o: Weight,
    gate: Weight,
    up: Weight,
    down: Weight,
}

struct Model {
    embedding: Weight,
    norm: TestMemory,
    layers: Vec<Layer>,
}

/// Some layers of the model, with their own K and V.
struct Half {
    layers: std::ops::Range<usize>,
    kv: Kv<TestMemory>,
}

impl Weight {
    fn random(gpu: &mut TestGpu, kind: WeightDType, rows: usize, columns: usize) -> Self {
        let mut random = Random((rows * 1000 + columns) as u64);
        let matrix = Matrix::random(kind, rows, columns, &mut random);
        Self { bytes: memory(gpu, &matrix.bytes), numbers: kind, rows, columns }
    }

    fn table(&self) -> Table<'_> {
        Table::new(self.bytes.slice(), self.numbers, self.rows, self.columns)
    }

    /// `out = x w^T`, or added to it.
    fn linear(
        &self,
        gpu: &mut TestGpu,
        rows: usize,
        x: &TestMemory,
        write: Write,
        out: &mut TestMemory,
    ) {
        let count = rows * self.columns;
        let (mut q, mut d) = (room::<i8>(gpu, count), room::<f32>(gpu, count / 32));
        let mut s = room::<f32>(gpu, count / 32);
        let to = Q8Mut { q: q.slice_mut(), d: d.slice_mut(), s: s.slice_mut() };
        quantise_q8(gpu, x.slice().range(0..count), to).unwrap();
        let x = Q8 { q: q.slice(), d: d.slice(), s: s.slice() };
        let out = out.slice_mut();
        linear(gpu, rows, Product { x, weight: self.table(), bias: None, write, out }).unwrap();
    }
}

impl Layer {
    fn random(gpu: &mut TestGpu, random: &mut Random) -> Self {
        let mut matrix = |rows, columns| Weight::random(gpu, WeightDType::Q4_1, rows, columns);
        let (q, kv) = (HEADS.heads * HEADS.head_dim, HEADS.kv_heads * HEADS.head_dim);
        let (q, k, v, o) =
            (matrix(q, HIDDEN), matrix(kv, HIDDEN), matrix(kv, HIDDEN), matrix(HIDDEN, q));
        let (gate, up, down) =
            (matrix(INNER, HIDDEN), matrix(INNER, HIDDEN), matrix(HIDDEN, INNER));
        let norms = [(); 2].map(|()| memory(gpu, &random.numbers(HIDDEN, 1.0)));
        Self { norms, q, k, v, o, gate, up, down }
    }
}

fn norm(gpu: &mut TestGpu, rows: usize, x: &TestMemory, weight: &TestMemory) -> TestMemory {
    let mut out = room::<f32>(gpu, rows * HIDDEN);
    let to = RmsNorm { weight: weight.slice(), eps: EPS, out: out.slice_mut() };
    rms_norm(gpu, rows, x.slice(), to).unwrap();
    out
}

fn angles(positions: &[u32]) -> Vec<f32> {
    let angle = |position: u32, i: usize| {
        f64::from(position) * 10_000f64.powf(-(2.0 * i as f64) / HEADS.head_dim as f64)
    };
    let half = 0..HEADS.head_dim / 2;
    let row = |position: &u32| {
        let cos: Vec<f32> = half.clone().map(|i| angle(*position, i).cos() as f32).collect();
        let sin: Vec<f32> = half.clone().map(|i| angle(*position, i).sin() as f32).collect();
        [cos, sin].concat()
    };
    positions.iter().flat_map(row).collect()
}

impl Model {
    fn random(gpu: &mut TestGpu) -> Self {
        let mut random = Random(50);
        let layers = (0..LAYERS).map(|_| Layer::random(gpu, &mut random)).collect();
        let embedding = Weight::random(gpu, WeightDType::Q8_0, VOCABULARY, HIDDEN);
        Self { embedding, norm: memory(gpu, &random.numbers(HIDDEN, 1.0)), layers }
    }

    fn half(gpu: &mut TestGpu, layers: std::ops::Range<usize>) -> Half {
        let (count, kv_heads, head_dim) = (layers.len(), HEADS.kv_heads, HEADS.head_dim);
        let shape = KvShape { layers: count, pages: PAGES, kv_heads, head_dim };
        Half { layers, kv: Kv::new(gpu, shape).unwrap() }
    }

    fn embed(&self, gpu: &mut TestGpu, tokens: &[u32]) -> TestMemory {
        let mut staging = room::<u32>(gpu, tokens.len());
        let mut x = room::<f32>(gpu, tokens.len() * HIDDEN);
        embed(gpu, tokens, self.embedding.table(), &mut staging, x.slice_mut()).unwrap();
        x
    }

    /// The rows of a batch through the layers of a half, in place.
    fn run(&self, gpu: &mut TestGpu, half: &mut Half, sequences: &[Sequence], x: &mut TestMemory) {
        let batch = Batch::new(sequences);
        let rows = batch.positions.len();
        let plan = batch.on_gpu(gpu, &HEADS, PAGES);
        let longest = batch.positions.iter().max().unwrap() + 1;
        let mut parts = Parts::new(gpu, &HEADS, rows, (longest as usize).div_ceil(256)).unwrap();
        let angles = memory(gpu, &angles(&batch.positions));
        let widths = [HEADS.heads, HEADS.kv_heads, HEADS.kv_heads].map(|h| h * HEADS.head_dim);
        for (kv_layer, layer) in self.layers[half.layers.clone()].iter().enumerate() {
            let normed = norm(gpu, rows, x, &layer.norms[0]);
            let [mut q, mut k, mut v] = widths.map(|width| room::<f32>(gpu, rows * width));
            for (weight, out) in [(&layer.q, &mut q), (&layer.k, &mut k), (&layer.v, &mut v)] {
                weight.linear(gpu, rows, &normed, Write::Store, out);
            }
            let to =
                RopeAppend { angles: angles.slice(), q: q.slice_mut(), k: k.slice(), v: v.slice() };
            rope_append(gpu, &plan, &HEADS, kv_layer, to, &mut half.kv).unwrap();
            let mut attended = room::<f32>(gpu, rows * widths[0]);
            let (from, to) = (q.slice(), attended.slice_mut());
            let (kv, cut) = (&half.kv, Cut::Auto);
            attend(gpu, &plan, &HEADS, kv_layer, cut, from, kv, &mut parts, to).unwrap();
            layer.o.linear(gpu, rows, &attended, Write::Add, x);
            let normed = norm(gpu, rows, x, &layer.norms[1]);
            let [mut gate, mut up] = [(); 2].map(|()| room::<f32>(gpu, rows * INNER));
            layer.gate.linear(gpu, rows, &normed, Write::Store, &mut gate);
            layer.up.linear(gpu, rows, &normed, Write::Store, &mut up);
            silu_mul(gpu, gate.slice_mut(), up.slice()).unwrap();
            layer.down.linear(gpu, rows, &gate, Write::Add, x);
        }
    }

    /// Logits of each row, and the largest one's token.
    fn head(&self, gpu: &mut TestGpu, rows: usize, x: &TestMemory) -> (Vec<Vec<u32>>, Vec<u32>) {
        let normed = norm(gpu, rows, x, &self.norm);
        let mut logits = room::<f32>(gpu, rows * VOCABULARY);
        self.embedding.linear(gpu, rows, &normed, Write::Store, &mut logits);
        let mut top = TopK::new(gpu, rows, VOCABULARY, 1).unwrap();
        let found = top.run(gpu, rows, 1, logits.slice()).unwrap();
        assert!(found.finite.iter().all(|finite| *finite));
        let all: Vec<f32> = numbers(gpu, &logits, rows * VOCABULARY);
        (all.chunks(VOCABULARY).map(bits).collect(), found.columns)
    }
}

/// Rows over the wire, as f16.
fn cross(gpu: &mut TestGpu, rows: usize, x: &TestMemory) -> TestMemory {
    let rows: Vec<f32> = numbers(gpu, x, rows * HIDDEN);
    memory(gpu, &rows.iter().map(|x| f16::from_f32(*x).to_f32()).collect::<Vec<f32>>())
}

/// The path from the root on which each node is what was chosen before it, and the choice after it.
fn verify(parents: &[u32], tokens: &[u32], choices: &[u32]) -> (Vec<u32>, u32) {
    let mut path = vec![0u32];
    loop {
        let at = path[path.len() - 1];
        let next = choices[at as usize];
        let is_child = |node: &usize| parents[*node] == at && tokens[*node] == next;
        match (1..parents.len()).find(is_child) {
            Some(child) => path.push(child as u32),
            None => return (path, next),
        }
    }
}

/// The model in two halves.
struct Split {
    input: Half,
    middle: Half,
}

impl Split {
    fn new(gpu: &mut TestGpu) -> Self {
        Self { input: Model::half(gpu, 0..1), middle: Model::half(gpu, 1..LAYERS) }
    }

    /// One step of both halves for one batch of tokens.
    fn step(
        &mut self,
        gpu: &mut TestGpu,
        model: &Model,
        tokens: &[u32],
        sequences: &[Sequence],
    ) -> (Vec<Vec<u32>>, Vec<u32>) {
        let mut x = model.embed(gpu, tokens);
        model.run(gpu, &mut self.input, sequences, &mut x);
        let mut x = cross(gpu, tokens.len(), &x);
        model.run(gpu, &mut self.middle, sequences, &mut x);
        let x = cross(gpu, tokens.len(), &x);
        model.head(gpu, tokens.len(), &x)
    }
}

/// Logits at each position of a text, one row at a time over pages in order; `more` tokens are
/// the model's own.
fn whole(
    gpu: &mut TestGpu,
    model: &Model,
    prompt: &[u32],
    more: usize,
) -> (Vec<u32>, Vec<Vec<u32>>) {
    let mut split = Split::new(gpu);
    let (mut tokens, mut logits) = (prompt.to_vec(), Vec::new());
    for position in 0..prompt.len() + more {
        let pages = (0..PAGES as u32).collect();
        let sequence = Sequence { rows: vec![Row::plain(position as u32)], pages };
        let (row, next) = split.step(gpu, model, &tokens[position..=position], &[sequence]);
        logits.extend(row);
        if position + 1 >= tokens.len() {
            tokens.extend(next);
        }
    }
    (tokens, logits)
}

/// The rows of a tree below `context` positions.
fn tree_of(context: u32, parents: &[u32]) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for (node, parent) in parents.iter().enumerate() {
        let mut keys: Vec<u32> = match node {
            0 => (0..context).collect(),
            _ => rows[*parent as usize].keys.clone(),
        };
        keys.push(context + node as u32);
        rows.push(Row { slot: context + node as u32, keys, prefix_len: context });
    }
    rows
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn chunks_trees_and_batch_mates_leave_the_logits_as_they_are() {
    let Some(mut gpu) = gpu() else { return };
    let gpu = &mut gpu;
    let model = Model::random(gpu);
    let (prompt_len, more) = (70u32, 12);
    let prompt: Vec<u32> =
        Random(51).numbers(70, 1.0).iter().map(|x| ((x + 1.0) * 39.9) as u32).collect();
    let (tokens, expected) = whole(gpu, &model, &prompt, more);
    let distinct: std::collections::BTreeSet<_> = expected.iter().collect();
    assert_eq!(distinct.len(), expected.len(), "logits that show nothing");

    let mut split = Split::new(gpu);
    let pages = vec![17u32, 3, 9, 4, 21];
    // A batch mate of another length; its rows come first in odd steps.
    let other_pages = vec![2u32, 11, 5];
    let mut other = 0u32;
    let mut begin = 0u32;
    for (step, end) in [33u32, 63, 70].into_iter().enumerate() {
        let own = Sequence { rows: chunk(begin, end), pages: pages.clone() };
        let mate = Sequence { rows: chunk(other, other + 9), pages: other_pages.clone() };
        let own_tokens = &tokens[begin as usize..end as usize];
        let mate_tokens = &prompt[7..16];
        let own_first = step % 2 == 0;
        let (batch, text) = if own_first {
            ([own, mate], [own_tokens, mate_tokens].concat())
        } else {
            ([mate, own], [mate_tokens, own_tokens].concat())
        };
        let (logits, _) = split.step(gpu, &model, &text, &batch);
        let from = if own_first { 0 } else { 9 };
        for (position, row) in (begin..end).zip(&logits[from..]) {
            assert!(*row == expected[position as usize], "position {position} of a chunk");
        }
        (begin, other) = (end, other + 9);
    }

    // Rounds: the decided token, two wrong drafts, two right ones, a wrong one below the first.
    let mut at = prompt_len;
    while (at as usize) + 3 < tokens.len() {
        let right = |i: u32| tokens[(at + i) as usize];
        let wrong = |i: u32| (right(i) + 1) % VOCABULARY as u32;
        let text = [right(0), wrong(1), right(1), wrong(2), right(2), wrong(2)];
        let parents = [0u32, 0, 0, 2, 2, 1];
        let batch = [Sequence { rows: tree_of(at, &parents), pages: pages.clone() }];
        let (logits, choices) = split.step(gpu, &model, &text, &batch);
        let (path, next) = verify(&parents, &text, &choices);
        assert_eq!(path, [0, 2, 4], "the right drafts are taken");
        assert_eq!(next, tokens[at as usize + 3]);
        let place = |slot: u32| (pages[slot as usize / PAGE_SIZE], slot % PAGE_SIZE as u32);
        let moves: Vec<RowMove> = (0u32..)
            .zip(&path)
            .filter(|(i, node)| i != *node)
            .map(|(i, node)| RowMove { from: place(at + node), to: place(at + i) })
            .collect();
        for kv in [&mut split.input.kv, &mut split.middle.kv] {
            kv.compact(gpu, &moves, &[0, moves.len() as u32]).unwrap();
        }
        for (i, node) in path.iter().enumerate() {
            let same = logits[*node as usize] == expected[at as usize + i];
            assert!(same, "position {} of a tree", at as usize + i);
        }
        at += path.len() as u32;
    }
    assert!(at > prompt_len + 6, "too few rounds: {at}");
}
