//! From the JSON of `/v1/chat/completions` and `/v1/completions` to [`Request`]s.
//!
//! Top-level fields that we don't know are ignored, as clients send many. Fields that we know and
//! can't honour are refused where ignoring them would change the answer. The sampler's ranges are
//! checked by the engine, which names the same fields.

use serde_json::Value;

use super::error::ApiError;
use super::fields::Fields;
use super::json;
use crate::backend::TokenId;
use crate::draft::DraftMode;
use crate::request::{Message, Prompt, Request, Role};
use crate::sample::SamplerConfig;

/// Most answers to one request.
pub(super) const CHOICES_MAX: u64 = 4;
/// Most messages of one conversation.
const MESSAGES_MAX: usize = 4096;
/// Most alternatives with each token.
const TOP_LOGPROBS_MAX: u64 = 20;
/// `max_tokens` has to fit a signed 32-bit number, as elsewhere; the context bounds it anyway.
const MAX_TOKENS_MAX: u64 = i32::MAX as u64;

/// Which of the two routes is asked, and so the shape of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Text,
}

/// A parsed request.
#[derive(Debug)]
pub(super) struct Ask {
    /// What the engine is asked; the same for each choice but for its number.
    pub(super) request: Request,
    /// How many answers, `1..=CHOICES_MAX`.
    pub(super) choices: u32,
    /// Whether the answer is streamed.
    pub(super) stream: bool,
    /// Whether the stream ends with a chunk about usage.
    pub(super) include_usage: bool,
}

/// Reads a body.
///
/// # Errors
/// 400, naming the field.
pub(super) fn ask(shape: Shape, body: &[u8]) -> Result<Ask, ApiError> {
    let body = json::object(body)?;
    let fields = Fields(&body);
    fields.text("model")?;
    refuse_unsupported(shape, fields)?;
    let (mut request, top_logprobs) = match shape {
        Shape::Chat => (Request::conversation(messages(fields)?), chat_logprobs(fields)?),
        Shape::Text => {
            let top = fields.integer("logprobs", 0..=TOP_LOGPROBS_MAX)?;
            (prompt(fields)?, top)
        }
    };
    request.top_logprobs = top_logprobs.map(|top| u8::try_from(top).expect("in range"));
    request.max_tokens = max_tokens(fields)?;
    request.sampler = sampler(fields)?;
    request.stop = stop(fields)?;
    request.ignore_eos = fields.flag("ignore_eos")?.unwrap_or(false);
    request.draft = draft(fields)?;
    let choices = fields.integer("n", 1..=CHOICES_MAX)?.unwrap_or(1);
    let options = fields.object("stream_options")?;
    let include_usage = match options {
        Some(options) => options.flag("include_usage")?.unwrap_or(false),
        None => false,
    };
    Ok(Ask {
        request,
        choices: u32::try_from(choices).expect("in range"),
        stream: fields.flag("stream")?.unwrap_or(false),
        include_usage,
    })
}

/// What would change the answer if it were ignored.
fn refuse_unsupported(shape: Shape, fields: Fields<'_>) -> Result<(), ApiError> {
    let empty = |value: &Value| match value {
        Value::Array(items) => items.is_empty(),
        Value::Object(items) => items.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Bool(flag) => !flag,
        _ => false,
    };
    let names: &[&'static str] = match shape {
        Shape::Chat => {
            &["tools", "functions", "audio", "grammar", "json_schema", "chat_template_kwargs"]
        }
        Shape::Text => &["suffix", "echo", "grammar", "json_schema"],
    };
    for &name in names {
        if fields.value(name).is_some_and(|value| !empty(value)) {
            return Err(ApiError::unsupported(
                name,
                format!("{name}: not supported; leave it out"),
            ));
        }
    }
    if let Some(format) = fields.object("response_format")?
        && format.text("type")?.is_some_and(|kind| kind != "text")
    {
        let message = "response_format: only {\"type\": \"text\"} is supported";
        return Err(ApiError::unsupported("response_format", message));
    }
    Ok(())
}

fn messages(fields: Fields<'_>) -> Result<Vec<Message>, ApiError> {
    let list = fields
        .list("messages")?
        .ok_or_else(|| ApiError::field("messages", "messages: an array is required"))?;
    if list.is_empty() || list.len() > MESSAGES_MAX {
        let message = format!("messages: between 1 and {MESSAGES_MAX} are needed");
        return Err(ApiError::field("messages", message));
    }
    list.iter().enumerate().map(|(index, value)| message(index, value)).collect()
}

