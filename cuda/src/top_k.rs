//! Launcher of `top_k.cu`.

use crate::abi;
use crate::gpu::{Gpu, GpuError, Launch, Memory, Slice, count};
use crate::kernel::Kernel;

/// Most numbers of a row that can be asked for.
pub const K_MAX: usize = 64;

const SLICE: usize = abi::HAT_TOP_SLICE as usize;

/// Room for the candidates and the result of some rows.
pub struct TopK<M> {
    slice_values: M,
    slice_columns: M,
    values: M,
    columns: M,
    not_finite: M,
}

/// One row's result is in `values[r * k..]` and `columns[r * k..]`, the largest first; equal ones
/// stand in the order of their columns.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TopRows {
    /// `[rows][k]`
    pub values: Vec<f32>,
    /// `[rows][k]`
    pub columns: Vec<u32>,
    /// True for each row whose numbers are all finite; the result of any other row means nothing.
    pub finite: Vec<bool>,
}

impl<M: Memory> TopK<M> {
    /// Room for `rows` rows of `columns`, of which the `k` largest are asked for.
    ///
    /// # Errors
    /// If there is not enough memory.
    ///
    /// # Panics
    /// If `k` is 0 or above [`K_MAX`].
    pub fn new(
        gpu: &mut impl Gpu<Memory = M>,
        rows: usize,
        columns: usize,
        k: usize,
    ) -> Result<Self, GpuError> {
        assert!((1..=K_MAX).contains(&k), "the {k} largest");
        let candidates = rows * columns.div_ceil(SLICE) * k;
        let mut room = |numbers: usize| gpu.alloc(4 * numbers, "the largest numbers");
        Ok(Self {
            slice_values: room(candidates)?,
            slice_columns: room(candidates)?,
            values: room(rows * k)?,
            columns: room(rows * k)?,
            not_finite: room(rows)?,
        })
    }

    /// The `k` largest numbers of each of `rows` rows of `x`, `[rows][columns]`. Waits for them.
    ///
    /// # Errors
    /// If the GPU fails.
    ///
    /// # Panics
    /// If they are more than there is room for, or fewer than `k` columns.
    pub fn run(
        &mut self,
        gpu: &mut impl Gpu<Memory = M>,
        rows: usize,
        k: usize,
        x: Slice<'_, f32>,
    ) -> Result<TopRows, GpuError> {
        if rows == 0 {
            return Ok(TopRows::default());
        }
        assert!(x.len().is_multiple_of(rows), "{} numbers, {rows} rows", x.len());
        let columns = x.len() / rows;
        let slices = columns.div_ceil(SLICE);
        assert!((1..=columns.min(K_MAX)).contains(&k), "the {k} largest of {columns}");
        let room = self.slice_values.slice::<f32>().len();
        assert!(rows * slices * k <= room, "candidates of {rows} rows in {room}");
        assert!(rows <= self.not_finite.slice::<u32>().len(), "{rows} rows");
        gpu.upload(&vec![0u32; rows], &mut self.not_finite, 0)?;
        let params = abi::hat_top_k {
            x: x.pointer(),
            slice_values: self.slice_values.slice_mut().pointer(),
            slice_columns: self.slice_columns.slice_mut().pointer(),
            values: self.values.slice_mut().pointer(),
            out_columns: self.columns.slice_mut().pointer(),
            not_finite: self.not_finite.slice_mut().pointer(),
            columns: count(columns),
            k: count(k),
            slices: count(slices),
            reserved: 0,
        };
        let grid = [count(slices), count(rows), 1];
        // SAFETY: a block reads its slice of its row and writes `k` candidates, for which there
        // is room as asserted.
        unsafe { gpu.launch(Launch { kernel: Kernel::TopKSlices, grid }, &params) }?;
        let grid = [count(rows), 1, 1];
        // SAFETY: a block reads its row's candidates, all written above, and writes `k` numbers;
        // `rows * k` is at most the candidates' count, and the room was made alike.
        unsafe { gpu.launch(Launch { kernel: Kernel::TopKMerge, grid }, &params) }?;
        let mut top =
            TopRows { values: vec![0.0; rows * k], columns: vec![0; rows * k], finite: vec![] };
        let mut not_finite = vec![0u32; rows];
        gpu.download(&self.values, 0, &mut top.values)?;
        gpu.download(&self.columns, 0, &mut top.columns)?;
        gpu.download(&self.not_finite, 0, &mut not_finite)?;
        top.finite = not_finite.iter().map(|flag| *flag == 0).collect();
        Ok(top)
    }
}
