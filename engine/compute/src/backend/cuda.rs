//! CUDA, or whatever runs hat-cuda's kernels: one method of [`Backend`] for each launcher.
//!
//! Weights go up once, in the layout that they have. A step's plan goes up when it is begun, once
//! for all layers. The trait's methods return no errors: the first one is kept for
//! [`Computes::fault`], and until that asks nothing is computed and what is downloaded is NaN.

mod product;
mod shared;

use hat_cuda::attend::{self, Cut, Parts};
use hat_cuda::embed;
use hat_cuda::gpu::{Gpu, GpuError, Memory as _};
use hat_cuda::kv;
use hat_cuda::plan::{HEAD_DIMS, PlanOnGpu};
use hat_cuda::product::COLUMNS;
use hat_cuda::rms_norm::{self, RmsNorm};
use hat_cuda::rope_angles::rope_angles;
use hat_cuda::rope_append::{self, RopeAppend};
use hat_cuda::silu_mul::silu_mul;
use hat_cuda::table::{Table, WeightDType};
use hat_cuda::top_k::{K_MAX, TopK};
use hat_loader::{DType, Tensor};
use hat_plan::{ARITHMETIC_CUDA, BackendFault};

use self::product::Prepared;
use self::shared::SharedBuffers;
use super::{
    AttendArgs, AttendBatch, AttendShape, Backend, BackendError, Computes, KvShape, LinearArgs,
    RopeArgs, RowMove, SharedRows, TokenId, TopLogit, Write, unsupported, weight_shape,
};

const NAME: &str = "cuda";
/// Positions of a split of attention.
const SPLIT: usize = 256;

/// A GPU as a backend.
pub struct CudaBackend<G: Gpu> {
    gpu: G,
    /// A fault that no caller has been told of yet, or one that lasts.
    fault: Option<BackendFault>,
    /// Activations as products take them.
    prepared: Prepared<G::Memory>,
    /// Token ids on their way.
    tokens: Option<G::Memory>,
    /// Frequencies and positions on their way, and there.
    turning: (Vec<u32>, Option<G::Memory>),
    /// The second half of a gate, or logits.
    other: Option<G::Memory>,
    /// The number of the plan that is on the GPU.
    begun: u64,
    plan: Option<PlanOnGpu<G::Memory>>,
    parts: Option<(Parts<G::Memory>, usize)>,
    top: Option<(TopK<G::Memory>, [usize; 3])>,
    /// Rows for the next stage, and of the one before.
    shared_buffers: SharedBuffers<G::Memory>,
}

/// A plan that is on the GPU until the next one is begun.
#[derive(Clone, Copy)]
pub struct Begun {
    number: u64,
    shape: AttendShape,
}

/// Activations.
pub struct Buffer<M> {
    memory: M,
    columns: usize,
}

/// A weight; `k` is 0 for a vector.
pub struct Weight<M> {
    memory: M,
    numbers: WeightDType,
    n: usize,
    k: usize,
}

impl<M: hat_cuda::gpu::Memory> Weight<M> {
    fn table(&self) -> Table<'_> {
        Table::new(self.memory.slice(), self.numbers, self.n, self.k)
    }
}

/// The kernels' name of a type of weights; `None` if they have none for it.
#[must_use]
pub fn numbers(dtype: DType) -> Option<WeightDType> {
    match dtype {
        DType::Q8_0 => Some(WeightDType::Q8_0),
        DType::Q4_0 => Some(WeightDType::Q4_0),
        DType::Q4_1 => Some(WeightDType::Q4_1),
        DType::Q6K => Some(WeightDType::Q6K),
        DType::F16 => Some(WeightDType::F16),
        DType::Bf16 => Some(WeightDType::Bf16),
        _ => None,
    }
}

fn start_error(error: GpuError) -> BackendError {
    match error {
        GpuError::OutOfMemory { bytes, purpose, .. } => {
            BackendError::OutOfMemory { backend: NAME, bytes, purpose }
        }
        other => {
            BackendError::Config { backend: NAME, field: "processor", reason: other.to_string() }
        }
    }
}

/// Memory of at least this many bytes in a place; what was there goes if it is too small.
fn room<'a, G: Gpu>(
    gpu: &mut G,
    place: &'a mut Option<G::Memory>,
    bytes: usize,
    purpose: &'static str,
) -> Result<&'a mut G::Memory, GpuError> {
    if place.as_ref().is_none_or(|memory| memory.bytes() < bytes) {
        *place = None;
        *place = Some(gpu.alloc(bytes.next_power_of_two(), purpose)?);
    }
    Ok(place.as_mut().expect("put there above"))
}

