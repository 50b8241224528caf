//! The cloud's name, looked up on a thread of its own: a slow resolver keeps no answer waiting.

use std::net::SocketAddr;
use std::sync::Arc;

use crossbeam::channel::{Receiver, TryRecvError, bounded};

use crate::config::{Address, Unresolved};

type Found = Result<SocketAddr, Unresolved>;

/// At most one question, and its answer.
pub(super) struct Resolver {
    ask: Arc<dyn Fn(&Address) -> Found + Send + Sync>,
    wake: Arc<dyn Fn() + Send + Sync>,
    asked: Option<Receiver<Found>>,
}

impl Resolver {
    /// Asks the system, and calls `wake` when it has said something.
    pub(super) fn new(wake: impl Fn() + Send + Sync + 'static) -> Self {
        Self { ask: Arc::new(Address::resolve), wake: Arc::new(wake), asked: None }
    }

    /// The address that a host stands for; `None` as long as that is being asked.
    pub(super) fn poll(&mut self, address: &Address) -> Option<Found> {
        if address.is_ip() {
            return Some(address.resolve());
        }
        let Some(asked) = &self.asked else { return self.begin(address) };
        let found = match asked.try_recv() {
            Ok(found) => Some(found),
            Err(TryRecvError::Empty) => return None,
            Err(TryRecvError::Disconnected) => None,
        };
        self.asked = None;
        found
    }

    fn begin(&mut self, address: &Address) -> Option<Found> {
        let (tell, asked) = bounded(1);
        let (ask, wake, host) = (self.ask.clone(), self.wake.clone(), address.clone());
        let thread = std::thread::Builder::new().name("hat-resolve".to_owned()).spawn(move || {
            let _ = tell.send(ask(&host));
            wake();
        });
        if thread.is_err() {
            return Some((self.ask)(address)); // no thread is to be had, and an answer is
        }
        self.asked = Some(asked);
        None
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::{Duration, Instant};

    use crossbeam::channel::Sender;

    use super::*;

    /// A resolver whose system says nothing before it is told to, and the wakes so far.
    fn slow() -> (Resolver, Sender<Found>, Arc<AtomicU32>) {
        let (say, said) = bounded::<Found>(9);
        let ask = move |_: &Address| said.recv().unwrap();
        let wakes = Arc::new(AtomicU32::new(0));
        let count = wakes.clone();
        let resolver = Resolver::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        });
        (Resolver { ask: Arc::new(ask), ..resolver }, say, wakes)
    }

    fn until_found(resolver: &mut Resolver, address: &Address) -> Found {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            match resolver.poll(address) {
                Some(found) => return found,
                None => assert!(Instant::now() < end, "no answer"),
            }
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_slow_resolver_is_not_waited_for() {
        let (mut resolver, say, wakes) = slow();
        let address = Address::parse("cloud.example:7433", 1).unwrap();
        for _ in 0..100 {
            assert_eq!(resolver.poll(&address), None);
            assert!(resolver.asked.is_some());
        }
        let there = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 7433);
        say.send(Ok(there)).unwrap();
        assert_eq!(until_found(&mut resolver, &address), Ok(there));
        assert!(resolver.asked.is_none());
        say.send(Ok(there)).unwrap();
        assert_eq!(resolver.poll(&address), None, "a name is asked for anew each time");
        assert_eq!(until_found(&mut resolver, &address), Ok(there));
        let end = Instant::now() + Duration::from_secs(60);
        while wakes.load(Ordering::Relaxed) < 2 {
            assert!(Instant::now() < end, "the loop was not woken");
        }
    }

    #[test]
    fn an_ip_address_needs_no_question() {
        let (mut resolver, _say, _) = slow();
        let address = Address::parse("127.0.0.1:9", 1).unwrap();
        assert!(resolver.poll(&address).unwrap().is_ok());
        assert!(resolver.asked.is_none());
    }
}
