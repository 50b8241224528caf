//! K and V of all layers in pages of f16, and the launcher of `compact.cu`.

pub use hat_plan::{KvShape, RowMove};

use crate::abi;
use crate::gpu::{Gpu, GpuError, Launch, Memory, count};
use crate::kernel::Kernel;
use crate::plan::PAGE_SIZE;

/// K and V: f16 `[layers][pages][kv_heads][PAGE_SIZE][head_dim]` each.
pub struct Kv<M> {
    shape: KvShape,
    layer_numbers: usize,
    k: M,
    v: M,
    moves: Option<M>,
}

impl<M: Memory> Kv<M> {
    /// A store with undefined content; `head_dim` is a multiple of 8.
    ///
    /// # Errors
    /// If there is not enough memory.
    pub fn new(gpu: &mut impl Gpu<Memory = M>, shape: KvShape) -> Result<Self, GpuError> {
        assert!(shape.head_dim.is_multiple_of(8), "head_dim {}", shape.head_dim);
        let layer_numbers = shape.layer_numbers().unwrap_or(usize::MAX);
        let bytes = layer_numbers.saturating_mul(shape.layers).saturating_mul(2);
        let (k, v) = (gpu.alloc(bytes, "K")?, gpu.alloc(bytes, "V")?);
        Ok(Self { shape, layer_numbers, k, v, moves: None })
    }

    /// Its size.
    #[must_use]
    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// K and V, to copy.
    #[must_use]
    pub fn memory(&self) -> [&M; 2] {
        [&self.k, &self.v]
    }

    /// K and V, to fill.
    pub fn memory_mut(&mut self) -> [&mut M; 2] {
        [&mut self.k, &mut self.v]
    }

    fn layer(&self, layer: usize) -> std::ops::Range<usize> {
        assert!(layer < self.shape.layers, "layer {layer} of {}", self.shape.layers);
        layer * self.layer_numbers..(layer + 1) * self.layer_numbers
    }

    /// K and V of one layer, to read.
    pub(crate) fn pages(&self, layer: usize) -> [*const u16; 2] {
        let range = self.layer(layer);
        [&self.k, &self.v].map(|memory| memory.slice().range(range.clone()).vectors())
    }

    /// K and V of one layer, to write.
    pub(crate) fn pages_mut(&mut self, layer: usize) -> [*mut u16; 2] {
        let range = self.layer(layer);
        [&mut self.k, &mut self.v].map(|memory| memory.slice_mut().range(range.clone()).vectors())
    }

    /// Moves rows for all layers, group by group: `indptr` is `[groups + 1]`. Moves of a group are
    /// done in order; no two groups name the same row.
    ///
    /// # Errors
    /// If the GPU fails.
    ///
    /// # Panics
    /// If a row is not in the store, or `indptr` does not fit the moves.
    pub fn compact(
        &mut self,
        gpu: &mut impl Gpu<Memory = M>,
        moves: &[RowMove],
        indptr: &[u32],
    ) -> Result<(), GpuError> {
        let whole = indptr.first() == Some(&0)
            && indptr.last().is_some_and(|last| *last as usize == moves.len())
            && indptr.is_sorted();
        assert!(whole, "groups {indptr:?} of {} moves", moves.len());
        if moves.is_empty() {
            return Ok(());
        }
        let place = |(page, row): (u32, u32)| {
            let (pages, known) = (self.shape.pages, (row as usize) < PAGE_SIZE);
            assert!(known && (page as usize) < pages, "row {row} of page {page} of {pages}");
            page * PAGE_SIZE as u32 + row
        };
        let mut numbers = indptr.to_vec();
        numbers.extend(moves.iter().flat_map(|step| [place(step.from), place(step.to)]));
        let fits = self.moves.as_ref().is_some_and(|memory| memory.bytes() >= 4 * numbers.len());
        if !fits {
            self.moves = Some(gpu.alloc(8 * numbers.len(), "moves of K and V")?);
        }
        let memory = self.moves.as_mut().expect("made above if it was not there");
        gpu.upload(&numbers, memory, 0)?;
        let numbers = self.moves.as_ref().expect("as above").slice::<u32>().pointer();
        let params = abi::hat_compact {
            moves: numbers.wrapping_add(indptr.len()),
            indptr: numbers,
            k_pages: self.k.slice_mut().pointer(),
            v_pages: self.v.slice_mut().pointer(),
            layer_numbers: self.layer_numbers as u64,
            kv_heads: count(self.shape.kv_heads),
            head_dim: count(self.shape.head_dim),
        };
        let grid = [count(self.shape.kv_heads), count(self.shape.layers), count(indptr.len() - 1)];
        // SAFETY: every place was checked against the store, of which `grid` names each layer and
        // head; the arrays of moves were written above.
        unsafe { gpu.launch(Launch { kernel: Kernel::Compact, grid }, &params) }
    }
}
