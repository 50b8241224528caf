//! GGUF files that lie: each way of being bad.

use crate::files::gguf::{
    Gguf, GgufTensor, Meta, assert_same_tensors, open, open_bytes, refused, refused_metadata,
    sentence_piece, tiny,
};
use hat_loader::{GgufError, LoadError, TinyModel, generated};

#[test]
fn vocabularies_that_lie_are_refused() {
    let good = Gguf::of(&generated(&tiny()));
    let with = |key: &str, value: Meta| {
        let mut gguf = good.clone();
        gguf.set(key, value);
        gguf
    };
    let texts = |texts: &[&str]| Meta::Texts(texts.iter().map(|&text| text.into()).collect());
    let tokens = "tokenizer.ggml.tokens";
    let merges = "tokenizer.ggml.merges";

    refused_metadata(
        &with("tokenizer.ggml.pre", Meta::Text("tekken".into())),
        "tokenizer.ggml.pre",
        "\"tekken\"",
    );
    refused_metadata(
        &with("tokenizer.ggml.model", Meta::Text("bert".into())),
        "tokenizer.ggml.model",
        "\"bert\"",
    );
    refused_metadata(&with(tokens, Meta::U32(7)), tokens, "not an array");
    refused_metadata(&with(tokens, Meta::I32s(vec![1])), tokens, "not a string");
    let many = Meta::Texts((0..513).map(|id| id.to_string()).collect());
    refused_metadata(&with(tokens, many), "tokenizer.ggml.token_type", "512 types");
    let mut many = with(tokens, Meta::Texts((0..513).map(|id| id.to_string()).collect()));
    many.remove("tokenizer.ggml.token_type");
    refused_metadata(&many, tokens, "513 tokens, but the embedding has 512 rows");
    refused_metadata(&with(merges, texts(&["a"])), merges, "is not two tokens");
    refused_metadata(&with("tokenizer.ggml.bos_token_id", Meta::U32(512)), "bos_token_id", "512");
    let types = Meta::I32s([9].repeat(512));
    refused_metadata(&with("tokenizer.ggml.token_type", types), "tokenizer.ggml.token_type", "9");

    let mut spm = good.clone();
    sentence_piece(&mut spm, &["a", "b"]);
    let mut nan = spm.clone();
    nan.set("tokenizer.ggml.scores", Meta::F32s(vec![f32::NAN; 261]));
    refused_metadata(&nan, "tokenizer.ggml.scores", "NaN");
    let mut few = spm.clone();
    few.set("tokenizer.ggml.scores", Meta::F32s(vec![0.0; 3]));
    refused_metadata(&few, "tokenizer.ggml.scores", "3 scores for 261 tokens");
    sentence_piece(&mut spm, &["x".repeat(257).as_str()]);
    refused_metadata(&spm, tokens, "257 bytes");
}

