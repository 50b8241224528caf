//! Readers that leave, readers that don't read, too many of them, and the end of the server.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use hat_engine::Cloud;
use hat_engine::options::CloudAddress;
use serde_json::{Value, json};

use crate::client::{Reply, Server, and, eventually, question, request_text};
use crate::proxy::Proxy;

/// More than the reader waits for; the context of the generated model is 2048.
const LONG: u32 = 1900;

#[test]
fn a_client_that_leaves_cancels_its_answer() {
    let server = Server::start();
    let canary = server.canary();
    for stream in [true, false] {
        eventually("no session is left", Duration::from_secs(5), || server.sessions() == 0);
        let rows = server.cloud_rows();
        let body = and(question(LONG), json!({"stream": stream}));
        let mut client = server.begin("/v1/chat/completions", &body);
        if stream {
            let mut some = [0; 256];
            client.read_exact(&mut some).unwrap();
        }
        eventually("it runs", Duration::from_secs(5), || server.cloud_rows() > rows + 40);
        assert_eq!(server.sessions(), 1);
        drop(client);
        let time = eventually("cancelled", Duration::from_secs(1), || server.sessions() == 0);
        let computed = server.cloud_rows() - rows;
        assert!(computed < u64::from(LONG), "{computed} rows: it ran to its end, {time:?}");
        assert_eq!(server.metric("hat_http_answers_in_flight"), 0.0);
        assert_eq!(server.canary(), canary);
    }
}

#[test]
fn a_client_that_leaves_while_it_waits_is_never_served() {
    let server = Server::with(|_| {}, |engine| engine.limits.sessions_max = 1);
    let opened = || {
        let counters = server.engine.cloud().unwrap().counters();
        counters.opened.load(std::sync::atomic::Ordering::Relaxed)
    };
    let long = and(question(LONG), json!({"stream": true}));
    let mut first = server.begin("/v1/chat/completions", &long);
    first.read_exact(&mut [0; 64]).unwrap();
    let second = server.begin("/v1/chat/completions", &question(4));
    let in_flight = |count: f64| {
        eventually("so many answers", Duration::from_secs(5), || {
            server.metric("hat_http_answers_in_flight") == count
        });
    };
    in_flight(2.0);
    drop(second);
    in_flight(1.0);
    std::thread::sleep(Duration::from_millis(100)); // for the word to reach the engine
    drop(first);
    eventually("no session is left", Duration::from_secs(5), || server.sessions() == 0);
    server.canary();
    assert_eq!(opened(), 2, "the first answer and the canary");
}

/// A stream that nobody reads, under these limits. Alternatives make each token some kilobytes, so
/// the system's buffers fill, too. Without drafts the cloud's rows count the tokens.
fn unread(queued_bytes_max: usize, write_timeout: Duration) -> (Server, TcpStream) {
    let server = Server::with(
        |http| {
            http.limits.queued_bytes_max = queued_bytes_max;
            http.limits.write_timeout = write_timeout;
        },
        |_| {},
    );
    let more = json!({"stream": true, "logprobs": true, "top_logprobs": 20, "draft": "off"});
    let client = server.begin("/v1/chat/completions", &and(question(LONG), more));
    (server, client)
}

/// Time for an answer on a machine that is busy with other work.
const PATIENCE: Duration = Duration::from_secs(600);

#[test]
fn a_reader_that_does_not_read_is_cut_when_its_queue_is_full() {
    let (server, client) = unread(64 << 10, 100 * PATIENCE);
    eventually("its session is closed", PATIENCE, || {
        server.metric("hat_rejected_total{reason=\"slow_reader\"}") == 1.0 && server.sessions() == 0
    });
    assert!(server.cloud_rows() < u64::from(LONG), "it did not run to its end");
    drop(client);
    server.canary();
}

#[test]
fn a_reader_that_takes_nothing_is_cut_after_the_write_limit() {
    let (server, client) = unread(1 << 30, Duration::from_millis(500));
    eventually("its connection is closed", PATIENCE, || {
        server.cloud_rows() > 0 && server.metric("hat_http_connections") == 1.0 // the one that asks
    });
    eventually("its session is closed", PATIENCE, || server.sessions() == 0);
    assert_eq!(server.metric("hat_rejected_total{reason=\"slow_reader\"}"), 0.0);
    drop(client);
    server.canary();
}

