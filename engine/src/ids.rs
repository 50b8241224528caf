//! The place of `text` in an engine without it: prompts and answers are token ids.

use hat_core::answer::{EndTokens, Prepared, Vocabulary};
use hat_core::request::{Metrics, Prompt, Request};
use hat_loader::Bundle;

use crate::Error;

/// Nothing: no text is kept.
pub(crate) type Rendered = ();

/// The tokens that end an answer, by the bundle's configuration.
pub(crate) struct Text {
    ends: EndTokens,
    vocab_size: usize,
}

impl Text {
    #[expect(clippy::unnecessary_wraps, reason = "an engine with text may find no tokenizer")]
    pub(crate) fn open(bundle: &Bundle) -> Result<Self, Error> {
        let config = bundle.config();
        let ends = EndTokens(config.eos_token_ids.clone());
        Ok(Self { ends, vocab_size: config.vocab_size })
    }

    /// Checks a request.
    ///
    /// # Errors
    /// [`Error::Input`] for text, and as with text.
    pub(crate) fn prepare(
        &self,
        request: Request,
        context: u32,
    ) -> Result<(Prepared, Rendered), Error> {
        let none = "this engine was built without text (feature `text`)";
        let Prompt::Tokens(prompt) = &request.prompt else {
            return Err(Error::field("prompt", format!("{none}: give token ids")));
        };
        if !request.stop.is_empty() {
            return Err(Error::field("stop", format!("{none}: no stop string can be found")));
        }
        let prompt = prompt.clone();
        Ok((Prepared::new(request, prompt, self.vocab_size, context)?, ()))
    }

    /// The meaning of token ids.
    pub(crate) fn vocabulary(&self) -> &dyn Vocabulary {
        &self.ends
    }

    pub(crate) fn note(&self, (): &Rendered, _: &Prepared, _: &Metrics) {}
}
