//! From the JSON of `/v1/chat/completions` and `/v1/completions` to [`Request`]s.
//!
//! [`super::verdict`] says which fields are read, ignored and refused. The sampler's ranges are
//! checked by the engine, which names the same fields.

use hat_plan::TokenId;
use serde_json::Value;

use super::error::ApiError;
use super::fields::Fields;
use super::json;
use super::verdict;
use crate::Error;
use hat_core::draft::DraftMode;
use hat_core::request::{Message, Request, Role};
use hat_core::sample::SamplerConfig;

/// Most answers to one request.
pub(super) const CHOICES_MAX: u64 = 4;
/// Most answers to one request with several prompts, each prompt's choices counted.
const ANSWERS_MAX: usize = 32;
/// Most messages of one conversation.
const MESSAGES_MAX: usize = 4096;
/// Most alternatives with each token.
const TOP_LOGPROBS_MAX: u64 = 20;
/// `max_tokens` has to fit a signed 32-bit number, as elsewhere; the context bounds it anyway.
const MAX_TOKENS_MAX: u64 = i32::MAX as u64;

/// Route that is asked, and so the shape of the answer.
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
    /// The engine's request for each prompt, at least one; its choices differ in their number.
    pub(super) requests: Vec<Request>,
    /// Answers to each prompt, `1..=CHOICES_MAX`.
    pub(super) choices: u32,
    /// True if the answer is streamed.
    pub(super) stream: bool,
    /// True if the stream ends with a chunk about usage.
    pub(super) include_usage: bool,
    /// Values that the model's files gave, as the header `x-hat-sampling` has them.
    pub(super) sampling: Option<String>,
    /// Names of the fields that were ignored, as the header `x-hat-ignored` has them.
    pub(super) ignored: Option<String>,
}

impl Ask {
    /// True if log-probabilities go with each token.
    pub(super) fn logprobs(&self) -> bool {
        self.requests.iter().any(|request| request.top_logprobs.is_some())
    }

    /// Answers to all prompts together, at most [`ANSWERS_MAX`] or [`CHOICES_MAX`].
    pub(super) fn answers(&self) -> u32 {
        self.choices * u32::try_from(self.requests.len()).expect("few prompts")
    }
}

/// Reads a body. `model` is the sampler of a request that says nothing about it.
///
/// # Errors
/// 400, naming the field.
pub(super) fn ask(shape: Shape, body: &[u8], model: &SamplerConfig) -> Result<Ask, ApiError> {
    let body = json::object(body)?;
    let fields = Fields(&body);
    fields.text("model")?;
    let ignored = verdict::judge(shape, &body)?;
    refuse_format(fields)?;
    let (mut requests, top_logprobs) = match shape {
        Shape::Chat => (vec![Request::conversation(messages(fields)?)], chat_logprobs(fields)?),
        Shape::Text => {
            let top = fields.integer("logprobs", 0..=TOP_LOGPROBS_MAX)?;
            (prompts(fields)?, top)
        }
    };
    let (max_tokens, sampler, stop) = (max_tokens(fields)?, sampler(fields, model)?, stop(fields)?);
    let sampling = from_model(fields, &sampler);
    let (ignore_eos, draft) = (fields.flag("ignore_eos")?.unwrap_or(false), draft(fields)?);
    for request in &mut requests {
        request.top_logprobs = top_logprobs.map(|top| u8::try_from(top).expect("in range"));
        request.max_tokens = max_tokens;
        request.sampler = sampler.clone();
        request.stop.clone_from(&stop);
        request.ignore_eos = ignore_eos;
        request.draft = draft;
    }
    let choices = fields.integer("n", 1..=CHOICES_MAX)?.unwrap_or(1);
    if requests.len() * choices as usize > ANSWERS_MAX {
        let message = format!("prompt: prompts times n is at most {ANSWERS_MAX} a request");
        return Err(ApiError::field("prompt", message));
    }
    let stream = fields.flag("stream")?.unwrap_or(false);
    let options = fields.object("stream_options")?;
    if options.is_some_and(|options| !options.0.is_empty()) && !stream {
        let message = "stream_options: only allowed together with \"stream\": true";
        return Err(ApiError::field("stream_options", message));
    }
    let include_usage = match options {
        Some(options) => options.flag("include_usage")?.unwrap_or(false),
        None => false,
    };
    Ok(Ask {
        requests,
        choices: u32::try_from(choices).expect("in range"),
        stream,
        include_usage,
        sampling,
        ignored: verdict::ignored_header(&ignored),
    })
}

