//! Conversations whose ids are known: the next turn goes on from them.
//!
//! A model's answer need not be made of the tokens that its text would be encoded to, and a
//! conversation that is encoded anew at each turn may thus leave the path whose rows are computed
//! already. So the ids of prompt and answer are kept with their text. A prompt that begins with
//! such a text takes its ids, and only what follows is encoded. What follows has to begin with a
//! control token: there the tokenizer cuts in any case, and ids on either side do not depend on
//! the other.
//!
//! Texts stay in this process, and in memory.

use std::collections::VecDeque;

use hat_plan::TokenId;

use crate::token::{ChatText, SpecialText, Start, Tokenizer};

/// Conversations that are remembered.
const CONVERSATIONS_MAX: usize = 64;
/// Bytes of their texts together.
const TEXT_BYTES_MAX: usize = 4 << 20;

/// One conversation up to the end of an answer.
struct Conversation {
    text: ChatText,
    ids: Vec<TokenId>,
}

/// Conversations, the latest last.
#[derive(Default)]
pub struct TokenHistory {
    conversations: VecDeque<Conversation>,
    text_bytes: usize,
}

impl TokenHistory {
    /// The longest beginning of a rendered conversation that is known: its bytes and its ids.
    pub fn find(
        &mut self,
        text: &ChatText,
        tokenizer: &Tokenizer,
    ) -> Option<(usize, Vec<TokenId>)> {
        let fits = |conversation: &Conversation| tokenizer.continues(text, &conversation.text);
        let longest = (0..self.conversations.len())
            .filter(|index| fits(&self.conversations[*index]))
            .max_by_key(|index| self.conversations[*index].text.len());
        let conversation = self.conversations.remove(longest?)?;
        let found = (conversation.text.len(), conversation.ids.clone());
        self.conversations.push_back(conversation);
        Some(found)
    }

    /// The conversation `prompt`, of which `prompt_ids` are the ids, was answered with `answer`.
    /// It is kept if `text`, which the caller has heard, is all that the ids say.
    pub fn note(
        &mut self,
        prompt: &ChatText,
        prompt_ids: &[TokenId],
        answer: &[TokenId],
        text: &str,
        tokenizer: &Tokenizer,
    ) {
        // A stop string was cut off, or control tokens were not shown.
        if tokenizer.decode(answer, Start::Text, SpecialText::Show) != text {
            return;
        }
        let text = tokenizer.answered(prompt, text);
        if text.len() > TEXT_BYTES_MAX {
            return;
        }
        self.conversations.retain(|conversation| conversation.text != text);
        self.text_bytes =
            self.conversations.iter().map(|conversation| conversation.text.len()).sum::<usize>()
                + text.len();
        self.conversations.push_back(Conversation { text, ids: [prompt_ids, answer].concat() });
        while self.conversations.len() > CONVERSATIONS_MAX || self.text_bytes > TEXT_BYTES_MAX {
            let oldest =
                self.conversations.pop_front().expect("the sum counts texts that are here");
            self.text_bytes -= oldest.text.len();
        }
    }
}

#[cfg(test)]
mod tests;
