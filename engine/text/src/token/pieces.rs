//! Bytes of each token id: the `decoder` of `tokenizer.json`, taken apart once.
//!
//! Three decoders cover the Llama-shaped families: `ByteLevel` (Llama 3, Qwen, SmolLM), the
//! sequence `Replace, ByteFallback, Fuse, Strip` (Llama 2, Mistral) and `Metaspace`. In each a
//! token's bytes do not depend on its neighbours, but for spaces at the very start.

use hat_plan::TokenId;
use serde_json::Value;
use tokenizers::Model;

use super::TokenError;

/// The bytes of all tokens, one after another, and where each begins.
pub(super) struct Pieces {
    bytes: Vec<u8>,
    /// `[ids + 1]`
    starts: Vec<u32>,
    /// One bit an id: control tokens, which are not shown.
    special: Vec<u64>,
    strip: Strip,
}

/// Spaces that are dropped at the start of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Strip {
    /// As many as this.
    Count(usize),
    /// All in the first token.
    FirstToken,
}

/// Conversion of a token's text to bytes.
#[derive(Default)]
struct Decoding {
    byte_level: bool,
    byte_fallback: bool,
    /// Texts replaced within each token, in order.
    replace: Vec<(String, String)>,
    strip: Option<Strip>,
}

impl Pieces {
    pub(super) fn new(
        inner: &tokenizers::Tokenizer,
        decoder: &Value,
        rows: usize,
    ) -> Result<Self, TokenError> {
        let mut decoding = Decoding::default();
        decoding.add(decoder)?;
        let table = byte_level_table();
        let added = inner.get_added_vocabulary();
        let added_tokens = added.get_added_tokens_decoder();
        let model = inner.get_model();
        let mut pieces = Self {
            bytes: Vec::new(),
            starts: vec![0],
            special: vec![0; rows.div_ceil(64)],
            strip: decoding.strip.unwrap_or(Strip::Count(0)),
        };
        for id in 0..u32::try_from(rows).expect("rows <= VOCAB_ROWS_MAX") {
            let token = added.simple_id_to_token(id).or_else(|| model.id_to_token(id));
            if let Some(token) = token {
                decoding.decode(&token, &table, &mut pieces.bytes);
            }
            if added_tokens.get(&id).is_some_and(|token| token.special) {
                pieces.special[id as usize / 64] |= 1 << (id % 64);
            }
            let end = u32::try_from(pieces.bytes.len()).expect("texts <= TOKENIZER_BYTES_MAX");
            pieces.starts.push(end);
        }
        Ok(pieces)
    }

    /// Empty for ids without a token.
    pub(super) fn bytes(&self, id: TokenId) -> &[u8] {
        match self.starts.get(id as usize..id as usize + 2) {
            Some(&[start, end]) => &self.bytes[start as usize..end as usize],
            _ => &[],
        }
    }

    pub(super) fn is_special(&self, id: TokenId) -> bool {
        self.special.get(id as usize / 64).is_some_and(|bits| bits >> (id % 64) & 1 == 1)
    }

    pub(super) fn strip(&self) -> Strip {
        self.strip
    }
}

impl Decoding {
    /// Adds one step of the decoder, or all of a sequence.
    fn add(&mut self, decoder: &Value) -> Result<(), TokenError> {
        let kind = decoder["type"].as_str().unwrap_or("null");
        let unsupported = || TokenError::Decoder(kind.to_string());
        match kind {
            "Sequence" => {
                for step in decoder["decoders"].as_array().ok_or_else(unsupported)? {
                    self.add(step)?;
                }
            }
            "ByteLevel" => self.byte_level = true,
            "ByteFallback" => self.byte_fallback = true,
            "Fuse" => {}
            "Replace" => {
                let pattern = decoder["pattern"]["String"].as_str().ok_or_else(unsupported)?;
                let content = decoder["content"].as_str().ok_or_else(unsupported)?;
                self.replace.push((pattern.into(), content.into()));
            }
            "Metaspace" => {
                let replacement = decoder["replacement"].as_str().ok_or_else(unsupported)?;
                self.replace.push((replacement.into(), " ".into()));
                if decoder["prepend_scheme"] != "never" {
                    self.strip = Some(Strip::FirstToken);
                }
            }
            "Strip" => {
                let start = decoder["start"].as_u64().ok_or_else(unsupported)?;
                if decoder["content"] != " " || decoder["stop"] != 0 || self.strip.is_some() {
                    return Err(unsupported());
                }
                self.strip = Some(Strip::Count(usize::try_from(start).unwrap_or(usize::MAX)));
            }
            _ => return Err(unsupported()),
        }
        Ok(())
    }

    fn decode(&self, token: &str, table: &[u8; 0x144], out: &mut Vec<u8>) {
        if self.byte_level {
            let begin = out.len();
            for c in token.chars() {
                match table.get(c as usize) {
                    Some(&byte) if is_byte_char(c) => out.push(byte),
                    // Added tokens may hold what the alphabet does not: then all is plain text.
                    _ => {
                        out.truncate(begin);
                        out.extend_from_slice(token.as_bytes());
                        return;
                    }
                }
            }
            return;
        }
        let mut text = std::borrow::Cow::Borrowed(token);
        for (pattern, content) in &self.replace {
            text = text.replace(pattern, content).into();
        }
        match byte_of(&text).filter(|_| self.byte_fallback) {
            Some(byte) => out.push(byte),
            None => out.extend_from_slice(text.as_bytes()),
        }
    }
}

/// `<0x41>` is the byte 0x41.
fn byte_of(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() != 2 {
        return None;
    }
    u8::from_str_radix(hex, 16).ok()
}

/// True if a byte is shown as itself in byte-level vocabularies: printable Latin-1.
const fn is_printable(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

/// True if a character stands for a byte: printable ones for themselves, the 68 others in order
/// from U+0100.
fn is_byte_char(c: char) -> bool {
    let code = c as u32;
    match u8::try_from(code) {
        Ok(byte) => is_printable(byte),
        Err(_) => code < 0x144,
    }
}

/// The byte of each character for which [`is_byte_char`] holds.
fn byte_level_table() -> [u8; 0x144] {
    let mut table = [0; 0x144];
    let mut next = 0x100;
    for byte in 0..=255u8 {
        if is_printable(byte) {
            table[usize::from(byte)] = byte;
        } else {
            table[next] = byte;
            next += 1;
        }
    }
    assert_eq!(next, table.len());
    table
}
