//! A request's id, and the line that the log has of it once its answer has ended.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Instant;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, Request, Response, Uri};
use hyper::body::{Body as _, Bytes, Frame, SizeHint};

use super::route::Route;

const REQUEST_ID: &str = "x-request-id";
/// Most characters of an id that a caller chose.
const ID_CHARS_MAX: usize = 64;

/// Takes doubled slashes and a slash at the end out of a path, as clients make them that join a
/// base address with a path.
pub(super) fn tidy_path<B>(request: &mut Request<B>) {
    let path = request.uri().path();
    if !path.contains("//") && (path == "/" || !path.ends_with('/')) {
        return;
    }
    let mut tidy: String = path
        .split('/')
        .filter(|part| !part.is_empty())
        .fold(String::new(), |path, part| path + "/" + part);
    if tidy.is_empty() {
        tidy.push('/');
    }
    if let Some(query) = request.uri().query() {
        tidy = tidy + "?" + query;
    }
    let mut parts = request.uri().clone().into_parts();
    parts.path_and_query = tidy.parse().ok();
    if let Ok(uri) = Uri::from_parts(parts) {
        *request.uri_mut() = uri;
    }
}

/// Figures of a request's answers, as they become known.
#[derive(Debug)]
pub(super) struct Figures {
    prompt_tokens: u64,
    answer_tokens: AtomicU64,
    rounds: AtomicU64,
}

impl Figures {
    /// Figures of a request whose prompts have `prompt_tokens` tokens.
    pub(super) fn new(prompt_tokens: usize) -> Self {
        let prompt_tokens = prompt_tokens as u64;
        Self { prompt_tokens, answer_tokens: AtomicU64::new(0), rounds: AtomicU64::new(0) }
    }

    /// Adds the tokens and round trips of an answer that has ended.
    pub(super) fn add(&self, tokens: u32, rounds: u32) {
        self.answer_tokens.fetch_add(u64::from(tokens), Ordering::Relaxed);
        self.rounds.fetch_add(u64::from(rounds), Ordering::Relaxed);
    }
}

/// A request on its way through the server.
pub(super) struct Access {
    id: HeaderValue,
    route: Option<Route>,
    begun: Instant,
}

impl Access {
    /// Takes the caller's id if it is short and plain, else makes one.
    pub(super) fn new(headers: &HeaderMap, route: Option<Route>) -> Self {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        let given = headers.get(REQUEST_ID).filter(|value| {
            (1..=ID_CHARS_MAX).contains(&value.len()) && value.as_bytes().iter().copied().all(plain)
        });
        let id = given.cloned().unwrap_or_else(|| {
            let mut random = [0; 8];
            let _ = getrandom::fill(&mut random); // an id that repeats hurts nobody
            let id = random.iter().fold("req-".to_owned(), |id, byte| format!("{id}{byte:02x}"));
            HeaderValue::from_str(&id).expect("hexadecimal digits")
        });
        Self { id, route, begun: Instant::now() }
    }

    /// Puts the id into a response, and writes the line when its body has ended.
    pub(super) fn follow(self, mut response: Response<Body>) -> Response<Body> {
        response.headers_mut().insert(REQUEST_ID, self.id.clone());
        let figures = response.extensions_mut().remove::<Arc<Figures>>();
        let status = response.status().as_u16();
        let ended = response.body().is_end_stream();
        let line = Line { access: self, status, figures, ended };
        response.map(|body| Body::new(Logged { body, line }))
    }
}

struct Line {
    access: Access,
    status: u16,
    figures: Option<Arc<Figures>>,
    /// True if the whole body was taken.
    ended: bool,
}

impl Drop for Line {
    fn drop(&mut self) {
        let Access { id, route, begun } = &self.access;
        let (request, status, ended) = (id.to_str().unwrap_or_default(), self.status, self.ended);
        let route_name = route.map_or("none", Route::path);
        let ms = begun.elapsed().as_secs_f64() * 1e3;
        let figures = self.figures.as_deref();
        let count = |of: fn(&Figures) -> &AtomicU64| Some(of(figures?).load(Ordering::Relaxed));
        let prompt_tokens = figures.map(|figures| figures.prompt_tokens);
        let answer_tokens = count(|figures| &figures.answer_tokens);
        let rounds = count(|figures| &figures.rounds);
        // Probes and scrapers come every few seconds.
        if matches!(route, Some(Route::Health | Route::Ready | Route::Metrics)) {
            tracing::debug!(request, route = route_name, status, ms, ended, "answered");
        } else {
            tracing::info!(
                request,
                route = route_name,
                status,
                ms,
                ended,
                prompt_tokens,
                answer_tokens,
                rounds,
                "answered"
            );
        }
    }
}

/// A body with the line that is due at its end.
struct Logged {
    body: Body,
    line: Line,
}

impl hyper::body::Body for Logged {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        if matches!(frame, Poll::Ready(None)) || self.body.is_end_stream() {
            self.line.ended = true;
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_tidied() {
        for (path, tidy) in [
            ("/", "/"),
            ("//", "/"),
            ("/v1/models/", "/v1/models"),
            ("//v1//models?x=//", "/v1/models?x=//"),
            ("/v1/models", "/v1/models"),
        ] {
            let mut request = Request::builder().uri(path).body(()).unwrap();
            tidy_path(&mut request);
            assert_eq!(request.uri().to_string(), tidy, "{path}");
        }
    }

    #[test]
    fn an_id_is_taken_if_it_is_plain() {
        let id = |value: &'static [u8]| {
            let mut headers = HeaderMap::new();
            headers.insert(REQUEST_ID, HeaderValue::from_bytes(value).unwrap());
            Access::new(&headers, None).id.to_str().unwrap().to_owned()
        };
        assert_eq!(id(b"abc-1_2.3"), "abc-1_2.3");
        for strange in [&b""[..], b"a b", b"\xff", &[b'a'; 65]] {
            let made = id(strange);
            assert!(made.starts_with("req-") && made.len() == 20, "{made}");
        }
    }
}
