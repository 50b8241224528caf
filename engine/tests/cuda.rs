//! The CUDA backend on the emulator, or on the GPU that `HAT_TEST_GPU` names: a generated model,
//! whole and split, gives the same logits to the bit, and what the reference says within the
//! kernels' tolerance.
//!
//! Without a C++ compiler these tests fail, unless `HAT_NO_EMULATOR` was set when they were built:
//! then they count as ignored.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "cuda/bundles.rs"]
mod bundles;
#[path = "../compute/tests/support/gpu.rs"]
mod gpu;
#[path = "cuda/stages.rs"]
mod stages;
mod support;

use gpu::{backend, gpu};
use hat_compute::backend::Backend;
use hat_compute::backend::cpu::{CpuBackend, CpuConfig, Level};
use hat_compute::backend::cuda::CudaBackend;
use hat_compute::backend::reference::Reference;
use hat_compute::{DeviceModel, DraftModel, MiddleModel, WholeModel};
use hat_core::page::pages_for;
use hat_core::sequence::Sequence;
use hat_cuda::testkit::test_gpu::TestGpu;
use hat_engine::reference_run::through_codec;
use hat_loader::{Bundle, DType, DrafterArchitecture};
use hat_plan::{
    BackendError, BatchBuffers, Computes, DeviceForward as _, DraftForward as _, Likely,
    MiddleForward, MiddleStep,
};
use hat_transport::codec::Codec;
use support::Bundles;
use support::drafter::add_noise;

const POSITIONS: u32 = 60;
const PAGES: usize = 12;

fn open(bundles: &Bundles) -> [Bundle; 2] {
    ["device", "cloud"].map(|half| Bundle::open(&bundles.path.join(half)).unwrap())
}

fn tokens() -> Vec<u32> {
    (0..POSITIONS).map(|i| (i * i * 7 + i * 13 + 5) % 250).collect()
}

