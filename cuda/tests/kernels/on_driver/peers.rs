//! Copies from GPU to GPU: over a made-up driver of two, and on two real ones.

use hat_cuda::driver::{CopyCounts, CudaMemory};
use hat_cuda::gpu::Reach;

use super::*;

/// Runs the body `name` under a driver of this kind that has two GPUs.
#[track_caller]
fn under_two(kind: &str, name: &str) {
    let Some(folder) = fake_driver(&[]) else { return };
    let library_path = folder.to_str().unwrap();
    let environment =
        [("HAT_FAKE_DRIVER", kind), ("HAT_FAKE_DEVICES", "2"), ("LD_LIBRARY_PATH", library_path)];
    assert_ended(&body(&format!("peers::{name}"), &environment));
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn one_gpu_fetches_from_another() {
    under_two("", "fetching");
    under_two("no-peer", "fetching_staged");
    under_two("", "fetching_at_home");
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn memory_of_another_gpu_needs_access() {
    under_two("no-peer", "foreign_memory");
    under_two("", "foreign_memory_with_access");
}

#[test]
#[ignore = "needs two GPUs"]
fn one_gpu_fetches_from_another_on_gpus() {
    println!("rows go {}", fetch([0, 1]));
}

const COUNT: usize = 64;

/// `out = rms_norm(x)` with weights of 1.
fn norm(gpu: &mut Cuda, x: &CudaMemory, out: &mut CudaMemory) {
    let mut weight = gpu.alloc(4 * COUNT, "a test").unwrap();
    gpu.upload(&[1.0f32; COUNT], &mut weight, 0).unwrap();
    let to = RmsNorm { weight: weight.slice(), eps: 1e-5, out: out.slice_mut() };
    rms_norm(gpu, 1, x.slice(), to).unwrap();
}

/// Numbers through a kernel on one GPU and then one on the other; what they become is known.
fn fetch(ordinals: [usize; 2]) -> Reach {
    let [mut first, mut second] = ordinals.map(|ordinal| Cuda::open(ordinal).unwrap());
    let reach = second.reach(&first).unwrap();
    // Again: access is there already.
    assert_eq!(second.reach(&first).unwrap(), reach);
    let numbers = Random(60).numbers(COUNT, 1.0);
    let mut out = [0.0f32; COUNT];
    for round in 0..3 {
        let numbers: Vec<f32> = numbers.iter().map(|x| x + round as f32).collect();
        let [mut x, mut normed, mut lane] = [(); 3].map(|()| first.alloc(256, "a test").unwrap());
        first.upload(&numbers, &mut x, 0).unwrap();
        norm(&mut first, &x, &mut normed);
        first.copy(4 * COUNT, &normed, &mut lane).unwrap();
        first.finish().unwrap();
        let [mut x, mut again] = [(); 2].map(|()| second.alloc(256, "a test").unwrap());
        second.fetch(4 * COUNT, &lane, &mut x).unwrap();
        // The copy keeps what it reads.
        drop(lane);
        norm(&mut second, &x, &mut again);
        second.download(&again, 0, &mut out).unwrap();
        let mean = numbers.iter().map(|x| x * x).sum::<f32>() / COUNT as f32;
        for (out, x) in out.iter().zip(&numbers) {
            assert!((out - x / mean.sqrt()).abs() < 1e-3, "{out} in round {round}");
        }
    }
    let up = 3 * 4 * COUNT as u64;
    let expected = CopyCounts { up_bytes: 2 * up, ..CopyCounts::default() };
    assert_eq!(first.copy_counts(), expected);
    let expected = CopyCounts { up_bytes: up, down_bytes: up, fetches: 3, fetched_bytes: up };
    assert_eq!(second.copy_counts(), expected);
    // Whoever fetches may outlive what it fetched from, and its GPU.
    let (mut lane, mut x) = (first.alloc(256, "a test").unwrap(), second.alloc(256, "").unwrap());
    first.upload(&numbers, &mut lane, 0).unwrap();
    first.finish().unwrap();
    second.fetch(4 * COUNT, &lane, &mut x).unwrap();
    drop((lane, first));
    second.download(&x, 0, &mut out).unwrap();
    assert_eq!(out[..], numbers);
    reach
}

pub(super) fn fetching() {
    assert_eq!(fetch([0, 1]), Reach::Peer);
    assert_eq!(fetch([1, 0]), Reach::Peer);
}

pub(super) fn fetching_staged() {
    assert_eq!(fetch([0, 1]), Reach::Staged);
}

pub(super) fn fetching_at_home() {
    assert_eq!(fetch([1, 1]), Reach::Same);
    let mut gpu = Cuda::open(0).unwrap();
    let [mut from, mut to] = [(); 2].map(|()| gpu.alloc(256, "a test").unwrap());
    gpu.upload(&[3.0f32; COUNT], &mut from, 0).unwrap();
    gpu.fetch(4 * COUNT, &from, &mut to).unwrap();
    let mut out = [0.0f32; COUNT];
    gpu.download(&to, 0, &mut out).unwrap();
    assert_eq!(out, [3.0; COUNT]);
    assert_eq!(gpu.copy_counts().fetches, 0);
}

/// A kernel of GPU 1 on memory of GPU 0: what a missing copy would be.
fn norm_of_foreign(gives_access: bool) -> Result<(), GpuError> {
    let [mut first, mut second] = [0, 1].map(|ordinal| Cuda::open(ordinal).unwrap());
    if gives_access {
        second.reach(&first).unwrap();
    }
    let mut x = first.alloc(256, "a test").unwrap();
    first.upload(&[1.0f32; COUNT], &mut x, 0).unwrap();
    first.finish().unwrap();
    let mut out = second.alloc(256, "a test").unwrap();
    norm(&mut second, &x, &mut out);
    let done = second.finish();
    // One lost GPU is not the other.
    assert!(!first.is_lost() && first.finish().is_ok());
    done
}

pub(super) fn foreign_memory() {
    for gives_access in [false, true] {
        let error = norm_of_foreign(gives_access).unwrap_err().to_string();
        assert!(error.contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{error}");
    }
}

pub(super) fn foreign_memory_with_access() {
    assert!(norm_of_foreign(false).is_err());
    norm_of_foreign(true).unwrap();
}
