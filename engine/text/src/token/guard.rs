//! Keeps control tokens that a user types from being taken for control tokens.
//!
//! The tokenizer finds control tokens in the raw text first, and normalises what lies between
//! them after. So a mark put *inside* each control token that a user wrote hides it from the
//! search, and a normaliser that removes the mark gives the characters back before they are split
//! into words. The text is still encoded as one whole, therefore its ids are those of any other
//! text.
//!
//! Marks are made of noncharacters. A noncharacter that a user writes is escaped, so it can't be
//! mistaken for a mark:
//!
//! | in the text | means |
//! |---|---|
//! | U+FDD0 U+FDD1 | a U+FDD0 that was in the text |
//! | U+FDD0 U+FDD2 | a break: nothing |
//!
//! A vocabulary may be able to spell a control token from ordinary pieces even so (merges that a
//! converter made from all of the vocabulary). A control token that lies over a break is therefore
//! replaced by the pieces of its two halves.
//!
//! A control token of one character can't be broken; no model family has one.

use std::borrow::Cow;
use std::collections::BTreeMap;

use hat_plan::TokenId;
use tokenizers::normalizers::{NormalizerWrapper, Replace};

/// Stands in front of the second character of each mark.
const ESCAPE: char = '\u{FDD0}';
const ESCAPED: &str = "\u{FDD0}\u{FDD1}";
/// Hides a control token; see the module.
pub(super) const BREAK: &str = "\u{FDD0}\u{FDD2}";

/// The control tokens of one vocabulary.
pub(super) struct Guard {
    /// Their texts, sorted, none empty.
    texts: Vec<String>,
    /// Them by id.
    ids: BTreeMap<TokenId, String>,
}

impl Guard {
    pub(super) fn new(control: BTreeMap<TokenId, String>) -> Self {
        let mut texts: Vec<String> =
            control.values().filter(|text| !text.is_empty()).cloned().collect();
        texts.sort();
        Self { texts, ids: control }
    }

    pub(super) fn is_control(&self, id: TokenId) -> bool {
        self.ids.contains_key(&id)
    }

    /// The text of a control token; of another id none.
    pub(super) fn text(&self, id: TokenId) -> &str {
        self.ids.get(&id).map_or("", String::as_str)
    }

    /// `text` with each control token broken, and escapes escaped.
    pub(super) fn guard<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let mut out = String::new();
        let mut copied = 0;
        for (at, c) in text.char_indices() {
            let mark = if c == ESCAPE {
                &ESCAPED[ESCAPE.len_utf8()..]
            } else if self.starts_control(&text.as_bytes()[at..]) {
                BREAK
            } else {
                continue;
            };
            let after = at + c.len_utf8();
            out.push_str(&text[copied..after]);
            out.push_str(mark);
            copied = after;
        }
        if copied == 0 {
            return Cow::Borrowed(text);
        }
        out.push_str(&text[copied..]);
        Cow::Owned(out)
    }

    /// True if a control token stands at the front of `text`: narrows the sorted list byte by byte,
    /// so a long text of `<<<<` costs no more than any other.
    pub(super) fn starts_control(&self, text: &[u8]) -> bool {
        let mut list = &self.texts[..];
        for (depth, &byte) in text.iter().enumerate() {
            let from = list.partition_point(|s| s.as_bytes()[depth] < byte);
            list = &list[from..];
            let to = list.partition_point(|s| s.as_bytes()[depth] == byte);
            list = &list[..to];
            match list.first() {
                None => return false,
                // The shortest of those that share a prefix is sorted first.
                Some(first) if first.len() == depth + 1 => return true,
                Some(_) => {}
            }
        }
        false
    }
}

/// `text` with escapes escaped and nothing broken.
pub(super) fn escape(text: &str) -> Cow<'_, str> {
    if text.contains(ESCAPE) {
        Cow::Owned(text.replace(ESCAPE, ESCAPED))
    } else {
        Cow::Borrowed(text)
    }
}

/// The text before [`Guard::guard`].
pub(super) fn unguarded(text: &str) -> String {
    text.replace(BREAK, "").replace(ESCAPED, "\u{FDD0}")
}

/// The normalisers that undo [`Guard::guard`], in order.
pub(super) fn normalizers() -> tokenizers::Result<Vec<NormalizerWrapper>> {
    Ok(vec![
        NormalizerWrapper::Replace(Replace::new(BREAK, "")?),
        NormalizerWrapper::Replace(Replace::new(ESCAPED, ESCAPE)?),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard(control: &[&str]) -> Guard {
        Guard::new((0..).zip(control.iter().map(ToString::to_string)).collect())
    }

    #[test]
    fn ordinary_text_is_borrowed() {
        let guard = guard(&["<s>", "<|im_end|>"]);
        for text in ["", "plain", "a < b", "<sp>", "<|im_en", "é<"] {
            assert!(matches!(guard.guard(text), Cow::Borrowed(same) if same == text));
        }
    }

    #[test]
    fn control_tokens_are_broken_wherever_they_overlap() {
        let guard = guard(&["<s>", "<|x|>", "<|x|><s>", "éé"]);
        let marked = guard.guard("a<|x|><s>éééb").replace(BREAK, "#");
        assert_eq!(marked, "a<#|x|><#s>é#é#éb");
    }

    #[test]
    fn escapes_can_not_be_forged() {
        let guard = guard(&["<s>"]);
        // What a user writes to look like a break comes back as what they wrote.
        for text in ["\u{FDD0}", "<\u{FDD0}\u{FDD2}s>", "\u{FDD0}\u{FDD1}", "\u{FDD0}<s>"] {
            let marked = guard.guard(text);
            assert_ne!(marked, text);
            assert_eq!(marked.replace(BREAK, "").replace(ESCAPED, "\u{FDD0}"), text);
        }
    }
}
