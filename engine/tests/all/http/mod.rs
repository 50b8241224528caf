//! The OpenAI-compatible API over a real engine: a generated model, an in-process cloud, real
//! sockets.
pub(crate) mod client;
mod hostile;
mod limits;

use hat_engine::{Event, Request};
use serde_json::{Value, json};

use client::{Server, and, question};

#[test]
fn whole_and_streamed_answers_agree() {
    let server = Server::start();
    let whole = server.chat(&question(24));
    assert_eq!(whole.status, 200, "{whole:?}");
    let answer = whole.json();
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["model"], server.engine.model_name());
    assert_eq!(answer["choices"][0]["message"]["role"], "assistant");
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));

    let options = json!({"stream": true, "stream_options": {"include_usage": true}});
    let streamed = server.chat(&and(question(24), options));
    let events = streamed.events();
    assert_eq!(streamed.streamed_text(0), whole.text(0));
    assert_eq!(events[0]["object"], "chat.completion.chunk");
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    let [.., finish, usage, done] = events.as_slice() else { panic!("{events:?}") };
    assert_eq!(finish["choices"][0]["finish_reason"], "length");
    assert_eq!(finish["choices"][0]["delta"], json!({}));
    assert_eq!(finish["timings"]["predicted_n"], 24);
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"], answer["usage"]);
    assert_eq!(done, "[DONE]");
    for event in &events[..events.len() - 2] {
        assert!(event["usage"].is_null() && event["id"] == events[0]["id"]);
        assert!(event.as_object().unwrap().contains_key("usage"));
    }

    // Without the option there is no word about usage.
    let events = server.chat(&and(question(4), json!({"stream": true}))).events();
    assert!(events.iter().all(|event| event.get("usage").is_none()));
}

#[test]
fn usage_counts_what_the_library_counts() {
    let server = Server::start();
    let request = Request::chat("Why is the sky blue?").max_tokens(9);
    let mut generation = server.engine.generate(request).unwrap();
    let prompt_tokens = generation.prompt_tokens();
    let text: String = (&mut generation)
        .map(|event| match event.unwrap() {
            Event::Token { text, .. } | Event::Done { text, .. } => text,
            _ => String::new(),
        })
        .collect();
    let reply = server.chat(&question(9));
    assert_eq!(reply.text(0), text);
    let expected = json!({
        "prompt_tokens": prompt_tokens, "completion_tokens": 9, "total_tokens": prompt_tokens + 9,
        "prompt_tokens_details": {"cached_tokens": 0},
    });
    assert_eq!(reply.json()["usage"], expected);
    assert_eq!(reply.json()["timings"]["prompt_n"], prompt_tokens);
}

#[test]
fn completions_take_text_and_tokens() {
    let server = Server::start();
    let text = json!({"prompt": "abc", "max_tokens": 6, "logprobs": 2});
    let reply = server.post("/v1/completions", &text).json();
    assert_eq!(reply["object"], "text_completion");
    let choice = &reply["choices"][0];
    let logprobs = &choice["logprobs"];
    for field in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[field].as_array().unwrap().len(), 6, "{field}");
    }
    assert_eq!(logprobs["text_offset"][0], 0);
    // Greedy: the chosen token is the likeliest.
    let first = logprobs["tokens"][0].as_str().unwrap();
    assert_eq!(logprobs["top_logprobs"][0][first], logprobs["token_logprobs"][0]);

    let one = server.post("/v1/completions", &and(text, json!({"prompt": ["abc"]}))).json();
    assert_eq!(one["choices"][0], *choice);

    let tokens = vec![70, 80, 90];
    let mut text = String::new();
    for event in server.engine.generate(Request::tokens(tokens.clone()).max_tokens(6)).unwrap() {
        if let Event::Token { text: more, .. } | Event::Done { text: more, .. } = event.unwrap() {
            text.push_str(&more);
        }
    }
    for prompt in [json!(tokens), json!([tokens])] {
        let reply = server.post("/v1/completions", &json!({"prompt": prompt, "max_tokens": 6}));
        assert_eq!(reply.json()["choices"][0]["text"], text);
        assert_eq!(reply.json()["usage"]["prompt_tokens"], 3);
    }

    let body = json!({"prompt": "abc", "max_tokens": 6, "stream": true});
    let events = server.post("/v1/completions", &body).events();
    let streamed: String =
        events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect();
    assert_eq!(streamed, choice["text"].as_str().unwrap());
    assert_eq!(events.last().unwrap(), "[DONE]");
}

