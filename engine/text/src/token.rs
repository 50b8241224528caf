//! Text to token ids and back: tokenizer, chat template, streaming detokenizer.
//!
//! Three promises:
//! - What a *user* writes never becomes a control token. `<|im_start|>` in a message is encoded as
//!   the characters it is made of, while the same marker written by the chat template is the
//!   control token. How: see module `guard`.
//! - For text that spells no control token the ids equal those of the reference implementation
//!   over the whole rendered prompt; nothing is encoded in pieces. Later turns of a conversation
//!   are the exception: the ids of the model's own answers are kept as they were (`turns`).
//! - A [`Detokenizer`] never emits half a character, and its pieces add up to the whole text.

mod chat;
mod detokenizer;
mod guard;
mod limited;
mod pieces;
mod python;
mod rendered;
mod shapes;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use hat_core::request::Message;
use hat_loader::{ControlTokens, TextFacts};
use hat_plan::TokenId;
use tokenizers::normalizers::{NormalizerWrapper, Sequence};
use tokenizers::{Encoding, Model};

pub use self::chat::ChatOptions;
pub use self::detokenizer::{Detokenizer, SpecialText, Start};
pub use self::rendered::ChatText;

use self::chat::ChatTemplate;
use self::guard::Guard;
use self::limited::{Limited, Unfinished};
use self::pieces::Pieces;
use self::shapes::Shapes;

/// Largest `tokenizer.json` that is read, in bytes.
pub const TOKENIZER_BYTES_MAX: usize = 64 << 20;
/// Largest chat template, in bytes.
pub const TEMPLATE_BYTES_MAX: usize = 256 << 10;
/// Longest time for one rendering of a chat template; real ones take a millisecond.
pub const TEMPLATE_LIMIT: Duration = Duration::from_secs(1);
/// Longest text that is encoded in one call, in bytes; also the longest rendered prompt. Some
/// 250,000 tokens.
pub const TEXT_BYTES_MAX: usize = 1 << 20;
/// Longest text that the model itself sees, in bytes: normalised, its bytes written as letters.
const GROWN_BYTES_MAX: usize = 16 << 20;
/// Longest time for one text where the model's expression may take any.
const ENCODE_LIMIT: Duration = Duration::from_secs(10);
/// Largest vocabulary, in rows of the embedding.
pub const VOCAB_ROWS_MAX: usize = 1 << 21;

/// An error in the conversion between text and ids.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// `tokenizer.json` is not what the format says.
    #[error("tokenizer.json: {0}")]
    Malformed(String),
    /// A file or a part of it is larger than the limit.
    #[error("{what}: {size} is over the limit of {limit}")]
    TooLarge {
        /// Item that is too large, with its unit.
        what: &'static str,
        /// Its size.
        size: usize,
        /// The most that is accepted.
        limit: usize,
    },
    /// The tokenizer names ids that the embedding has no row for, or two tokens share an id.
    #[error(
        "tokenizer.json: {tokens} tokens, of which {placed} have an id of their own below \
         config.json's vocab_size = {rows}; tokenizer and weights are of different models"
    )]
    Vocabulary {
        /// Tokens of the model's vocabulary and the added ones.
        tokens: usize,
        /// Number of tokens with an id of their own below `rows`.
        placed: usize,
        /// Rows of the embedding.
        rows: usize,
    },
    /// The `decoder` is of a kind that we can't stream.
    #[error("tokenizer.json: decoder {0} is not supported (ByteLevel, Metaspace and Llama's are)")]
    Decoder(String),
    /// A token named by the configuration is not in the vocabulary.
    #[error("tokenizer configuration: {field} = {token:?} is not in the vocabulary")]
    UnknownToken {
        /// Name of the field.
        field: &'static str,
        /// Its value.
        token: String,
    },
    /// The chat template does not parse.
    #[error("chat template: {0}")]
    TemplateSyntax(String),
    /// The chat template failed on these messages, or ran beyond its fuel.
    #[error("chat template: {0}")]
    Template(String),
    /// The chat template runs without an end, now or in requests before.
    #[error(
        "it does not end in time; chat is off while it runs, prompts of your own (/v1/completions, \
         --raw) work"
    )]
    TemplateHangs,
    /// The chat template refused these messages by `raise_exception`.
    #[error("chat template refuses these messages: {0}")]
    Refused(String),
    /// The model has no chat template.
    #[error(
        "this model has no chat template: use --raw, or /v1/completions, with a prompt of your own"
    )]
    NoTemplate,
    /// A conversation without messages.
    #[error("messages: at least one is needed")]
    NoMessages,
    /// A template option that we do not know.
    #[error("chat_template_kwargs.{0}: unknown option")]
    UnknownOption(String),
    /// A template option of the wrong type.
    #[error("chat_template_kwargs.{field}: must be a {expected}")]
    OptionType {
        /// Name of the option.
        field: &'static str,
        /// Description of valid values.
        expected: &'static str,
    },
    /// The tokenizer could not encode this text.
    #[error("text can't be encoded: {0}")]
    Encode(String),
}