#[test]
fn configurations_that_lie_are_refused() {
    let good = Gguf::of(&generated(&tiny()));
    let check = |key: &str, value: Meta, named: &str, reason: &str| {
        let mut gguf = good.clone();
        gguf.set(key, value);
        refused_metadata(&gguf, named, reason);
    };
    // The key in the file is the one that is named.
    let same = |key: &str, value: Meta, reason: &str| check(key, value, key, reason);
    let text = |text: &str| Meta::Text(text.to_owned());
    same("general.architecture", text("gemma3"), "\"gemma3\"");
    same("general.architecture", text(&"x".repeat(1 << 20)), "...");
    same("llama.block_count", text("2"), "whole number");
    same("llama.block_count", Meta::I32(-2), "whole number");
    same("llama.attention.head_count_kv", Meta::I32s(vec![2, 1]), "layer");
    same("llama.rope.dimension_count", Meta::U32(8), "8");
    same("llama.rope.scaling.type", text("yarn"), "\"yarn\"");
    same("llama.expert_count", Meta::U32(8), "experts");
    same("split.count", Meta::U32(2), "-00001-of-00002.gguf");
    same("split.count", Meta::I32(-1), "whole number");
    let (layers, heads) = ("num_hidden_layers", "num_attention_heads");
    check("llama.block_count", Meta::U32(0), layers, "0");
    check("llama.block_count", Meta::U32(1_000_000), layers, "1000000");
    check("llama.attention.head_count", Meta::U32(0), heads, "0");
    let (key, named) = ("llama.attention.head_count_kv", "num_key_value_heads");
    check(key, Meta::U32(3), named, "3");
    let nan = Meta::F32(f32::NAN);
    check("llama.rope.freq_base", nan, "rope_theta", "NaN");
    let key = "llama.attention.layer_norm_rms_epsilon";
    check(key, Meta::F32(0.0), "rms_norm_eps", "0");
    let mut missing = good.clone();
    missing.remove("llama.context_length");
    refused_metadata(&missing, "llama.context_length", "missing");
    // The same number for each layer is one number.
    let mut array = good.clone();
    array.set("llama.attention.head_count_kv", Meta::I32s(vec![2, 2]));
    assert_eq!(open(&array).unwrap().config().num_key_value_heads, 2);
}

#[test]
fn keys_that_nobody_knows_are_refused_by_name() {
    let good = Gguf::of(&generated(&tiny()));
    for key in [
        "llama.layer_multiplier",
        "llama.rope.freq_base_swa",
        "llama.rope.scaling.unheard_of",
        "tokenizer.ggml.suppress_tokens",
        "tokenizer.unheard_of",
    ] {
        for value in [Meta::F32(2.0), Meta::Bool(true), Meta::Text("x".into())] {
            let mut gguf = good.clone();
            gguf.set(key, value);
            refused_metadata(&gguf, key, "not known");
            refused_metadata(&gguf, key, "--remove-metadata");
        }
    }
    // What describes the file, and what is another architecture's, says nothing about this one.
    let mut gguf = good.clone();
    for key in ["general.unheard_of", "gemma3.logit_scale", "imatrix.chunk_count", "split.no"] {
        gguf.set(key, Meta::U32(3));
    }
    let (plain, described) = (open(&good).unwrap(), open(&gguf).unwrap());
    assert_eq!(described.config(), plain.config());
}

#[test]
fn keys_are_harmless_only_with_a_neutral_value() {
    let good = Gguf::of(&generated(&tiny()));
    let plain = open(&good).unwrap();
    let scale = 1.0 / (plain.config().head_dim as f32).sqrt();
    let hidden = u32::try_from(plain.config().hidden_size).unwrap();
    for (key, neutral, other) in [
        ("llama.attention.causal", Meta::Bool(true), Meta::Bool(false)),
        ("llama.rope.scaling.attn_factor", Meta::F32(1.0), Meta::F32(2.0)),
        ("llama.rope.scaling.yarn_ext_factor", Meta::F32(-1.0), Meta::F32(1.0)),
        ("llama.logit_scale", Meta::F32(1.0), Meta::F32(0.0625)),
        ("llama.residual_scale", Meta::F32(0.0), Meta::F32(0.22)),
        ("llama.attn_logit_softcapping", Meta::F32(0.0), Meta::F32(50.0)),
        ("llama.final_logit_softcapping", Meta::F32s(vec![0.0, 0.0]), Meta::F32s(vec![0.0, 1.0])),
        ("llama.attention.clamp_kqv", Meta::F32(0.0), Meta::F32(8.0)),
        ("llama.attention.scale", Meta::F32(scale), Meta::F32(scale / 2.0)),
        ("llama.attention.scale", Meta::F32(0.0), Meta::Text("0".into())),
        ("llama.embedding_length_out", Meta::U32(hidden), Meta::U32(hidden + 1)),
        ("llama.expert_used_count", Meta::U32(0), Meta::U32(2)),
        ("llama.pooling_type", Meta::U32(0), Meta::U32(1)),
        ("llama.use_parallel_residual", Meta::Bool(false), Meta::Bool(true)),
        ("tokenizer.ggml.add_eos_token", Meta::Bool(false), Meta::Bool(true)),
        ("tokenizer.ggml.precompiled_charsmap", Meta::I32s(vec![]), Meta::I32s(vec![0])),
        ("tokenizer.chat_template", Meta::Text("x".into()), Meta::U32(1)),
    ] {
        let mut gguf = good.clone();
        gguf.set(key, neutral);
        assert_eq!(open(&gguf).unwrap().config(), plain.config(), "{key}");
        gguf.set(key, other);
        refused_metadata(&gguf, key, "");
    }
}