fn message(index: usize, value: &Value) -> Result<Message, ApiError> {
    let at = |field: &str| format!("messages[{index}]{field}");
    let refuse = |field: &str, expected: &str| {
        let param = at(field);
        let message = format!("{param}: {expected}");
        ApiError::field(param, message)
    };
    let map = value.as_object().ok_or_else(|| refuse("", "an object is expected"))?;
    let fields = Fields(map);
    let role = fields.value("role").and_then(Value::as_str).and_then(|role| Role::parse(role).ok());
    let role = role.ok_or_else(|| {
        refuse(".role", "one of system, developer, user, assistant, tool is expected")
    })?;
    if fields.value("tool_calls").and_then(Value::as_array).is_some_and(|calls| !calls.is_empty()) {
        return Err(ApiError::unsupported(at(".tool_calls"), "tool calls are not supported"));
    }
    let content = match fields.value("content") {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => text_parts(&at(".content"), parts)?,
        None if role == Role::Assistant => String::new(),
        _ => {
            return Err(refuse(".content", "a string or an array of text parts is expected"));
        }
    };
    Ok(Message::new(role, content))
}

/// The texts of content parts, one after the other.
fn text_parts(param: &str, parts: &[Value]) -> Result<String, ApiError> {
    let mut content = String::new();
    for (index, part) in parts.iter().enumerate() {
        let kind = part.get("type").and_then(Value::as_str);
        let text = part.get("text").and_then(Value::as_str);
        match (kind, text) {
            (Some("text"), Some(text)) => content.push_str(text),
            (Some("text"), None) | (None, _) => {
                let param = format!("{param}[{index}]");
                let message = format!("{param}: {{\"type\": \"text\", \"text\": ...}} is expected");
                return Err(ApiError::field(param, message));
            }
            (Some(_), _) => {
                let message = "only text parts are supported: this model reads no images or audio";
                let status = axum::http::StatusCode::BAD_REQUEST;
                return Err(ApiError::new(status, "unsupported_content", message)
                    .param(format!("{param}[{index}].type")));
            }
        }
    }
    Ok(content)
}

/// A string, an array of one string, or token ids (also as an array of one array).
fn prompt(fields: Fields<'_>) -> Result<Request, ApiError> {
    let expected = || {
        let message =
            "prompt: a string, an array of one string, or an array of token ids is expected";
        ApiError::field("prompt", message)
    };
    let prompt = match fields.value("prompt").ok_or_else(expected)? {
        Value::String(text) => Prompt::Text(text.clone()),
        Value::Array(items) => match items.as_slice() {
            [Value::String(text)] => Prompt::Text(text.clone()),
            [Value::Array(tokens)] => Prompt::Tokens(token_ids(tokens).ok_or_else(expected)?),
            [Value::String(_) | Value::Array(_), ..] => {
                let message = "prompt: one prompt a request; send several requests instead";
                return Err(ApiError::unsupported("prompt", message));
            }
            tokens => Prompt::Tokens(token_ids(tokens).ok_or_else(expected)?),
        },
        _ => return Err(expected()),
    };
    Ok(match prompt {
        Prompt::Tokens(tokens) => Request::tokens(tokens),
        Prompt::Text(text) => Request::text(text),
        Prompt::Chat(_) => unreachable!("made above, from text or tokens"),
    })
}

fn token_ids(values: &[Value]) -> Option<Vec<TokenId>> {
    let id = |value: &Value| value.as_u64().and_then(|id| TokenId::try_from(id).ok());
    values.iter().map(id).collect()
}

/// `logprobs` switches them on, `top_logprobs` adds alternatives.
fn chat_logprobs(fields: Fields<'_>) -> Result<Option<u64>, ApiError> {
    let wanted = fields.flag("logprobs")?.unwrap_or(false);
    let top = fields.integer("top_logprobs", 0..=TOP_LOGPROBS_MAX)?;
    match (wanted, top) {
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => {
            let message = "top_logprobs: set logprobs to true to have alternatives";
            Err(ApiError::field("top_logprobs", message))
        }
    }
}

/// Who drafts: an extension of ours, named as the flag.
fn draft(fields: Fields<'_>) -> Result<DraftMode, ApiError> {
    match fields.text("draft")? {
        None => Ok(DraftMode::default()),
        Some(name) => {
            name.parse().map_err(|error: crate::Error| ApiError::field("draft", error.to_string()))
        }
    }
}

/// `max_completion_tokens` is the newer name and wins.
fn max_tokens(fields: Fields<'_>) -> Result<Option<u32>, ApiError> {
    let older = fields.integer("max_tokens", 1..=MAX_TOKENS_MAX)?;
    let newer = fields.integer("max_completion_tokens", 1..=MAX_TOKENS_MAX)?;
    Ok(newer.or(older).map(|tokens| u32::try_from(tokens).expect("in range")))
}

