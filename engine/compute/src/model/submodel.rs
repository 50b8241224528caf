//! Submodels: the device's input and output layers with embedding and head, the cloud's middle.

use std::any::Any;
use std::ops::Range;

use hat_loader::Bundle;
use hat_plan::{
    AttendBatch, BackendError, DeviceForward, MiddleForward, MiddleStep, RowMove, TokenId,
};

use super::llama::{DecoderLayer, ModelShape, Scratch, Step, Tensors, weight};
use crate::LoadError;
use crate::backend::{Backend, LinearArgs, TopLogit, Write};

/// Embedding, first layers, last layers, final norm and head on one backend.
pub struct DeviceModel<B: Backend> {
    backend: B,
    shape: ModelShape,
    embed_tokens: B::Weight,
    input: Vec<DecoderLayer<B>>,
    tail: Vec<DecoderLayer<B>>,
    norm: B::Weight,
    lm_head: Option<B::Weight>, // None: the embedding is the head too
    kv: B::Kv,                  // input layers first, then tail layers
    scratch: Scratch<B>,
    x: B::Buffer,      // [capacity, hidden_size]
    row: B::Buffer,    // [head rows, hidden_size]
    normed: B::Buffer, // [head rows, hidden_size]
    logits: B::Buffer, // [head rows, vocab_size]
}

impl<B: Backend> DeviceModel<B> {
    /// The device half of a bundle, run with its first `split_layer` layers, for steps of at most
    /// `capacity` rows and a KV store of `pages` pages.
    ///
    /// # Errors
    /// [`LoadError::Bundle`] or [`LoadError::Backend`].
    pub fn load(
        mut backend: B,
        bundle: &Bundle,
        split_layer: usize,
        capacity: usize,
        pages: usize,
    ) -> Result<Self, LoadError> {
        let config = bundle.config();
        let shape = ModelShape::new(config);
        let layers = shape.num_hidden_layers;
        let tail_layers = bundle.manifest().tail_layers;
        let input = DecoderLayer::load_range(&mut backend, bundle, 0..split_layer)?;
        let tail = DecoderLayer::load_range(&mut backend, bundle, layers - tail_layers..layers)?;
        let lm_head = if config.tie_word_embeddings {
            None
        } else {
            Some(weight(&mut backend, bundle, "lm_head.weight")?)
        };
        Ok(Self {
            embed_tokens: weight(&mut backend, bundle, "model.embed_tokens.weight")?,
            norm: weight(&mut backend, bundle, "model.norm.weight")?,
            kv: backend.kv(shape.kv(split_layer + tail_layers, pages))?,
            scratch: Scratch::new(&mut backend, &shape, capacity)?,
            x: backend.alloc(capacity, shape.hidden_size)?,
            row: backend.alloc(1, shape.hidden_size)?,
            normed: backend.alloc(1, shape.hidden_size)?,
            logits: backend.alloc(1, shape.vocab_size)?,
            input,
            tail,
            lm_head,
            shape,
            backend,
        })
    }

    /// The backend, for tests that plant faults.
    #[doc(hidden)]
    pub fn backend(&mut self) -> &mut B {
        &mut self.backend
    }

    /// The same with room for `rows` rows at once in [`DeviceForward::head`].
    ///
    /// # Errors
    /// [`BackendError`] if there is no memory for them.
    pub fn with_head_rows(mut self, rows: usize) -> Result<Self, BackendError> {
        let Self { backend, shape, row, normed, logits, .. } = &mut self;
        *row = backend.alloc(rows, shape.hidden_size)?;
        *normed = backend.alloc(rows, shape.hidden_size)?;
        *logits = backend.alloc(rows, shape.vocab_size)?;
        Ok(self)
    }

    /// The final norm of rows `[rows, hidden_size]`, to `self.normed`; returns how many.
    fn norm_rows(&mut self, hidden: &[f32]) -> usize {
        let Self { backend, shape, row, normed, .. } = self;
        let rows = hidden.len() / shape.hidden_size;
        backend.upload(hidden, row);
        backend.rms_norm(rows, row, &self.norm, shape.rms_norm_eps, normed);
        rows
    }
}

as_its_backend!(DeviceModel);

impl<B: Backend> DeviceForward for DeviceModel<B> {
    fn input(&mut self, plan: &AttendBatch<'_>, tokens: &[TokenId], hidden: &mut [f32]) {
        assert_eq!(plan.rows(), tokens.len(), "one token a row");
        let Self { backend, shape, input, kv, scratch, x, .. } = self;
        backend.embed(tokens, &self.embed_tokens, x);
        scratch.start_step(backend, shape, plan.positions);
        let step = Step::begin(backend, shape, *plan, kv);
        for (kv_layer, layer) in input.iter().enumerate() {
            layer.forward(backend, &step, kv_layer, x, kv, scratch);
        }
        backend.download(x, 0, hidden);
    }

    fn tail(&mut self, plan: &AttendBatch<'_>, hidden: &mut [f32]) {
        let Self { backend, shape, input, tail, kv, scratch, x, .. } = self;
        if tail.is_empty() {
            return;
        }
        backend.upload(hidden, x);
        scratch.start_step(backend, shape, plan.positions);
        let step = Step::begin(backend, shape, *plan, kv);
        for (kv_layer, layer) in (input.len()..).zip(tail) {
            layer.forward(backend, &step, kv_layer, x, kv, scratch);
        }
        backend.download(x, 0, hidden);
    }

