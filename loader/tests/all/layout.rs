//! The panel layout moves bits and loses none, and blocks mean what GGUF says.

use half::f16;
use hat_loader::DType;
use hat_loader::layout::{
    dequantise_row, pack, packed_bytes, quantise_q4_1, quantise_q8_0, unpack, unpack_row,
};
use proptest::prelude::*;

const DTYPES: [DType; 7] =
    [DType::F32, DType::F16, DType::Bf16, DType::Q8_0, DType::Q4_0, DType::Q4_1, DType::Q6K];

fn packed(dtype: DType, n: usize, k: usize, rows: &[u8]) -> Vec<u8> {
    let mut out = vec![0xAA; packed_bytes(dtype, n, k).expect("whole blocks")];
    pack(dtype, n, k, rows, &mut out);
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn unpack_inverts_pack(n in 1usize..50, blocks in 1usize..4, seed: u64, padding in 0usize..64) {
        for dtype in DTYPES {
            let k = blocks * dtype.block_weights();
            let mut state = seed | 1;
            let rows: Vec<u8> = (0..n * dtype.row_bytes(k).unwrap())
                .map(|_| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    (state >> 32) as u8
                })
                .collect();
            let mut file = packed(dtype, n, k, &rows);
            file.resize(file.len() + padding, 0x55);
            let mut back = vec![0x33; rows.len()];
            unpack(dtype, n, k, &file, &mut back);
            prop_assert_eq!(&rows, &back);
            let row = rows.len() / n;
            let mut one = vec![0x77; row];
            unpack_row(dtype, k, &file, n - 1, &mut one);
            prop_assert_eq!(&rows[(n - 1) * row..], &one);
        }
    }
}

#[test]
fn sizes_are_those_of_padded_rows_and_never_overflow() {
    assert_eq!(packed_bytes(DType::Q4_1, 16, 32), Some(320));
    assert_eq!(packed_bytes(DType::Q4_0, 17, 64), Some(2 * 2 * 288));
    assert_eq!(packed_bytes(DType::Q8_0, 1, 32), Some(544));
    assert_eq!(packed_bytes(DType::Q6K, 16, 512), Some(2 * 3360));
    assert_eq!(packed_bytes(DType::F32, 0, 3), Some(0));
    assert_eq!(packed_bytes(DType::Q8_0, 16, 33), None);
    assert_eq!(packed_bytes(DType::Q6K, 16, 32), None);
    assert_eq!(packed_bytes(DType::F32, usize::MAX, 1), None);
    assert_eq!(packed_bytes(DType::Q8_0, 16, usize::MAX - 31), None);
}

#[test]
fn padding_columns_are_zero() {
    for dtype in DTYPES {
        let k = dtype.block_weights();
        let rows = vec![0xFF; dtype.row_bytes(k).unwrap()];
        let one = packed(dtype, 1, k, &rows);
        assert_eq!(
            one.iter().map(|b| b.count_ones() as usize).sum::<usize>(),
            rows.len() * 8,
            "{dtype:?}"
        );
    }
}

#[test]
fn a_panel_block_stands_as_the_table_says() {
    // Column 9 = half 1, lane 1.
    let n = 16;
    let mut rows = vec![0u8; n * 34];
    rows[9 * 34..][..34].copy_from_slice(&std::array::from_fn::<u8, 34, _>(|i| i as u8));
    let out = packed(DType::Q8_0, n, 32, &rows);
    assert_eq!(out[32 + 4..][..4], [2, 3, 4, 5]);
    assert_eq!(out[7 * 64 + 32 + 4..][..4], [30, 31, 32, 33]);
    assert_eq!(out[512 + 18..][..2], [0, 1]);
    let rows: Vec<u8> = (0..n * 20).map(|i| if i / 20 == 9 { (i % 20) as u8 } else { 0 }).collect();
    let out = packed(DType::Q4_1, n, 32, &rows);
    assert_eq!(out[3 * 64 + 32 + 4..][..4], [16, 17, 18, 19]);
    assert_eq!(out[256 + 18..][..2], [0, 1]);
    assert_eq!(out[288 + 18..][..2], [2, 3]);
    let rows: Vec<u8> = (0u8..32).flat_map(|i| [i, 0xA0 + i / 16]).collect();
    let out = packed(DType::F16, 16, 2, &rows);
    assert_eq!(out[..4], [0, 0xA0, 2, 0xA0]);
    assert_eq!(out[32..36], [1, 0xA0, 3, 0xA0]);
}

/// One q6_k weight set by hand in row order shows up at its place in the panel and nowhere else.
#[test]
fn a_q6_k_weight_stands_in_its_unit() {
    // Weight 128 + 96 + 17: part 1, quarter 3, l 17: ql[64 + 32 + 17] high nibble, qh[32 + 17]
    // bits 6..8. In the panel: unit 7, group 1, l 1.
    let mut row = [0u8; 210];
    row[64 + 32 + 17] = 0xB0;
    row[128 + 32 + 17] = 0x80;
    row[192 + 15] = 5;
    let mut rows = vec![0u8; 3 * 210];
    rows[2 * 210..].copy_from_slice(&row);
    let out = packed(DType::Q6K, 3, 256, &rows);
    let unit = 32 + 7 * 416;
    let set: Vec<_> =
        out.iter().enumerate().filter(|(_, b)| **b != 0).map(|(i, b)| (i, *b)).collect();
    assert_eq!(
        set,
        [(unit + 2 * 4 + 1, 0xB0), (unit + 256 + 64 + 2 * 4 + 1, 2), (unit + 384 + 16 + 2, 5)]
    );
}