impl<G: Gpu> CudaBackend<G> {
    /// A backend on a GPU.
    pub fn new(gpu: G) -> Self {
        Self {
            gpu,
            fault: None,
            prepared: Prepared::default(),
            tokens: None,
            turning: (Vec::new(), None),
            other: None,
            begun: 0,
            plan: None,
            parts: None,
            top: None,
            shared_buffers: SharedBuffers::default(),
        }
    }

    /// Runs work unless work before has failed.
    fn queue(&mut self, work: impl FnOnce(&mut Self) -> Result<(), GpuError>) {
        if self.fault.is_some() {
            return;
        }
        if let Err(error) = work(self) {
            let lasts = matches!(error, GpuError::Lost { .. });
            self.begun += 1; // what is on the GPU is no plan any more
            self.fault = Some(BackendFault { backend: NAME, reason: error.to_string(), lasts });
        }
    }

    /// Puts a plan on the GPU, and makes room for the parts of its attention.
    fn write_plan(
        &mut self,
        plan: &AttendBatch<'_>,
        shape: &AttendShape,
        pages: usize,
    ) -> Result<(), GpuError> {
        let (rows, tails, named) = (plan.rows(), plan.tail_slots.len(), plan.page_indices.len());
        let gpu = &mut self.gpu;
        let on_gpu = match &mut self.plan {
            Some(on_gpu) if on_gpu.has_room(rows, tails, named) => on_gpu,
            place => {
                *place = None;
                let [rows, tails, named] = [rows, tails, named].map(usize::next_power_of_two);
                place.insert(PlanOnGpu::new(gpu, rows, tails, named)?)
            }
        };
        on_gpu.write(gpu, plan, shape, pages)?;
        // Few rows are split by keys; many keep the GPU busy without.
        let keys = plan.positions.iter().max().map_or(0, |last| *last as usize + 1);
        let wanted = rows.min(64) * keys.div_ceil(SPLIT);
        if self.parts.as_ref().is_none_or(|(_, room)| *room < wanted) {
            self.parts = None;
            let room = wanted.next_power_of_two();
            self.parts = Some((Parts::new(gpu, shape, room, 1)?, room));
        }
        Ok(())
    }
}

impl<G: Gpu> Computes for CudaBackend<G> {
    fn describe(&self) -> String {
        format!("cuda: {}", self.gpu.describe())
    }

    fn arithmetic_id(&self) -> u32 {
        ARITHMETIC_CUDA
    }

    fn fault(&mut self) -> Option<BackendFault> {
        if self.fault.is_some() {
            self.give_back_after_fault();
        }
        match &self.fault {
            Some(fault) if fault.lasts => Some(fault.clone()),
            _ => self.fault.take(),
        }
    }
}