#[test]
fn keys_that_are_listed_as_read_are_read() {
    let good = Gguf::of(&generated(&tiny()));
    let mut pieces = good.clone();
    sentence_piece(&mut pieces, &["a", "b"]);
    let model = [
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.scale",
        "attention.sliding_window",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "embedding_length_out",
        "expert_count",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
        "rope.scaling.factor",
        "rope.scaling.type",
    ];
    let text = [
        "chat_template",
        "ggml.add_bos_token",
        "ggml.add_space_prefix",
        "ggml.bos_token_id",
        "ggml.eom_token_id",
        "ggml.eos_token_id",
        "ggml.eos_token_ids",
        "ggml.eot_token_id",
        "ggml.merges",
        "ggml.model",
        "ggml.padding_token_id",
        "ggml.pre",
        "ggml.scores",
        "ggml.token_type",
        "ggml.tokens",
        "ggml.unknown_token_id",
    ];
    let model = model.map(|key| format!("llama.{key}"));
    let text = text.map(|key| format!("tokenizer.{key}"));
    for key in model.iter().chain(&text) {
        // No key holds both a number that is none and a text of any kind.
        let read = [&good, &pieces].into_iter().any(|gguf| {
            [Meta::F32(f32::NAN), Meta::Text("?".into())].into_iter().any(|value| {
                let mut gguf = gguf.clone();
                gguf.set(key, value);
                matches!(open(&gguf), Err(LoadError::Gguf {
                    error: GgufError::Metadata { key: named, .. }, ..
                }) if named == *key)
            })
        });
        assert!(read, "{key}");
    }
}

#[test]
fn a_list_of_ends_is_read() {
    let mut gguf = Gguf::of(&generated(&tiny()));
    gguf.set("tokenizer.ggml.eos_token_ids", Meta::I32s(vec![7, 9]));
    let ends = open(&gguf).unwrap().config().eos_token_ids.clone();
    assert!(ends.contains(&7) && ends.contains(&9), "{ends:?}");
    gguf.set("tokenizer.ggml.eos_token_ids", Meta::I32s(vec![-7]));
    refused_metadata(&gguf, "tokenizer.ggml.eos_token_ids", "-7");
}

#[test]
fn containers_that_lie_are_refused() {
    let good = Gguf::of(&generated(&tiny()));
    let change = |change: &dyn Fn(&mut Gguf)| {
        let mut gguf = good.clone();
        change(&mut gguf);
        refused(&gguf)
    };
    assert_eq!(change(&|g| g.magic = *b"GGML"), GgufError::Magic { got: *b"GGML" });
    assert_eq!(change(&|g| g.version = 1), GgufError::Version { version: 1 });
    assert_eq!(change(&|g| g.version = 4), GgufError::Version { version: 4 });
    assert_eq!(change(&|g| g.version = 3u32.swap_bytes()), GgufError::BigEndian);
    let count = change(&|g| g.tensor_count = Some(u64::MAX));
    assert!(matches!(count, GgufError::Count { what: "tensor count", count: u64::MAX, .. }));
    let count = change(&|g| g.metadata_count = Some(1 << 40));
    assert!(matches!(count, GgufError::Count { what: "metadata count", .. }));
    // One more than there are: the next thing is read as one and can't be.
    open_bytes(&Gguf { tensor_count: Some(30), ..good.clone() }.bytes()).err().unwrap();
}

