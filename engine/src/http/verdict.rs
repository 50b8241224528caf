//! The verdict on each top-level field that clients of this API are known to send.
//!
//! A field works, or is harmless, or would change the answer if it were ignored and is refused
//! unless it has the value that changes nothing. A name that is not in the table is ignored and
//! named in the header `x-hat-ignored`. `docs/HTTP.md` lists the same names; a test compares them.

use serde_json::{Map, Value};

use super::ask::Shape;
use super::error::ApiError;

/// The consequence of a field.
#[derive(Clone, Copy)]
enum Verdict {
    /// The field is read.
    Works,
    /// The field changes no token of the answer.
    Harmless,
    /// The field would change the answer, unless this holds of its value.
    Changes(fn(&Value) -> bool),
}

use Verdict::{Changes, Harmless, Works};

/// Fields of both routes.
const BOTH: &[(&[&str], Verdict)] = &[
    (&["model", "max_tokens", "max_completion_tokens", "temperature", "top_k", "top_p"], Works),
    (&["min_p", "repetition_penalty", "repeat_penalty", "presence_penalty"], Works),
    (&["frequency_penalty", "repeat_last_n", "logit_bias", "seed", "stop", "n"], Works),
    (&["logprobs", "ignore_eos", "draft", "stream", "stream_options"], Works),
    (&["user", "metadata", "store", "service_tier", "safety_identifier"], Harmless),
    (&["prompt_cache_key", "prompt_cache_retention", "prediction", "verbosity"], Harmless),
    (&["reasoning_effort", "parallel_tool_calls", "cache_prompt", "id_slot", "slot_id"], Harmless),
    (&["timings_per_token", "return_progress", "priority", "request_id", "cache_salt"], Harmless),
    (&["keep_alive", "ttl", "draft_model", "kv_transfer_params", "max_retries"], Harmless),
    (&["guided_decoding_backend", "n_keep", "n_discard", "details"], Harmless),
    (&["decoder_input_details"], Harmless),
    // Parameters of samplers that the fields below switch on.
    (&["mirostat_tau", "mirostat_eta", "dynatemp_exponent", "dry_base"], Harmless),
    (&["dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers"], Harmless),
    (&["xtc_threshold"], Harmless),
    // Constraints on the text.
    (&["json_schema", "guided_json", "structured_outputs", "format"], Changes(no_schema)),
    (&["grammar", "guided_regex", "guided_choice", "guided_grammar"], Changes(empty)),
    (&["guided_whitespace_pattern", "structural_tag", "regex", "ebnf"], Changes(empty)),
    (&["bad_words"], Changes(empty)),
    (&["allowed_token_ids", "logits_processors", "custom_logit_processor"], Changes(empty)),
    // Ends and lengths under other names.
    (&["stop_token_ids", "stop_sequences", "include_stop_str_in_output"], Changes(empty)),
    (&["min_tokens", "max_new_tokens", "n_predict", "num_predict"], Changes(none_or_zero)),
    (&["max_length", "min_length", "truncate", "truncate_prompt_tokens"], Changes(none_or_zero)),
    (&["t_max_predict_ms"], Changes(none_or_zero)),
    // Other samplers.
    (&["best_of", "typical_p", "typical", "tfs", "tfs_z", "length_penalty"], Changes(one)),
    (&["guidance_scale", "encoder_repetition_penalty"], Changes(one)),
    (&["mirostat", "mirostat_mode", "dynatemp_range", "dry_multiplier"], Changes(zero)),
    (&["xtc_probability", "top_a", "smoothing_factor", "epsilon_cutoff"], Changes(zero)),
    (&["eta_cutoff", "no_repeat_ngram_size", "n_probs", "prompt_logprobs"], Changes(zero)),
    (&["num_beams"], Changes(one)),
    (&["top_n_sigma"], Changes(none_or_zero)),
    (&["use_beam_search", "early_stopping", "temperature_last", "watermark"], Changes(empty)),
    (&["samplers", "penalize_nl", "negative_prompt"], Changes(empty)),
    // Its other word is `temperature`, which the model's own defaults set where it is absent.
    (&["do_sample"], Changes(never)),
    // Other prompts, models and outputs.
    (&["options", "system", "template", "context", "images", "image_data"], Changes(empty)),
    (&["multi_modal_data", "mm_processor_kwargs", "lora", "lora_path"], Changes(empty)),
    (&["lora_request", "adapter_id", "return_full_text", "raw"], Changes(empty)),
    (&["return_tokens_as_token_ids", "return_token_ids"], Changes(empty)),
    (&["return_hidden_states", "return_tokens", "post_sampling_probs"], Changes(empty)),
    (&["skip_special_tokens", "spaces_between_special_tokens"], Changes(yes)),
];

