//! What is trained: named matrices, and where they start.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, ensure};
use clap::ValueEnum;
use hat_compute::backend::Backend as _;
use hat_compute::backend::cpu::CpuBackend;
use hat_compute::open;
use hat_engine::options::Processor;
use hat_loader::{Bundle, LlamaConfig};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::primitive::Rows;

/// Which drafter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// A decoder layer that reads shallow rows and the deep rows of tokens before.
    Deep,
    /// A decoder layer that reads shallow rows alone.
    Layer,
    /// The paper's: attention and two norms.
    Paper,
}

impl Kind {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Deep => "deep",
            Self::Layer => "layer",
            Self::Paper => "paper",
        }
    }

    /// Whether it reads deep rows.
    pub(crate) const fn reads_deep(self) -> bool {
        matches!(self, Self::Deep)
    }

    /// Whether it has a feed-forward part.
    pub(crate) const fn feeds_forward(self) -> bool {
        !matches!(self, Self::Paper)
    }
}

/// Sizes of the model that the drafter is for.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Dims {
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) eps: f32,
    pub(crate) inv_freq: Vec<f32>,
}

impl Dims {
    pub(crate) fn new(config: &LlamaConfig) -> Self {
        Self {
            hidden: config.hidden_size,
            intermediate: config.intermediate_size,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            eps: config.rms_norm_eps,
            inv_freq: config.inv_freq(),
        }
    }

    /// `[outputs, inputs]` of a parameter.
    pub(crate) fn shape(&self, parameter: usize) -> (usize, usize) {
        let (hidden, inner) = (self.hidden, self.intermediate);
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        match parameter {
            W1 | W2 | WO | WF => (hidden, hidden),
            INPUT_NORM | POST_NORM | NORM => (1, hidden),
            Q => (q, hidden),
            K | V => (kv, hidden),
            O => (hidden, q),
            GATE | UP => (inner, hidden),
            DOWN => (hidden, inner),
            _ => unreachable!("there are {} parameters", PARAMETERS.len()),
        }
    }
}

pub(super) const W1: usize = 0;
pub(super) const W2: usize = 1;
pub(super) const INPUT_NORM: usize = 2;
pub(super) const Q: usize = 3;
pub(super) const K: usize = 4;
pub(super) const V: usize = 5;
pub(super) const O: usize = 6;
pub(super) const POST_NORM: usize = 7;
pub(super) const GATE: usize = 8;
pub(super) const UP: usize = 9;
pub(super) const DOWN: usize = 10;
pub(crate) const WO: usize = 11;
pub(crate) const WF: usize = 12;
pub(crate) const NORM: usize = 13;

/// Names of the parameters in files.
pub(crate) const PARAMETERS: [&str; 14] = [
    "shallow_proj.weight",
    "deep_proj.weight",
    "input_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "post_attention_layernorm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
    "out_proj.weight",
    "out_deep_proj.weight",
    "norm.weight",
];

/// The parameters of a drafter, or their gradients, or the optimiser's memory of them.
#[derive(Clone)]
pub(crate) struct Params {
    pub(crate) kind: Kind,
    /// Empty where the kind has no such parameter.
    pub(crate) values: Vec<Rows>,
}

impl Params {
    /// Zeros.
    pub(crate) fn zeros(kind: Kind, dims: &Dims) -> Self {
        let shape = |p: usize| if Self::has(kind, p) { dims.shape(p) } else { (0, 0) };
        Self { kind, values: (0..PARAMETERS.len()).map(|p| Rows::zeros(shape(p))).collect() }
    }

    /// Whether a drafter of this kind has the parameter.
    pub(crate) const fn has(kind: Kind, parameter: usize) -> bool {
        match parameter {
            W2 | WF => kind.reads_deep(),
            W1 | WO | POST_NORM | GATE | UP | DOWN => kind.feeds_forward(),
            _ => true,
        }
    }

    /// Layer `index` of the model where the kind has one, `W1` the identity times `scale`; the
    /// outputs are left for a fit. The paper's attention starts from the layer too.
    pub(crate) fn from_model(
        kind: Kind,
        dims: &Dims,
        bundles: &[&Bundle],
        index: usize,
        scale: f32,
    ) -> anyhow::Result<Self> {
        let mut params = Self::zeros(kind, dims);
        if Self::has(kind, W1) {
            params.values[W1].diag_mut().fill(scale);
        }
        let holder = bundles
            .iter()
            .find(|bundle| bundle.holds(&(index..index + 1)))
            .with_context(|| format!("no half of the bundle holds layer {index}"))?;
        let mut reader = WeightReader::new()?;
        for (parameter, name) in PARAMETERS.iter().enumerate().take(DOWN + 1).skip(INPUT_NORM) {
            if Self::has(kind, parameter) {
                let name = format!("model.layers.{index}.{name}");
                params.values[parameter] = reader.read(holder, &name, None)?;
            }
        }
        params.values[NORM].fill(1.0);
        Ok(params)
    }

