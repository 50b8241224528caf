//! The yardstick: the whole model in one process, one row at a time, over contiguous KV.
//!
//! It shares the kernels and the decoder layer with the split engine and nothing else: no pool of
//! pages, no scheduler, session, transport or draft. Rows go through the wire codec where they
//! would cross the link, so its logits are those that the split engine has to reproduce.

use std::ops::Range;

use hat_loader::Bundle;

use super::llama::{DecoderLayer, ModelShape, Scratch, weight};
use crate::Error;
use crate::backend::{AttendPlan, Backend, BackendError, PAGE_SIZE, TokenId, Write};
use crate::pack::Codec;

/// All layers, embedding and head on one backend.
pub struct WholeModel<B: Backend> {
    backend: B,
    shape: ModelShape,
    codec: Codec,
    crossings: Range<usize>, // rows cross before these two layers
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
    wire: Vec<u8>,     // one row on the wire
    position: u32,
}

impl<B: Backend> WholeModel<B> {
    /// Both halves of a bundle together, for at most `context` positions. Rows would cross the
    /// link before layer `crossings.start` and before layer `crossings.end`.
    ///
    /// # Errors
    /// [`Error::Bundle`] or [`Error::Backend`].
    pub fn load(
        mut backend: B,
        device: &Bundle,
        cloud: &Bundle,
        crossings: Range<usize>,
        codec: Codec,
        context: usize,
    ) -> Result<Self, Error> {
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
            wire: Vec::new(),
            position: 0,
            codec,
            crossings,
            layers,
            lm_head,
            shape,
            backend,
        })
    }

    /// See [`Backend::arithmetic_id`].
    #[must_use]
    pub fn arithmetic_id(&self) -> u32 {
        self.backend.arithmetic_id()
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
    /// [`Error::NotFinite`] if a row that would cross the link holds something that is no number;
    /// [`Error::Backend`] if the backend did not compute it.
    ///
    /// # Panics
    /// If the context is full.
    pub fn step(&mut self, token: TokenId, logits: Option<&mut [f32]>) -> Result<(), Error> {
        let slot = [self.position];
        let pages_end = [0, u32::try_from(self.pages.len()).expect("few pages")];
        assert!((slot[0] as usize) < self.pages.len() * PAGE_SIZE, "the context is full");
        let prefix_len = [self.position + 1];
        let pages = std::mem::take(&mut self.pages);
        let plan = AttendPlan {
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
            Some(fault) => Err(BackendError::Fault(fault).into()),
            None => done,
        }
    }

    fn run(
        &mut self,
        token: TokenId,
        plan: &AttendPlan<'_>,
        logits: Option<&mut [f32]>,
    ) -> Result<(), Error> {
        self.backend.embed(&[token], &self.embed_tokens, &mut self.x);
        self.scratch.start_step(&mut self.backend, &self.shape, plan.positions);
        for index in 0..=self.layers.len() {
            if index == self.crossings.start {
                self.cross(self.codec)?;
            }
            if index == self.crossings.end {
                self.cross(self.codec.down())?;
            }
            let Self { backend, shape, layers, x, kv, scratch, .. } = self;
            if let Some(layer) = layers.get(index) {
                layer.forward(backend, shape, plan, index, x, kv, scratch);
            }
        }
        if let Some(logits) = logits {
            let Self { backend, shape, x, normed, .. } = self;
            backend.rms_norm(1, x, &self.norm, shape.rms_norm_eps, normed);
            let head = self.lm_head.as_ref().unwrap_or(&self.embed_tokens);
            backend.linear(1, normed, head, None, Write::Store, &mut self.logits);
            backend.download(&self.logits, 0, logits);
        }
        Ok(())
    }

    /// What the link does to a row: there and back through the codec.
    fn cross(&mut self, codec: Codec) -> Result<(), Error> {
        self.backend.download(&self.x, 0, &mut self.row);
        let (hidden_size, position) = (self.shape.hidden_size, self.position);
        self.wire.resize(codec.row_bytes(hidden_size), 0);
        codec
            .pack(&self.row, hidden_size, &mut self.wire)
            .and_then(|()| codec.unpack(&self.wire, hidden_size, &mut self.row))
            .map_err(|_| Error::NotFinite { position })?;
        self.backend.upload(&self.row, &mut self.x);
        Ok(())
    }
}
