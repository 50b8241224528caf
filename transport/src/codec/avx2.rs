//! The block codecs with the widest instructions that this CPU has: compiled once more for AVX2.
//! No intrinsics: the loops are the portable ones.

use super::block::{Grid, decode_row, encode_row};

/// [`encode_row`] for each row.
pub(super) fn encode<'a, G: Grid, const N: usize>(
    rows: impl Iterator<Item = (&'a [f32], &'a mut [u8])>,
) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: this CPU has AVX2, as was asked right above.
        return unsafe { encode_avx2::<G, N>(rows) };
    }
    rows.for_each(|(row, out)| encode_row::<G, N>(row, out));
}

/// [`decode_row`] for each row.
pub(super) fn decode<'a, G: Grid, const N: usize>(
    rows: impl Iterator<Item = (&'a mut [f32], &'a [u8])>,
) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: this CPU has AVX2, as was asked right above.
        return unsafe { decode_avx2::<G, N>(rows) };
    }
    rows.for_each(|(row, bytes)| decode_row::<G, N>(bytes, row));
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn encode_avx2<'a, G: Grid, const N: usize>(rows: impl Iterator<Item = (&'a [f32], &'a mut [u8])>) {
    rows.for_each(|(row, out)| encode_row::<G, N>(row, out));
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn decode_avx2<'a, G: Grid, const N: usize>(rows: impl Iterator<Item = (&'a mut [f32], &'a [u8])>) {
    rows.for_each(|(row, bytes)| decode_row::<G, N>(bytes, row));
}
