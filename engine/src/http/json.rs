//! A request's body as JSON: nested at most 64 deep, and no key twice in one object. What is left
//! to the parser is bounded by the body's own limit.

use std::fmt;

use axum::http::StatusCode;
use serde::Deserializer;
use serde::de::{DeserializeSeed, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use super::error::ApiError;

/// Deepest nesting of arrays and objects.
const DEPTH_MAX: usize = 64;

/// Reads a body that has to be one JSON object.
///
/// # Errors
/// 400 `invalid_json`, with line and column.
pub(super) fn object(body: &[u8]) -> Result<Map<String, Value>, ApiError> {
    let invalid = |error: serde_json::Error| {
        ApiError::new(StatusCode::BAD_REQUEST, "invalid_json", format!("the body: {error}"))
    };
    if body.starts_with(b"\xef\xbb\xbf") {
        return Err(invalid(serde_json::Error::custom("it begins with a byte order mark")));
    }
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let value = Strict { depth: 0 }.deserialize(&mut deserializer).map_err(invalid)?;
    deserializer.end().map_err(invalid)?;
    match value {
        Value::Object(map) => Ok(map),
        _ => Err(invalid(serde_json::Error::custom("it has to be a JSON object"))),
    }
}

/// A value inside so many arrays and objects.
#[derive(Clone, Copy)]
struct Strict {
    depth: usize,
}

impl Strict {
    fn inside<E: serde::de::Error>(self) -> Result<Self, E> {
        if self.depth == DEPTH_MAX {
            return Err(E::custom(format_args!("nested deeper than {DEPTH_MAX} levels")));
        }
        Ok(Self { depth: self.depth + 1 })
    }
}

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        let number = Number::from_f64(value).ok_or_else(|| E::custom("a number is not finite"))?;
        Ok(Value::Number(number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let inside = self.inside()?;
        let mut values = Vec::new();
        while let Some(value) = items.next_element_seed(inside)? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let inside = self.inside()?;
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            let value = entries.next_value_seed(inside)?;
            if map.insert(key, value).is_some() {
                return Err(A::Error::custom("a key stands twice in one object"));
            }
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(body: &[u8]) -> String {
        let json = object(body).unwrap_err().json();
        assert!(json.contains("invalid_json"), "{json}");
        json
    }

    #[test]
    fn values_come_through_unchanged() {
        let text =
            r#"{"a":[1,-2,3.5,null,true,"é\u0041\n"],"b":{"c":{}},"d":18446744073709551615}"#;
        let expected: Value = serde_json::from_str(text).unwrap();
        assert_eq!(Value::Object(object(text.as_bytes()).unwrap()), expected);
    }

    #[test]
    fn nonsense_is_refused_without_an_echo() {
        for body in [
            &b""[..],
            b"[]",
            b"{",
            b"{}x",
            b"{\"a\":NaN}",
            b"{\"a\":1e999}",
            b"{\"a\":\"secret\xff\"}",
            b"{\"a\":\"secret\\ud800\"}",
            b"{\"a\":\"secret\0\"}",
            b"{\"secret\":1,\"secret\":2}",
            b"\xef\xbb\xbf{}",
        ] {
            assert!(!refused(body).contains("secret"));
        }
    }

    #[test]
    fn depth_is_bounded() {
        let nested = |depth: usize| format!("{{\"a\":{}{}}}", "[".repeat(depth), "]".repeat(depth));
        object(nested(DEPTH_MAX - 1).as_bytes()).unwrap();
        assert!(refused(nested(DEPTH_MAX).as_bytes()).contains("64 levels"));
        refused(nested(10_000).as_bytes());
    }
}
