//! Devices and clouds in virtual time, on one thread: the real cores, over real endpoints, whose
//! links are simulated. Who computes, and how long that takes, is a [`Compute`].
//!
//! [`Bed::next`] lets time pass until something happens that is its owner's: an act that the owner
//! has put off, news of a request, or the end of a cloud. Everything of one seed happens again with
//! that seed, to the nanosecond.

mod cloud;
mod device;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hat_core::answer::{Answer, EndTokens, Prepared};
use hat_core::cloud::CloudCore;
use hat_core::device::{DeviceCore, DeviceWork, RequestEvent, RequestId};
use hat_emulator::simulated::{Conditions, SimNet, Way};
use hat_plan::{BackendFault, MiddleStep};
use hat_transport::clock::{Clock, ManualClock};
use hat_transport::conn::{ConnectionId, Frame};
use hat_transport::endpoint::{Endpoint, EndpointConfig};
use hat_transport::pool::Pool;
use hat_transport::random::SeededRandom;

pub use self::cloud::Cloud;
pub use self::device::Device;

/// Turns of all processes in a millisecond: more are a loop that waits for nothing.
const TURNS_MAX: u32 = 20_000;
/// Time after which nothing but timers of those who wait for each other in vain is due.
const FAR: Duration = Duration::from_secs(1800);

/// A computation that was run.
#[derive(Clone, Debug, Default)]
pub struct Ran {
    /// Time that it takes; `None`: it never ends.
    pub took: Option<Duration>,
    /// Fault because of which its results mean nothing, if there was one.
    pub fault: Option<BackendFault>,
}

/// Runner of computations: with a model, or with times alone.
pub trait Compute {
    /// One computation of a device, at this time since the beginning.
    fn device(&mut self, at: Duration, device: usize, work: DeviceWork<'_>) -> Ran;

    /// One stage (cloud, stage) of a step.
    fn stage(&mut self, stage: (usize, usize), step: &mut MiddleStep) -> Ran;

    /// A frame of a device comes to a cloud; its core hears of it if this says so.
    fn overhears(
        &mut self,
        _cloud: usize,
        _endpoint: &mut Endpoint,
        _from: ConnectionId,
        _frame: &Frame,
    ) -> bool {
        true
    }

    /// A frame comes to a device.
    fn hears(&mut self, _device: usize, _frame: &Frame) {}
}

/// Something for the owner.
pub enum Happened<A> {
    /// The time of an act has come.
    Act(A),
    /// A request of a device has news. Its device begins no computation before these are told.
    News { device: usize, id: RequestId, event: RequestEvent },
    /// A cloud's process has ended, for its backend is lost.
    Ended { cloud: usize },
    /// A process takes turn after turn, and time stands still.
    Spins { node: Node },
}

/// A process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Node {
    /// A device, by number.
    Device(usize),
    /// A cloud, by number.
    Cloud(usize),
}

/// A process, or, from 1 on, one of a cloud's ports.
type Place = (Node, usize);

enum Due<A> {
    Wake(Place),
    Act(A),
}

/// A way of a process into the network.
pub struct Port {
    pub config: EndpointConfig,
    /// Times of the link to the cloud and back, where they are not drawn.
    pub ways: Option<[Way; 2]>,
    /// Buffers that it shares with others.
    pub pool: Option<Pool>,
}

impl From<EndpointConfig> for Port {
    fn from(config: EndpointConfig) -> Self {
        Self { config, ways: None, pool: None }
    }
}

/// Devices, clouds, and what is due.
pub struct Bed<A> {
    pub net: SimNet,
    pub devices: Vec<Device>,
    pub clouds: Vec<Cloud>,
    pub random: SeededRandom,
    /// True if a device's link is served while the device computes, as by a thread of its own.
    pub serves_links: bool,
    clock: Arc<ManualClock>,
    start: Instant,
    /// Events that are due, by time and number.
    due: BTreeMap<(Instant, u64), Due<A>>,
    next_number: u64,
    /// Acts among them.
    acts: usize,
    /// Time of each place's next turn.
    wakes: BTreeMap<Place, Instant>,
    /// Owner of each link, by the link's number.
    links: BTreeMap<u64, Place>,
    happened: VecDeque<Happened<A>>,
    /// The millisecond at hand, and turns in it.
    turns: (u128, u32),
}