const TEXT_BYTES: &str = "prompt text in bytes";

/// Settings of a checkpoint's tokenizer beside `tokenizer.json`.
#[derive(Clone, Debug, Default)]
pub struct TokenSettings {
    /// Rows of the embedding (`vocab_size` of `config.json`).
    pub vocab_size: usize,
    /// The chat template, a Jinja text; none for base models.
    pub chat_template: Option<String>,
    /// Text of the token that begins a sequence.
    pub bos_token: Option<String>,
    /// Text of the token that ends a sequence.
    pub eos_token: Option<String>,
    /// Further ids that end an answer (`eos_token_id` of `generation_config.json`).
    pub eos_token_ids: Vec<TokenId>,
    /// Longest time for one rendering of the template; `None`: [`TEMPLATE_LIMIT`].
    pub template_limit: Option<Duration>,
    /// Ids that no text of a user may make; `None`: derived from the rest.
    pub control_tokens: Option<Vec<TokenId>>,
    /// True if a raw prompt begins with BOS; `None`: as `tokenizer.json` says.
    pub add_bos: Option<bool>,
}

/// Treatment of a control token's name in a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    /// Names are the characters they are made of, in the text of a user.
    AsText,
    /// Names are control tokens, in prompts that the user renders by hand (`--raw`,
    /// `/v1/completions`).
    Parse,
}

/// A tokenizer with its chat template. Immutable; share it by `Arc`.
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    /// Limit on a model that cuts text by an expression of its own: some never end.
    limited: Option<Limited>,
    guard: Guard,
    /// The id that stands for what the vocabulary can't spell; ordinary text may yield it.
    unknown: Option<TokenId>,
    /// Longest text that is encoded, in bytes.
    text_bytes_max: usize,
    /// True if text changes before it is cut, so that it may come to spell a control token.
    folds: bool,
    template: Option<ChatTemplate>,
    pieces: Arc<Pieces>,
    bos: Option<TokenId>,
    add_bos: Option<bool>,
    /// Ids that end an answer, sorted.
    ends: Vec<TokenId>,
}

