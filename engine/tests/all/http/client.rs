//! A server over a generated model, and an HTTP client over std's streams that can also misbehave.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

use hat_engine::http::{HttpConfig, HttpServer};
use hat_engine::{Engine, EngineConfig};
use serde_json::{Value, json};

use crate::support::PATIENCE;

/// A server with its engine and an in-process cloud.
pub struct Server {
    pub http: Option<HttpServer>,
    pub engine: Arc<Engine>,
    pub address: SocketAddr,
    _directory: tempfile::TempDir,
}

/// A response.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Server {
    pub fn start() -> Self {
        Self::with(|_| {}, |_| {})
    }

    /// With another configuration of the API or the engine.
    pub fn with(
        change_http: impl FnOnce(&mut HttpConfig),
        change_engine: impl FnOnce(&mut EngineConfig),
    ) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let bundle = hat_loader::tiny_bundle(directory.path()).unwrap();
        let mut config = EngineConfig::new(bundle.join("device")).threads(1);
        change_engine(&mut config);
        let engine = Arc::new(Engine::open(config).unwrap());
        let mut config = HttpConfig::new(SocketAddr::from(([127, 0, 0, 1], 0)));
        change_http(&mut config);
        let http = HttpServer::start(engine.clone(), config).unwrap();
        let address = http.address();
        Self { http: Some(http), engine, address, _directory: directory }
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Sends bytes as they are and reads to the end.
    pub fn raw(&self, bytes: &[u8]) -> Reply {
        let mut stream = self.connect();
        // A server that refuses early closes while we still write.
        let _ = stream.write_all(bytes);
        Reply::read(&mut stream)
    }

    pub fn request(&self, method: &str, path: &str, headers: &str, body: &str) -> Reply {
        self.raw(request_text(method, path, headers, body).as_bytes())
    }

    pub fn get(&self, path: &str) -> Reply {
        self.request("GET", path, "", "")
    }

    pub fn post(&self, path: &str, body: &Value) -> Reply {
        self.request("POST", path, JSON, &body.to_string())
    }

    pub fn chat(&self, body: &Value) -> Reply {
        self.post("/v1/chat/completions", body)
    }

    /// Begins a request and leaves its answer to the caller.
    pub fn begin(&self, path: &str, body: &Value) -> TcpStream {
        let mut stream = self.connect();
        let text = request_text("POST", path, JSON, &body.to_string());
        stream.write_all(text.as_bytes()).unwrap();
        stream
    }

    /// The answer to a fixed question: it has to be the same whatever happened before.
    pub fn canary(&self) -> String {
        let body = json!({"prompt": "canary", "max_tokens": 12, "logprobs": 2});
        let reply = self.post("/v1/completions", &body);
        assert_eq!(reply.status, 200, "{}", reply.body);
        reply.json()["choices"].to_string()
    }

    /// Sessions that the cloud holds.
    pub fn sessions(&self) -> u64 {
        let counters = self.engine.cloud().unwrap().counters();
        counters.sessions.load(std::sync::atomic::Ordering::Relaxed)
    }

    pub fn cloud_rows(&self) -> u64 {
        let counters = self.engine.cloud().unwrap().counters();
        counters.rows.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// The value of a sample in `/metrics`.
    pub fn metric(&self, name: &str) -> f64 {
        let reply = self.get("/metrics");
        let line = reply.body.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map_or(0.0, |value| value.parse().unwrap())
    }
}

pub const JSON: &str = "Content-Type: application/json\r\n";

pub fn request_text(method: &str, path: &str, headers: &str, body: &str) -> String {
    let host = if headers.contains("Host:") { "" } else { "Host: localhost\r\n" };
    format!(
        "{method} {path} HTTP/1.1\r\n{host}Connection: close\r\nContent-Length: {}\r\n\
         {headers}\r\n{body}",
        body.len()
    )
}

/// A question that a tiny model answers at length.
pub fn question(max_tokens: u32) -> Value {
    json!({
        "model": "any",
        "messages": [{"role": "user", "content": "Why is the sky blue?"}],
        "max_tokens": max_tokens,
    })
}

/// `base` with more fields.
pub fn and(mut base: Value, more: Value) -> Value {
    let more = more.as_object().unwrap().clone();
    base.as_object_mut().unwrap().extend(more);
    base
}

impl Reply {
    /// Reads to the end of the connection.
    pub fn read(stream: &mut TcpStream) -> Self {
        let mut bytes = Vec::new();
        let mut piece = [0; 4096];
        // A reset after the response is as good an end as any.
        while let Ok(read @ 1..) = stream.read(&mut piece) {
            bytes.extend_from_slice(&piece[..read]);
        }
        Self::parse(&bytes)
    }

    /// One response out of bytes that hold just one.
    pub fn parse(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes);
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
        let body = if chunked { dechunk(body.as_bytes()) } else { body.to_owned() };
        Self { status, head: head.to_owned(), body }
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    /// The `data:` lines of a stream, `[DONE]` as a string.
    pub fn events(&self) -> Vec<Value> {
        assert_eq!(self.header("content-type"), Some("text/event-stream"), "{self:?}");
        let data = self.body.split("\n\n").filter_map(|event| event.strip_prefix("data: "));
        let parse = |data: &str| match data {
            "[DONE]" => Value::from("[DONE]"),
            data => serde_json::from_str(data).unwrap(),
        };
        data.map(parse).collect()
    }

    /// The text of a chat stream's choice.
    pub fn streamed_text(&self, index: u64) -> String {
        let events = self.events();
        let choices = events.iter().filter_map(|event| event["choices"].get(0));
        let ours = choices.filter(|choice| choice["index"] == index);
        ours.filter_map(|choice| choice["delta"]["content"].as_str()).collect()
    }

    /// The text of a chat's choice.
    pub fn text(&self, index: usize) -> String {
        let content = &self.json()["choices"][index]["message"]["content"];
        content.as_str().unwrap_or_else(|| panic!("{self:?}")).to_owned()
    }

    /// Asserts a refusal in the OpenAI shape and gives its message.
    pub fn refused(&self, status: u16, code: &str, param: Option<&str>) -> String {
        assert_eq!(self.status, status, "{self:?}");
        let error = self.json()["error"].clone();
        assert_eq!(error["code"], code, "{self:?}");
        assert_eq!(error["param"].as_str(), param, "{self:?}");
        assert!(error["type"].is_string(), "{self:?}");
        error["message"].as_str().unwrap().to_owned()
    }
}

fn dechunk(mut bytes: &[u8]) -> String {
    let mut body = Vec::new();
    while let Some(end) = bytes.windows(2).position(|pair| pair == b"\r\n") {
        let size = std::str::from_utf8(&bytes[..end]).unwrap();
        let size = usize::from_str_radix(size, 16).unwrap();
        bytes = &bytes[end + 2..];
        if size == 0 || bytes.len() < size {
            break;
        }
        body.extend_from_slice(&bytes[..size]);
        bytes = bytes.get(size + 2..).unwrap_or_default();
    }
    String::from_utf8(body).unwrap()
}
