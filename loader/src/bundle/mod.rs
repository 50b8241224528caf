//! Bundles: one directory a role, used straight from the memory map.
//!
//! `device/` holds the tensors of the input and the output submodel, the tokenizer and the chat
//! template, and a trained drafter if there is one; `cloud/` holds the tensors of the middle
//! submodel and nothing else. Each has a `bundle.json`, the [`Manifest`], and
//! `weights.safetensors`, in which a matrix is one run of bytes in the panel layout and a vector
//! is f32. Both halves carry one [`ModelId`].

mod adapter;
mod convert;
mod error;
mod manifest;
mod model_id;
mod verify;
mod write;

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use crate::config::LlamaConfig;
use crate::file;
use crate::header;
use crate::map::FileMap;
use crate::source::TokenSettings;
use crate::split::{Role, Split};
use crate::tensor::{DType, Layout, Tensor, TensorBytes};

pub use adapter::{
    DRAFTER_FORMAT_VERSION, DrafterArchitecture, DrafterFile, add_drafter, add_drafter_bytes,
};
pub use error::BundleError;
pub use manifest::{
    ADAPTER, ALIGNMENT, FORMAT_VERSION, FORMAT_VERSION_OLDEST, FileEntry, MANIFEST, Manifest,
    TOKENIZER, TOKENIZER_CONFIG, TensorEntry, WEIGHTS, WIRE_DEFAULT,
};
pub use model_id::{ModelId, ModelIdError};
pub use verify::{Verified, Watch, content_hash};
pub use write::{
    BundleOptions, Progress, Report, RoleReport, TypeReport, Weights, check_free, write_bundles,
};

use manifest::Stored;
use verify::OpenFile;

/// Longest `bundle.json` and `tokenizer_config.json` that are read.
const MANIFEST_BYTES_MAX: u64 = 16 << 20;
/// Longest `tokenizer.json` that is read.
const TOKENIZER_BYTES_MAX: u64 = 256 << 20;

/// An open bundle. Its tensors borrow from one memory map, which they keep alive.
pub struct Bundle {
    directory: PathBuf,
    manifest: Manifest,
    split: Split,
    settings: Option<TokenSettings>,
    map: Arc<FileMap>,
    watch: Watch,
    tensors: HashMap<String, Place>,
}

/// Place of a tensor in the weights file.
struct Place {
    dtype: DType,
    layout: Layout,
    shape: Vec<usize>,
    range: Range<usize>,
}

impl Bundle {
    /// Opens a bundle's directory and checks everything about it except the content of the
    /// weights and the tokenizer, which it doesn't touch; [`Bundle::verify`] does that.
    ///
    /// The weights are mapped: the file must not be changed or shortened while the bundle or a
    /// tensor of it lives.
    ///
    /// # Errors
    /// The first thing that is wrong, with the file and the key or tensor.
    pub fn open(directory: &Path) -> Result<Self, BundleError> {
        let manifest = read_manifest(directory)?;
        let mut files = Vec::with_capacity(manifest.files.len());
        let mut weights = None;
        for (name, entry) in &manifest.files {
            let file = OpenFile::open(directory.join(name), entry)?;
            if name == WEIGHTS {
                weights = Some(file.file().clone());
            }
            files.push(file);
        }
        let weights = weights.expect("the manifest was checked");
        let settings = match manifest.role {
            Role::Cloud => None,
            Role::Device => Some(read_settings(directory, &manifest)?),
        };
        let weights_path = directory.join(WEIGHTS);
        let map = FileMap::of(&weights).map_err(BundleError::io(&weights_path))?;
        let tensors = place_tensors(&weights_path, (*map).as_ref(), &manifest)?;
        let split = manifest.split().map_err(BundleError::Split)?;
        let (directory, watch) = (directory.to_owned(), Watch::new(files));
        Ok(Self { directory, manifest, split, settings, map, watch, tensors })
    }

    /// Reads every file of the bundle and compares it with the manifest's hashes.
    ///
    /// # Errors
    /// The first file that differs.
    pub fn verify(&self) -> Result<(), BundleError> {
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        self.watch().hash_all(threads)
    }

    /// As [`Watch::verify`], so that [`Bundle::watch`] begins where this ends.
    ///
    /// # Errors
    /// As [`Watch::verify`].
    pub fn verify_remembered(
        &mut self,
        memory: Option<&Path>,
        now: SystemTime,
        threads: usize,
        on_piece: &mut dyn FnMut(&Path),
    ) -> Result<Verified, BundleError> {
        self.watch.verify(memory, now, threads, on_piece)
    }

    /// Its files, to be looked at again while it is used.
    #[must_use]
    pub fn watch(&self) -> Watch {
        self.watch.clone()
    }