#[test]
fn numbers_of_the_float_types() {
    let mut out = [0.0; 2];
    dequantise_row(DType::F32, 2, &[0, 0, 0x80, 0x3F, 0, 0, 0x20, 0xC1], &mut out);
    assert_eq!(out, [1.0, -10.0]);
    dequantise_row(DType::F16, 2, &[0, 0x3C, 1, 0x80], &mut out);
    assert_eq!(out, [1.0, -(2.0f32.powi(-24))]);
    dequantise_row(DType::Bf16, 2, &[0x80, 0x3F, 0x20, 0xC1], &mut out);
    assert_eq!(out, [1.0, -10.0]);
}

#[test]
fn numbers_of_the_32_weight_types() {
    let mut out = [0.0; 32];
    let mut q8 = vec![0x00, 0xB8]; // -0.5
    q8.extend((0u8..32).map(|i| i.wrapping_sub(16)));
    q8[2] = 0x80; // -128
    dequantise_row(DType::Q8_0, 32, &q8, &mut out);
    assert_eq!((out[0], out[1], out[16], out[31]), (64.0, 7.5, 0.0, -7.5));

    let nibbles: Vec<u8> = (0u8..16).map(|i| i | (15 - i) << 4).collect();
    let q4_0 = [&[0x00, 0x40][..], &nibbles].concat(); // 2.0
    dequantise_row(DType::Q4_0, 32, &q4_0, &mut out);
    assert_eq!((out[0], out[3], out[15], out[16], out[31]), (-16.0, -10.0, 14.0, 14.0, -16.0));

    let q4_1 = [&[0x00, 0x40, 0x00, 0xBC][..], &nibbles].concat(); // 2.0, -1.0
    dequantise_row(DType::Q4_1, 32, &q4_1, &mut out);
    assert_eq!((out[0], out[3], out[15], out[16], out[31]), (-1.0, 5.0, 29.0, 29.0, -1.0));
}

#[test]
fn numbers_of_q6_k_in_their_order() {
    let mut block = [0u8; 210];
    block[208..].copy_from_slice(&f16::from_f32(0.5).to_le_bytes());
    for s in 0..16 {
        block[192 + s] = (s as i8 - 8) as u8;
    }
    block[0] = 0x21; // weight 0: low nibble 1; weight 64: low nibble 2
    block[32] = 0x43; // weight 32: 3; weight 96: 4
    block[128] = 0b11_10_01_00; // weights 0, 32, 64, 96: high bits 0, 1, 2, 3
    block[64 + 31] = 0x0F; // weight 128 + 31: 15
    block[128 + 32 + 31] = 3; // with high bits 3: 63
    let mut out = [0.0; 256];
    dequantise_row(DType::Q6K, 256, &block, &mut out);
    assert_eq!(out[0], 0.5 * -8.0 * (1.0 - 32.0));
    assert_eq!(out[32], 0.5 * -6.0 * (3.0 + 16.0 - 32.0));
    assert_eq!(out[64], 0.5 * -4.0 * (2.0 + 32.0 - 32.0));
    assert_eq!(out[96], 0.5 * -2.0 * (4.0 + 48.0 - 32.0));
    assert_eq!(out[128 + 31], 0.5 * 1.0 * 31.0);
    assert_eq!(out[17], 0.5 * -7.0 * -32.0);
}

#[test]
fn quantising_keeps_numbers_within_half_a_step() {
    let x: Vec<f32> = (0..96).map(|i| ((i * 37 % 101) as f32 - 50.0) / 7.0).collect();
    let mut back = vec![0.0; 96];
    let mut q8 = vec![0; 3 * 34];
    quantise_q8_0(&x, &mut q8);
    dequantise_row(DType::Q8_0, 96, &q8, &mut back);
    for (x, y) in x.iter().zip(&back) {
        assert!((x - y).abs() <= 50.0 / 7.0 / 127.0 * 0.51 + 0.01, "{x} {y}");
    }
    let mut q4 = vec![0; 3 * 20];
    quantise_q4_1(&x, &mut q4);
    dequantise_row(DType::Q4_1, 96, &q4, &mut back);
    for (x, y) in x.iter().zip(&back) {
        assert!((x - y).abs() <= 100.0 / 7.0 / 15.0 * 0.51 + 0.01, "{x} {y}");
    }
}

#[test]
fn quantising_zeros_and_extremes_stays_finite() {
    for x in [[0.0f32; 32], [1e-12; 32], [3e38; 32], [-3e38; 32]] {
        let (mut q8, mut q4, mut back) = ([0; 34], [0; 20], [0.0; 32]);
        quantise_q8_0(&x, &mut q8);
        dequantise_row(DType::Q8_0, 32, &q8, &mut back);
        assert!(back.iter().all(|v| v.is_finite() && (*v == 0.0 || v.signum() == x[0].signum())));
        quantise_q4_1(&x, &mut q4);
        dequantise_row(DType::Q4_1, 32, &q4, &mut back);
        assert!(back.iter().all(|v| v.is_finite()));
    }
}
