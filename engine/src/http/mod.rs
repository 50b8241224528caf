//! The OpenAI-compatible API of the device role; `docs/HTTP.md` is its reference.
//!
//! axum runs on a one-thread runtime in a thread of its own, and the runtime stays in this folder.
//! A second thread, the `relay`, waits for the engine's events, so nothing here blocks the
//! runtime. From a request to an answer:
//!
//! | file | what |
//! |---|---|
//! | `listen`, `stream`, `heads` | sockets, and a look at raw heads |
//! | `connection` | accepts, bounds and times connections |
//! | `gate` | Host, Origin, key: before any route; preflights of browsers |
//! | `access` | request ids and the line that the log has of each request |
//! | `route` | the routes |
//! | `body`, `json`, `fields`, `verdict`, `ask` | bytes to a [`Request`](crate::Request) |
//! | `relay` | the engine's events to the runtime |
//! | `openai`, `sse` | events to JSON, whole or streamed |
//! | `error`, `counters` | refusals and their count |
//!
//! Each queue and time has a bound in [`HttpLimits`].

mod access;
mod ask;
mod body;
mod connection;
mod counters;
mod error;
mod fields;
mod gate;
mod heads;
mod json;
mod listen;
mod openai;
mod relay;
mod route;
mod sse;
mod stream;
mod verdict;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::{Semaphore, watch};

use self::counters::Counters;
use self::gate::Gate;
use self::listen::Bound;
pub use self::listen::HttpSocket;
use self::relay::Relay;
use crate::{Engine, Error, spawn};

/// Configuration of the API.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct HttpConfig {
    /// Address to listen at: loopback only, as there is no TLS. Port 0 lets the system choose.
    pub listen: SocketAddr,
    /// A Unix socket to listen at instead, made for its owner alone (mode 0600).
    pub unix: Option<PathBuf>,
    /// The key that each request has to carry, but those to `/`, `/health` and `/ready`; `None`
    /// serves without one.
    pub api_key: Option<String>,
    /// Names, each with or without `:port`, that the `Host` header may have beside those of this
    /// machine's loopback addresses: the ones by which containers reach it.
    pub allow_hosts: Vec<String>,
    /// Origins of web pages that may ask beside those of this machine, as browsers send them:
    /// `scheme://host` or `scheme://host:port`.
    pub allow_origins: Vec<String>,
    /// Bounds.
    pub limits: HttpLimits,
}

impl HttpConfig {
    /// Without a key, with the default limits.
    #[must_use]
    pub fn new(listen: SocketAddr) -> Self {
        Self {
            listen,
            unix: None,
            api_key: None,
            allow_hosts: Vec::new(),
            allow_origins: Vec::new(),
            limits: HttpLimits::default(),
        }
    }

    /// The key that requests have to carry.
    #[must_use]
    pub fn api_key(mut self, api_key: impl Into<String>) -> Self {
        self.api_key = Some(api_key.into());
        self
    }

    /// Refuses what can't be served, before anything is made or loaded for it.
    ///
    /// # Errors
    /// [`Error::Input`] that names the field.
    pub fn check(&self) -> Result<(), Error> {
        if self.unix.is_none() {
            crate::config::check_loopback("http", self.listen.ip())?;
        }
        let printable = |key: &String| !key.is_empty() && key.bytes().all(|b| b.is_ascii_graphic());
        if self.api_key.as_ref().is_some_and(|key| !printable(key)) {
            let reason = "a key is made of printable ASCII without spaces, and not empty";
            return Err(Error::field("api_key", reason));
        }
        gate::check_lists(&self.allow_hosts, &self.allow_origins)
    }
}

/// The bounds of the API.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct HttpLimits {
    /// Connections at once; more are told 503 and closed.
    pub connections_max: usize,
    /// Answers at once, each of a request's choices counted; more are told 429.
    pub answers_max: usize,
    /// Bytes of a request's body; more is told 413.
    pub body_bytes_max: usize,
    /// Bodies of more than 64 KiB in memory at once; more are told 429.
    pub large_bodies_max: usize,
    /// Bytes of events that wait for one reader; beyond it the reader is cut.
    pub queued_bytes_max: usize,
    /// Longest time for a request's head, from its first byte.
    pub head_timeout: Duration,
    /// Longest time that a connection may be idle.
    pub idle_timeout: Duration,
    /// Longest time for a request's body.
    pub body_timeout: Duration,
    /// Longest time that a reader may take nothing at all.
    pub write_timeout: Duration,
    /// Silence of a stream after which a comment is sent.
    pub keep_alive: Duration,
    /// Longest time that a stream waits for its first event before it answers 200.
    pub first_event: Duration,
    /// Time that answers may go on when the server stops.
    pub drain: Duration,
}

