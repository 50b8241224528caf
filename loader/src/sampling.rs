//! Sampling settings that a model's makers recommend: `generation_config.json`, or
//! `general.sampling.*` of GGUF.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::{ConfigError, flag, number};

/// Sampling values of the model's files; `None` where they have none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct SamplingDefaults {
    /// 0 is greedy. `0..=100`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// Likeliest tokens that are kept; 0 keeps all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    /// Probability that is kept. `0..=1`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    /// Least share of the likeliest token's probability. `0..=1`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f32>,
    /// Divisor of logits of tokens that were seen. `0.01..=100`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f32>,
    /// Tokens that the penalty looks at; `u32::MAX` is all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repeat_last_n: Option<u32>,
}

impl SamplingDefaults {
    /// True if the model's files say nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Reads `generation_config.json`. Without `do_sample` a temperature decides, as in the files
    /// that servers read; `do_sample: false` is greedy, whatever stands beside it.
    ///
    /// # Errors
    /// The first key that is no number, or out of its range.
    pub(crate) fn from_hf(json: &Value) -> Result<Self, ConfigError> {
        let temperature = match flag(json, "do_sample")? {
            Some(false) => return Self::greedy(json),
            Some(true) => Some(number(json, "temperature")?.unwrap_or(1.0)),
            None => number(json, "temperature")?,
        };
        let sampling = Self {
            temperature,
            top_k: top_k(json)?,
            top_p: number(json, "top_p")?,
            min_p: number(json, "min_p")?,
            ..Self::greedy(json)?
        };
        sampling.checked()
    }

    /// Greedy, with the penalty that greedy decoding has too. Transformers' penalty looks at the
    /// whole text.
    fn greedy(json: &Value) -> Result<Self, ConfigError> {
        let repetition_penalty = number(json, "repetition_penalty")?;
        let repeat_last_n = repetition_penalty.filter(|penalty| *penalty != 1.0).map(|_| u32::MAX);
        let temperature = Some(0.0).filter(|_| json.get("do_sample").is_some());
        Self { temperature, repetition_penalty, repeat_last_n, ..Self::default() }.checked()
    }

    /// These values, if each is in its range.
    ///
    /// # Errors
    /// The first that is not, by its name in `generation_config.json`.
    pub(crate) fn checked(self) -> Result<Self, ConfigError> {
        let ranges = [
            ("temperature", self.temperature, 0.0..=100.0),
            ("top_p", self.top_p, 0.0..=1.0),
            ("min_p", self.min_p, 0.0..=1.0),
            ("repetition_penalty", self.repetition_penalty, 0.01..=100.0),
        ];
        for (key, value, range) in ranges {
            if let Some(value) = value.filter(|value| !range.contains(value)) {
                let reason = format!("{value} is not in {}..={}", range.start(), range.end());
                return Err(ConfigError::new(key, reason));
            }
        }
        Ok(self)
    }
}

/// Some files say -1 for all.
fn top_k(json: &Value) -> Result<Option<u32>, ConfigError> {
    let Some(value) = json.get("top_k").filter(|value| !value.is_null()) else {
        return Ok(None);
    };
    if value.as_i64() == Some(-1) {
        return Ok(Some(0));
    }
    match value.as_u64().and_then(|value| u32::try_from(value).ok()) {
        Some(top_k) => Ok(Some(top_k)),
        None => Err(ConfigError::new("top_k", "not a whole number of 32 bits")),
    }
}

/// `temperature 0.6, top_p 0.95`, or `greedy`.
impl fmt::Display for SamplingDefaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        let mut add = |name: &str, value: Option<String>| {
            parts.extend(value.map(|value| format!("{name} {value}")));
        };
        let text = |value: Option<f32>| value.map(|value| value.to_string());
        match self.temperature {
            None | Some(0.0) => parts.push("greedy".to_owned()),
            temperature => {
                add("temperature", text(temperature));
                add("top_k", self.top_k.map(|top_k| top_k.to_string()));
                add("top_p", text(self.top_p));
                add("min_p", text(self.min_p));
            }
        }
        let penalty = self.repetition_penalty.filter(|penalty| *penalty != 1.0);
        parts.extend(penalty.map(|penalty| format!("repetition_penalty {penalty}")));
        f.write_str(&parts.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn text(json: Value) -> String {
        SamplingDefaults::from_hf(&json).unwrap().to_string()
    }

    #[test]
    fn do_sample_decides_before_a_temperature() {
        let all = json!({"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95,
            "min_p": 0.0, "repetition_penalty": 1.1, "eos_token_id": 3});
        let expected = "temperature 0.6, top_k 20, top_p 0.95, min_p 0, repetition_penalty 1.1";
        assert_eq!(text(all.clone()), expected);
        let sampling = SamplingDefaults::from_hf(&all).unwrap();
        assert_eq!(sampling.repeat_last_n, Some(u32::MAX), "transformers looks at all of it");
        let mut greedy = all;
        greedy["do_sample"] = json!(false);
        assert_eq!(text(greedy), "greedy, repetition_penalty 1.1");
        assert_eq!(text(json!({"do_sample": true})), "temperature 1");
        assert_eq!(text(json!({"temperature": 0.7, "top_k": -1})), "temperature 0.7, top_k 0");
        assert_eq!(text(json!({"temperature": null})), "greedy");
        assert!(SamplingDefaults::from_hf(&json!({"eos_token_id": 1})).unwrap().is_empty());
    }

    #[test]
    fn impossible_values_are_named() {
        for (key, value) in [
            ("temperature", json!(-1)),
            ("temperature", json!("hot")),
            ("top_p", json!(1.5)),
            ("top_k", json!(-2)),
            ("min_p", json!(-0.5)),
            ("repetition_penalty", json!(0)),
            ("do_sample", json!("yes")),
        ] {
            let error = SamplingDefaults::from_hf(&json!({key: value})).unwrap_err();
            assert_eq!(error.key, key);
        }
    }

    #[test]
    fn written_and_read_again_it_is_the_same() {
        let sampling = SamplingDefaults {
            temperature: Some(0.6),
            top_p: Some(0.95),
            repeat_last_n: Some(u32::MAX),
            ..SamplingDefaults::default()
        };
        let json = serde_json::to_string(&sampling).unwrap();
        assert_eq!(json, r#"{"temperature":0.6,"top_p":0.95,"repeat_last_n":4294967295}"#);
        assert_eq!(serde_json::from_str::<SamplingDefaults>(&json).unwrap(), sampling);
    }
}
