//! The trained drafter of a device's bundle: one layer that guesses the deep row of a token
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
//! guessed ones, and those are made again once the tokens are decided. Kinds without deep rows
//! lack `W2` and `Wf`, and the paper's (arXiv 2503.18989) lacks the feed-forward part and `W1` as
//! well.

use hat_loader::layout;
use hat_loader::{Adapter, AdapterKind, Bundle, DType, Layout, Tensor, TensorBytes};
use hat_plan::{AttendPlan, DraftForward, Likely};

use super::llama::{ModelShape, weight};
use crate::LoadError;
use crate::backend::{AttendArgs, Backend, LinearArgs, RopeArgs, Write};

/// The matrices of a kind that has them.
struct Feed<B: Backend> {
    shallow_proj: B::Weight,
    deep: Option<(B::Weight, B::Weight)>, // W2, Wf
    post_attention_layernorm: B::Weight,
    gate_proj: B::Weight,
    up_proj: B::Weight,
    down_proj: B::Weight,
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
    input_layernorm: B::Weight,
    q_proj: B::Weight,
    k_proj: B::Weight,
    v_proj: B::Weight,
    o_proj: B::Weight,
    feed: Option<Feed<B>>,
    norm: B::Weight,
    head: B::Weight, // [vocabulary, hidden_size]
    kv: B::Kv,       // one layer
    buffers: Buffers<B>,
    logits_host: Vec<f32>,
    order: Vec<u32>,
}