/// A server whose cloud is behind a link that can be stopped, and so an answer with it.
fn stoppable(drain: Duration) -> (Server, Cloud, Proxy) {
    let mut made = None;
    let server = Server::with(
        |http| {
            http.limits.drain = drain;
            http.limits.first_event = Duration::from_millis(1);
        },
        |engine| {
            let CloudAddress::InProcess(config) = &engine.cloud else { unreachable!() };
            let cloud = Cloud::start((**config).clone()).unwrap();
            let proxy = Proxy::to(cloud.address());
            *engine = engine.clone().cloud(proxy.address().to_string());
            made = Some((cloud, proxy));
        },
    );
    let (cloud, proxy) = made.unwrap();
    assert!(server.engine.wait_connected(Duration::from_secs(60)));
    (server, cloud, proxy)
}

#[test]
fn too_many_answers_are_told_to_come_again() {
    let server = Server::with(|http| http.limits.answers_max = 2, |_| {});
    let body = and(question(LONG), json!({"stream": true, "n": 2}));
    let mut client = server.begin("/v1/chat/completions", &body);
    let mut some = [0; 256];
    client.read_exact(&mut some).unwrap();
    let refused = server.chat(&question(1));
    refused.refused(429, "busy", None);
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert_eq!(server.get("/health").status, 200);
    drop(client);
    eventually("there is room", Duration::from_secs(5), || server.chat(&question(1)).status == 200);
    // More choices at once than there is room for.
    server.chat(&and(question(1), json!({"n": 3}))).refused(429, "busy", None);
}

#[test]
fn connections_are_bounded() {
    let server = Server::with(|http| http.limits.connections_max = 3, |_| {});
    let mut open: Vec<_> = (0..3).map(|_| server.connect()).collect();
    eventually("a fourth is refused", Duration::from_secs(5), || {
        let mut stream = server.connect();
        let _ = stream.write_all(request_text("GET", "/health", "", "").as_bytes());
        Reply::read(&mut stream).status != 200
    });
    // Those that are open go on.
    let mut first = open.remove(0);
    first.write_all(request_text("GET", "/health", "", "").as_bytes()).unwrap();
    assert_eq!(Reply::read(&mut first).status, 200);
    drop(open);
    drop(first);
    eventually("there is room", Duration::from_secs(5), || server.get("/health").status == 200);
}

#[test]
fn stopping_lets_answers_end() {
    let mut server = Server::with(|http| http.limits.drain = PATIENCE, |_| {});
    let expected = server.chat(&question(200)).text(0);
    let mut client =
        server.begin("/v1/chat/completions", &and(question(200), json!({"stream": true})));
    let mut begin = [0; 64];
    client.read_exact(&mut begin).unwrap();
    let http = server.http.take().unwrap();
    std::thread::scope(|scope| {
        let stopped = scope.spawn(|| http.stop());
        let mut bytes = begin.to_vec();
        client.read_to_end(&mut bytes).unwrap();
        assert_eq!(Reply::parse(&bytes).streamed_text(0), expected);
        stopped.join().unwrap();
    });
    assert!(std::net::TcpStream::connect(server.address).is_err(), "nobody listens any more");
}

#[test]
fn stopping_does_not_wait_for_ever() {
    let (mut server, cloud, proxy) = stoppable(Duration::from_millis(100));
    proxy.stop(true);
    let mut client =
        server.begin("/v1/chat/completions", &and(question(LONG), json!({"stream": true})));
    let idle = server.connect();
    let mut begin = [0; 64];
    client.read_exact(&mut begin).unwrap();
    let (stopped, has_stopped) = std::sync::mpsc::channel();
    let http = server.http.take().unwrap();
    std::thread::spawn(move || {
        http.stop();
        stopped.send(()).unwrap();
    });
    has_stopped.recv_timeout(Duration::from_secs(60)).expect("it waits for an answer that hangs");
    let mut rest = Vec::new();
    let _ = client.read_to_end(&mut rest);
    assert!(!String::from_utf8_lossy(&rest).contains("[DONE]"), "it was cut");
    proxy.stop(false);
    let sessions = || cloud.counters().sessions.load(std::sync::atomic::Ordering::Relaxed);
    eventually("its session is closed", Duration::from_secs(60), || sessions() == 0);
    drop(idle);
}

