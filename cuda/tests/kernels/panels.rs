//! Random matrices in the panel layout, and their numbers.

use half::{bf16, f16};
use hat_cuda::table::Numbers;

use crate::stand::Random;

/// A matrix: its bytes in panels, its numbers in row order.
pub struct Matrix {
    pub numbers: Numbers,
    pub rows: usize,
    pub columns: usize,
    pub bytes: Vec<u8>,
    /// `[rows][columns]`
    pub values: Vec<f64>,
}

/// Blocks of one row: bytes in row order, and what they mean.
fn block(numbers: Numbers, random: &mut Random) -> (Vec<u8>, Vec<f64>) {
    let d = f16::from_f32(random.number() * 0.02);
    let m = f16::from_f32(random.number() * 0.1);
    let (scale, minimum) = (d.to_f64(), m.to_f64());
    let mut quants: Vec<u8> = (0..32).map(|_| random.next() as u8).collect();
    match numbers {
        Numbers::F32 => {
            let x = random.number();
            (x.to_le_bytes().to_vec(), vec![f64::from(x)])
        }
        Numbers::F16 => {
            let x = f16::from_f32(random.number());
            (x.to_le_bytes().to_vec(), vec![x.to_f64()])
        }
        Numbers::Bf16 => {
            let x = bf16::from_f32(random.number());
            (x.to_le_bytes().to_vec(), vec![x.to_f64()])
        }
        Numbers::Q8_0 => {
            let values = quants.iter().map(|q| scale * f64::from(q.cast_signed())).collect();
            ([d.to_le_bytes().to_vec(), quants].concat(), values)
        }
        Numbers::Q4_0 | Numbers::Q4_1 => {
            quants.truncate(16);
            let nibble = |i: usize| f64::from(quants[i % 16] >> (i / 16 * 4) & 15);
            let value = |i: usize| match numbers {
                Numbers::Q4_0 => scale * (nibble(i) - 8.0),
                _ => scale * nibble(i) + minimum,
            };
            let values = (0..32).map(value).collect();
            let mut head = d.to_le_bytes().to_vec();
            if numbers == Numbers::Q4_1 {
                head.extend(m.to_le_bytes());
            }
            ([head, quants].concat(), values)
        }
    }
}

impl Matrix {
    /// A random matrix, packed as `loader/src/layout.rs` says.
    pub fn random(numbers: Numbers, rows: usize, columns: usize, random: &mut Random) -> Self {
        let (weights, size) = (numbers.block(), numbers.block_bytes());
        let blocks = columns / weights;
        let mut bytes = vec![0; numbers.panel_bytes(rows, columns).unwrap()];
        let mut values = Vec::new();
        for row in 0..rows {
            let c = row % 16;
            for b in 0..blocks {
                let (from, meant) = block(numbers, random);
                values.extend(meant);
                let panel = &mut bytes[(row / 16 * blocks + b) * size * 16..][..size * 16];
                if weights == 1 {
                    panel[c * size..][..size].copy_from_slice(&from);
                    continue;
                }
                let head = if numbers == Numbers::Q4_1 { 4 } else { 2 };
                let words = (size - head) / 4;
                for (i, byte) in from[head..].iter().enumerate() {
                    panel[i / 4 * 64 + c / 8 * 32 + c % 8 * 4 + i % 4] = *byte;
                }
                for (i, byte) in from[..head].iter().enumerate() {
                    panel[words * 64 + i / 2 * 32 + c * 2 + i % 2] = *byte;
                }
            }
        }
        Self { numbers, rows, columns, bytes, values }
    }

    /// One row's numbers.
    pub fn row(&self, row: usize) -> &[f64] {
        &self.values[row * self.columns..][..self.columns]
    }
}