/// Fields of `/v1/chat/completions` alone.
const CHAT: &[(&[&str], Verdict)] = &[
    (&["messages", "top_logprobs", "response_format"], Works),
    (&["tools", "functions", "audio", "chat_template", "chat_template_kwargs"], Changes(empty)),
    (&["documents", "web_search_options", "continue_final_message"], Changes(empty)),
    (&["add_special_tokens", "think", "enable_thinking"], Changes(empty)),
    (&["tool_choice", "function_call"], Changes(no_tool)),
    (&["modalities"], Changes(text_alone)),
    (&["add_generation_prompt"], Changes(yes)),
];

/// Fields of `/v1/completions` alone.
const TEXT: &[(&[&str], Verdict)] = &[
    (&["prompt", "response_format"], Works),
    (&["suffix", "echo"], Changes(empty)),
    (&["add_special_tokens"], Changes(yes)),
];

fn empty(value: &Value) -> bool {
    match value {
        Value::Array(items) => items.is_empty(),
        Value::Object(items) => items.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Bool(flag) => !flag,
        Value::Null => true,
        Value::Number(_) => false,
    }
}

/// An empty schema is one: it allows JSON alone.
fn no_schema(value: &Value) -> bool {
    !value.is_object() && empty(value)
}

fn never(_: &Value) -> bool {
    false
}

fn none_or_zero(value: &Value) -> bool {
    value.as_f64() == Some(0.0) || value.as_f64() == Some(-1.0)
}

fn zero(value: &Value) -> bool {
    value.as_f64() == Some(0.0)
}

fn one(value: &Value) -> bool {
    value.as_f64() == Some(1.0)
}

fn yes(value: &Value) -> bool {
    value.as_bool() == Some(true)
}

fn no_tool(value: &Value) -> bool {
    matches!(value.as_str(), Some("none" | "auto"))
}

fn text_alone(value: &Value) -> bool {
    *value == serde_json::json!(["text"])
}

fn verdict(shape: Shape, name: &str) -> Option<Verdict> {
    let own = match shape {
        Shape::Chat => CHAT,
        Shape::Text => TEXT,
    };
    // Names with a dot set up llama.cpp's drafting, which changes no token.
    if name.starts_with("speculative.") {
        return Some(Harmless);
    }
    let row = own.iter().chain(BOTH).find(|(names, _)| names.contains(&name));
    row.map(|(_, verdict)| *verdict)
}

/// Refuses a field that would change the answer, and returns the names that nothing is known
/// about, in the order of the body.
///
/// # Errors
/// 400 `unsupported`, naming the field.
pub(super) fn judge(shape: Shape, body: &Map<String, Value>) -> Result<Vec<&str>, ApiError> {
    let mut ignored = Vec::new();
    for (name, value) in body.iter().filter(|(_, value)| !value.is_null()) {
        match verdict(shape, name) {
            Some(Works | Harmless) => {}
            Some(Changes(is_neutral)) if is_neutral(value) => {}
            Some(Changes(_)) => {
                let message = format!("{name}: not supported, and it would change the answer");
                return Err(ApiError::unsupported(name.clone(), message));
            }
            None => ignored.push(name.as_str()),
        }
    }
    Ok(ignored)
}

/// Most bytes of the header that names ignored fields.
const IGNORED_BYTES_MAX: usize = 512;

/// The value of `x-hat-ignored`: the names with commas between, each byte that is no letter,
/// digit, `_`, `-` or `.` as `?`; the number of those that found no room behind them.
pub(super) fn ignored_header(names: &[&str]) -> Option<String> {
    let plain = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'-' | b'.' => char::from(byte),
        _ => '?',
    };
    let mut header = String::new();
    for (index, name) in names.iter().enumerate() {
        if header.len() + name.len() + 2 > IGNORED_BYTES_MAX {
            header += &format!("{}+{} more", separator(&header), names.len() - index);
            break;
        }
        header += separator(&header);
        header.extend(name.bytes().map(plain));
    }
    (!header.is_empty()).then_some(header)
}

