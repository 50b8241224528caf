//! All devices of a run, and the loop that asks them.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::bail;
use hat_tools::random::{Purpose, exponential, unit};
use indicatif::{ProgressBar, ProgressStyle};

use crate::Args;
use crate::child::Child;
use crate::cloud::{CloudFigures, CloudProcess};
use crate::figures::Figures;
use crate::plan::Plan;
use crate::protocol::{End, Outcome, Report};

/// The longest that the loop sleeps.
const LOOK: Duration = Duration::from_millis(50);
/// Interval at which the cloud's memory is read.
const MEMORY: Duration = Duration::from_secs(1);
/// Time that devices may take to start, beside the time to connect.
const START: Duration = Duration::from_secs(60);
/// Time to wait at the end while no answer comes.
const DRAIN: Duration = Duration::from_secs(300);

/// Report of a device, with its number and generation.
struct Note {
    device: usize,
    generation: u64,
    report: Report,
}

/// A device's place: when one ends as planned, another takes it.
#[derive(Default)]
struct Place {
    device: Option<Child>,
    generation: u64,
    ready: bool,
    /// Requests under way: how late they began, milliseconds.
    away: HashMap<u64, f64>,
    ends: Option<Instant>,
    /// Requests that are over.
    outcomes: Vec<Outcome>,
}

/// A run under way.
pub(crate) struct Fleet<'a> {
    plan: &'a Plan<'a>,
    cloud: Option<CloudProcess>,
    places: Vec<Place>,
    notes: Receiver<Note>,
    say: Sender<Note>,
    begun: Instant,
    next_id: u64,
    /// Time at which the next request is due, in seconds from the beginning.
    due_s: f64,
    ending: Vec<JoinHandle<()>>,
    replaced: u64,
    first_failure: Option<String>,
    bar: ProgressBar,
}

/// Result of a run.
pub(crate) struct Ended {
    pub(crate) figures: Figures,
    /// Requests of each device.
    pub(crate) outcomes: Vec<Vec<Outcome>>,
    pub(crate) first_failure: Option<String>,
}

impl<'a> Fleet<'a> {
    /// Starts all devices, and waits until they are connected.
    pub(crate) fn start(
        plan: &'a Plan<'a>,
        cloud: Option<CloudProcess>,
        interrupted: &AtomicBool,
    ) -> anyhow::Result<Self> {
        let (say, notes) = channel();
        let mut fleet = Self {
            due_s: plan.gap_s(0),
            places: (0..plan.args.devices).map(|_| Place::default()).collect(),
            plan,
            cloud,
            notes,
            say,
            begun: Instant::now(),
            next_id: 0,
            ending: vec![],
            replaced: 0,
            first_failure: None,
            bar: bar(plan),
        };
        for device in 0..fleet.places.len() {
            fleet.spawn(device)?;
        }
        let end = Instant::now() + plan.args.connect() + START;
        while fleet.places.iter().any(|place| !place.ready) {
            if interrupted.load(Ordering::Relaxed) {
                bail!("interrupted");
            }
            if Instant::now() > end {
                bail!("not all devices are ready after {} s", (end - fleet.begun).as_secs());
            }
            let Ok(note) = fleet.notes.recv_timeout(LOOK) else { continue };
            match note.report {
                Report::Ready => fleet.places[note.device].ready = true,
                Report::Failed(reason) => bail!("device {}: {reason}", note.device),
                _ => bail!("device {} ended before it was ready", note.device),
            }
        }
        fleet.begun = Instant::now();
        for device in 0..fleet.places.len() {
            fleet.places[device].ends = fleet.end_of_generation(device);
        }
        Ok(fleet)
    }

    /// Starts the device of a place.
    fn spawn(&mut self, device: usize) -> anyhow::Result<()> {
        let place = &mut self.places[device];
        let (say, generation) = (self.say.clone(), place.generation);
        // Nobody listens once the run is over.
        let hear = move |report| _ = say.send(Note { device, generation, report });
        let Args { role_bundle, role_cloud, .. } = self.plan.args;
        place.device = Some(Child::start("device", role_bundle, role_cloud, hear)?);
        Ok(())
    }

