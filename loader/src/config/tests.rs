use serde_json::{Value, json};

use super::{Family, LlamaConfig, RopeScaling};

/// A Llama 2 configuration, as published.
fn llama2() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "rms_norm_eps": 1e-05, "rope_scaling": null,
        "vocab_size": 32000, "max_position_embeddings": 4096, "tie_word_embeddings": false,
        "bos_token_id": 1, "eos_token_id": 2, "pretraining_tp": 1, "torch_dtype": "float16",
    })
}

fn with(changes: Value) -> Value {
    let mut json = llama2();
    for (key, value) in changes.as_object().unwrap() {
        json[key] = value.clone();
    }
    json
}

fn parse(changes: Value) -> LlamaConfig {
    LlamaConfig::from_hf(&with(changes)).unwrap()
}

fn refused(changes: Value) -> String {
    LlamaConfig::from_hf(&with(changes)).unwrap_err().to_string()
}

#[test]
fn absent_keys_have_the_values_of_transformers() {
    let config = parse(json!({}));
    assert_eq!(config.architecture, Family::Llama);
    assert_eq!(config.num_key_value_heads, 32);
    assert_eq!(config.head_dim, 128);
    assert_eq!(config.rope_theta, 10_000.0);
    assert_eq!(config.rope_scaling, None);
    assert_eq!((config.sliding_window, config.attention_bias), (None, false));
    assert_eq!((config.bos_token_id, config.eos_token_ids), (Some(1), vec![2]));
}

#[test]
fn rope_is_read_in_both_forms() {
    let llama3 = json!({
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    });
    let expected = Some(RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    });
    let old = parse(json!({"rope_theta": 5e5, "rope_scaling": llama3}));
    assert_eq!((old.rope_theta, &old.rope_scaling), (5e5, &expected));
    let mut parameters = llama3.clone();
    parameters["rope_theta"] = json!(5e5);
    assert_eq!(parse(json!({"rope_parameters": parameters})), old);

    let plain = json!({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}});
    assert_eq!(parse(plain).rope_scaling, None);
    let linear = parse(json!({"rope_scaling": {"type": "linear", "factor": 2}}));
    assert_eq!(linear.rope_scaling, Some(RopeScaling::Linear { factor: 2.0 }));

    for (scaling, key) in [
        (json!({"rope_type": "dynamic", "factor": 2.0}), "rope_scaling.rope_type"),
        (json!({"factor": 2.0}), "rope_scaling.rope_type"),
        (json!(2.0), "rope_scaling"),
        (json!({"rope_type": "linear", "factor": "2"}), "rope_scaling.factor"),
        (json!({"rope_type": "llama3", "factor": 8.0}), "rope_scaling.low_freq_factor"),
    ] {
        let text = refused(json!({"rope_scaling": scaling}));
        assert!(text.starts_with(key), "{text}");
    }
    let mut same = llama3.clone();
    same["low_freq_factor"] = json!(4.0);
    let text = refused(json!({"rope_scaling": same}));
    assert!(text.starts_with("rope_scaling.high_freq_factor"), "{text}");
}

#[test]
fn windows_are_those_of_the_family() {
    let mistral = |window: Value| {
        let mut json = with(json!({"model_type": "mistral"}));
        json["sliding_window"] = window;
        LlamaConfig::from_hf(&json).unwrap().sliding_window
    };
    assert_eq!(mistral(json!(1024)), Some(1024));
    assert_eq!(mistral(Value::Null), None);
    assert_eq!(parse(json!({"model_type": "mistral"})).sliding_window, Some(4096));

    let qwen = |use_it: bool, full_layers: usize| {
        LlamaConfig::from_hf(&with(json!({
            "model_type": "qwen2", "sliding_window": 512, "use_sliding_window": use_it,
            "max_window_layers": full_layers,
        })))
    };
    assert_eq!(qwen(false, 0).unwrap().sliding_window, None);
    assert_eq!(qwen(true, 0).unwrap().sliding_window, Some(512));
    assert_eq!(qwen(true, 32).unwrap().sliding_window, None);
    assert!(qwen(true, 16).unwrap_err().to_string().starts_with("max_window_layers: 16 of 32"));
    assert!(qwen(false, 0).unwrap().attention_bias);

    let layers = |kinds: [&str; 2]| {
        let mut types = vec![json!(kinds[0]); 31];
        types.push(json!(kinds[1]));
        LlamaConfig::from_hf(&with(json!({
            "model_type": "mistral", "sliding_window": 512, "layer_types": types,
        })))
    };
    let (full, sliding) = ("full_attention", "sliding_attention");
    assert_eq!(layers([full, full]).unwrap().sliding_window, None);
    assert_eq!(layers([sliding, sliding]).unwrap().sliding_window, Some(512));
    assert!(layers([full, sliding]).unwrap_err().to_string().starts_with("layer_types"));
    assert!(layers(["linear_attention"; 2]).unwrap_err().to_string().starts_with("layer_types"));
}

