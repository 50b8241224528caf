//! The hyper-parameters of a Llama-shaped model, under their names of `config.json`.

mod hf;
mod keys;
mod rope;

use serde::{Deserialize, Serialize};

pub use crate::error::ConfigError;
pub(crate) use hf::{flag, number, short, token_ids};

/// Limits on a configuration's values: far above any model that exists, far below any harm.
const LAYERS_MAX: usize = 1024;
const HEADS_MAX: usize = 1024;
const HEAD_DIM_MAX: usize = 1024;
const HIDDEN_MAX: usize = 1 << 17;
const INTERMEDIATE_MAX: usize = 1 << 20;
const VOCAB_MAX: usize = 1 << 22;
const POSITIONS_MAX: usize = 1 << 28;

/// Family of the model, as far as the families' files differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Family {
    /// Llama 2 and 3, Vicuna, TinyLlama, SmolLM2.
    Llama,
    /// Mistral: Llama with a sliding window, if it has one.
    Mistral,
    /// Qwen2 and 2.5: Llama with biases on q, k and v.
    Qwen2,
}

impl Family {
    /// The value of `model_type` in config.json.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
        }
    }
}

/// Scaling of rotary frequencies away from `rope_theta^(-2i / head_dim)`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum RopeScaling {
    /// All divided by `factor`.
    Linear {
        /// At least 1.
        factor: f32,
    },
    /// Llama 3.1 and later: long wavelengths divided by `factor`, short ones kept, between them a
    /// blend.
    Llama3 {
        /// Divisor of the longest wavelengths.
        factor: f32,
        /// `original_max_position_embeddings / low_freq_factor` is the shortest wavelength that is
        /// scaled in full.
        low_freq_factor: f32,
        /// `original_max_position_embeddings / high_freq_factor` is the longest that is kept.
        high_freq_factor: f32,
        /// The context of the first training.
        original_max_position_embeddings: usize,
    },
    /// Each divided by a number of its own: the tensor `rope_freqs.weight` of GGUF files.
    Factors {
        /// `[head_dim / 2]`
        factors: Vec<f32>,
    },
}

/// Hyper-parameters; field names are those of `config.json`. Every value of this type that this
/// crate hands out has passed [`LlamaConfig::check`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct LlamaConfig {
    /// Family of the model.
    pub architecture: Family,
    /// Numbers in one row of hidden state.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key/value heads; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Numbers in one head; even.
    pub head_dim: usize,
    /// Term added to the mean square before its root.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Their scaling.
    pub rope_scaling: Option<RopeScaling>,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Longest context, in rows.
    pub max_position_embeddings: usize,
    /// A row at position `p` sees positions `p - window + 1 ..= p`.
    pub sliding_window: Option<u32>,
    /// True if q, k and v have biases.
    pub attention_bias: bool,
    /// True if the LM head is the embedding.
    pub tie_word_embeddings: bool,
    /// The token in front of a text, if the model knows one.
    pub bos_token_id: Option<u32>,
    /// Tokens that end an answer; ascending.
    pub eos_token_ids: Vec<u32>,
}

impl LlamaConfig {
    /// Parses `config.json` of a Hugging Face directory.
    ///
    /// # Errors
    /// The first key that is missing, impossible, or asks for what we don't compute.
    pub fn from_hf(json: &serde_json::Value) -> Result<Self, ConfigError> {
        let config = hf::parse(json)?;
        config.check()?;
        Ok(config)
    }

