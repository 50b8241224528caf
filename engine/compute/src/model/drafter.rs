//! The trained drafter of a device's bundle: one layer that predicts the deep row of a token
//! before the cloud has computed it.
//!
//! For a token with shallow row `s` (after `split_layer` layers) whose predecessor has the deep
//! row `g`:
//!
//! ```text
//! u = W1 nrm(s) + W2 nrm(f)            f = final norm of g; or, where g is not there yet,
//! x = decoder layer(u)                     the y of the token before
//! y = rms_norm(Wo nrm(x) + Wf nrm(f))  what the final norm of this token's own g should be
//! ```
//!
//! `y` times some rows of the LM head gives the likeliest next tokens. Decided tokens leave keys
//! that were made with true deep rows; a draft tree hangs keys below them that were made with
//! drafted ones, and those are made again once the tokens are decided. Kinds without deep rows
//! lack `W2` and `Wf`, and the paper's (arXiv 2503.18989) lacks the feed-forward part and `W1` as
//! well.

use hat_loader::layout;
use hat_loader::{Bundle, DType, DrafterArchitecture, DrafterFile, Layout, Tensor, TensorBytes};
use hat_plan::{AttendBatch, DraftForward, Likely};

use super::llama::{DecoderLayer, ModelShape, Scratch, Step, weight};
use crate::LoadError;
use crate::backend::{Backend, LinearArgs, Write};

/// The matrices around the layer, of a kind that has them.
struct Around<B: Backend> {
    shallow_proj: B::Weight,
    deep: Option<(B::Weight, B::Weight)>, // W2, Wf
    out_proj: B::Weight,
}

/// A trained drafter on one backend.
pub struct DraftModel<B: Backend> {
    backend: B,
    shape: ModelShape,
    split_layer: usize,
    vocabulary: Vec<u32>,
    ones: B::Weight,
    final_norm: B::Weight,
    layer: DecoderLayer<B>,
    around: Option<Around<B>>,
    norm: B::Weight,
    head: B::Weight, // [vocabulary, hidden_size]
    kv: B::Kv,       // one layer
    scratch: Scratch<B>,
    buffers: Buffers<B>,
    logits_host: Vec<f32>,
    order: Vec<u32>,
}

/// Shapes are `[capacity, columns]`.
struct Buffers<B: Backend> {
    raw: B::Buffer,    // [capacity, hidden_size]: rows as they came
    deep: B::Buffer,   // [capacity, hidden_size]
    x: B::Buffer,      // [capacity, hidden_size]
    logits: B::Buffer, // [capacity, vocabulary]
}

impl<B: Backend> DraftModel<B> {
    /// The drafter of a device's bundle, for steps of at most `capacity` rows and a KV store of
    /// `pages` pages; `None` if the bundle has none.
    ///
    /// # Errors
    /// [`LoadError::Bundle`] if the file is not one for this model, [`LoadError::Backend`].
    pub fn load(
        backend: B,
        bundle: &Bundle,
        capacity: usize,
        pages: usize,
    ) -> Result<Option<Self>, LoadError> {
        let adapter = bundle.adapter().map_err(|error| LoadError::bundle(bundle, error))?;
        adapter.map(|adapter| Self::new(backend, bundle, &adapter, capacity, pages)).transpose()
    }

