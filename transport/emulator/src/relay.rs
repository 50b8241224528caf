//! The thread of a link: one loop over all its sockets, woken by readiness or by the next release.
//!
//! Timers come late, by tens of microseconds on a quiet machine. So the thread sleeps until a
//! little before an exact release and polls without sleeping from there; how much before is what
//! its timers were late of late. Pieces within a longer run of bytes are not worth that.

use std::io::{self, ErrorKind, PipeReader, Read};
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::Instant;

use mio::net::TcpStream;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::pair::{Context, DOWN, Direction, Outcome, Pair, UP, tune};
use super::report::{Report, Tally};
use super::schedule::{Cuts, Draws};
use super::shape::Shape;
use super::{EmulatorConfig, nanos};

/// Kernel buffers of each socket: little, so that bytes wait in the link's queue and not there.
pub(super) const SOCKET_BUFFER_BYTES: usize = 256 << 10;
/// Connections beyond this wait in the kernel.
const CONNECTIONS_MAX: usize = 1024;
/// Bytes read at once.
const READ_BYTES: usize = 64 << 10;
/// After a failure to listen or to accept, the next attempt.
const RETRY_NS: u64 = 10_000_000;
/// Lead with which the thread wakes before an exact release, in ns: at first, and at most.
const MARGIN_NS_FIRST: u64 = 120_000;
const MARGIN_NS_MAX: u64 = 300_000;
/// Streams of draws: the two directions have `UP` and `DOWN`.
const CUT_DRAWS: u64 = 2;
/// Above the roles that share the machine: a real link takes no CPU from them, and gives none.
const PRIORITY: i32 = -10;

/// Order of a link's owner to its thread.
pub(super) enum Order {
    Report(Sender<Report>),
    Stop,
}

/// Link time: nanoseconds since the first connection, 0 before.
#[derive(Clone, Copy)]
pub(super) struct LinkClock {
    epoch: Option<Instant>,
}

impl LinkClock {
    pub(super) fn now(self) -> u64 {
        self.epoch.map_or(0, |epoch| nanos(epoch.elapsed()))
    }
}

pub(super) struct Relay {
    config: EmulatorConfig,
    address: SocketAddr,
    listener: Option<TcpListener>,
    /// Time at which to listen, or to accept, again.
    back_at: Option<u64>,
    inbox: Receiver<Order>,
    woken: PipeReader,
    clock: LinkClock,
    directions: [Direction; 2],
    cuts: Cuts,
    pairs: Vec<Pair>,
    connections: u64,
    cut_count: u64,
    margin_ns: u64,
    scratch: Vec<u8>,
    finished: Arc<AtomicBool>,
}

/// Source of a wake-up.
enum Source {
    Wake,
    Listener,
    End(usize, usize),
}

/// A listener for the relay.
pub(super) fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    rustix::net::sockopt::set_socket_recv_buffer_size(&listener, SOCKET_BUFFER_BYTES)?;
    Ok(listener)
}

impl Relay {
    pub(super) fn new(
        mut config: EmulatorConfig,
        listener: TcpListener,
        address: SocketAddr,
        inbox: Receiver<Order>,
        woken: PipeReader,
    ) -> Self {
        if let Some(calibration) = config.calibration {
            let [up, down] = calibration.corrections(config.up.delay, config.down.delay);
            config.up.delay -= up;
            config.down.delay -= down;
        }
        let direction = |direction, stream: usize| Direction {
            shape: Shape::new(direction, config.seed, stream as u64),
            tally: Tally::default(),
        };
        let directions = [direction(&config.up, UP), direction(&config.down, DOWN)];
        let cuts = Cuts::new(Draws::new(config.seed, CUT_DRAWS), config.cut);
        Self {
            address,
            listener: Some(listener),
            back_at: None,
            inbox,
            woken,
            clock: LinkClock { epoch: None },
            directions,
            cuts,
            pairs: Vec::new(),
            connections: 0,
            cut_count: 0,
            margin_ns: MARGIN_NS_FIRST,
            scratch: vec![0; READ_BYTES],
            finished: Arc::default(),
            config,
        }
    }

