//! The identity that both halves of a model share.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::config::LlamaConfig;
use crate::tensor::DType;

/// BLAKE3 over a model's configuration and all of its tensors, as they stand in row order after
/// conversion. It depends neither on the split nor on the layout in the file.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ModelId([u8; 32]);

impl ModelId {
    /// The 32 bytes, as on the wire.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// An id from the wire.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(blake3::Hash::from_bytes(self.0).to_hex().as_str())
    }
}

impl fmt::Debug for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ModelId({self})")
    }
}

/// A text that is no model id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a model id is 64 hexadecimal digits")]
pub struct ModelIdError;

impl FromStr for ModelId {
    type Err = ModelIdError;

    fn from_str(text: &str) -> Result<Self, ModelIdError> {
        let hash = blake3::Hash::from_hex(text).map_err(|_| ModelIdError)?;
        Ok(Self(*hash.as_bytes()))
    }
}

impl TryFrom<String> for ModelId {
    type Error = ModelIdError;

    fn try_from(text: String) -> Result<Self, ModelIdError> {
        text.parse()
    }
}

impl From<ModelId> for String {
    fn from(id: ModelId) -> Self {
        id.to_string()
    }
}

/// The hash of a tensor in row order.
pub(super) struct TensorHasher(blake3::Hasher);

impl TensorHasher {
    pub(super) fn new(dtype: DType, shape: &[usize]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(format!("{} {shape:?}\n", dtype.name()).as_bytes());
        Self(hasher)
    }

    /// Takes the next rows.
    pub(super) fn update(&mut self, rows: &[u8]) {
        self.0.update(rows);
    }
}

/// Gathers the hash of each tensor, in any order.
#[derive(Default)]
pub(super) struct ModelHasher {
    tensors: BTreeMap<String, blake3::Hash>,
}

impl ModelHasher {
    /// Takes a tensor, all of its rows.
    pub(super) fn add(&mut self, name: &str, tensor: TensorHasher) {
        self.tensors.insert(name.to_owned(), tensor.0.finalize());
    }

    /// The id: a domain, the configuration's canonical form, then name and hash of each tensor,
    /// ascending by name.
    pub(super) fn finish(&self, config: &LlamaConfig) -> ModelId {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"hat-engine model 1\n");
        hasher.update(config.canonical().as_bytes());
        for (name, hash) in &self.tensors {
            hasher.update(format!("{name} {}\n", hash.to_hex()).as_bytes());
        }
        ModelId(*hasher.finalize().as_bytes())
    }
}
