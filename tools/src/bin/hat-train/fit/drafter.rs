//! The drafters, as the training loop sees them: f32 tensors, and draft steps to differentiate.
//!
//! The `deep` drafter, for the token at position `i` with shallow row `s_i`:
//!
//! ```text
//! u_i = W1 nrm(s_i) + W2 nrm(f_{i-1})        f: deep row after the model's final norm, or the
//! x_i = decoder layer(u)_i                      drafter's own y where that is not known yet
//! y_i = rms_norm(Wo nrm(x_i) + Wf nrm(f_{i-1}))
//! ```
//!
//! and `y_i` times the rows of the model's own head are the logits of token `i + 1`. The `layer`
//! drafter is the same without `W2` and `Wf`; the `paper` drafter has neither these nor the
//! feed-forward part, as in HAT (arXiv 2503.18989).
//!
//! Training unrolls: step 1 reads the true deep row of the token before, step `k` what step
//! `k - 1` said of it, and attends to what a device has then: keys of step 1 up to where the round
//! began, and after that one key of each later step.

use std::collections::BTreeMap;

use anyhow::Context as _;
use candle_core::{D, DType, Device, Result, Tensor, Var};
use hat_loader::layout::{dequantise_row, unpack_row};
use hat_loader::{Bundle, DrafterArchitecture, LlamaConfig};

pub(super) const W1: &str = "shallow_proj.weight";
pub(super) const W2: &str = "deep_proj.weight";
pub(super) const WO: &str = "out_proj.weight";
pub(super) const WF: &str = "out_deep_proj.weight";
pub(super) const NORM: &str = "norm.weight";

/// The tensors of a drafter, by their names in files.
pub(super) type Params = BTreeMap<&'static str, Var>;

/// A drafter that learns.
pub(super) struct Drafter {
    pub(super) kind: DrafterArchitecture,
    pub(super) params: Params,
    config: LlamaConfig,
}

/// A recorded sequence; its last positions are drafted from.
#[derive(Clone)]
pub(super) struct Example {
    /// `[positions, hidden_size]`
    pub(super) shallow: Tensor,
    /// Deep rows after the final norm, of the position before each query. `[queries, hidden_size]`
    pub(super) deep_before: Tensor,
    /// The deep rows of the queries, after the final norm. `[queries, hidden_size]`
    pub(super) target: Tensor,
}

/// One draft step over an example.
pub(super) struct Step {
    /// The deep rows that it predicts, after the final norm. `[queries, hidden_size]`
    pub(super) y: Tensor,
    /// Inputs of `Wo` and `Wf`, side by side; `None` for the paper's drafter.
    pub(super) read: Option<Tensor>,
}

impl Drafter {
    /// A drafter whose tensors have the values that `value` gives by name and shape.
    pub(super) fn new(
        kind: DrafterArchitecture,
        config: &LlamaConfig,
        mut value: impl FnMut(&str, &[usize]) -> anyhow::Result<Tensor>,
    ) -> anyhow::Result<Self> {
        let mut params = Params::new();
        for (name, shape) in kind.tensors(config) {
            let value = value(name, &shape)?;
            let value = value.reshape(shape.as_slice()).with_context(|| name.to_owned())?;
            params.insert(name, Var::from_tensor(&value)?);
        }
        Ok(Self { kind, params, config: config.clone() })
    }

    /// Layer `index` of the model where the kind has one, `W1` the identity times `scale`; the
    /// outputs are left for a fit. The paper's attention starts from the layer too.
    pub(super) fn of_model(
        kind: DrafterArchitecture,
        bundles: &[&Bundle],
        index: usize,
        scale: f32,
    ) -> anyhow::Result<Self> {
        let holder = bundles
            .iter()
            .find(|bundle| bundle.holds(&(index..index + 1)))
            .with_context(|| format!("no half of the bundle holds layer {index}"))?;
        Self::new(kind, holder.config(), |name, shape| match name {
            W1 => Ok((Tensor::eye(shape[0], DType::F32, &Device::Cpu)? * f64::from(scale))?),
            W2 | WO | WF => Ok(Tensor::zeros(shape, DType::F32, &Device::Cpu)?),
            NORM => Ok(Tensor::ones(shape, DType::F32, &Device::Cpu)?),
            _ => weight(holder, &format!("model.layers.{index}.{name}"), None),
        })
    }