impl Tokenizer {
    /// Reads a Hugging Face `tokenizer.json`. The bytes may be hostile.
    ///
    /// # Errors
    /// If the file is malformed or too large, does not fit `settings.vocab_size`, decodes in a way
    /// that we can't stream, lacks the named BOS or EOS token, or the chat template does not parse.
    pub fn from_json(json: &[u8], settings: &TokenSettings) -> Result<Self, TokenError> {
        let rows = settings.vocab_size;
        within("tokenizer.json in bytes", json.len(), TOKENIZER_BYTES_MAX)?;
        within("vocab_size in rows", rows, VOCAB_ROWS_MAX)?;
        let Shapes { json, decoder, added, growth, cuts_in_time } = shapes::check(json, rows)?;
        let (json, control, derived_ends) = control(json, settings)?;
        let mut inner = parse(&json)?;
        // The parser numbers added tokens itself, whatever the file says.
        for (id, content) in &added {
            if inner.token_to_id(content) != Some(*id) {
                let got = inner.token_to_id(content);
                return Err(TokenError::Malformed(format!(
                    "added_tokens: {content:?} has id {id}, but stands at {got:?} in the vocabulary"
                )));
            }
        }
        check_vocabulary(&inner, rows)?;
        let folds = inner.get_normalizer().is_some();
        let guard = install_guard(&mut inner, control)?;
        let unknown = unknown_token(&inner);

        let pieces = Arc::new(Pieces::new(&inner, &decoder, rows)?);
        let id_of = |field, token: &Option<String>| match token {
            None => Ok(None),
            Some(token) => inner
                .token_to_id(token)
                .map(Some)
                .ok_or_else(|| TokenError::UnknownToken { field, token: token.clone() }),
        };
        let bos = id_of("bos_token", &settings.bos_token)?;
        let mut ends: Vec<TokenId> = settings.eos_token_ids.clone();
        ends.extend(derived_ends);
        ends.extend(id_of("eos_token", &settings.eos_token)?);
        ends.sort_unstable();
        ends.dedup();
        let template = match &settings.chat_template {
            None => None,
            Some(source) => Some(ChatTemplate::new(
                source,
                settings.bos_token.as_deref(),
                settings.eos_token.as_deref(),
                settings.template_limit.unwrap_or(TEMPLATE_LIMIT),
            )?),
        };
        Ok(Self {
            inner: Arc::new(inner),
            limited: (!cuts_in_time).then(|| Limited::new(ENCODE_LIMIT)),
            guard,
            unknown,
            text_bytes_max: TEXT_BYTES_MAX.min(GROWN_BYTES_MAX / growth.max(1)),
            folds,
            template,
            pieces,
            bos,
            add_bos: settings.add_bos,
            ends,
        })
    }

    /// The ids of `text`, nothing added before or after.
    ///
    /// # Errors
    /// If the text is over [`TEXT_BYTES_MAX`], or has characters that the vocabulary can't spell
    /// and its model refuses.
    pub fn encode(&self, text: &str, special: Special) -> Result<Vec<TokenId>, TokenError> {
        within(TEXT_BYTES, text.len(), self.text_bytes_max)?;
        self.encode_guarded(&self.guarded(text, special), false)
    }