    fn head(&mut self, hidden: &[f32], logits: &mut [f32]) {
        let rows = self.norm_rows(hidden);
        let Self { backend, normed, .. } = self;
        let head = self.lm_head.as_ref().unwrap_or(&self.embed_tokens);
        backend.linear(rows, normed, Write::Store, LinearArgs::of(head, &mut self.logits));
        backend.download(&self.logits, 0, logits);
    }

    fn argmax(&mut self, hidden: &[f32]) -> Option<(TokenId, f32)> {
        self.norm_rows(hidden);
        let head = self.lm_head.as_ref().unwrap_or(&self.embed_tokens);
        let mut top = [TopLogit::NONE];
        let finite = self.backend.linear_top(1, &self.normed, head, &mut top);
        finite.then_some((top[0].column, top[0].value))
    }

    fn compact(&mut self, moves: &[RowMove]) {
        if !moves.is_empty() {
            self.backend.compact(moves, &mut self.kv);
        }
    }
}

/// A run of decoder layers on one backend.
pub struct MiddleModel<B: Backend> {
    backend: B,
    shape: ModelShape,
    first_layer: usize,
    layers: Vec<DecoderLayer<B>>,
    kv: B::Kv,
    scratch: Scratch<B>,
    x: B::Buffer, // [capacity, hidden_size]
    capacity: usize,
    /// Description of the way in which the next stage takes rows from this one's memory, if it
    /// does.
    hands_over: Option<String>,
}

impl<B: Backend> MiddleModel<B> {
    /// Layers `range` of the model, from a cloud bundle that holds them, for steps of at most
    /// `capacity` rows and a KV store of `pages` pages.
    ///
    /// # Errors
    /// [`LoadError::Bundle`] or [`LoadError::Backend`].
    pub fn load(
        mut backend: B,
        bundle: &impl Tensors,
        range: Range<usize>,
        capacity: usize,
        pages: usize,
    ) -> Result<Self, LoadError> {
        let shape = ModelShape::new(bundle.config());
        let layers = DecoderLayer::load_range(&mut backend, bundle, range.clone())?;
        Ok(Self {
            first_layer: range.start,
            kv: backend.kv(shape.kv(layers.len(), pages))?,
            scratch: Scratch::new(&mut backend, &shape, capacity)?,
            x: backend.alloc(capacity, shape.hidden_size)?,
            layers,
            shape,
            backend,
            capacity,
            hands_over: None,
        })
    }

    /// The backend, for tests that plant faults.
    #[doc(hidden)]
    pub fn backend(&mut self) -> &mut B {
        &mut self.backend
    }

    /// True if no row of a step is computed here.
    fn is_passed(&self, step: &MiddleStep) -> bool {
        let end = self.first_layer + self.layers.len();
        let enters_later = step.entry_layers.first().is_none_or(|entry| *entry as usize >= end);
        enters_later || step.exit_layer as usize <= self.first_layer
    }

    /// Leaves the rows of a step to the next stage, or to whoever reads them.
    fn hand_over(&mut self, step: &mut MiddleStep) {
        let end = self.first_layer + self.layers.len();
        if self.hands_over.is_some() && step.exit_layer as usize > end {
            step.shared = self.backend.lend(step.plan.rows(), &self.x);
        }
        if step.shared.is_some() {
            return;
        }
        match &step.wanted {
            Some(wanted) if step.exit_layer as usize <= end => {
                // Also where nobody reads anything: it waits, and so shows what went wrong.
                self.backend.download(&self.x, 0, &mut []);
                let columns = self.shape.hidden_size;
                for rows in wanted {
                    let to = &mut step.hidden[rows.start * columns..rows.end * columns];
                    self.backend.download(&self.x, rows.start, to);
                }
            }
            _ => self.backend.download(&self.x, 0, &mut step.hidden),
        }
    }
}

as_its_backend!(MiddleModel);

impl<B: Backend> MiddleForward for MiddleModel<B> {
    fn link(&mut self, next: &dyn MiddleForward, steps: usize) -> Result<(), BackendError> {
        if let Some(next) = next.as_any().and_then(|next| next.downcast_ref::<Self>()) {
            let (capacity, columns) = (self.capacity, self.shape.hidden_size);
            self.hands_over = self.backend.link(&next.backend, capacity, columns, steps)?;
        }
        Ok(())
    }

    fn hands_over(&self) -> Option<&str> {
        self.hands_over.as_deref()
    }

    fn as_any(&self) -> Option<&dyn Any> {
        Some(self)
    }

    fn forward(&mut self, step: &mut MiddleStep) {
        if !step.moves.is_empty() {
            self.backend.compact(&step.moves, &mut self.kv);
        }
        if step.plan.rows() == 0 || self.is_passed(step) {
            return;
        }
        let Self { backend, shape, first_layer, layers, kv, scratch, x, .. } = self;
        match step.shared.take() {
            Some(shared) => backend.borrow(step.plan.rows(), shared, x),
            None => backend.upload(&step.hidden, x),
        }
        scratch.start_step(backend, shape, step.plan.batch().positions);
        let (mut sequences, mut front) = (0, None);
        for (kv_layer, layer) in layers.iter().enumerate() {
            let index = *first_layer + kv_layer;
            if index >= step.exit_layer as usize {
                break;
            }
            // Rows that enter at this layer or before it are the front of the batch.
            let before = sequences;
            while step.entry_layers.get(sequences).is_some_and(|entry| *entry as usize <= index) {
                sequences += 1;
            }
            if sequences > before {
                front = Some(Step::begin(backend, shape, step.plan.plan_front(sequences), kv));
            }
            if let Some(front) = &front {
                layer.forward(backend, front, kv_layer, x, kv, scratch);
            }
        }
        self.hand_over(step);
    }
}