    /// Draft steps over an example. A drafter that reads no deep row says the same at each step;
    /// it needs one.
    pub(super) fn unroll(&self, example: &Example, steps: usize) -> Result<Vec<Step>> {
        let reads_deep = self.params.contains_key(W2);
        let (all, queries) = (example.shallow.dim(0)?, example.deep_before.dim(0)?);
        let base = match self.params.get(W1) {
            Some(w1) => linear(&self.norm(&example.shallow, None)?, w1)?,
            None => example.shallow.clone(),
        };
        let (mut done, mut keys) = (Vec::<Step>::new(), Vec::new());
        for step in 0..if reads_deep { steps } else { 1 } {
            let deep = match done.last() {
                _ if !reads_deep => None,
                None => Some(self.norm(&example.deep_before, None)?),
                Some(before) => Some(shift(&self.norm(&before.y, None)?, 0, 1)?),
            };
            let first = if step == 0 { 0 } else { all - queries };
            let mut u = base.narrow(0, first, all - first)?;
            if let Some(deep) = &deep {
                let read = linear(deep, &self.params[W2])?;
                u = (u + read.pad_with_zeros(0, all - queries - first, 0)?)?;
            }
            done.push(self.step(&u, first, queries, deep, &mut keys)?);
        }
        Ok(done)
    }

    /// A step that reads `u`, rows of the positions from `first` on; the last `queries` of them
    /// are drafted from. Adds its keys and values to those of the steps before.
    fn step(
        &self,
        u: &Tensor,
        first: usize,
        queries: usize,
        deep: Option<Tensor>,
        keys: &mut Vec<[Tensor; 2]>,
    ) -> Result<Step> {
        let (before, p) = (u.dim(0)? - queries, &self.params);
        let normed = self.norm(u, Some("input_layernorm.weight"))?;
        let k = self.heads(&normed, "self_attn.k_proj.weight", Some(first))?;
        keys.push([k, self.heads(&normed, "self_attn.v_proj.weight", None)?]);
        let (normed, u) = (normed.narrow(0, before, queries)?, u.narrow(0, before, queries)?);
        let q = self.heads(&normed, "self_attn.q_proj.weight", Some(first + before))?;
        let attended = self.attend(&q, keys)?.transpose(0, 1)?.flatten_from(1)?;
        let x = (u + linear(&attended, &p["self_attn.o_proj.weight"])?)?;
        let Some(wo) = p.get(WO) else {
            return Ok(Step { y: self.norm(&x, Some(NORM))?, read: None });
        };
        let normed = self.norm(&x, Some("post_attention_layernorm.weight"))?;
        let gate = linear(&normed, &p["mlp.gate_proj.weight"])?.silu()?;
        let acted = (gate * linear(&normed, &p["mlp.up_proj.weight"])?)?;
        let x = (x + linear(&acted, &p["mlp.down_proj.weight"])?)?;
        let mut read = self.norm(&x, None)?;
        let mut h = linear(&read, wo)?;
        if let Some(deep) = deep {
            h = (h + linear(&deep, &p[WF])?)?;
            read = Tensor::cat(&[read, deep], 1)?;
        }
        Ok(Step { y: self.norm(&h, Some(NORM))?, read: Some(read) })
    }

    /// Projects rows, as `[heads, rows, head_dim]`; rotates them if they stand at positions from
    /// `first` on.
    fn heads(&self, x: &Tensor, name: &str, first: Option<usize>) -> Result<Tensor> {
        let (rows, size, heads) =
            (x.dim(0)?, self.config.head_dim, self.config.num_attention_heads);
        let mut x = linear(x, &self.params[name])?.reshape((rows, (), size))?;
        if let Some(first) = first {
            let half = size / 2;
            let freqs = self.config.inv_freq();
            let angle = |row: usize| freqs.iter().map(move |freq| (first + row) as f32 * freq);
            let angles = Tensor::from_iter((0..rows).flat_map(angle), &Device::Cpu)?;
            let angles = angles.reshape((rows, 1, half))?;
            let (cos, sin) = (angles.cos()?, angles.sin()?);
            let (low, high) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
            let new_low = (low.broadcast_mul(&cos)? - high.broadcast_mul(&sin)?)?;
            let new_high = (high.broadcast_mul(&cos)? + low.broadcast_mul(&sin)?)?;
            x = Tensor::cat(&[new_low, new_high], 2)?;
        }
        let own = x.dim(1)?;
        let shared = x.unsqueeze(2)?.broadcast_as((rows, own, heads / own, size))?;
        shared.reshape((rows, heads, size))?.transpose(0, 1)?.contiguous()
    }

