//! The formulas of what kernels cannot do without, against buffers and what the emulator counts.

use hat_cuda::attend::Cut;
use hat_cuda::bound::{Work, attend, gemv, prepare, silu_mul};
use hat_cuda::plan::AttendShape;
use hat_cuda::table::WeightDType;

use crate::gemv::product;
use crate::panels::Matrix;
use crate::sequences::{Sequence, Store, attended, chunk, tree};
use crate::stand::{Random, counts, gpu};

/// Operations of one m16n8k16.
const MMA_FLOPS: u64 = 2 * 16 * 8 * 16;

#[test]
fn bytes_are_those_of_the_buffers() {
    // 16,777,216 weights of 20 bytes in 32; 4,096 bytes and 128 pairs of scales; 4,096 outputs.
    let one = gemv(WeightDType::Q4_1, 1, 4096, 4096);
    assert_eq!(one, Work { bytes: 10_485_760 + 4096 + 1024 + 16_384, flops: 33_554_432 });
    let many = gemv(WeightDType::Q4_1, 17, 4096, 4096);
    assert_eq!(many.bytes, 10_485_760 + 17 * (4096 + 1024 + 16_384));
    assert_eq!(gemv(WeightDType::Q4_1, 65, 4096, 4096).bytes, 10_485_760 + 65 * 21_504);
    // Numbers of two bytes.
    assert_eq!(gemv(WeightDType::F16, 2, 64, 32).bytes, 4096 + 2 * (128 + 128));
    // Rows of 64 numbers of four bytes become bytes and two pairs of scales, or numbers of two.
    assert_eq!(prepare(WeightDType::Q8_0, 3, 64).bytes, 3 * (256 + 64 + 16));
    assert_eq!(prepare(WeightDType::Bf16, 3, 64).bytes, 3 * (256 + 128));
    // 1,024 keys of 32 heads of 128 in two bytes, K and V; 8 rows in and out.
    let heads = AttendShape { heads: 32, kv_heads: 32, head_dim: 128, window: None };
    let work = attend(&heads, &[1017, 1018, 1019, 1020, 1021, 1022, 1023, 1024]);
    assert_eq!(work.bytes, 16_777_216 + 8 * 32_768);
    assert_eq!(work.flops, 4 * 8164 * 4096);
    assert_eq!(silu_mul(100).bytes, 1200);
    let both: Work = [one, many].into_iter().sum();
    assert_eq!(both.flops, 18 * 33_554_432);
}

mod emulated {
    use super::*;

    #[test]
    #[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
    fn attention_does_the_operations_of_its_formula_and_few_more() {
        let Some(mut gpu) = gpu() else { return };
        let heads = AttendShape { heads: 4, kv_heads: 4, head_dim: 64, window: None };
        let mut random = Random(7);
        // Rows that fill the tiles, and a small tree, which can't: its rows wait in tiles of 16.
        for (rows, most) in [(chunk(448, 512), 1.1), (tree(200, 8, &mut random), 20.0)] {
            let keys: Vec<usize> = rows.iter().map(|row| row.keys.len()).collect();
            let mut free = (0..40).collect();
            let sequence = Sequence::new(rows, &mut free);
            let mut store = Store::new(1, 40, &heads);
            store.fill(0, &sequence, &mut random);
            let q = random.numbers(keys.len() * 4 * 64, 1.0);
            let before = counts(&gpu);
            attended(&mut gpu, &store, 0, &heads, &[sequence], &q, Cut::Prefill);
            let after = counts(&gpu);
            let (done, needed) =
                ((after.mma - before.mma) * MMA_FLOPS, attend(&heads, &keys).flops);
            let times = done as f64 / needed as f64;
            assert!(times >= 1.0 && times < most, "{done} done, {needed} needed, {times} times");
        }
    }

    #[test]
    #[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
    fn products_do_the_operations_of_their_formula() {
        let Some(mut gpu) = gpu() else { return };
        let mut random = Random(8);
        for rows in [8, 16, 64, 128] {
            let matrix = Matrix::random(WeightDType::Q4_0, 128, 96, &mut random);
            let x = random.numbers(rows * 96, 1.0);
            let before = counts(&gpu);
            product(&mut gpu, &x, &matrix);
            let after = counts(&gpu);
            // m16n8k32.
            let (done, needed) = (
                (after.mma - before.mma) * 2 * MMA_FLOPS,
                gemv(WeightDType::Q4_0, rows, 96, 128).flops,
            );
            assert_eq!(done, needed, "{rows} rows");
        }
    }
}
