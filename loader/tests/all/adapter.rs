//! A trained drafter in a bundle, and each way of being a bad one.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::files::bundle::{Written, options, tiny, write};
use hat_loader::layout::{dequantise_row, quantise_q8_0, unpack_row};
use hat_loader::{DType, DrafterArchitecture, Role, Weights, add_drafter, generated};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, serialize_to_file};

type Parts = (HashMap<String, (Dtype, Vec<usize>, Vec<u8>)>, HashMap<String, String>);

/// A drafter for the model of `written`, matrices in q8_0.
fn drafter(written: &Written, kind: DrafterArchitecture) -> Parts {
    let device = written.open(Role::Device).unwrap();
    let mut tensors = HashMap::new();
    for (name, shape) in kind.tensors(device.config()) {
        let numbers: Vec<f32> =
            (0..shape.iter().product::<usize>()).map(|i| (i % 37) as f32 / 37.0 - 0.4).collect();
        let tensor = match shape[..] {
            [n, k] => {
                let row = DType::Q8_0.row_bytes(k).unwrap();
                let mut bytes = vec![0; n * row];
                for (from, to) in numbers.chunks(k).zip(bytes.chunks_mut(row)) {
                    quantise_q8_0(from, to);
                }
                (Dtype::U8, vec![n, row], bytes)
            }
            _ => (Dtype::F32, shape, numbers.iter().flat_map(|n| n.to_le_bytes()).collect()),
        };
        tensors.insert(name.to_owned(), tensor);
    }
    let ids = [5u32, 1, 7];
    let bytes = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    tensors.insert("vocabulary".into(), (Dtype::U32, vec![3], bytes));
    let texts = [
        ("format_version", "1".to_owned()),
        ("kind", kind.name().to_owned()),
        ("model_id", device.model_id().to_string()),
        ("split_layer", "2".to_owned()),
    ];
    (tensors, texts.map(|(name, text)| (name.to_owned(), text)).into())
}

fn save((tensors, texts): &Parts, directory: &Path) -> PathBuf {
    let path = directory.join("drafter.safetensors");
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    serialize_to_file(views, Some(texts.clone()), &path).unwrap();
    path
}

#[test]
fn a_drafter_is_added_and_read_again() {
    let written = write(&generated(&tiny()), options(2, 0, Weights::Keep));
    let directory = tempfile::tempdir().unwrap();
    assert!(written.open(Role::Device).unwrap().adapter().unwrap().is_none());
    for kind in DrafterArchitecture::ALL {
        let parts = drafter(&written, kind);
        add_drafter(&written.path(Role::Device), &save(&parts, directory.path())).unwrap();
        let device = written.open(Role::Device).unwrap();
        device.verify().unwrap();
        let adapter = device.adapter().unwrap().unwrap();
        assert_eq!((adapter.kind(), adapter.split_layer()), (kind, 2));
        assert_eq!(adapter.vocabulary(), [5, 1, 7]);
        for (name, shape) in kind.tensors(device.config()) {
            let (rows, packed) = (adapter.rows(name).unwrap(), adapter.tensor(name).unwrap());
            assert_eq!(packed.shape, shape);
            assert_eq!(rows.bytes[..], parts.0[name].2[..]);
            if let [_, k] = shape[..] {
                let mut row = vec![0; DType::Q8_0.row_bytes(k).unwrap()];
                unpack_row(DType::Q8_0, k, &packed.bytes, 1, &mut row);
                let mut numbers = vec![0.0; k];
                dequantise_row(DType::Q8_0, k, &row, &mut numbers);
                assert!((numbers[3] - (((k + 3) % 37) as f32 / 37.0 - 0.4)).abs() < 0.01);
            }
        }
        assert!(adapter.rows("lm_head.weight").is_err());
    }
}

