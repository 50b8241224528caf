//! Control tokens and the ends of an answer, derived from a model's files. Pure.
//!
//! Files type their tokens as they like: turn markers come as control tokens, as user-defined ones
//! (GGUF type 4, `special: false`) and as ordinary ones (type 1). A guard that believed the types
//! would let a user's text make a turn of its own. So what is a control token is decided here: the
//! tokens that begin a text or end an answer, the markers of published chat formats, and each added
//! token that the chat template spells.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde_json::{Value, json};

/// Texts that end an answer or a turn in published formats. One that is in the vocabulary beside
/// the configured end ends an answer, too.
const END_TEXTS: &str = "\
    <|im_end|> <|endoftext|> <|eot_id|> <|eom_id|> <|end_of_text|> <|end|> <|return|> \
    <|end_of_turn|> <|endofturn|> <end_of_turn> <end_of_utterance> <EOT> <|eot|> \
    <|END_OF_TURN_TOKEN|> <\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>";

/// Further markers of published formats: begins of texts and of turns, padding, unknown.
const MARKERS: &str = "\
    <unk> <s> </s> <pad> <bos> <eos> [INST] [/INST] <<SYS>> <</SYS>> [SYSTEM_PROMPT] \
    [/SYSTEM_PROMPT] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] \
    [/TOOL_RESULTS] <|im_start|> <|im_sep|> <|begin_of_text|> <|start_header_id|> \
    <|end_header_id|> <|header_start|> <|header_end|> <|python_tag|> <|system|> <|user|> \
    <|assistant|> <|start|> <|channel|> <|message|> <|call|> <|startoftext|> <|start_of_role|> \
    <|end_of_role|> <start_of_turn> <|START_OF_TURN_TOKEN|> <|SYSTEM_TOKEN|> <|USER_TOKEN|> \
    <|CHATBOT_TOKEN|> <BOS_TOKEN> <EOS_TOKEN> <\u{ff5c}begin\u{2581}of\u{2581}sentence\u{ff5c}> \
    <\u{ff5c}User\u{ff5c}> <\u{ff5c}Assistant\u{ff5c}>";

/// Longest token that is looked for in a template, in bytes.
const SPELLED_BYTES_MAX: usize = 128;

/// Facts that the derivation needs beside `tokenizer.json`.
#[derive(Clone, Copy, Debug, Default)]
pub struct TextFacts<'a> {
    /// Text of the token that begins a text.
    pub bos: Option<&'a str>,
    /// Text of the token that ends an answer.
    pub eos: Option<&'a str>,
    /// Ids that end an answer, of every source.
    pub end_ids: &'a [u32],
    /// The chat template.
    pub template: Option<&'a str>,
}

/// The result: ids ascending.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ControlTokens {
    /// Control tokens by id, with their texts: the guard's list.
    pub control: BTreeMap<u32, String>,
    /// Ids that end an answer.
    pub ends: Vec<u32>,
    /// Tokens that the file typed otherwise, and that are retyped.
    pub retyped: usize,
}

impl ControlTokens {
    /// Derives the tokens, and retypes in `json` those that are not seen as what they are: an
    /// ordinary token becomes an added one, an added one special or unnormalised.
    pub fn derive(json: &mut Value, facts: TextFacts<'_>) -> Self {
        let mut derived = Self::default();
        let vocabulary = vocabulary(json);
        let added: HashMap<u32, bool> = added(json)
            .filter_map(|token| Some((id_of(token)?, token["special"] == true)))
            .collect();
        let spelled = facts.template.map(|template| spelled(template, &vocabulary));
        let spelled = spelled.unwrap_or_default();
        let merged = merged(json);
        let end_texts: HashSet<&str> = END_TEXTS.split(' ').collect();
        let markers: HashSet<&str> = MARKERS.split(' ').collect();
        let mut hidden = HashSet::new();
        for (text, &id) in &vocabulary {
            let is_added = added.contains_key(&id);
            let is_end = end_texts.contains(text.as_str());
            let is_marker = is_end || markers.contains(text.as_str());
            let is_named =
                facts.bos == Some(text) || facts.eos == Some(text) || facts.end_ids.contains(&id);
            let is_spelled = spelled.contains(&id) && text.chars().nth(1).is_some();
            // Ordinary pieces may look like a marker (HTML has <s>): only those are meant that
            // no merge makes, or that the template spells.
            let stands_alone = is_spelled || !merged.contains(text.as_str());
            let shows = if is_added { is_marker } else { is_marker && stands_alone };
            let written =
                is_spelled && (is_added || is_bracketed(text) && !merged.contains(text.as_str()));
            let is_special = added.get(&id) == Some(&true);
            if is_named || shows || is_special {
                hidden.insert(id);
            }
            if is_named || shows || is_special || written {
                derived.control.insert(id, text.clone());
            }
            if is_named && facts.bos != Some(text) || is_end && shows {
                derived.ends.push(id);
            }
        }
        derived.ends.extend(facts.end_ids.iter().filter(|id| derived.control.contains_key(id)));
        derived.ends.sort_unstable();
        derived.ends.dedup();
        derived.retyped = retype(json, &derived.control, &hidden, &added);
        derived
    }
}

