//! Counts of the emulated driver, in the order of `Counts` in `cuda/emu/fake_driver.cpp`.

use std::path::Path;

/// Of two GPUs each where there are two numbers.
#[derive(Debug)]
pub struct Counts {
    pub up_bytes: [u64; 2],
    pub down_bytes: [u64; 2],
    pub peer_copies: u64,
    pub peer_bytes: u64,
    pub staged_copies: u64,
    pub same_gpu_copies: u64,
    pub allocations: u64,
    pub allocated_bytes: u64,
    pub registered: u64,
    pub unregistered: u64,
    pub registered_bytes: u64,
}

impl Counts {
    pub fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let words: Vec<u64> =
            bytes.as_chunks().0.iter().map(|word| u64::from_ne_bytes(*word)).collect();
        let both = |all: u64, second: u64| [all - second, second];
        Self {
            up_bytes: both(words[0], words[2]),
            down_bytes: both(words[1], words[3]),
            peer_copies: words[4],
            peer_bytes: words[5],
            staged_copies: words[6],
            same_gpu_copies: words[7],
            allocations: words[8],
            allocated_bytes: words[9],
            registered: words[10],
            unregistered: words[11],
            registered_bytes: words[12],
        }
    }
}
