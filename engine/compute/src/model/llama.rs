//! One Llama-shaped decoder layer over any [`Backend`], and the buffers that it works in.

use std::ops::Range;

use hat_loader::{Bundle, LlamaConfig, Tensor};
use hat_plan::{AttendBatch, AttendShape, BackendError, KvShape};

use crate::LoadError;
use crate::backend::{AttendArgs, Backend, LinearArgs, RopeArgs, Write};

/// The numbers of a model that its layers share.
#[derive(Clone, Debug)]
pub struct ModelShape {
    /// Width of a row.
    pub hidden_size: usize,
    /// Width inside the feed-forward part.
    pub intermediate_size: usize,
    /// Heads and window.
    pub attend: AttendShape,
    /// Term added to the mean square in the norms.
    pub rms_norm_eps: f32,
    /// Inverse frequencies of rotary position embedding, scaling included. `[head_dim / 2]`
    pub inv_freq: Vec<f32>,
    /// Words in the vocabulary.
    pub vocab_size: usize,
    /// Decoder layers of the whole model.
    pub num_hidden_layers: usize,
}

impl ModelShape {
    /// The shape of a configuration.
    #[must_use]
    pub fn new(config: &LlamaConfig) -> Self {
        Self {
            hidden_size: config.hidden_size,
            intermediate_size: config.intermediate_size,
            attend: AttendShape {
                heads: config.num_attention_heads,
                kv_heads: config.num_key_value_heads,
                head_dim: config.head_dim,
                window: config.sliding_window,
            },
            rms_norm_eps: config.rms_norm_eps,
            inv_freq: config.inv_freq(),
            vocab_size: config.vocab_size,
            num_hidden_layers: config.num_hidden_layers,
        }
    }

    /// The KV store of `layers` layers with `pages` pages.
    #[must_use]
    pub fn kv(&self, layers: usize, pages: usize) -> KvShape {
        KvShape { layers, pages, kv_heads: self.attend.kv_heads, head_dim: self.attend.head_dim }
    }
}

/// A matrix and its bias, if the family has one.
struct Projection<B: Backend> {
    weight: B::Weight,
    bias: Option<B::Weight>,
}

impl<B: Backend> Projection<B> {
    fn load(take: &mut Take<'_, B>, name: &str, with_bias: bool) -> Result<Self, LoadError> {
        let weight = take(&format!("{name}.weight"))?;
        let bias = with_bias.then(|| take(&format!("{name}.bias"))).transpose()?;
        Ok(Self { weight, bias })
    }

    /// The operands of `x W^T + bias` into `out`.
    fn onto<'a>(&'a self, out: &'a mut B::Buffer) -> LinearArgs<'a, B> {
        LinearArgs { weight: &self.weight, bias: self.bias.as_ref(), out }
    }
}

/// Takes a tensor of a layer, by its name within the layer.
pub(super) type Take<'a, B> = dyn FnMut(&str) -> Result<<B as Backend>::Weight, LoadError> + 'a;

/// Source of a layer's tensors: a bundle, or (in benches) a generator.
pub trait Tensors {
    /// Configuration of the model that the tensors are of.
    fn config(&self) -> &LlamaConfig;
    /// One of them, by its checkpoint name.
    ///
    /// # Errors
    /// [`LoadError::Bundle`] if it is not there.
    fn tensor(&self, name: &str) -> Result<Tensor, LoadError>;
}

impl Tensors for Bundle {
    fn config(&self) -> &LlamaConfig {
        self.config()
    }

    fn tensor(&self, name: &str) -> Result<Tensor, LoadError> {
        self.tensor(name).map_err(|error| LoadError::bundle(self, error))
    }
}

/// Takes a tensor into the backend.
pub(super) fn weight<B: Backend>(
    backend: &mut B,
    tensors: &impl Tensors,
    name: &str,
) -> Result<B::Weight, LoadError> {
    Ok(backend.weight(&tensors.tensor(name)?)?)
}

/// Buffers that every layer works in. Shapes are `[capacity, columns]`.
pub struct Scratch<B: Backend> {
    pub(super) normed: B::Buffer, // [capacity, hidden_size]
    q: B::Buffer,                 // [capacity, heads * head_dim]
    k: B::Buffer,                 // [capacity, kv_heads * head_dim]
    v: B::Buffer,                 // [capacity, kv_heads * head_dim]
    attended: B::Buffer,          // [capacity, heads * head_dim]
    gated: B::Buffer,             // [capacity, intermediate_size]
    angles: B::Buffer,            // [capacity, head_dim]: cosines, then sines
}

impl<B: Backend> Scratch<B> {
    /// Buffers for steps of at most `capacity` rows.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`].
    pub fn new(backend: &mut B, shape: &ModelShape, capacity: usize) -> Result<Self, BackendError> {
        let attend = &shape.attend;
        let mut alloc = |columns| backend.alloc(capacity, columns);
        Ok(Self {
            normed: alloc(shape.hidden_size)?,
            q: alloc(attend.heads * attend.head_dim)?,
            k: alloc(attend.kv_heads * attend.head_dim)?,
            v: alloc(attend.kv_heads * attend.head_dim)?,
            attended: alloc(attend.heads * attend.head_dim)?,
            gated: alloc(shape.intermediate_size)?,
            angles: alloc(attend.head_dim)?,
        })
    }

