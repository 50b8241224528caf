//! A request's prompt as token ids, and a tokenizer as the vocabulary of its answer.

use std::sync::{Mutex, PoisonError};

use hat_core::InputError;
use hat_core::answer::{Prepared, Spelling, Vocabulary};
use hat_core::request::{Prompt, Request};
use hat_loader::{Bundle, BundleError};
use hat_plan::TokenId;

use crate::history::TokenHistory;
use crate::token::{
    ChatOptions, ChatText, Detokenizer, Special, SpecialText, Start, TokenError, TokenSettings,
    Tokenizer,
};

/// Reason to refuse a request before it is tokenised or while it is.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// The request is wrong.
    #[error(transparent)]
    Input(#[from] InputError),
    /// The chat template refused the messages, does not end, or is not there.
    #[error("chat template: {0}")]
    Template(TokenError),
}

/// Checks and tokenises a request, for a model of `vocab_size` tokens and sessions of `context`
/// positions. A conversation that goes on from one of `history` keeps its ids; templates may ask
/// for the date. Returns the text of a conversation with it.
///
/// # Errors
/// [`PrepareError`].
pub fn prepare(
    request: Request,
    tokenizer: &Tokenizer,
    (vocab_size, context): (usize, u32),
    history: &Mutex<TokenHistory>,
    unix_seconds: u64,
) -> Result<(Prepared, Option<ChatText>), PrepareError> {
    // What is refused anyway is not tokenised.
    request.check_for(vocab_size)?;
    let (prompt, rendered) = match &request.prompt {
        Prompt::Text(text) => {
            let ids = tokenizer.encode_prompt(text, Special::Parse);
            (ids.map_err(|error| InputError::field("prompt", error.to_string()))?, None)
        }
        Prompt::Chat(messages) => {
            let options = ChatOptions::at(unix_seconds);
            let rendered = tokenizer.render(messages, &options).map_err(PrepareError::Template)?;
            // Encoding takes its time, and is nobody else's.
            let known =
                history.lock().unwrap_or_else(PoisonError::into_inner).find(&rendered, tokenizer);
            let (from, mut ids) = known.unwrap_or_default();
            let rest = tokenizer.encode_rendered(&rendered, from);
            ids.extend(rest.map_err(PrepareError::Template)?);
            (ids, Some(rendered))
        }
        Prompt::Tokens(tokens) => (tokens.clone(), None),
        _ => return Err(InputError::field("prompt", "of a kind that is not known here").into()),
    };
    Ok((Prepared::new(request, prompt, vocab_size, context)?, rendered))
}

/// Reason that a bundle has no usable tokenizer.
#[derive(Debug, thiserror::Error)]
pub enum BundleTextError {
    /// Its files can't be read.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// They are not what the format says.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// There is none.
    #[error("it has no tokenizer")]
    Missing,
}

impl Tokenizer {
    /// The tokenizer of a device's bundle.
    ///
    /// # Errors
    /// [`BundleTextError`].
    pub fn of_bundle(bundle: &Bundle) -> Result<Self, BundleTextError> {
        let json = bundle.tokenizer_json()?.ok_or(BundleTextError::Missing)?;
        Ok(Self::from_json(json.as_bytes(), &token_settings(bundle))?)
    }
}

/// Tokenizer settings of a device's bundle.
fn token_settings(bundle: &Bundle) -> TokenSettings {
    let text = bundle.token_settings().cloned().unwrap_or_default();
    TokenSettings {
        vocab_size: bundle.config().vocab_size,
        chat_template: text.chat_template,
        bos_token: text.bos_token,
        eos_token: text.eos_token,
        eos_token_ids: bundle.config().eos_token_ids.clone(),
        template_limit: None,
        control_tokens: bundle.manifest().control_tokens.clone(),
        add_bos: None, // tokenizer.json's post-processor knows
    }
}

impl Vocabulary for Tokenizer {
    fn is_end(&self, token: TokenId) -> bool {
        self.is_end(token)
    }

    fn token_bytes(&self, token: TokenId) -> &[u8] {
        self.token_bytes(token)
    }

    fn spelling(&self, prompt: &Prompt) -> Box<dyn Spelling> {
        let start = match prompt {
            Prompt::Chat(_) => Start::Text,
            _ => Start::Continue,
        };
        Box::new(self.detokenizer(start, SpecialText::Skip))
    }
}

impl Spelling for Detokenizer {
    fn push(&mut self, token: TokenId) -> &str {
        self.push(token)
    }

    fn finish(&mut self) -> &str {
        self.finish()
    }
}
