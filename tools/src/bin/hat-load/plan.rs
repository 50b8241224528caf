//! Requests, their times, and their devices. All of it follows from the seed.

use hat_tools::random::{Purpose, exponential, unit};

use crate::prompts::Prompts;
use crate::speech::Ask;

pub(crate) struct Plan {
    pub(crate) devices: usize,
    /// True if each device is a process of its own.
    pub(crate) processes: bool,
    /// Requests a second; `None` asks each device again when it has answered.
    pub(crate) rate: Option<f64>,
    pub(crate) requests: Option<u64>,
    pub(crate) seconds: Option<f64>,
    pub(crate) prompts: Prompts,
    pub(crate) max_tokens: u32,
    pub(crate) eos: bool,
    pub(crate) draft: String,
    /// Share of the answers that are given up.
    pub(crate) cancel: f64,
    /// Mean life of a device.
    pub(crate) life_s: Option<f64>,
    pub(crate) seed: u64,
    pub(crate) check_whole: bool,
}

impl Plan {
    /// From request `id - 1` to request `id`, seconds.
    pub(crate) fn gap_s(&self, id: u64) -> f64 {
        self.rate.map_or(0.0, |rate| exponential(rate, self.seed, Purpose::Arrival, id, 0))
    }

    pub(crate) fn ask(&self, id: u64) -> anyhow::Result<Ask> {
        let draw = |second| unit(self.seed, Purpose::Cancel, id, second);
        let cancelled = draw(0) < self.cancel;
        Ok(Ask {
            id,
            prompt: self.prompts.prompt(id)?,
            max_tokens: self.max_tokens,
            eos: self.eos,
            draft: self.draft.clone(),
            cancel_after: cancelled.then(|| (draw(1) * f64::from(self.max_tokens)) as u32),
            keep: self.check_whole,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::speech::Prompt;

    #[test]
    fn requests_come_at_the_rate_and_a_share_of_them_is_given_up() {
        let plan = Plan {
            devices: 3,
            processes: false,
            rate: Some(20.0),
            requests: None,
            seconds: None,
            prompts: Prompts::Given(vec![Prompt::Chat("a".to_owned())]),
            max_tokens: 10,
            eos: false,
            draft: "off".to_owned(),
            cancel: 0.25,
            life_s: None,
            seed: 5,
            check_whole: false,
        };
        let mean = (0..4000).map(|id| plan.gap_s(id)).sum::<f64>() / 4000.0;
        assert!((mean * 20.0 - 1.0).abs() < 0.05, "{mean}");
        let cancelled: Vec<u32> =
            (0..4000).filter_map(|id| plan.ask(id).unwrap().cancel_after).collect();
        let share = cancelled.len() as f64 / 4000.0;
        assert!((share - 0.25).abs() < 0.03, "{share}");
        assert!((0..10).all(|after| cancelled.contains(&after)) && !cancelled.contains(&10));
        assert_eq!(Plan { rate: None, ..plan }.gap_s(7), 0.0);
    }
}