#[test]
fn what_is_no_drafter_for_this_model_is_refused_and_changes_nothing() {
    let written = write(&generated(&tiny()), options(2, 0, Weights::Keep));
    let directory = tempfile::tempdir().unwrap();
    let good = drafter(&written, DrafterArchitecture::Deep);
    let text = |name: &'static str, value: &'static str| {
        Box::new(move |(_, texts): &mut Parts| {
            texts.insert(name.to_owned(), value.to_owned());
        })
    };
    let nan = |name: &'static str| {
        Box::new(move |(tensors, _): &mut Parts| {
            let bytes = &mut tensors.get_mut(name).unwrap().2;
            let at = if bytes.len() % 34 == 0 { 0 } else { 2 };
            bytes[at..at + 2].copy_from_slice(&0x7fc0u16.to_le_bytes());
        })
    };
    let ids = |ids: [u32; 3]| {
        Box::new(move |(tensors, _): &mut Parts| {
            let bytes = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
            tensors.get_mut("vocabulary").unwrap().2 = bytes;
        })
    };
    type Change = Box<dyn Fn(&mut Parts)>;
    let changes: Vec<(Change, &str)> = vec![
        (text("format_version", "2"), "format_version \"2\""),
        (text("model_id", "ffff"), "trained for another model"),
        (text("kind", "oracle"), "kind \"oracle\""),
        (text("kind", "layer"), "deep_proj.weight belongs to no layer drafter"),
        (text("split_layer", "99"), "split_layer \"99\""),
        (Box::new(|parts| drop(parts.1.remove("model_id"))), "states no model_id"),
        (Box::new(|parts| drop(parts.0.remove("norm.weight"))), "norm.weight is missing"),
        (Box::new(|parts| drop(parts.0.remove("vocabulary"))), "vocabulary is missing"),
        (Box::new(|parts| parts.0.get_mut("norm.weight").unwrap().1 = vec![2, 32]), "norm.weight"),
        (nan("norm.weight"), "norm.weight: a number in it is not finite"),
        (nan("mlp.up_proj.weight"), "mlp.up_proj.weight: a number in it is not finite"),
        (ids([1, 2, 1]), "token 1 twice"),
        (ids([1, 2, 1 << 30]), "token 1073741824 of"),
    ];
    let device = written.path(Role::Device);
    let before = std::fs::read(device.join("bundle.json")).unwrap();
    for (change, named) in changes {
        let mut parts = good.clone();
        change(&mut parts);
        let text = add_drafter(&device, &save(&parts, directory.path())).unwrap_err().to_string();
        assert!(text.contains("drafter.safetensors") && text.contains(named), "{text}");
    }
    let path = save(&good, directory.path());
    let bytes = std::fs::read(&path).unwrap();
    for keep in [0, 7, 100, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..keep]).unwrap();
        let text = add_drafter(&device, &path).unwrap_err().to_string();
        assert!(text.contains("drafter.safetensors"), "{keep}: {text}");
    }
    assert_eq!(std::fs::read(device.join("bundle.json")).unwrap(), before);
    std::fs::write(&path, &bytes).unwrap();
    let text = add_drafter(&written.path(Role::Cloud), &path).unwrap_err().to_string();
    assert!(text.contains("belongs to a device"), "{text}");
}

#[test]
fn a_drafter_that_changed_on_disk_is_refused() {
    let written = write(&generated(&tiny()), options(2, 0, Weights::Keep));
    let directory = tempfile::tempdir().unwrap();
    let device = written.path(Role::Device);
    let parts = drafter(&written, DrafterArchitecture::Deep);
    add_drafter(&device, &save(&parts, directory.path())).unwrap();
    let path = device.join("adapter.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let text = written.open(Role::Device).unwrap().adapter().err().unwrap().to_string();
    assert!(text.contains("adapter.safetensors") && text.contains("BLAKE3"), "{text}");
    std::fs::write(&path, &bytes[..last]).unwrap();
    let text = written.open(Role::Device).unwrap_err().to_string();
    assert!(text.contains("adapter.safetensors") && text.contains("bytes"), "{text}");
}