#[test]
fn what_is_not_computed_is_refused() {
    for (changes, key) in [
        (json!({"attention_bias": true}), "attention_bias"),
        (json!({"mlp_bias": true}), "mlp_bias"),
        (json!({"hidden_act": "gelu"}), "hidden_act"),
        (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
        (json!({"model_type": "mixtral"}), "model_type"),
        (json!({"model_type": null}), "model_type"),
        (json!({"num_attention_heads": 33}), "num_attention_heads"),
        (json!({"vocab_size": null}), "vocab_size"),
        (json!({"tie_word_embeddings": "yes"}), "tie_word_embeddings"),
        (json!({"sliding_window": 0, "model_type": "mistral"}), "sliding_window"),
    ] {
        let text = refused(changes);
        assert!(text.starts_with(key), "{text}");
    }
    assert!(LlamaConfig::from_hf(&json!([])).is_err());
    // A message stays short whatever the value is.
    assert!(refused(json!({"hidden_size": "x".repeat(100_000)})).len() < 200);
}

#[test]
fn a_configuration_survives_json() {
    for config in [
        parse(json!({"rms_norm_eps": 1e-6, "rope_theta": 1e6})),
        parse(json!({"rope_scaling": {"type": "linear", "factor": 1.3}})),
        parse(json!({"model_type": "mistral"})),
    ] {
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<LlamaConfig>(&json).unwrap(), config);
    }
}

/// Bits of selected frequencies, computed by the script in the comment of each case.
fn assert_bits(config: &LlamaConfig, expected: &[(usize, u32)]) {
    let inv_freq = config.inv_freq();
    assert_eq!(inv_freq.len(), config.head_dim / 2);
    for (i, bits) in expected {
        assert_eq!(inv_freq[*i].to_bits(), *bits, "{i}: {}", inv_freq[*i]);
    }
}