impl Default for HttpLimits {
    fn default() -> Self {
        Self {
            connections_max: 128,
            answers_max: 64,
            body_bytes_max: 4 << 20,
            large_bodies_max: 16,
            queued_bytes_max: 1 << 20,
            head_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(75),
            body_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(30),
            keep_alive: Duration::from_secs(5),
            first_event: Duration::from_secs(1),
            drain: Duration::from_secs(5),
        }
    }
}

/// State shared by all connections.
struct Shared {
    engine: Arc<Engine>,
    limits: HttpLimits,
    gate: Gate,
    relay: Relay,
    in_flight: Arc<Semaphore>,
    large_bodies: Arc<Semaphore>,
    counters: Counters,
    started_unix: u64,
}

impl Shared {
    /// All figures as Prometheus reads them: the engine's and the API's.
    fn prometheus(&self) -> String {
        let mut out = self.engine.metrics().to_prometheus();
        let in_flight = self.limits.answers_max - self.in_flight.available_permits();
        self.counters.prometheus(in_flight, self.relay.cut(), &mut out);
        counters::family(&mut out, "hat_cloud_connected", "gauge", "1 if the cloud is connected.");
        let connected = u8::from(self.engine.is_connected());
        counters::sample(&mut out, "hat_cloud_connected", connected);
        let help = "Requests that wait for one of the answers at once to end.";
        counters::family(&mut out, "hat_requests_waiting", "gauge", help);
        counters::sample(&mut out, "hat_requests_waiting", self.engine.waiting());
        let cloud = self.engine.cloud().map(|cloud| ("cloud", cloud.describe()));
        let drafter = self.engine.describe_drafter().map(|drafter| ("drafter", drafter));
        let device = [("device", self.engine.describe())];
        counters::backends(device.into_iter().chain(drafter).chain(cloud), &mut out);
        out
    }
}

/// A running server. Dropping it stops it: it takes no more requests, lets the answers in flight
/// end within [`HttpLimits::drain`], ends the rest with an error that their readers are told, and
/// waits for all of that.
pub struct HttpServer {
    bound: Bound,
    stop: watch::Sender<bool>,
    threads: Vec<JoinHandle<()>>,
}

impl HttpServer {
    /// Listens, and serves `engine` on two threads.
    ///
    /// # Errors
    /// [`Error::Input`] for an address that other machines can reach or an unusable key,
    /// [`Error::Io`] if the address or a thread can't be had.
    pub fn start(engine: Arc<Engine>, config: HttpConfig) -> Result<Self, Error> {
        Self::start_at(HttpSocket::bind(&config)?, engine, config)
    }

    /// As [`HttpServer::start`], at a socket that was bound before the engine was opened.
    ///
    /// # Errors
    /// As [`HttpServer::start`].
    pub fn start_at(
        socket: HttpSocket,
        engine: Arc<Engine>,
        config: HttpConfig,
    ) -> Result<Self, Error> {
        config.check()?;
        let HttpSocket { socket, bound } = socket;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .max_blocking_threads(BLOCKING_THREADS)
            .thread_name("hat-http-work")
            .build()
            .map_err(|error| Error::io("starting the HTTP runtime", error))?;
        let listener = {
            let _inside = runtime.enter();
            socket.on_runtime().map_err(|error| Error::io(bound.what(), error))?
        };
        let (relay, relay_thread) = Relay::start(config.limits.queued_bytes_max)?;
        let shared = Arc::new(Shared {
            engine,
            limits: config.limits,
            gate: Gate::new(&config),
            relay,
            in_flight: Arc::new(Semaphore::new(config.limits.answers_max)),
            large_bodies: Arc::new(Semaphore::new(config.limits.large_bodies_max)),
            counters: Counters::default(),
            started_unix: hat_transport::clock::unix_seconds(),
        });
        let (stop, stopped) = watch::channel(false);
        let serve = move || {
            let router = route::router(shared.clone());
            runtime.block_on(connection::serve(listener, shared, router, stopped));
            runtime.shutdown_timeout(STOP_TIMEOUT);
        };
        let thread = spawn("hat-http", serve)?;
        Ok(Self { bound, stop, threads: vec![thread, relay_thread] })
    }

    /// The address; the port is the one that the system chose if 0 was configured. With a Unix
    /// socket it is the configured address, at which nobody listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.bound.address
    }

    /// The place for people: `http://127.0.0.1:8080`, or `unix:` with the socket's path.
    #[must_use]
    pub fn place(&self) -> String {
        self.bound.place()
    }

    /// True if it has stopped by itself.
    #[must_use]
    pub fn has_stopped(&self) -> bool {
        self.threads.iter().all(JoinHandle::is_finished)
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        let _ = self.stop.send(true); // nobody listens if the thread has ended
        for thread in self.threads.drain(..) {
            let _ = thread.join(); // its panic has been printed
        }
    }
}

/// Threads that parse and tokenise.
const BLOCKING_THREADS: usize = 2;
/// Time that parsing and tokenising may go on when the server stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);