    /// Columns of `q_proj`'s output.
    #[must_use]
    pub fn query_size(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Columns of `k_proj`'s and of `v_proj`'s output.
    #[must_use]
    pub fn key_value_size(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Rotary frequencies, `[head_dim / 2]`: the angle of pair `i` at position `p` is
    /// `p * inv_freq[i]`.
    ///
    /// As Hugging Face transformers computes them: powers rounded to f32, then f32 arithmetic.
    /// The power itself is taken in f64 and rounded once, so that no mathematical library's last
    /// bit shows.
    #[must_use]
    pub fn inv_freq(&self) -> Vec<f32> {
        rope::inv_freq(self.rope_theta, self.head_dim, self.rope_scaling.as_ref())
    }

    /// Checks that each number is possible and that they fit together.
    ///
    /// # Errors
    /// The first key that is not.
    pub fn check(&self) -> Result<(), ConfigError> {
        in_range("num_hidden_layers", self.num_hidden_layers, LAYERS_MAX)?;
        in_range("hidden_size", self.hidden_size, HIDDEN_MAX)?;
        in_range("intermediate_size", self.intermediate_size, INTERMEDIATE_MAX)?;
        in_range("num_attention_heads", self.num_attention_heads, HEADS_MAX)?;
        in_range("num_key_value_heads", self.num_key_value_heads, HEADS_MAX)?;
        in_range("head_dim", self.head_dim, HEAD_DIM_MAX)?;
        in_range("vocab_size", self.vocab_size, VOCAB_MAX)?;
        in_range("max_position_embeddings", self.max_position_embeddings, POSITIONS_MAX)?;
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
            let reason = format!("{kv_heads} does not divide num_attention_heads = {heads}");
            return Err(ConfigError::new("num_key_value_heads", reason));
        }
        if !self.head_dim.is_multiple_of(2) {
            let reason = format!("{} is odd, rotary pairs need an even number", self.head_dim);
            return Err(ConfigError::new("head_dim", reason));
        }
        if !(self.rms_norm_eps > 0.0 && self.rms_norm_eps < 1.0) {
            let reason = format!("{} is not between 0 and 1", self.rms_norm_eps);
            return Err(ConfigError::new("rms_norm_eps", reason));
        }
        if !(self.rope_theta >= 1.0 && self.rope_theta.is_finite()) {
            let reason = format!("{} is not a finite number of at least 1", self.rope_theta);
            return Err(ConfigError::new("rope_theta", reason));
        }
        if self.sliding_window == Some(0) {
            return Err(ConfigError::new("sliding_window", "0 rows see nothing"));
        }
        rope::check(self.rope_scaling.as_ref(), self.head_dim)?;
        for (key, id) in self
            .bos_token_id
            .iter()
            .map(|id| ("bos_token_id", id))
            .chain(self.eos_token_ids.iter().map(|id| ("eos_token_id", id)))
        {
            if *id as usize >= self.vocab_size {
                let reason = format!("{id} is beyond vocab_size = {}", self.vocab_size);
                return Err(ConfigError::new(key, reason));
            }
        }
        Ok(())
    }

    /// Everything that changes a number which the model computes, in one fixed written form. The
    /// model id is taken over it.
    pub(crate) fn canonical(&self) -> String {
        let Self { hidden_size, intermediate_size, num_hidden_layers, vocab_size, .. } = self;
        let Self { num_attention_heads, num_key_value_heads, head_dim, .. } = self;
        let Self { attention_bias, tie_word_embeddings, max_position_embeddings, .. } = self;
        let eps = self.rms_norm_eps.to_bits();
        let window = self.sliding_window.unwrap_or(0);
        let inv_freq: Vec<String> =
            self.inv_freq().iter().map(|f| format!("{:08x}", f.to_bits())).collect();
        format!(
            "hidden_size={hidden_size}\nintermediate_size={intermediate_size}\n\
             num_hidden_layers={num_hidden_layers}\nnum_attention_heads={num_attention_heads}\n\
             num_key_value_heads={num_key_value_heads}\nhead_dim={head_dim}\n\
             rms_norm_eps={eps:08x}\ninv_freq={}\nvocab_size={vocab_size}\n\
             max_position_embeddings={max_position_embeddings}\nsliding_window={window}\n\
             attention_bias={attention_bias}\ntie_word_embeddings={tie_word_embeddings}\n",
            inv_freq.join(",")
        )
    }
}

fn in_range(key: &str, value: usize, max: usize) -> Result<(), ConfigError> {
    if value == 0 || value > max {
        return Err(ConfigError::new(key, format!("{value} is not in 1..={max}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
