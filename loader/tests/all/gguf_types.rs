//! Types of GGUF files that have no kernels: as what they are read and kept.

use hat_loader::layout::{dequantise_row, unpack};
use hat_loader::{
    Bundle, BundleError, BundleOptions, DType, GgufError, SourceModel, TinyModel, Weights,
    generated, write_bundles,
};

use crate::files::gguf::{Gguf, open, refused, tiny};

const NAME: &str = "model.layers.1.self_attn.q_proj.weight";

/// A type: number, name, weights and bytes of a block, golden file, types as read and as kept.
struct Case {
    number: u32,
    name: &'static str,
    block: (usize, usize),
    golden: &'static [u8],
    read: DType,
    kept: DType,
}

macro_rules! case {
    ($number:literal, $name:literal, $block:expr, $file:literal, $read:ident, $kept:ident) => {
        Case {
            number: $number,
            name: $name,
            block: $block,
            golden: include_bytes!(concat!("../types/", $file)),
            read: DType::$read,
            kept: DType::$kept,
        }
    };
}

const CASES: &[Case] = &[
    case!(6, "Q5_0", (32, 22), "q5_0.bin", Q8_0, Q8_0),
    case!(7, "Q5_1", (32, 24), "q5_1.bin", F32, F16),
    case!(10, "Q2_K", (256, 84), "q2_k.bin", F32, F16),
    case!(11, "Q3_K", (256, 110), "q3_k.bin", Q6K, Q6K),
    case!(12, "Q4_K", (256, 144), "q4_k.bin", F32, F16),
    case!(13, "Q5_K", (256, 176), "q5_k.bin", F32, F16),
    case!(20, "IQ4_NL", (32, 18), "iq4_nl.bin", Q8_0, Q8_0),
    case!(23, "IQ4_XS", (256, 136), "iq4_xs.bin", F32, F16),
    case!(39, "MXFP4", (32, 17), "mxfp4.bin", Q8_0, Q8_0),
];

impl Case {
    /// Blocks that llama.cpp's quantiser wrote, the latter half of the file; and their numbers.
    fn quantised(&self) -> (Vec<u8>, Vec<f32>) {
        self.half(1)
    }

    fn half(&self, half: usize) -> (Vec<u8>, Vec<f32>) {
        let (weights, bytes) = self.block;
        let count = self.golden.len() / (bytes + 4 * weights) / 2;
        let (blocks, numbers) = self.golden.split_at(2 * count * bytes);
        let numbers = numbers.chunks_exact(4).map(|x| f32::from_le_bytes(x.try_into().unwrap()));
        (
            blocks[half * count * bytes..][..count * bytes].to_vec(),
            numbers.skip(half * count * weights).take(count * weights).collect(),
        )
    }

    /// A file whose q of layer 1 is of this type.
    fn gguf(&self, blocks: &[u8]) -> Gguf {
        let model = TinyModel { hidden: 256, dtype: DType::F16, ..tiny() };
        let mut gguf = Gguf::of(&generated(&model));
        let tensor = gguf.tensor("blk.1.attn_q.weight");
        let weights: u64 = tensor.dimensions.iter().product();
        let bytes = weights as usize / self.block.0 * self.block.1;
        tensor.kind = self.number;
        tensor.bytes = blocks.iter().copied().cycle().take(bytes).collect();
        gguf
    }
}

fn numbers(dtype: DType, k: usize, bytes: &[u8]) -> Vec<f32> {
    let row_bytes = dtype.row_bytes(k).unwrap();
    let mut out = vec![0.0; bytes.len() / row_bytes * k];
    for (row, out) in bytes.chunks_exact(row_bytes).zip(out.chunks_exact_mut(k)) {
        dequantise_row(dtype, k, row, out);
    }
    out
}

/// Rows of 256 numbers in the order of `config.json`'s models: 4 heads of 16.
fn half_split(numbers: &[f32]) -> Vec<f32> {
    let mut out = Vec::new();
    for head in 0..4 {
        for half in 0..2 {
            for pair in 0..8 {
                let row = head * 16 + 2 * pair + half;
                out.extend((0..256).map(|i| numbers[(row * 256 + i) % numbers.len()]));
            }
        }
    }
    out
}

fn split(model: &SourceModel) -> Result<(hat_loader::Report, Bundle), BundleError> {
    let parent = tempfile::tempdir().unwrap();
    let out = parent.path().join("out");
    let options = BundleOptions { split_layer: 1, tail_layers: 0, weights: Weights::Keep };
    let report = write_bundles(model, options, &out, &mut |_| {});
    if report.is_err() {
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 0, "something is left");
    }
    Ok((report?, Bundle::open(&out.join("cloud"))?))
}