    /// A drafter beside the bundle of its model.
    ///
    /// # Errors
    /// As [`DraftModel::load`].
    pub fn new(
        mut backend: B,
        bundle: &Bundle,
        adapter: &DrafterFile,
        capacity: usize,
        pages: usize,
    ) -> Result<Self, LoadError> {
        let shape = ModelShape::new(bundle.config());
        let mut take = |name: &str| -> Result<B::Weight, LoadError> {
            let tensor =
                adapter.tensor(name).map_err(|reason| LoadError::bundle(bundle, reason))?;
            Ok(backend.weight(&tensor)?)
        };
        let is_paper = adapter.kind() == DrafterArchitecture::Paper;
        let layer = DecoderLayer::of(&mut take, false, !is_paper)?;
        let around = match adapter.kind() {
            DrafterArchitecture::Paper => None,
            kind => Some(Around {
                shallow_proj: take("shallow_proj.weight")?,
                deep: match kind {
                    DrafterArchitecture::Deep => {
                        Some((take("deep_proj.weight")?, take("out_deep_proj.weight")?))
                    }
                    _ => None,
                },
                out_proj: take("out_proj.weight")?,
            }),
        };
        let norm = take("norm.weight")?;
        let vocabulary = adapter.vocabulary().to_vec();
        Ok(Self {
            split_layer: adapter.split_layer(),
            ones: backend.weight(&ones(shape.hidden_size))?,
            final_norm: weight(&mut backend, bundle, "model.norm.weight")?,
            head: backend.weight(&draft_head(bundle, &vocabulary)?)?,
            kv: backend.kv(shape.kv(1, pages))?,
            scratch: Scratch::new(&mut backend, &shape, capacity)?,
            buffers: Buffers {
                raw: backend.alloc(capacity, shape.hidden_size)?,
                deep: backend.alloc(capacity, shape.hidden_size)?,
                x: backend.alloc(capacity, shape.hidden_size)?,
                logits: backend.alloc(capacity, vocabulary.len())?,
            },
            logits_host: Vec::new(),
            order: Vec::new(),
            backend,
            shape,
            vocabulary,
            layer,
            around,
            norm,
        })
    }

    /// Puts what the layer reads into `x`, and the normalised deep rows into `deep`.
    fn read(&mut self, rows: usize, shallow: &[f32], deep: &[f32], is_raw: bool) {
        let Self { backend, shape, ones, final_norm, around, scratch, buffers, .. } = self;
        let (normed, Buffers { raw, deep: f, x, .. }) = (&mut scratch.normed, buffers);
        let eps = shape.rms_norm_eps;
        assert_eq!(shallow.len(), rows * shape.hidden_size, "a shallow row for each row");
        let Some(around) = around else {
            backend.upload(shallow, x);
            return;
        };
        backend.upload(shallow, raw);
        backend.rms_norm(rows, raw, ones, eps, normed);
        backend.linear(rows, normed, Write::Store, LinearArgs::of(&around.shallow_proj, x));
        if let Some((deep_proj, _)) = &around.deep {
            assert_eq!(deep.len(), shallow.len(), "a deep row for each row");
            backend.upload(deep, raw);
            if is_raw {
                backend.rms_norm(rows, raw, final_norm, eps, normed);
                backend.rms_norm(rows, normed, ones, eps, f);
            } else {
                backend.rms_norm(rows, raw, ones, eps, f);
            }
            backend.linear(rows, f, Write::Add, LinearArgs::of(deep_proj, x));
        }
    }

    /// Runs what [`DraftModel::read`] left through the layer; `y` gets the output.
    fn say(&mut self, plan: &AttendBatch<'_>, y: &mut [f32]) {
        let Self { backend, shape, ones, layer, around, kv, scratch, buffers, .. } = self;
        let Buffers { deep, x, .. } = buffers;
        let (rows, eps) = (plan.rows(), shape.rms_norm_eps);
        scratch.start_step(backend, shape, plan.positions);
        let step = Step::begin(backend, shape, *plan, kv);
        layer.forward(backend, &step, 0, x, kv, scratch);
        let normed = &mut scratch.normed;
        if let Some(around) = around {
            backend.rms_norm(rows, x, ones, eps, normed);
            backend.linear(rows, normed, Write::Store, LinearArgs::of(&around.out_proj, x));
            if let Some((_, out_deep)) = &around.deep {
                backend.linear(rows, deep, Write::Add, LinearArgs::of(out_deep, x));
            }
        }
        backend.rms_norm(rows, x, &self.norm, eps, normed);
        backend.download(normed, 0, y);
    }
}

as_its_backend!(DraftModel);

impl<B: Backend> DraftForward for DraftModel<B> {
    fn split_layer(&self) -> usize {
        self.split_layer
    }

    fn reads_deep(&self) -> bool {
        self.around.as_ref().is_some_and(|around| around.deep.is_some())
    }

