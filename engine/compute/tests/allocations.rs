//! Once a step of some size has run, steps of that size or smaller allocate nothing.

mod counting;

use hat_compute::backend::cpu::{CpuBackend, CpuConfig, Level};
use hat_compute::backend::{AttendArgs, Backend, LinearArgs, RopeArgs, Write};
use hat_loader::{DType, Layout, Tensor, TensorBytes, layout};
use hat_plan::{AttendBatch, AttendShape, KvShape, RowMove};

use counting::allocations;

fn matrix(dtype: DType, n: usize, k: usize) -> Tensor {
    Tensor {
        name: format!("{} [{n}, {k}]", dtype.name()),
        dtype,
        layout: Layout::Panel16,
        shape: vec![n, k],
        bytes: TensorBytes::owned(vec![1; layout::packed_bytes(dtype, n, k).expect("small")]),
    }
}

const SHAPE: AttendShape = AttendShape { heads: 4, kv_heads: 2, head_dim: 64, window: None };
const ROWS: usize = 40;

/// Every operation on `rows` rows of one sequence that start at `first`.
struct Model {
    b: CpuBackend,
    weights: Vec<<CpuBackend as Backend>::Weight>,
    norm: <CpuBackend as Backend>::Weight,
    kv: <CpuBackend as Backend>::Kv,
    x: <CpuBackend as Backend>::Buffer,
    q: <CpuBackend as Backend>::Buffer,
    k: <CpuBackend as Backend>::Buffer,
    v: <CpuBackend as Backend>::Buffer,
    gated: <CpuBackend as Backend>::Buffer,
    up: <CpuBackend as Backend>::Buffer,
    angles: <CpuBackend as Backend>::Buffer,
    host: Vec<f32>,
}

impl Model {
    fn new(threads: usize, level: Level) -> Self {
        let mut b = CpuBackend::new(CpuConfig { threads, level }).expect("small");
        let dtypes = [DType::F32, DType::F16, DType::Q8_0, DType::Q4_0, DType::Q4_1, DType::Q6K];
        let ones: Vec<u8> = [1f32; 256].iter().flat_map(|x| x.to_le_bytes()).collect();
        let norm = Tensor {
            name: "norm".to_owned(),
            dtype: DType::F32,
            layout: Layout::Rows,
            shape: vec![256],
            bytes: TensorBytes::owned(ones),
        };
        Self {
            weights: dtypes.map(|dtype| b.weight(&matrix(dtype, 256, 256)).expect("small")).into(),
            norm: b.weight(&norm).expect("small"),
            kv: b.kv(KvShape { layers: 1, pages: 4, kv_heads: 2, head_dim: 64 }).expect("small"),
            x: b.alloc(ROWS, 256).expect("small"),
            q: b.alloc(ROWS, 256).expect("small"),
            k: b.alloc(ROWS, 128).expect("small"),
            v: b.alloc(ROWS, 128).expect("small"),
            gated: b.alloc(ROWS, 256).expect("small"),
            up: b.alloc(ROWS, 256).expect("small"),
            angles: b.alloc(ROWS, 64).expect("small"),
            host: vec![0.5; ROWS * 256],
            b,
        }
    }

    fn step(&mut self, plan: &AttendBatch<'_>, tokens: &[u32]) {
        let Self { b, weights, norm, kv, x, q, k, v, gated, up, angles, host } = self;
        let rows = plan.rows();
        b.rope_angles(plan.positions, &[0.5; 32], angles);
        for weight in &*weights {
            b.embed(&tokens[..rows], weight, x);
            b.rms_norm(rows, x, norm, 1e-5, q);
            b.linear(rows, q, Write::Add, LinearArgs::of(weight, x));
            let args = LinearArgs { weight, bias: Some(norm), out: q };
            b.linear(rows, x, Write::Store, args);
        }
        b.upload(&host[..rows * 256], q);
        let begun = b.begin(*plan, &SHAPE, kv);
        b.rope_append(begun, RopeArgs { layer: 0, angles, q, k, v, kv });
        b.attend(begun, AttendArgs { layer: 0, q, kv, out: x });
        let [first, second, third] =
            [(&weights[0], &mut *q), (&weights[2], gated), (&weights[4], up)]
                .map(|(weight, out)| LinearArgs::of(weight, out));
        b.linear_each(rows, x, [first, second, third]);
        b.swiglu(rows, x, &weights[4], &weights[5], gated);
        b.compact(&[RowMove { from: (0, 1), to: (0, 2) }], kv);
        b.download(x, 0, &mut host[..rows * 256]);
    }
}

/// One test in this binary: others would allocate meanwhile.
#[test]
fn steps_allocate_nothing_after_the_first() {
    let tokens: Vec<u32> = (0..ROWS as u32).collect();
    let (pages, page_indptr, q_indptr) = ([3, 1], [0, 2], [0, ROWS as u32]);
    let (tail_indptr, prefix) = (vec![0; ROWS + 1], (1..=ROWS as u32).collect::<Vec<_>>());
    let plan = AttendBatch {
        positions: &tokens,
        slots: &tokens,
        prefix_len: &prefix,
        tail_indptr: &tail_indptr,
        tail_slots: &[],
        q_indptr: &q_indptr,
        page_indptr: &page_indptr,
        page_indices: &pages,
    };
    let one = AttendBatch {
        positions: &tokens[39..],
        slots: &tokens[39..],
        prefix_len: &prefix[39..],
        tail_indptr: &[0, 0],
        q_indptr: &[0, 1],
        ..plan
    };
    for (threads, level) in [(1, Level::Portable), (1, Level::Auto), (3, Level::Auto)] {
        let mut model = Model::new(threads, level);
        model.step(&plan, &tokens);
        let before = allocations();
        assert!(before > 0, "nothing is counted");
        for _ in 0..10 {
            model.step(&plan, &tokens);
            model.step(&one, &tokens);
        }
        let count = allocations() - before;
        assert_eq!(count, 0, "allocations at {threads} threads, {level:?}");
    }
}