#[test]
fn names_and_alignments_that_lie_are_refused() {
    let good = Gguf::of(&generated(&tiny()));
    let change = |change: &dyn Fn(&mut Gguf)| {
        let mut gguf = good.clone();
        change(&mut gguf);
        refused(&gguf)
    };
    let twice = change(&|g| g.metadata.push(g.metadata[0].clone()));
    let name = "general.architecture".to_owned();
    assert_eq!(twice, GgufError::Duplicate { what: "metadata key", name });
    let twice = change(&|g| g.tensors.push(g.tensors[0].clone()));
    assert!(matches!(twice, GgufError::Duplicate { what: "tensor", .. }));
    let key = change(&|g| g.set(&"k".repeat(257), Meta::U32(0)));
    assert!(matches!(key, GgufError::NameLength { bytes: 257, .. }));

    for alignment in [0, 48, 1 << 20] {
        let mut gguf = good.clone();
        gguf.set("general.alignment", Meta::U32(alignment));
        refused_metadata(&gguf, "general.alignment", &alignment.to_string());
    }
    let mut wide = good.clone();
    wide.set("general.alignment", Meta::U32(256));
    wide.alignment = 256;
    assert_same_tensors(&open(&wide).unwrap(), &generated(&tiny()));
}

#[test]
fn strings_and_arrays_are_bounded_by_the_file() {
    let good = Gguf::of(&generated(&tiny()));
    let raw = |kind: u32, parts: &[&[u8]]| {
        let mut gguf = good.clone();
        gguf.set("x", Meta::Raw(kind, parts.concat()));
        refused(&gguf)
    };
    let truncated =
        |error: GgufError| assert!(matches!(error, GgufError::Truncated { .. }), "{error}");
    truncated(raw(8, &[&u64::MAX.to_le_bytes()]));
    truncated(raw(8, &[&(1u64 << 30).to_le_bytes()]));
    truncated(raw(9, &[&0u32.to_le_bytes(), &u64::MAX.to_le_bytes()]));
    truncated(raw(9, &[&12u32.to_le_bytes(), &(u64::MAX / 8 + 2).to_le_bytes()]));
    let metadata =
        |error: GgufError| assert!(matches!(error, GgufError::Metadata { .. }), "{error}");
    // An array of arrays, a type that does not exist, a flag of 2.
    metadata(raw(9, &[&9u32.to_le_bytes(), &1u64.to_le_bytes()]));
    metadata(raw(13, &[]));
    metadata(raw(7, &[&[2]]));
    let text = raw(8, &[&2u64.to_le_bytes(), &[0xc3, 0x28]]);
    assert!(matches!(text, GgufError::NotUtf8 { .. }), "{text}");
}

#[test]
fn tensors_that_lie_are_refused() {
    let good = Gguf::of(&generated(&tiny()));
    let change = |change: &dyn Fn(&mut GgufTensor)| {
        let mut gguf = good.clone();
        change(gguf.tensor("blk.1.ffn_up.weight"));
        refused(&gguf)
    };
    let end = change(&|t| t.offset = Some(1 << 40));
    assert!(matches!(end, GgufError::Outside { .. }), "{end}");
    let end = change(&|t| t.offset = Some(u64::MAX - 31));
    assert!(matches!(end, GgufError::Overflow { .. }), "{end}");
    let odd = change(&|t| t.offset = Some(33));
    assert!(matches!(odd, GgufError::Misaligned { offset: 33, alignment: 32, .. }), "{odd}");
    let overlap = change(&|t| t.offset = Some(0));
    assert!(matches!(overlap, GgufError::Overlap { .. }), "{overlap}");
    let none = change(&|t| t.dimensions.clear());
    assert!(matches!(none, GgufError::Dimensions { dimensions: 0, .. }), "{none}");
    let many = change(&|t| t.dimensions = vec![1; 9]);
    assert!(matches!(many, GgufError::Dimensions { dimensions: 9, .. }), "{many}");
    let blocks = change(&|t| t.dimensions = vec![65, 128]);
    assert!(matches!(blocks, GgufError::Blocks { row: 65, block: 32, .. }), "{blocks}");
    let huge = change(&|t| t.dimensions = vec![1 << 62, 1 << 62]);
    assert!(matches!(huge, GgufError::Overflow { .. }), "{huge}");
    let huge = change(&|t| t.dimensions = vec![u64::MAX - 31, 1]);
    assert!(matches!(huge, GgufError::Overflow { .. } | GgufError::Outside { .. }), "{huge}");
}

