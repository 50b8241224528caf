//! A link emulator in user space: relays TCP connections as a slower, longer, worse link would,
//! for measurements and tests on one machine.
//!
//! All connections share one link with two directions: *up* is from those who connect, *down*
//! back to them. A direction has a bottleneck with a rate and a bounded queue, then a delay and a
//! jitter that reorders nothing; stalls stop the bottleneck, cuts reset all connections. Stalls,
//! cuts and jitter are functions of the seed and of link time, which begins with the first
//! connection. [`Shape`] is the schedule of one direction without a socket or a clock;
//! [`Emulator`] is the thread that keeps to it; [`Calibration`] measures how late it is, so that
//! it can be taken off the delay.
//!
//! A connection is made as over the real link: it costs a round trip before the first byte goes
//! up. Not emulated: what TCP itself does over a long path (slow start, loss and its repair), since
//! TCP ends at the relay.
//!
//! [`simulated`] needs neither socket nor thread: links in virtual time, for endpoints that one
//! thread drives.

mod calibrate;
mod config;
mod pair;
mod relay;
mod report;
mod schedule;
mod shape;
pub mod simulated;
#[cfg(test)]
mod tests;

use std::io::{self, PipeWriter, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::thread::JoinHandle;

pub use calibrate::Calibration;
use config::nanos;
pub use config::{CutConfig, DirectionConfig, EmulatorConfig, EmulatorError, StallConfig};
pub use report::{DirectionReport, Quantiles, Report};
pub use shape::{Piece, Shape};

/// A running link; it ends when this is dropped, and its connections are reset.
#[derive(Debug)]
pub struct Emulator {
    address: SocketAddr,
    finished: Arc<AtomicBool>,
    orders: Sender<relay::Order>,
    wake: PipeWriter,
    thread: Option<JoinHandle<io::Result<Report>>>,
}

impl Emulator {
    /// Listens and starts the thread.
    ///
    /// # Errors
    /// A value out of its range; an address that can't be listened at; no thread or pipe.
    pub fn start(config: EmulatorConfig) -> Result<Self, EmulatorError> {
        config.check()?;
        let address = config.listen;
        let listener =
            relay::listen(address).map_err(|source| EmulatorError::Listen { address, source })?;
        let address = listener.local_addr()?;
        let (woken, wake) = io::pipe()?;
        let (orders, inbox) = mpsc::channel();
        let relay = relay::Relay::new(config, listener, address, inbox, woken);
        let finished = relay.finished();
        let thread =
            std::thread::Builder::new().name("hat-emulator".into()).spawn(move || relay.run())?;
        Ok(Self { address, finished, orders, wake, thread: Some(thread) })
    }

    /// Address that it listens at.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// True if there were connections and none is open any more.
    #[must_use]
    pub fn finished(&self) -> bool {
        self.finished.load(Ordering::Relaxed)
    }

    /// Traffic up to now.
    ///
    /// # Errors
    /// If the relay failed.
    pub fn report(&self) -> Result<Report, EmulatorError> {
        let (answer, report) = mpsc::channel();
        self.order(relay::Order::Report(answer));
        report.recv().map_err(|_| EmulatorError::Relay(io::ErrorKind::BrokenPipe.into()))
    }

    /// Ends it: all connections are reset. What passed.
    ///
    /// # Errors
    /// If the relay failed.
    pub fn stop(mut self) -> Result<Report, EmulatorError> {
        Ok(self.end().expect("only stop and drop end the thread")?)
    }

    fn order(&self, order: relay::Order) {
        // A relay that failed hears nothing; its thread has the reason.
        if self.orders.send(order).is_ok() {
            let _ = (&self.wake).write_all(&[0]);
        }
    }

    fn end(&mut self) -> Option<io::Result<Report>> {
        let thread = self.thread.take()?;
        self.order(relay::Order::Stop);
        Some(thread.join().unwrap_or_else(|_| Err(io::Error::other("the relay panicked"))))
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        let _ = self.end();
    }
}
