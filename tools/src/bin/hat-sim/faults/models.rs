//! The models of a seed's world: what they compute, what that costs, and the faults that are
//! planted in them. The first cloud may be a liar.

use std::collections::BTreeMap;
use std::time::Duration;

use hat_core::device::DeviceWork;
use hat_plan::{DeviceForward, MiddleForward, MiddleStep};
use hat_transport::conn::{ConnectionId, Frame, FrameSink};
use hat_transport::endpoint::Endpoint;
use hat_transport::frame::Kind;
use hat_transport::message::{Busy, Message, SessionError, SessionErrorCode};
use hat_transport::random::SeededRandom;

use super::failure::Failure;
use super::ledger::{self, DeviceLedger, Ledger};
use super::setting::{DeviceSetting, Manner};
use crate::bed::{Compute, Ran};

/// Number of times that each tried event has happened, and a digest of the history.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    pub times: BTreeMap<&'static str, u64>,
    pub digest: u64,
}

impl Seen {
    pub fn note(&mut self, what: &'static str, times: u64) {
        *self.times.entry(what).or_default() += times;
    }

    pub fn add(&mut self, other: &Self) {
        other.times.iter().for_each(|(what, times)| self.note(what, *times));
        self.digest = self.digest.wrapping_add(other.digest);
    }

    #[cfg(test)]
    pub fn of(&self, what: &str) -> u64 {
        self.times.get(what).copied().unwrap_or_default()
    }
}

/// Layers of a device, and of a stage.
pub enum DeviceModel {
    Ledger(DeviceLedger),
    Real(Box<dyn DeviceForward>),
}

pub enum StageModel {
    Ledger(Ledger),
    Real(Box<dyn MiddleForward>),
}

impl DeviceModel {
    fn forward(&mut self) -> &mut dyn DeviceForward {
        match self {
            Self::Ledger(ledger) => ledger,
            Self::Real(model) => &mut **model,
        }
    }

    /// Garbles the model's store, as a fault may.
    fn garble(&mut self) {
        if let Self::Ledger(ledger) = self {
            ledger.input.garble();
            ledger.tail.iter_mut().for_each(Ledger::garble);
        }
    }
}

/// The models of all processes, what they cost, and the faults that are planted in them.
pub struct Models {
    pub devices: Vec<(DeviceModel, DeviceSetting)>,
    pub clouds: Vec<Vec<StageModel>>,
    pub manner: Manner,
    pub random: SeededRandom,
    /// Costs of a step: of a row, and beside it.
    pub costs: [Duration; 2],
    /// Faults of the next computation: whether they last.
    pub device_faults: Vec<Option<bool>>,
    pub stage_faults: Vec<Option<bool>>,
    pub hangs: Vec<bool>,
    pub seen: Seen,
    /// Fault that an honest peer must not cause.
    pub wrong: Option<Failure>,
}

impl Models {
    fn note(&mut self, what: u64) {
        let digest = &mut self.seen.digest;
        *digest = (*digest ^ what).wrapping_mul(0x0100_0000_01B3).rotate_left(23);
    }
}

impl Compute for Models {
    fn device(&mut self, _: Duration, device: usize, work: DeviceWork<'_>) -> Ran {
        self.seen.note("computations", 1);
        let rows = match &work {
            DeviceWork::Input { tokens, .. } => tokens.len(),
            DeviceWork::Tail { plan, .. } => plan.rows(),
            DeviceWork::Head { .. } | DeviceWork::Draft(_) => 1,
        };
        let (model, setting) = &mut self.devices[device];
        work.run(model.forward());
        let fault = self.device_faults[device].take().map(ledger::fault);
        if fault.is_some() {
            model.garble();
        }
        let took = setting.call + setting.row * u32::try_from(rows).expect("a chunk is small");
        self.note(rows as u64);
        Ran { took: Some(took), fault }
    }

    fn stage(&mut self, (cloud, stage): (usize, usize), step: &mut MiddleStep) -> Ran {
        self.seen.note("steps", 1);
        match &mut self.clouds[cloud][stage] {
            StageModel::Ledger(ledger) => MiddleForward::forward(ledger, step),
            StageModel::Real(model) => model.forward(step),
        }
        let fault = self.stage_faults[cloud].take().map(ledger::fault);
        if fault.is_some()
            && let StageModel::Ledger(ledger) = &mut self.clouds[cloud][stage]
        {
            ledger.garble();
        }
        if std::mem::take(&mut self.hangs[cloud]) {
            return Ran { took: None, fault };
        }
        let rows = u32::try_from(step.plan.rows()).expect("within the row budget");
        self.note(u64::from(rows) << 32);
        Ran { took: Some(self.costs[1] + self.costs[0] * rows), fault }
    }

    fn overhears(
        &mut self,
        cloud: usize,
        endpoint: &mut Endpoint,
        from: ConnectionId,
        frame: &Frame,
    ) -> bool {
        let manner = match self.manner {
            Manner::Honest => return true,
            _ if cloud != 0 => return true,
            Manner::Fickle => {
                let all = [Manner::Honest, Manner::Evicts, Manner::Refuses, Manner::Mute];
                all[self.random.below(4) as usize]
            }
            other => other,
        };
        let retry_after_ms = [0, 1, 500, u32::MAX][self.random.below(4) as usize];
        let code = match self.random.below(3) {
            0 => SessionErrorCode::Resource,
            1 => SessionErrorCode::NoSuchSession,
            _ => SessionErrorCode::Evicted,
        };
        let answer = match (manner, frame.kind) {
            (Manner::Refuses, Kind::Open) => Message::Busy(Busy { retry_after_ms }),
            (Manner::Evicts, Kind::Rows) => {
                Message::SessionError(SessionError { code, text: "as I like" })
            }
            (Manner::Mute, _) => return false,
            _ => return true,
        };
        let _ = endpoint.send_message(from, frame.session, &answer);
        false
    }

    fn hears(&mut self, device: usize, frame: &Frame) {
        self.note(frame.body.len() as u64 ^ (u64::from(frame.session) << 40));
        let is_honest = is_honest(self.manner, &self.devices[device].1);
        if frame.kind != Kind::SessionError || !is_honest {
            return;
        }
        if let Ok(Message::SessionError(SessionError { code, text })) =
            Message::decode(frame.kind, &frame.body)
        {
            use SessionErrorCode::{Evicted, NoSuchSession, Resource};
            if !matches!(code, Evicted | NoSuchSession | Resource) {
                let text = text.to_owned();
                self.wrong = Some(Failure::Accused { device, code, text });
            }
        }
    }
}

pub fn is_honest(manner: Manner, device: &DeviceSetting) -> bool {
    manner == Manner::Honest || device.cloud != 0
}