/// Refuses every format of an answer but text.
fn refuse_format(fields: Fields<'_>) -> Result<(), ApiError> {
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

/// A string, token ids, or an array of strings and arrays of token ids, each a prompt.
fn prompts(fields: Fields<'_>) -> Result<Vec<Request>, ApiError> {
    let expected = || {
        let message = "prompt: a string, an array of token ids, or an array of prompts is expected";
        ApiError::field("prompt", message)
    };
    let one = |value: &Value| match value {
        Value::String(text) => Some(Request::text(text.clone())),
        Value::Array(tokens) => token_ids(tokens).map(Request::tokens),
        _ => None,
    };
    match fields.value("prompt").ok_or_else(expected)? {
        Value::Array(items)
            if matches!(items.first(), Some(Value::String(_) | Value::Array(_))) =>
        {
            if items.len() > ANSWERS_MAX {
                let message = format!("prompt: at most {ANSWERS_MAX} prompts a request");
                return Err(ApiError::field("prompt", message));
            }
            items.iter().map(|item| one(item).ok_or_else(expected)).collect()
        }
        value => Ok(vec![one(value).ok_or_else(expected)?]),
    }
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

/// Drafting mode: an extension of ours, named as the flag.
fn draft(fields: Fields<'_>) -> Result<DraftMode, ApiError> {
    match fields.text("draft")? {
        None => Ok(DraftMode::default()),
        Some(name) => name.parse().map_err(|error| ApiError::from(Error::Input(error))),
    }
}

/// `max_completion_tokens` is the newer name and wins; -1 is no limit.
fn max_tokens(fields: Fields<'_>) -> Result<Option<u32>, ApiError> {
    let older = fields.integer_or_off("max_tokens", 1..=MAX_TOKENS_MAX)?;
    let newer = fields.integer_or_off("max_completion_tokens", 1..=MAX_TOKENS_MAX)?;
    Ok(newer.or(older).map(|tokens| u32::try_from(tokens).expect("in range")))
}

fn stop(fields: Fields<'_>) -> Result<Vec<String>, ApiError> {
    let expected = || ApiError::field("stop", "stop: a string or an array of strings is expected");
    let mut stops: Vec<String> = match fields.value("stop") {
        None => Vec::new(),
        Some(Value::String(text)) => vec![text.clone()],
        Some(Value::Array(items)) => {
            let text = |item: &Value| item.as_str().map(str::to_owned).ok_or_else(expected);
            items.iter().map(text).collect::<Result<_, _>>()?
        }
        Some(_) => return Err(expected()),
    };
    // Many clients send an empty string for none.
    stops.retain(|stop| !stop.is_empty());
    Ok(stops)
}

/// The model's own values where the request is silent; a random seed unless one is given.
fn sampler(fields: Fields<'_>, model: &SamplerConfig) -> Result<SamplerConfig, ApiError> {
    let to_u32 = |value: u64| u32::try_from(value).expect("in range");
    let u32_range = 0..=u64::from(u32::MAX);
    let repetition_penalty = fields.number("repetition_penalty")?;
    let other_name = fields.number("repeat_penalty")?;
    if repetition_penalty.is_some_and(|penalty| other_name.is_some_and(|other| other != penalty)) {
        let message = "repeat_penalty: another name of repetition_penalty, and not equal to it";
        return Err(ApiError::field("repeat_penalty", message));
    }
    let repetition_penalty = repetition_penalty.or(other_name);
    let seed = match fields.integer_or_off("seed", 0..=u64::MAX)? {
        Some(seed) => seed,
        None => random_seed()?,
    };
    let last_n = fields.integer_or_off("repeat_last_n", u32_range.clone())?;
    let penalty_last_n = match (fields.value("repeat_last_n"), last_n) {
        (None, _) => model.penalty_last_n,
        (Some(_), None) => u32::MAX, // -1: all of it
        (Some(_), Some(last_n)) => to_u32(last_n),
    };
    let top_k = fields.integer_or_off("top_k", u32_range)?.map_or(0, to_u32);
    Ok(SamplerConfig {
        temperature: fields.number("temperature")?.unwrap_or(model.temperature),
        top_k: fields.value("top_k").map_or(model.top_k, |_| top_k),
        top_p: fields.number("top_p")?.unwrap_or(model.top_p),
        min_p: fields.number("min_p")?.unwrap_or(model.min_p),
        repetition_penalty: repetition_penalty.unwrap_or(model.repetition_penalty),
        presence_penalty: fields.number("presence_penalty")?.unwrap_or(model.presence_penalty),
        frequency_penalty: fields.number("frequency_penalty")?.unwrap_or(model.frequency_penalty),
        penalty_last_n,
        logit_bias: logit_bias(fields)?,
        seed,
    })
}

/// The values of `used` that change an answer and that the request left to the model's files.
fn from_model(fields: Fields<'_>, used: &SamplerConfig) -> Option<String> {
    let off = SamplerConfig::default();
    let samples = used.temperature != off.temperature;
    let values = [
        ("temperature", samples, used.temperature.to_string()),
        ("top_k", samples && used.top_k != off.top_k, used.top_k.to_string()),
        ("top_p", samples && used.top_p != off.top_p, used.top_p.to_string()),
        ("min_p", samples && used.min_p != off.min_p, used.min_p.to_string()),
        (
            "repetition_penalty",
            used.repetition_penalty != off.repetition_penalty
                && fields.value("repeat_penalty").is_none(),
            used.repetition_penalty.to_string(),
        ),
    ];
    let silent = |name: &str| fields.value(name).is_none();
    let given = values.iter().filter(|(name, matters, _)| *matters && silent(name));
    let given: Vec<_> = given.map(|(name, _, value)| format!("{name}={value}")).collect();
    (!given.is_empty()).then(|| given.join(", "))
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
    use hat_core::request::Prompt;

    fn chat(mut extra: Value) -> Result<Ask, ApiError> {
        let fields = extra.as_object_mut().unwrap();
        let messages = json!([{"role": "user", "content": "hi"}]);
        fields.entry("messages").or_insert(messages);
        ask(Shape::Chat, extra.to_string().as_bytes(), &SamplerConfig::default())
    }

    fn refused(extra: Value, param: &str) -> String {
        let json = chat(extra).expect_err(param).json();
        assert!(json.contains(&format!("\"param\":\"{param}\"")), "{param}: {json}");
        json
    }

    #[test]
    fn the_default_is_one_greedy_answer() {
        let ask = chat(json!({"model": "anything", "user": "ignored", "unknown": [1]})).unwrap();
        let [request] = &ask.requests[..] else { panic!("one prompt") };
        assert_eq!(request.prompt, Prompt::Chat(vec![Message::new(Role::User, "hi")]));
        let seed = request.sampler.seed;
        let greedy = SamplerConfig { seed, ..SamplerConfig::default() };
        assert_eq!(request.sampler, greedy);
        assert_eq!((ask.choices, ask.stream, ask.include_usage), (1, false, false));
        assert_eq!((request.max_tokens, request.top_logprobs), (None, None));
        assert_eq!(ask.ignored.as_deref(), Some("unknown"));
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
        let request = &ask.requests[0];
        assert_eq!(request.sampler, expected);
        assert_eq!(request.max_tokens, Some(5));
        assert_eq!(request.stop, ["a", "b"]);
        assert_eq!(request.top_logprobs, Some(4));
        assert!(request.ignore_eos);
        assert_eq!((ask.choices, ask.stream, ask.include_usage), (2, true, true));
        assert_eq!(request.draft, DraftMode::Lookup);
    }

    #[test]
    fn limits_that_are_off_and_stops_that_are_empty_count_as_absent() {
        for body in [json!({"max_tokens": -1}), json!({"max_completion_tokens": -1, "stop": ""})] {
            let ask = chat(and_stream(body)).unwrap();
            assert_eq!(ask.requests[0].max_tokens, None);
            assert!(ask.requests[0].stop.is_empty());
        }
        let ask =
            chat(json!({"stop": ["", "a"], "repeat_penalty": 1.5, "repetition_penalty": 1.5}));
        let ask = ask.unwrap();
        assert_eq!(ask.requests[0].stop, ["a"]);
        assert_eq!(ask.requests[0].sampler.repetition_penalty, 1.5);
    }

    fn and_stream(mut body: Value) -> Value {
        body["stream"] = json!(true);
        body
    }

    #[test]
    fn wrong_fields_are_named() {
        for (extra, param) in [
            (json!({"temperature": "warm"}), "temperature"),
            (json!({"max_tokens": 0}), "max_tokens"),
            (json!({"draft": "fast"}), "draft"),
            (json!({"draft": true}), "draft"),
            (json!({"max_tokens": -2}), "max_tokens"),
            (json!({"repeat_penalty": 1.5, "repetition_penalty": 2}), "repeat_penalty"),
            (json!({"stream_options": {"include_usage": true}}), "stream_options"),
            (json!({"guided_regex": "[a-z]+"}), "guided_regex"),
            (json!({"tool_choice": "required"}), "tool_choice"),
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
        let joined = Prompt::Chat(vec![Message::new(Role::System, "ab")]);
        assert_eq!(ask.requests[0].prompt, joined);
    }

    #[test]
    fn prompts_of_every_form() {
        let prompts = |prompt: Value| {
            let body = json!({"prompt": prompt, "n": 2}).to_string();
            let prompts = |ask: Ask| ask.requests.into_iter().map(|request| request.prompt);
            ask(Shape::Text, body.as_bytes(), &SamplerConfig::default())
                .map(|ask| prompts(ask).collect::<Vec<_>>())
        };
        let text = |text: &str| Prompt::Text(text.into());
        let tokens = || Prompt::Tokens(vec![1, 2]);
        assert_eq!(prompts(json!("a")).unwrap(), [text("a")]);
        assert_eq!(prompts(json!(["a"])).unwrap(), [text("a")]);
        assert_eq!(prompts(json!([1, 2])).unwrap(), [tokens()]);
        assert_eq!(prompts(json!([[1, 2]])).unwrap(), [tokens()]);
        assert_eq!(prompts(json!(["a", "b"])).unwrap(), [text("a"), text("b")]);
        assert_eq!(prompts(json!([[1, 2], "b"])).unwrap(), [tokens(), text("b")]);
        assert_eq!(prompts(json!(vec!["a"; 16])).unwrap().len(), 16);
        let too_many = [json!(vec!["a"; 17]), json!(vec!["a"; 100_000])];
        let wrong = [json!(["a", 1]), json!([1, -2]), json!([1, 1_u64 << 32]), json!({})];
        for wrong in wrong.into_iter().chain(too_many) {
            prompts(wrong).unwrap_err();
        }
    }

    #[test]
    fn seeds_differ_unless_given() {
        let seed = |extra| chat(extra).unwrap().requests[0].sampler.seed;
        assert_ne!(seed(json!({})), seed(json!({"seed": -1})));
        assert_eq!(seed(json!({"seed": 7})), 7);
    }
}
