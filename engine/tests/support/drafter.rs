//! A trained drafter that was trained on nothing.

use std::path::Path;

use hat_loader::layout::quantise_q8_0;
use hat_loader::{DType, DrafterArchitecture, add_drafter};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, serialize_to_file};

use super::Bundles;

/// Puts a drafter of noise into the device's half: right by accident alone.
pub fn add_noise(bundles: &Bundles, kind: DrafterArchitecture) {
    add_noise_at(&bundles.path, kind);
}

/// The same, given the folder of both halves.
pub fn add_noise_at(bundles: &Path, kind: DrafterArchitecture) {
    let file = bundles.join("drafter.safetensors");
    write_noise(bundles, kind, 1, &file);
    add_drafter(&bundles.join("device"), &file).unwrap();
}

/// Writes a drafter of noise for the device's half and the rows after `split_layer` layers.
pub fn write_noise(bundles: &Path, kind: DrafterArchitecture, split_layer: usize, file: &Path) {
    let path = bundles.join("device");
    let half = hat_loader::Bundle::open(&path).unwrap();
    let mut state = 1u32;
    let mut noise = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    let mut tensors = Vec::new();
    for (name, shape) in kind.tensors(half.config()) {
        let count = shape.iter().product();
        let numbers: Vec<f32> = (0..count).map(|_| noise()).collect();
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
        tensors.push((name.to_owned(), tensor.0, tensor.1, tensor.2));
    }
    let tokens: Vec<u8> = (0..half.config().vocab_size as u32).flat_map(u32::to_le_bytes).collect();
    tensors.push(("vocabulary".into(), Dtype::U32, vec![tokens.len() / 4], tokens));
    let texts = [
        ("format_version", "1".to_owned()),
        ("kind", kind.name().to_owned()),
        ("model_id", half.model_id().to_string()),
        ("split_layer", split_layer.to_string()),
    ];
    let texts = texts.map(|(name, text)| (name.to_owned(), text)).into_iter().collect();
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    serialize_to_file(views, Some(texts), file).unwrap();
}
