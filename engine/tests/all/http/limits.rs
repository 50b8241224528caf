//! Readers that leave, readers that don't read, too many of them, and the end of the server.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hat_engine::http::HttpConfig;
use hat_engine::options::CloudAddress;
use hat_engine::{Cloud, EngineConfig};
use serde_json::{Value, json};

use super::client::{Reply, Server, and, question, request_text};
use crate::support::proxy::Proxy;
use crate::support::{PATIENCE, eventually};

/// Length of an answer that its reader does not wait for; the context of the generated model is
/// 2048.
const LONG: u32 = 1900;

/// A server whose cloud is behind a link that stops, and so an answer with it: no test depends on
/// how fast a model is.
struct Stoppable {
    server: Server,
    cloud: Cloud,
    link: Proxy,
}

impl Stoppable {
    fn with(
        change_http: impl FnOnce(&mut HttpConfig),
        change_engine: impl FnOnce(&mut EngineConfig),
    ) -> Self {
        let mut made = None;
        let server = Server::with(change_http, |engine| {
            change_engine(engine);
            let CloudAddress::InProcess(config) = &engine.cloud else { unreachable!() };
            let cloud = Cloud::start((**config).clone()).unwrap();
            let link = Proxy::to(cloud.address());
            *engine = engine.clone().cloud(link.address().to_string());
            made = Some((cloud, link));
        });
        let (cloud, link) = made.unwrap();
        assert!(server.engine.wait_connected(PATIENCE));
        Self { server, cloud, link }
    }

    fn sessions(&self) -> u64 {
        self.cloud.counters().sessions.load(Ordering::Relaxed)
    }

    /// Begins an answer that stops in its middle, and waits until it has.
    fn begin_and_stop(&self, body: &Value) -> TcpStream {
        self.link.stop_after(8 << 10);
        let client = self.server.begin("/v1/chat/completions", body);
        self.link.wait_until_stopped();
        client
    }
}

#[test]
fn a_client_that_leaves_cancels_its_answer() {
    let stoppable = Stoppable::with(|_| {}, |_| {});
    let server = &stoppable.server;
    let canary = server.canary();
    let rows = || stoppable.cloud.counters().rows.load(Ordering::Relaxed);
    for stream in [true, false] {
        eventually("no session is left", || stoppable.sessions() == 0);
        let before = rows();
        // Without drafts the cloud's rows count the tokens.
        let more = json!({"stream": stream, "draft": "off"});
        let mut client = stoppable.begin_and_stop(&and(question(LONG), more));
        if stream {
            client.read_exact(&mut [0; 256]).unwrap();
        }
        assert_eq!(stoppable.sessions(), 1);
        drop(client);
        let in_flight = || server.metric("hat_http_answers_in_flight");
        eventually("nobody answers", || in_flight() == 0.0);
        stoppable.link.stop(false);
        eventually("it is cancelled", || stoppable.sessions() == 0);
        let computed = rows() - before;
        assert!(computed < u64::from(LONG), "{computed} rows: it ran to its end");
        assert_eq!(server.canary(), canary);
    }
}

