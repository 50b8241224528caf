//! Token ids to text, one at a time.

use std::sync::Arc;

use hat_plan::TokenId;

use super::pieces::{Pieces, Strip};

/// State before the first token that is pushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Nothing: the space that SentencePiece models put before the first word is dropped.
    Text,
    /// Text that is shown elsewhere (a raw prompt): every space is kept.
    Continue,
}

/// Treatment of control tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpecialText {
    /// They are not shown.
    Skip,
    /// They are shown as they are written.
    Show,
}

/// Turns ids into text as they come, and keeps back the bytes of a character until its last one
/// is there. Bytes that can't be UTF-8 become U+FFFD as soon as that is certain.
///
/// The texts that [`Detokenizer::push`] and [`Detokenizer::finish`] return add up to the decoded
/// whole. Each call costs time in the size of its token alone; after a few tokens nothing is
/// allocated. A clone goes its own way (a branch of a draft tree).
#[derive(Clone)]
pub struct Detokenizer {
    pieces: Arc<Pieces>,
    special: SpecialText,
    /// Spaces that may still be dropped.
    strip: Strip,
    /// The bytes of an unfinished character, and while in `push` the new token's after them.
    bytes: Vec<u8>,
    /// Text that the last call returned.
    text: String,
}

impl Detokenizer {
    pub(super) fn new(pieces: Arc<Pieces>, start: Start, special: SpecialText) -> Self {
        let strip = match start {
            Start::Text => pieces.strip(),
            Start::Continue => Strip::Count(0),
        };
        Self { pieces, special, strip, bytes: Vec::new(), text: String::new() }
    }

    /// The text that `id` completes; often a word, empty in the middle of a character. An id
    /// without a token is ignored.
    pub fn push(&mut self, id: TokenId) -> &str {
        self.text.clear();
        if self.special == SpecialText::Skip && self.pieces.is_special(id) {
            return &self.text;
        }
        let piece = self.pieces.bytes(id);
        if piece.is_empty() {
            return &self.text;
        }
        let dropped = match self.strip {
            Strip::Count(0) => 0,
            Strip::Count(left) => {
                let dropped = piece.iter().take(left).take_while(|&&byte| byte == b' ').count();
                let all = dropped == piece.len();
                self.strip = Strip::Count(if all { left - dropped } else { 0 });
                dropped
            }
            Strip::FirstToken => {
                self.strip = Strip::Count(0);
                piece.iter().take_while(|&&byte| byte == b' ').count()
            }
        };
        self.bytes.extend_from_slice(&piece[dropped..]);
        let mut begin = 0;
        loop {
            match std::str::from_utf8(&self.bytes[begin..]) {
                Ok(text) => {
                    self.text.push_str(text);
                    begin = self.bytes.len();
                    break;
                }
                Err(error) => {
                    let valid = begin + error.valid_up_to();
                    self.text.push_str(
                        std::str::from_utf8(&self.bytes[begin..valid]).expect("checked above"),
                    );
                    begin = valid;
                    match error.error_len() {
                        None => break,
                        Some(wrong) => {
                            self.text.push(char::REPLACEMENT_CHARACTER);
                            begin += wrong;
                        }
                    }
                }
            }
        }
        self.bytes.drain(..begin);
        &self.text
    }

    /// Rest at the end: U+FFFD if the last character is unfinished, else nothing.
    pub fn finish(&mut self) -> &str {
        self.text.clear();
        if !self.bytes.is_empty() {
            self.bytes.clear();
            self.text.push(char::REPLACEMENT_CHARACTER);
        }
        &self.text
    }

    /// True if the last character is unfinished.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        !self.bytes.is_empty()
    }
}