/// Address at which a port of a cloud listens.
fn address(cloud: usize, port: usize) -> SocketAddr {
    SocketAddr::from((Ipv6Addr::from((cloud as u128) << 64 | port as u128), 7433))
}

impl<A> Bed<A> {
    /// An empty bed, whose sockets are drawn from `seed`.
    pub fn new(conditions: Conditions, seed: u64) -> Self {
        let clock = Arc::new(ManualClock::new());
        Self {
            net: SimNet::new(Arc::clone(&clock), conditions, seed),
            devices: Vec::new(),
            clouds: Vec::new(),
            random: SeededRandom::new(seed ^ 1),
            serves_links: false,
            start: clock.now(),
            clock,
            due: BTreeMap::new(),
            next_number: 0,
            acts: 0,
            wakes: BTreeMap::new(),
            links: BTreeMap::new(),
            happened: VecDeque::new(),
            turns: (0, 0),
        }
    }

    pub fn now(&self) -> Instant {
        self.clock.now()
    }

    /// Time since the beginning.
    pub fn elapsed(&self) -> Duration {
        self.now() - self.start
    }

    /// Puts an act off.
    pub fn act_in(&mut self, after: Duration, act: A) {
        let at = self.now() + after;
        self.acts += 1;
        self.put(at, Due::Act(act));
    }

    /// The process of a device begins: the first time with a number that was not used before, or
    /// again. What it had is lost. Its cloud is behind that port.
    pub fn begin_device(
        &mut self,
        device: usize,
        core: DeviceCore,
        own: Port,
        (cloud, port): (usize, usize),
    ) {
        let (hello, now) = (own.config.connection.hello, self.now());
        let random = Box::new(SeededRandom::new(self.random.next_u64()));
        let core = core.with_link(now, hello, None, random);
        let (endpoint, link) = self.endpoint(own, None);
        let begun = Device::new(core, endpoint, link, (hello, address(cloud, port)));
        self.links.insert(link, (Node::Device(device), 0));
        if device == self.devices.len() {
            self.devices.push(begun);
        } else {
            self.devices[device] = begun;
        }
        self.wake(Node::Device(device));
    }

    /// The process of a cloud begins, with so many stages and no port.
    pub fn begin_cloud(&mut self, cloud: usize, core: CloudCore, stages: usize) {
        // The one before has to leave its address first.
        self.end_cloud(cloud);
        let begun = Cloud::new(core, stages);
        if cloud == self.clouds.len() {
            self.clouds.push(begun);
        } else {
            self.clouds[cloud] = begun;
        }
        self.wake(Node::Cloud(cloud));
    }

    /// A cloud listens at one more port; returns its number.
    pub fn listen(&mut self, cloud: usize, own: Port) -> usize {
        let port = self.clouds[cloud].ports();
        let (endpoint, link) = self.endpoint(own, Some(address(cloud, port)));
        self.clouds[cloud].listen(endpoint, link);
        self.links.insert(link, (Node::Cloud(cloud), port + 1));
        port
    }

    /// A device's process ends without a word: its sockets close.
    pub fn end_device(&mut self, device: usize) {
        self.devices[device].end();
        self.wake_touched();
    }

    /// A cloud's process ends without a word: its sockets close.
    pub fn end_cloud(&mut self, cloud: usize) {
        if let Some(cloud) = self.clouds.get_mut(cloud) {
            cloud.end();
        }
        self.wake_touched();
    }

    fn endpoint(&mut self, own: Port, listen: Option<SocketAddr>) -> (Endpoint, u64) {
        let Port { config, ways, pool } = own;
        let mut link = self.net.link(listen).expect("each port has an address of its own");
        if let Some(ways) = ways {
            link = link.with_ways(ways);
        }
        let number = link.number();
        let random = Box::new(SeededRandom::new(self.random.next_u64()));
        let clock = Arc::clone(&self.clock) as _;
        let mut endpoint = Endpoint::new(Box::new(link), clock, config).with_random(random);
        if let Some(pool) = pool {
            endpoint = endpoint.with_pool(pool);
        }
        (endpoint, number)
    }