#[test]
fn a_silent_stream_is_kept_alive() {
    let server = Server::with(
        |http| {
            http.limits.keep_alive = Duration::from_millis(10);
            http.limits.first_event = Duration::from_millis(1);
        },
        |engine| engine.limits.sessions_max = 1,
    );
    // One session: the second answer waits for the first one's end.
    let long = and(question(600), json!({"stream": true}));
    let mut first = server.begin("/v1/chat/completions", &long);
    first.read_exact(&mut [0; 64]).unwrap();
    let body = json!({"prompt": "word ".repeat(80), "max_tokens": 2, "stream": true});
    let reply = server.post("/v1/completions", &body);
    assert_eq!(reply.events().last().unwrap(), "[DONE]");
    let alive = reply.body.find(": keep-alive\n\n").expect("it was silent for a while");
    let prefill = reply.body.find(": prefill ").expect("then the prompt went up");
    assert!(alive < prefill && prefill < reply.body.find("data: ").unwrap_or(0));
}

#[test]
fn an_error_in_mid_stream_is_an_event() {
    let mut cloud = None;
    let server = Server::with(
        |_| {},
        |engine| {
            let CloudAddress::InProcess(config) = &engine.cloud else { unreachable!() };
            let started = Cloud::start((**config).clone()).unwrap();
            *engine = engine.clone().cloud(started.address().to_string());
            engine.reconnect = Duration::from_millis(300);
            cloud = Some(started);
        },
    );
    let body =
        and(question(LONG), json!({"stream": true, "stream_options": {"include_usage": true}}));
    let mut client = server.begin("/v1/chat/completions", &body);
    let mut bytes = vec![0; 512];
    client.read_exact(&mut bytes).unwrap();
    drop(cloud);
    client.read_to_end(&mut bytes).unwrap();
    let reply = Reply::parse(&bytes);
    assert_eq!(reply.status, 200);
    let events = reply.events();
    let [.., text, error] = events.as_slice() else { panic!("{events:?}") };
    assert_eq!(text["choices"][0]["finish_reason"], Value::Null);
    assert_eq!(error["error"]["code"], "cloud_unavailable", "{error}");
    assert_eq!(server.metric("hat_rejected_total{reason=\"cloud_unavailable\"}"), 1.0);
}

#[test]
fn an_answer_that_outlives_the_drain_ends_with_an_error() {
    let (mut server, _cloud, proxy) = stoppable(Duration::from_millis(100));
    proxy.stop(true);
    let body = and(question(LONG), json!({"stream": true}));
    let mut client = server.begin("/v1/chat/completions", &body);
    let mut bytes = vec![0; 64];
    client.read_exact(&mut bytes).unwrap();
    server.http.take().unwrap().stop();
    client.read_to_end(&mut bytes).unwrap();
    let reply = Reply::parse(&bytes);
    let last = reply.events().pop().unwrap();
    let message = last["error"]["message"].as_str().unwrap_or_else(|| panic!("{last}"));
    assert!(message.contains("shutting down"), "{message}");
}

#[test]
fn requests_that_wait_are_counted() {
    let server = Server::with(|_| {}, |engine| engine.limits.sessions_max = 1);
    let long = and(question(LONG), json!({"stream": true}));
    let mut first = server.begin("/v1/chat/completions", &long);
    first.read_exact(&mut [0; 64]).unwrap();
    assert_eq!(server.engine.waiting(), 0, "it has its session");
    let more: Vec<_> = (0..3).map(|_| server.begin("/v1/chat/completions", &long)).collect();
    let waiting = || server.metric("hat_requests_waiting");
    eventually("three wait", Duration::from_secs(60), || waiting() == 3.0);
    drop(more);
    eventually("none does", Duration::from_secs(60), || waiting() == 0.0);
    drop(first);
}
