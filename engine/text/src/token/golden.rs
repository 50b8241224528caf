//! Against what other people's code says: ids, decoded text and rendered prompts of the golden
//! checkpoints, made by Hugging Face's libraries. See `tests/golden/README.md`.

use std::path::{Path, PathBuf};

use hat_core::request::Role;
use serde_json::Value;

use super::*;

const MODELS: [&str; 4] = ["llama2", "llama3", "mistral", "qwen2"];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/checkpoints")
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&read(path)).unwrap()
}

fn load(model: &str) -> Tokenizer {
    let files = folder().join(model);
    let config = json(&files.join("tokenizer_config.json"));
    let text = |name: &str| config[name].as_str().map(String::from);
    let jinja = files.join("chat_template.jinja");
    let settings = TokenSettings {
        vocab_size: json(&files.join("config.json"))["vocab_size"].as_u64().unwrap() as usize,
        chat_template: if jinja.exists() { Some(read(&jinja)) } else { text("chat_template") },
        bos_token: text("bos_token"),
        eos_token: text("eos_token"),
        ..TokenSettings::default()
    };
    Tokenizer::from_json(read(&files.join("tokenizer.json")).as_bytes(), &settings).unwrap()
}

fn ids(value: &Value) -> Vec<TokenId> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as TokenId).collect()
}

#[test]
fn ids_and_texts_equal_the_library_s() {
    for model in MODELS {
        let tokenizer = load(model);
        let cases = json(&folder().join(format!("{model}.json")));
        let cases = cases["tokenizer"].as_array().unwrap();
        assert!(cases.len() > 10);
        for case in cases {
            let text = case["text"].as_str().unwrap();
            let expected = ids(&case["ids"]);
            assert_eq!(
                tokenizer.encode(text, Special::Parse).unwrap(),
                expected,
                "{model} {text:?}"
            );
            assert_eq!(
                tokenizer.encode_prompt(text, Special::Parse).unwrap(),
                ids(&case["ids_with_special"]),
                "{model} {text:?}"
            );
            let shown = tokenizer.decode(&expected, Start::Text, SpecialText::Show);
            assert_eq!(shown, case["decoded"].as_str().unwrap(), "{model} {text:?}");
            let shown =
                tokenizer.decode(&ids(&case["ids_with_special"]), Start::Text, SpecialText::Skip);
            assert_eq!(shown, case["decoded_skip_special"].as_str().unwrap(), "{model} {text:?}");
        }
    }
}

#[test]
fn prompts_equal_the_library_s() {
    for model in MODELS {
        let tokenizer = load(model);
        let control = |id: &TokenId| tokenizer.guard.is_control(*id);
        for case in json(&folder().join(format!("{model}.json")))["chat"].as_array().unwrap() {
            let messages: Vec<Message> = case["messages"]
                .as_array()
                .unwrap()
                .iter()
                .map(|m| {
                    let text = |name: &str| m[name].as_str().unwrap();
                    Message::new(Role::parse(text("role")).unwrap(), text("content"))
                })
                .collect();
            let mut options = ChatOptions::at(0);
            options.add_generation_prompt = case["add_generation_prompt"].as_bool().unwrap();
            if let Some(expected) = case["error"].as_str() {
                let error = tokenizer.encode_chat(&messages, &options).unwrap_err();
                assert!(
                    matches!(&error, TokenError::Refused(m) if m == expected),
                    "{model} {error}"
                );
                continue;
            }
            let text = case["text"].as_str().unwrap();
            assert_eq!(tokenizer.render_chat(&messages, &options).unwrap(), text, "{model}");
            let expected = ids(&case["ids"]);
            assert_eq!(tokenizer.encode(text, Special::Parse).unwrap(), expected, "{model}");
            let got = tokenizer.encode_chat(&messages, &options).unwrap();
            let spelled = |m: &Message| {
                let ids = tokenizer.encode(&m.content, Special::Parse).unwrap();
                ids.iter().filter(|id| control(id)).count()
            };
            let of_users: usize = messages.iter().map(spelled).sum();
            if of_users == 0 {
                assert_eq!(got, expected, "{model} {text:?}");
            } else {
                // The library takes them for control tokens; we do not.
                let count = |ids: &[TokenId]| ids.iter().filter(|id| control(id)).count();
                assert_eq!(count(&got) + of_users, count(&expected), "{model} {text:?}");
            }
        }
    }
}
