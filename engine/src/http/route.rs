//! The routes, and what each answers.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use axum::routing::{MethodRouter, get, post};
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::TryAcquireError;

use super::Shared;
use super::access::Figures;
use super::ask::{self, Ask, Shape};
use super::body;
use super::error::ApiError;
use super::openai::{self, Collected, Identity, Model, ModelList};
use super::relay::{Answers, Told};
use super::sse::{EventStream, Wanted};
use crate::Generation;

/// Routes of the server; all else is 404.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Route {
    Root,
    Models,
    Model,
    Chat,
    Completions,
    Health,
    Ready,
    Metrics,
}

impl Route {
    pub(super) const ALL: [Self; 8] = [
        Self::Root,
        Self::Models,
        Self::Model,
        Self::Chat,
        Self::Completions,
        Self::Health,
        Self::Ready,
        Self::Metrics,
    ];

    /// The path, as axum writes patterns; also the label in `/metrics`.
    pub(super) const fn path(self) -> &'static str {
        match self {
            Self::Root => "/",
            Self::Models => "/v1/models",
            Self::Model => "/v1/models/{*id}",
            Self::Chat => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
            Self::Health => "/health",
            Self::Ready => "/ready",
            Self::Metrics => "/metrics",
        }
    }

    /// The route of a request's path.
    pub(super) fn of(path: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|route| match route.path().strip_suffix("{*id}") {
            Some(prefix) => path.strip_prefix(prefix).is_some_and(|id| !id.is_empty()),
            None => path == route.path(),
        })
    }

    /// True if it is answered without the key: it says nothing about anybody's requests, and
    /// probes carry no key.
    pub(super) const fn is_open(self) -> bool {
        matches!(self, Self::Root | Self::Health | Self::Ready)
    }

    /// The one method that it takes.
    pub(super) const fn method(self) -> &'static str {
        match self {
            Self::Chat | Self::Completions => "POST",
            _ => "GET",
        }
    }

    fn answer(self) -> MethodRouter<Arc<Shared>> {
        match self {
            Self::Root => get(async || respond("text/plain; charset=utf-8", root())),
            Self::Models => get(models),
            Self::Model => get(model),
            Self::Chat => post(chat),
            Self::Completions => post(completions),
            Self::Health => get(async || json("{\"status\":\"ok\"}".to_owned())),
            Self::Ready => get(ready),
            Self::Metrics => get(metrics),
        }
    }
}

/// All routes, and the answers for what is none.
pub(super) fn router(shared: Arc<Shared>) -> Router {
    let mut router = Router::new();
    for route in Route::ALL {
        router = router.route(route.path(), route.answer());
    }
    router.fallback(no_route).method_not_allowed_fallback(wrong_method).with_state(shared)
}

async fn no_route() -> Response<Body> {
    let message = "there is no such route; GET / lists those that there are";
    ApiError::new(StatusCode::NOT_FOUND, "unknown_url", message).into_response()
}

async fn wrong_method(request: Request<Body>) -> Response<Body> {
    let method = Route::of(request.uri().path()).map_or("GET", Route::method);
    let message = format!("this route takes {method}");
    let error = ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message);
    let mut response = error.into_response();
    response.headers_mut().insert(header::ALLOW, HeaderValue::from_static(method));
    response
}

async fn models(State(shared): State<Arc<Shared>>) -> Response<Body> {
    let list = ModelList { object: "list", data: [shared.model()] };
    json(serde_json::to_string(&list).expect("plain data serialises"))
}

async fn model(
    State(shared): State<Arc<Shared>>,
    id: Result<Path<String>, PathRejection>,
) -> Response<Body> {
    // A name that is not UTF-8 names no model.
    let id = id.map_or_else(|_| String::new(), |Path(id)| id);
    if id == shared.engine.model_name() || id == "default" {
        return json(serde_json::to_string(&shared.model()).expect("plain data serialises"));
    }
    let message = "there is no such model; /v1/models names the one there is";
    ApiError::new(StatusCode::NOT_FOUND, "model_not_found", message).into_response()
}

async fn ready(State(shared): State<Arc<Shared>>) -> Response<Body> {
    if shared.engine.is_connected() {
        return json("{\"status\":\"ready\",\"cloud\":\"connected\"}".to_owned());
    }
    let message = "the cloud is not connected";
    ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "cloud_unavailable", message)
        .retry_after_ms(1000)
        .into_response()
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Response<Body> {
    respond("text/plain; version=0.0.4; charset=utf-8", shared.prometheus())
}

/// The list of routes, for a person with a browser.
fn root() -> String {
    let mut page = "hat-engine: the OpenAI-compatible API of this device.\n\n".to_owned();
    for route in Route::ALL {
        let key = if route.is_open() { "" } else { "  (with the API key)" };
        let path = route.path().replace("{*id}", "NAME");
        page += &format!("{:4} {path}{key}\n", route.method());
    }
    page
}

