//! Tokens, their kinds, and the merges between them.

use std::cmp::Ordering;
use std::collections::HashMap;

use serde_json::Value as Json;

use super::GgufError;
use super::parse::{Array, Container, Value};

const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";

/// Longest piece that merges are looked for in: the work grows with its square.
const PIECE_BYTES_MAX: usize = 256;

/// `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TokenKind {
    /// Text; also "unused" of files that pad their vocabulary.
    Normal,
    Unknown,
    Control,
    UserDefined,
    Byte,
}

/// The vocabulary by id.
pub(super) struct Vocabulary<'a> {
    pub(super) tokens: Vec<&'a str>,
    pub(super) kinds: Vec<TokenKind>,
    ids: HashMap<&'a str, usize>,
    /// Ids without a token of their own: an earlier one has the same text.
    pub(super) doubled: usize,
}

impl<'a> Vocabulary<'a> {
    pub(super) fn read(container: &Container<'a>) -> Result<Self, GgufError> {
        let tokens = array(container, TOKENS)?
            .ok_or_else(|| GgufError::metadata(TOKENS, "missing"))?
            .iter()
            .map(|value| match value {
                Value::Text(text) => Ok(text),
                other => Err(GgufError::metadata(TOKENS, format!("{other:?} is not a string"))),
            })
            .collect::<Result<Vec<_>, _>>()?;
        let mut ids = HashMap::with_capacity(tokens.len());
        for (id, token) in tokens.iter().enumerate() {
            ids.entry(*token).or_insert(id);
        }
        let doubled = tokens.len() - ids.len();
        let kinds = match array(container, TYPES)? {
            None => vec![TokenKind::Normal; tokens.len()],
            Some(types) if types.len() != tokens.len() => {
                let reason = format!("{} types for {} tokens", types.len(), tokens.len());
                return Err(GgufError::metadata(TYPES, reason));
            }
            Some(types) => types.iter().map(kind).collect::<Result<_, _>>()?,
        };
        Ok(Self { tokens, kinds, ids, doubled })
    }

    /// `{token: id}`, ids ascending.
    pub(super) fn json(&self) -> Json {
        let entries = self.tokens.iter().enumerate().filter(|(id, _)| self.is_first(*id));
        Json::Object(entries.map(|(id, token)| ((*token).to_owned(), id.into())).collect())
    }

    /// True if no earlier token has the text of this one.
    pub(super) fn is_first(&self, id: usize) -> bool {
        self.ids.get(self.tokens[id]) == Some(&id)
    }

    /// The merges that the file lists, as pairs of tokens, the earliest first, and how many were
    /// left out: those that join or make what is no token, which nothing could use.
    pub(super) fn listed_merges(
        &self,
        container: &Container<'a>,
    ) -> Result<(Vec<[&'a str; 2]>, usize), GgufError> {
        let merges =
            array(container, MERGES)?.ok_or_else(|| GgufError::metadata(MERGES, "missing"))?;
        let pair = |value: Value<'a>| {
            let wrong = |why: &str| GgufError::metadata(MERGES, format!("{value:?} {why}"));
            let Value::Text(text) = value else {
                return Err(wrong("is not a string"));
            };
            let (left, right) = text.split_once(' ').ok_or_else(|| wrong("is not two tokens"))?;
            let all_known = [left, right, &format!("{left}{right}")]
                .into_iter()
                .all(|token| self.ids.contains_key(token));
            Ok(all_known.then_some([left, right]))
        };
        let pairs = merges.iter().map(pair).collect::<Result<Vec<_>, _>>()?;
        let known: Vec<_> = pairs.into_iter().flatten().collect();
        let skipped = merges.len() - known.len();
        Ok((known, skipped))
    }

    /// The merges that follow from SentencePiece's scores: each way to put a piece together from
    /// two pieces, the best-scored piece first. Ties go to longer left parts, then longer right
    /// ones, then the order of ids, as in transformers' conversion. A piece that is no text
    /// (control, byte, unknown) is never put together.
    pub(super) fn scored_merges(
        &self,
        container: &Container<'a>,
    ) -> Result<Vec<[&'a str; 2]>, GgufError> {
        let scores = self.scores(container)?;
        let mut merges = Vec::new();
        let mut ways = Vec::new();
        for (id, piece) in self.tokens.iter().enumerate() {
            let is_text = matches!(self.kinds[id], TokenKind::Normal | TokenKind::UserDefined);
            if !is_text || !self.is_first(id) {
                continue;
            }
            if piece.len() > PIECE_BYTES_MAX {
                let reason = format!(
                    "token {id} has {} bytes, at most {PIECE_BYTES_MAX} are possible",
                    piece.len()
                );
                return Err(GgufError::metadata(TOKENS, reason));
            }
            ways.clear();
            for (cut, _) in piece.char_indices().skip(1) {
                let (left, right) = piece.split_at(cut);
                if let (Some(l), Some(r)) = (self.ids.get(left), self.ids.get(right)) {
                    ways.push((*l, *r, left, right));
                }
            }
            ways.sort_unstable_by_key(|(l, r, ..)| (*l, *r));
            merges.extend(ways.iter().map(|(_, _, left, right)| (scores[id], *left, *right)));
        }
        let chars = |text: &str| text.chars().count();
        merges.sort_by(|(a, a_left, a_right), (b, b_left, b_right)| {
            b.partial_cmp(a)
                .unwrap_or(Ordering::Equal)
                .then_with(|| chars(b_left).cmp(&chars(a_left)))
                .then_with(|| chars(b_right).cmp(&chars(a_right)))
        });
        Ok(merges.into_iter().map(|(_, left, right)| [left, right]).collect())
    }

    /// One finite score a token.
    fn scores(&self, container: &Container<'a>) -> Result<Vec<f64>, GgufError> {
        let scores =
            array(container, SCORES)?.ok_or_else(|| GgufError::metadata(SCORES, "missing"))?;
        if scores.len() != self.tokens.len() {
            let reason = format!("{} scores for {} tokens", scores.len(), self.tokens.len());
            return Err(GgufError::metadata(SCORES, reason));
        }
        let score = |value: Value<'a>| match value {
            Value::Float(score) if score.is_finite() => Ok(score),
            other => Err(GgufError::metadata(SCORES, format!("{other:?} is not a finite number"))),
        };
        scores.iter().map(score).collect()
    }
}

fn array<'a>(container: &Container<'a>, key: &str) -> Result<Option<Array<'a>>, GgufError> {
    match container.metadata.get(key) {
        None => Ok(None),
        Some(Value::Array(array)) => Ok(Some(*array)),
        Some(other) => Err(GgufError::metadata(key, format!("{other:?} is not an array"))),
    }
}

fn kind(value: Value<'_>) -> Result<TokenKind, GgufError> {
    let number = match value {
        Value::Signed(number) => u64::try_from(number).ok(),
        Value::Unsigned(number) => Some(number),
        _ => None,
    };
    Ok(match number {
        Some(1 | 5) => TokenKind::Normal,
        Some(2) => TokenKind::Unknown,
        Some(3) => TokenKind::Control,
        Some(4) => TokenKind::UserDefined,
        Some(6) => TokenKind::Byte,
        _ => {
            return Err(GgufError::metadata(TYPES, format!("{value:?} is not a token type")));
        }
    })
}
