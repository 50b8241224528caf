//! Lower bounds of each kernel: the bytes that it has to move, and the operations of its products.
//! Benches print how near a GPU comes to them.

use crate::plan::AttendShape;
use crate::quantise_rows::BLOCK;
use crate::table::WeightDType;

/// Bytes and operations of one or several launches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Bytes read and written in the GPU's memory, each once.
    pub bytes: u64,
    /// Multiplications and additions.
    pub flops: u64,
}

/// Bytes of a row of activations as a product takes it: int8 blocks, or numbers of 16 bits.
fn prepared_bytes(numbers: WeightDType, columns: usize) -> usize {
    match numbers.block() {
        1 => columns * size_of::<u16>(),
        _ => columns + columns / BLOCK * 2 * size_of::<f32>(),
    }
}

/// [`crate::quantise_rows::quantise_q8`], or for float matrices
/// [`crate::quantise_rows::round_rows`]: rows in f32 are read, and written as the products of such
/// weights take them.
#[must_use]
pub fn prepare(numbers: WeightDType, rows: usize, columns: usize) -> Work {
    let bytes = rows * (columns * size_of::<f32>() + prepared_bytes(numbers, columns));
    Work { bytes: bytes as u64, flops: 0 }
}

/// [`crate::product::linear`] and [`crate::product::linear_float`]: the weights once, however
/// many tiles of rows there are (those with the same weights run side by side, so the L2 can have
/// them), the rows as the product takes them, the outputs.
#[must_use]
pub fn gemv(numbers: WeightDType, rows: usize, columns: usize, outputs: usize) -> Work {
    let weights = numbers.panel_bytes(outputs, columns).unwrap_or(0);
    let row = prepared_bytes(numbers, columns);
    let bytes = weights + rows * row + rows * outputs * size_of::<f32>();
    Work { bytes: bytes as u64, flops: 2 * (rows * columns * outputs) as u64 }
}

/// [`crate::attend::attend`] of one sequence: K and V of the longest row once, in f16, and q and
/// the result in f32. `keys` has the keys that each row sees.
#[must_use]
pub fn attend(heads: &AttendShape, keys: &[usize]) -> Work {
    let longest = keys.iter().max().copied().unwrap_or(0);
    let kv = longest * heads.kv_heads * heads.head_dim * 2 * size_of::<u16>();
    let rows = keys.len() * heads.heads * heads.head_dim * 2 * size_of::<f32>();
    let seen: usize = keys.iter().sum();
    // Two products, each with a multiplication and an addition for each number of a key.
    let flops = 4 * seen * heads.heads * heads.head_dim;
    Work { bytes: (kv + rows) as u64, flops: flops as u64 }
}

/// [`crate::silu_mul::silu_mul`]: both factors are read, one is written.
#[must_use]
pub fn silu_mul(count: usize) -> Work {
    Work { bytes: (3 * count * size_of::<f32>()) as u64, flops: 0 }
}

impl std::iter::Sum for Work {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, work| Self {
            bytes: sum.bytes + work.bytes,
            flops: sum.flops + work.flops,
        })
    }
}