#[test]
fn frequencies_are_those_of_transformers() {
    // From the formulas, in decimal arithmetic of 60 digits rounded to f32 at each operation.
    let plain = parse(json!({}));
    let expected =
        [(0, 0x3f800000), (1, 0x3f5dafd7), (2, 0x3f3ff911), (17, 0x3db15978), (63, 0x38f22ce2)];
    assert_bits(&plain, &expected);

    let llama3 = parse(json!({"rope_theta": 5e5, "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    }}));
    // 28 is the last that is kept, 29 to 34 are blended, 35 is the first that is scaled in full.
    let expected = [
        (28, 0x3b527720),
        (29, 0x3b0dfd06),
        (30, 0x3ab3d11d),
        (31, 0x3a60979e),
        (32, 0x3a0995d2),
        (33, 0x39a3f108),
        (34, 0x393b2dd2),
        (35, 0x38c86886),
        (44, 0x377d45c3),
    ];
    assert_bits(&llama3, &expected);

    let linear = parse(json!({"rope_scaling": {"type": "linear", "factor": 4.0}}));
    for (scaled, plain) in linear.inv_freq().iter().zip(plain.inv_freq()) {
        assert_eq!(*scaled, plain / 4.0);
    }
}

/// A file of each family, with all keys that a family needs.
fn families() -> impl Iterator<Item = Value> {
    ["llama", "mistral", "qwen2"].into_iter().map(|family| with(json!({"model_type": family})))
}

#[test]
fn keys_that_nobody_knows_are_refused_by_name() {
    for mut json in families() {
        json["layer_multiplier"] = json!(2.0);
        let text = LlamaConfig::from_hf(&json).unwrap_err().to_string();
        assert!(text.starts_with("layer_multiplier: not known"), "{text}");
        assert!(text.contains("remove it"), "{text}");
    }
    for (parameters, key) in [
        (json!({"full_attention": {"rope_theta": 5e5}}), "rope_parameters.full_attention"),
        (json!({"rope_type": "default", "mscale": 2.0}), "rope_parameters.mscale"),
        (
            json!({"rope_type": "default", "partial_rotary_factor": 0.5}),
            "rope_parameters.partial_rotary_factor",
        ),
    ] {
        let text = refused(json!({"rope_parameters": parameters}));
        assert!(text.starts_with(key), "{text}");
    }
    let linear = json!({"rope_type": "linear", "factor": 2.0});
    let other = json!({"rope_type": "default"});
    let text = refused(json!({"rope_scaling": linear, "rope_parameters": other}));
    assert!(text.starts_with("rope_scaling: says something else"), "{text}");
    // A name can't write to a terminal, and a message stays short.
    let text = refused(json!({(format!("\u{1b}[2J{}", "x".repeat(100_000))): 1}));
    assert!(text.len() < 400 && !text.contains('\u{1b}'), "{text}");
}

#[test]
fn keys_are_harmless_only_with_a_neutral_value() {
    for (key, neutral, other) in [
        ("logit_scale", json!(1.0), json!(0.5)),
        ("final_logit_softcapping", Value::Null, json!(30.0)),
        ("attn_logit_softcapping", json!(0.0), json!(50.0)),
        ("use_mrope", json!(false), json!(true)),
        ("num_local_experts", json!(0), json!(8)),
        ("is_causal", json!(true), json!(false)),
        ("hidden_activation", json!("silu"), json!("gelu")),
        ("no_rope_layers", json!([]), json!([1, 1, 1, 0])),
        ("pruned_heads", json!({}), json!({"1": [0]})),
        ("partial_rotary_factor", json!(1.0), json!(0.5)),
        ("quantization_config", Value::Null, json!({"quant_method": "hqq"})),
    ] {
        for mut json in families() {
            let plain = LlamaConfig::from_hf(&json).unwrap();
            json[key] = neutral.clone();
            assert_eq!(LlamaConfig::from_hf(&json).unwrap(), plain, "{key}");
            json[key] = other.clone();
            let text = LlamaConfig::from_hf(&json).unwrap_err().to_string();
            assert!(text.starts_with(&format!("{key}: ")), "{text}");
            assert!(text.contains("not supported"), "{text}");
        }
    }
    let text = refused(json!({"quantization": {"bits": 4, "group_size": 64}}));
    assert!(text.starts_with("quantization: ") && text.contains("GGUF"), "{text}");
}

#[test]
fn bookkeeping_changes_nothing() {
    for mut json in families() {
        let plain = LlamaConfig::from_hf(&json).unwrap();
        for key in super::keys::TOP.harmless.iter().flat_map(|keys| keys.split(' ')) {
            json[key] = json!({"any": "thing"});
        }
        for (keys, values) in super::keys::TOP.neutral {
            assert!(values.contains(&crate::keys::Plain::Null), "{keys}: null says nothing");
            for key in keys.split(' ') {
                json[key] = Value::Null;
            }
        }
        assert_eq!(LlamaConfig::from_hf(&json).unwrap(), plain);
    }
}

#[test]
fn keys_that_are_listed_as_read_are_read() {
    for key in super::keys::TOP.read.split(' ') {
        let refused = families().any(|mut json| {
            json["use_sliding_window"] = json!(true);
            json["sliding_window"] = json!(512);
            json[key] = json!(["no", {"such": "value"}]);
            LlamaConfig::from_hf(&json).is_err_and(|error| error.key == key)
        });
        assert!(refused, "{key}");
    }
    let texts = super::keys::TOP.harmless.iter().copied().chain([super::keys::TOP.read]);
    let texts = texts.chain(super::keys::TOP.neutral.iter().map(|(keys, _)| *keys));
    let mut listed: Vec<&str> = texts.flat_map(|keys| keys.split(' ')).collect();
    listed.extend(super::keys::TOP.refused.iter().map(|(key, _)| key));
    let count = listed.len();
    listed.sort_unstable();
    listed.dedup();
    assert_eq!(listed.len(), count, "a key is in two lists");
}