    /// The ids of a raw prompt: as [`Tokenizer::encode`], with BOS in front where the model wants
    /// it.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_prompt(&self, text: &str, special: Special) -> Result<Vec<TokenId>, TokenError> {
        within(TEXT_BYTES, text.len(), self.text_bytes_max)?;
        let mut ids = self.encode_guarded(&self.guarded(text, special), true)?;
        if let (Some(add), Some(bos)) = (self.add_bos, self.bos) {
            let has = ids.first() == Some(&bos);
            if add && !has {
                ids.insert(0, bos);
            } else if !add && has && special == Special::AsText {
                ids.remove(0);
            }
        }
        Ok(ids)
    }

    /// The ids of a conversation, rendered by the model's chat template. Only the template makes
    /// control tokens; the contents are text.
    ///
    /// # Errors
    /// If there is no template or no message, an option is unknown, the template fails, refuses or
    /// does not end, or the prompt is over [`TEXT_BYTES_MAX`].
    pub fn encode_chat(
        &self,
        messages: &[Message],
        options: &ChatOptions,
    ) -> Result<Vec<TokenId>, TokenError> {
        self.encode_rendered(&self.render(messages, options)?, 0)
    }

    /// The text of a conversation as the model's chat template renders it, for people to read.
    ///
    /// # Errors
    /// As [`Tokenizer::encode_chat`].
    pub fn render_chat(
        &self,
        messages: &[Message],
        options: &ChatOptions,
    ) -> Result<String, TokenError> {
        let template = self.template.as_ref().ok_or(TokenError::NoTemplate)?;
        Ok(guard::unguarded(&template.render(messages, options, &self.guard)?))
    }

    /// A streaming decoder over this vocabulary.
    #[must_use]
    pub fn detokenizer(&self, start: Start, special: SpecialText) -> Detokenizer {
        Detokenizer::new(Arc::clone(&self.pieces), start, special)
    }

    /// The text of a whole sequence; bytes that are no UTF-8 become U+FFFD.
    #[must_use]
    pub fn decode(&self, ids: &[TokenId], start: Start, special: SpecialText) -> String {
        let mut detokenizer = self.detokenizer(start, special);
        let mut text = String::new();
        for &id in ids {
            text.push_str(detokenizer.push(id));
        }
        text.push_str(detokenizer.finish());
        text
    }

    /// The bytes that one token stands for; empty for ids without a token.
    #[must_use]
    pub fn token_bytes(&self, id: TokenId) -> &[u8] {
        self.pieces.bytes(id)
    }

    /// True for ids that end an answer.
    #[must_use]
    pub fn is_end(&self, id: TokenId) -> bool {
        self.ends.binary_search(&id).is_ok()
    }

    /// The id that begins a sequence.
    #[must_use]
    pub fn bos(&self) -> Option<TokenId> {
        self.bos
    }

    fn guarded<'a>(&self, text: &'a str, special: Special) -> Cow<'a, str> {
        match special {
            Special::AsText => self.guard.guard(text),
            Special::Parse => guard::escape(text),
        }
    }

    /// Encodes text in which control tokens of users are broken; see [`guard`](self::guard).
    fn encode_guarded(&self, text: &str, add_special: bool) -> Result<Vec<TokenId>, TokenError> {
        if !self.folds && !text.contains(guard::BREAK) {
            let encoding =
                self.cut(text, move |inner, text| inner.encode_fast(text, add_special))?;
            return Ok(encoding.get_ids().to_vec());
        }
        let encoding = self.cut(text, move |inner, text| inner.encode(text, add_special))?;
        let mut ids = Vec::with_capacity(encoding.len());
        let made = encoding.get_special_tokens_mask();
        for ((&id, &(start, end)), made) in
            encoding.get_ids().iter().zip(encoding.get_offsets()).zip(made)
        {
            let is_meant = || text.get(start..end).is_some_and(|part| self.is_meant(id, part));
            // What the post-processor puts in front is nobody's text.
            if *made == 1 || !self.guard.is_control(id) || is_meant() {
                ids.push(id);
            } else {
                self.spell(id, &mut ids)?;
            }
        }
        Ok(ids)
    }

    /// Cuts a text with the parser's library: with a limit where it may hang, and without ending
    /// this process where it panics.
    fn cut(
        &self,
        text: &str,
        encode: impl FnOnce(&tokenizers::Tokenizer, &str) -> tokenizers::Result<Encoding>
        + Send
        + 'static,
    ) -> Result<Encoding, TokenError> {
        let gave_up = || TokenError::Encode("the tokenizer gave up".into());
        let encoded = match &self.limited {
            None => catch_unwind(AssertUnwindSafe(|| encode(&self.inner, text)))
                .map_err(|_| gave_up())?,
            Some(limited) => {
                let (inner, text) = (Arc::clone(&self.inner), text.to_owned());
                limited.run(move || encode(&inner, &text)).map_err(|why| match why {
                    Unfinished::Hangs => TokenError::Encode(
                        "the expression by which the model's files cut text does not end in time"
                            .into(),
                    ),
                    Unfinished::Failed(_) => gave_up(),
                })?
            }
        };
        encoded.map_err(|error| TokenError::Encode(error.to_string()))
    }

    /// True if a control token stands for a marker as the template writes it, or for what has no
    /// token; not where ordinary pieces of `text` came to spell it.
    fn is_meant(&self, control: TokenId, text: &str) -> bool {
        let content = self.guard.text(control);
        if Some(control) == self.unknown {
            return !text.contains(guard::BREAK) || guard::unguarded(text) != content;
        }
        text.contains(content)
    }

    /// Ordinary pieces spelled a control token in spite of a break: spells its halves instead.
    fn spell(&self, control: TokenId, ids: &mut Vec<TokenId>) -> Result<(), TokenError> {
        let model = self.inner.get_model();
        // In the model's own alphabet, so neither normaliser nor word splitting comes in.
        let text = model.id_to_token(control).unwrap_or_default();
        let first = text.chars().next().map_or(0, char::len_utf8);
        for half in [&text[..first], &text[first..]] {
            let tokens = model.tokenize(half).map_err(|e| TokenError::Encode(e.to_string()))?;
            ids.extend(
                tokens
                    .iter()
                    .map(|token| token.id)
                    .filter(|id| !self.guard.is_control(*id) || Some(*id) == self.unknown),
            );
        }
        Ok(())
    }
}

fn within(what: &'static str, size: usize, limit: usize) -> Result<(), TokenError> {
    if size > limit {
        return Err(TokenError::TooLarge { what, size, limit });
    }
    Ok(())
}

