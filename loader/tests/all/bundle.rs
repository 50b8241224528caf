//! Bundles: what is written comes back.

use std::collections::HashSet;

use crate::files::bundle::{options, tiny, write};
use hat_loader::layout::{dequantise_row, unpack};
use hat_loader::{
    Bundle, BundleError, BundleOptions, DType, Family, Layout, Role, SourceModel, TinyModel,
    Weights, check_same_model, generated, write_bundles,
};

/// A tensor's bytes in row order.
fn rows(bundle: &Bundle, name: &str) -> (DType, Vec<usize>, Vec<u8>) {
    let tensor = bundle.tensor(name).unwrap();
    let bytes = match tensor.layout {
        Layout::Panel16 => {
            let (n, k) = (tensor.shape[0], tensor.shape[1]);
            let mut rows = vec![0; n * tensor.dtype.row_bytes(k).unwrap()];
            unpack(tensor.dtype, n, k, &tensor.bytes, &mut rows);
            rows
        }
        _ => tensor.bytes.to_vec(),
    };
    (tensor.dtype, tensor.shape, bytes)
}

#[test]
fn every_source_row_is_in_exactly_one_half() {
    for dtype in [DType::F32, DType::F16, DType::Bf16, DType::Q8_0, DType::Q4_0, DType::Q4_1] {
        for (split, tail) in [(0, 0), (2, 0), (1, 3), (4, 0)] {
            let model = generated(&TinyModel { dtype, ..tiny() });
            let written = write(&model, options(split, tail, Weights::Keep));
            let halves = [Role::Device, Role::Cloud].map(|role| written.open(role).unwrap());
            check_same_model(&halves[0], &halves[1]).unwrap();
            let mut seen = HashSet::new();
            for half in &halves {
                half.verify().unwrap();
                for name in half.tensor_names() {
                    assert!(seen.insert(name.to_owned()), "{name} is in both");
                    let source = model.tensor(name).unwrap();
                    let (dtype, shape, bytes) = rows(half, name);
                    assert_eq!((dtype, &shape), (source.dtype, &source.shape), "{name}");
                    assert!(bytes == *source.bytes, "{name}");
                    let address = half.tensor(name).unwrap().bytes.as_ptr() as usize;
                    assert_eq!(address % 64, 0, "{name}");
                }
            }
            assert!(model.tensor_names().all(|name| seen.contains(name)));
        }
    }
}

#[test]
fn odd_shapes_keep_their_rows() {
    // 17-wide heads and vectors that fill no 64 bytes; q6_k needs rows of 256.
    let odd = TinyModel {
        hidden: 68,
        intermediate: 30,
        heads: 2,
        kv_heads: 1,
        head_dim: 34,
        vocab: 261,
        dtype: DType::F16,
        architecture: Family::Qwen2,
        ..tiny()
    };
    let wide =
        TinyModel { hidden: 256, intermediate: 256, head_dim: 64, dtype: DType::Q6K, ..tiny() };
    for tiny in [odd, wide] {
        let model = generated(&tiny);
        let written = write(&model, options(2, 1, Weights::Keep));
        for role in [Role::Device, Role::Cloud] {
            let half = written.open(role).unwrap();
            for name in half.tensor_names() {
                assert!(rows(&half, name).2 == *model.tensor(name).unwrap().bytes, "{name}");
            }
        }
    }
}

#[test]
fn each_half_holds_its_own_and_no_more() {
    let model = generated(&tiny());
    let written = write(&model, options(1, 1, Weights::Keep));
    let device = written.open(Role::Device).unwrap();
    let cloud = written.open(Role::Cloud).unwrap();
    assert_eq!((device.role(), cloud.role()), (Role::Device, Role::Cloud));
    assert_eq!(device.layers(), [0..1, 4..5]);
    assert_eq!(cloud.layers(), std::slice::from_ref(&(1..4)));
    assert!(cloud.holds(&(2..4)) && !cloud.holds(&(2..5)) && cloud.holds(&(0..0)));
    assert_eq!(device.config(), model.config());
    assert_eq!(device.tokenizer_json().unwrap().as_deref(), Some(model.tokenizer_json()));
    assert_eq!(device.token_settings(), Some(model.token_settings()));

    assert_eq!((cloud.tokenizer_json().unwrap(), cloud.token_settings()), (None, None));
    for name in ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"] {
        assert!(device.tensor(name).is_ok());
        assert!(matches!(cloud.tensor(name), Err(BundleError::MissingTensor { .. })));
    }
    let files = |role: Role| -> Vec<String> {
        let entries = std::fs::read_dir(written.path(role)).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    assert_eq!(files(Role::Cloud), ["bundle.json", "weights.safetensors"]);
    assert_eq!(
        files(Role::Device),
        ["bundle.json", "tokenizer.json", "tokenizer_config.json", "weights.safetensors"]
    );
    // The report counts what is on the disk.
    for (role, report) in
        [(Role::Device, &written.report.device), (Role::Cloud, &written.report.cloud)]
    {
        let on_disk: u64 = files(role)
            .iter()
            .map(|name| std::fs::metadata(written.path(role).join(name)).unwrap().len())
            .sum();
        assert_eq!(report.bytes, on_disk);
    }
}