    /// How many numbers.
    pub(crate) fn len(&self) -> usize {
        self.values.iter().map(Rows::len).sum()
    }

    /// Tensors for a checkpoint, each name with `prefix` before it.
    pub(crate) fn tensors(&self, prefix: &str) -> Vec<NamedTensor> {
        let named = PARAMETERS.iter().zip(&self.values).filter(|(_, values)| !values.is_empty());
        let tensor = |(name, values): (&&str, &Rows)| NamedTensor {
            name: format!("{prefix}{name}"),
            shape: vec![values.nrows(), values.ncols()],
            dtype: Dtype::F32,
            bytes: bytemuck::cast_slice(values.as_slice().expect("standard layout")).to_vec(),
        };
        named.map(tensor).collect()
    }

    /// The parameters of a checkpoint, under names with `prefix` before them.
    pub(crate) fn from_tensors(
        kind: Kind,
        dims: &Dims,
        file: &SafeTensors<'_>,
        prefix: &str,
        path: &Path,
    ) -> anyhow::Result<Self> {
        let mut params = Self::zeros(kind, dims);
        for (parameter, name) in PARAMETERS.iter().enumerate() {
            if !Self::has(kind, parameter) {
                continue;
            }
            let name = format!("{prefix}{name}");
            let view = file.tensor(&name).with_context(|| format!("{}: {name}", path.display()))?;
            let (rows, columns) = dims.shape(parameter);
            ensure!(
                view.dtype() == Dtype::F32 && view.shape() == [rows, columns],
                "{}: {name} is {:?} {:?}, expected F32 [{rows}, {columns}]",
                path.display(),
                view.dtype(),
                view.shape()
            );
            let numbers: Vec<f32> = bytemuck::pod_collect_to_vec(view.data());
            params.values[parameter] = Rows::from_shape_vec((rows, columns), numbers)?;
        }
        Ok(params)
    }
}

/// A tensor on its way into a file.
pub(crate) struct NamedTensor {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) dtype: Dtype,
    pub(crate) bytes: Vec<u8>,
}

/// Reads weights of a bundle as f32, whatever they are stored in.
pub(crate) struct WeightReader {
    backend: CpuBackend,
}

impl WeightReader {
    pub(crate) fn new() -> anyhow::Result<Self> {
        Ok(Self { backend: open::cpu(Processor::Auto, 1)? })
    }

    /// A vector as one row, or a matrix, or some rows of it.
    pub(crate) fn read(
        &mut self,
        bundle: &Bundle,
        name: &str,
        rows: Option<&[u32]>,
    ) -> anyhow::Result<Rows> {
        let tensor = bundle.tensor(name)?;
        if let [columns] = tensor.shape[..] {
            let numbers: Vec<f32> = bytemuck::pod_collect_to_vec(&tensor.bytes[..columns * 4]);
            return Ok(Rows::from_shape_vec((1, columns), numbers)?);
        }
        let [n, columns] = tensor.shape[..] else {
            anyhow::bail!("{name}: {:?} is neither a vector nor a matrix", tensor.shape)
        };
        let all: Vec<u32>;
        let rows = match rows {
            Some(rows) => rows,
            None => {
                all = (0..u32::try_from(n)?).collect();
                &all
            }
        };
        let mut buffer = self.backend.alloc(rows.len(), columns)?;
        let weight = self.backend.weight(&tensor)?;
        self.backend.embed(rows, &weight, &mut buffer);
        let mut out = vec![0.0; rows.len() * columns];
        self.backend.download(&buffer, 0, &mut out);
        Ok(Rows::from_shape_vec((rows.len(), columns), out)?)
    }
}

/// Writes tensors and metadata to `path`, under another name first.
pub(crate) fn write_tensors(
    path: &Path,
    tensors: &[NamedTensor],
    metadata: BTreeMap<String, String>,
) -> anyhow::Result<()> {
    let mut views = Vec::with_capacity(tensors.len());
    for NamedTensor { name, shape, dtype, bytes } in tensors {
        views.push((name.clone(), TensorView::new(*dtype, shape.clone(), bytes)?));
    }
    let partial = path.with_extension("partial");
    safetensors::serialize_to_file(views, Some(metadata.into_iter().collect()), &partial)
        .with_context(|| format!("writing {}", partial.display()))?;
    std::fs::rename(&partial, path).with_context(|| format!("renaming to {}", path.display()))
}