fn stop(fields: Fields<'_>) -> Result<Vec<String>, ApiError> {
    let expected = || ApiError::field("stop", "stop: a string or an array of strings is expected");
    match fields.value("stop") {
        None => Ok(Vec::new()),
        Some(Value::String(text)) => Ok(vec![text.clone()]),
        Some(Value::Array(items)) => {
            items.iter().map(|item| item.as_str().map(str::to_owned).ok_or_else(expected)).collect()
        }
        Some(_) => Err(expected()),
    }
}

/// Greedy unless a temperature is given; a random seed unless one is given.
fn sampler(fields: Fields<'_>) -> Result<SamplerConfig, ApiError> {
    let off = SamplerConfig::default();
    let to_u32 = |value: u64| u32::try_from(value).expect("in range");
    let u32_range = 0..=u64::from(u32::MAX);
    let repetition_penalty = match fields.number("repetition_penalty")? {
        Some(penalty) => Some(penalty),
        None => fields.number("repeat_penalty")?,
    };
    let seed = match fields.integer_or_off("seed", 0..=u64::MAX)? {
        Some(seed) => seed,
        None => random_seed()?,
    };
    let last_n = fields.integer_or_off("repeat_last_n", u32_range.clone())?;
    let penalty_last_n = match (fields.value("repeat_last_n"), last_n) {
        (None, _) => off.penalty_last_n,
        (Some(_), None) => u32::MAX, // -1: all of it
        (Some(_), Some(last_n)) => to_u32(last_n),
    };
    Ok(SamplerConfig {
        temperature: fields.number("temperature")?.unwrap_or(off.temperature),
        top_k: fields.integer_or_off("top_k", u32_range)?.map_or(off.top_k, to_u32),
        top_p: fields.number("top_p")?.unwrap_or(off.top_p),
        min_p: fields.number("min_p")?.unwrap_or(off.min_p),
        repetition_penalty: repetition_penalty.unwrap_or(off.repetition_penalty),
        presence_penalty: fields.number("presence_penalty")?.unwrap_or(off.presence_penalty),
        frequency_penalty: fields.number("frequency_penalty")?.unwrap_or(off.frequency_penalty),
        penalty_last_n,
        logit_bias: logit_bias(fields)?,
        seed,
    })
}

fn logit_bias(fields: Fields<'_>) -> Result<Vec<(TokenId, f32)>, ApiError> {
    let Some(entries) = fields.object("logit_bias")? else {
        return Ok(Vec::new());
    };
    let entry =
        |(id, bias): (&String, &Value)| Some((id.parse::<TokenId>().ok()?, bias.as_f64()? as f32));
    entries.0.iter().map(entry).collect::<Option<Vec<_>>>().ok_or_else(|| {
        ApiError::field(
            "logit_bias",
            "logit_bias: token ids (as strings) with numbers are expected",
        )
    })
}