    /// `softmax(q K^T / sqrt(head_dim)) V`; `keys[0]` are those of all positions, the others those
    /// of the queries, of which each sees one a step. `[heads, queries, head_dim]`
    fn attend(&self, q: &Tensor, keys: &[[Tensor; 2]]) -> Result<Tensor> {
        let (step, queries, all) = (keys.len(), q.dim(1)?, keys[0][0].dim(1)?);
        let q = (q / (self.config.head_dim as f64).sqrt())?;
        let mut scores = vec![q.matmul(&keys[0][0].t()?)?];
        for (later, [k, _]) in keys.iter().enumerate().skip(1) {
            scores.push((&q * shift(k, 1, step - 1 - later)?)?.sum_keepdim(2)?);
        }
        // A query does not see keys of step 1 from where its round began, nor steps before it.
        let hidden = |row: usize, key: usize| match key.checked_sub(all) {
            None => key + step > all - queries + row + 1,
            Some(later) => row + later + 2 < step,
        };
        let mask = (0..queries).flat_map(|row| (0..all + step - 1).map(move |key| (row, key)));
        let mask = mask.map(|(row, key)| if hidden(row, key) { f32::NEG_INFINITY } else { 0.0 });
        let mask = Tensor::from_iter(mask, &Device::Cpu)?.reshape((queries, ()))?;
        let scores = Tensor::cat(&scores, 2)?.broadcast_add(&mask)?;
        let weights = log_softmax(&scores)?.exp()?;
        let mut out = weights.narrow(2, 0, all)?.contiguous()?.matmul(&keys[0][1])?;
        for (later, [_, v]) in keys.iter().enumerate().skip(1) {
            let weight = weights.narrow(2, all + later - 1, 1)?;
            out = (out + shift(v, 1, step - 1 - later)?.broadcast_mul(&weight)?)?;
        }
        Ok(out)
    }

    fn norm(&self, x: &Tensor, weight: Option<&str>) -> Result<Tensor> {
        let weight = weight.map(|name| self.params[name].as_tensor());
        rms_norm(x, weight, self.config.rms_norm_eps)
    }
}

/// `x W^T`, with `W` as `[outputs, inputs]`.
pub(super) fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.matmul(&weight.t()?)
}

/// `x / sqrt(mean(x^2) + eps) * weight`, row by row.
pub(super) fn rms_norm(x: &Tensor, weight: Option<&Tensor>, eps: f32) -> Result<Tensor> {
    let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
    let scaled = x.broadcast_div(&(mean + f64::from(eps))?.sqrt()?)?;
    weight.map_or(Ok(scaled.clone()), |weight| scaled.broadcast_mul(weight))
}

/// Logarithms of the softmax over the last dimension.
pub(super) fn log_softmax(x: &Tensor) -> Result<Tensor> {
    let x = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?;
    x.broadcast_sub(&x.exp()?.sum_keepdim(D::Minus1)?.log()?)
}

/// Moves what stands at `at` of a dimension to `at + by`; zeros come before.
fn shift(x: &Tensor, dim: usize, by: usize) -> Result<Tensor> {
    match x.dim(dim)?.checked_sub(by) {
        None | Some(0) => x.zeros_like(),
        Some(left) => x.narrow(dim, 0, left)?.pad_with_zeros(dim, by, 0),
    }
}

/// A vector or a matrix of a bundle, or some rows of it, whatever it is stored in.
pub(super) fn weight(bundle: &Bundle, name: &str, rows: Option<&[u32]>) -> anyhow::Result<Tensor> {
    let tensor = bundle.tensor(name)?;
    if let [k] = tensor.shape[..] {
        let numbers: Vec<f32> = bytemuck::pod_collect_to_vec(&tensor.bytes[..k * 4]);
        return Ok(Tensor::from_vec(numbers, k, &Device::Cpu)?);
    }
    let [n, k] = tensor.shape[..] else {
        anyhow::bail!("{name}: {:?} is neither a vector nor a matrix", tensor.shape)
    };
    let all: Vec<u32> = (0..u32::try_from(n)?).collect();
    let rows = rows.unwrap_or(&all);
    let row_bytes = tensor.dtype.row_bytes(k).with_context(|| format!("{name}: rows of {k}"))?;
    let (mut stored, mut numbers) = (vec![0; row_bytes], vec![0.0; rows.len() * k]);
    for (row, numbers) in rows.iter().zip(numbers.chunks_exact_mut(k)) {
        unpack_row(tensor.dtype, k, &tensor.bytes, *row as usize, &mut stored);
        dequantise_row(tensor.dtype, k, &stored, numbers);
    }
    Ok(Tensor::from_vec(numbers, (rows.len(), k), &Device::Cpu)?)
}
