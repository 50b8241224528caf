//! Requests, their times, and their devices. All of it follows from the seed.

use hat_tools::random::{Purpose, exponential, unit};

use crate::Args;
use crate::prompts::Prompts;
use crate::protocol::Ask;

pub(crate) struct Plan<'a> {
    pub(crate) args: &'a Args,
    pub(crate) requests: Option<u64>,
    pub(crate) prompts: Prompts,
}

impl<'a> Plan<'a> {
    pub(crate) fn new(args: &'a Args, prompts: Prompts) -> Self {
        let endless = args.requests.is_none() && args.seconds.is_none();
        let requests = args.requests.or(endless.then_some(10 * u64::from(args.devices)));
        Self { args, requests, prompts }
    }

    /// From request `id - 1` to request `id`, seconds.
    pub(crate) fn gap_s(&self, id: u64) -> f64 {
        self.args
            .rate
            .map_or(0.0, |rate| exponential(rate, self.args.seed, Purpose::Arrival, id, 0))
    }

    pub(crate) fn ask(&self, id: u64) -> anyhow::Result<Ask> {
        let draw = |second| unit(self.args.seed, Purpose::Cancel, id, second);
        let cancelled = draw(0) < self.args.cancel;
        Ok(Ask {
            id,
            prompt: self.prompts.prompt(id)?,
            max_tokens: self.args.max_tokens,
            eos: self.args.eos,
            draft: self.args.draft.name().to_owned(),
            cancel_after: cancelled.then(|| (draw(1) * f64::from(self.args.max_tokens)) as u32),
            keep: self.args.check_whole,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::protocol::Prompt;

    #[test]
    fn requests_come_at_the_rate_and_a_share_of_them_is_given_up() {
        let line = ["hat-load", "--rate=20", "--max-tokens=10", "--cancel=0.25", "--seed=5"];
        let mut args = Args::parse_from(line);
        let plan = Plan::new(&args, Prompts::Given(vec![Prompt::Chat("a".to_owned())]));
        let mean = (0..4000).map(|id| plan.gap_s(id)).sum::<f64>() / 4000.0;
        assert!((mean * 20.0 - 1.0).abs() < 0.05, "{mean}");
        let cancelled: Vec<u32> =
            (0..4000).filter_map(|id| plan.ask(id).unwrap().cancel_after).collect();
        let share = cancelled.len() as f64 / 4000.0;
        assert!((share - 0.25).abs() < 0.03, "{share}");
        assert!((0..10).all(|after| cancelled.contains(&after)) && !cancelled.contains(&10));
        let prompts = plan.prompts;
        args.rate = None;
        assert_eq!(Plan::new(&args, prompts).gap_s(7), 0.0);
    }
}
