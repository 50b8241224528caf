//! GGUF files: what comes out of good ones.

use crate::files::gguf::{
    Gguf, GgufTensor, Meta, assert_same_tensors, open, refused_metadata, sentence_piece, tiny,
};
use hat_loader::{
    Bundle, BundleOptions, DType, Family, RopeScaling, SourceModel, TinyModel, Weights, generated,
    write_bundles,
};
use tokenizers::Tokenizer;

#[test]
fn every_type_comes_out_as_it_went_in() {
    for dtype in [DType::F32, DType::F16, DType::Bf16, DType::Q8_0, DType::Q4_0, DType::Q4_1] {
        let model = generated(&TinyModel { dtype, ..tiny() });
        assert_same_tensors(&open(&Gguf::of(&model)).unwrap(), &model);
    }
    let wide =
        TinyModel { hidden: 256, intermediate: 512, head_dim: 64, dtype: DType::Q6K, ..tiny() };
    let model = generated(&wide);
    assert_same_tensors(&open(&Gguf::of(&model)).unwrap(), &model);
}

#[test]
fn llama_rows_are_half_split_and_qwen2_rows_stay() {
    let llama = generated(&tiny());
    let gguf = Gguf::of(&llama);
    let stored = &gguf.clone().tensor("blk.0.attn_q.weight").bytes.clone();
    let opened = open(&gguf).unwrap();
    let name = "model.layers.0.self_attn.q_proj.weight";
    assert!(*opened.tensor(name).unwrap().bytes != stored[..]);
    assert_same_tensors(&opened, &llama);

    let qwen = generated(&TinyModel { architecture: Family::Qwen2, ..tiny() });
    let mut gguf = Gguf::of(&qwen);
    let stored = gguf.tensor("blk.0.attn_q.weight").bytes.clone();
    let opened = open(&gguf).unwrap();
    assert!(*opened.tensor(name).unwrap().bytes == stored[..]);
    assert!(opened.config().attention_bias);
    assert_eq!(opened.config().architecture, Family::Qwen2);
    assert_same_tensors(&opened, &qwen);
}

#[test]
fn metadata_becomes_the_configuration() {
    let model = generated(&TinyModel { window: None, ..tiny() });
    let mut gguf = Gguf::of(&model);
    assert_eq!(open(&gguf).unwrap().config(), model.config());

    gguf.set("llama.rope.scaling.type", Meta::Text("linear".into()));
    gguf.set("llama.rope.scaling.factor", Meta::F32(4.0));
    gguf.set("llama.attention.sliding_window", Meta::U32(100));
    let config = open(&gguf).unwrap().config().clone();
    assert_eq!(config.rope_scaling, Some(RopeScaling::Linear { factor: 4.0 }));
    assert_eq!(config.sliding_window, Some(100));

    let tied = generated(&TinyModel { tied: true, ..tiny() });
    assert!(open(&Gguf::of(&tied)).unwrap().config().tie_word_embeddings);
}

#[test]
fn rope_freqs_divide_the_frequencies() {
    let mut gguf = Gguf::of(&generated(&tiny()));
    let factors: Vec<f32> = (1..=8).map(|i| i as f32).collect();
    let bytes = factors.iter().flat_map(|f| f.to_le_bytes()).collect();
    let plain = open(&gguf).unwrap().config().inv_freq();
    gguf.tensors.push(GgufTensor {
        name: "rope_freqs.weight".into(),
        dimensions: vec![8],
        kind: 0,
        offset: None,
        bytes,
    });
    let scaled = open(&gguf).unwrap().config().inv_freq();
    for i in 0..8 {
        assert_eq!(scaled[i], plain[i] / factors[i]);
    }
    // One factor too few, and one that is no divisor.
    let tensor = gguf.tensor("rope_freqs.weight");
    tensor.bytes[..4].copy_from_slice(&0.0f32.to_le_bytes());
    refused_metadata(&gguf, "rope_freqs.weight", "number 0 is 0");
    let tensor = gguf.tensor("rope_freqs.weight");
    tensor.dimensions = vec![7];
    tensor.bytes.truncate(28);
    refused_metadata(&gguf, "rope_freqs.weight", "7 numbers");
}

