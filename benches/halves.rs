//! The default model's two halves, one after the other in one process, any number of rows a step.

use hat_compute::backend::cpu::CpuBackend;
use hat_compute::{DeviceModel, MiddleModel, open};
use hat_core::page::pages_for;
use hat_core::sequence::Sequence;
use hat_engine::options::{Processor, TokenId};
use hat_loader::Bundle;
use hat_plan::{DeviceForward as _, MiddleForward as _, MiddleStep};

/// Both submodels, and one sequence of theirs.
pub struct Halves {
    /// The device's half of the bundle.
    pub bundle: Bundle,
    /// The cloud's.
    pub cloud: Bundle,
    /// The device's submodel.
    pub device: DeviceModel<CpuBackend>,
    middle: MiddleModel<CpuBackend>,
    /// The last step: its plan and its rows. `[rows, hidden_size]`
    pub step: MiddleStep,
    context: u32,
}

impl Halves {
    /// Opens them, for steps of `rows` rows, `head_rows` rows of the head, and a sequence of
    /// `context`.
    ///
    /// # Panics
    /// If the default model cannot be had.
    #[must_use]
    pub fn open(threads: usize, rows: usize, head_rows: usize, context: usize) -> Self {
        let path = crate::default_bundle();
        let [bundle, cloud] =
            ["device", "cloud"].map(|role| Bundle::open(&path.join(role)).expect("a bundle"));
        let backend = || open::cpu(Processor::Auto, threads).expect("a backend");
        let (split, layers) = (bundle.manifest().split_layer, bundle.config().num_hidden_layers);
        let (pages, middle) = (pages_for(context), split..layers);
        let device = DeviceModel::load(backend(), &bundle, split, rows, pages).expect("layers");
        Self {
            device: device.with_head_rows(head_rows).expect("memory"),
            middle: MiddleModel::load(backend(), &cloud, middle, rows, pages).expect("layers"),
            step: MiddleStep {
                entry_layers: vec![split as u32],
                exit_layer: layers as u32,
                ..MiddleStep::default()
            },
            context: context as u32,
            bundle,
            cloud,
        }
    }

    /// The device's layers for `tokens` at the positions from `first` on. What stood there is
    /// overwritten, as after a roll-back. The rows come to lie in `step.hidden`.
    ///
    /// # Panics
    /// If they do not fit.
    pub fn shallow(&mut self, first: usize, tokens: &[TokenId]) {
        let pages = (0..pages_for(self.context as usize) as u32).collect();
        let mut sequence = Sequence::new(pages, self.context);
        let (tip, count) = (first as u32, tokens.len() as u32);
        if first > 0 {
            sequence.append_committed(1, tip, 0).expect("rows that fit");
        }
        let place = sequence.append_committed(tip + 1, count, tip).expect("rows that fit");
        let MiddleStep { plan, hidden, .. } = &mut self.step;
        plan.clear();
        plan.push_committed(place, count);
        plan.end_sequence(sequence.pages());
        hidden.resize(tokens.len() * self.bundle.config().hidden_size, 0.0);
        self.device.input(&plan.batch(), tokens, hidden);
    }

    /// The middle layers for the rows of the step, in place.
    pub fn deep(&mut self) {
        self.middle.forward(&mut self.step);
    }
}
