//! Opening a bundle reads its header and its manifest, and touches no weight.
#![cfg(target_os = "linux")]
use crate::files::bundle::{options, write};
use hat_loader::{Role, TinyModel, Weights, generated};

/// Bytes that the system maps around a touched page.
const FAULT_AROUND_BYTES: usize = 64 << 10;

/// Bytes of the mapping of this file that are in this process's memory.
fn resident_bytes(path: &std::path::Path) -> usize {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let path = path.to_str().unwrap();
    let mut lines = maps.lines().skip_while(|line| !line.ends_with(path));
    let rss = lines.find(|line| line.starts_with("Rss:")).expect("the file is mapped");
    rss.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() << 10
}

#[test]
fn opening_touches_the_header_alone() {
    let tiny = TinyModel { hidden: 256, head_dim: 64, vocab: 20_000, ..TinyModel::default() };
    let written = write(&generated(&tiny), options(2, 0, Weights::Keep));
    let path = written.path(Role::Device).join("weights.safetensors");
    let header = u64::from_le_bytes(*std::fs::read(&path).unwrap().first_chunk().unwrap());

    let bundle = written.open(Role::Device).unwrap();
    let tensors: Vec<_> = bundle.tensor_names().map(|name| bundle.tensor(name).unwrap()).collect();
    let allowed = header as usize + FAULT_AROUND_BYTES;
    let resident = resident_bytes(&path);
    assert!(resident <= allowed, "{resident} bytes are resident, the header has {header}");

    // The measure sees a weight that is touched, and a tensor outlives its bundle.
    drop(bundle);
    let sum: usize = tensors.iter().flat_map(|t| t.bytes.iter()).map(|b| usize::from(*b)).sum();
    assert!(sum > 0);
    assert!(resident_bytes(&path) > 10_000_000 && 10_000_000 > allowed);
}