/// Logits after each token, one row at a time.
fn whole<B: Backend>(backend: B, [device, cloud]: &[Bundle; 2]) -> Vec<Vec<f32>> {
    let context = POSITIONS as usize;
    let mut model =
        WholeModel::load(backend, device, cloud, 1..3, through_codec(Codec::F16), context).unwrap();
    let step = |token: u32| {
        let mut logits = vec![0.0; 300];
        model.step(token, Some(&mut logits)).unwrap();
        logits
    };
    tokens().into_iter().map(step).collect()
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

/// Applies the link's f16 to rows.
fn over_the_wire(rows: &mut [f32]) {
    let mut bytes = vec![0; Codec::F16.row_bytes(64)];
    for row in rows.chunks_mut(64) {
        Codec::F16.encode(row, 64, &mut bytes).unwrap();
        Codec::F16.decode(&bytes, 64, row).unwrap();
    }
}

/// Both halves of one session.
struct Split {
    device: DeviceModel<CudaBackend<TestGpu>>,
    middle: MiddleModel<CudaBackend<TestGpu>>,
    sequence: Sequence,
    next_id: u32,
}

impl Split {
    fn new([device, cloud]: &[Bundle; 2]) -> Self {
        let device = DeviceModel::load(backend().unwrap(), device, 1, 40, PAGES).unwrap();
        let middle = MiddleModel::load(backend().unwrap(), cloud, 1..3, 40, PAGES).unwrap();
        // Room for rows that pend, and pages in no order.
        let pages = [7u32, 2, 9, 4, 11][..pages_for(POSITIONS as usize) + 2].to_vec();
        Self { device, middle, sequence: Sequence::new(pages, POSITIONS), next_id: 1 }
    }

    /// The rows of a plan through both halves; logits of each.
    fn step(&mut self, plan: BatchBuffers, tokens: &[u32]) -> Vec<Vec<f32>> {
        let mut hidden = vec![0.0; tokens.len() * 64];
        self.device.input(&plan.batch(), tokens, &mut hidden);
        over_the_wire(&mut hidden);
        let (entry_layers, moves) = (vec![1], Vec::new());
        let mut step = MiddleStep {
            plan,
            entry_layers,
            exit_layer: 3,
            moves,
            hidden,
            ..MiddleStep::default()
        };
        self.middle.forward(&mut step);
        over_the_wire(&mut step.hidden);
        let head = |row: &[f32]| {
            let mut logits = vec![0.0; 300];
            self.device.head(row, &mut logits);
            let argmax = self.device.argmax(row).unwrap();
            let expected = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(
                argmax,
                (logits.iter().position(|x| *x == expected).unwrap() as u32, expected)
            );
            logits
        };
        step.hidden.chunks(64).map(head).collect()
    }

    /// Decided rows at the tip.
    fn chunk(&mut self, tokens: &[u32]) -> Vec<Vec<f32>> {
        let (count, tip) = (tokens.len() as u32, self.sequence.tip());
        let first = self.sequence.append_committed(self.next_id, count, tip).unwrap();
        self.next_id += count;
        let mut plan = BatchBuffers::with_capacity(64, 1, PAGES);
        plan.clear();
        plan.push_committed(first, count);
        plan.end_sequence(self.sequence.pages());
        self.step(plan, tokens)
    }

    /// A tree below the tip; `parents` counts its rows from 1, 0 is the tip.
    fn tree(&mut self, tokens: &[u32], parents: &[u32]) -> Vec<Vec<f32>> {
        let (first, tip) = (self.next_id, self.sequence.tip());
        let id = |parent: &u32| if *parent == 0 { tip } else { first + parent - 1 };
        let parents: Vec<u32> = parents.iter().map(id).collect();
        self.sequence.append_pending(first, &parents).unwrap();
        self.next_id += parents.len() as u32;
        let mut plan = BatchBuffers::with_capacity(64, 1, PAGES);
        plan.clear();
        for id in first..self.next_id {
            assert!(self.sequence.push_row(id, &mut plan));
        }
        plan.end_sequence(self.sequence.pages());
        self.step(plan, tokens)
    }

    /// Keeps the path to row `row` (from 1) of the last `count` rows.
    fn commit(&mut self, count: u32, row: u32) {
        let mut moves = Vec::new();
        self.sequence.commit(self.next_id - count + row - 1, &mut moves).unwrap();
        assert!(!moves.is_empty(), "a commit that moves nothing shows nothing");
        self.device.compact(&moves);
        let (plan, entry_layers) = (BatchBuffers::default(), Vec::new());
        let mut step =
            MiddleStep { plan, entry_layers, exit_layer: 3, moves, ..MiddleStep::default() };
        self.middle.forward(&mut step);
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn split_and_whole_have_the_same_bits() {
    let Some(cuda) = backend() else { return };
    let bundles = Bundles::with_kernels();
    let halves = open(&bundles);
    let (expected, tokens) = (whole(cuda, &halves), tokens());
    let mut split = Split::new(&halves);
    let check = |at: usize, got: &[f32]| {
        assert!(bits(got) == bits(&expected[at]), "position {at}");
    };
    let mut at = 0;
    for end in [33, 40, 41] {
        for (position, row) in (at..).zip(split.chunk(&tokens[at..end])) {
            check(position, &row);
        }
        at = end;
    }
    // Wrong drafts stand before the right ones, so that a commit moves rows.
    while at + 3 <= tokens.len() {
        let right = &tokens[at..at + 3];
        let text = [right[0] + 1, right[0], right[1] + 1, right[1], right[2], 7];
        let rows = split.tree(&text, &[0, 0, 2, 2, 4, 1]);
        for (position, row) in (at..).zip([1, 3, 4]) {
            check(position, &rows[row]);
        }
        split.commit(6, 5);
        at += 3;
    }
    assert!(at > 55, "too few rounds: {at}");
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn the_whole_model_means_what_the_reference_means() {
    let Some(cuda) = backend() else { return };
    let bundles = Bundles::with_kernels();
    let halves = open(&bundles);
    let expected = whole(Reference, &halves);
    let cpu = CpuBackend::new(CpuConfig { threads: 1, level: Level::Portable }).unwrap();
    let distance = |got: Vec<Vec<f32>>| -> f64 {
        let both = got.iter().flatten().zip(expected.iter().flatten());
        both.map(|(got, expected)| f64::from(got - expected).powi(2)).sum::<f64>().sqrt()
    };
    // Both round activations to 8 bits; CUDA rounds queries and softmax weights to f16 too.
    let (cuda, cpu) = (distance(whole(cuda, &halves)), distance(whole(cpu, &halves)));
    let size = distance(vec![vec![0.0; 300]; expected.len()]);
    assert!(cpu > 0.0 && cuda < 1.3 * cpu, "CUDA is {cuda} from the reference, the CPU {cpu}");
    assert!(cuda < 0.05 * size, "CUDA is {cuda} from the reference of {size}");
}

/// Result of a bundle's drafter for decided rows and for a draft below the last of them, and the
/// tokens that it finds likely after given rows.
fn drafts<B: Backend>(backend: B, device: &Bundle) -> (Vec<f32>, Vec<Likely>) {
    let mut model = DraftModel::load(backend, device, 64, PAGES).unwrap().unwrap();
    let noise = |rows: usize, salt: f32| -> Vec<f32> {
        (0..rows * 64).map(|at| (at as f32 * 0.37 + salt).sin()).collect()
    };
    let mut sequence = Sequence::new(vec![5, 1, 8, 3], POSITIONS);
    let mut plan = BatchBuffers::with_capacity(64, 1, PAGES);
    let mut said = Vec::new();
    for (id, rows) in [(1, 37), (38, 3)] {
        let first = sequence.append_committed(id, rows, sequence.tip()).unwrap();
        plan.clear();
        plan.push_committed(first, rows);
        plan.end_sequence(sequence.pages());
        let (shallow, deep) = (noise(rows as usize, 0.1), noise(rows as usize, 0.7));
        said.resize(rows as usize * 64, 0.0);
        match id {
            1 => model.remember(&plan.batch(), &shallow, &deep),
            _ => model.decide(&plan.batch(), &shallow, &deep, &mut said),
        }
    }
    sequence.append_pending(41, [40, 40]).unwrap();
    plan.clear();
    assert!([41, 42].into_iter().all(|id| sequence.push_row(id, &mut plan)));
    plan.end_sequence(sequence.pages());
    let mut drafted = vec![0.0; 2 * 64];
    let before = [&said[2 * 64..], &said[2 * 64..]].concat();
    model.draft(&plan.batch(), &noise(2, 0.3), &before, &mut drafted);
    said.extend(drafted);
    let mut likely = Vec::new();
    model.likeliest(&noise(3, 0.9), 5, &mut likely);
    assert!(model.fault().is_none());
    (said, likely)
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn the_drafter_means_what_the_reference_means() {
    for kind in DrafterArchitecture::ALL {
        let Some(cuda) = backend() else { return };
        let bundles = Bundles::with_kernels();
        add_noise(&bundles, kind);
        let [device, _] = open(&bundles);
        let cpu = CpuBackend::new(CpuConfig { threads: 1, level: Level::Portable }).unwrap();
        let (expected, likely) = drafts(Reference, &device);
        let ((cuda, cuda_likely), (cpu, _)) = (drafts(cuda, &device), drafts(cpu, &device));
        let distance = |got: &[f32]| -> f64 {
            let both = got.iter().zip(&expected);
            both.map(|(got, expected)| f64::from(got - expected).powi(2)).sum::<f64>().sqrt()
        };
        let (cuda, cpu, size) =
            (distance(&cuda), distance(&cpu), distance(&vec![0.0; expected.len()]));
        let case = format!("{}: CUDA is {cuda}, the CPU {cpu} from {size}", kind.name());
        assert!(cpu > 0.0 && cuda < 1.5 * cpu && cuda < 0.1 * size, "{case}");
        assert_eq!(cuda_likely.len(), 15);
        for (got, expected) in cuda_likely.iter().zip(&likely) {
            let ratio = got.probability / expected.probability;
            assert!((0.9..1.1).contains(&ratio), "{}: {got:?}, {expected:?}", kind.name());
        }
        assert_eq!(cuda_likely[0].token, likely[0].token, "{}", kind.name());
    }
}

/// A level of a draft tree waits three times: for its rows of the device's layers, the drafter's
/// result, and its logits. Decided rows from which nothing is drafted wait for nothing.
#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn a_drafted_level_waits_three_times() {
    let Some(cuda) = gpu() else { return };
    let bundles = Bundles::with_kernels();
    add_noise(&bundles, DrafterArchitecture::Deep);
    let [device, _] = open(&bundles);
    let tally = cuda.tally();
    let mut layers = DeviceModel::load(CudaBackend::new(cuda), &device, 1, 40, PAGES).unwrap();
    let cuda = gpu().unwrap();
    let drafts = cuda.tally();
    let mut drafter = DraftModel::load(CudaBackend::new(cuda), &device, 64, PAGES);
    let drafter = drafter.as_mut().unwrap().as_mut().unwrap();
    let mut sequence = Sequence::new(vec![5, 1, 8], POSITIONS);
    let first = sequence.append_committed(1, 4, 0).unwrap();
    let mut plan = BatchBuffers::with_capacity(64, 1, PAGES);
    plan.clear();
    plan.push_committed(first, 4);
    plan.end_sequence(sequence.pages());
    let (mut rows, mut y, mut likely) = (vec![0.0; 4 * 64], vec![0.0; 4 * 64], Vec::new());
    let (before, drafts_before) = (tally.downloads(), drafts.downloads());
    layers.input(&plan.batch(), &[3, 1, 4, 1], &mut rows);
    assert_eq!(tally.downloads().0 - before.0, 1);
    drafter.remember(&plan.batch(), &rows, &rows);
    assert_eq!(drafts.downloads(), drafts_before);
    drafter.draft(&plan.batch(), &rows, &rows, &mut y);
    drafter.likeliest(&y, 8, &mut likely);
    let bytes = (y.len() + 4 * 300) as u64 * 4;
    assert_eq!(drafts.downloads(), (drafts_before.0 + 2, drafts_before.1 + bytes));
    assert_eq!(likely.len(), 4 * 8);
}

/// On a GPU without memory of its own, weights are read from the bundle's mapped file, unless its
/// driver refuses that. Copies of them give the same bits.
#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn weights_in_place_and_copied_have_the_same_bits() {
    let Some(in_place) = gpu() else { return };
    let bundles = Bundles::with_kernels();
    let [device, _] = open(&bundles);
    let mut copied = gpu().unwrap();
    copied.copy_weights();
    let [in_place, copied] = [in_place, copied].map(|gpu| {
        let mut model = DeviceModel::load(CudaBackend::new(gpu), &device, 1, 40, PAGES).unwrap();
        println!("{}", model.describe());
        let mut sequence = Sequence::new(vec![5, 1], POSITIONS);
        let first = sequence.append_committed(1, 40, 0).unwrap();
        let mut plan = BatchBuffers::with_capacity(64, 1, PAGES);
        plan.clear();
        plan.push_committed(first, 40);
        plan.end_sequence(sequence.pages());
        let (mut rows, mut logits) = (vec![0.0; 40 * 64], vec![0.0; 300]);
        model.input(&plan.batch(), &tokens()[..40], &mut rows);
        model.head(&rows[39 * 64..], &mut logits);
        rows.extend(logits);
        bits(&rows)
    });
    assert!(in_place == copied);
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn what_has_no_kernel_is_refused() {
    let Some(mut cuda) = backend() else { return };
    let bundles = Bundles::of_dtype(DType::F32);
    let [device, cloud] = open(&bundles);
    let error = DeviceModel::load(backend().unwrap(), &device, 1, 4, 4).err().unwrap();
    assert!(error.to_string().contains("cuda: no kernel for tensor"), "{error}");
    let shape = hat_plan::KvShape { layers: 1, pages: 1, kv_heads: 1, head_dim: 16 };
    let error = cuda.kv(shape).err().unwrap();
    assert!(matches!(error, BackendError::Config { field: "head_dim", .. }), "{error}");
    assert!(cloud.holds(&(1..2)));
}