    /// Computes the angles of one step; every layer of the step uses them.
    pub fn start_step(&mut self, backend: &mut B, shape: &ModelShape, positions: &[u32]) {
        backend.rope_angles(positions, &shape.inv_freq, &mut self.angles);
    }
}

/// The rows of a step, begun: each layer takes them in turn.
pub struct Step<'p, B: Backend> {
    rows: usize,
    eps: f32,
    plan: B::Plan<'p>,
}

impl<'p, B: Backend> Step<'p, B> {
    /// Begins the rows of `plan` over a KV store.
    pub fn begin(backend: &mut B, shape: &ModelShape, plan: AttendBatch<'p>, kv: &B::Kv) -> Self {
        let (rows, eps) = (plan.rows(), shape.rms_norm_eps);
        Self { rows, eps, plan: backend.begin(plan, &shape.attend, kv) }
    }
}

/// The feed-forward part of a layer, behind a norm and added to the residual.
struct Mlp<B: Backend> {
    post_attention_layernorm: B::Weight,
    gate_proj: B::Weight,
    up_proj: B::Weight,
    down_proj: B::Weight,
}

/// One decoder layer: attention and feed-forward, each behind a norm and added to the residual.
pub struct DecoderLayer<B: Backend> {
    input_layernorm: B::Weight,
    q_proj: Projection<B>,
    k_proj: Projection<B>,
    v_proj: Projection<B>,
    o_proj: B::Weight,
    mlp: Option<Mlp<B>>, // None: a drafter's layer may have none
}

impl<B: Backend> DecoderLayer<B> {
    /// Layer `index` of the model, from the bundle that holds it.
    ///
    /// # Errors
    /// [`LoadError::Bundle`] if a tensor is missing, [`LoadError::Backend`] if it has no kernel.
    pub fn load(backend: &mut B, bundle: &impl Tensors, index: usize) -> Result<Self, LoadError> {
        let take =
            &mut |part: &str| weight(backend, bundle, &format!("model.layers.{index}.{part}"));
        Self::of(take, bundle.config().attention_bias, true)
    }

    /// A layer of the tensors that `take` gives.
    pub(super) fn of(
        take: &mut Take<'_, B>,
        qkv_bias: bool,
        with_mlp: bool,
    ) -> Result<Self, LoadError> {
        let mut mlp = None;
        if with_mlp {
            mlp = Some(Mlp {
                post_attention_layernorm: take("post_attention_layernorm.weight")?,
                gate_proj: take("mlp.gate_proj.weight")?,
                up_proj: take("mlp.up_proj.weight")?,
                down_proj: take("mlp.down_proj.weight")?,
            });
        }
        Ok(Self {
            input_layernorm: take("input_layernorm.weight")?,
            q_proj: Projection::load(take, "self_attn.q_proj", qkv_bias)?,
            k_proj: Projection::load(take, "self_attn.k_proj", qkv_bias)?,
            v_proj: Projection::load(take, "self_attn.v_proj", qkv_bias)?,
            o_proj: take("self_attn.o_proj.weight")?,
            mlp,
        })
    }

    /// Layers `range` of the model.
    ///
    /// # Errors
    /// As [`DecoderLayer::load`].
    pub fn load_range(
        backend: &mut B,
        bundle: &impl Tensors,
        range: Range<usize>,
    ) -> Result<Vec<Self>, LoadError> {
        range.map(|index| Self::load(backend, bundle, index)).collect()
    }

    /// Runs the rows of `step` through this layer, in place. `layer` is its number in the KV store.
    pub fn forward(
        &self,
        backend: &mut B,
        step: &Step<'_, B>,
        layer: usize,
        x: &mut B::Buffer,
        kv: &mut B::Kv,
        scratch: &mut Scratch<B>,
    ) {
        let Step { rows, eps, plan } = *step;
        let Scratch { normed, q, k, v, attended, gated, angles } = scratch;

        backend.rms_norm(rows, x, &self.input_layernorm, eps, normed);
        let qkv = [self.q_proj.onto(q), self.k_proj.onto(k), self.v_proj.onto(v)];
        backend.linear_each(rows, normed, qkv);
        backend.rope_append(plan, RopeArgs { layer, angles, q, k, v, kv });
        backend.attend(plan, AttendArgs { layer, q, kv, out: attended });
        backend.linear(rows, attended, Write::Add, LinearArgs::of(&self.o_proj, x));

        let Some(mlp) = &self.mlp else { return };
        backend.rms_norm(rows, x, &mlp.post_attention_layernorm, eps, normed);
        backend.swiglu(rows, normed, &mlp.gate_proj, &mlp.up_proj, gated);
        backend.linear(rows, gated, Write::Add, LinearArgs::of(&mlp.down_proj, x));
    }

    /// As [`DecoderLayer::forward`], but leaves keys and values only; `x` stays.
    pub fn remember(
        &self,
        backend: &mut B,
        step: &Step<'_, B>,
        layer: usize,
        x: &B::Buffer,
        kv: &mut B::Kv,
        scratch: &mut Scratch<B>,
    ) {
        let Step { rows, eps, plan } = *step;
        let Scratch { normed, q, k, v, angles, .. } = scratch;
        backend.rms_norm(rows, x, &self.input_layernorm, eps, normed);
        backend.linear_each(rows, normed, [self.k_proj.onto(k), self.v_proj.onto(v)]);
        backend.rope_append(plan, RopeArgs { layer, angles, q, k, v, kv });
    }
}
