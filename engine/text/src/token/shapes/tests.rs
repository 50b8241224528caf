use proptest::prelude::*;
use serde_json::{Value, json};
use tokenizers::{
    Normalizer as _, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _,
};

use super::*;

/// A small file of allowed shapes.
fn good() -> Value {
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                            "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": {"strategy": "BatchLongest"},
        "added_tokens": [{"id": 3, "content": "<s>", "single_word": false, "lstrip": false,
                          "rstrip": false, "normalized": false, "special": true}],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\s+"}, "behavior": "Isolated",
             "invert": false}, byte_level]},
        "post_processor": {"type": "Sequence", "processors": [byte_level,
            {"type": "TemplateProcessing",
             "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                        {"Sequence": {"id": "A", "type_id": 0}}],
             "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [3], "tokens": ["<s>"]}}}]},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "fuse_unk": false,
                  "byte_fallback": false, "vocab": {"a": 0, "b": 1, "ab": 2},
                  "merges": ["a b"]},
    })
}

fn refused(json: &Value) -> String {
    match check(json.to_string().as_bytes(), 4) {
        Ok(_) => panic!("let through: {json}"),
        Err(error) => error.to_string(),
    }
}

/// The file with another value at a JSON pointer, or with a new field there.
fn with(pointer: &str, value: Value) -> Value {
    let mut json = good();
    match json.pointer_mut(pointer) {
        Some(place) => *place = value,
        None => {
            let (parent, name) = pointer.rsplit_once('/').unwrap();
            json.pointer_mut(parent).unwrap()[name] = value;
        }
    }
    json
}

#[test]
fn what_passes_is_written_anew_and_the_parser_takes_it() {
    let shapes = check(good().to_string().as_bytes(), 4).unwrap();
    assert_eq!(shapes.json["model"]["merges"], json!([["a", "b"]]));
    assert_eq!((&shapes.json["padding"], &shapes.json["decoder"]), (&Value::Null, &Value::Null));
    assert_eq!(shapes.decoder["decoders"].as_array().unwrap().len(), 4);
    assert_eq!(shapes.added, [(3, "<s>".to_owned())]);
    let parsed = tokenizers::Tokenizer::from_bytes(shapes.json.to_string()).unwrap();
    assert_eq!(parsed.encode("ab", true).unwrap().get_ids()[0], 3);
    // What is null or absent is the same.
    let mut bare = good();
    for field in ["version", "truncation", "padding", "normalizer", "post_processor"] {
        bare.as_object_mut().unwrap().remove(field);
    }
    let shapes = check(bare.to_string().as_bytes(), 4).unwrap();
    assert_eq!(shapes.json["normalizer"], Value::Null);
}

#[test]
fn a_field_that_is_not_known_is_refused_with_its_path() {
    for (pointer, path) in [
        ("/odd", "tokenizer.json: odd: not known"),
        ("/added_tokens/0/odd", "added_tokens[0].odd: not known"),
        ("/normalizer/odd", "normalizer.odd: not known"),
        ("/normalizer/normalizers/1/odd", "normalizer.normalizers[1].odd: not known"),
        ("/pre_tokenizer/pretokenizers/0/odd", "pre_tokenizer.pretokenizers[0].odd: not known"),
        ("/post_processor/processors/1/odd", "post_processor.processors[1].odd: not known"),
        ("/decoder/decoders/3/odd", "decoder.decoders[3].odd: not known"),
        ("/model/odd", "model.odd: not known"),
    ] {
        let said = refused(&with(pointer, json!(1)));
        assert!(said.contains(path), "{pointer}: {said}");
    }
}

