//! The steps before and after the model: normalisers, cutting, what is put around the ids, and the
//! decoder.

use serde_json::{Map, Value, json};

use super::fields::{Fields, Rule, wrong};
use super::{TOKEN_BYTES_MAX, TokenError};

/// Most steps of one part.
const STEPS_MAX: usize = 16;
/// Most sequences within each other.
const DEPTH_MAX: usize = 3;
/// Longest text that a step puts in, or looks for, in bytes.
const TEXT_BYTES_MAX: usize = 64;
/// Longest regular expression; the longest in use has some 500 bytes.
const REGEX_BYTES_MAX: usize = 2048;
/// Expressions of published tokenizers: Llama 3's, which takes three digits together, and Qwen2's.
const PUBLISHED: [&str; 2] = [
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|\
     \x20?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}|\
     \x20?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
];
/// Most pieces of a template, and most ids of one of its special tokens.
const TEMPLATE_MAX: usize = 16;

/// A part of the file: its kinds of steps, each with its fields.
pub(super) struct Part {
    /// The field that lists the steps of a sequence.
    list: &'static str,
    kinds: &'static [Kind],
}

type Kind = (&'static str, &'static [(&'static str, Rule)]);

/// Without expressions: the parser panics where one matches nothing.
const REPLACE: &[(&str, Rule)] = &[
    ("pattern", Rule::Pattern { string: TEXT_BYTES_MAX, regex: 0 }),
    ("content", Rule::Text(TEXT_BYTES_MAX)),
];
const BYTE_LEVEL: &[(&str, Rule)] = &[
    ("add_prefix_space", Rule::Flag(None)),
    ("trim_offsets", Rule::Flag(None)),
    ("use_regex", Rule::Flag(Some(true))),
];
const METASPACE: &[(&str, Rule)] = &[
    ("replacement", Rule::Character),
    ("prepend_scheme", Rule::OneOf(&["first", "never", "always"], Some("always"))),
    ("split", Rule::Flag(Some(true))),
];
const BEHAVIORS: &[&str] =
    &["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"];

pub(super) const NORMALIZER: Part = Part {
    list: "normalizers",
    kinds: &[
        ("NFC", &[]),
        ("NFD", &[]),
        ("NFKC", &[]),
        ("NFKD", &[]),
        ("Lowercase", &[]),
        ("StripAccents", &[]),
        ("Strip", &[("strip_left", Rule::Flag(None)), ("strip_right", Rule::Flag(None))]),
        ("Prepend", &[("prepend", Rule::Text(TEXT_BYTES_MAX))]),
        ("Replace", REPLACE),
    ],
};

pub(super) const PRE_TOKENIZER: Part = Part {
    list: "pretokenizers",
    kinds: &[
        ("ByteLevel", BYTE_LEVEL),
        ("Metaspace", METASPACE),
        ("Digits", &[("individual_digits", Rule::Flag(None))]),
        ("Punctuation", &[("behavior", Rule::OneOf(BEHAVIORS, Some("Isolated")))]),
        (
            "Split",
            &[
                ("pattern", Rule::Pattern { string: TEXT_BYTES_MAX, regex: REGEX_BYTES_MAX }),
                ("behavior", Rule::OneOf(BEHAVIORS, None)),
                ("invert", Rule::Flag(None)),
            ],
        ),
    ],
};

const TEMPLATE: &str = "TemplateProcessing";

pub(super) const POST_PROCESSOR: Part =
    Part { list: "processors", kinds: &[("ByteLevel", BYTE_LEVEL), (TEMPLATE, &[])] };

pub(super) const DECODER: Part = Part {
    list: "decoders",
    kinds: &[
        ("ByteLevel", BYTE_LEVEL),
        ("ByteFallback", &[]),
        ("Fuse", &[]),
        ("Metaspace", METASPACE),
        ("Replace", REPLACE),
        (
            "Strip",
            &[
                ("content", Rule::Text(TEXT_BYTES_MAX)),
                ("start", Rule::Number(TOKEN_BYTES_MAX as u32)),
                ("stop", Rule::Number(TOKEN_BYTES_MAX as u32)),
            ],
        ),
    ],
};

/// A part that was read.
pub(super) struct Steps {
    /// The part, written anew; null if it is absent.
    pub(super) json: Value,
    path: &'static str,
    steps: Vec<Value>,
}

/// The growth of a text of `n` bytes in a step: at most `times * n + more` bytes.
struct Growth {
    times: usize,
    more: usize,
}

impl Steps {
    /// Reads one part: nothing, a step, or a sequence of them.
    pub(super) fn read(path: &'static str, value: &Value, part: &Part) -> Result<Self, TokenError> {
        let mut steps = Vec::new();
        if !value.is_null() {
            part.add(path, value, 0, &mut steps)?;
        }
        if steps.iter().filter(|step| step["type"] == TEMPLATE).count() > 1 {
            return Err(wrong(path, format!("more than one {TEMPLATE}")));
        }
        let json = match steps.as_slice() {
            [] => Value::Null,
            [one] => one.clone(),
            many => {
                let mut sequence = Map::new();
                sequence.insert("type".into(), "Sequence".into());
                sequence.insert(part.list.into(), many.into());
                sequence.into()
            }
        };
        Ok(Self { json, path, steps })
    }

    /// Growth of a text of at least one byte, all steps working on the whole of it.
    pub(super) fn growth(&self) -> usize {
        let all =
            self.steps.iter().map(growth).fold(Growth { times: 1, more: 0 }, |all, step| Growth {
                times: all.times.saturating_mul(step.times),
                more: all.more.saturating_mul(step.times).saturating_add(step.more),
            });
        all.times.saturating_add(all.more)
    }

    /// Growth of a text of at least one byte that is cut into pieces between the steps: what is
    /// put in is put into each of them.
    pub(super) fn growth_of_pieces(&self) -> usize {
        let steps = self.steps.iter().map(growth);
        steps.fold(1, |all, step| all.saturating_mul(step.times.saturating_add(step.more)))
    }

    /// True if no step has an expression but published ones.
    pub(super) fn has_published_expressions(&self) -> bool {
        let expressions = self.steps.iter().filter_map(|step| step["pattern"]["Regex"].as_str());
        expressions.into_iter().all(|expression| PUBLISHED.contains(&expression))
    }

    /// The ids of special tokens are rows of the embedding.
    pub(super) fn check_ids(&self, rows: usize) -> Result<(), TokenError> {
        let tokens = self.steps.iter().filter_map(|step| step["special_tokens"].as_object());
        let ids = tokens.flatten().flat_map(|(_, token)| token["ids"].as_array());
        let beyond = |id: &&Value| id.as_u64().is_none_or(|id| id >= rows as u64);
        match ids.flatten().find(beyond) {
            None => Ok(()),
            Some(id) => {
                let reason = format!("token id {id}, but the embedding has {rows} rows");
                Err(wrong(&format!("{}.special_tokens", self.path), reason))
            }
        }
    }
}

impl Part {
    /// Adds a step, or those of a sequence.
    fn add(
        &self,
        path: &str,
        value: &Value,
        depth: usize,
        steps: &mut Vec<Value>,
    ) -> Result<(), TokenError> {
        let mut fields = Fields::of(path, value)?;
        let at_type = fields.path_of("type");
        let name = match fields.value("type") {
            Value::Null => return Err(wrong(&at_type, "missing")),
            Value::String(name) => name.as_str(),
            _ => return Err(wrong(&at_type, "not a text")),
        };
        if name == "Sequence" {
            let at_list = fields.path_of(self.list);
            let list = fields.value(self.list).as_array();
            let list = list.ok_or_else(|| wrong(&at_list, "not a list"))?;
            if depth == DEPTH_MAX {
                return Err(wrong(path, format!("deeper than {DEPTH_MAX} sequences")));
            }
            fields.finish()?;
            for (index, step) in list.iter().enumerate() {
                self.add(&format!("{at_list}[{index}]"), step, depth + 1, steps)?;
            }
            return Ok(());
        }
        let Some((_, rules)) = self.kinds.iter().find(|(kind, _)| *kind == name) else {
            let kinds: Vec<_> = self.kinds.iter().map(|(kind, _)| *kind).collect();
            let reason = format!(
                "{:?} is not supported; supported: {}, Sequence",
                super::fields::short(name),
                kinds.join(", ")
            );
            return Err(wrong(&at_type, reason));
        };
        if steps.len() == STEPS_MAX {
            return Err(wrong(path, format!("more than {STEPS_MAX} steps")));
        }
        let mut step = Map::new();
        step.insert("type".into(), name.into());
        for (field, rule) in *rules {
            step.insert((*field).into(), fields.take(field, *rule)?);
        }
        if name == "Metaspace" {
            check_metaspace(&mut fields, &step)?;
        }
        if name == TEMPLATE {
            template(&mut fields, &mut step)?;
        }
        fields.finish()?;
        steps.push(step.into());
        Ok(())
    }
}

/// Fields of older files, which have to agree with the newer ones.
fn check_metaspace(fields: &mut Fields<'_>, step: &Map<String, Value>) -> Result<(), TokenError> {
    fields.ignore(&["str_rep"]);
    let add = fields.take("add_prefix_space", Rule::Flag(Some(true)))?;
    if add == false && step["prepend_scheme"] != "never" {
        let reason = "false, but prepend_scheme is not never";
        return Err(wrong(&fields.path_of("add_prefix_space"), reason));
    }
    Ok(())
}

/// The ids that are put around a text. What is put around two is not used, so not read.
fn template(fields: &mut Fields<'_>, step: &mut Map<String, Value>) -> Result<(), TokenError> {
    let at_single = fields.path_of("single");
    let single = fields.value("single").as_array();
    let single = single.ok_or_else(|| wrong(&at_single, "not a list"))?;
    if single.len() > TEMPLATE_MAX {
        return Err(wrong(&at_single, format!("more than {TEMPLATE_MAX} pieces")));
    }
    let at_tokens = fields.path_of("special_tokens");
    let tokens = fields.value("special_tokens").as_object();
    let tokens = tokens.ok_or_else(|| wrong(&at_tokens, "not an object"))?;
    fields.ignore(&["pair"]);
    let (mut texts, mut made, mut used) = (0, Vec::new(), Map::new());
    for (index, piece) in single.iter().enumerate() {
        let path = format!("{at_single}[{index}]");
        match (piece["Sequence"]["id"].as_str(), piece["SpecialToken"]["id"].as_str()) {
            (Some("A"), None) => {
                texts += 1;
                made.push(json!({"Sequence": {"id": "A", "type_id": 0}}));
            }
            (None, Some(id)) => {
                let path = format!("{at_tokens}[\"{}\"]", super::fields::short(id));
                let token = tokens.get(id).ok_or_else(|| wrong(&path, "missing"))?;
                used.insert(id.into(), special_token(&path, id, token)?);
                made.push(json!({"SpecialToken": {"id": id, "type_id": 0}}));
            }
            _ => return Err(wrong(&path, "neither the text A nor a special token")),
        }
    }
    if texts != 1 {
        return Err(wrong(&at_single, format!("the text A stands {texts} times in it, not once")));
    }
    step.insert("single".into(), made.into());
    step.insert(
        "pair".into(),
        json!([{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]),
    );
    step.insert("special_tokens".into(), used.into());
    Ok(())
}

fn special_token(path: &str, id: &str, token: &Value) -> Result<Value, TokenError> {
    let list = |name: &str| {
        let list = token[name].as_array().filter(|list| list.len() <= TEMPLATE_MAX);
        let reason = format!("not a list of at most {TEMPLATE_MAX}");
        list.ok_or_else(|| wrong(&format!("{path}.{name}"), reason))
    };
    let (ids, tokens) = (list("ids")?, list("tokens")?);
    if ids.len() != tokens.len()
        || !ids.iter().all(|id| id.as_u64().is_some_and(|id| u32::try_from(id).is_ok()))
        || !tokens.iter().all(|token| token.as_str().is_some_and(|t| t.len() <= TOKEN_BYTES_MAX))
    {
        return Err(wrong(path, "not as many ids as tokens"));
    }
    Ok(json!({"id": id, "ids": ids, "tokens": tokens}))
}

/// The growth of a text, or of a piece of it, in one step.
fn growth(step: &Value) -> Growth {
    let length = |name: &str| step[name].as_str().map_or(0, str::len);
    let (times, more) = match step["type"].as_str().unwrap_or_default() {
        "NFC" | "NFD" => (3, 0),
        // One character of Arabic is written out as eighteen.
        "NFKC" | "NFKD" => (11, 0),
        "Lowercase" => (2, 0),
        "Prepend" => (1, length("prepend")),
        "Replace" => {
            let pattern = step["pattern"]["String"].as_str().map_or(1, str::len);
            (length("content").div_ceil(pattern).max(1), 0)
        }
        "Metaspace" => match step["prepend_scheme"].as_str() {
            Some("never") => (length("replacement"), 0),
            _ => (length("replacement"), length("replacement")),
        },
        // Each byte becomes a letter of one or two bytes, the space in front one of two.
        "ByteLevel" if step["add_prefix_space"] == true => (2, 2),
        "ByteLevel" => (2, 0),
        _ => (1, 0),
    };
    Growth { times, more }
}
