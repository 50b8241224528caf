//! Rendered conversations: what follows what, and ids of a part.

use hat_core::request::Message;
use hat_plan::TokenId;

use super::{ChatOptions, TEXT_BYTES, TokenError, Tokenizer, guard, within};

/// A conversation as the chat template renders it, with the control tokens that people wrote in it
/// broken (see module `guard`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatText(String);

impl ChatText {
    /// Its length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True if it is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Tokenizer {
    /// A conversation, rendered by the model's chat template.
    ///
    /// # Errors
    /// As [`Tokenizer::encode_chat`].
    pub fn render(
        &self,
        messages: &[Message],
        options: &ChatOptions,
    ) -> Result<ChatText, TokenError> {
        let template = self.template.as_ref().ok_or(TokenError::NoTemplate)?;
        template.render(messages, options, &self.guard).map(ChatText)
    }

    /// The ids of `text` from byte `from` on.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    ///
    /// # Panics
    /// If `from` is not at a character of it.
    pub fn encode_rendered(
        &self,
        text: &ChatText,
        from: usize,
    ) -> Result<Vec<TokenId>, TokenError> {
        let text = &text.0[from..];
        within(TEXT_BYTES, guard::unguarded(text).len(), self.text_bytes_max)?;
        self.encode_guarded(text, false)
    }

    /// `prompt`, and behind it what the model said.
    #[must_use]
    pub fn answered(&self, prompt: &ChatText, answer: &str) -> ChatText {
        ChatText([&prompt.0, self.guard.guard(answer).as_ref()].concat())
    }

    /// True if `text` begins with `start` and goes on with a control token: the ids of the rest
    /// then don't depend on the text before.
    #[must_use]
    pub fn continues(&self, text: &ChatText, start: &ChatText) -> bool {
        let rest = text.0.strip_prefix(&start.0);
        rest.is_some_and(|rest| self.guard.starts_control(rest.as_bytes()))
    }
}
