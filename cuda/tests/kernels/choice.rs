//! top_k.

use hat_cuda::gpu::Memory as _;
use hat_cuda::top_k::TopK;

use crate::stand::{Random, gpu, memory, same_under_all_schedules};

/// The k largest by sorting: value falling, column rising.
fn expected(row: &[f32], k: usize) -> (Vec<f32>, Vec<u32>) {
    let mut all: Vec<(f32, u32)> = row.iter().copied().zip(0..).collect();
    all.sort_by(|a, b| b.0.partial_cmp(&a.0).unwrap().then(a.1.cmp(&b.1)));
    all.truncate(k);
    all.into_iter().unzip()
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn top_k_is_a_sort() {
    let Some(mut gpu) = gpu() else { return };
    let mut random = Random(30);
    for (rows, columns, k) in [(1, 1, 1), (2, 2048, 5), (3, 2049, 64), (2, 5000, 1), (1, 64, 64)] {
        let mut x = random.numbers(rows * columns, 4.0);
        // Many ties, within a slice and across; but the last row is led by its end.
        x.iter_mut().for_each(|x| *x = (*x * 8.0).round() / 8.0);
        x[rows * columns - 1] = 9.0;
        let top = same_under_all_schedules(&mut gpu, |gpu| {
            let from = memory(gpu, &x);
            let mut top = TopK::new(gpu, rows, columns, k).unwrap();
            top.run(gpu, rows, k, from.slice()).unwrap()
        });
        for (r, row) in x.chunks(columns).enumerate() {
            let (values, found) = expected(row, k);
            assert_eq!(top.columns[r * k..][..k], found, "row {r} of [{rows}, {columns}]");
            assert_eq!(top.values[r * k..][..k], values);
        }
        assert!(top.finite.iter().all(|finite| *finite));
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn top_k_says_which_rows_are_not_finite() {
    let Some(mut gpu) = gpu() else { return };
    let mut x = Random(31).numbers(4 * 3000, 1.0);
    (x[2999], x[3000 + 5], x[3 * 3000]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
    let from = memory(&mut gpu, &x);
    let mut top = TopK::new(&mut gpu, 4, 3000, 2).unwrap();
    let found = top.run(&mut gpu, 4, 2, from.slice()).unwrap();
    assert_eq!(found.finite, [false, false, true, false]);
}