#[test]
fn byte_level_vocabulary_makes_the_same_tokenizer() {
    let model = generated(&tiny());
    let ours: Tokenizer = model.tokenizer_json().parse().unwrap();
    let opened = open(&Gguf::of(&model)).unwrap();
    let theirs: Tokenizer = opened.tokenizer_json().parse().unwrap();
    assert_eq!(opened.token_settings(), &without_pad(&model));
    for text in ["the rain in spain", "Grüße, 123 \u{1f980}!", "<|im_start|>user\nhi<|im_end|>"] {
        let ids = ours.encode(text, true).unwrap().get_ids().to_vec();
        assert_eq!(theirs.encode(text, true).unwrap().get_ids(), ids);
        assert_eq!(theirs.decode(&ids, false).unwrap(), text);
    }
}

/// Settings as these files' metadata says them: without a padding token.
fn without_pad(model: &SourceModel) -> hat_loader::TokenSettings {
    let mut settings = model.token_settings().clone();
    settings.pad_token = None;
    settings
}

#[test]
fn patterns_cut_digits_as_their_models_do() {
    let mut gguf = Gguf::of(&generated(&tiny()));
    let mut pieces = |pre: &str, text: &str| -> Vec<String> {
        gguf.set("tokenizer.ggml.pre", Meta::Text(pre.into()));
        let tokenizer: Tokenizer = open(&gguf).unwrap().tokenizer_json().parse().unwrap();
        let cut = tokenizer.get_pre_tokenizer().unwrap();
        let mut string = tokenizers::PreTokenizedString::from(text);
        tokenizers::PreTokenizer::pre_tokenize(cut, &mut string).unwrap();
        let splits = string
            .get_splits(tokenizers::OffsetReferential::Original, tokenizers::OffsetType::Byte);
        splits.into_iter().map(|(_, (start, end), _)| text[start..end].to_owned()).collect()
    };
    let text = "in 12345 days";
    assert_eq!(pieces("gpt-2", text), ["in", " 12345", " days"]);
    assert_eq!(pieces("smollm", text), ["in", " ", "1", "2", "3", "4", "5", " days"]);
    assert_eq!(pieces("llama-bpe", text), ["in", " ", "123", "45", " days"]);
    assert_eq!(pieces("qwen2", text), ["in", " ", "1", "2", "3", "4", "5", " days"]);
    let text = "don't (stop)\n\n  now";
    let expected = ["don", "'t", " (", "stop", ")\n\n", " ", " now"];
    assert_eq!(pieces("llama-bpe", text), expected);
}

#[test]
fn llama3_prompts_begin_with_bos() {
    let mut gguf = Gguf::of(&generated(&tiny()));
    gguf.set("tokenizer.ggml.pre", Meta::Text("llama-bpe".into()));
    let ids = |gguf: &Gguf, special: bool| {
        let tokenizer: Tokenizer = open(gguf).unwrap().tokenizer_json().parse().unwrap();
        tokenizer.encode("the", special).unwrap().get_ids()[0]
    };
    assert_eq!(ids(&gguf, true), 1);
    assert_ne!(ids(&gguf, false), 1);
    gguf.set("tokenizer.ggml.add_bos_token", Meta::Bool(false));
    assert_ne!(ids(&gguf, true), 1);
}

