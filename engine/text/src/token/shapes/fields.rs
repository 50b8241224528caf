//! The fields of one object: each is asked for by name and rule, and none may be left over.

use std::fmt::Display;

use serde_json::{Map, Value, json};

use super::TokenError;

/// Type of a field. A field that is null counts as absent.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rule {
    /// True or false, and the value of an absent one.
    Flag(Option<bool>),
    /// A whole number of at most this.
    Number(u32),
    /// A text of at least one and at most this many bytes.
    Text(usize),
    /// A text of one character.
    Character,
    /// One of these texts, and the value of an absent one.
    OneOf(&'static [&'static str], Option<&'static str>),
    /// `{"String": TEXT}` of at most this many bytes, or also `{"Regex": TEXT}`.
    Pattern {
        /// Longest text.
        string: usize,
        /// Longest expression; 0: none is allowed.
        regex: usize,
    },
}

/// An object whose fields are taken one by one.
pub(super) struct Fields<'a> {
    path: &'a str,
    object: &'a Map<String, Value>,
    taken: Vec<&'static str>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(path: &'a str, object: &'a Map<String, Value>) -> Self {
        Self { path, object, taken: Vec::new() }
    }

    /// Fields of a value that must be an object.
    pub(super) fn of(path: &'a str, value: &'a Value) -> Result<Self, TokenError> {
        let object = value.as_object().ok_or_else(|| wrong(path, "not an object"))?;
        Ok(Self::new(path, object))
    }

    /// The path of a field of this object.
    pub(super) fn path_of(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// A field's value, for others to check; null if it is absent.
    pub(super) fn value(&mut self, name: &'static str) -> &'a Value {
        self.taken.push(name);
        self.object.get(name).unwrap_or(&Value::Null)
    }

    /// Fields that may be there and say nothing.
    pub(super) fn ignore(&mut self, names: &[&'static str]) {
        self.taken.extend(names);
    }

    /// A field's value by a rule.
    pub(super) fn take(&mut self, name: &'static str, rule: Rule) -> Result<Value, TokenError> {
        let value = self.value(name);
        let checked = if value.is_null() { rule.absent() } else { rule.check(value) };
        checked.map_err(|reason| wrong(&self.path_of(name), reason))
    }

    /// Refuses a field that nobody took.
    pub(super) fn finish(self) -> Result<(), TokenError> {
        match self.object.keys().find(|key| !self.taken.contains(&key.as_str())) {
            None => Ok(()),
            Some(key) => {
                let path = self.path_of(&short(key));
                let reason = "not known, so it may change how text is cut; if it does not, \
                              remove it";
                Err(wrong(&path, reason))
            }
        }
    }
}

impl Rule {
    fn absent(self) -> Result<Value, String> {
        match self {
            Self::Flag(Some(flag)) => Ok(flag.into()),
            Self::OneOf(_, Some(text)) => Ok(text.into()),
            _ => Err("missing".into()),
        }
    }

    fn check(self, value: &Value) -> Result<Value, String> {
        match self {
            Self::Flag(_) => {
                value.as_bool().map(Value::from).ok_or_else(|| "neither true nor false".into())
            }
            Self::Number(most) => match value.as_u64() {
                Some(number) if number <= u64::from(most) => Ok(number.into()),
                _ => Err(format!("not a whole number from 0 to {most}")),
            },
            Self::Text(most) => text(value, most).map(Value::from),
            Self::Character => match value.as_str().map(|text| text.chars().count()) {
                Some(1) => Ok(value.clone()),
                _ => Err("not one character".into()),
            },
            Self::OneOf(texts, _) => match value.as_str() {
                Some(text) if texts.contains(&text) => Ok(text.into()),
                _ => Err(format!("not one of {}", texts.join(", "))),
            },
            Self::Pattern { string, regex } => pattern(value, string, regex),
        }
    }
}

fn pattern(value: &Value, string: usize, regex: usize) -> Result<Value, String> {
    let forms =
        if regex > 0 { "{\"String\": ...} or {\"Regex\": ...}" } else { "{\"String\": ...}" };
    let object = value.as_object().filter(|object| object.len() == 1);
    match object.and_then(|object| object.iter().next()) {
        Some((kind, value)) if kind == "String" => Ok(json!({"String": text(value, string)?})),
        Some((kind, value)) if kind == "Regex" && regex > 0 => {
            Ok(json!({"Regex": text(value, regex)?}))
        }
        _ => Err(format!("not {forms}")),
    }
}

/// A text with a length from one to `most` bytes.
fn text(value: &Value, most: usize) -> Result<&str, String> {
    match value.as_str() {
        Some("") => Err("empty".into()),
        Some(text) if text.len() > most => {
            Err(format!("{} bytes, at most {most} are supported", text.len()))
        }
        Some(text) => Ok(text),
        None => Err("not a text".into()),
    }
}

pub(super) fn wrong(path: &str, reason: impl Display) -> TokenError {
    TokenError::Malformed(format!("{path}: {reason}"))
}

/// A text of the file for a message: short and on one line.
pub(super) fn short(text: &str) -> String {
    const CHARS_MAX: usize = 60;
    text.chars().take(CHARS_MAX).flat_map(char::escape_debug).collect()
}