    fn remember(&mut self, plan: &AttendBatch<'_>, shallow: &[f32], deep_before: &[f32]) {
        self.read(plan.rows(), shallow, deep_before, true);
        let Self { backend, shape, layer, kv, scratch, buffers, .. } = self;
        scratch.start_step(backend, shape, plan.positions);
        let step = Step::begin(backend, shape, *plan, kv);
        layer.remember(backend, &step, 0, &buffers.x, kv, scratch);
    }

    fn decide(
        &mut self,
        plan: &AttendBatch<'_>,
        shallow: &[f32],
        deep_before: &[f32],
        y: &mut [f32],
    ) {
        self.read(plan.rows(), shallow, deep_before, true);
        self.say(plan, y);
    }

    fn draft(&mut self, plan: &AttendBatch<'_>, shallow: &[f32], y_before: &[f32], y: &mut [f32]) {
        self.read(plan.rows(), shallow, y_before, false);
        self.say(plan, y);
    }

    fn likeliest(&mut self, y: &[f32], count: usize, out: &mut Vec<Likely>) {
        let Self { backend, vocabulary, head, scratch, buffers, logits_host, order, .. } = self;
        let rows = y.len() / self.shape.hidden_size;
        let tokens = vocabulary.len();
        let count = count.min(tokens);
        if rows == 0 || count == 0 {
            return;
        }
        backend.upload(y, &mut scratch.normed);
        let logits = LinearArgs::of(head, &mut buffers.logits);
        backend.linear(rows, &scratch.normed, Write::Store, logits);
        logits_host.resize(rows * tokens, 0.0);
        backend.download(&buffers.logits, 0, logits_host);
        for logits in logits_host.chunks_exact(tokens) {
            let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f32 = logits.iter().map(|logit| (logit - top).exp()).sum();
            let logit = |index: &u32| logits[*index as usize];
            order.clear();
            order.extend(0..u32::try_from(tokens).expect("tokens are u32"));
            let by_logit = |a: &u32, b: &u32| logit(b).total_cmp(&logit(a)).then(a.cmp(b));
            order.select_nth_unstable_by(count - 1, by_logit);
            order[..count].sort_unstable_by(by_logit);
            out.extend(order[..count].iter().map(|index| Likely {
                token: vocabulary[*index as usize],
                probability: (logit(index) - top).exp() / sum,
            }));
        }
    }
}

/// The weight of a norm that only divides.
fn ones(hidden_size: usize) -> Tensor {
    Tensor {
        name: "ones".to_owned(),
        dtype: DType::F32,
        layout: Layout::Rows,
        shape: vec![hidden_size],
        bytes: TensorBytes::owned(1f32.to_le_bytes().repeat(hidden_size)),
    }
}

/// The rows of the model's head for the draft vocabulary, in memory of their own.
fn draft_head(bundle: &Bundle, vocabulary: &[u32]) -> Result<Tensor, LoadError> {
    let tied = bundle.config().tie_word_embeddings;
    let name = if tied { "model.embed_tokens.weight" } else { "lm_head.weight" };
    let head = bundle.tensor(name).map_err(|error| LoadError::bundle(bundle, error))?;
    let k = bundle.config().hidden_size;
    let row_bytes = head.dtype.row_bytes(k).expect("a bundle's matrices are whole blocks");
    let mut rows = vec![0; vocabulary.len() * row_bytes];
    for (token, row) in vocabulary.iter().zip(rows.chunks_exact_mut(row_bytes)) {
        layout::unpack_row(head.dtype, k, &head.bytes, *token as usize, row);
    }
    let n = vocabulary.len();
    let bytes = layout::packed_bytes(head.dtype, n, k).expect("smaller than the whole head");
    let mut packed = vec![0; bytes];
    layout::pack(head.dtype, n, k, &rows, &mut packed);
    let (name, bytes) = (format!("draft rows of {name}"), TensorBytes::owned(packed));
    Ok(Tensor { name, shape: vec![n, k], layout: Layout::Panel16, bytes, dtype: head.dtype })
}