    fn end_of_generation(&self, device: usize) -> Option<Instant> {
        let generation = self.places[device].generation;
        let seconds = exponential(
            1.0 / self.plan.args.life_s?,
            self.plan.args.seed,
            Purpose::Life,
            device as u64,
            2 * generation,
        );
        Instant::now().checked_add(Duration::try_from_secs_f64(seconds).ok()?)
    }

    /// Asks until the plan's end, waits for the last answers, and ends all devices.
    pub(crate) fn run(mut self, interrupted: &Arc<AtomicBool>) -> anyhow::Result<Ended> {
        let mut looked = None;
        let mut drained: Option<Instant> = None;
        while !interrupted.load(Ordering::Relaxed) {
            let now = Instant::now();
            let at_s = (now - self.begun).as_secs_f64();
            let over = self.is_over(at_s);
            if over {
                let end = *drained.get_or_insert(now + DRAIN);
                if now > end || self.places.iter().all(|place| place.away.is_empty()) {
                    break;
                }
            } else {
                self.ask_due(at_s)?;
                self.end_lives(now)?;
            }
            if looked.is_none_or(|looked| now - looked >= MEMORY) {
                looked = Some(now);
                self.look(at_s)?;
            }
            let due = Duration::try_from_secs_f64(self.due_s - at_s).unwrap_or(Duration::ZERO);
            let wait = if over || self.plan.args.rate.is_none() { LOOK } else { due.min(LOOK) };
            let first = self.notes.recv_timeout(wait);
            drained = drained.filter(|_| first.is_err());
            for note in first.into_iter().chain(self.notes.try_iter().collect::<Vec<_>>()) {
                self.hear(note);
            }
        }
        self.finish()
    }

    fn is_over(&self, at_s: f64) -> bool {
        self.plan.requests.is_some_and(|requests| self.next_id >= requests)
            || self.plan.args.seconds.is_some_and(|seconds| at_s >= seconds)
            || self.places.iter().all(|place| place.device.is_none())
    }

    fn look(&mut self, at_s: f64) -> anyhow::Result<()> {
        if let Some(cloud) = &mut self.cloud {
            cloud.look(at_s)?;
        }
        let place = if self.plan.requests.is_some() { self.next_id } else { at_s as u64 };
        self.bar.set_position(place);
        let away: usize = self.places.iter().map(|place| place.away.len()).sum();
        let over: usize = self.places.iter().map(|place| place.outcomes.len()).sum();
        self.bar.set_message(format!("{over} requests over, {away} under way"));
        Ok(())
    }

    /// Sends the requests that are due: by the clock, or to each device that has nothing to do.
    fn ask_due(&mut self, at_s: f64) -> anyhow::Result<()> {
        if self.plan.args.rate.is_none() {
            for device in 0..self.places.len() {
                let place = &self.places[device];
                if place.ready && place.away.is_empty() && !self.is_over(at_s) {
                    self.ask(device, 0.0)?;
                }
            }
            return Ok(());
        }
        while self.due_s <= at_s && !self.is_over(at_s) {
            let count = self.places.len();
            let share = unit(self.plan.args.seed, Purpose::Device, self.next_id, 0);
            let chosen = (share * count as f64) as usize;
            let ready = (0..count).map(|more| (chosen + more) % count);
            let ready = ready.into_iter().find(|device| self.places[*device].ready);
            let Some(device) = ready else { break };
            self.ask(device, 1e3 * (at_s - self.due_s))?;
            self.due_s += self.plan.gap_s(self.next_id);
        }
        Ok(())
    }

    fn ask(&mut self, device: usize, late_ms: f64) -> anyhow::Result<()> {
        let ask = self.plan.ask(self.next_id)?;
        let place = &mut self.places[device];
        place.away.insert(ask.id, late_ms);
        self.next_id += 1;
        // If it reads no more, its end is on the way as a note, and this request fails with it.
        let _ = place.device.as_mut().map(|device| device.say(&ask));
        Ok(())
    }

