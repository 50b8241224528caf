//! Every type against llama.cpp's dequantiser; `tests/types/make.py` made the files.

use super::*;
use crate::layout::dequantise_row;

/// Blocks of a golden file and their numbers.
fn golden(kind: &GgufType, file: &[u8]) -> (Vec<u8>, Vec<f32>) {
    let (weights, bytes) = kind.block;
    let blocks = file.len() / (bytes + 4 * weights);
    let (blocks, numbers) = file.split_at(blocks * bytes);
    let numbers = numbers.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
    (blocks.to_vec(), numbers.collect())
}

/// Numbers of the rows that a type is read as, in rows of 256.
fn numbers(kind: &'static GgufType, blocks: Vec<u8>) -> (DType, DType, Vec<f32>) {
    let k = 256;
    let rows = blocks.len() / kind.row_bytes(k).unwrap();
    let (dtype, content, origin) = kind.read(TensorBytes::owned(blocks));
    let mut numbers = vec![0.0; rows * k];
    for (row, out) in numbers.chunks_exact_mut(k).enumerate() {
        let mut bytes = vec![0xAA; dtype.row_bytes(k).unwrap()];
        match &content {
            Rows::Stored(stored) => {
                let stored = &stored[row * bytes.len()..];
                bytes.copy_from_slice(&stored[..dtype.row_bytes(k).unwrap()]);
            }
            Rows::Made(made) => made.make(row, k, &mut bytes),
        }
        dequantise_row(dtype, k, &bytes, out);
    }
    (dtype, origin.kept, numbers)
}

macro_rules! golden {
    ($(
        $test:ident: $number:literal, $file:literal, read as $dtype:ident, kept as $kept:ident;
    )*) => {$(
        #[test]
        fn $test() {
            let kind = GgufType::of($number).unwrap();
            let file = include_bytes!(concat!("../../../tests/types/", $file));
            let (blocks, expected) = golden(kind, file);
            assert!(expected.len() >= 1024 && expected.iter().any(|x| *x != 0.0));
            let (dtype, kept, numbers) = numbers(kind, blocks);
            assert_eq!((dtype, kept), (DType::$dtype, DType::$kept));
            for (i, (x, expected)) in numbers.iter().zip(&expected).enumerate() {
                assert_eq!(x.to_bits(), expected.to_bits(), "weight {i}: {x:e}, not {expected:e}");
            }
        }
    )*};
}

golden! {
    q5_0_is_llama_cpps: 6, "q5_0.bin", read as Q8_0, kept as Q8_0;
    q5_1_is_llama_cpps: 7, "q5_1.bin", read as F32, kept as F16;
    q2_k_is_llama_cpps: 10, "q2_k.bin", read as F32, kept as F16;
    q3_k_is_llama_cpps: 11, "q3_k.bin", read as Q6K, kept as Q6K;
    q4_k_is_llama_cpps: 12, "q4_k.bin", read as F32, kept as F16;
    q5_k_is_llama_cpps: 13, "q5_k.bin", read as F32, kept as F16;
    q6_k_is_llama_cpps: 14, "q6_k.bin", read as Q6K, kept as Q6K;
    iq4_nl_is_llama_cpps: 20, "iq4_nl.bin", read as Q8_0, kept as Q8_0;
    iq4_xs_is_llama_cpps: 23, "iq4_xs.bin", read as F32, kept as F16;
    mxfp4_is_llama_cpps: 39, "mxfp4.bin", read as Q8_0, kept as Q8_0;
    mxfp4_beyond_f16_is_llama_cpps: 39, "mxfp4_wide.bin", read as Bf16, kept as Bf16;
}

#[test]
fn each_type_has_one_row() {
    for (i, kind) in TYPES.iter().enumerate() {
        let same = |other: &GgufType| other.number == kind.number || other.name == kind.name;
        assert!(!TYPES[i + 1..].iter().any(same), "{} has two rows", kind.name);
        if let Some(Same(dtype)) = kind.form {
            assert_eq!(kind.block, (dtype.block_weights(), dtype.block_bytes()), "{}", kind.name);
        }
    }
}
