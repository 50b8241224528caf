//! Connections: how many, how long they may take to say something, how long to listen.

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderValue, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustix::net::{SendFlags, Shutdown};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::Shared;
use super::access::{self, Access};
use super::error::{ApiError, Refused};
use super::gate::{self, Passed};
use super::route::Route;
use super::stream::{Broken, Guarded, Listener, Stream};

/// Most bytes of a request's head.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// A pause when the system gives no more connections (no file descriptors left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Time for the error that ends an answer at the end of the drain time.
const LAST_WORD_TIME: Duration = Duration::from_secs(1);

/// Limit on the bytes that are taken from a connection after its last response.
const LINGER_BYTES_MAX: usize = 1 << 20;
const LINGER_TIME: Duration = Duration::from_millis(500);

/// Serves until `stop` turns true, then lets what runs end, at most for the drain time.
pub(super) async fn serve(
    listener: Listener,
    shared: Arc<Shared>,
    router: Router,
    mut stop: watch::Receiver<bool>,
) {
    let mut connections = JoinSet::new();
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(stream) => stream,
                Err(error) => {
                    tracing::warn!(%error, "accepting a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
            Some(_) = connections.join_next() => continue, // one ended
            () = stopped(&mut stop) => break,
        };
        if connections.len() >= shared.limits.connections_max {
            shared.counters.refuse("too_many_connections");
            let status = StatusCode::SERVICE_UNAVAILABLE;
            say(&stream, status, "too_many_connections", "too many connections are open");
            continue;
        }
        connections.spawn(connection(stream, shared.clone(), router.clone(), stop.clone()));
    }
    drop(listener);
    if !ended_within(shared.limits.drain, &mut connections).await {
        tracing::warn!(connections = connections.len(), "the drain time is over");
        shared.relay.fail_all();
        ended_within(LAST_WORD_TIME, &mut connections).await;
    }
}

async fn ended_within(time: Duration, connections: &mut JoinSet<()>) -> bool {
    let ended = async { while connections.join_next().await.is_some() {} };
    tokio::time::timeout(time, ended).await.is_ok()
}

async fn connection(
    stream: Stream,
    shared: Arc<Shared>,
    router: Router,
    mut stop: watch::Receiver<bool>,
) {
    let _open = Open::new(shared.clone());
    stream.set_options();
    let limits = &shared.limits;
    let guarded = Guarded::new(stream, limits.head_timeout, limits.write_timeout);
    let io = TokioIo::new(guarded);
    let served = shared.clone();
    let service = TowerToHyperService::new(router);
    let service = service_fn(move |request| -> Pin<Box<dyn Future<Output = _> + Send>> {
        Box::pin(respond(served.clone(), service.clone(), request))
    });
    let mut connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(shared.limits.idle_timeout)
        .max_header_size(HEAD_BYTES_MAX)
        .max_buf_size(2 * HEAD_BYTES_MAX)
        .serve_connection(io, service);
    let ended = tokio::select! {
        ended = std::future::poll_fn(|cx| connection.poll_without_shutdown(cx)) => ended,
        () = stopped(&mut stop) => {
            Pin::new(&mut connection).graceful_shutdown();
            std::future::poll_fn(|cx| connection.poll_without_shutdown(cx)).await
        }
    };
    let parts = connection.into_parts();
    let Guarded { stream, broken, .. } = parts.io.inner();
    match (broken, ended) {
        (Some(Broken::LateHead), _) => {
            shared.counters.refuse("head_timeout");
            let message = "the request's head did not arrive in time";
            say(stream, StatusCode::REQUEST_TIMEOUT, "head_timeout", message);
        }
        (Some(Broken::Head(fault)), _) => {
            tracing::debug!(fault = fault.message(), "a head was refused");
            shared.counters.refuse("malformed_http");
            say(stream, StatusCode::BAD_REQUEST, "malformed_http", fault.message());
        }
        (None, Err(error)) => {
            tracing::debug!(%error, "connection ended");
            if error.is_parse() {
                shared.counters.refuse("malformed_http");
            }
        }
        (None, Ok(())) => {}
    }
    linger(stream).await;
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await; // an error: the server is gone, which is a stop too
}

/// Takes a little of what the other side still sends. Closing with bytes unread would reset the
/// connection, and the reset could destroy the last response before it is read.
async fn linger(stream: &Stream) {
    if rustix::net::shutdown(stream, Shutdown::Write).is_err() {
        return;
    }
    let discard = async {
        let mut rest = vec![0; 16 << 10];
        let mut bytes = 0;
        while bytes < LINGER_BYTES_MAX && stream.readable().await.is_ok() {
            match stream.try_read(&mut rest) {
                Ok(0) => return,
                Ok(read) => bytes += read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
        }
    };
    let _ = tokio::time::timeout(LINGER_TIME, discard).await; // either way it is closed now
}

/// A response outside of HTTP's own machinery: the connection is closed behind it.
fn say(stream: &Stream, status: StatusCode, code: &'static str, message: &str) {
    let json = ApiError::new(status, code, message).json();
    let text = format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n{json}",
        json.len()
    );
    // Best effort: it is closed either way.
    let _ = rustix::net::send(stream, text.as_bytes(), SendFlags::NOSIGNAL);
}

/// Passes a request through the gate to its route, and counts what became of it.
async fn respond(
    shared: Arc<Shared>,
    router: TowerToHyperService<Router>,
    mut request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    access::tidy_path(&mut request);
    let route = Route::of(request.uri().path());
    let access = Access::new(request.headers(), route);
    let origin = shared.gate.allowed_origin(request.headers());
    // Heads are followed to the end of a body of known length, not through chunks.
    let is_last = request.headers().contains_key(header::TRANSFER_ENCODING);
    let mut response = match shared.gate.check(&request) {
        Ok(Passed::Preflight(response)) => response,
        Ok(Passed::Request) => router.call(request.map(Body::new)).await?,
        Err(error) => error.close().into_response(),
    };
    if let Some(Refused(reason)) = response.extensions().get() {
        shared.counters.refuse(reason);
    }
    shared.counters.respond(route.map_or("none", Route::path), response.status().as_u16());
    if let Some(origin) = origin {
        gate::let_read(origin, response.headers_mut());
    }
    keep_alive(&mut response, is_last, shared.limits.idle_timeout);
    Ok(access.follow(response))
}

/// Says how long the connection may be idle now, unless this response is its last.
fn keep_alive(response: &mut Response<Body>, is_last: bool, idle: Duration) {
    let headers = response.headers_mut();
    if is_last {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    if !headers.contains_key(header::CONNECTION) {
        let value = format!("timeout={}", idle.as_secs());
        let value = HeaderValue::from_str(&value).expect("letters and digits");
        headers.insert("keep-alive", value);
    }
}

/// Counts a connection while it is open.
struct Open(Arc<Shared>);

impl Open {
    fn new(shared: Arc<Shared>) -> Self {
        shared.counters.connections.fetch_add(1, Ordering::Relaxed);
        Self(shared)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.counters.connections.fetch_sub(1, Ordering::Relaxed);
    }
}
