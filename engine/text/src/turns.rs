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
const TURNS_MAX: usize = 64;
/// Bytes of their texts together.
const TEXT_BYTES_MAX: usize = 4 << 20;

/// One conversation up to the end of an answer.
struct Turn {
    text: ChatText,
    ids: Vec<TokenId>,
}

/// Conversations, the latest last.
#[derive(Default)]
pub struct Turns {
    turns: VecDeque<Turn>,
    text_bytes: usize,
}

impl Turns {
    /// The longest beginning of a rendered conversation that is known: its bytes and its ids.
    pub fn find(
        &mut self,
        text: &ChatText,
        tokenizer: &Tokenizer,
    ) -> Option<(usize, Vec<TokenId>)> {
        let fits = |turn: &Turn| tokenizer.continues(text, &turn.text);
        let longest = (0..self.turns.len())
            .filter(|index| fits(&self.turns[*index]))
            .max_by_key(|index| self.turns[*index].text.len());
        let turn = self.turns.remove(longest?)?;
        let found = (turn.text.len(), turn.ids.clone());
        self.turns.push_back(turn);
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
        self.turns.retain(|turn| turn.text != text);
        self.text_bytes = self.turns.iter().map(|turn| turn.text.len()).sum::<usize>() + text.len();
        self.turns.push_back(Turn { text, ids: [prompt_ids, answer].concat() });
        while self.turns.len() > TURNS_MAX || self.text_bytes > TEXT_BYTES_MAX {
            let oldest = self.turns.pop_front().expect("the sum counts texts that are here");
            self.text_bytes -= oldest.text.len();
        }
    }
}

#[cfg(test)]
mod tests;
