//! The text side of a device: its tokenizer, and the conversations whose ids are known.

use std::sync::{Mutex, PoisonError};

use hat_core::answer::{Prepared, Vocabulary};
use hat_core::request::{Metrics, Request};
use hat_loader::Bundle;
use hat_text::{ChatText, PrepareError, TokenError, TokenHistory, Tokenizer};
use hat_transport::clock::unix_seconds;

use crate::Error;

/// The text of a conversation that is answered.
pub(crate) type Rendered = Option<ChatText>;

/// A tokenizer, and conversations.
pub(crate) struct Text {
    pub(crate) tokenizer: Tokenizer,
    /// Locked twice a request.
    history: Mutex<TokenHistory>,
    vocab_size: usize,
}

impl Text {
    /// The tokenizer of a device's bundle.
    ///
    /// # Errors
    /// [`Error::Load`].
    pub(crate) fn open(bundle: &Bundle) -> Result<Self, Error> {
        let tokenizer = Tokenizer::of_bundle(bundle)
            .map_err(|error| Error::bundle(bundle.directory(), error))?;
        let vocab_size = bundle.config().vocab_size;
        Ok(Self { tokenizer, history: Mutex::default(), vocab_size })
    }

    /// Checks and tokenises a request.
    ///
    /// # Errors
    /// [`Error::Input`] or [`Error::Template`].
    pub(crate) fn prepare(
        &self,
        request: Request,
        context: u32,
    ) -> Result<(Prepared, Rendered), Error> {
        let model = (self.vocab_size, context);
        Ok(hat_text::prepare(request, &self.tokenizer, model, &self.history, unix_seconds())?)
    }

    /// The meaning of token ids.
    pub(crate) fn vocabulary(&self) -> &dyn Vocabulary {
        &self.tokenizer
    }

    /// A conversation was answered: the next turn may go on from it.
    pub(crate) fn note(&self, rendered: &Rendered, prompt: &Prepared, answer: &Metrics) {
        let Some(rendered) = rendered else { return };
        let mut history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        history.note(rendered, &prompt.prompt, &answer.token_ids, &answer.text, &self.tokenizer);
    }
}

impl From<PrepareError> for Error {
    fn from(error: PrepareError) -> Self {
        match error {
            PrepareError::Input(error) => error.into(),
            PrepareError::Template(hangs @ TokenError::TemplateHangs) => {
                Self::TemplateHangs(hangs.to_string())
            }
            PrepareError::Template(error) => Self::Template(error.to_string()),
        }
    }
}
