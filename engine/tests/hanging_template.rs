//! A chat template and an expression that never end, in a process of their own: the threads that
//! they are abandoned on compute until it ends, and other tests would be slow beside them.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[allow(dead_code, reason = "the client serves the tests of HTTP too")]
#[path = "all/http/client.rs"]
mod client;
mod support;

use serde_json::json;

use client::{Server, question};

/// Changes a JSON file of a device's bundle, and what the manifest says of it.
fn rewrite(device: &std::path::Path, name: &str, change: impl FnOnce(&mut serde_json::Value)) {
    let read = |name: &str| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(device.join(name)).unwrap()).unwrap()
    };
    let mut json = read(name);
    change(&mut json);
    let text = json.to_string();
    std::fs::write(device.join(name), &text).unwrap();
    let mut manifest = read("bundle.json");
    manifest["files"][name] = json!({
        "bytes": text.len(), "blake3": blake3::hash(text.as_bytes()).to_hex().as_str(),
    });
    std::fs::write(device.join("bundle.json"), manifest.to_string()).unwrap();
}

/// Puts another chat template into a device's bundle.
fn set_template(device: &std::path::Path, template: &str) {
    rewrite(device, "tokenizer_config.json", |settings| {
        settings["chat_template"] = template.into();
    });
}

/// Puts another expression into a device's bundle, by which it cuts text into words.
fn set_expression(device: &std::path::Path, expression: &str) {
    rewrite(device, "tokenizer.json", |json| {
        let split = json!({"type": "Split", "pattern": {"Regex": expression},
                           "behavior": "Isolated", "invert": false});
        let last = json["pre_tokenizer"].take();
        json["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [split, last]});
    });
}

#[test]
fn an_expression_that_hangs_ends_its_request_alone() {
    // Each character is looked for to the end of the text first.
    let server = Server::with(|_| {}, |engine| set_expression(&engine.bundle, ".*[^a]|a"));
    let before = server.canary();
    let body = json!({"prompt": "a".repeat(1 << 20), "max_tokens": 1});
    let reply = server.post("/v1/completions", &body);
    reply.refused(400, "invalid_value", Some("prompt"));
    assert!(reply.body.contains("does not end in time"), "{}", reply.body);
    assert_eq!(server.canary(), before);
}

#[test]
fn a_template_that_hangs_takes_chat_alone_with_it() {
    // Doubled sixty times, and compared: centuries.
    let hangs = "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}\
                 {% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x == ns.x }}";
    let server = Server::with(|_| {}, |engine| set_template(&engine.bundle, hangs));
    let before = server.canary();
    std::thread::scope(|scope| {
        let chats: Vec<_> = (0..5).map(|_| scope.spawn(|| server.chat(&question(4)))).collect();
        for _ in 0..3 {
            assert_eq!(server.canary(), before, "beside the hanging ones");
        }
        for chat in chats {
            chat.join().unwrap().refused(503, "template_error", None);
        }
    });
    server.chat(&question(4)).refused(503, "template_error", None);
    assert_eq!(server.canary(), before);
}
