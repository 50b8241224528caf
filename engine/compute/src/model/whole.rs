//! The yardstick: the whole model in one process, one row at a time, over contiguous KV.
//!
//! It shares the kernels and the decoder layer with the split engine and nothing else: no pool of
//! pages, no scheduler, session, transport or draft. What the link would do to rows is done to them
//! where they would cross it, so its logits are those that the split engine has to reproduce.

use std::ops::Range;

use hat_loader::Bundle;
use hat_plan::{AttendBatch, PAGE_SIZE, TokenId};

use super::llama::{DecoderLayer, ModelShape, Scratch, Step, weight};
use crate::backend::{Backend, LinearArgs, Write};
use crate::{LoadError, StepError};

/// Direction in which a row would cross the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crossing {
    /// To the cloud.
    Up,
    /// To the device.
    Down,
}

/// Effect of the link on a row, in place; `false` if it can't take the row, since some number is
/// not finite.
pub type Cross = dyn FnMut(Crossing, &mut [f32]) -> bool + Send;

/// All layers, embedding and head on one backend.
pub struct WholeModel<B: Backend> {
    backend: B,
    shape: ModelShape,
    crossings: Range<usize>, // rows cross before these two layers
    cross: Box<Cross>,
    embed_tokens: B::Weight,
    layers: Vec<DecoderLayer<B>>,
    norm: B::Weight,
    lm_head: Option<B::Weight>,
    kv: B::Kv,
    pages: Vec<u32>, // 0, 1, 2, ...: contiguous
    scratch: Scratch<B>,
    x: B::Buffer,      // [1, hidden_size]
    normed: B::Buffer, // [1, hidden_size]
    logits: B::Buffer, // [1, vocab_size]
    row: Vec<f32>,     // [hidden_size]
    position: u32,
}

impl<B: Backend> WholeModel<B> {
    /// Both halves of a bundle together, for at most `context` positions. `cross` is done to rows
    /// before layer `crossings.start`, and before layer `crossings.end` on the way back.
    ///
    /// # Errors
    /// [`LoadError::Bundle`] or [`LoadError::Backend`].
    pub fn load(
        mut backend: B,
        device: &Bundle,
        cloud: &Bundle,
        crossings: Range<usize>,
        cross: Box<Cross>,
        context: usize,
    ) -> Result<Self, LoadError> {
        let config = device.config();
        let shape = ModelShape::new(config);
        let mut layers = Vec::with_capacity(shape.num_hidden_layers);
        for index in 0..shape.num_hidden_layers {
            let holder = if cloud.holds(&(index..index + 1)) { cloud } else { device };
            layers.push(DecoderLayer::load(&mut backend, holder, index)?);
        }
        let lm_head = if config.tie_word_embeddings {
            None
        } else {
            Some(weight(&mut backend, device, "lm_head.weight")?)
        };
        let pages = context.div_ceil(PAGE_SIZE);
        Ok(Self {
            embed_tokens: weight(&mut backend, device, "model.embed_tokens.weight")?,
            norm: weight(&mut backend, device, "model.norm.weight")?,
            kv: backend.kv(shape.kv(layers.len(), pages))?,
            pages: (0..u32::try_from(pages).expect("a context fits u32")).collect(),
            scratch: Scratch::new(&mut backend, &shape, 1)?,
            x: backend.alloc(1, shape.hidden_size)?,
            normed: backend.alloc(1, shape.hidden_size)?,
            logits: backend.alloc(1, shape.vocab_size)?,
            row: vec![0.0; shape.hidden_size],
            position: 0,
            crossings,
            cross,
            layers,
            lm_head,
            shape,
            backend,
        })
    }

    /// Positions taken so far.
    #[must_use]
    pub fn position(&self) -> u32 {
        self.position
    }

    /// Forgets all rows.
    pub fn reset(&mut self) {
        self.position = 0;
    }

    /// Runs one token; `logits` (`[vocab_size]`), where given, gets what follows it.
    ///
    /// # Errors
    /// [`StepError::NotFinite`] if a row that would cross the link holds what is no number;
    /// [`StepError::Fault`] if the backend did not compute it.
    ///
    /// # Panics
    /// If the context is full.
    pub fn step(&mut self, token: TokenId, logits: Option<&mut [f32]>) -> Result<(), StepError> {
        let slot = [self.position];
        let pages_end = [0, u32::try_from(self.pages.len()).expect("few pages")];
        assert!((slot[0] as usize) < self.pages.len() * PAGE_SIZE, "the context is full");
        let prefix_len = [self.position + 1];
        let pages = std::mem::take(&mut self.pages);
        let plan = AttendBatch {
            positions: &slot,
            slots: &slot,
            prefix_len: &prefix_len,
            tail_indptr: &[0, 0],
            tail_slots: &[],
            q_indptr: &[0, 1],
            page_indptr: &pages_end,
            page_indices: &pages,
        };
        let done = self.run(token, &plan, logits);
        self.pages = pages;
        self.position += 1;
        match self.backend.fault() {
            Some(fault) => Err(fault.into()),
            None => done,
        }
    }

    fn run(
        &mut self,
        token: TokenId,
        plan: &AttendBatch<'_>,
        logits: Option<&mut [f32]>,
    ) -> Result<(), StepError> {
        self.backend.embed(&[token], &self.embed_tokens, &mut self.x);
        self.scratch.start_step(&mut self.backend, &self.shape, plan.positions);
        let step = Step::begin(&mut self.backend, &self.shape, *plan, &self.kv);
        for index in 0..=self.layers.len() {
            if index == self.crossings.start {
                self.cross(Crossing::Up)?;
            }
            if index == self.crossings.end {
                self.cross(Crossing::Down)?;
            }
            let Self { backend, layers, x, kv, scratch, .. } = self;
            if let Some(layer) = layers.get(index) {
                layer.forward(backend, &step, index, x, kv, scratch);
            }
        }
        if let Some(logits) = logits {
            let Self { backend, shape, x, normed, .. } = self;
            backend.rms_norm(1, x, &self.norm, shape.rms_norm_eps, normed);
            let head = self.lm_head.as_ref().unwrap_or(&self.embed_tokens);
            backend.linear(1, normed, Write::Store, LinearArgs::of(head, &mut self.logits));
            backend.download(&self.logits, 0, logits);
        }
        Ok(())
    }

    fn cross(&mut self, crossing: Crossing) -> Result<(), StepError> {
        self.backend.download(&self.x, 0, &mut self.row);
        if !(self.cross)(crossing, &mut self.row) {
            return Err(StepError::NotFinite { position: self.position });
        }
        self.backend.upload(&self.row, &mut self.x);
        Ok(())
    }
}

as_its_backend!(WholeModel);