#[test]
fn sentence_piece_scores_become_merges() {
    let mut gguf = Gguf::of(&generated(&tiny()));
    // "he" outscores "ab" outscores "bc".
    let text = "he ▁t ▁the hel ll hell ab bc ▁ t h e l o a b c < s> s >";
    let pieces: Vec<&str> = text.split(' ').collect();
    sentence_piece(&mut gguf, &pieces);
    let model = open(&gguf).unwrap();
    assert_eq!(model.token_settings().unk_token.as_deref(), Some("<unk>"));
    let tokenizer: Tokenizer = model.tokenizer_json().parse().unwrap();
    let tokens = |text: &str| tokenizer.encode(text, true).unwrap().get_tokens().to_vec();
    assert_eq!(tokens("the hello"), ["<s>", "▁the", "▁", "hell", "o"]);
    assert_eq!(tokens("abc")[1..], ["▁", "ab", "c"]);
    // What has no piece falls back to bytes, and comes back.
    assert_eq!(tokens("é")[1..], ["▁", "<0xC3>", "<0xA9>"]);
    for text in ["the hello", "é \u{1f980} t", "t  t"] {
        let ids = tokenizer.encode(text, true).unwrap().get_ids().to_vec();
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
    }
    // No merge makes a control token, even where its parts are pieces.
    assert!(!model.tokenizer_json().contains(r#"["<","s>"]"#));

    gguf.set("tokenizer.ggml.add_space_prefix", Meta::Bool(false));
    let tokenizer: Tokenizer = open(&gguf).unwrap().tokenizer_json().parse().unwrap();
    assert_eq!(tokenizer.encode("the", true).unwrap().get_tokens(), ["<s>", "t", "he"]);
}

#[test]
fn a_file_that_does_not_name_its_pattern_is_not_guessed_at() {
    let mut gguf = Gguf::of(&generated(&tiny()));
    let named = open(&gguf).unwrap();
    assert_eq!(named.text_report().pattern.as_deref(), Some("gpt-2, by the file"));
    for pre in [None, Some("default")] {
        gguf.remove("tokenizer.ggml.pre");
        if let Some(pre) = pre {
            gguf.set("tokenizer.ggml.pre", Meta::Text(pre.into()));
        }
        refused_metadata(&gguf, "tokenizer.ggml.pre", "pass --pre NAME to hat-split");
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.gguf");
        gguf.write(&path);
        let told = SourceModel::open_with(&path, Some("gpt-2")).unwrap();
        assert_eq!(told.tokenizer_json(), named.tokenizer_json());
        let error = SourceModel::open_with(&path, Some("nonsense")).unwrap_err().to_string();
        assert!(error.contains("nonsense") && error.contains("deepseek-r1-qwen"), "{error}");
    }
}

#[test]
fn markers_are_control_tokens_whatever_type_a_file_gives_them() {
    let model = generated(&tiny());
    for kind in [1, 3, 4] {
        let mut gguf = Gguf::of(&model);
        let types = (0..512).map(|id| if id < 3 { kind } else { 1 }).collect();
        gguf.set("tokenizer.ggml.token_type", Meta::I32s(types));
        let opened = open(&gguf).unwrap();
        let report = opened.text_report();
        assert_eq!(report.control_tokens.keys().copied().collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(report.retyped_tokens, if kind == 3 { 0 } else { 3 });
        assert_eq!(report.ends, [0, 2]);
        let tokenizer: Tokenizer = opened.tokenizer_json().parse().unwrap();
        assert_eq!(tokenizer.encode("<|im_end|>", false).unwrap().get_ids(), [2], "type {kind}");

        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("out");
        let options = BundleOptions { split_layer: 1, tail_layers: 0, weights: Weights::Keep };
        write_bundles(&opened, options, &out, &mut |_| {}).unwrap();
        let device = Bundle::open(&out.join("device")).unwrap();
        assert_eq!(device.manifest().control_tokens.as_deref(), Some(&[0, 1, 2][..]));
        assert_eq!(Bundle::open(&out.join("cloud")).unwrap().manifest().control_tokens, None);
    }
}

#[test]
fn odd_merges_and_doubled_tokens_are_counted() {
    let model = generated(&tiny());
    let mut gguf = Gguf::of(&model);
    let list = |gguf: &Gguf, key: &str| {
        let found = gguf.metadata.iter().find(|(name, _)| name == key).unwrap();
        let Meta::Texts(texts) = &found.1 else { panic!("{key}") };
        texts.clone()
    };
    let mut merges = list(&gguf, "tokenizer.ggml.merges");
    merges.insert(0, "zz top".into());
    gguf.set("tokenizer.ggml.merges", Meta::Texts(merges));
    let mut tokens = list(&gguf, "tokenizer.ggml.tokens");
    let doubled = tokens[100].clone();
    *tokens.last_mut().unwrap() = doubled.clone();
    gguf.set("tokenizer.ggml.tokens", Meta::Texts(tokens));
    let opened = open(&gguf).unwrap();
    let report = opened.text_report();
    // The token that is gone takes its own merge with it.
    assert_eq!((report.merges_skipped, report.tokens_doubled), (2, 1));
    let tokenizer: Tokenizer = opened.tokenizer_json().parse().unwrap();
    assert_eq!(tokenizer.token_to_id(&doubled), Some(100));
}

#[test]
fn a_matrix_that_no_block_fits_keeps_a_type_of_its_own() {
    let odd = TinyModel { intermediate: 60, dtype: DType::F32, ..tiny() };
    let model = generated(&odd);
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out");
    let options = BundleOptions { split_layer: 1, tail_layers: 0, weights: Weights::Q8 };
    let report = write_bundles(&model, options, &out, &mut |_| {}).unwrap();
    let kept: Vec<&String> = report.kept.keys().collect();
    let names = [0, 1].map(|layer| format!("model.layers.{layer}.mlp.down_proj.weight"));
    assert_eq!(kept, names.each_ref());
    assert!(report.kept[&names[0]].contains("f16 instead of q8_0: rows of 60"));
    let device = Bundle::open(&out.join("device")).unwrap();
    assert_eq!(device.tensor(&names[0]).unwrap().dtype, DType::F16);
}