/// The parser is not ours. A panic in it, on what [`shapes`] let through, is a malformed file and
/// not the end of this process.
fn parse(json: &str) -> Result<tokenizers::Tokenizer, TokenError> {
    match catch_unwind(|| tokenizers::Tokenizer::from_bytes(json)) {
        Ok(parsed) => parsed.map_err(|e| TokenError::Malformed(e.to_string())),
        Err(_) => Err(TokenError::Malformed("the parser gave up".into())),
    }
}

/// Every token has an id of its own, and the embedding has a row for it. Rows without a token
/// (padding to a round number) are fine.
fn check_vocabulary(inner: &tokenizers::Tokenizer, rows: usize) -> Result<(), TokenError> {
    let model = inner.get_model();
    let ids = 0..u32::try_from(rows).expect("rows <= VOCAB_ROWS_MAX");
    let mut tokens = model.get_vocab_size();
    let mut placed = ids.filter(|&id| model.id_to_token(id).is_some()).count();
    for (content, &id) in inner.get_added_vocabulary().get_vocab() {
        if model.token_to_id(content) != Some(id) {
            tokens += 1;
            let taken = model.id_to_token(id).is_some();
            placed += usize::from((id as usize) < rows && !taken);
        }
    }
    if tokens != placed {
        return Err(TokenError::Vocabulary { tokens, placed, rows });
    }
    Ok(())
}

/// The text of the file with its control tokens typed as such, those tokens, and ends that come
/// with them. A bundle that lists its tokens was typed at the split.
type Controlled = (String, BTreeMap<TokenId, String>, Vec<TokenId>);

fn control(
    mut json: serde_json::Value,
    settings: &TokenSettings,
) -> Result<Controlled, TokenError> {
    let facts = TextFacts {
        bos: settings.bos_token.as_deref(),
        eos: settings.eos_token.as_deref(),
        end_ids: &settings.eos_token_ids,
        template: settings.chat_template.as_deref(),
    };
    let Some(listed) = &settings.control_tokens else {
        let derived = ControlTokens::derive(&mut json, facts);
        return Ok((json.to_string(), derived.control, derived.ends));
    };
    let text = json.to_string();
    let mut control = ControlTokens::derive(&mut json, facts).control;
    control.retain(|id, _| listed.binary_search(id).is_ok());
    if control.len() < listed.len() {
        let reason = "the bundle lists control tokens that this file does not have; split again";
        return Err(TokenError::Malformed(reason.into()));
    }
    Ok((text, control, Vec::new()))
}

/// Teaches the tokenizer to remove our marks after control tokens have been found.
fn install_guard(
    inner: &mut tokenizers::Tokenizer,
    control: BTreeMap<TokenId, String>,
) -> Result<Guard, TokenError> {
    let malformed = |e: tokenizers::Error| TokenError::Malformed(e.to_string());
    // A special token that is matched in *normalised* text would be found after the marks are
    // gone. Models that declare theirs so mean no difference by it.
    for (id, mut token) in inner.get_added_tokens_decoder() {
        if token.normalized && control.contains_key(&id) {
            token.normalized = false;
            inner.add_tokens([token]).map_err(malformed)?;
        }
    }
    let mut steps = guard::normalizers().map_err(malformed)?;
    steps.extend(inner.get_normalizer().cloned());
    let sequence = NormalizerWrapper::Sequence(Sequence::new(steps));
    inner.with_normalizer(Some(sequence)).map_err(malformed)?;
    Ok(Guard::new(control))
}

/// The id that stands for what the vocabulary can't spell; ordinary text may yield it.
fn unknown_token(inner: &tokenizers::Tokenizer) -> Option<TokenId> {
    use tokenizers::models::ModelWrapper;
    let name = match inner.get_model() {
        ModelWrapper::BPE(bpe) => bpe.unk_token.clone()?,
        ModelWrapper::WordPiece(model) => model.unk_token.clone(),
        ModelWrapper::WordLevel(model) => model.unk_token.clone(),
        ModelWrapper::Unigram(_) => "<unk>".into(),
    };
    inner.token_to_id(&name)
}

#[cfg(test)]
mod golden;
#[cfg(test)]
mod tests;