#[test]
fn the_weights_are_a_safetensors_file() {
    let written = write(&generated(&tiny()), options(2, 0, Weights::Keep));
    let bytes = std::fs::read(written.path(Role::Device).join("weights.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let bundle = written.open(Role::Device).unwrap();
    let mut names = file.names();
    names.sort_unstable();
    let mut expected: Vec<&str> = bundle.tensor_names().collect();
    expected.sort_unstable();
    assert_eq!(names, expected);
    for name in names {
        let tensor = bundle.tensor(name).unwrap();
        assert!(file.tensor(name).unwrap().data()[..tensor.bytes.len()] == *tensor.bytes);
    }
}

#[test]
fn the_model_id_depends_on_the_model_alone() {
    let id =
        |tiny: &TinyModel, options: BundleOptions| write(&generated(tiny), options).report.model_id;
    let base = id(&tiny(), options(2, 0, Weights::Keep));
    assert_eq!(id(&tiny(), options(1, 2, Weights::Keep)), base);
    // Already eight bits: nothing changes.
    assert_eq!(id(&tiny(), options(2, 0, Weights::Q8)), base);
    assert_ne!(id(&tiny(), options(2, 0, Weights::F16)), base);
    assert_ne!(id(&TinyModel { seed: 2, ..tiny() }, options(2, 0, Weights::Keep)), base);
    assert_ne!(id(&TinyModel { positions: 64, ..tiny() }, options(2, 0, Weights::Keep)), base);

    // The same model through a directory has the same id; one flipped bit has not.
    let model = generated(&TinyModel { dtype: DType::Bf16, ..tiny() });
    let base = write(&model, options(2, 0, Weights::Keep)).report.model_id;
    let directory = tempfile::tempdir().unwrap();
    crate::files::write_directory(&model, directory.path(), 2);
    let opened = SourceModel::open(directory.path()).unwrap();
    assert_eq!(write(&opened, options(3, 0, Weights::Keep)).report.model_id, base);
    drop(opened);
    let shard = directory.path().join("model-00001-of-00002.safetensors");
    let mut bytes = std::fs::read(&shard).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    let opened = SourceModel::open(directory.path()).unwrap();
    assert_ne!(write(&opened, options(2, 0, Weights::Keep)).report.model_id, base);
}

#[test]
fn the_model_id_is_fixed_for_good() {
    // Changes only with the format of the id itself, and that breaks every bundle out there.
    let model = generated(&TinyModel { layers: 2, dtype: DType::Q4_1, ..TinyModel::default() });
    let id = write(&model, options(1, 0, Weights::Keep)).report.model_id;
    assert_eq!(id.to_string(), "34139e348f81e6f535e9847b9eba22ea672cdd70bfefde46d090fed49ce12554");
    assert_eq!(id.to_string().parse(), Ok(id));
}

#[test]
fn conversions_stay_close() {
    let model = generated(&TinyModel { dtype: DType::F32, ..tiny() });
    // Largest error in units of the row's largest weight: half a step, and the f16 scale's own.
    let kinds = [
        (Weights::F16, DType::F16, 0.0005),
        (Weights::Q8, DType::Q8_0, 0.005),
        (Weights::Q4, DType::Q4_1, 0.07),
    ];
    for (weights, layer_dtype, tolerance) in kinds {
        let written = write(&model, options(2, 0, weights));
        for role in [Role::Device, Role::Cloud] {
            let half = written.open(role).unwrap();
            for name in half.tensor_names() {
                let source = model.tensor(name).unwrap();
                let (dtype, shape, bytes) = rows(&half, name);
                let &[_, k] = shape.as_slice() else {
                    assert!(dtype == DType::F32 && bytes == *source.bytes, "{name}");
                    continue;
                };
                let is_vocabulary = name.contains("embed_tokens") || name.contains("lm_head");
                let expected = match weights {
                    Weights::Q4 if is_vocabulary => DType::Q8_0,
                    _ => layer_dtype,
                };
                assert_eq!(dtype, expected, "{name}");
                let (mut before, mut after) = (vec![0.0; k], vec![0.0; k]);
                let stored = bytes.chunks(dtype.row_bytes(k).unwrap());
                for (source, stored) in source.bytes.chunks(4 * k).zip(stored) {
                    dequantise_row(DType::F32, k, source, &mut before);
                    dequantise_row(dtype, k, stored, &mut after);
                    let largest = before.iter().fold(0.0f32, |max, x| max.max(x.abs()));
                    for (a, b) in before.iter().zip(&after) {
                        assert!((a - b).abs() <= tolerance * largest, "{name}: {a} {b} {largest}");
                    }
                }
            }
        }
    }
}

#[test]
fn progress_reaches_the_end() {
    let parent = tempfile::tempdir().unwrap();
    let mut seen = Vec::new();
    let mut progress =
        |p: hat_loader::Progress<'_>| seen.push((p.tensor.to_owned(), p.bytes, p.bytes_total));
    let model = generated(&tiny());
    write_bundles(&model, options(2, 0, Weights::Keep), &parent.path().join("out"), &mut progress)
        .unwrap();
    assert_eq!(seen.len(), model.tensor_names().count());
    assert!(seen.windows(2).all(|pair| pair[0].1 < pair[1].1));
    assert!(seen.iter().all(|(_, bytes, total)| bytes < total));
}
