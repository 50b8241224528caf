//! `--whole`: one answer by the whole model in one process, for comparison with the split engine.

use std::path::Path;

use hat_compute::backend::Backend;
use hat_compute::{Cross, Crossing, WholeModel};
use hat_core::answer::Answer;
use hat_core::metrics::Meter;
use hat_core::request::FinishReason;
use hat_loader::Bundle;
use hat_plan::Computes as _;

use crate::config::Codec;
use crate::device::open_bundle;
use crate::text::Text;
use crate::verify::Verify;
use crate::{Error, Event, Metrics, Request};
use hat_transport::clock::{Clock, SystemClock};

/// The whole model with its tokenizer. One answer at a time.
pub struct ReferenceRun<B: Backend> {
    device: Bundle,
    text: Text,
    model: WholeModel<B>,
    context: u32,
    logits: Vec<f32>, // [vocab_size]
    clock: SystemClock,
}

impl<B: Backend> ReferenceRun<B> {
    /// Loads both halves below `bundle` (`device/` and `cloud/`). Rows go through `wire` where
    /// they would cross the link if the device ran `split_layer` layers.
    ///
    /// # Errors
    /// [`Error::Load`] or [`Error::Input`].
    pub fn open(
        backend: B,
        bundle: &Path,
        split_layer: Option<u32>,
        wire: Codec,
        context_max: u32,
    ) -> Result<Self, Error> {
        Self::open_verified(backend, bundle, split_layer, wire, context_max, &Verify::default())
    }

    /// As [`ReferenceRun::open`], with its files verified as `verify` says.
    ///
    /// # Errors
    /// As [`ReferenceRun::open`].
    pub fn open_verified(
        backend: B,
        bundle: &Path,
        split_layer: Option<u32>,
        wire: Codec,
        context_max: u32,
        verify: &Verify,
    ) -> Result<Self, Error> {
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let device = open_bundle(&bundle.join("device"), verify, threads)?;
        let cloud_path = bundle.join("cloud");
        let mut cloud =
            Bundle::open(&cloud_path).map_err(|error| Error::bundle(&cloud_path, error))?;
        verify.check(&mut cloud, threads)?;
        if device.model_id() != cloud.model_id() {
            return Err(Error::bundle(bundle, "device/ and cloud/ hold two different models"));
        }
        let layers = device.config().num_hidden_layers;
        let exit = layers - device.manifest().tail_layers;
        let split = split_layer.map_or(device.manifest().split_layer, |layer| layer as usize);
        if split >= exit {
            let reason = format!("{split} is not below layer {exit}, where rows come back");
            return Err(Error::field("split_layer", reason));
        }
        let context = (context_max as usize).min(device.config().max_position_embeddings);
        let model =
            WholeModel::load(backend, &device, &cloud, split..exit, through_codec(wire), context)?;
        Ok(Self {
            text: Text::open(&device)?,
            logits: vec![0.0; device.config().vocab_size],
            context: u32::try_from(context).expect("at most context_max"),
            clock: SystemClock,
            model,
            device,
        })
    }

    /// One answer. `on_event` hears what a [`crate::Generation`] would report.
    ///
    /// # Errors
    /// As [`crate::Engine::generate`], and [`Error::Request`].
    pub fn generate(
        &mut self,
        request: Request,
        mut on_event: impl FnMut(&Event),
    ) -> Result<(FinishReason, Box<Metrics>), Error> {
        let vocab_size = self.device.config().vocab_size;
        let (prepared, _) = self.text.prepare(request, self.context)?;
        let mut meter = Meter::new(self.clock.now(), prepared.prompt_n());
        meter.computed_in(self.model.arithmetic_id());
        let mut answer = Answer::new(&prepared, self.text.vocabulary(), vocab_size);
        self.model.reset();
        let (last, prompt) = prepared.prompt.split_last().expect("a prompt has a token");
        for token in prompt {
            self.model.step(*token, None)?;
        }
        let mut token = *last;
        let finish_reason = loop {
            let position = self.model.position();
            self.model.step(token, Some(&mut self.logits))?;
            let emitted = answer.take(&self.logits, position, self.text.vocabulary())?;
            if let Some(next) = emitted.token {
                meter.token(self.clock.now());
                token = next;
            }
            if let Some(event) = &emitted.event {
                on_event(event);
            }
            if let Some(reason) = emitted.finish {
                break reason;
            }
        };
        let text = answer.finish();
        let metrics = Box::new(answer.metrics(&meter));
        on_event(&Event::Done { text, finish_reason, metrics: metrics.clone() });
        Ok((finish_reason, metrics))
    }
}

/// The link's effect on rows: there and back through the codec of each direction.
#[must_use]
pub fn through_codec(codec: Codec) -> Box<Cross> {
    let mut wire = Vec::new();
    Box::new(move |crossing, row| {
        let codec = if crossing == Crossing::Up { codec } else { codec.down() };
        let columns = row.len();
        wire.resize(codec.row_bytes(columns), 0);
        codec.encode(row, columns, &mut wire).is_ok() && codec.decode(&wire, columns, row).is_ok()
    })
}
