//! The metadata keys that are known: under the architecture's name, and under `tokenizer.`.
//!
//! `general.*` names and describes a file, and keys of other programs (`split.*`, `imatrix.*`) and
//! other architectures say nothing about this model: they are left alone.

use super::GgufError;
use super::parse::{Container, Value};
use crate::keys::{KnownKeys, Plain};

use Plain::{Flag, Number};

const OFF: &[Plain<'static>] = &[Number(0.0), Flag(false)];
const ONE: &[Plain<'static>] = &[Number(1.0)];
const OFF_OR_ONE: &[Plain<'static>] = &[Number(0.0), Number(1.0)];
const YES: &[Plain<'static>] = &[Flag(true)];
const NO: &[Plain<'static>] = &[Flag(false)];

/// Keys under the architecture's name.
const MODEL: KnownKeys = KnownKeys {
    read: "attention.head_count attention.head_count_kv attention.key_length \
           attention.layer_norm_rms_epsilon attention.scale attention.sliding_window \
           attention.value_length block_count context_length embedding_length \
           embedding_length_out expert_count feed_forward_length rope.dimension_count \
           rope.freq_base rope.scale_linear rope.scaling.factor rope.scaling.type",
    harmless: &[
        // These models have no norm with a mean.
        "attention.layer_norm_epsilon",
        // Read for yarn alone, which is refused.
        "rope.scaling.finetuned rope.scaling.original_context_length rope.scaling.yarn_beta_fast \
         rope.scaling.yarn_beta_slow",
        // How q and k were stored before the conversion.
        "tensor_data_layout",
        // The embedding says it.
        "vocab_size",
    ],
    neutral: &[
        ("attention.causal", YES),
        (
            "attention.clamp_kqv attention.max_alibi_bias attention.shared_kv_layers \
             attention.sliding_window_pattern attention.temperature_length \
             attention.temperature_scale attn_logit_softcapping expert_feed_forward_length \
             expert_gating_func expert_group_count expert_group_used_count expert_shared_count \
             expert_shared_feed_forward_length expert_used_count expert_weights_norm \
             final_logit_softcapping interleave_moe_layer_step leading_dense_block_count \
             nextn_predict_layers pooling_type rope.scaling.yarn_log_multiplier \
             router_logit_softcapping swin_norm use_parallel_residual",
            OFF,
        ),
        ("rope.scaling.yarn_ext_factor", &[Number(0.0), Number(-1.0)]),
        ("rope.scaling.attn_factor rope.scaling.yarn_attn_factor", ONE),
        (
            "attention.output_scale embedding_scale expert_weights_scale logit_scale \
             residual_scale rope.scaling.alpha",
            OFF_OR_ONE,
        ),
    ],
    refused: &[],
};

/// Keys under `tokenizer.`.
const TOKENIZER: KnownKeys = KnownKeys {
    read: "chat_template ggml.add_bos_token ggml.add_space_prefix ggml.bos_token_id \
           ggml.eom_token_id ggml.eos_token_id ggml.eos_token_ids ggml.eot_token_id ggml.merges \
           ggml.model ggml.padding_token_id ggml.pre ggml.scores ggml.token_type ggml.tokens \
           ggml.unknown_token_id",
    harmless: &[
        "chat_templates ggml.cls_token_id ggml.fim_mid_token_id ggml.fim_pad_token_id \
         ggml.fim_pre_token_id ggml.fim_rep_token_id ggml.fim_sep_token_id ggml.fim_suf_token_id \
         ggml.mask_token_id ggml.middle_token_id ggml.prefix_token_id",
        // Spelled so in the format.
        "ggml.seperator_token_id ggml.separator_token_id ggml.suffix_token_id \
         ggml.token_type_count",
        // The other keys hold the same vocabulary.
        "huggingface.json",
    ],
    neutral: &[
        (
            "ggml.add_eos_token ggml.add_padding_token ggml.add_sep_token ggml.add_unknown_token \
             ggml.normalizer.lowercase ggml.remove_extra_whitespaces \
             ggml.treat_whitespace_as_suffix",
            NO,
        ),
        ("ggml.escape_whitespaces", YES),
        // An empty list has no element that differs.
        ("ggml.precompiled_charsmap", &[]),
    ],
    refused: &[],
};

/// Templates with a name stand beside the one that is used.
const NAMED_TEMPLATE: &str = "chat_template.";

/// Refuses the first key that nobody reads and that may change an answer.
pub(super) fn check(container: &Container<'_>, architecture: &str) -> Result<(), GgufError> {
    let model = format!("{architecture}.");
    for (key, value) in &container.metadata {
        let (known, name) = if let Some(name) = key.strip_prefix(&model) {
            (&MODEL, name)
        } else if let Some(name) = key.strip_prefix("tokenizer.") {
            if name.starts_with(NAMED_TEMPLATE) {
                continue;
            }
            (&TOKENIZER, name)
        } else {
            continue;
        };
        let remove = "write the file anew without it (gguf-new-metadata --remove-metadata)";
        let shown = format!("{value:?}");
        let checked = match value {
            Value::Array(array) => known.check(name, &shown, array.iter().map(plain), remove),
            one => known.check(name, &shown, std::iter::once(plain(*one)), remove),
        };
        checked.map_err(|reason| GgufError::metadata(key, reason))?;
    }
    Ok(())
}

fn plain(value: Value<'_>) -> Plain<'_> {
    match value {
        Value::Unsigned(value) => Number(value as f64),
        Value::Signed(value) => Number(value as f64),
        Value::Float(value) => Number(value),
        Value::Bool(flag) => Flag(flag),
        Value::Text(text) => Plain::Text(text),
        Value::Array(_) => Plain::Other,
    }
}