#[test]
fn each_type_keeps_its_numbers_from_the_file_to_the_bundle() {
    for case in CASES {
        let (blocks, golden) = case.quantised();
        let expected = half_split(&golden);
        let model = open(&case.gguf(&blocks)).unwrap();
        let tensor = model.tensor(NAME).unwrap();
        assert_eq!(tensor.dtype, case.read, "{}", case.name);
        assert!(numbers(case.read, 256, &tensor.bytes) == expected, "{}", case.name);

        let (report, bundle) = split(&model).unwrap();
        let stored = bundle.tensor(NAME).unwrap();
        assert_eq!(stored.dtype, case.kept, "{}", case.name);
        let mut rows = vec![0; case.kept.row_bytes(256).unwrap() * 64];
        unpack(case.kept, 64, 256, &stored.bytes, &mut rows);
        let is_exact = case.read == case.kept;
        let round = |x: &f32| if is_exact { *x } else { half::f16::from_f32(*x).to_f32() };
        let expected: Vec<f32> = expected.iter().map(round).collect();
        assert!(numbers(case.kept, 256, &rows) == expected, "{}", case.name);

        let row = report.types.iter().find(|row| row.from == case.name).unwrap();
        assert_eq!((row.stored, row.is_exact, row.tensors), (case.kept.name(), is_exact, 1));
        assert_eq!(row.bits, case.block.1 as f64 * 8.0 / case.block.0 as f64);
        assert_eq!(row.stored_bits, case.kept.bits());
        let others: usize = report.types.iter().map(|row| row.tensors).sum();
        assert_eq!(others, model.tensor_names().count());
    }
}

#[test]
fn a_scale_beyond_f16_makes_mxfp4_bf16() {
    let golden = include_bytes!("../types/mxfp4_wide.bin");
    let case = Case {
        golden,
        read: DType::Bf16,
        kept: DType::Bf16,
        ..case!(39, "MXFP4", (32, 17), "mxfp4.bin", Q8_0, Q8_0)
    };
    let count = golden.len() / (17 + 4 * 32);
    let expected: Vec<f32> = golden[count * 17..]
        .chunks_exact(4)
        .map(|x| f32::from_le_bytes(x.try_into().unwrap()))
        .collect();
    let model = open(&case.gguf(&golden[..count * 17])).unwrap();
    let tensor = model.tensor(NAME).unwrap();
    assert_eq!(tensor.dtype, DType::Bf16);
    assert!(numbers(DType::Bf16, 256, &tensor.bytes) == half_split(&expected));
    let (report, _) = split(&model).unwrap();
    let row = report.types.iter().find(|row| row.from == "MXFP4").unwrap();
    assert_eq!((row.stored, row.is_exact), ("bf16", true));
}

/// The first half of a golden file has scales that no sane file has: numbers beyond f16.
#[test]
fn a_number_beyond_f16_is_refused_by_row_and_nothing_is_left() {
    let beyond =
        |case: &&Case| case.kept == DType::F16 && case.half(0).1.iter().any(|x| x.abs() > 65_520.0);
    assert!(CASES.iter().filter(beyond).count() >= 3);
    for case in CASES.iter().filter(beyond) {
        let model = open(&case.gguf(&case.half(0).0)).unwrap();
        match split(&model) {
            Err(BundleError::Convert { name, dtype, reason }) => {
                assert_eq!((name.as_str(), dtype), (NAME, "f16"));
                assert!(reason.starts_with("row "), "{reason}");
            }
            other => panic!("{}: {other:?}", case.name),
        }
    }
}

#[test]
fn rows_that_are_no_whole_blocks_are_refused() {
    for case in CASES {
        let (weights, bytes) = case.block;
        let mut gguf = case.gguf(&case.quantised().0);
        let tensor = gguf.tensor("blk.1.attn_q.weight");
        tensor.dimensions[0] -= 16;
        tensor.bytes.truncate(64 * (240 / weights).max(1) * bytes);
        match refused(&gguf) {
            GgufError::Blocks { tensor, row: 240, block } => {
                assert_eq!((tensor.as_str(), block), ("blk.1.attn_q.weight", weights));
            }
            other => panic!("{}: {other}", case.name),
        }
    }
}

#[test]
fn a_file_that_ends_within_a_block_is_refused() {
    for case in CASES {
        let mut gguf = case.gguf(&case.quantised().0);
        let mut tensor = gguf.tensor("blk.1.attn_q.weight").clone();
        gguf.tensors.retain(|other| other.name != tensor.name);
        // The last one, so that the file ends with it; one block is missing.
        tensor.bytes.truncate(tensor.bytes.len() - case.block.1 - 32);
        gguf.tensors.push(tensor);
        match refused(&gguf) {
            GgufError::Outside { tensor, .. } => assert_eq!(tensor, "blk.1.attn_q.weight"),
            other => panic!("{}: {other}", case.name),
        }
    }
}