#[test]
fn other_types_and_tensors_are_refused_by_name() {
    let good = Gguf::of(&generated(&tiny()));
    let change = |change: &dyn Fn(&mut GgufTensor)| {
        let mut gguf = good.clone();
        change(gguf.tensor("blk.1.ffn_up.weight"));
        refused(&gguf)
    };
    let kind = change(&|t| t.kind = 19).to_string();
    assert!(kind.contains("blk.1.ffn_up.weight has type IQ1_S (19)"), "{kind}");
    assert!(kind.contains("Q4_K") && !kind.contains("IQ2"), "{kind}");
    let kind = change(&|t| t.kind = 4711);
    assert!(matches!(kind, GgufError::TensorType { number: 4711, kind: "unknown", .. }));
    let name = change(&|t| t.name = "blk.1.attn_sinks.weight".into());
    assert!(matches!(name, GgufError::UnknownTensor { .. }), "{name}");
    let name = change(&|t| t.name = "blk.01.ffn_up.weight".into());
    assert!(matches!(name, GgufError::UnknownTensor { .. }), "{name}");
}

#[test]
fn shapes_are_held_against_the_configuration() {
    let mut gguf = Gguf::of(&generated(&tiny()));
    gguf.tensor("blk.0.attn_k.weight").dimensions = vec![32, 64];
    match open(&gguf) {
        Err(LoadError::TensorMismatch { name, expected, got, .. }) => {
            assert_eq!(name, "model.layers.0.self_attn.k_proj.weight");
            assert!(
                expected.ends_with("[32, 64]") && got.ends_with("[64, 32]"),
                "{expected} {got}"
            );
        }
        other => panic!("{:?}", other.err()),
    }
    let mut gguf = Gguf::of(&generated(&tiny()));
    gguf.tensors.retain(|tensor| tensor.name != "blk.1.attn_v.weight");
    let error = open(&gguf).err().unwrap();
    assert!(
        matches!(error, LoadError::MissingTensor { ref name, .. } if name.contains("layers.1"))
    );
    // A layer too many: not silently left out.
    let mut gguf = Gguf::of(&generated(&tiny()));
    gguf.set("llama.block_count", Meta::U32(1));
    let error = open(&gguf).err().unwrap();
    assert!(
        matches!(error, LoadError::UnknownTensor { ref name, .. } if name.contains("layers.1"))
    );
}

#[test]
fn no_prefix_of_a_file_opens() {
    let bytes = Gguf::of(&generated(&TinyModel { layers: 1, ..tiny() })).bytes();
    let data = bytes.len() - 100_000;
    // The last tensor is a norm, and fills the alignment: each of the last bytes counts.
    let last = bytes.len() - 100;
    for len in (0..data).step_by(97).chain((data..last).step_by(4099)).chain(last..bytes.len()) {
        assert!(!hat_loader::fuzz_gguf(&bytes[..len]), "{len} of {} bytes open", bytes.len());
    }
    assert!(hat_loader::fuzz_gguf(&bytes));
}
