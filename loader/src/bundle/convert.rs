//! Rows of the source in the type that the bundle stores, still in row order.

use half::{bf16, f16};

use super::BundleError;
use super::write::Weights;
use crate::layout;
use crate::split::TensorSpec;
use crate::tensor::DType;

/// Smallest magnitude that is rounded to infinity in f16.
const F16_END: f32 = 65_520.0;

/// The type in which a tensor is stored. Vectors are f32 always. For `q8` and `q4` a matrix that
/// is already as small stays as it is, bit for bit; embedding and LM head get eight bits in both,
/// since each of their errors is a token's.
pub(super) fn stored_dtype(spec: &TensorSpec, source: DType, weights: Weights) -> DType {
    if spec.shape.len() == 1 {
        return DType::F32;
    }
    let target = match weights {
        Weights::Keep => return source,
        Weights::F16 => return DType::F16,
        Weights::Q4 if !spec.is_vocabulary() => DType::Q4_1,
        Weights::Q8 | Weights::Q4 => DType::Q8_0,
    };
    // Bytes of 256 weights, a whole number of blocks of each type.
    if source.row_bytes(256) <= target.row_bytes(256) { source } else { target }
}

/// The type that a matrix keeps, and why, where its rows are no whole number of blocks of the
/// type asked for.
pub(super) fn misfit(spec: &TensorSpec, source: DType, asked: DType) -> Option<(DType, String)> {
    let k = *spec.shape.last()?;
    if asked == source || asked.row_bytes(k).is_some() {
        return None;
    }
    let kept = match source {
        DType::F32 => DType::F16,
        other => other,
    };
    let why = format!("rows of {k} are no whole number of blocks of {}", asked.block_weights());
    Some((kept, why))
}

/// Conversion of a tensor's rows of `k` weights to another type.
pub(super) struct Conversion<'a> {
    /// Name of the tensor.
    pub(super) name: &'a str,
    pub(super) from: DType,
    pub(super) to: DType,
    pub(super) k: usize,
}

impl Conversion<'_> {
    /// Some rows in the new type; they may be put into `buffer`. `first` is the number of the
    /// first one.
    ///
    /// # Errors
    /// Rows are no whole number of blocks, or a number is not finite in the new type.
    pub(super) fn rows<'b>(
        &self,
        rows: &'b [u8],
        first: usize,
        buffer: &'b mut Vec<u8>,
    ) -> Result<&'b [u8], BundleError> {
        if self.from == self.to {
            return Ok(rows);
        }
        let k = self.k;
        let (Some(from), Some(to)) = (self.from.row_bytes(k), self.to.row_bytes(k)) else {
            let block = self.to.block_weights();
            let reason = format!("rows of {k} weights are no whole number of blocks of {block}");
            return Err(self.wrong(reason));
        };
        let mut numbers = vec![0.0; k];
        buffer.resize(rows.len() / from * to, 0);
        for (index, (row, out)) in
            rows.chunks_exact(from).zip(buffer.chunks_exact_mut(to)).enumerate()
        {
            layout::dequantise_row(self.from, k, row, &mut numbers);
            self.write(first + index, &numbers, out)?;
        }
        Ok(buffer)
    }

    /// Writes the numbers of one row in the new type.
    fn write(&self, row: usize, numbers: &[f32], out: &mut [u8]) -> Result<(), BundleError> {
        // False for NaN as well.
        let end = match self.to {
            DType::F32 | DType::Bf16 => f32::INFINITY,
            // The scale is what has to fit: the largest weight over 127.
            DType::Q8_0 => F16_END * 127.0,
            _ => F16_END,
        };
        let fits = |x: &&f32| x.abs() < end;
        if let Some(x) = numbers.iter().find(|x| !fits(x)) {
            return Err(self.wrong(format!("row {row} holds {x}")));
        }
        match self.to {
            DType::F32 => write_numbers(numbers, out, f32::to_le_bytes),
            DType::F16 => write_numbers(numbers, out, |x| f16::from_f32(x).to_le_bytes()),
            DType::Bf16 => write_numbers(numbers, out, |x| bf16::from_f32(x).to_le_bytes()),
            DType::Q8_0 => layout::quantise_q8_0(numbers, out),
            DType::Q4_1 => layout::quantise_q4_1(numbers, out),
            DType::Q4_0 | DType::Q6K => return Err(self.wrong("no quantiser writes it".into())),
        }
        Ok(())
    }

    fn wrong(&self, reason: String) -> BundleError {
        BundleError::Convert { name: self.name.to_owned(), dtype: self.to.name(), reason }
    }
}

fn write_numbers<const N: usize>(numbers: &[f32], out: &mut [u8], bytes: impl Fn(f32) -> [u8; N]) {
    for (x, out) in numbers.iter().zip(out.chunks_exact_mut(N)) {
        out.copy_from_slice(&bytes(*x));
    }
}
