//! A cloud whose steps wait for something first.

use hat_compute::MiddleModel;
use hat_compute::open;
use hat_engine::options::Processor;
use hat_engine::testkit::pool_pages;
use hat_engine::{Cloud, CloudConfig};
use hat_plan::{Computes, MiddleForward, MiddleStep};

struct Hooked<M, F> {
    model: M,
    before: F,
}

impl<M: MiddleForward, F: FnMut(usize) + Send> Computes for Hooked<M, F> {
    fn describe(&self) -> String {
        self.model.describe()
    }
}

impl<M: MiddleForward, F: FnMut(usize) + Send> MiddleForward for Hooked<M, F> {
    fn forward(&mut self, step: &mut MiddleStep) {
        (self.before)(step.plan.rows());
        self.model.forward(step);
    }
}

/// A cloud that calls `before` at the beginning of each step, on its step thread.
pub fn cloud(config: CloudConfig, mut before: impl FnMut() + Send + 'static) -> Cloud {
    cloud_of_rows(config, move |_| before())
}

/// As [`cloud`]; `before` is told how many rows the step has.
pub fn cloud_of_rows(config: CloudConfig, before: impl FnMut(usize) + Send + 'static) -> Cloud {
    let half = hat_loader::Bundle::open(&config.bundle).unwrap();
    let pages = pool_pages(&config);
    let rows = config.limits.step_rows_max as usize;
    let layers = half.split().layers(hat_loader::Submodel::Middle);
    let backend = open::cpu(Processor::Auto, 1).unwrap();
    let model = MiddleModel::load(backend, &half, layers, rows, pages as usize).unwrap();
    Cloud::serve(config, &half, Box::new(Hooked { model, before }), pages).unwrap()
}
