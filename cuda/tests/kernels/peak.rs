//! Tests of the yardsticks of benches: the copies are copies, and the products as many as they say.

use hat_cuda::gpu::Memory as _;
use hat_cuda::testkit::peak::{ProductDType, copy, multiply};

use crate::stand::{Random, gpu, memory, numbers, room};

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn a_copy_is_a_copy() {
    let Some(mut gpu) = gpu() else { return };
    let mut random = Random(80);
    let bytes: Vec<u8> = (0..16 * 300).map(|_| random.next() as u8).collect();
    let (from, mut to) = (memory(&mut gpu, &bytes), room::<u8>(&mut gpu, bytes.len()));
    let work = copy(&mut gpu, from.slice(), to.slice_mut()).unwrap();
    assert_eq!(numbers::<u8>(&mut gpu, &to, bytes.len()), bytes);
    assert_eq!(work.bytes, 2 * 16 * 300);
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn products_are_as_many_as_they_say() {
    let Some(mut gpu) = gpu() else { return };
    // Ones of f16, and of bytes; the sums of whole numbers cancel where all are the same.
    for (what, one, deep, sum) in [
        (ProductDType::Halves, 0x3c00_3c00, 1, 3.0 * 16.0 * 32.0),
        (ProductDType::Bytes, 0x0101_0101, 2, 0.0),
    ] {
        let (from, mut out) = (memory(&mut gpu, &[one; 128]), room::<f32>(&mut gpu, 2 * 256));
        let before = gpu.counts();
        let work = multiply(&mut gpu, what, 2, 3, from.slice(), out.slice_mut()).unwrap();
        assert_eq!(numbers::<f32>(&mut gpu, &out, 2 * 256), vec![sum; 2 * 256], "{what:?}");
        if let (Some(before), Some(after)) = (before, gpu.counts()) {
            assert_eq!(work.flops, (after.mma - before.mma) * deep * 4096, "{what:?}");
        }
    }
}