/// Tokens by text, those of the model and the added ones.
fn vocabulary(json: &Value) -> BTreeMap<String, u32> {
    let mut tokens = BTreeMap::new();
    let id = |id: &Value| id.as_u64().and_then(|id| u32::try_from(id).ok());
    match &json["model"]["vocab"] {
        Value::Object(vocab) => {
            tokens
                .extend(vocab.iter().filter_map(|(text, value)| Some((text.clone(), id(value)?))));
        }
        Value::Array(pieces) => {
            let texts = pieces.iter().map(|piece| piece.get(0).and_then(Value::as_str));
            let numbered = (0u32..).zip(texts);
            tokens.extend(numbered.filter_map(|(id, text)| Some((text?.to_owned(), id))));
        }
        _ => {}
    }
    for token in added(json) {
        if let (Some(id), Some(text)) = (id_of(token), token["content"].as_str()) {
            tokens.insert(text.to_owned(), id);
        }
    }
    tokens.remove("");
    tokens
}

fn added(json: &Value) -> impl Iterator<Item = &Value> {
    json["added_tokens"].as_array().into_iter().flatten()
}

fn id_of(token: &Value) -> Option<u32> {
    token["id"].as_u64().and_then(|id| u32::try_from(id).ok())
}

/// Texts that some merge makes.
fn merged(json: &Value) -> HashSet<String> {
    let merges = json["model"]["merges"].as_array().into_iter().flatten();
    let text = |merge: &Value| match merge {
        Value::String(text) => text.split_once(' ').map(|(left, right)| format!("{left}{right}")),
        Value::Array(pair) => Some([pair.first()?.as_str()?, pair.get(1)?.as_str()?].concat()),
        _ => None,
    };
    merges.filter_map(text).collect()
}

/// `<...>` or `[...]`.
fn is_bracketed(text: &str) -> bool {
    let framed = |open, close| text.starts_with(open) && text.ends_with(close);
    text.len() > 2 && (framed('<', '>') || framed('[', ']'))
}

/// Ids of tokens that stand in the template's source, escapes of its strings read or not. Space
/// is no marker: a template is full of it.
fn spelled(template: &str, vocabulary: &BTreeMap<String, u32>) -> HashSet<u32> {
    let candidates: HashMap<&str, u32> = vocabulary
        .iter()
        .filter(|(text, _)| text.len() <= SPELLED_BYTES_MAX)
        .filter(|(text, _)| !text.chars().all(|c| c.is_whitespace() || c == '\u{2581}'))
        .map(|(text, id)| (text.as_str(), *id))
        .collect();
    let lengths: HashSet<usize> = candidates.keys().map(|text| text.len()).collect();
    let mut found = HashSet::new();
    for source in [template, &unescaped(template)] {
        for (start, _) in source.char_indices() {
            let parts = lengths.iter().filter_map(|length| source.get(start..start + length));
            found.extend(parts.filter_map(|part| candidates.get(part)));
        }
    }
    found
}

/// A text with `\xHH`, `\uHHHH` and `\c` read.
fn unescaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('\\') {
        out.push_str(before);
        let digits = match after.as_bytes().first() {
            Some(b'x') => 2,
            Some(b'u') => 4,
            Some(b'U') => 8,
            _ => 0,
        };
        let code = after.get(1..=digits).filter(|_| digits > 0);
        match code.and_then(|code| u32::from_str_radix(code, 16).ok()).and_then(char::from_u32) {
            Some(c) => {
                out.push(c);
                rest = &after[1 + digits..];
            }
            None => rest = after,
        }
    }
    out + rest
}

/// Writes the types into `added_tokens`; how many were others.
fn retype(
    json: &mut Value,
    control: &BTreeMap<u32, String>,
    hidden: &HashSet<u32>,
    added: &HashMap<u32, bool>,
) -> usize {
    let mut retyped = 0;
    if !json["added_tokens"].is_array() {
        json["added_tokens"] = json!([]);
    }
    let list = json["added_tokens"].as_array_mut().expect("made above");
    for token in list.iter_mut() {
        let id = id_of(token).filter(|id| control.contains_key(id));
        let Some(id) = id else { continue };
        if hidden.contains(&id) && token["special"] != true {
            token["special"] = true.into();
            retyped += 1;
        }
        if token["special"] != true && token["normalized"] != false {
            token["normalized"] = false.into();
            retyped += 1;
        }
    }
    for (&id, text) in control {
        if !added.contains_key(&id) {
            retyped += 1;
            list.push(json!({
                "id": id, "content": text, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": hidden.contains(&id),
            }));
        }
    }
    list.sort_by_key(id_of);
    retyped
}

#[cfg(test)]
mod tests;
