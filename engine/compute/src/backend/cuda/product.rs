//! Products with weights: activations in the form that a matrix's kernels take, then the kernels.

use hat_cuda::gpu::{Gpu, GpuError, Memory as _, Slice};
use hat_cuda::product::{Product, linear, linear_float};
use hat_cuda::quantise_rows::{BLOCK, Q8, Q8Mut, quantise_q8, round_rows};
use hat_cuda::table::WeightDType;

use super::{CudaBackend, Weight, Write, room};

/// Activations as products take them.
pub(super) struct Prepared<M> {
    /// Activations as int8 blocks: q, d, s.
    blocks: Option<[M; 3]>,
    /// Activations in a float matrix's type.
    rounded: Option<M>,
}

impl<M> Default for Prepared<M> {
    fn default() -> Self {
        Self { blocks: None, rounded: None }
    }
}

impl<M> Weight<M> {
    /// The type to which activations are rounded; `None` if they become int8 blocks.
    fn rounds_to(&self) -> Option<WeightDType> {
        (self.numbers.block() == 1).then_some(self.numbers)
    }

    /// True if operands prepared for another weight serve this one.
    pub(super) fn takes_what(&self, other: &Self) -> bool {
        (self.rounds_to(), self.k) == (other.rounds_to(), other.k)
    }
}

impl<G: Gpu> CudaBackend<G> {
    /// `out = x w^T`.
    pub(super) fn product(
        &mut self,
        rows: usize,
        x: Slice<'_, f32>,
        weight: &Weight<G::Memory>,
        bias: Option<&Weight<G::Memory>>,
        write: Write,
        out: &mut G::Memory,
    ) -> Result<(), GpuError> {
        self.prepare(rows, x, weight)?;
        self.multiply(rows, weight, bias, write, out)
    }

    /// Puts x into the form that the products of a weight take.
    pub(super) fn prepare(
        &mut self,
        rows: usize,
        x: Slice<'_, f32>,
        weight: &Weight<G::Memory>,
    ) -> Result<(), GpuError> {
        let (gpu, count) = (&mut self.gpu, rows * weight.k);
        let Prepared { blocks, rounded } = &mut self.prepared;
        if let Some(numbers) = weight.rounds_to() {
            let rounded = room(gpu, rounded, 2 * count, "rounded activations")?;
            return round_rows(gpu, numbers, x.range(0..count), rounded.slice_mut());
        }
        let [q, d, s] = match blocks {
            Some(blocks) if blocks[0].bytes() >= count => blocks,
            blocks => {
                *blocks = None;
                let room = count.next_power_of_two();
                let scales = room / BLOCK * size_of::<f32>();
                let mut alloc = |bytes| gpu.alloc(bytes, "int8 activations");
                blocks.insert([alloc(room)?, alloc(scales)?, alloc(scales)?])
            }
        };
        let to = Q8Mut { q: q.slice_mut(), d: d.slice_mut(), s: s.slice_mut() };
        quantise_q8(gpu, x.range(0..count), to)
    }

    /// `out = x w^T` of the x that was prepared last, for this weight or one that takes the same.
    pub(super) fn multiply(
        &mut self,
        rows: usize,
        weight: &Weight<G::Memory>,
        bias: Option<&Weight<G::Memory>>,
        write: Write,
        out: &mut G::Memory,
    ) -> Result<(), GpuError> {
        let bias = bias.map(|bias| bias.memory.slice());
        let (table, out) = (weight.table(), out.slice_mut());
        let Prepared { blocks, rounded } = &self.prepared;
        if weight.rounds_to().is_some() {
            let x = rounded.as_ref().expect("prepared before").slice();
            return linear_float(
                &mut self.gpu,
                rows,
                Product { x, weight: table, bias, write, out },
            );
        }
        let [q, d, s] = blocks.as_ref().expect("prepared before");
        let x = Q8 { q: q.slice(), d: d.slice(), s: s.slice() };
        linear(&mut self.gpu, rows, Product { x, weight: table, bias, write, out })
    }
}