fn random_seed() -> Result<u64, ApiError> {
    let mut seed = [0; 8];
    getrandom::fill(&mut seed).map_err(|_| {
        let status = axum::http::StatusCode::INTERNAL_SERVER_ERROR;
        ApiError::new(status, "resource", "the system has no random numbers for a seed")
    })?;
    Ok(u64::from_le_bytes(seed))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn chat(mut extra: Value) -> Result<Ask, ApiError> {
        let fields = extra.as_object_mut().unwrap();
        let messages = json!([{"role": "user", "content": "hi"}]);
        fields.entry("messages").or_insert(messages);
        ask(Shape::Chat, extra.to_string().as_bytes())
    }

    fn refused(extra: Value, param: &str) -> String {
        let json = chat(extra).expect_err(param).json();
        assert!(json.contains(&format!("\"param\":\"{param}\"")), "{param}: {json}");
        json
    }

    #[test]
    fn the_default_is_one_greedy_answer() {
        let ask = chat(json!({"model": "anything", "user": "ignored", "unknown": [1]})).unwrap();
        assert_eq!(ask.request.prompt, Prompt::Chat(vec![Message::new(Role::User, "hi")]));
        let seed = ask.request.sampler.seed;
        let greedy = SamplerConfig { seed, ..SamplerConfig::default() };
        assert_eq!(ask.request.sampler, greedy);
        assert_eq!((ask.choices, ask.stream, ask.include_usage), (1, false, false));
        assert_eq!((ask.request.max_tokens, ask.request.top_logprobs), (None, None));
    }

    #[test]
    fn every_field_arrives() {
        let ask = chat(json!({
            "max_tokens": 3, "max_completion_tokens": 5, "temperature": 0.5, "top_p": 0.9,
            "top_k": 7, "min_p": 0.1, "seed": 18_446_744_073_709_551_615_u64, "stop": ["a", "b"],
            "presence_penalty": 0.25, "frequency_penalty": -0.5, "repeat_penalty": 1.5,
            "repeat_last_n": -1, "logit_bias": {"3": -100, "4": 1.5}, "n": 2, "logprobs": true,
            "top_logprobs": 4, "stream": true, "stream_options": {"include_usage": true},
            "response_format": {"type": "text"}, "tools": [], "max_retries": null,
            "ignore_eos": true, "draft": "lookup",
        }))
        .unwrap();
        let expected = SamplerConfig {
            temperature: 0.5,
            top_k: 7,
            top_p: 0.9,
            min_p: 0.1,
            repetition_penalty: 1.5,
            presence_penalty: 0.25,
            frequency_penalty: -0.5,
            penalty_last_n: u32::MAX,
            logit_bias: vec![(3, -100.0), (4, 1.5)],
            seed: u64::MAX,
        };
        assert_eq!(ask.request.sampler, expected);
        assert_eq!(ask.request.max_tokens, Some(5));
        assert_eq!(ask.request.stop, ["a", "b"]);
        assert_eq!(ask.request.top_logprobs, Some(4));
        assert!(ask.request.ignore_eos);
        assert_eq!((ask.choices, ask.stream, ask.include_usage), (2, true, true));
        assert_eq!(ask.request.draft, DraftMode::Lookup);
    }

    #[test]
    fn wrong_fields_are_named() {
        for (extra, param) in [
            (json!({"temperature": "warm"}), "temperature"),
            (json!({"max_tokens": 0}), "max_tokens"),
            (json!({"draft": "medusa"}), "draft"),
            (json!({"draft": true}), "draft"),
            (json!({"max_tokens": -1}), "max_tokens"),
            (json!({"max_tokens": 1_u64 << 63}), "max_tokens"),
            (json!({"n": 10_000}), "n"),
            (json!({"n": 0}), "n"),
            (json!({"seed": 18_446_744_073_709_551_616.0}), "seed"),
            (json!({"top_logprobs": 2}), "top_logprobs"),
            (json!({"logprobs": true, "top_logprobs": 1_000_000}), "top_logprobs"),
            (json!({"stop": 7}), "stop"),
            (json!({"stop": [7]}), "stop"),
            (json!({"logit_bias": {"x": 1}}), "logit_bias"),
            (json!({"logit_bias": [[1, 2]]}), "logit_bias"),
            (json!({"stream": "yes"}), "stream"),
            (json!({"stream_options": 1}), "stream_options"),
            (json!({"tools": [{}]}), "tools"),
            (json!({"response_format": {"type": "json_object"}}), "response_format"),
            (json!({"messages": []}), "messages"),
            (json!({"messages": "hi"}), "messages"),
            (json!({"messages": [5]}), "messages[0]"),
            (json!({"messages": [{"role": "owner", "content": "x"}]}), "messages[0].role"),
            (json!({"messages": [{"role": "user", "content": {}}]}), "messages[0].content"),
            (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
            (
                json!({"messages": [{"role": "user", "content": [{"text": "x"}]}]}),
                "messages[0].content[0]",
            ),
            (json!({"model": 5}), "model"),
        ] {
            refused(extra, param);
        }
        let image = json!([{"type": "image_url", "image_url": {"url": "data:secret"}}]);
        let json = refused(
            json!({"messages": [{"role": "user", "content": image}]}),
            "messages[0].content[0].type",
        );
        assert!(json.contains("unsupported_content") && !json.contains("secret"));
    }

    #[test]
    fn text_parts_join() {
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        let ask = chat(json!({"messages": [{"role": "developer", "content": parts}]})).unwrap();
        assert_eq!(ask.request.prompt, Prompt::Chat(vec![Message::new(Role::System, "ab")]));
    }

    #[test]
    fn prompts_of_every_form() {
        let prompt = |prompt: Value| {
            ask(Shape::Text, json!({"prompt": prompt}).to_string().as_bytes())
                .map(|ask| ask.request.prompt)
        };
        assert_eq!(prompt(json!("a")).unwrap(), Prompt::Text("a".into()));
        assert_eq!(prompt(json!(["a"])).unwrap(), Prompt::Text("a".into()));
        assert_eq!(prompt(json!([1, 2])).unwrap(), Prompt::Tokens(vec![1, 2]));
        assert_eq!(prompt(json!([[1, 2]])).unwrap(), Prompt::Tokens(vec![1, 2]));
        for wrong in [json!(["a", "b"]), json!([1, -2]), json!([1, 1_u64 << 32]), json!({})] {
            prompt(wrong).unwrap_err();
        }
    }

    #[test]
    fn seeds_differ_unless_given() {
        let seed = |extra| chat(extra).unwrap().request.sampler.seed;
        assert_ne!(seed(json!({})), seed(json!({"seed": -1})));
        assert_eq!(seed(json!({"seed": 7})), 7);
    }
}
