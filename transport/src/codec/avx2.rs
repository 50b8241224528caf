//! The block codecs compiled for AVX2. No intrinsics: the loops are the portable ones.

use super::block::{Grid, decode_row, encode_row};

/// As [`encode_row`], for each row; returns true if this CPU has AVX2, and if not does nothing.
pub(super) fn encode<G: Grid, const N: usize>(
    rows: &[f32],
    hidden: usize,
    row_bytes: usize,
    out: &mut [u8],
) -> bool {
    if !is_x86_feature_detected!("avx2") {
        return false;
    }
    // SAFETY: this CPU has AVX2, as was asked right above.
    unsafe { encode_avx2::<G, N>(rows, hidden, row_bytes, out) };
    true
}

/// As [`decode_row`], for each row; returns true if this CPU has AVX2, and if not does nothing.
pub(super) fn decode<G: Grid, const N: usize>(
    bytes: &[u8],
    hidden: usize,
    row_bytes: usize,
    out: &mut [f32],
) -> bool {
    if !is_x86_feature_detected!("avx2") {
        return false;
    }
    // SAFETY: this CPU has AVX2, as was asked right above.
    unsafe { decode_avx2::<G, N>(bytes, hidden, row_bytes, out) };
    true
}

#[target_feature(enable = "avx2")]
fn encode_avx2<G: Grid, const N: usize>(
    rows: &[f32],
    hidden: usize,
    row_bytes: usize,
    out: &mut [u8],
) {
    let rows = rows.chunks_exact(hidden).zip(out.chunks_exact_mut(row_bytes));
    rows.for_each(|(row, out)| encode_row::<G, N>(row, out));
}

#[target_feature(enable = "avx2")]
fn decode_avx2<G: Grid, const N: usize>(
    bytes: &[u8],
    hidden: usize,
    row_bytes: usize,
    out: &mut [f32],
) {
    let rows = bytes.chunks_exact(row_bytes).zip(out.chunks_exact_mut(hidden));
    rows.for_each(|(bytes, row)| decode_row::<G, N>(bytes, row));
}