    /// Set while connections were made and none is open.
    pub(super) fn finished(&self) -> Arc<AtomicBool> {
        self.finished.clone()
    }

    /// Relays until it is told to stop, or nobody is left who could tell it.
    pub(super) fn run(mut self) -> io::Result<Report> {
        punctual();
        while self.obey() {
            let now = self.clock.now();
            if self.clock.epoch.is_some() && self.cuts.take(now) {
                self.cut();
            }
            self.come_back(now);
            self.turn_pairs();
            let open = !self.pairs.is_empty();
            self.finished.store(self.connections > 0 && !open, Ordering::Relaxed);
            self.wait()?;
        }
        let report = self.report();
        self.pairs.into_iter().for_each(Pair::reset);
        Ok(report)
    }

    /// Does what the owner wants; false to stop.
    fn obey(&mut self) -> bool {
        loop {
            match self.inbox.try_recv() {
                // Who asked may have gone meanwhile.
                Ok(Order::Report(answer)) => drop(answer.send(self.report())),
                Ok(Order::Stop) | Err(TryRecvError::Disconnected) => return false,
                Err(TryRecvError::Empty) => return true,
            }
        }
    }

    fn turn_pairs(&mut self) {
        let mut index = 0;
        while index < self.pairs.len() {
            let mut cx = Context {
                clock: self.clock,
                directions: &mut self.directions,
                cuts: &mut self.cuts,
                to: self.config.to,
                scratch: &mut self.scratch,
            };
            match self.pairs[index].relay(&mut cx) {
                Outcome::Alive => index += 1,
                Outcome::Done => drop(self.pairs.swap_remove(index)),
                Outcome::Reset => self.pairs.swap_remove(index).reset(),
                Outcome::Cut => return self.cut(),
            }
        }
    }

    /// Resets all connections; bytes on the way are lost.
    fn cut(&mut self) {
        self.cut_count += 1;
        let now = self.clock.now();
        // Before anyone hears of the cut: who comes back at once finds nobody.
        if !self.config.cut.away.is_zero() {
            self.listener = None;
            self.back_at = Some(now + nanos(self.config.cut.away));
        }
        self.pairs.drain(..).for_each(Pair::reset);
        for direction in &mut self.directions {
            direction.shape.clear(now);
        }
    }

    /// Listens again after a time away.
    fn come_back(&mut self, now: u64) {
        if self.back_at.is_none_or(|at| now < at) {
            return;
        }
        self.back_at = None;
        if self.listener.is_none() {
            match listen(self.address) {
                Ok(listener) => self.listener = Some(listener),
                Err(error) => {
                    tracing::warn!(address = %self.address, %error, "can't listen again yet");
                    self.back_at = Some(now + RETRY_NS);
                }
            }
        }
    }