    /// The directory.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Content of `bundle.json`.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Sampling settings that the model's makers recommend; default in a cloud's bundle.
    #[must_use]
    pub fn sampling(&self) -> crate::SamplingDefaults {
        self.manifest.sampling
    }

    /// Role that the bundle is for.
    #[must_use]
    pub fn role(&self) -> Role {
        self.manifest.role
    }

    /// The model's identity; both halves of a model have the same.
    #[must_use]
    pub fn model_id(&self) -> ModelId {
        self.manifest.model_id
    }

    /// The hyper-parameters of the whole model.
    #[must_use]
    pub fn config(&self) -> &LlamaConfig {
        &self.manifest.config
    }

    /// Layers at which the model was cut.
    #[must_use]
    pub fn split(&self) -> Split {
        self.split
    }

    /// The runs of decoder layers in this bundle, ascending: the input's and the output's of a
    /// device (an empty run is left out), the middle's of a cloud.
    #[must_use]
    pub fn layers(&self) -> Vec<Range<usize>> {
        self.manifest.layers.iter().map(|[start, end]| *start..*end).collect()
    }

    /// True if the bundle holds all of `layers`.
    #[must_use]
    pub fn holds(&self, layers: &Range<usize>) -> bool {
        layers.is_empty()
            || self.layers().iter().any(|run| run.start <= layers.start && layers.end <= run.end)
    }

    /// Names of all tensors, in the order of the weights file.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.manifest.tensors.iter().map(|tensor| tensor.name.as_str())
    }

    /// A tensor, borrowed from the map.
    ///
    /// # Errors
    /// [`BundleError::MissingTensor`] if this role doesn't hold it.
    pub fn tensor(&self, name: &str) -> Result<Tensor, BundleError> {
        let place = self.tensors.get(name).ok_or_else(|| BundleError::MissingTensor {
            path: self.directory.join(WEIGHTS),
            name: name.to_owned(),
        })?;
        Ok(Tensor {
            name: name.to_owned(),
            dtype: place.dtype,
            layout: place.layout,
            shape: place.shape.clone(),
            bytes: TensorBytes::mapped(Arc::clone(&self.map), place.range.clone()),
        })
    }

    /// Reads the text of `tokenizer.json` and checks its hash; `None` of a cloud's bundle.
    ///
    /// # Errors
    /// The file can't be read or is not the one that was written.
    pub fn tokenizer_json(&self) -> Result<Option<String>, BundleError> {
        let Some(entry) = self.manifest.files.get(TOKENIZER) else {
            return Ok(None);
        };
        read_checked(&self.directory.join(TOKENIZER), entry, TOKENIZER_BYTES_MAX).map(Some)
    }

    /// Reads the trained drafter and checks it; `None` if the bundle has none.
    ///
    /// # Errors
    /// The file can't be read, is not the one that was added, or is no drafter for this model.
    pub fn adapter(&self) -> Result<Option<DrafterFile>, BundleError> {
        let Some(entry) = self.manifest.files.get(ADAPTER) else {
            return Ok(None);
        };
        let path = self.directory.join(ADAPTER);
        check_size(&path, entry)?;
        let bytes = adapter::read_file(&path)?;
        check_hash(&path, entry, blake3::hash(&bytes))?;
        DrafterFile::from_bytes(&path, &bytes, &self.manifest).map(Some)
    }

    /// Special tokens and chat template; `None` of a cloud's bundle.
    #[must_use]
    pub fn token_settings(&self) -> Option<&TokenSettings> {
        self.settings.as_ref()
    }

    /// Bytes of the weights file.
    #[must_use]
    pub fn weights_bytes(&self) -> u64 {
        self.manifest.files.get(WEIGHTS).map_or(0, |entry| entry.bytes)
    }
}

impl fmt::Debug for Bundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bundle")
            .field("directory", &self.directory)
            .field("role", &self.manifest.role)
            .field("model_id", &self.manifest.model_id)
            .finish_non_exhaustive()
    }
}

/// Checks that two bundles are halves of one model.
///
/// # Errors
/// [`BundleError::DifferentModels`] with both ids.
pub fn check_same_model(device: &Bundle, cloud: &Bundle) -> Result<(), BundleError> {
    let (device, cloud) = (device.model_id(), cloud.model_id());
    if device == cloud { Ok(()) } else { Err(BundleError::DifferentModels { device, cloud }) }
}

