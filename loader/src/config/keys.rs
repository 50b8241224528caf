//! The keys of `config.json` that are known: what transformers and the tools around it write for
//! Llama, Mistral and Qwen2.

use serde_json::Value;

use super::ConfigError;
use super::hf::short;
use crate::keys::{KnownKeys, Plain};

use Plain::{Empty, Flag, Null, Number, Text};

const OFF: &[Plain<'static>] = &[Number(0.0), Flag(false), Null];
const ONE: &[Plain<'static>] = &[Number(1.0), Null];
const YES: &[Plain<'static>] = &[Flag(true), Null];
const NOTHING: &[Plain<'static>] = &[Null, Empty];

/// Keys of the file itself.
pub(super) const TOP: KnownKeys = KnownKeys {
    read: "attention_bias bos_token_id eos_token_id head_dim hidden_act hidden_size \
           intermediate_size layer_types max_position_embeddings max_window_layers mlp_bias \
           model_type num_attention_heads num_hidden_layers num_key_value_heads \
           partial_rotary_factor quantization_config rms_norm_eps rope_parameters rope_scaling \
           rope_theta sliding_window tie_word_embeddings use_sliding_window vocab_size",
    harmless: &[
        // Where the file is from, and with what it was written.
        "_commit_hash _from_model_config _name_or_path architectures auto_map dtype \
         is_llama_config model_name name_or_path tokenizer_class torch_dtype \
         transformers.js_config transformers_version unsloth_fixed unsloth_version",
        // How a run is arranged: its numbers are the same.
        "_attn_implementation _attn_implementation_autoset _attn_implementation_internal \
         _flash_attn_2_enabled attn_implementation base_model_pp_plan base_model_tp_plan \
         cache_implementation chunk_size_feed_forward gradient_checkpointing is_decoder \
         keys_to_ignore_at_inference output_attentions output_hidden_states output_scores \
         pretraining_tp return_dict return_dict_in_generate torchscript use_bfloat16 use_cache \
         use_flash_attention use_flash_attention_2",
        // Training.
        "attention_dropout attention_probs_dropout_prob attn_pdrop classifier_dropout dropout \
         embd_pdrop hidden_dropout hidden_dropout_prob initializer_range neftune_noise_alpha \
         resid_pdrop tf_legacy_loss",
        // Other tasks than the next token.
        "finetuning_task id2label label2id num_labels prefix problem_type task_specific_params",
        // Tokens that make no part of an answer.
        "cls_token_id decoder_start_token_id mask_token_id pad_token_id sep_token_id unk_token_id",
        // Lengths that bound no position here, and a norm that these models don't have.
        "layer_norm_eps layer_norm_epsilon max_sequence_length model_max_length n_ctx n_positions \
         seq_length tokenizer_model_max_length",
        // Defaults of generation: transformers drops them here, generation_config.json has them.
        "bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping \
         encoder_no_repeat_ngram_size epsilon_cutoff eta_cutoff exponential_decay_length_penalty \
         forced_bos_token_id forced_eos_token_id guidance_scale length_penalty max_length \
         max_new_tokens max_time min_length min_new_tokens min_p no_repeat_ngram_size \
         num_beam_groups num_beams num_return_sequences penalty_alpha remove_invalid_values \
         repetition_penalty suppress_tokens temperature top_k top_p typical_p",
    ],
    neutral: &[
        (
            "add_cross_attention attention_in_bias attention_out_bias attn_logit_softcapping bias \
             final_logit_softcapping is_encoder_decoder lm_head_bias logit_softcapping \
             n_routed_experts no_rope_layer_interval num_experts num_experts_per_tok \
             num_local_experts num_nextn_predict_layers qk_layernorm qk_norm rope_interleaved \
             tie_encoder_decoder use_bidirectional_attention use_dynamic_ntk use_logn_attn \
             use_mrope use_parallel_residual use_qk_norm",
            OFF,
        ),
        ("embedding_multiplier logit_scale logits_scaling residual_multiplier rotary_pct", ONE),
        ("causal is_causal", YES),
        ("hidden_activation", &[Text("silu"), Null]),
        (
            "attention_multiplier compression_config cross_attention_hidden_size no_rope_layers \
             original_max_position_embeddings pruned_heads",
            NOTHING,
        ),
    ],
    refused: &[(
        "quantization",
        "quantised weights of MLX are not supported; use the unquantised model or a GGUF file",
    )],
};

/// Keys within `rope_scaling` and `rope_parameters`.
pub(super) const ROPE: KnownKeys = KnownKeys {
    read: "factor high_freq_factor low_freq_factor original_max_position_embeddings rope_theta \
           rope_type type",
    harmless: &["finetuned"],
    neutral: &[("attention_factor attn_factor partial_rotary_factor", ONE)],
    refused: &[],
};

/// Refuses the first key of an object that nobody reads and that may change an answer.
pub(super) fn check(known: &KnownKeys, json: &Value) -> Result<(), ConfigError> {
    for (key, value) in json.as_object().into_iter().flatten() {
        known
            .check(key, &short(value), std::iter::once(plain(value)), "remove it")
            .map_err(|reason| ConfigError::new(short_key(key), reason))?;
    }
    Ok(())
}

/// A key for a message: short and on one line, whatever the file holds.
fn short_key(key: &str) -> String {
    const CHARS_MAX: usize = 60;
    key.chars().take(CHARS_MAX).flat_map(char::escape_debug).collect()
}

fn plain(value: &Value) -> Plain<'_> {
    match value {
        Value::Null => Null,
        Value::Bool(flag) => Flag(*flag),
        Value::Number(number) => number.as_f64().map_or(Plain::Other, Number),
        Value::String(text) => Text(text),
        Value::Array(list) if list.is_empty() => Empty,
        Value::Object(object) if object.is_empty() => Empty,
        Value::Array(_) | Value::Object(_) => Plain::Other,
    }
}
