//! Random matrices in the panel layout, and their numbers.

use half::{bf16, f16};
use hat_cuda::table::WeightDType;

use crate::stand::Random;

/// 32 weights of a row of a block type, as whole numbers and their scales:
/// `d sub[i / 16] w[i] + m`.
#[derive(Clone)]
pub struct Unit {
    pub w: [i32; 32],
    /// 1 but for q6_k.
    pub sub: [i32; 2],
    pub d: f32,
    /// 0 but for q4_1.
    pub m: f32,
}

/// A matrix: its bytes in panels, its numbers in row order.
pub struct Matrix {
    pub numbers: WeightDType,
    pub rows: usize,
    pub columns: usize,
    pub bytes: Vec<u8>,
    /// `[rows][columns]`
    pub values: Vec<f64>,
    /// `[rows][columns / 32]`; none of types without blocks.
    pub units: Vec<Unit>,
}

impl Unit {
    fn values(&self) -> impl Iterator<Item = f64> {
        let (d, m) = (f64::from(self.d), f64::from(self.m));
        (0..32).map(move |i| d * f64::from(self.sub[i / 16] * self.w[i]) + m)
    }
}

/// A block of one row: bytes in row order, what they mean, and the same in whole numbers.
fn block(
    numbers: WeightDType,
    d: f16,
    m: f16,
    quants: &mut Vec<u8>,
) -> (Vec<u8>, Vec<f64>, Option<Unit>) {
    let unit = |w: [i32; 32]| {
        let m = if numbers == WeightDType::Q4_1 { m.to_f32() } else { 0.0 };
        let unit = Unit { w, sub: [1; 2], d: d.to_f32(), m };
        (unit.values().collect(), Some(unit))
    };
    // Of numbers without blocks, `d` is one.
    let single = |bytes: Vec<u8>, value: f64| (bytes, vec![value], None);
    match numbers {
        WeightDType::F32 => single(d.to_f32().to_le_bytes().to_vec(), d.to_f64()),
        WeightDType::F16 => single(d.to_le_bytes().to_vec(), d.to_f64()),
        WeightDType::Bf16 => {
            let x = bf16::from_f32(d.to_f32());
            single(x.to_le_bytes().to_vec(), x.to_f64())
        }
        WeightDType::Q8_0 => {
            let (values, unit) = unit(std::array::from_fn(|i| quants[i].cast_signed().into()));
            ([d.to_le_bytes().to_vec(), quants.clone()].concat(), values, unit)
        }
        WeightDType::Q4_0 | WeightDType::Q4_1 => {
            quants.truncate(16);
            let less = if numbers == WeightDType::Q4_0 { 8 } else { 0 };
            let nibble = |i: usize| i32::from(quants[i % 16] >> (i / 16 * 4) & 15) - less;
            let (values, unit) = unit(std::array::from_fn(nibble));
            let mut head = d.to_le_bytes().to_vec();
            if numbers == WeightDType::Q4_1 {
                head.extend(m.to_le_bytes());
            }
            ([head, quants.clone()].concat(), values, unit)
        }
        WeightDType::Q6K => unreachable!("has blocks of its own"),
    }
}

/// A unit of q6_k of column `c` of a panel-block: scales of its own in `subs`.
fn q6_k_unit(
    panel: &mut [u8],
    c: usize,
    index: usize,
    d: f16,
    quants: &[u8],
    subs: [u8; 2],
) -> Unit {
    panel[c * 2..][..2].copy_from_slice(&d.to_le_bytes());
    let unit = &mut panel[32 + index * 416..][..416];
    for (i, quant) in quants.iter().enumerate() {
        let (half, l) = (i / 16, i % 16);
        unit[l / 4 * 64 + c * 4 + l % 4] |= (quant & 15) << (half * 4);
        unit[256 + half * 64 + c * 4 + l % 4] |= (quant >> 4 & 3) << (l / 4 * 2);
    }
    (unit[384 + c], unit[400 + c]) = (subs[0], subs[1]);
    let w = std::array::from_fn(|i| i32::from(quants[i] & 63) - 32);
    Unit { w, sub: subs.map(|sub| sub.cast_signed().into()), d: d.to_f32(), m: 0.0 }
}

impl Matrix {
    /// A random matrix, packed as `loader/src/layout.rs` says.
    pub fn random(numbers: WeightDType, rows: usize, columns: usize, random: &mut Random) -> Self {
        let scale = if numbers == WeightDType::Q6K { 5e-4 } else { 0.02 };
        let scale = if numbers.block() == 1 { 1.0 } else { scale };
        Self::of(numbers, rows, columns, |_| {
            let d = f16::from_f32(random.number() * scale);
            let m = f16::from_f32(random.number() * 0.1);
            let bytes = std::array::from_fn(|_| random.next() as u8);
            (d, m, bytes)
        })
    }

    /// A matrix of what `block` gives for a row: scale, minimum, and 32 quantised numbers with
    /// two scales behind them.
    pub fn of(
        numbers: WeightDType,
        rows: usize,
        columns: usize,
        mut block_of: impl FnMut(usize) -> (f16, f16, [u8; 34]),
    ) -> Self {
        let (weights, size) = (numbers.block(), numbers.block_bytes());
        let blocks = columns / weights;
        let mut bytes = vec![0; numbers.panel_bytes(rows, columns).unwrap()];
        let (mut values, mut units) = (Vec::new(), Vec::new());
        for row in 0..rows {
            let c = row % 16;
            for b in 0..blocks {
                let panel = &mut bytes[(row / 16 * blocks + b) * size * 16..][..size * 16];
                let (d, m, mut quants) = block_of(row);
                if numbers == WeightDType::Q6K {
                    for index in 0..8 {
                        let subs = [quants[32], quants[33]];
                        let unit = q6_k_unit(panel, c, index, d, &quants[..32], subs);
                        values.extend(unit.values());
                        units.push(unit);
                        if index < 7 {
                            quants = block_of(row).2;
                        }
                    }
                    continue;
                }
                let (from, meant, unit) = block(numbers, d, m, &mut quants[..32].to_vec());
                values.extend(meant);
                units.extend(unit);
                if weights == 1 {
                    panel[c * size..][..size].copy_from_slice(&from);
                    continue;
                }
                let head = if numbers == WeightDType::Q4_1 { 4 } else { 2 };
                let words = (size - head) / 4;
                for (i, byte) in from[head..].iter().enumerate() {
                    panel[i / 4 * 64 + c / 8 * 32 + c % 8 * 4 + i % 4] = *byte;
                }
                for (i, byte) in from[..head].iter().enumerate() {
                    panel[words * 64 + i / 2 * 32 + c * 2 + i % 2] = *byte;
                }
            }
        }
        Self { numbers, rows, columns, bytes, values, units }
    }

    /// One row's numbers.
    pub fn row(&self, row: usize) -> &[f64] {
        &self.values[row * self.columns..][..self.columns]
    }
}
