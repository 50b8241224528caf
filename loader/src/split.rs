//! Assignment of tensors to the input, the middle and the output submodel. Pure: no IO.

use std::ops::Range;

use crate::config::{ConfigError, LlamaConfig};

/// The embedding's checkpoint name.
pub const EMBED_TOKENS: &str = "model.embed_tokens.weight";
/// The final norm's checkpoint name.
pub const FINAL_NORM: &str = "model.norm.weight";
/// The LM head's checkpoint name; absent where it is the embedding.
pub const LM_HEAD: &str = "lm_head.weight";

/// A run of decoder layers on one side of the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Submodel {
    /// Embedding and the first layers; on the device.
    Input,
    /// The layers between; in the cloud.
    Middle,
    /// The last layers, final norm and LM head; on the device.
    Output,
}

/// One of the two sides; each has a bundle of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Input and output submodel, tokenizer.
    Device,
    /// Middle submodel.
    Cloud,
}

impl Role {
    /// `device` or `cloud`: the name in `bundle.json` and of the directory.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Cloud => "cloud",
        }
    }
}

/// A tensor that a model must have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// The checkpoint name.
    pub name: String,
    /// `[n]` for norms and biases, `[n, k]` for matrices.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    fn vector(name: String, n: usize) -> Self {
        Self { name, shape: vec![n] }
    }

    fn matrix(name: String, n: usize, k: usize) -> Self {
        Self { name, shape: vec![n, k] }
    }

    /// True for the embedding and the LM head.
    #[must_use]
    pub fn is_vocabulary(&self) -> bool {
        self.name == EMBED_TOKENS || self.name == LM_HEAD
    }
}

/// Layers at which a model is cut: layers `0..split_layer` are the input submodel, the last
/// `tail_layers` the output submodel, and the middle has at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Split {
    split_layer: usize,
    tail_layers: usize,
    num_hidden_layers: usize,
}

impl Split {
    /// A cut of a model of `num_hidden_layers`.
    ///
    /// # Errors
    /// Error that names the number which leaves no layer to the cloud.
    pub fn new(
        num_hidden_layers: usize,
        split_layer: usize,
        tail_layers: usize,
    ) -> Result<Self, ConfigError> {
        if split_layer >= num_hidden_layers {
            let reason = format!(
                "{split_layer} leaves no layer to the cloud, the model has {num_hidden_layers}"
            );
            return Err(ConfigError::new("split_layer", reason));
        }
        if tail_layers >= num_hidden_layers - split_layer {
            let reason = format!(
                "{tail_layers} after split_layer = {split_layer} leaves no layer to the cloud, \
                 the model has {num_hidden_layers}"
            );
            return Err(ConfigError::new("tail_layers", reason));
        }
        Ok(Self { split_layer, tail_layers, num_hidden_layers })
    }

    /// Layers of the input submodel.
    #[must_use]
    pub fn split_layer(&self) -> usize {
        self.split_layer
    }

    /// Layers of the output submodel.
    #[must_use]
    pub fn tail_layers(&self) -> usize {
        self.tail_layers
    }

    /// The layers of a submodel.
    #[must_use]
    pub fn layers(&self, submodel: Submodel) -> Range<usize> {
        let tail = self.num_hidden_layers - self.tail_layers;
        match submodel {
            Submodel::Input => 0..self.split_layer,
            Submodel::Middle => self.split_layer..tail,
            Submodel::Output => tail..self.num_hidden_layers,
        }
    }

    /// All tensors of a submodel, in the order of use.
    #[must_use]
    pub fn submodel_tensors(&self, submodel: Submodel, config: &LlamaConfig) -> Vec<TensorSpec> {
        let mut tensors = Vec::new();
        if submodel == Submodel::Input {
            tensors.push(embedding(config));
        }
        tensors.extend(self.layers(submodel).flat_map(|layer| layer_tensors(layer, config)));
        if submodel == Submodel::Output {
            tensors.push(TensorSpec::vector(FINAL_NORM.to_owned(), config.hidden_size));
            if !config.tie_word_embeddings {
                let (vocab, hidden) = (config.vocab_size, config.hidden_size);
                tensors.push(TensorSpec::matrix(LM_HEAD.to_owned(), vocab, hidden));
            }
        }
        tensors
    }

    /// All tensors of a role's bundle.
    #[must_use]
    pub fn role_tensors(&self, role: Role, config: &LlamaConfig) -> Vec<TensorSpec> {
        match role {
            Role::Device => {
                let mut tensors = self.submodel_tensors(Submodel::Input, config);
                tensors.extend(self.submodel_tensors(Submodel::Output, config));
                tensors
            }
            Role::Cloud => self.submodel_tensors(Submodel::Middle, config),
        }
    }
}

/// All tensors of a whole model.
#[must_use]
pub fn model_tensors(config: &LlamaConfig) -> Vec<TensorSpec> {
    let mut tensors = vec![embedding(config)];
    let layers = 0..config.num_hidden_layers;
    tensors.extend(layers.flat_map(|layer| layer_tensors(layer, config)));
    tensors.push(TensorSpec::vector(FINAL_NORM.to_owned(), config.hidden_size));
    if !config.tie_word_embeddings {
        tensors.push(TensorSpec::matrix(LM_HEAD.to_owned(), config.vocab_size, config.hidden_size));
    }
    tensors
}

fn embedding(config: &LlamaConfig) -> TensorSpec {
    TensorSpec::matrix(EMBED_TOKENS.to_owned(), config.vocab_size, config.hidden_size)
}

/// The tensors of one decoder layer, in the order of use.
#[must_use]
pub fn layer_tensors(layer: usize, config: &LlamaConfig) -> Vec<TensorSpec> {
    let hidden = config.hidden_size;
    let (query, key_value) = (config.query_size(), config.key_value_size());
    let name = |part: &str| format!("model.layers.{layer}.{part}");
    let mut tensors = vec![TensorSpec::vector(name("input_layernorm.weight"), hidden)];
    for (part, n) in [("q_proj", query), ("k_proj", key_value), ("v_proj", key_value)] {
        tensors.push(TensorSpec::matrix(name(&format!("self_attn.{part}.weight")), n, hidden));
        if config.attention_bias {
            tensors.push(TensorSpec::vector(name(&format!("self_attn.{part}.bias")), n));
        }
    }
    tensors.push(TensorSpec::matrix(name("self_attn.o_proj.weight"), hidden, query));
    tensors.push(TensorSpec::vector(name("post_attention_layernorm.weight"), hidden));
    let intermediate = config.intermediate_size;
    tensors.push(TensorSpec::matrix(name("mlp.gate_proj.weight"), intermediate, hidden));
    tensors.push(TensorSpec::matrix(name("mlp.up_proj.weight"), intermediate, hidden));
    tensors.push(TensorSpec::matrix(name("mlp.down_proj.weight"), hidden, intermediate));
    tensors
}

#[cfg(test)]
mod tests;
