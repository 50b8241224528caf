//! Typed access to the fields of a request. `null` counts as absent, as clients send it for
//! options that they don't use.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::error::ApiError;

/// The fields of one JSON object.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a>(pub(super) &'a Map<String, Value>);

impl<'a> Fields<'a> {
    /// The value, if there is one.
    pub(super) fn value(self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    /// A boolean.
    pub(super) fn flag(self, name: &'static str) -> Result<Option<bool>, ApiError> {
        self.typed(name, "true or false", Value::as_bool)
    }

    /// A text.
    pub(super) fn text(self, name: &'static str) -> Result<Option<&'a str>, ApiError> {
        self.typed(name, "a string", Value::as_str)
    }

    /// A list.
    pub(super) fn list(self, name: &'static str) -> Result<Option<&'a Vec<Value>>, ApiError> {
        self.typed(name, "an array", Value::as_array)
    }

    /// An object.
    pub(super) fn object(self, name: &'static str) -> Result<Option<Fields<'a>>, ApiError> {
        self.typed(name, "an object", |value| value.as_object().map(Fields))
    }

    /// A number. Ranges are the sampler's own to check; what f32 can't hold is infinite and so
    /// out of every range.
    pub(super) fn number(self, name: &'static str) -> Result<Option<f32>, ApiError> {
        self.typed(name, "a number", |value| value.as_f64().map(|number| number as f32))
    }

    /// A whole number in a range.
    pub(super) fn integer(
        self,
        name: &'static str,
        range: RangeInclusive<u64>,
    ) -> Result<Option<u64>, ApiError> {
        let Some(value) = self.value(name) else {
            return Ok(None);
        };
        match value.as_u64().filter(|value| range.contains(value)) {
            Some(value) => Ok(Some(value)),
            None => {
                let (low, high) = (range.start(), range.end());
                Err(ApiError::field(name, format!("{name}: a whole number in {low}..={high}")))
            }
        }
    }

    /// A whole number in a range; -1, which some clients send for "off", counts as absent.
    pub(super) fn integer_or_off(
        self,
        name: &'static str,
        range: RangeInclusive<u64>,
    ) -> Result<Option<u64>, ApiError> {
        match self.value(name).and_then(Value::as_i64) {
            Some(-1) => Ok(None),
            _ => self.integer(name, range),
        }
    }

    fn typed<T>(
        self,
        name: &'static str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        match self.value(name) {
            None => Ok(None),
            Some(value) => match read(value) {
                Some(read) => Ok(Some(read)),
                None => Err(ApiError::field(name, format!("{name}: {expected} is expected"))),
            },
        }
    }
}
