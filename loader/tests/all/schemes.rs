//! Quantised matrices of Hugging Face directories: GPTQ, AWQ, compressed-tensors, FP8.

use std::path::Path;

use half::{bf16, f16};
use hat_loader::layout::dequantise_row;
use hat_loader::{
    BundleOptions, DType, LoadError, SourceModel, TinyModel, Weights, generated, write_bundles,
};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use crate::files::{edit_json, write_directory};

const MODULE: &str = "model.layers.1.mlp.down_proj";
const N: usize = 64;
const K: usize = 128;

/// One tensor of the module.
type Part = (&'static str, Dtype, Vec<usize>, Vec<u8>);

/// A matrix before it is packed.
struct Numbers {
    group: usize,
    code: fn(usize, usize) -> i32,
    zero: fn(usize, usize) -> i32,
}

fn mix(n: usize, k: usize) -> usize {
    (n * 7919 + k * 104_729 + n * k * 31) >> 3
}

fn nibble(n: usize, k: usize) -> i32 {
    (mix(n, k) % 16) as i32
}

fn byte(n: usize, k: usize) -> i32 {
    (mix(n, k) % 256) as i32
}

fn eight(_: usize, _: usize) -> i32 {
    8
}

fn some_zero(n: usize, group: usize) -> i32 {
    (mix(n, group * 77) % 15 + 1) as i32
}

/// A scale with few bits, so that f16 and bf16 hold it.
fn scale(n: usize, group: usize) -> f32 {
    (1 + mix(n, group * 13) % 100) as f32 / 4096.0
}

fn words(values: impl Iterator<Item = u32>) -> Vec<u8> {
    values.flat_map(u32::to_le_bytes).collect()
}

fn word(bits: u32, mut value: impl FnMut(usize) -> i32) -> u32 {
    (0..32 / bits).fold(0, |word, i| word | (value(i as usize) as u32) << (i * bits))
}

impl Numbers {
    fn groups(&self) -> usize {
        K.div_ceil(self.group)
    }

    fn expected(&self) -> Vec<f32> {
        let number = |n: usize, k: usize| {
            let group = k / self.group;
            scale(n, group) * ((self.code)(n, k) - (self.zero)(n, group)) as f32
        };
        (0..N).flat_map(|n| (0..K).map(move |k| number(n, k))).collect()
    }

    /// `[groups][N]`, as GPTQ and AWQ have them.
    fn turned_scales(&self) -> Part {
        let numbers = (0..self.groups()).flat_map(|g| (0..N).map(move |n| scale(n, g)));
        let bytes = numbers.flat_map(|x| f16::from_f32(x).to_le_bytes()).collect();
        ("scales", Dtype::F16, vec![self.groups(), N], bytes)
    }

    fn gptq(&self, bits: u32, offset: i32) -> Vec<Part> {
        let each = 32 / bits as usize;
        let codes = (0..K / each).flat_map(|at| (0..N).map(move |n| (at, n)));
        let codes = codes.map(|(at, n)| word(bits, |i| (self.code)(n, at * each + i)));
        let zeros = (0..self.groups()).flat_map(|g| (0..N / each).map(move |at| (g, at)));
        let zeros = zeros.map(|(g, at)| word(bits, |i| (self.zero)(at * each + i, g) - offset));
        let order = words((0..K).map(|k| (k / self.group) as u32));
        vec![
            ("qweight", Dtype::I32, vec![K / each, N], words(codes)),
            ("qzeros", Dtype::I32, vec![self.groups(), N / each], words(zeros)),
            ("g_idx", Dtype::I32, vec![K], order),
            self.turned_scales(),
        ]
    }

    fn awq(&self) -> Vec<Part> {
        const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
        let codes = (0..K).flat_map(|k| (0..N / 8).map(move |at| (k, at)));
        let codes = codes.map(|(k, at)| word(4, |i| (self.code)(at * 8 + ORDER[i], k)));
        let zeros = (0..self.groups()).flat_map(|g| (0..N / 8).map(move |at| (g, at)));
        let zeros = zeros.map(|(g, at)| word(4, |i| (self.zero)(at * 8 + ORDER[i], g)));
        vec![
            ("qweight", Dtype::I32, vec![K, N / 8], words(codes)),
            ("qzeros", Dtype::I32, vec![self.groups(), N / 8], words(zeros)),
            self.turned_scales(),
        ]
    }

    /// `[N][groups]` as bf16.
    fn scales(&self) -> Part {
        let numbers = (0..N).flat_map(|n| (0..self.groups()).map(move |g| scale(n, g)));
        let bytes = numbers.flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect();
        ("weight_scale", Dtype::BF16, vec![N, self.groups()], bytes)
    }

    fn packed(&self, symmetric: bool) -> Vec<Part> {
        let codes = (0..N).flat_map(|n| (0..K / 8).map(move |at| (n, at)));
        let codes = codes.map(|(n, at)| word(4, |i| (self.code)(n, at * 8 + i)));
        let shape = [N as u64, K as u64].iter().flat_map(|x| x.to_le_bytes()).collect();
        let mut parts = vec![
            ("weight_packed", Dtype::I32, vec![N, K / 8], words(codes)),
            ("weight_shape", Dtype::I64, vec![2], shape),
            self.scales(),
        ];
        if !symmetric {
            let zeros = (0..N / 8).flat_map(|at| (0..self.groups()).map(move |g| (at, g)));
            let zeros = zeros.map(|(at, g)| word(4, |i| (self.zero)(at * 8 + i, g)));
            let shape = vec![N / 8, self.groups()];
            parts.push(("weight_zero_point", Dtype::I32, shape, words(zeros)));
        }
        parts
    }

    /// Codes and zeros less 128.
    fn bytes(&self, symmetric: bool) -> Vec<Part> {
        let codes = (0..N).flat_map(|n| (0..K).map(move |k| (n, k)));
        let codes = codes.map(|(n, k)| ((self.code)(n, k) - 128) as u8).collect();
        let mut parts = vec![("weight", Dtype::I8, vec![N, K], codes), self.scales()];
        if !symmetric {
            let zeros = (0..N).flat_map(|n| (0..self.groups()).map(move |g| (n, g)));
            let zeros = zeros.map(|(n, g)| ((self.zero)(n, g) - 128) as u8).collect();
            parts.push(("weight_zero_point", Dtype::I8, vec![N, self.groups()], zeros));
        }
        parts
    }
}

fn gptq(bits: u32, group: i64) -> Value {
    json!({"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": false})
}

fn awq(group: i64) -> Value {
    json!({"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": true,
           "version": "gemm"})
}

fn compressed(format: &str, weights: Value) -> Value {
    json!({"quant_method": "compressed-tensors", "format": format, "ignore": ["lm_head"],
           "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}})
}

fn packed(symmetric: bool, group: usize) -> Value {
    compressed(
        "pack-quantized",
        json!({"num_bits": 4, "type": "int", "strategy": "group",
                                        "group_size": group, "symmetric": symmetric}),
    )
}

fn bytes(symmetric: bool) -> Value {
    compressed(
        "int-quantized",
        json!({"num_bits": 8, "type": "int", "strategy": "channel",
                                       "symmetric": symmetric}),
    )
}

/// A directory whose module is made of `parts`.
fn directory(config: &Value, parts: &[Part]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let model = TinyModel { dtype: DType::F16, layers: 2, ..TinyModel::default() };
    write_directory(&generated(&model), directory.path(), 1);
    edit_json(&directory.path().join("config.json"), |json| {
        json["quantization_config"] = config.clone();
    });
    replace(directory.path(), &format!("{MODULE}.weight"), parts);
    directory
}

/// Puts the module's parts in the place of a tensor.
fn replace(directory: &Path, gone: &str, parts: &[Part]) {
    let path = directory.join("model.safetensors");
    let file = std::fs::read(&path).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let mut all: Vec<(String, TensorView<'_>)> =
        tensors.tensors().into_iter().filter(|(name, _)| name != gone).collect();
    for (name, dtype, shape, bytes) in parts {
        let view = TensorView::new(*dtype, shape.clone(), bytes).unwrap();
        all.push((format!("{MODULE}.{name}"), view));
    }
    let written = safetensors::serialize(all, None).unwrap();
    std::fs::write(path, written).unwrap();
}

/// Opens the directory and compares the module's numbers; returns its types as read and as kept.
fn check(config: &Value, parts: &[Part], expected: &[f32]) -> (DType, String) {
    let directory = directory(config, parts);
    let model = SourceModel::open(directory.path()).unwrap();
    let tensor = model.tensor(&format!("{MODULE}.weight")).unwrap();
    assert_eq!(tensor.shape, [N, K]);
    let row_bytes = tensor.dtype.row_bytes(K).unwrap();
    let mut numbers = vec![0.0; N * K];
    for (row, out) in tensor.bytes.chunks_exact(row_bytes).zip(numbers.chunks_exact_mut(K)) {
        dequantise_row(tensor.dtype, K, row, out);
    }
    for (i, (got, expected)) in numbers.iter().zip(expected).enumerate() {
        assert_eq!(got, expected, "[{}, {}] by {config}", i / K, i % K);
    }
    let options = BundleOptions { split_layer: 1, tail_layers: 0, weights: Weights::Keep };
    let out = directory.path().join("out");
    let report = write_bundles(&model, options, &out, &mut |_| {}).unwrap();
    let method = config["quant_method"].as_str().unwrap();
    let row = report.types.iter().find(|row| row.from.starts_with(method)).unwrap();
    assert_eq!((row.tensors, row.is_exact), (1, row.stored == tensor.dtype.name()), "{row:?}");
    (tensor.dtype, row.stored.to_owned())
}

fn as_blocks(dtype: DType) -> (DType, String) {
    (dtype, dtype.name().to_owned())
}

fn as_numbers() -> (DType, String) {
    (DType::F32, "f16".to_owned())
}

#[test]
fn gptq_is_four_or_eight_bits_with_the_same_numbers() {
    let even = Numbers { group: 32, code: nibble, zero: eight };
    let got = check(&gptq(4, 32), &even.gptq(4, 1), &even.expected());
    assert_eq!(got, as_blocks(DType::Q4_0));
    let mut second = gptq(4, 32);
    second["checkpoint_format"] = json!("gptq_v2");
    assert_eq!(check(&second, &even.gptq(4, 0), &even.expected()), as_blocks(DType::Q4_0));

    let uneven = Numbers { group: 64, code: nibble, zero: some_zero };
    let got = check(&gptq(4, 64), &uneven.gptq(4, 1), &uneven.expected());
    assert_eq!(got, as_blocks(DType::Q8_0));
    let whole = Numbers { group: K, code: nibble, zero: some_zero };
    let got = check(&gptq(4, -1), &whole.gptq(4, 1), &whole.expected());
    assert_eq!(got, as_blocks(DType::Q8_0));

    let wide = Numbers { group: 32, code: byte, zero: |_, _| 128 };
    let got = check(&gptq(8, 32), &wide.gptq(8, 1), &wide.expected());
    assert_eq!(got, as_blocks(DType::Q8_0));
    let shifted = Numbers { group: 32, code: byte, zero: |n, _| 100 + n as i32 };
    assert_eq!(check(&gptq(8, 32), &shifted.gptq(8, 1), &shifted.expected()), as_numbers());
    let short = Numbers { group: 32, code: |n, k| nibble(n, k) % 4, zero: |_, _| 2 };
    let got = check(&gptq(2, 32), &short.gptq(2, 1), &short.expected());
    assert_eq!(got, as_blocks(DType::Q4_0));
    // Groups that are no whole blocks have no block type.
    let narrow = Numbers { group: 16, code: nibble, zero: eight };
    assert_eq!(check(&gptq(4, 16), &narrow.gptq(4, 1), &narrow.expected()), as_numbers());
}

#[test]
fn awq_has_its_columns_in_an_order_of_its_own() {
    let uneven = Numbers { group: 64, code: nibble, zero: some_zero };
    let got = check(&awq(64), &uneven.awq(), &uneven.expected());
    assert_eq!(got, as_blocks(DType::Q8_0));
    let even = Numbers { group: 128, code: nibble, zero: eight };
    assert_eq!(check(&awq(128), &even.awq(), &even.expected()), as_blocks(DType::Q4_0));
}

#[test]
fn compressed_tensors_of_whole_numbers() {
    let even = Numbers { group: 32, code: nibble, zero: eight };
    let got = check(&packed(true, 32), &even.packed(true), &even.expected());
    assert_eq!(got, as_blocks(DType::Q4_0));
    let uneven = Numbers { group: 64, code: nibble, zero: some_zero };
    let got = check(&packed(false, 64), &uneven.packed(false), &uneven.expected());
    assert_eq!(got, as_blocks(DType::Q8_0));
    let wide = Numbers { group: K, code: byte, zero: |_, _| 128 };
    let mut parts = wide.bytes(true);
    // Activations are quantised in blocks here, whatever the model's own scale for them.
    parts.push(("input_scale", Dtype::F32, vec![1], 0.5f32.to_le_bytes().to_vec()));
    assert_eq!(check(&bytes(true), &parts, &wide.expected()), as_blocks(DType::Q8_0));
    let shifted = Numbers { group: K, code: byte, zero: |n, _| 100 + n as i32 };
    let got = check(&bytes(false), &shifted.bytes(false), &shifted.expected());
    assert_eq!(got, as_numbers());
}

#[test]
fn a_scale_that_no_f16_holds_makes_numbers() {
    let even = Numbers { group: K, code: byte, zero: |_, _| 128 };
    let mut parts = even.bytes(true);
    let scales = (0..N).flat_map(|n| (scale(n, 0) / 3.0).to_le_bytes()).collect();
    parts[1] = ("weight_scale", Dtype::F32, vec![N, 1], scales);
    let expected: Vec<f32> =
        (0..N * K).map(|i| scale(i / K, 0) / 3.0 * (byte(i / K, i % K) - 128) as f32).collect();
    assert_eq!(check(&bytes(true), &parts, &expected), as_numbers());
}

/// The number of an E4M3 byte by its definition, in f64.
fn e4m3(byte: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f64::from(byte & 7));
    let magnitude = match exponent {
        0 => mantissa / 8.0 * 2f64.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
    };
    if byte < 128 { magnitude } else { -magnitude }
}

#[test]
fn fp8_has_a_scale_for_each_block_or_for_all() {
    let code = |n: usize, k: usize| match byte(n, k) as u8 {
        0x7f | 0xff => 0x40,
        other => other,
    };
    let codes: Vec<u8> = (0..N * K).map(|i| code(i / K, i % K)).collect();
    let part = |name, shape: Vec<usize>, scales: Vec<f32>| {
        let bytes = scales.iter().flat_map(|x| x.to_le_bytes()).collect();
        vec![
            ("weight", Dtype::F8_E4M3, vec![N, K], codes.clone()),
            (name, Dtype::F32, shape, bytes),
        ]
    };
    let expected = |scale: &dyn Fn(usize, usize) -> f32| -> Vec<f32> {
        let number = |i: usize| scale(i / K, i % K) * e4m3(codes[i]) as f32;
        (0..N * K).map(number).collect()
    };
    // Blocks of 48 rows: the last one is cut.
    let of_block = |n: usize, k: usize| 0.003 * (1 + n / 48 * 4 + k / 32) as f32;
    let scales = (0..2 * 4).map(|i| of_block(i / 4 * 48, i % 4 * 32)).collect();
    let config = json!({"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
                        "weight_block_size": [48, 32]});
    let got = check(&config, &part("weight_scale_inv", vec![2, 4], scales), &expected(&of_block));
    assert_eq!(got, as_numbers());

    let config = json!({"quant_method": "fp8", "activation_scheme": "static"});
    let got = check(&config, &part("weight_scale", vec![], vec![0.01]), &expected(&|_, _| 0.01));
    assert_eq!(got, as_numbers());
    let weights = json!({"num_bits": 8, "type": "float", "strategy": "channel"});
    let scales = (0..N).map(|n| scale(n, 0)).collect();
    let parts = part("weight_scale", vec![N, 1], scales);
    let config = compressed("float-quantized", weights);
    assert_eq!(check(&config, &parts, &expected(&|n, _| scale(n, 0))), as_numbers());
}

/// The error must contain `text`.
fn refused(config: &Value, parts: &[Part], text: &str) {
    let directory = directory(config, parts);
    let error = SourceModel::open(directory.path()).unwrap_err().to_string();
    assert!(error.contains(text), "{error}");
}

#[test]
fn schemes_that_are_not_read_are_refused_by_key() {
    let parts = Numbers { group: 32, code: nibble, zero: eight }.gptq(4, 1);
    let with = |key: &str, value: Value| {
        let mut config = gptq(4, 32);
        config[key] = value;
        config
    };
    let key = "quantization_config";
    refused(&json!({"quant_method": "hqq"}), &parts, "quantization_config: \"hqq\"");
    refused(&with("desc_act", json!(true)), &parts, &format!("{key}.desc_act: true"));
    refused(&with("bits", json!(3)), &parts, &format!("{key}.bits: 3"));
    refused(&with("group_size", json!(0)), &parts, &format!("{key}.group_size: 0"));
    refused(&with("checkpoint_format", json!("marlin")), &parts, "marlin");
    let mut gemv = awq(32);
    gemv["version"] = json!("gemv");
    refused(&gemv, &parts, &format!("{key}.version: \"gemv\""));
    let mut two = packed(true, 32);
    two["config_groups"]["group_1"] = json!({});
    refused(&two, &parts, &format!("{key}.config_groups"));
    let mut other = packed(true, 32);
    other["format"] = json!("nvfp4-pack-quantized");
    refused(&other, &parts, &format!("{key}.format: \"nvfp4-pack-quantized\""));
    let fp8 = json!({"quant_method": "fp8", "weight_block_size": [128]});
    refused(&fp8, &parts, &format!("{key}.weight_block_size"));
}

#[test]
fn parts_that_do_not_fit_are_refused_by_name() {
    let numbers = Numbers { group: 32, code: nibble, zero: eight };
    let good = numbers.gptq(4, 1);
    let change = |index: usize, change: &dyn Fn(&mut Part)| {
        let mut parts = good.clone();
        change(&mut parts[index]);
        parts
    };
    let config = gptq(4, 32);
    let mut without = good.clone();
    without.truncate(3);
    refused(&config, &without, "down_proj.scales is missing");
    let zeros = change(1, &|part| {
        part.2 = vec![2, 16];
    });
    refused(&config, &zeros, "down_proj.qzeros: expected one of [I32] in one of [[4, 8]]");
    let order = change(2, &|part| part.3[4 * 40..4 * 41].copy_from_slice(&3u32.to_le_bytes()));
    refused(&config, &order, "down_proj.g_idx: expected 1 for row 40 (act-order");
    let flat = change(0, &|part| part.2 = vec![16 * 64]);
    refused(&config, &flat, "down_proj.qweight: expected I32 of two dimensions");
    let empty = change(0, &|part| (part.2, part.3) = (vec![0, 64], Vec::new()));
    refused(&config, &empty, "down_proj.qweight: expected I32 of two dimensions");
    // The scheme's codes, but no scheme; and another scheme's.
    refused(&Value::Null, &good, "expected f32, f16 or bf16, got I32");
    refused(&packed(true, 32), &good, "expected f32, f16 or bf16, got I32");
    let mut lying = numbers.packed(true);
    lying[1].3[8..].copy_from_slice(&96u64.to_le_bytes());
    refused(&packed(true, 32), &lying, "down_proj.weight_shape: expected [64, K], 16 words of K");

    let directory = directory(&config, &[]);
    let twice = [&good[..], &[("weight", Dtype::F16, vec![N, K], vec![0; 2 * N * K])]].concat();
    replace(directory.path(), "", &twice);
    match SourceModel::open(directory.path()) {
        Err(LoadError::TensorMismatch { name, expected, .. }) => {
            assert!(name.ends_with("down_proj.weight") && expected.contains("quantised"));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_scale_that_is_no_number_is_found_when_the_bundle_is_written() {
    let mut parts = Numbers { group: 32, code: nibble, zero: eight }.gptq(4, 1);
    parts[3].3[..2].copy_from_slice(&f16::NAN.to_le_bytes());
    let directory = directory(&gptq(4, 32), &parts);
    let model = SourceModel::open(directory.path()).unwrap();
    let options = BundleOptions { split_layer: 1, tail_layers: 0, weights: Weights::Keep };
    let out = directory.path().join("out");
    let error = write_bundles(&model, options, &out, &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("down_proj.weight") && error.contains("row 0 holds NaN"), "{error}");
    assert!(!out.exists());
}