    /// Ends the devices whose time has come, one half without a close frame, and starts others.
    fn end_lives(&mut self, now: Instant) -> anyhow::Result<()> {
        for device in 0..self.places.len() {
            let place = &mut self.places[device];
            if place.ends.is_none_or(|ends| ends > now) {
                continue;
            }
            let Some(mut ended) = place.device.take() else { continue };
            let share =
                unit(self.plan.args.seed, Purpose::Life, device as u64, 2 * place.generation + 1);
            if share < 0.5 {
                ended.kill();
            }
            self.ending.retain(|thread| !thread.is_finished());
            self.ending.push(std::thread::spawn(move || drop(ended)));
            let lost = place.away.drain().map(|(ask, _)| Outcome::of(ask, End::Lost));
            place.outcomes.extend(lost);
            place.generation += 1;
            place.ready = false;
            self.replaced += 1;
            self.spawn(device)?;
            self.places[device].ends = self.end_of_generation(device);
        }
        Ok(())
    }

    fn hear(&mut self, note: Note) {
        let place = &mut self.places[note.device];
        if place.generation != note.generation {
            return;
        }
        match note.report {
            Report::Ready => place.ready = true,
            Report::Ended(outcome) => self.end(note.device, outcome),
            Report::Failed(why) => self.fail(note.device, &why),
            _ => self.fail(note.device, "it ended by itself"),
        }
    }

    /// A device ended that should not have, and with it what it had to do. It is not replaced.
    fn fail(&mut self, device: usize, why: &str) {
        let place = &mut self.places[device];
        if place.device.take().is_none() {
            return;
        }
        (place.ready, place.ends) = (false, None);
        self.first_failure.get_or_insert(format!("device {device}: {why}"));
        let end = End::Failed(why.to_owned());
        let away: Vec<u64> = place.away.keys().copied().collect();
        if away.is_empty() {
            place.outcomes.push(Outcome::of(self.next_id, end));
        } else {
            away.into_iter().for_each(|ask| self.end(device, Outcome::of(ask, end.clone())));
        }
    }

    fn end(&mut self, device: usize, mut outcome: Outcome) {
        let place = &mut self.places[device];
        let Some(late_ms) = place.away.remove(&outcome.ask) else { return };
        outcome.late_ms = late_ms;
        if let End::Failed(why) | End::Refused(why) = &outcome.end {
            let text = format!("request {} of device {device}: {why}", outcome.ask);
            self.first_failure.get_or_insert(text);
        }
        place.outcomes.push(outcome);
    }

    fn finish(mut self) -> anyhow::Result<Ended> {
        let seconds = self.begun.elapsed().as_secs_f64();
        self.look(seconds)?;
        for device in 0..self.places.len() {
            for ask in self.places[device].away.keys().copied().collect::<Vec<_>>() {
                self.end(device, Outcome::of(ask, End::Failed("no answer".to_owned())));
            }
        }
        // What they do with the cloud at their end counts, too.
        self.end_all();
        let cloud = match &mut self.cloud {
            None => None,
            Some(cloud) => {
                Some(CloudFigures { counters: cloud.counters()?, memory: cloud.memory().to_vec() })
            }
        };
        self.bar.finish_and_clear();
        let outcomes = |place: &mut Place| std::mem::take(&mut place.outcomes);
        let outcomes: Vec<_> = self.places.iter_mut().map(outcomes).collect();
        let mut figures = Figures::new(&outcomes, seconds);
        figures.cloud = cloud;
        figures.replaced = self.replaced;
        Ok(Ended { figures, outcomes, first_failure: self.first_failure.take() })
    }

    /// All devices at one time: those that are connected send a close frame.
    fn end_all(&mut self) {
        for place in &mut self.places {
            let ready = place.ready;
            let end = |device: &mut Child| if ready { device.close() } else { device.kill() };
            place.device.iter_mut().for_each(end);
        }
        for place in &mut self.places {
            place.device = None;
        }
        for thread in self.ending.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for Fleet<'_> {
    fn drop(&mut self) {
        self.end_all();
    }
}

fn bar(plan: &Plan<'_>) -> ProgressBar {
    let length = plan.requests.or(plan.args.seconds.map(|seconds| seconds as u64));
    let bar = ProgressBar::new(length.unwrap_or(0));
    let unit = if plan.requests.is_some() { "requests" } else { "s" };
    let template = format!("{{bar:40}} {{pos}}/{{len}} {unit}, {{msg}}");
    match ProgressStyle::with_template(&template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