/// Shapes are `[capacity, columns]`.
struct Buffers<B: Backend> {
    shallow: B::Buffer,  // [capacity, hidden_size]
    deep: B::Buffer,     // [capacity, hidden_size]
    normed: B::Buffer,   // [capacity, hidden_size]
    x: B::Buffer,        // [capacity, hidden_size]
    q: B::Buffer,        // [capacity, heads * head_dim]
    k: B::Buffer,        // [capacity, kv_heads * head_dim]
    v: B::Buffer,        // [capacity, kv_heads * head_dim]
    attended: B::Buffer, // [capacity, heads * head_dim]
    gated: B::Buffer,    // [capacity, intermediate_size]
    angles: B::Buffer,   // [capacity, head_dim]
    logits: B::Buffer,   // [capacity, vocabulary]
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
        adapter: &Adapter,
        capacity: usize,
        pages: usize,
    ) -> Result<Self, LoadError> {
        let shape = ModelShape::new(bundle.config());
        let mut take = |name: &str| -> Result<B::Weight, LoadError> {
            let tensor =
                adapter.tensor(name).map_err(|reason| LoadError::bundle(bundle, reason))?;
            Ok(backend.weight(&tensor)?)
        };
        let feed = match adapter.kind() {
            AdapterKind::Paper => None,
            kind => Some(Feed {
                shallow_proj: take("shallow_proj.weight")?,
                deep: match kind {
                    AdapterKind::Deep => {
                        Some((take("deep_proj.weight")?, take("out_deep_proj.weight")?))
                    }
                    _ => None,
                },
                post_attention_layernorm: take("post_attention_layernorm.weight")?,
                gate_proj: take("mlp.gate_proj.weight")?,
                up_proj: take("mlp.up_proj.weight")?,
                down_proj: take("mlp.down_proj.weight")?,
                out_proj: take("out_proj.weight")?,
            }),
        };
        let input_layernorm = take("input_layernorm.weight")?;
        let q_proj = take("self_attn.q_proj.weight")?;
        let k_proj = take("self_attn.k_proj.weight")?;
        let v_proj = take("self_attn.v_proj.weight")?;
        let o_proj = take("self_attn.o_proj.weight")?;
        let norm = take("norm.weight")?;
        let vocabulary = adapter.vocabulary().to_vec();
        Ok(Self {
            split_layer: adapter.split_layer(),
            ones: backend.weight(&ones(shape.hidden_size))?,
            final_norm: weight(&mut backend, bundle, "model.norm.weight")?,
            head: backend.weight(&draft_head(bundle, &vocabulary)?)?,
            kv: backend.kv(shape.kv(1, pages))?,
            buffers: Buffers::new(&mut backend, &shape, vocabulary.len(), capacity)?,
            logits_host: Vec::new(),
            order: Vec::new(),
            backend,
            shape,
            vocabulary,
            input_layernorm,
            q_proj,
            k_proj,
            v_proj,
            o_proj,
            feed,
            norm,
        })
    }

    /// What the layer reads, into `x`; the normalised deep rows into `deep`.
    fn read(&mut self, plan: &AttendPlan<'_>, shallow: &[f32], deep: &[f32], is_raw: bool) {
        let Self { backend, shape, ones, final_norm, feed, buffers, .. } = self;
        let Buffers { shallow: s, deep: f, normed, x, .. } = buffers;
        let (rows, eps) = (plan.rows(), shape.rms_norm_eps);
        assert_eq!(shallow.len(), rows * shape.hidden_size, "a shallow row for each row");
        let Some(feed) = feed else {
            backend.upload(shallow, x);
            return;
        };
        backend.upload(shallow, s);
        backend.rms_norm(rows, s, ones, eps, normed);
        backend.linear(rows, normed, Write::Store, LinearArgs::of(&feed.shallow_proj, x));
        if let Some((deep_proj, _)) = &feed.deep {
            assert_eq!(deep.len(), shallow.len(), "a deep row for each row");
            backend.upload(deep, s);
            if is_raw {
                backend.rms_norm(rows, s, final_norm, eps, normed);
                backend.rms_norm(rows, normed, ones, eps, f);
            } else {
                backend.rms_norm(rows, s, ones, eps, f);
            }
            backend.linear(rows, f, Write::Add, LinearArgs::of(deep_proj, x));
        }
    }

    /// Keys and values of what [`DraftModel::read`] left; queries too where they are `wanted`.
    fn append<'p>(&mut self, plan: &AttendPlan<'p>, wanted: bool) -> B::Plan<'p> {
        let Self { backend, shape, buffers, kv, .. } = self;
        let Buffers { normed, x, q, k, v, angles, .. } = buffers;
        let rows = plan.rows();
        backend.rms_norm(rows, x, &self.input_layernorm, shape.rms_norm_eps, normed);
        let (key, value) =
            (LinearArgs::of(&self.k_proj, &mut *k), LinearArgs::of(&self.v_proj, &mut *v));
        if wanted {
            backend.linear_each(rows, normed, [key, value, LinearArgs::of(&self.q_proj, &mut *q)]);
        } else {
            backend.linear_each(rows, normed, [key, value]);
        }
        backend.rope_angles(plan.positions, &shape.inv_freq, angles);
        let plan = backend.begin(*plan, &shape.attend, kv);
        backend.rope_append(plan, RopeArgs { layer: 0, angles, q, k, v, kv });
        plan
    }

    /// The rest of the layer and the output.
    fn say(&mut self, rows: usize, plan: B::Plan<'_>, y: &mut [f32]) {
        let Self { backend, shape, ones, feed, buffers, kv, .. } = self;
        let Buffers { deep, normed, x, q, attended, gated, .. } = buffers;
        let eps = shape.rms_norm_eps;
        backend.attend(plan, AttendArgs { layer: 0, q, kv, out: attended });
        backend.linear(rows, attended, Write::Add, LinearArgs::of(&self.o_proj, x));
        if let Some(feed) = feed {
            backend.rms_norm(rows, x, &feed.post_attention_layernorm, eps, normed);
            backend.swiglu(rows, normed, &feed.gate_proj, &feed.up_proj, gated);
            backend.linear(rows, gated, Write::Add, LinearArgs::of(&feed.down_proj, x));
            backend.rms_norm(rows, x, ones, eps, normed);
            backend.linear(rows, normed, Write::Store, LinearArgs::of(&feed.out_proj, x));
            if let Some((_, out_deep)) = &feed.deep {
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
        self.feed.as_ref().is_some_and(|feed| feed.deep.is_some())
    }

    fn remember(&mut self, plan: &AttendPlan<'_>, shallow: &[f32], deep_before: &[f32]) {
        self.read(plan, shallow, deep_before, true);
        self.append(plan, false);
    }

    fn decide(
        &mut self,
        plan: &AttendPlan<'_>,
        shallow: &[f32],
        deep_before: &[f32],
        y: &mut [f32],
    ) {
        self.read(plan, shallow, deep_before, true);
        let begun = self.append(plan, true);
        self.say(plan.rows(), begun, y);
    }

    fn guess(&mut self, plan: &AttendPlan<'_>, shallow: &[f32], y_before: &[f32], y: &mut [f32]) {
        self.read(plan, shallow, y_before, false);
        let begun = self.append(plan, true);
        self.say(plan.rows(), begun, y);
    }

    fn likeliest(&mut self, y: &[f32], count: usize, out: &mut Vec<Likely>) {
        let Self { backend, vocabulary, head, buffers, logits_host, order, .. } = self;
        let rows = y.len() / self.shape.hidden_size;
        let tokens = vocabulary.len();
        let count = count.min(tokens);
        if rows == 0 || count == 0 {
            return;
        }
        backend.upload(y, &mut buffers.normed);
        let logits = LinearArgs::of(head, &mut buffers.logits);
        backend.linear(rows, &buffers.normed, Write::Store, logits);
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

impl<B: Backend> Buffers<B> {
    fn new(
        backend: &mut B,
        shape: &ModelShape,
        vocabulary: usize,
        capacity: usize,
    ) -> Result<Self, LoadError> {
        let attend = &shape.attend;
        let mut alloc = |columns| backend.alloc(capacity, columns);
        Ok(Self {
            shallow: alloc(shape.hidden_size)?,
            deep: alloc(shape.hidden_size)?,
            normed: alloc(shape.hidden_size)?,
            x: alloc(shape.hidden_size)?,
            q: alloc(attend.heads * attend.head_dim)?,
            k: alloc(attend.kv_heads * attend.head_dim)?,
            v: alloc(attend.kv_heads * attend.head_dim)?,
            attended: alloc(attend.heads * attend.head_dim)?,
            gated: alloc(shape.intermediate_size)?,
            angles: alloc(attend.head_dim)?,
            logits: alloc(vocabulary)?,
        })
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