    fn accept(&mut self) {
        while let Some(listener) = &self.listener
            && self.pairs.len() < CONNECTIONS_MAX
        {
            match listener.accept() {
                Ok((client, from)) => {
                    self.clock.epoch.get_or_insert_with(Instant::now);
                    let now = self.clock.now();
                    self.connections += 1;
                    let client = client.set_nonblocking(true).map(|()| TcpStream::from_std(client));
                    match client.and_then(|client| tune(&client).map(|()| client)) {
                        Ok(client) => self.pairs.push(Pair::new(client, now, &mut self.directions)),
                        Err(error) => tracing::warn!(%from, %error, "a connection is dropped"),
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    // Out of descriptors, say: others may give some back.
                    tracing::warn!(%error, "can't accept");
                    self.back_at = Some(self.clock.now() + RETRY_NS);
                    return;
                }
            }
        }
    }

    /// Time of the next event, and `true` if it has to be exact.
    fn next(&mut self, now: u64) -> Option<(u64, bool)> {
        let begun = self.clock.epoch.is_some();
        let cut = if begun { self.cuts.next() } else { None };
        let pairs = self.pairs.iter().filter_map(|pair| pair.next(now, &mut self.directions));
        let others = cut.into_iter().chain(self.back_at).map(|at| (at, false));
        pairs.chain(others).min_by_key(|&(at, _)| at)
    }

    /// Sleeps until a socket is ready, there is an order, or something is due.
    fn wait(&mut self) -> io::Result<()> {
        let now = self.clock.now();
        let (due, margin) = match self.next(now) {
            Some((at, true)) => (Some(at), self.margin_ns),
            Some((at, false)) => (Some(at), 0),
            None => (None, 0),
        };
        let sleep = due.map(|at| at.saturating_sub(now).saturating_sub(margin));
        let timeout = sleep.map(|ns| Timespec {
            tv_sec: (ns / 1_000_000_000) as i64,
            tv_nsec: (ns % 1_000_000_000) as _,
        });
        let mut sources = vec![Source::Wake];
        let mut fds = vec![PollFd::new(&self.woken, PollFlags::IN)];
        if let Some(listener) = &self.listener
            && self.back_at.is_none()
            && self.pairs.len() < CONNECTIONS_MAX
        {
            sources.push(Source::Listener);
            fds.push(PollFd::new(listener, PollFlags::IN));
        }
        for (index, pair) in self.pairs.iter().enumerate() {
            for end in [UP, DOWN] {
                let Some((stream, read, write)) = pair.interest(end) else { continue };
                let mut flags = PollFlags::empty();
                flags.set(PollFlags::IN, read);
                flags.set(PollFlags::OUT, write);
                sources.push(Source::End(index, end));
                fds.push(PollFd::new(stream, flags));
            }
        }
        match poll(&mut fds, timeout.as_ref()) {
            Ok(0) => {
                if sleep.is_some_and(|ns| ns > 0) {
                    self.learn(self.clock.now().saturating_sub(now + sleep.unwrap_or(0)));
                }
                return Ok(());
            }
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        let ready: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
        for (source, flags) in sources.into_iter().zip(ready) {
            self.ready(source, flags)?;
        }
        Ok(())
    }

    fn ready(&mut self, source: Source, flags: PollFlags) -> io::Result<()> {
        if flags.is_empty() {
            return Ok(());
        }
        match source {
            Source::Wake => {
                let mut bytes = [0; 64];
                let _ = self.woken.read(&mut bytes)?;
            }
            Source::Listener => self.accept(),
            Source::End(index, end) => {
                let broken = flags.intersects(PollFlags::HUP | PollFlags::ERR);
                let read = broken || flags.contains(PollFlags::IN);
                let write = broken || flags.contains(PollFlags::OUT);
                self.pairs[index].ready(end, read, write);
            }
        }
        Ok(())
    }

    /// Takes in how late a timer was: the margin follows the latest ones, up at once, down slowly.
    fn learn(&mut self, late_ns: u64) {
        let late = late_ns.min(MARGIN_NS_MAX);
        self.margin_ns = late.max(self.margin_ns - self.margin_ns.saturating_sub(late) / 16);
    }

    fn report(&self) -> Report {
        let now = self.clock.now();
        let direction = |index: usize, rate: Option<u64>| {
            let direction = &self.directions[index];
            let stalls = self.clock.epoch.map_or(0, |_| direction.shape.stalls_begun(now));
            direction.tally.report(rate.is_some(), stalls)
        };
        Report {
            up: direction(UP, self.config.up.rate_bits_s),
            down: direction(DOWN, self.config.down.rate_bits_s),
            connections: self.connections,
            open: self.pairs.len(),
            unreachable: self.directions[DOWN].tally.unreachable,
            cuts: self.cut_count,
            calibration: self.config.calibration,
        }
    }
}

/// Makes this thread's timers as exact as the system lets it. Failures cost exactness alone, and
/// the report shows what was reached.
fn punctual() {
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1)) {
        tracing::debug!(%error, "timers keep their slack");
    }
    if let Err(error) = rustix::process::setpriority_process(None, PRIORITY) {
        tracing::debug!(%error, "the link keeps its priority");
    }
}