/// Place in the good file, its replacement, and the error. `LONG` stands for 200,000 bytes. Most of
/// these once ended the process or its memory, hung it, or made other ids.
const HOSTILE: &[(&str, &str, &str)] = &[
    ("/version", r#""2.0""#, "version: not one of 1.0"),
    (
        "/normalizer",
        r#"{"type": "Precompiled", "precompiled_charsmap": "//////8="}"#,
        "normalizer.type: \"Precompiled\" is not supported; supported: NFC,",
    ),
    ("/normalizer", r#"{"precompiled_charsmap": "//////8="}"#, "normalizer.type: missing"),
    ("/normalizer", r#"{"type": "Bert"}"#, "normalizer.type: \"Bert\""),
    ("/normalizer", "[]", "normalizer: not an object"),
    ("/normalizer", r#"{"type": 3}"#, "normalizer.type: not a text"),
    (
        "/normalizer/normalizers/1/content",
        r#""LONG""#,
        "normalizer.normalizers[1].content: 200000 bytes, at most 64 are supported",
    ),
    ("/normalizer/normalizers/0/prepend", r#""LONG""#, "normalizers[0].prepend: 200000 bytes"),
    ("/normalizer/normalizers/1/pattern", r#"{"String": ""}"#, "normalizers[1].pattern: empty"),
    ("/normalizer/normalizers/1/pattern", r#"{"Regex": "a*"}"#, "pattern: not {\"String\": ...}"),
    ("/normalizer/normalizers/1/pattern", r#""a""#, "pattern: not {\"String\": ...}"),
    ("/pre_tokenizer", r#"{"type": "FixedLength", "length": 0}"#, "pre_tokenizer.type: \"Fixed"),
    (
        "/pre_tokenizer/pretokenizers/0/pattern",
        r#"{"Regex": "LONG"}"#,
        "pre_tokenizer.pretokenizers[0].pattern: 200000 bytes, at most 2048",
    ),
    ("/pre_tokenizer/pretokenizers/0/pattern", r#"{"Odd": "a"}"#, "or {\"Regex\": ...}"),
    (
        "/pre_tokenizer/pretokenizers/0/behavior",
        r#""Doubled""#,
        "pre_tokenizer.pretokenizers[0].behavior: not one of Removed,",
    ),
    (
        "/pre_tokenizer",
        r#"{"type": "Metaspace", "replacement": "__"}"#,
        "pre_tokenizer.replacement: not one character",
    ),
    (
        "/pre_tokenizer",
        r#"{"type": "Metaspace", "replacement": "_", "add_prefix_space": false}"#,
        "pre_tokenizer.add_prefix_space: false, but",
    ),
    ("/post_processor", r#"{"type": "BertProcessing"}"#, "post_processor.type: \"Bert"),
    (
        "/post_processor/processors/1/special_tokens",
        "{}",
        "post_processor.processors[1].special_tokens[\"<s>\"]: missing",
    ),
    (
        "/post_processor/processors/1/special_tokens/<s>/ids",
        "[3, 3]",
        "special_tokens[\"<s>\"]: not as many ids as tokens",
    ),
    (
        "/post_processor/processors/1/special_tokens/<s>/ids",
        "[4]",
        "post_processor.special_tokens: token id 4, but the embedding has 4 rows",
    ),
    ("/post_processor/processors/1/single", "[]", "single: the text A stands 0 times"),
    (
        "/post_processor/processors/1/single",
        r#"[{"Sequence": {"id": "A"}}, {"Sequence": {"id": "A"}}]"#,
        "single: the text A stands 2 times",
    ),
    ("/post_processor/processors/1/single", r#"["$A"]"#, "single[0]: neither"),
    ("/post_processor/processors/1/single/1", r#"{"Sequence": {"id": "B"}}"#, "single[1]: neither"),
    ("/decoder", r#"{"type": "WordPiece"}"#, "decoder.type: \"WordPiece\""),
    ("/decoder/decoders/0/pattern", r#"{"Regex": "a"}"#, "decoder.decoders[0].pattern: not {"),
    ("/model", r#"{"type": "Unigram", "vocab": [["a", 0.0]]}"#, "model.type: not one of BPE"),
    ("/model/type", "null", "model.type: missing"),
    ("/model/dropout", "0.5", "model.dropout: only null"),
    (
        "/model/continuing_subword_prefix",
        r###""##""###,
        "model.continuing_subword_prefix: only null",
    ),
    ("/model/unk_token", r#""<unk>""#, "model.unk_token: not a token"),
    ("/model/byte_fallback", "1", "model.byte_fallback: neither true nor false"),
    ("/model/vocab", r#"[["a", 0.0]]"#, "model.vocab: not an object"),
    ("/model/vocab/a", "-1", "model.vocab[\"a\"]: its id"),
    ("/model/vocab/c", "1.5", "model.vocab[\"c\"]: its id"),
    ("/model/vocab", r#"{"LONG": 3}"#, "200000 bytes, at most 2048"),
    // Longer than any token: the parser copies it into a buffer of the longest one's length.
    ("/model/merges/0", r#"["ab", "ab"]"#, "merges[0]: \"abab\" is no token of model.vocab"),
    ("/model/merges/0", r#""a c""#, "model.merges[0]: \"c\" is no token"),
    ("/model/merges/0", r#"["a"]"#, "model.merges[0]: not two tokens"),
    ("/model/merges/0", r#""a b c""#, "model.merges[0]: not two tokens"),
    ("/added_tokens/0/content", r#""LONG""#, "added_tokens[0].content: 200000 bytes"),
    ("/added_tokens/0/content", r#""""#, "added_tokens[0].content: empty"),
    ("/added_tokens/0/special", "null", "added_tokens[0].special: missing"),
    ("/added_tokens/0/id", "4294967296", "added_tokens[0].id: not a whole number"),
    ("/added_tokens", "{}", "added_tokens: not a list"),
];

fn refused_by(json: &Value, expected: &str) {
    let said = refused(json);
    assert!(said.contains(expected), "expected {expected:?}: {said}");
    assert!(said.starts_with("tokenizer.json") && said.len() < 400, "{said}");
}

#[test]
fn hostile_shapes_are_refused_with_their_path() {
    let long = "a".repeat(200_000);
    for (pointer, json, expected) in HOSTILE {
        let value = serde_json::from_str(&json.replace("LONG", &long)).unwrap();
        refused_by(&with(pointer, value), expected);
    }
}

#[test]
fn too_many_of_what_is_allowed_are_refused() {
    let file = good();
    let copies = |pointer: &str, count: usize| vec![file.pointer(pointer).unwrap().clone(); count];
    let many = |pointer: &str, one: &str, count| with(pointer, copies(one, count).into());
    let grows = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaa"});
    let deep = (0..9).fold(
        json!({"type": "NFC"}),
        |inner, _| json!({"type": "Sequence", "normalizers": [inner]}),
    );
    let (normalizer, decoder) = ("/normalizer/normalizers", "/decoder/decoders");
    let cutting = "/pre_tokenizer/pretokenizers";
    let processors = "/post_processor/processors";
    let single = "/post_processor/processors/1/single";
    for (json, expected) in [
        (with(normalizer, vec![grows.clone(); 3].into()), "a text may become 1024 times as long"),
        (with(decoder, vec![grows; 2].into()), "decoder: a token may become 64 times as long"),
        (many(cutting, "/pre_tokenizer/pretokenizers/1", 9), "a text may become 6144 times"),
        (many(cutting, "/pre_tokenizer/pretokenizers/0", 17), "[16]: more than 16 steps"),
        (with("/normalizer", deep), ": deeper than 3 sequences"),
        (many(processors, "/post_processor/processors/1", 2), "more than one TemplateProcessing"),
        (many(single, "/post_processor/processors/1/single/0", 17), "more than 16 pieces"),
        (many("/model/merges", "/model/merges/0", 1057), "model.merges in entries: 1057"),
    ] {
        refused_by(&json, expected);
    }
}

#[test]
fn expressions_of_published_tokenizers_need_no_limit() {
    assert!(!check(good().to_string().as_bytes(), 4).unwrap().cuts_in_time);
    let folder =
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/checkpoints");
    for model in ["llama2", "llama3", "mistral", "qwen2"] {
        let json = std::fs::read(folder.join(model).join("tokenizer.json")).unwrap();
        assert!(check(&json, 400).unwrap().cuts_in_time, "{model}");
    }
}

#[test]
fn values_are_counted_before_they_are_read() {
    let long = format!("{{\"odd\": [{}0]}}", "0,".repeat(100_000));
    let error = check(long.as_bytes(), 4).err().expect("refused");
    assert!(matches!(error, TokenError::TooLarge { size: 100_002, .. }), "{error}");
    // Added tokens are bounded together.
    let token = |id: usize| {
        json!({"id": id, "content": format!("{id:02000}"), "single_word": false, "lstrip": false,
               "rstrip": false, "normalized": true, "special": false})
    };
    let many = with("/added_tokens", (0..700).map(token).collect());
    assert!(refused(&many).contains("added_tokens: 16800000 bytes in all"));
}

fn normalizer() -> impl Strategy<Value = Value> {
    let text = "[a-c▁ ]{1,4}";
    prop_oneof![
        prop::sample::select(vec!["NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents"])
            .prop_map(|kind| json!({"type": kind})),
        text.prop_map(|text| json!({"type": "Prepend", "prepend": text})),
        (text, text).prop_map(|(pattern, content)| {
            json!({"type": "Replace", "pattern": {"String": pattern}, "content": content})
        }),
    ]
}

fn pre_tokenizer() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<bool>().prop_map(|space| {
            json!({"type": "ByteLevel", "add_prefix_space": space, "trim_offsets": true,
                   "use_regex": space})
        }),
        prop::sample::select(vec!["first", "never", "always"]).prop_map(|scheme| {
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme})
        }),
        Just(json!({"type": "Digits", "individual_digits": true})),
        Just(json!({"type": "Split", "pattern": {"Regex": "b| "}, "behavior": "Isolated",
                    "invert": false})),
    ]
}

proptest! {
    /// No text grows by more than the bound computed from its steps, for any steps.
    #[test]
    fn no_text_grows_by_more_than_its_bound(
        normalizers in prop::collection::vec(normalizer(), 0..4),
        pretokenizers in prop::collection::vec(pre_tokenizer(), 0..4),
        text in "[a-cA\u{130}\u{23a} ▁é0-9\u{fdfa}\u{390}\u{1d160}]{1,12}",
    ) {
        let mut json = good();
        json["normalizer"] = json!({"type": "Sequence", "normalizers": normalizers});
        json["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": pretokenizers});
        let Ok(shapes) = check(json.to_string().as_bytes(), 4) else { return Ok(()) };
        prop_assert!(shapes.growth <= GROWTH_MAX);
        let parsed = tokenizers::Tokenizer::from_bytes(shapes.json.to_string()).unwrap();
        let mut pieces = PreTokenizedString::from(text.as_str());
        if let Some(normalizer) = parsed.get_normalizer() {
            pieces.normalize(|piece| normalizer.normalize(piece)).unwrap();
        }
        if let Some(cutting) = parsed.get_pre_tokenizer() {
            cutting.pre_tokenize(&mut pieces).unwrap();
        }
        let splits = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
        let grown: usize = splits.iter().map(|(piece, ..)| piece.len()).sum();
        prop_assert!(grown <= shapes.growth * text.len(), "{grown} of {}", text.len());
    }
}
