//! Valid files with some bytes changed: whatever they become, parsing them ends without a panic
//! and without memory that the file doesn't justify.

use std::sync::LazyLock;

use crate::files::gguf::Gguf;
use hat_loader::{DType, TinyModel, fuzz_gguf, fuzz_safetensors_header, generated};
use proptest::prelude::*;

fn tiny() -> TinyModel {
    TinyModel {
        layers: 1,
        hidden: 32,
        intermediate: 32,
        heads: 2,
        kv_heads: 1,
        vocab: 259,
        dtype: DType::F16,
        ..TinyModel::default()
    }
}

static GGUF: LazyLock<Vec<u8>> = LazyLock::new(|| Gguf::of(&generated(&tiny())).bytes());

static SAFETENSORS: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let model = generated(&tiny());
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.safetensors");
    let names: Vec<&str> = model.tensor_names().collect();
    crate::files::write_safetensors(&model, &names, &path);
    std::fs::read(path).unwrap()
});

/// A change at a place given as a fraction of the part that is parsed.
#[derive(Clone, Debug)]
enum Change {
    Byte(f64, u8),
    Word(f64, u64),
    Cut(f64),
    Insert(f64, Vec<u8>),
    Remove(f64, usize),
}

fn change() -> impl Strategy<Value = Change> {
    let at = 0.0..1.0f64;
    let word = prop_oneof![
        any::<u64>(),
        Just(u64::MAX),
        Just(0),
        (0u32..64).prop_map(|shift| 1 << shift),
        (0u64..300),
    ];
    prop_oneof![
        (at.clone(), any::<u8>()).prop_map(|(at, byte)| Change::Byte(at, byte)),
        (at.clone(), word).prop_map(|(at, word)| Change::Word(at, word)),
        at.clone().prop_map(Change::Cut),
        (at.clone(), prop::collection::vec(any::<u8>(), 1..20))
            .prop_map(|(at, bytes)| Change::Insert(at, bytes)),
        (at, 1usize..20).prop_map(|(at, len)| Change::Remove(at, len)),
    ]
}

fn apply(file: &[u8], parsed: usize, changes: &[Change]) -> Vec<u8> {
    let mut bytes = file.to_vec();
    for change in changes {
        let place = |at: &f64| ((*at * parsed as f64) as usize).min(bytes.len());
        match change {
            Change::Byte(at, byte) => {
                let at = place(at);
                if let Some(old) = bytes.get_mut(at) {
                    *old = *byte;
                }
            }
            Change::Word(at, word) => {
                let at = place(at);
                if let Some(old) = bytes.get_mut(at..at + 8) {
                    old.copy_from_slice(&word.to_le_bytes());
                }
            }
            Change::Cut(at) => bytes.truncate(place(at)),
            Change::Insert(at, new) => {
                let at = place(at);
                bytes.splice(at..at, new.iter().copied());
            }
            Change::Remove(at, len) => {
                let at = place(at);
                bytes.drain(at..(at + len).min(bytes.len()));
            }
        }
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn gguf_never_panics(changes in prop::collection::vec(change(), 1..4)) {
        // Metadata, vocabulary and tensor infos: everything in front of the weights.
        let weights: usize = 259 * 32 * 2 * 2;
        fuzz_gguf(&apply(&GGUF, GGUF.len() - weights, &changes));
    }

    #[test]
    fn a_safetensors_header_never_panics(changes in prop::collection::vec(change(), 1..4)) {
        let header = u64::from_le_bytes(*SAFETENSORS.first_chunk().unwrap()) as usize + 8;
        fuzz_safetensors_header(&apply(&SAFETENSORS, header, &changes));
    }

    #[test]
    fn noise_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        fuzz_gguf(&bytes);
        fuzz_safetensors_header(&bytes);
        fuzz_gguf(&[b"GGUF\x03\0\0\0", &bytes[..]].concat());
        fuzz_safetensors_header(&[&(bytes.len() as u64).to_le_bytes(), &bytes[..]].concat());
    }
}

#[test]
fn the_files_are_valid_before_they_are_changed() {
    assert!(fuzz_gguf(&GGUF) && fuzz_safetensors_header(&SAFETENSORS));
}