fn respond(kind: &'static str, body: impl Into<Body>) -> Response<Body> {
    let mut response = Response::new(body.into());
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

async fn chat(State(shared): State<Arc<Shared>>, request: Request<Body>) -> Response<Body> {
    answer(shared, Shape::Chat, request).await.unwrap_or_else(ApiError::into_response)
}

async fn completions(State(shared): State<Arc<Shared>>, request: Request<Body>) -> Response<Body> {
    answer(shared, Shape::Text, request).await.unwrap_or_else(ApiError::into_response)
}

async fn answer(
    shared: Arc<Shared>,
    shape: Shape,
    request: Request<Body>,
) -> Result<Response<Body>, ApiError> {
    check_content_type(request.headers())?;
    let body = body::read(request, &shared.limits, &shared.large_bodies).await?;
    let asked = shared.clone();
    // Parsing and tokenising take milliseconds to tens of them: not on the runtime's thread.
    let started = tokio::task::spawn_blocking(move || start(&asked, shape, &body.bytes)).await;
    let (ask, mut answers) = started.map_err(|_| {
        let message = "the request's task failed; the log says why";
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message)
    })??;
    let identity = Identity::new(shape, shared.engine.model_name());
    let figures = Arc::new(Figures::new(answers.prompt_tokens()));
    let mut response = if ask.stream {
        let first = first_event(&shared, &mut answers).await?;
        let wanted = Wanted {
            logprobs: ask.logprobs(),
            usage: ask.include_usage,
            choices: ask.choices,
            answers: ask.answers(),
            figures: figures.clone(),
        };
        stream(EventStream::new(shared, identity, wanted, answers, first))
    } else {
        whole(&shared, &identity, &ask, &figures, answers).await?
    };
    if let Some(sampling) = &ask.sampling {
        let value = HeaderValue::from_str(sampling).expect("names and numbers");
        response.headers_mut().insert("x-hat-sampling", value);
    }
    if let Some(ignored) = &ask.ignored {
        tracing::debug!(fields = ignored, "fields that nothing is known about were ignored");
        let value = HeaderValue::from_str(ignored).expect("letters, digits and punctuation");
        response.headers_mut().insert("x-hat-ignored", value);
    }
    response.extensions_mut().insert(figures);
    Ok(response)
}

fn stream(events: EventStream) -> Response<Body> {
    let mut response = respond("text/event-stream", Body::new(events));
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

fn check_content_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let plain = |value: &HeaderValue| value.as_bytes().eq_ignore_ascii_case(b"identity");
    if !headers.get_all(header::CONTENT_ENCODING).iter().all(plain) {
        let message = "the Content-Encoding header: a compressed body is not read; send it plain";
        let status = StatusCode::UNSUPPORTED_MEDIA_TYPE;
        return Err(ApiError::new(status, "unsupported_media_type", message).close());
    }
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let kind = value.and_then(|value| value.split(';').next()).unwrap_or_default();
    if kind.trim().eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    let message = "the body has to be application/json, and the Content-Type header to say so";
    Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message)
        .close())
}

/// Parses the body and asks the engine, once for each choice of each prompt.
fn start(shared: &Shared, shape: Shape, body: &[u8]) -> Result<(Ask, Answers), ApiError> {
    let ask = ask::ask(shape, body, &shared.engine.sampling())?;
    let permits = shared.permits(ask.answers())?;
    let mut generations: Vec<Generation> = Vec::with_capacity(ask.answers() as usize);
    for request in &ask.requests {
        for choice in 0..ask.choices {
            let mut request = request.clone();
            request.choice = choice;
            generations.push(shared.engine.generate(request)?);
        }
    }
    let answers = shared.relay.follow(generations, ask.choices, permits);
    Ok((ask, answers))
}

/// The first event, if it comes soon. Until then the status is open, so that a request which
/// fails early fails with a status of its own. A cloud that is away is waited for.
async fn first_event(shared: &Shared, answers: &mut Answers) -> Result<Option<Told>, ApiError> {
    loop {
        match tokio::time::timeout(shared.limits.first_event, answers.next()).await {
            Ok(Some(Told { event: Err(error), .. })) => return Err(error.into()),
            Ok(Some(told)) => return Ok(Some(told)),
            Ok(None) => return Err(cut()),
            Err(_) if shared.engine.is_connected() => return Ok(None),
            Err(_) => {}
        }
    }
}

async fn whole(
    shared: &Shared,
    identity: &Identity,
    ask: &Ask,
    figures: &Figures,
    mut answers: Answers,
) -> Result<Response<Body>, ApiError> {
    let mut collected: Vec<Collected> = (0..ask.answers()).map(|_| Collected::default()).collect();
    while !collected.iter().all(Collected::is_complete) {
        let told = answers.next().await.ok_or_else(cut)?;
        collected[told.choice as usize].add(told.event?);
    }
    let tokenizer = shared.engine.tokenizer();
    let prompt_tokens = answers.prompt_tokens();
    for (tokens, rounds) in collected.iter().filter_map(Collected::figures) {
        figures.add(tokens, rounds);
    }
    let (choices, logprobs) = (ask.choices, ask.logprobs());
    Ok(json(openai::whole(identity, &collected, choices, prompt_tokens, logprobs, tokenizer)))
}

fn cut() -> ApiError {
    let message = "the answer was cut: the server stops, or could not keep up";
    ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "cut", message).retry_after_ms(1000)
}

fn json(body: String) -> Response<Body> {
    respond("application/json", body)
}

impl Shared {
    /// Room for this many answers in flight.
    fn permits(&self, count: u32) -> Result<OwnedSemaphorePermit, ApiError> {
        self.in_flight.clone().try_acquire_many_owned(count).map_err(|error| match error {
            TryAcquireError::NoPermits => ApiError::busy("too many answers are in flight already"),
            TryAcquireError::Closed => cut(),
        })
    }

    fn model(&self) -> Model<'_> {
        Model {
            id: self.engine.model_name(),
            object: "model",
            created: self.started_unix,
            owned_by: "hat-engine",
            max_model_len: self.engine.context(),
        }
    }
}
