//! A chat template that never ends, in a process of its own: the threads that it is abandoned on
//! compute until their process ends, and other tests would be slow beside them.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[allow(dead_code, reason = "the client serves the tests of HTTP too")]
#[path = "http/client.rs"]
mod client;
mod support;

use serde_json::json;

use client::{Server, question};

/// Puts another chat template into a device's bundle.
fn set_template(device: &std::path::Path, template: &str) {
    let read = |name: &str| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(device.join(name)).unwrap()).unwrap()
    };
    let mut settings = read("tokenizer_config.json");
    settings["chat_template"] = template.into();
    let text = settings.to_string();
    std::fs::write(device.join("tokenizer_config.json"), &text).unwrap();
    let mut manifest = read("bundle.json");
    manifest["files"]["tokenizer_config.json"] = json!({
        "bytes": text.len(), "blake3": blake3::hash(text.as_bytes()).to_hex().as_str(),
    });
    std::fs::write(device.join("bundle.json"), manifest.to_string()).unwrap();
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
