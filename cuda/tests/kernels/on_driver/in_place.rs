//! Weights that a GPU without memory of its own reads where the host has them.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use hat_cuda::driver::CudaMemory;
use hat_cuda::gpu::HostMap;

use super::*;

const COUNT: usize = 64;
const PAGE: usize = 4096;

/// Runs the body `name` under a driver of this kind; how often maps were registered, and
/// unregistered.
#[track_caller]
fn registered_under(kind: &str, name: &str) -> Option<[u64; 2]> {
    let counts = counts_under(kind, "in_place", name)?;
    Some([counts[10], counts[11]])
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn weights_are_read_where_the_host_has_them() {
    for kind in ["integrated", "integrated-other-pointer", "integrated-writable"] {
        let Some(times) = registered_under(kind, "reading_in_place") else { return };
        assert_eq!(times, [2, 2], "{kind}: times registered and unregistered");
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn weights_are_copied_where_the_driver_wants_it() {
    for (kind, reason) in [
        ("", "weights copied"),
        ("integrated-no-register", "weights copied, since it registers no host memory"),
        ("integrated-refused", "copied, since cuMemHostRegister: CUDA_ERROR_NOT_PERMITTED"),
    ] {
        let Some(folder) = fake_driver(&[]) else { return };
        let environment = [
            ("HAT_FAKE_DRIVER", kind),
            ("HAT_TEST_REASON", reason),
            ("LD_LIBRARY_PATH", folder.to_str().unwrap()),
        ];
        assert_ended(&body("in_place::reading_copies", &environment));
    }
}

/// Pages that nobody else has, as a mapped file.
struct Pages {
    storage: Vec<u8>,
    begin: usize,
}

impl AsRef<[u8]> for Pages {
    fn as_ref(&self) -> &[u8] {
        // Not whole pages: a file ends where it ends.
        &self.storage[self.begin..][..3 * PAGE - 100]
    }
}

/// Numbers `first, first + 1, ..` over all of it.
fn map(first: f32) -> HostMap {
    let mut storage = vec![0; 5 * PAGE];
    let address = storage.as_ptr().addr();
    let begin = address.next_multiple_of(PAGE) - address;
    for (index, number) in storage[begin..].as_chunks_mut::<4>().0.iter_mut().enumerate() {
        *number = (first + index as f32).to_le_bytes();
    }
    Arc::new(Pages { storage, begin })
}

/// `rms_norm` of ones, which are the weights, nearly.
fn assert_weights(gpu: &mut Cuda, weight: CudaMemory, first: f32) {
    let [mut x, mut out] = [(); 2].map(|()| gpu.alloc(4 * COUNT, "a test").unwrap());
    gpu.upload(&[1.0f32; COUNT], &mut x, 0).unwrap();
    let to = RmsNorm { weight: weight.slice(), eps: 0.0, out: out.slice_mut() };
    rms_norm(gpu, 1, x.slice(), to).unwrap();
    // The launch only waits so far; who takes the weights away waits for it.
    drop(weight);
    let mut numbers = [0.0f32; COUNT];
    gpu.download(&out, 0, &mut numbers).unwrap();
    for (index, number) in numbers.into_iter().enumerate() {
        let expected = first + index as f32;
        assert!((number - expected).abs() < 1e-3 * expected, "{index}: {number}");
    }
}

pub(super) fn reading_in_place() {
    let (mut gpu, mut other) = (Cuda::open(0).unwrap(), Cuda::open(0).unwrap());
    assert!(gpu.describe().ends_with("weights in place"), "{}", gpu.describe());
    let map = map(10.0);
    // Tensors share pages; one begins in the midst of one.
    let begins = [0, 64, 2 * PAGE - 64];
    let weights = begins.map(|begin| gpu.in_place(&map, begin..begin + 4 * COUNT).unwrap());
    // Another one on the same GPU reads the same pages.
    let shared = other.in_place(&map, 128..128 + 4 * COUNT).unwrap();
    for (weight, begin) in weights.into_iter().zip(begins) {
        assert_eq!(weight.bytes(), 4 * COUNT);
        assert_weights(&mut gpu, weight, 10.0 + begin as f32 / 4.0);
    }
    assert_eq!(Arc::strong_count(&map), 2, "the last use keeps it");
    assert_weights(&mut other, shared, 10.0 + 32.0);
    assert_eq!(Arc::strong_count(&map), 1, "nobody keeps it any more");
    // It can be had again; memory keeps the map when nobody else does.
    let again = gpu.in_place(&map, 256..256 + 4 * COUNT).unwrap();
    drop(map);
    assert_weights(&mut gpu, again, 10.0 + 64.0);
    // No vectors can be read from there, and these bytes have no page for themselves.
    let odd = super::in_place::map(0.0);
    assert!(gpu.in_place(&odd, 8..8 + 4 * COUNT).is_none());
    let bytes: HostMap = Arc::new(vec![0u8; 2 * PAGE]);
    let is_aligned = (*bytes).as_ref().as_ptr().addr().is_multiple_of(PAGE);
    assert!(is_aligned || gpu.in_place(&bytes, 0..PAGE).is_none());
    assert!(gpu.describe().ends_with("weights in place"), "{}", gpu.describe());
}

pub(super) fn reading_copies() {
    let mut gpu = Cuda::open(0).unwrap();
    for _ in 0..2 {
        assert!(gpu.in_place(&map(1.0), 0..4 * COUNT).is_none());
        let reason = std::env::var("HAT_TEST_REASON").unwrap();
        assert!(gpu.describe().ends_with(&reason), "{}", gpu.describe());
    }
    // All else goes on.
    let mut weight = gpu.alloc(4 * COUNT, "a test").unwrap();
    let numbers: Vec<f32> = (0..COUNT).map(|index| 5.0 + index as f32).collect();
    gpu.upload(&numbers, &mut weight, 0).unwrap();
    assert_weights(&mut gpu, weight, 5.0);
}

pub(super) fn writing_in_place() {
    let mut gpu = Cuda::open(0).unwrap();
    let mut weight = gpu.in_place(&map(1.0), 0..4 * COUNT).unwrap();
    let written = catch_unwind(AssertUnwindSafe(|| gpu.upload(&[0.0f32; COUNT], &mut weight, 0)));
    let panicked = written.unwrap_err().downcast::<&str>().unwrap();
    assert_eq!(*panicked, "a copy to host memory that is read in place");
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn weights_in_place_are_not_written_to() {
    let times = registered_under("integrated", "writing_in_place");
    assert!(times.is_none_or(|times| times == [1, 1]));
}