fn read_manifest(directory: &Path) -> Result<Manifest, BundleError> {
    let path = directory.join(MANIFEST);
    if !file::is_there(&path) {
        let inner = [Role::Device, Role::Cloud]
            .into_iter()
            .map(|role| directory.join(role.name()))
            .find(|inner| inner.join(MANIFEST).is_file());
        let reason = match inner {
            Some(inner) => format!("no {MANIFEST} in it; did you mean {}?", inner.display()),
            None => format!("no {MANIFEST} in it; hat-split writes bundles"),
        };
        return Err(BundleError::NotABundle { path: directory.to_owned(), reason });
    }
    let text = read_text(&path, MANIFEST_BYTES_MAX)?;
    let json: serde_json::Value = serde_json::from_str(&text).map_err(BundleError::json(&path))?;
    let version = json.get("format_version");
    let known = FORMAT_VERSION_OLDEST..=FORMAT_VERSION;
    if !version.and_then(serde_json::Value::as_u64).is_some_and(|got| known.contains(&got)) {
        let got = version.map_or("missing".to_owned(), ToString::to_string);
        let (oldest, newest) = known.into_inner();
        return Err(BundleError::FormatVersion { path, oldest, newest, got });
    }
    // From the text again, not from the value: errors then name line and column.
    let manifest: Manifest = serde_json::from_str(&text).map_err(BundleError::json(&path))?;
    manifest.check().map_err(BundleError::manifest(&path))?;
    Ok(manifest)
}

fn read_settings(directory: &Path, manifest: &Manifest) -> Result<TokenSettings, BundleError> {
    let path = directory.join(TOKENIZER_CONFIG);
    let text = read_checked(&path, &manifest.files[TOKENIZER_CONFIG], MANIFEST_BYTES_MAX)?;
    serde_json::from_str(&text).map_err(BundleError::json(&path))
}

/// Compares the weights' header with the manifest, tensor by tensor.
fn place_tensors(
    path: &Path,
    file: &[u8],
    manifest: &Manifest,
) -> Result<HashMap<String, Place>, BundleError> {
    let mut entries =
        header::read(file).map_err(|error| BundleError::Header { path: path.to_owned(), error })?;
    let mut tensors = HashMap::with_capacity(manifest.tensors.len());
    for tensor in &manifest.tensors {
        let stored = Stored::of(tensor).map_err(BundleError::manifest(path))?;
        let Some(entry) = entries.remove(&tensor.name) else {
            let (path, name) = (path.to_owned(), tensor.name.clone());
            return Err(BundleError::MissingTensor { path, name });
        };
        let is_aligned = entry.range.start.is_multiple_of(ALIGNMENT);
        if entry.dtype != stored.file_dtype || entry.shape != [stored.file_len] || !is_aligned {
            return Err(BundleError::TensorMismatch {
                path: path.to_owned(),
                name: tensor.name.clone(),
                expected: format!(
                    "{:?} [{}] at a multiple of {ALIGNMENT} bytes",
                    stored.file_dtype, stored.file_len
                ),
                got: format!("{:?} {:?} at byte {}", entry.dtype, entry.shape, entry.range.start),
            });
        }
        let range = entry.range.start..entry.range.start + stored.bytes;
        let (dtype, layout, shape) = (stored.dtype, stored.layout, tensor.shape.clone());
        tensors.insert(tensor.name.clone(), Place { dtype, layout, shape, range });
    }
    match entries.into_keys().next() {
        None => Ok(tensors),
        Some(name) => {
            let role = manifest.role.name();
            Err(BundleError::UnknownTensor { path: path.to_owned(), name, role })
        }
    }
}

fn check_size(path: &Path, entry: &FileEntry) -> Result<(), BundleError> {
    let got = std::fs::metadata(path).map_err(BundleError::io(path))?.len();
    if got == entry.bytes {
        return Ok(());
    }
    Err(BundleError::FileSize { path: path.to_owned(), expected: entry.bytes, got })
}

fn check_hash(path: &Path, entry: &FileEntry, got: blake3::Hash) -> Result<(), BundleError> {
    let expected = entry.blake3.clone();
    if blake3::Hash::from_hex(&expected).is_ok_and(|expected| expected == got) {
        return Ok(());
    }
    let got = got.to_hex().to_string();
    Err(BundleError::FileHash { path: path.to_owned(), expected, got })
}

/// A text file whose size and hash the manifest knows.
fn read_checked(path: &Path, entry: &FileEntry, bytes_max: u64) -> Result<String, BundleError> {
    check_size(path, entry)?;
    let text = read_text(path, bytes_max)?;
    check_hash(path, entry, blake3::hash(text.as_bytes()))?;
    Ok(text)
}

fn read_text(path: &Path, bytes_max: u64) -> Result<String, BundleError> {
    file::read_text(path, bytes_max).map_err(BundleError::reading(path, bytes_max))
}
