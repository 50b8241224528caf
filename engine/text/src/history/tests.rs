use hat_core::request::{Message, Role};
use hat_loader::{TinyModel, generated};

use super::*;
use crate::token::{ChatOptions, Special, TokenSettings};

/// Tokens are bytes, pairs of letters, and control tokens; conversations are in ChatML.
fn tokenizer() -> Tokenizer {
    let model = generated(&TinyModel::default());
    let settings = TokenSettings {
        vocab_size: model.config().vocab_size,
        chat_template: model.chat_template().map(str::to_owned),
        ..TokenSettings::default()
    };
    Tokenizer::from_json(model.tokenizer_json().as_bytes(), &settings).unwrap()
}

fn rendered(tokenizer: &Tokenizer, says: &[&str]) -> ChatText {
    let roles = [Role::User, Role::Assistant].into_iter().cycle();
    let messages = says.iter().zip(roles).map(|(text, role)| Message::new(role, *text));
    let messages: Vec<Message> = messages.collect();
    tokenizer.render(&messages, &ChatOptions::at(0)).unwrap()
}

/// `text`, a letter a token.
fn letters(tokenizer: &Tokenizer, text: &str) -> Vec<TokenId> {
    let of = |c: char| tokenizer.encode(&c.to_string(), Special::AsText).unwrap();
    text.chars().flat_map(of).collect()
}

fn ids(history: &mut TokenHistory, tokenizer: &Tokenizer, text: &ChatText) -> Vec<TokenId> {
    let (from, mut ids) = history.find(text, tokenizer).unwrap_or_default();
    ids.extend(tokenizer.encode_rendered(text, from).unwrap());
    ids
}

#[test]
fn the_next_turn_keeps_the_ids_of_the_answer() {
    let (tokenizer, mut history) = (tokenizer(), TokenHistory::default());
    let first = rendered(&tokenizer, &["hello there"]);
    let first_ids = ids(&mut history, &tokenizer, &first);
    let text = "hello in there <|im_end|>";
    let answer = letters(&tokenizer, text);
    let encoded = tokenizer.encode(text, Special::AsText).unwrap();
    assert_ne!(answer, encoded, "a test that can't tell shows nothing");
    history.note(&first, &first_ids, &answer, text, &tokenizer);

    let next = rendered(&tokenizer, &["hello there", text, "and then"]);
    let next_ids = ids(&mut history, &tokenizer, &next);
    let kept = [&first_ids[..], &answer].concat();
    assert!(next_ids.starts_with(&kept));
    let plain = tokenizer.encode_rendered(&next, 0).unwrap();
    assert_ne!(next_ids, plain);
    // Behind the answer the ids are those of the whole text, and all of it is the same text.
    let behind = plain.len() - (next_ids.len() - kept.len());
    assert_eq!(next_ids[kept.len()..], plain[behind..]);
    let show = |ids: &[TokenId]| tokenizer.decode(ids, Start::Continue, SpecialText::Show);
    assert_eq!(show(&next_ids), show(&plain));

    // The third turn begins with the longer one of the two that are known.
    let second = letters(&tokenizer, "there");
    history.note(&next, &next_ids, &second, "there", &tokenizer);
    let third = rendered(&tokenizer, &["hello there", text, "and then", "there", "in"]);
    let third_ids = ids(&mut history, &tokenizer, &third);
    assert!(third_ids.starts_with(&[&next_ids[..], &second].concat()));
}

#[test]
fn another_text_is_encoded_as_it_is() {
    let (tokenizer, mut history) = (tokenizer(), TokenHistory::default());
    let first = rendered(&tokenizer, &["hello"]);
    let first_ids = ids(&mut history, &tokenizer, &first);
    history.note(&first, &first_ids, &letters(&tokenizer, "there"), "there", &tokenizer);
    let others: [&[&str]; 5] = [
        &["hello", "there now", "in"], // the text goes on where the answer ended
        &["hello", "the", "in"],       // it ends before
        &["hallo", "there", "in"],
        &["hello", "there<|im_end|>", "in"], // what stands there is text, not the control token
        &["hello"],
    ];
    for says in others {
        let text = rendered(&tokenizer, says);
        assert_eq!(history.find(&text, &tokenizer), None, "{says:?}");
    }
}

#[test]
fn an_answer_that_was_not_heard_as_it_is_is_forgotten() {
    let (tokenizer, mut history) = (tokenizer(), TokenHistory::default());
    let first = rendered(&tokenizer, &["hello"]);
    let cut = letters(&tokenizer, "there STOP");
    history.note(&first, &[1, 2], &cut, "there ", &tokenizer);
    let control = tokenizer.encode("<|im_end|>", Special::Parse).unwrap();
    assert_eq!(control.len(), 1);
    let hidden = [letters(&tokenizer, "there"), control].concat();
    history.note(&first, &[1, 2], &hidden, "there", &tokenizer);
    assert!(history.conversations.is_empty());
}

#[test]
fn texts_are_bounded() {
    let (tokenizer, mut history) = (tokenizer(), TokenHistory::default());
    let ask = |text: &str| rendered(&tokenizer, &[text]);
    for index in 0..CONVERSATIONS_MAX + 5 {
        history.note(&ask(&index.to_string()), &[1], &[], "", &tokenizer);
        history.note(&ask(&index.to_string()), &[1], &[], "", &tokenizer);
    }
    assert_eq!(history.conversations.len(), CONVERSATIONS_MAX);
    let long = "a".repeat(900_000);
    for index in 0..8 {
        history.note(&ask(&format!("{index}{long}")), &[1], &[], "", &tokenizer);
    }
    let bytes: usize =
        history.conversations.iter().map(|conversation| conversation.text.len()).sum();
    assert_eq!(bytes, history.text_bytes);
    assert_eq!((history.conversations.len(), bytes <= TEXT_BYTES_MAX), (4, true));
}