#[test]
fn a_client_that_leaves_while_it_waits_is_never_served() {
    let stoppable = Stoppable::with(|_| {}, |engine| engine.limits.sessions_max = 1);
    let server = &stoppable.server;
    let first = stoppable.begin_and_stop(&and(question(LONG), json!({"stream": true})));
    let second = server.begin("/v1/chat/completions", &question(4));
    eventually("the second waits", || server.metric("hat_requests_waiting") == 1.0);
    drop(second);
    eventually("it waits no more", || server.metric("hat_requests_waiting") == 0.0);
    drop(first);
    stoppable.link.stop(false);
    eventually("no session is left", || stoppable.sessions() == 0);
    server.canary();
    let opened = stoppable.cloud.counters().opened.load(Ordering::Relaxed);
    assert_eq!(opened, 2, "the first answer and the canary");
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

#[test]
fn a_reader_that_does_not_read_is_cut_when_its_queue_is_full() {
    let (server, client) = unread(64 << 10, 100 * PATIENCE);
    eventually("its session is closed", || {
        server.metric("hat_rejected_total{reason=\"slow_reader\"}") == 1.0 && server.sessions() == 0
    });
    assert!(server.cloud_rows() < u64::from(LONG), "it did not run to its end");
    drop(client);
    server.canary();
}

#[test]
fn a_reader_that_takes_nothing_is_cut_after_the_write_limit() {
    let (server, client) = unread(1 << 30, Duration::from_millis(500));
    eventually("its connection is closed", || {
        server.cloud_rows() > 0 && server.metric("hat_http_connections") == 1.0 // the one that asks
    });
    eventually("its session is closed", || server.sessions() == 0);
    assert_eq!(server.metric("hat_rejected_total{reason=\"slow_reader\"}"), 0.0);
    drop(client);
    server.canary();
}

#[test]
fn too_many_answers_are_told_to_come_again() {
    let stoppable = Stoppable::with(|http| http.limits.answers_max = 2, |_| {});
    let server = &stoppable.server;
    let client = stoppable.begin_and_stop(&and(question(LONG), json!({"stream": true, "n": 2})));
    let refused = server.chat(&question(1));
    refused.refused(429, "busy", None);
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert_eq!(server.get("/health").status, 200);
    drop(client);
    stoppable.link.stop(false);
    eventually("there is room", || server.chat(&question(1)).status == 200);
    // More choices at once than there is room for.
    server.chat(&and(question(1), json!({"n": 3}))).refused(429, "busy", None);
}

#[test]
fn connections_are_bounded() {
    let server = Server::with(|http| http.limits.connections_max = 3, |_| {});
    let mut open: Vec<_> = (0..3).map(|_| server.connect()).collect();
    eventually("a fourth is refused", || {
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
    eventually("there is room", || server.get("/health").status == 200);
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
        let stopped = scope.spawn(|| drop(http));
        let mut bytes = begin.to_vec();
        client.read_to_end(&mut bytes).unwrap();
        assert_eq!(Reply::parse(&bytes).streamed_text(0), expected);
        stopped.join().unwrap();
    });
    assert!(std::net::TcpStream::connect(server.address).is_err(), "nobody listens any more");
}

/// The limits under which an answer outlives the drain.
fn short_drain(http: &mut HttpConfig) {
    http.limits.drain = Duration::from_millis(100);
    http.limits.first_event = Duration::from_millis(1);
}

#[test]
fn stopping_does_not_wait_for_ever() {
    let mut stoppable = Stoppable::with(short_drain, |_| {});
    let mut client = stoppable.begin_and_stop(&and(question(LONG), json!({"stream": true})));
    let server = &mut stoppable.server;
    let idle = server.connect();
    let mut begin = [0; 64];
    client.read_exact(&mut begin).unwrap();
    let (stopped, has_stopped) = std::sync::mpsc::channel();
    let http = server.http.take().unwrap();
    std::thread::spawn(move || {
        drop(http);
        stopped.send(()).unwrap();
    });
    has_stopped.recv_timeout(PATIENCE).expect("it waits for an answer that hangs");
    let mut rest = Vec::new();
    let _ = client.read_to_end(&mut rest);
    assert!(!String::from_utf8_lossy(&rest).contains("[DONE]"), "it was cut");
    stoppable.link.stop(false);
    eventually("its session is closed", || stoppable.sessions() == 0);
    drop(idle);
}

#[test]
fn a_silent_stream_is_kept_alive() {
    let stoppable = Stoppable::with(
        |http| {
            http.limits.keep_alive = Duration::from_millis(10);
            http.limits.first_event = Duration::from_millis(1);
        },
        |engine| engine.limits.sessions_max = 1,
    );
    // One session: the second answer waits for the first one's end.
    let first = stoppable.begin_and_stop(&and(question(LONG), json!({"stream": true})));
    let body = json!({"prompt": "word ".repeat(80), "max_tokens": 2, "stream": true});
    let mut second = stoppable.server.begin("/v1/completions", &body);
    let mut bytes = vec![0; 1024];
    let mut read = 0;
    while !String::from_utf8_lossy(&bytes[..read]).contains(": keep-alive\n\n") {
        read += second.read(&mut bytes[read..]).expect("it was silent for a while");
    }
    drop(first);
    stoppable.link.stop(false);
    bytes.truncate(read);
    second.read_to_end(&mut bytes).unwrap();
    let reply = Reply::parse(&bytes);
    assert_eq!(reply.events().last().unwrap(), "[DONE]");
    let alive = reply.body.find(": keep-alive\n\n").unwrap();
    let prefill = reply.body.find(": prefill ").expect("then the prompt went up");
    assert!(alive < prefill && prefill < reply.body.find("data: ").unwrap_or(0));
}

#[test]
fn an_error_in_mid_stream_is_an_event() {
    let more = json!({"stream": true, "stream_options": {"include_usage": true}});
    let stoppable = Stoppable::with(|_| {}, |engine| engine.reconnect = Duration::from_millis(300));
    let mut client = stoppable.begin_and_stop(&and(question(LONG), more));
    let Stoppable { server, cloud, link } = stoppable;
    let mut bytes = vec![0; 512];
    client.read_exact(&mut bytes).unwrap();
    drop(cloud);
    link.cut();
    link.stop(false);
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
    let mut stoppable = Stoppable::with(short_drain, |_| {});
    let mut client = stoppable.begin_and_stop(&and(question(LONG), json!({"stream": true})));
    let server = &mut stoppable.server;
    let mut bytes = vec![0; 64];
    client.read_exact(&mut bytes).unwrap();
    drop(server.http.take().unwrap());
    client.read_to_end(&mut bytes).unwrap();
    let reply = Reply::parse(&bytes);
    let last = reply.events().pop().unwrap();
    let message = last["error"]["message"].as_str().unwrap_or_else(|| panic!("{last}"));
    assert!(message.contains("shutting down"), "{message}");
}

#[test]
fn requests_that_wait_are_counted() {
    let stoppable = Stoppable::with(|_| {}, |engine| engine.limits.sessions_max = 1);
    let server = &stoppable.server;
    let long = and(question(LONG), json!({"stream": true}));
    let first = stoppable.begin_and_stop(&long);
    assert_eq!(server.engine.waiting(), 0, "it has its session");
    let more: Vec<_> = (0..3).map(|_| server.begin("/v1/chat/completions", &long)).collect();
    let waiting = || server.metric("hat_requests_waiting");
    eventually("three wait", || waiting() == 3.0);
    drop(more);
    eventually("none does", || waiting() == 0.0);
    drop(first);
}
