//! Each way that a file may type a marker.

use super::*;

const TEMPLATE: &str =
    "{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ \"\\u003c|stop|>\" }} <turn>";

fn file(added: &[(u32, &str, bool)]) -> Value {
    let texts = ["a", "b", "<|im_start|>", "<|im_end|>", "<|stop|>", "<turn>", "<s>", "    ", "ab"];
    let vocab: serde_json::Map<String, Value> =
        (0u32..).zip(texts).map(|(id, text)| (text.to_owned(), id.into())).collect();
    let added: Vec<Value> = added
        .iter()
        .map(|(id, text, special)| json!({"id": id, "content": text, "special": special}))
        .collect();
    json!({"added_tokens": added,
           "model": {"vocab": vocab, "merges": [["a", "b"], ["<", "s>"]]}})
}

fn derive(json: &mut Value) -> ControlTokens {
    let facts = TextFacts { template: Some(TEMPLATE), ..TextFacts::default() };
    ControlTokens::derive(json, facts)
}

#[test]
fn markers_are_control_tokens_whatever_their_type() {
    let typed = |special| {
        file(&[(2, "<|im_start|>", special), (3, "<|im_end|>", special), (4, "<|stop|>", special)])
    };
    for mut json in [typed(true), typed(false), file(&[])] {
        let derived = derive(&mut json);
        let ids: Vec<u32> = derived.control.keys().copied().collect();
        // <s> is made by a merge, and not spelled: a piece of text.
        assert_eq!(ids, [2, 3, 4, 5]);
        assert_eq!(derived.ends, [3]);
        let special = |id| added(&json).find(|token| id_of(token) == Some(id)).unwrap().clone();
        assert!(special(2)["special"] == true && special(3)["special"] == true);
        assert_eq!(derive(&mut json.clone()).control, derived.control, "derived again");
    }
}

#[test]
fn a_users_own_tokens_and_spaces_stay() {
    let mut json = file(&[(7, "    ", false), (8, "ab", false)]);
    let facts = TextFacts { template: Some("{% if x %}    {{ y }}"), ..TextFacts::default() };
    let derived = ControlTokens::derive(&mut json, facts);
    assert!(!derived.control.contains_key(&7) && !derived.control.contains_key(&8));
}

#[test]
fn named_tokens_are_control_tokens_and_ends_add_up() {
    let mut json = file(&[]);
    let facts =
        TextFacts { bos: Some("a"), eos: Some("ab"), end_ids: &[1], ..TextFacts::default() };
    let derived = ControlTokens::derive(&mut json, facts);
    assert!([0, 1, 8].iter().all(|id| derived.control.contains_key(id)));
    assert_eq!(derived.ends, [1, 3, 8]);
    // Only what has a token can end an answer.
    let none = TextFacts { end_ids: &[99], ..TextFacts::default() };
    assert_eq!(ControlTokens::derive(&mut file(&[]), none).ends, [3]);
}

#[test]
fn a_large_hostile_file_is_read_in_bounded_work() {
    let mut json = file(&[]);
    let vocab = json["model"]["vocab"].as_object_mut().unwrap();
    for id in 9..3000u32 {
        vocab.insert("a".repeat(id as usize), id.into());
    }
    let template = "a".repeat(20_000);
    let facts = TextFacts { template: Some(&template), ..TextFacts::default() };
    assert!(!ControlTokens::derive(&mut json, facts).control.is_empty());
}