    /// A device is asked for an answer, which tells tokens apart by `vocab_size` numbers.
    pub fn submit(&mut self, device: usize, prepared: Prepared, vocab_size: usize) -> RequestId {
        let (now, ends) = (self.now(), EndTokens::default());
        let answer = Answer::new(&prepared, &ends, vocab_size);
        let id = self.devices[device].core.submit(now, prepared, answer);
        self.wake(Node::Device(device));
        id
    }

    /// Nobody wants an answer any more.
    pub fn cancel(&mut self, device: usize, id: RequestId) {
        self.devices[device].cancel(id);
        self.wake(Node::Device(device));
    }

    /// A process stands still for so long, and reads nothing.
    pub fn stop_for(&mut self, node: Node, time: Duration) {
        let until = self.now() + time;
        match node {
            Node::Device(device) => self.devices[device].stands_until = Some(until),
            Node::Cloud(cloud) => self.clouds[cloud].stands_until = Some(until),
        }
        self.wake(node);
    }

    /// Time goes on by so much, and nobody runs meanwhile.
    pub fn jump(&mut self, time: Duration) {
        self.clock.advance(time);
    }

    /// Runs a process as soon as nothing else is due before.
    pub fn wake(&mut self, node: Node) {
        self.wake_at((node, 0), self.now());
        self.wake_touched();
    }

    /// Lets time pass until something happens that is the owner's; `None` if nothing will.
    pub fn next(&mut self, compute: &mut impl Compute) -> Option<Happened<A>> {
        loop {
            if let Some(happened) = self.happened.pop_front() {
                return Some(happened);
            }
            self.wake_touched();
            let ((at, _), due) = self.due.pop_first()?;
            if self.acts == 0 && at.saturating_duration_since(self.now()) > FAR {
                return None;
            }
            self.clock.advance(at.saturating_duration_since(self.now()));
            match due {
                Due::Act(act) => {
                    self.acts -= 1;
                    return Some(Happened::Act(act));
                }
                Due::Wake(place) => {
                    if self.wakes.get(&place) == Some(&at) {
                        self.wakes.remove(&place);
                        self.run(place, compute);
                    }
                }
            }
        }
    }

    /// Runs a process, and says when it is to be run again.
    fn run(&mut self, place: Place, compute: &mut impl Compute) {
        let (now, at, node) = (self.now(), self.elapsed(), place.0);
        let turns = if at.as_millis() == self.turns.0 { self.turns.1 + 1 } else { 0 };
        self.turns = (at.as_millis(), turns);
        if turns == TURNS_MAX {
            return self.happened.push_back(Happened::Spins { node });
        }
        match node {
            Node::Device(number) => {
                let Some(device) = self.devices.get_mut(number) else { return };
                device.run(now, (at, number, self.serves_links), compute);
                let news = device.news.drain(..);
                let news = news.map(|(id, event)| Happened::News { device: number, id, event });
                let before = self.happened.len();
                self.happened.extend(news);
                let is_told = self.happened.len() > before;
                let next = device.next_at(now, &self.net, self.serves_links);
                let next = if is_told { next.map(|_| now) } else { next };
                next.into_iter().for_each(|at| self.wake_at(place, at));
            }
            Node::Cloud(number) => {
                let Some(cloud) = self.clouds.get_mut(number) else { return };
                if let Some(port) = place.1.checked_sub(1) {
                    cloud.touch(port);
                }
                if cloud.run(now, number, compute) {
                    self.happened.push_back(Happened::Ended { cloud: number });
                }
                let own = cloud.next_at().map(|at| (0, at));
                let next: Vec<_> =
                    own.into_iter().chain(cloud.next_of_ports(now, &self.net)).collect();
                next.into_iter().for_each(|(part, at)| self.wake_at((node, part), at));
            }
        }
    }

    /// Wakes the processes whose links have completions.
    fn wake_touched(&mut self) {
        for link in self.net.take_touched() {
            let Some(place) = self.links.get(&link).copied() else { continue };
            let next = self.net.next_of(link);
            next.into_iter().for_each(|at| self.wake_at(place, at));
        }
    }

    fn wake_at(&mut self, place: Place, at: Instant) {
        let at = at.max(self.now());
        if self.wakes.get(&place).is_none_or(|before| at < *before) {
            self.wakes.insert(place, at);
            self.put(at, Due::Wake(place));
        }
    }

    fn put(&mut self, at: Instant, due: Due<A>) {
        self.next_number += 1;
        self.due.insert((at, self.next_number), due);
    }
}