#[test]
fn chat_logprobs_are_those_of_the_tokens() {
    let server = Server::start();
    let body = and(question(5), json!({"logprobs": true, "top_logprobs": 3}));
    let whole = server.chat(&body).json();
    let entries = whole["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    assert_eq!(entries.len(), 5);
    for entry in &entries {
        assert_eq!(entry["top_logprobs"].as_array().unwrap().len(), 3);
        assert_eq!(entry["top_logprobs"][0]["logprob"], entry["logprob"]);
        assert!(entry["logprob"].as_f64().unwrap() <= 0.0);
        assert!(entry["bytes"].is_array());
    }
    let events = server.chat(&and(body, json!({"stream": true}))).events();
    let content = |event: &Value| event["choices"][0]["logprobs"]["content"].as_array().cloned();
    let streamed: Vec<_> = events.iter().filter_map(content).flatten().collect();
    assert_eq!(streamed, entries);
}

#[test]
fn a_stop_string_ends_the_answer_and_is_no_part_of_it() {
    let server = Server::start();
    let text = server.chat(&question(40)).text(0);
    let stop: String = text.chars().skip(text.chars().count() / 2).take(3).collect();
    assert!(!stop.is_empty(), "the model says something");
    let before = text.split(&stop).next().unwrap();
    for stop in [json!(stop), json!(["never said", stop])] {
        let body = and(question(40), json!({"stop": stop}));
        let reply = server.chat(&body);
        assert_eq!(reply.text(0), before);
        assert_eq!(reply.json()["choices"][0]["finish_reason"], "stop");
        let streamed = server.chat(&and(body, json!({"stream": true})));
        assert_eq!(streamed.streamed_text(0), before);
    }
}

#[test]
fn a_seed_fixes_the_answer_and_choices_differ() {
    let server = Server::start();
    let ask = |more| server.chat(&and(question(20), more));
    let seeded = json!({"temperature": 2.0, "seed": 42});
    let first = ask(seeded.clone()).text(0);
    assert_eq!(ask(seeded.clone()).text(0), first);
    assert_ne!(ask(json!({"temperature": 2.0, "seed": 43})).text(0), first);
    assert_ne!(ask(json!({"temperature": 2.0})).text(0), ask(json!({"temperature": 2.0})).text(0));

    let both = ask(and(seeded.clone(), json!({"n": 2})));
    assert_eq!(both.text(0), first, "choice 0 is the answer to n = 1");
    assert_ne!(both.text(1), first);
    let usage = &both.json()["usage"];
    assert_eq!(usage["completion_tokens"], 40);
    let streamed = ask(and(seeded, json!({"n": 2, "stream": true})));
    assert_eq!(streamed.streamed_text(0), first);
    assert_eq!(streamed.streamed_text(1), both.text(1));
}

#[test]
fn sampler_fields_reach_the_sampler() {
    let server = Server::start();
    let greedy = server.post("/v1/completions", &json!({"prompt": "x", "max_tokens": 8}));
    let text = |more| {
        let body = and(json!({"prompt": "x", "max_tokens": 8, "seed": 5}), more);
        let reply = server.post("/v1/completions", &body);
        reply.json()["choices"][0]["text"].clone()
    };
    let greedy = greedy.json()["choices"][0]["text"].clone();
    assert_eq!(text(json!({"temperature": 0})), greedy);
    assert_ne!(text(json!({"temperature": 5})), greedy);
    // Each filter alone brings a hot sampler back to the likeliest token.
    for filter in [json!({"top_k": 1}), json!({"top_p": 0.0}), json!({"min_p": 1.0})] {
        assert_eq!(text(and(json!({"temperature": 5}), filter.clone())), greedy, "{filter}");
    }
    let prompt = json!({"prompt": [70], "max_tokens": 1, "logprobs": 1});
    let likeliest = server.engine.generate(Request::tokens(vec![70]).max_tokens(1)).unwrap();
    let token = likeliest.map(Result::unwrap).find_map(|event| match event {
        Event::Token { token, .. } => Some(token),
        _ => None,
    });
    let token = token.unwrap();
    let bias = json!({"logit_bias": {token.to_string(): -100}});
    let banned = server.post("/v1/completions", &and(prompt.clone(), bias)).json();
    let plain = server.post("/v1/completions", &prompt).json();
    let chosen = |reply: &Value| reply["choices"][0]["logprobs"]["token_logprobs"][0].clone();
    assert!(chosen(&banned).as_f64() < chosen(&plain).as_f64(), "another token was chosen");
}

#[test]
fn two_streams_at_once_do_not_touch_each_other() {
    let server = Server::start();
    let bodies = [
        and(question(60), json!({"stream": true})),
        and(question(60), json!({"stream": true, "temperature": 1.5, "seed": 3})),
    ];
    let alone = bodies.each_ref().map(|body| server.chat(body).streamed_text(0));
    assert_ne!(alone[0], alone[1]);
    let together = std::thread::scope(|scope| {
        let threads =
            bodies.each_ref().map(|body| scope.spawn(|| server.chat(body).streamed_text(0)));
        threads.map(|thread| thread.join().unwrap())
    });
    assert_eq!(together, alone);
}

#[test]
fn models_health_ready_and_metrics_answer() {
    let server = Server::start();
    let name = server.engine.model_name();
    let models = server.get("/v1/models").json();
    assert_eq!(models["data"][0]["id"], name);
    assert_eq!(server.get(&format!("/v1/models/{name}")).json(), models["data"][0]);
    assert_eq!(server.get("/v1/models/default").json(), models["data"][0]);
    server.get("/v1/models/other").refused(404, "model_not_found", None);
    assert_eq!(server.get("/health").json()["status"], "ok");
    assert!(server.engine.wait_connected(crate::support::PATIENCE));
    assert_eq!(server.get("/ready").json()["status"], "ready");

    server.chat(&question(4));
    server.chat(&json!({"messages": []}));
    let chat = "hat_http_requests_total{route=\"/v1/chat/completions\",status=";
    assert_eq!(server.metric(&format!("{chat}\"200\"}}")), 1.0);
    assert_eq!(server.metric(&format!("{chat}\"400\"}}")), 1.0);
    assert_eq!(server.metric("hat_rejected_total{reason=\"invalid_value\"}"), 1.0);
    assert_eq!(server.metric("hat_cloud_connected"), 1.0);
    assert_eq!(server.metric("hat_http_answers_in_flight"), 0.0);
    assert_eq!(server.metric("hat_tokens_predicted_total"), 4.0);
    assert_eq!(server.metric("hat_ttft_seconds_count"), 1.0);
    assert!(server.metric("hat_ttft_seconds{quantile=\"0.5\"}") > 0.0);
    assert!(server.metric("hat_bytes_up_total") > 0.0);

    // What a scraper insists on: a family is declared once, and above its samples.
    let text = server.get("/metrics").body;
    let mut families = std::collections::HashSet::new();
    for line in text.lines() {
        if let Some(family) = line.strip_prefix("# TYPE ") {
            let name = family.split(' ').next().unwrap();
            assert!(families.insert(name), "{name} twice");
        } else if !line.starts_with('#') {
            let name = line.split(['{', ' ']).next().unwrap();
            let base = name.trim_end_matches("_sum").trim_end_matches("_count");
            assert!(families.contains(base), "{line}");
        }
    }
}

#[test]
fn a_cloud_that_is_away_is_said_so() {
    let server = Server::with(
        |_| {},
        |engine| {
            *engine = engine.clone().cloud("127.0.0.1:1");
            engine.reconnect = std::time::Duration::from_millis(300);
        },
    );
    assert_eq!(server.get("/health").status, 200);
    let ready = server.get("/ready");
    ready.refused(503, "cloud_unavailable", None);
    assert!(ready.header("retry-after").is_some());
    server.chat(&question(4)).refused(503, "cloud_unavailable", None);
    // A stream, too, has a status of its own as long as nothing was sent.
    let streamed = server.chat(&and(question(4), json!({"stream": true})));
    streamed.refused(503, "cloud_unavailable", None);
}

#[test]
fn several_prompts_are_answered_in_order() {
    let server = Server::start();
    let ask = |prompt: Value, more: Value| {
        let body = and(json!({"prompt": prompt, "max_tokens": 6}), more);
        server.post("/v1/completions", &body)
    };
    let seeded = json!({"temperature": 1.5, "seed": 3, "n": 2});
    let text = |reply: &Value, index: usize| {
        assert_eq!(reply["choices"][index]["index"], index);
        reply["choices"][index]["text"].as_str().unwrap().to_owned()
    };
    let one = [json!("abc"), json!([70, 80])].map(|prompt| ask(prompt, seeded.clone()).json());
    let both = ask(json!(["abc", [70, 80]]), seeded.clone()).json();
    let expected: Vec<_> = one.iter().flat_map(|one| [text(one, 0), text(one, 1)]).collect();
    let found: Vec<_> = (0..4).map(|index| text(&both, index)).collect();
    assert_eq!(found, expected);
    let tokens = |reply: &Value| reply["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(tokens(&both), tokens(&one[0]) + tokens(&one[1]));
    assert_eq!(both["usage"]["completion_tokens"], 24);

    let more = and(seeded, json!({"stream": true, "stream_options": {"include_usage": true}}));
    let streamed = ask(json!(["abc", [70, 80]]), more);
    let events = streamed.events();
    for (index, expected) in expected.iter().enumerate() {
        let choices = events.iter().filter_map(|event| event["choices"].get(0));
        let ours = choices.filter(|choice| choice["index"] == index);
        let text: String = ours.filter_map(|choice| choice["text"].as_str()).collect();
        assert_eq!(text, *expected);
    }
    assert_eq!(events[events.len() - 2]["usage"], both["usage"]);
    let message =
        ask(json!(vec!["a"; 33]), json!({})).refused(400, "invalid_value", Some("prompt"));
    assert!(message.contains("32"), "{message}");
}

#[test]
fn tokens_that_the_cloud_had_are_counted() {
    let server = Server::start();
    let body = json!({"prompt": (3..163).collect::<Vec<u32>>(), "max_tokens": 2});
    let first = server.post("/v1/completions", &body).json();
    assert_eq!(first["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    let second = server.post("/v1/completions", &body).json();
    let cached = second["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    let pages = second["timings"]["pages_reused"].as_u64().unwrap();
    assert!(pages > 0 && cached == 32 * pages, "{second}");
    let body = and(body, json!({"stream": true, "stream_options": {"include_usage": true}}));
    let events = server.post("/v1/completions", &body).events();
    let usage = &events[events.len() - 2]["usage"];
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], cached);
}

#[test]
fn an_answer_has_the_id_of_its_request() {
    let server = Server::start();
    let body = question(2).to_string();
    let ask = |id: &str| {
        let headers = format!("{}X-Request-Id: {id}\r\n", client::JSON);
        server.request("POST", "/v1/chat/completions", &headers, &body)
    };
    assert_eq!(ask("mine-1").header("x-request-id"), Some("mine-1"));
    let made = ask("not mine").header("x-request-id").unwrap().to_owned();
    assert!(made.starts_with("req-") && made != ask("x y").header("x-request-id").unwrap());
    assert!(server.get("/nothing").header("x-request-id").is_some());
}

#[test]
fn a_silent_request_samples_as_the_models_makers_do() {
    let plain = Server::start();
    assert_eq!(plain.chat(&question(8)).header("x-hat-sampling"), None, "its files say nothing");
    let greedy = plain.chat(&question(8)).text(0);

    let server = Server::with(
        |_| {},
        |engine| {
            let path = engine.bundle.join("bundle.json");
            let mut manifest: Value =
                serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            manifest["sampling"] = json!({"temperature": 5.0, "top_p": 0.9375, "top_k": 300});
            std::fs::write(&path, manifest.to_string()).unwrap();
        },
    );
    let ask = |more| server.chat(&and(question(8), more));
    let silent = ask(json!({"seed": 1}));
    let given = json!({"seed": 1, "temperature": 5.0, "top_p": 0.9375, "top_k": 300});
    assert_eq!(silent.header("x-hat-sampling"), Some("temperature=5, top_k=300, top_p=0.9375"));
    assert_eq!(silent.text(0), plain.chat(&and(question(8), given.clone())).text(0));
    assert_ne!(silent.text(0), greedy);
    let streamed = ask(json!({"seed": 1, "stream": true}));
    assert_eq!(streamed.header("x-hat-sampling"), silent.header("x-hat-sampling"));
    assert_eq!(streamed.streamed_text(0), silent.text(0));

    // What a request says counts, and an answer that has nothing of the model doesn't say so.
    assert_eq!(ask(given).header("x-hat-sampling"), None);
    let cold = ask(json!({"temperature": 0}));
    assert_eq!((cold.text(0), cold.header("x-hat-sampling")), (greedy, None));
    let all = ask(json!({"seed": 1, "top_p": 1, "top_k": -1}));
    assert_eq!(all.header("x-hat-sampling"), Some("temperature=5"));
    let open = json!({"seed": 1, "temperature": 5.0});
    assert_eq!(all.text(0), plain.chat(&and(question(8), open)).text(0));
    // The library and `generate` stay greedy.
    assert_eq!(server.engine.sampling().temperature, 5.0);
    let mut text = String::new();
    let request = Request::chat("Why is the sky blue?").max_tokens(8);
    for event in server.engine.generate(request).unwrap() {
        if let Event::Token { text: more, .. } | Event::Done { text: more, .. } = event.unwrap() {
            text.push_str(&more);
        }
    }
    assert_eq!(text, plain.chat(&question(8)).text(0));
}
