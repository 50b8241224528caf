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
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hat_core::answer::{Answer, EndTokens, Prepared};
use hat_core::cloud::CloudCore;
use hat_core::device::{DeviceCore, DeviceWork, RequestEvent, RequestId};
use hat_emulator::simulated::{Conditions, SimNet};
use hat_plan::{BackendFault, MiddleStep};
use hat_transport::clock::{Clock, ManualClock};
use hat_transport::conn::{ConnectionId, Frame};
use hat_transport::endpoint::{Endpoint, EndpointConfig};
use hat_transport::message::Role;
use hat_transport::random::SeededRandom;

pub use self::cloud::Cloud;
pub use self::device::Device;

/// A turn of a process takes so long at least.
const TURN: Duration = Duration::from_micros(1);
/// Turns of all processes in a second: more are a loop.
const TURNS_MAX: u32 = 200_000;

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
    /// One computation of a device.
    fn device(&mut self, device: usize, work: DeviceWork<'_>) -> Ran;

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
    /// A request of a device has news.
    News { device: usize, id: RequestId, event: RequestEvent },
    /// A cloud's process has ended, for its backend is lost.
    Ended { cloud: usize },
}

/// A process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Node {
    /// A device, by number.
    Device(usize),
    /// A cloud, by number.
    Cloud(usize),
}

enum Due<A> {
    Wake(Node),
    Act(A),
}

/// Tokens that there are; none of them ends an answer, and none has a text.
pub const VOCAB: usize = 512;

/// Devices, clouds, and what is due.
pub struct Bed<A> {
    pub net: SimNet,
    pub devices: Vec<Device>,
    pub clouds: Vec<Cloud>,
    pub random: SeededRandom,
    clock: Arc<ManualClock>,
    start: Instant,
    /// Events that are due, by time and number.
    due: BTreeMap<(Instant, u64), Due<A>>,
    next_number: u64,
    /// Time at which each process is run next.
    wakes: BTreeMap<Node, Instant>,
    /// Owner of each link, by the link's number.
    links: BTreeMap<u64, Node>,
    happened: VecDeque<Happened<A>>,
    /// The second at hand, and turns in it.
    turns: (u64, u32),
}

/// Address at which a cloud listens.
fn address(cloud: usize) -> SocketAddr {
    let port = u16::try_from(7433 + cloud).expect("there are few clouds");
    SocketAddr::from(([127, 0, 0, 1], port))
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
            start: clock.now(),
            clock,
            due: BTreeMap::new(),
            next_number: 0,
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
        self.put(at, Due::Act(act));
    }

    /// The process of a device begins: the first time with a number that was not used before, or
    /// again. What it had is lost.
    pub fn begin_device(
        &mut self,
        device: usize,
        core: DeviceCore,
        config: EndpointConfig,
        (cloud, conditions): (usize, Option<Conditions>),
    ) {
        let (endpoint, link) = self.endpoint(config, None, conditions);
        let begun = Device::new(core, endpoint, link, address(cloud));
        self.links.insert(link, Node::Device(device));
        if device == self.devices.len() {
            self.devices.push(begun);
        } else {
            self.devices[device] = begun;
        }
        self.wake(Node::Device(device));
    }

    /// The process of a cloud begins, with so many stages.
    pub fn begin_cloud(
        &mut self,
        cloud: usize,
        core: CloudCore,
        config: EndpointConfig,
        stages: usize,
    ) {
        // The one before has to leave the address first.
        self.end_cloud(cloud);
        let (endpoint, link) = self.endpoint(config, Some(address(cloud)), None);
        let begun = Cloud::new(core, endpoint, link, stages);
        self.links.insert(link, Node::Cloud(cloud));
        if cloud == self.clouds.len() {
            self.clouds.push(begun);
        } else {
            self.clouds[cloud] = begun;
        }
        self.wake(Node::Cloud(cloud));
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

    fn endpoint(
        &mut self,
        config: EndpointConfig,
        listen: Option<SocketAddr>,
        conditions: Option<Conditions>,
    ) -> (Endpoint, u64) {
        debug_assert_eq!(config.connection.hello.role == Role::Cloud, listen.is_some());
        let mut link = self.net.link(listen).expect("each cloud has an address of its own");
        if let Some(conditions) = conditions {
            link = link.with_conditions(conditions);
        }
        let number = link.number();
        let random = Box::new(SeededRandom::new(self.random.next_u64()));
        let clock = Arc::clone(&self.clock) as _;
        (Endpoint::new(Box::new(link), clock, config).with_random(random), number)
    }

    /// A device is asked for an answer.
    pub fn submit(&mut self, device: usize, prepared: Prepared) -> RequestId {
        let (now, answer) = (self.now(), Answer::new(&prepared, &EndTokens::default(), VOCAB));
        let id = self.devices[device].submit(now, prepared, answer);
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
        self.wake_at(node, self.now());
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
            self.clock.advance(at.saturating_duration_since(self.now()));
            match due {
                Due::Act(act) => return Some(Happened::Act(act)),
                Due::Wake(node) => {
                    if self.wakes.get(&node) == Some(&at) {
                        self.wakes.remove(&node);
                        self.run(node, compute);
                    }
                }
            }
        }
    }

    /// Runs a process, and says when it is to be run again.
    fn run(&mut self, node: Node, compute: &mut impl Compute) {
        let (now, second) = (self.now(), self.elapsed().as_secs());
        self.turns = if second == self.turns.0 { (second, self.turns.1 + 1) } else { (second, 0) };
        assert!(self.turns.1 < TURNS_MAX, "{node:?} spins");
        let next = match node {
            Node::Device(number) => {
                let Some(device) = self.devices.get_mut(number) else { return };
                device.run(now, number, compute);
                for (id, event) in device.news.drain(..) {
                    self.happened.push_back(Happened::News { device: number, id, event });
                }
                device.next_at(now, &self.net)
            }
            Node::Cloud(number) => {
                let Some(cloud) = self.clouds.get_mut(number) else { return };
                if cloud.run(now, number, compute) {
                    self.happened.push_back(Happened::Ended { cloud: number });
                }
                cloud.next_at(now, &self.net)
            }
        };
        next.into_iter().for_each(|at| self.wake_at(node, at.max(now + TURN)));
    }

    /// Wakes the processes whose links have completions.
    fn wake_touched(&mut self) {
        for link in self.net.take_touched() {
            let Some(node) = self.links.get(&link).copied() else { continue };
            let next = self.net.next_of(link);
            next.into_iter().for_each(|at| self.wake_at(node, at));
        }
    }

    fn wake_at(&mut self, node: Node, at: Instant) {
        let at = at.max(self.now());
        if self.wakes.get(&node).is_none_or(|before| at < *before) {
            self.wakes.insert(node, at);
            self.put(at, Due::Wake(node));
        }
    }

    fn put(&mut self, at: Instant, due: Due<A>) {
        self.next_number += 1;
        self.due.insert((at, self.next_number), due);
    }
}