impl<G: Gpu + Send + 'static> Backend for CudaBackend<G> {
    type Buffer = Buffer<G::Memory>;
    type Weight = Weight<G::Memory>;
    type Kv = kv::Kv<G::Memory>;
    type Plan<'p> = Begun;

    fn alloc(&mut self, capacity: usize, columns: usize) -> Result<Self::Buffer, BackendError> {
        let count = capacity * columns;
        let mut memory = self.gpu.alloc(4 * count, "activations").map_err(start_error)?;
        self.gpu.upload(&vec![0f32; count], &mut memory, 0).map_err(start_error)?;
        Ok(Buffer { memory, columns })
    }

    fn weight(&mut self, tensor: &Tensor) -> Result<Self::Weight, BackendError> {
        let [n, k, needed] = weight_shape(NAME, tensor)?;
        let kind = if k == 0 { Some(WeightDType::F32) } else { numbers(tensor.dtype) };
        // Float matrices are copied by 16 bytes of a row of activations.
        let fits = |kind: &WeightDType| k == 0 || kind.block() > 1 || k.is_multiple_of(COLUMNS);
        let Some(numbers) = kind.filter(fits) else {
            let reason = format!("no kernel takes {} {:?}", tensor.dtype.name(), tensor.shape);
            return Err(unsupported(NAME, tensor, reason));
        };
        let bytes = &tensor.bytes[..needed];
        let place = tensor.bytes.map().map(|(map, range)| (map, range.start));
        let in_place = place.and_then(|(map, at)| self.gpu.in_place(map, at..at + needed));
        let memory = match in_place {
            Some(memory) => memory,
            None => {
                let mut memory = self.gpu.alloc(needed, "weights").map_err(start_error)?;
                self.gpu.upload(bytes, &mut memory, 0).map_err(start_error)?;
                memory
            }
        };
        Ok(Weight { memory, numbers, n, k })
    }

    fn kv(&mut self, shape: KvShape) -> Result<Self::Kv, BackendError> {
        let KvShape { head_dim, .. } = shape;
        if !HEAD_DIMS.contains(&head_dim) {
            let reason = format!("is {head_dim}; there are kernels for {HEAD_DIMS:?}");
            return Err(BackendError::Config { backend: NAME, field: "head_dim", reason });
        }
        kv::Kv::new(&mut self.gpu, shape).map_err(start_error)
    }

    fn upload(&mut self, from: &[f32], to: &mut Self::Buffer) {
        self.queue(|this| this.gpu.upload(from, &mut to.memory, 0));
    }

    fn download(&mut self, from: &Self::Buffer, first_row: usize, to: &mut [f32]) {
        let at = first_row * from.columns;
        self.queue(|this| this.gpu.download(&from.memory, at, to));
        match self.fault {
            Some(_) => to.fill(f32::NAN),
            None => self.shared_buffers.give_back(),
        }
    }

    fn embed(&mut self, tokens: &[TokenId], table: &Self::Weight, x: &mut Self::Buffer) {
        self.queue(|this| {
            let bytes = size_of_val(tokens);
            let staging = room(&mut this.gpu, &mut this.tokens, bytes, "token ids")?;
            embed::embed(&mut this.gpu, tokens, table.table(), staging, x.memory.slice_mut())
        });
    }

    fn rms_norm(
        &mut self,
        rows: usize,
        x: &Self::Buffer,
        weight: &Self::Weight,
        eps: f32,
        out: &mut Self::Buffer,
    ) {
        self.queue(|this| {
            let weight = weight.memory.slice();
            let to = RmsNorm { weight, eps, out: out.memory.slice_mut() };
            rms_norm::rms_norm(&mut this.gpu, rows, x.memory.slice(), to)
        });
    }

    fn linear(&mut self, rows: usize, x: &Self::Buffer, write: Write, args: LinearArgs<'_, Self>) {
        let LinearArgs { weight, bias, out } = args;
        assert_eq!((weight.n, weight.k), (out.columns, x.columns), "outputs and inputs");
        self.queue(|this| {
            this.product(rows, x.memory.slice(), weight, bias, write, &mut out.memory)
        });
    }

    fn linear_each<const N: usize>(
        &mut self,
        rows: usize,
        x: &Self::Buffer,
        each: [LinearArgs<'_, Self>; N],
    ) {
        self.queue(|this| {
            let mut before: Option<&Self::Weight> = None;
            for LinearArgs { weight, bias, out } in each {
                assert_eq!((weight.n, weight.k), (out.columns, x.columns), "outputs and inputs");
                if !before.is_some_and(|before| weight.takes_what(before)) {
                    this.prepare(rows, x.memory.slice(), weight)?;
                }
                this.multiply(rows, weight, bias, Write::Store, &mut out.memory)?;
                before = Some(weight);
            }
            Ok(())
        });
    }

    fn linear_top(
        &mut self,
        rows: usize,
        x: &Self::Buffer,
        weight: &Self::Weight,
        top: &mut [TopLogit],
    ) -> bool {
        let (k, columns) = (top.len() / rows.max(1), weight.n);
        assert!(k <= K_MAX.min(columns), "the {k} largest of {columns}");
        let mut finite = false;
        self.queue(|this| {
            let mut logits = this.other.take();
            let bytes = 4 * rows * columns;
            room(&mut this.gpu, &mut logits, bytes, "logits")?;
            let memory = logits.as_mut().expect("put there above");
            this.product(rows, x.memory.slice(), weight, None, Write::Store, memory)?;
            let fits = |known: &[usize; 3]| known[0] >= rows && known[1..] == [columns, k];
            if !this.top.as_ref().is_some_and(|(_, known)| fits(known)) {
                let made = TopK::new(&mut this.gpu, rows, columns, k)?;
                this.top = Some((made, [rows, columns, k]));
            }
            let (found, _) = this.top.as_mut().expect("put there above");
            let from = memory.slice().range(0..rows * columns);
            let found = found.run(&mut this.gpu, rows, k, from)?;
            for (to, (value, column)) in
                top.iter_mut().zip(found.values.into_iter().zip(found.columns))
            {
                *to = TopLogit { value, column };
            }
            finite = found.finite.into_iter().all(|finite| finite);
            this.other = logits;
            Ok(())
        });
        finite
    }

    fn swiglu(
        &mut self,
        rows: usize,
        x: &Self::Buffer,
        gate: &Self::Weight,
        up: &Self::Weight,
        out: &mut Self::Buffer,
    ) {
        self.queue(|this| {
            let mut other = this.other.take();
            let count = rows * up.n;
            room(&mut this.gpu, &mut other, 4 * count, "the second factor of a gate")?;
            let memory = other.as_mut().expect("put there above");
            let x = x.memory.slice();
            this.product(rows, x, gate, None, Write::Store, &mut out.memory)?;
            if !up.takes_what(gate) {
                this.prepare(rows, x, up)?;
            }
            this.multiply(rows, up, None, Write::Store, memory)?;
            let mut gate = out.memory.slice_mut();
            silu_mul(&mut this.gpu, gate.range(0..count), memory.slice().range(0..count))?;
            this.other = other;
            Ok(())
        });
    }

    fn rope_angles(&mut self, positions: &[u32], inv_freq: &[f32], angles: &mut Self::Buffer) {
        self.queue(|this| {
            let (numbers, place) = &mut this.turning;
            numbers.clear();
            numbers.extend(inv_freq.iter().map(|inv_freq| inv_freq.to_bits()));
            numbers.extend(positions);
            let memory = room(&mut this.gpu, place, size_of_val(&numbers[..]), "positions")?;
            this.gpu.upload(numbers, memory, 0)?;
            let positions = memory.slice().range(inv_freq.len()..numbers.len());
            let inv_freq = memory.slice().range(0..inv_freq.len());
            rope_angles(&mut this.gpu, positions, inv_freq, angles.memory.slice_mut())
        });
    }

    fn begin(&mut self, plan: AttendBatch<'_>, shape: &AttendShape, kv: &Self::Kv) -> Begun {
        self.begun += 1;
        self.queue(|this| this.write_plan(&plan, shape, kv.shape().pages));
        Begun { number: self.begun, shape: *shape }
    }

    fn rope_append(&mut self, plan: Begun, args: RopeArgs<'_, Self>) {
        let RopeArgs { layer, angles, q, k, v, kv } = args;
        self.queue(|this| {
            assert_eq!(plan.number, this.begun, "the plan that was begun last");
            let on_gpu = this.plan.as_ref().expect("begun without a fault");
            let to = RopeAppend {
                angles: angles.memory.slice(),
                q: q.memory.slice_mut(),
                k: k.memory.slice(),
                v: v.memory.slice(),
            };
            rope_append::rope_append(&mut this.gpu, on_gpu, &plan.shape, layer, to, kv)
        });
    }

    fn attend(&mut self, plan: Begun, args: AttendArgs<'_, Self>) {
        let AttendArgs { layer, q, kv, out } = args;
        self.queue(|this| {
            assert_eq!(plan.number, this.begun, "the plan that was begun last");
            let on_gpu = this.plan.as_ref().expect("begun without a fault");
            let (parts, _) = this.parts.as_mut().expect("begun without a fault");
            let (q, out) = (q.memory.slice(), out.memory.slice_mut());
            let shape = &plan.shape;
            attend::attend(&mut this.gpu, on_gpu, shape, layer, Cut::Auto, q, kv, parts, out)
        });
    }

    fn compact(&mut self, moves: &[RowMove], kv: &mut Self::Kv) {
        // Moves of several sequences may touch each other's old rows: one group, in order.
        let indptr = [0, u32::try_from(moves.len()).expect("few moves")];
        self.queue(|this| kv.compact(&mut this.gpu, moves, &indptr));
    }

    fn link(
        &mut self,
        next: &Self,
        capacity: usize,
        columns: usize,
        count: usize,
    ) -> Result<Option<String>, BackendError> {
        self.make_lanes(next, 4 * capacity * columns, count).map(Some)
    }

    fn lend(&mut self, rows: usize, from: &Self::Buffer) -> Option<SharedRows> {
        self.lend_rows(rows, from)
    }

    fn borrow(&mut self, rows: usize, shared: SharedRows, to: &mut Self::Buffer) {
        self.borrow_rows(rows, shared, to);
    }
}