fn separator(before: &str) -> &'static str {
    if before.is_empty() { "" } else { ", " }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::json;

    use super::*;

    fn names(tables: &[&[(&[&'static str], Verdict)]], pick: fn(Verdict) -> bool) -> Vec<String> {
        let rows = tables.iter().copied().flatten();
        let rows = rows.filter(|(_, verdict)| pick(*verdict));
        rows.flat_map(|(names, _)| names.iter().map(|name| (*name).to_owned())).collect()
    }

    #[test]
    fn no_name_stands_twice() {
        for own in [CHAT, TEXT] {
            let all = names(&[own, BOTH], |_| true);
            let unique: BTreeSet<_> = all.iter().collect();
            assert_eq!(unique.len(), all.len());
        }
    }

    /// The words in backquotes of the line of HTTP.md that begins so, and the lines it goes on in.
    fn documented(begin: &str) -> BTreeSet<String> {
        let page = include_str!("../../../docs/HTTP.md");
        let start = page.find(begin).unwrap_or_else(|| panic!("HTTP.md has no {begin:?}"));
        let paragraph = page[start + begin.len()..].split("\n\n").next().unwrap();
        let words = paragraph.split('`').skip(1).step_by(2);
        words.map(str::to_owned).collect()
    }

    #[test]
    fn the_reference_lists_the_same_names() {
        let table = |pick| names(&[BOTH, CHAT, TEXT], pick).into_iter().collect::<BTreeSet<_>>();
        let harmless = table(|verdict| matches!(verdict, Harmless));
        let refused = table(|verdict| matches!(verdict, Changes(_)));
        assert_eq!(documented("**Harmless**"), harmless);
        assert_eq!(documented("**Would change the answer**"), refused);
    }

    #[test]
    fn every_refused_field_is_refused_by_name_and_passes_where_it_changes_nothing() {
        let strange = json!({"a": [1]});
        for (shape, own) in [(Shape::Chat, CHAT), (Shape::Text, TEXT)] {
            for name in names(&[own, BOTH], |verdict| matches!(verdict, Changes(_))) {
                let body = |value: Value| Map::from_iter([(name.clone(), value)]);
                let error = judge(shape, &body(strange.clone())).unwrap_err().json();
                assert!(error.contains(&format!("\"param\":\"{name}\"")), "{error}");
                let neutral = [
                    json!(false),
                    json!(true),
                    json!(0),
                    json!(1.0),
                    json!("auto"),
                    json!(["text"]),
                ];
                let passes = neutral.into_iter().any(|value| judge(shape, &body(value)).is_ok());
                assert_eq!(passes, name != "do_sample", "{name}: a value that changes nothing");
                assert!(judge(shape, &body(Value::Null)).is_ok());
            }
        }
    }

    /// An empty grammar allows everything, an empty schema no more than JSON.
    #[test]
    fn an_empty_schema_is_a_constraint() {
        for name in ["json_schema", "guided_json", "structured_outputs", "format"] {
            let body = |value| Map::from_iter([(name.to_owned(), value)]);
            assert!(judge(Shape::Chat, &body(json!({}))).is_err(), "{name}");
            assert!(judge(Shape::Chat, &body(json!(""))).is_ok(), "{name}");
        }
    }

    #[test]
    fn unknown_names_are_told_within_a_bound() {
        let body: Map<_, _> =
            [("user", json!("x")), ("foo", json!(1)), ("b\r\nar", json!(2)), ("nil", Value::Null)]
                .map(|(name, value)| (name.to_owned(), value))
                .into_iter()
                .collect();
        let ignored = judge(Shape::Chat, &body).unwrap();
        assert_eq!(ignored_header(&ignored).unwrap(), "foo, b??ar");
        let long = vec!["x123456789"; 1000];
        let header = ignored_header(&long).unwrap();
        assert!(header.len() < IGNORED_BYTES_MAX + 32 && header.contains("+958 more"), "{header}");
        assert_eq!(ignored_header(&[]), None);
    }
}
