//! The keys of a model's metadata as a closed world.
//!
//! A key that nobody reads may change what the model computes, and then the answers are wrong in
//! silence. So each key is read, listed as harmless, harmless while it says what is computed
//! anyway, or refused by name.

/// A value that changes nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Plain<'a> {
    Null,
    Flag(bool),
    Number(f64),
    Text(&'a str),
    /// A list or an object without entries.
    Empty,
    /// Anything else; stands in no table.
    Other,
}

impl std::fmt::Display for Plain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Null => f.write_str("null"),
            Self::Flag(flag) => write!(f, "{flag}"),
            Self::Number(number) => write!(f, "{number}"),
            Self::Text(text) => write!(f, "{text:?}"),
            Self::Empty => f.write_str("empty"),
            Self::Other => f.write_str("another value"),
        }
    }
}

/// All keys that one place may hold. In each text they have spaces between them.
pub(crate) struct KnownKeys {
    /// Read where the configuration is made.
    pub(crate) read: &'static str,
    /// Keys that change no number and no token, whatever their values.
    pub(crate) harmless: &'static [&'static str],
    /// Harmless with one of these values; with another they ask for what is not computed.
    pub(crate) neutral: &'static [(&'static str, &'static [Plain<'static>])],
    /// Refused with a reason better than the general one.
    pub(crate) refused: &'static [(&'static str, &'static str)],
}

impl KnownKeys {
    /// Checks one key. `values` are its value, or the elements of its list; `shown` is the value
    /// for a message, `remove` tells how a person removes a key.
    ///
    /// # Errors
    /// The reason for which the key is refused.
    pub(crate) fn check<'a>(
        &self,
        name: &str,
        shown: &str,
        mut values: impl Iterator<Item = Plain<'a>>,
        remove: &str,
    ) -> Result<(), String> {
        let has = |keys: &str| keys.split_whitespace().any(|key| key == name);
        if has(self.read) || self.harmless.iter().any(|keys| has(keys)) {
            return Ok(());
        }
        if let Some((_, reason)) = self.refused.iter().find(|(key, _)| *key == name) {
            return Err((*reason).to_owned());
        }
        let Some((_, neutral)) = self.neutral.iter().find(|(keys, _)| has(keys)) else {
            return Err(format!(
                "not known for this kind of model, so it may change what is computed; if it does \
                 not, {remove}"
            ));
        };
        if values.all(|value| neutral.contains(&value)) {
            return Ok(());
        }
        let possible: Vec<String> = neutral.iter().map(ToString::to_string).collect();
        let possible = if possible.is_empty() { "empty".into() } else { possible.join(" or ") };
        Err(format!(
            "{shown} is not supported, only {possible}; if it changes nothing in this model, \
             {remove}"
        ))
    }
}
