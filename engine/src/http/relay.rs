//! Events of generations, from the engine's blocking queues to the runtime.
//!
//! One thread waits for all generations at once, so that neither the runtime blocks nor a thread
//! is made for a request. It keeps what a reader has not taken within a bound of bytes: beyond it
//! the reader is too slow, and its generations are cancelled.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, Select, Sender, TryRecvError, unbounded};
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};

use crate::{Error, Event, Generation, spawn};

/// An event of one choice.
pub(super) struct Told {
    /// Index among the request's answers.
    pub(super) choice: u32,
    /// The event.
    pub(super) event: Result<Event, Error>,
    bytes: usize,
}

/// A generation that the thread follows.
struct Follow {
    request: u64,
    choice: u32,
    generation: Generation,
    told: UnboundedSender<Told>,
    queued_bytes: Arc<AtomicUsize>,
}

impl Follow {
    fn shut_down(self) {
        let event = Err(Error::stopped("it is shutting down"));
        // Nobody listens if the request has gone.
        let _ = self.told.send(Told { choice: self.choice, event, bytes: 0 });
    }
}

enum Order {
    Follow(Box<Follow>),
    Cancel {
        request: u64,
    },
    /// Ends every generation with an error.
    FailAll,
}

/// The thread, and the way to it.
pub(super) struct Relay {
    orders: Sender<Order>,
    requests: AtomicU64,
    cut: Arc<AtomicU64>,
}

impl Relay {
    /// Starts the thread. It ends when the relay and all [`Answers`] are gone.
    pub(super) fn start(queued_bytes_max: usize) -> Result<(Self, JoinHandle<()>), Error> {
        let (orders, incoming) = unbounded(); // bounded by the requests in flight
        let cut = Arc::new(AtomicU64::new(0));
        let counted = cut.clone();
        let thread = spawn("hat-http-relay", move || run(&incoming, queued_bytes_max, &counted))?;
        Ok((Self { orders, requests: AtomicU64::new(0), cut }, thread))
    }

    /// Ends what still runs with an error that its reader is told.
    pub(super) fn fail_all(&self) {
        let _ = self.orders.send(Order::FailAll); // without the thread nothing runs
    }

    /// Requests that were cut since their reader was too slow.
    pub(super) fn cut(&self) -> u64 {
        self.cut.load(Ordering::Relaxed)
    }

    /// Follows the generations of one request: `choices` to each prompt, one prompt after the
    /// other.
    pub(super) fn follow(
        &self,
        generations: Vec<Generation>,
        choices: u32,
        permits: OwnedSemaphorePermit,
    ) -> Answers {
        let request = self.requests.fetch_add(1, Ordering::Relaxed);
        let (told, events) = mpsc::unbounded_channel(); // bounded by `queued_bytes_max`
        let queued_bytes = Arc::new(AtomicUsize::new(0));
        let first = generations.iter().step_by(choices as usize);
        let prompt_tokens = first.map(Generation::prompt_tokens).sum();
        for (choice, generation) in (0..).zip(generations) {
            let (told, queued_bytes) = (told.clone(), queued_bytes.clone());
            let follow = Follow { request, choice, generation, told, queued_bytes };
            // If the thread is gone the order is dropped here, and with it the generation.
            let _ = self.orders.send(Order::Follow(Box::new(follow)));
        }
        let orders = self.orders.clone();
        Answers { events, queued_bytes, prompt_tokens, orders, request, _permits: permits }
    }
}

/// The answers to one request on their way. Dropping it cancels what is left of them.
pub(super) struct Answers {
    events: UnboundedReceiver<Told>,
    queued_bytes: Arc<AtomicUsize>,
    prompt_tokens: usize,
    orders: Sender<Order>,
    request: u64,
    /// Guard held for its drop: the request's share of what may be in flight.
    _permits: OwnedSemaphorePermit,
}

impl Answers {
    /// Tokens of the prompts together, templates included.
    pub(super) fn prompt_tokens(&self) -> usize {
        self.prompt_tokens
    }

    /// The next event of any choice; `None` if all have ended or the reader was too slow.
    pub(super) async fn next(&mut self) -> Option<Told> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    /// As [`Answers::next`].
    pub(super) fn poll_next(
        &mut self,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Told>> {
        self.events.poll_recv(cx).map(|told| {
            if let Some(told) = &told {
                self.queued_bytes.fetch_sub(told.bytes, Ordering::Relaxed);
            }
            told
        })
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        let _ = self.orders.send(Order::Cancel { request: self.request });
    }
}

/// State of a generation after its events were passed on.
enum State {
    Going,
    Ended,
    TooSlow,
}

fn run(orders: &Receiver<Order>, queued_bytes_max: usize, cut: &AtomicU64) {
    let mut follows: Vec<Follow> = Vec::new();
    loop {
        match wait(orders, &follows) {
            None => match orders.try_recv() {
                Ok(Order::Follow(follow)) => follows.push(*follow),
                Ok(Order::Cancel { request }) => follows.retain(|one| one.request != request),
                Ok(Order::FailAll) => follows.drain(..).for_each(Follow::shut_down),
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => return,
            },
            Some(index) => match pass_on(&mut follows[index], queued_bytes_max) {
                State::Going => {}
                State::Ended => drop(follows.swap_remove(index)),
                State::TooSlow => {
                    let request = follows[index].request;
                    follows.retain(|one| one.request != request);
                    cut.fetch_add(1, Ordering::Relaxed);
                }
            },
        }
    }
}

/// Waits for an order (`None`) or an event of a generation (its index).
fn wait(orders: &Receiver<Order>, follows: &[Follow]) -> Option<usize> {
    let mut select = Select::new();
    select.recv(orders);
    for follow in follows {
        select.recv(&follow.generation.events);
    }
    select.ready().checked_sub(1)
}

fn pass_on(follow: &mut Follow, queued_bytes_max: usize) -> State {
    while let Some(event) = follow.generation.next_timeout(Duration::ZERO) {
        let bytes = bytes_of(&event);
        let queued_bytes = follow.queued_bytes.fetch_add(bytes, Ordering::Relaxed);
        if queued_bytes + bytes > queued_bytes_max {
            return State::TooSlow;
        }
        if follow.told.send(Told { choice: follow.choice, event, bytes }).is_err() {
            return State::Ended; // nobody listens any more
        }
    }
    if follow.generation.is_finished() { State::Ended } else { State::Going }
}

/// About what an event holds in memory.
fn bytes_of(event: &Result<Event, Error>) -> usize {
    let own = size_of::<Told>();
    match event {
        Ok(Event::Token { text, logprobs, .. }) => {
            let top = logprobs.as_ref().map_or(0, |(_, top)| 1 + top.len());
            own + text.len() + top * (size_of::<hat_core::request::TokenLogprob>() + 8)
        }
        Ok(Event::Done { text, .. }) => own + text.len(),
        Ok(_) | Err(_) => own,
    }
}
