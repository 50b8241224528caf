//! Writing the two bundles of a model.
//!
//! Everything is written into a [`NewDirectory`], which takes the target's place at the end: a
//! bundle is there as a whole or not at all.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::convert::{self, Conversion};
use super::manifest::{
    ALIGNMENT, FORMAT_VERSION, FileEntry, MANIFEST, Manifest, Stored, TOKENIZER, TOKENIZER_CONFIG,
    TensorEntry, WEIGHTS, WIRE_DEFAULT, held_layers,
};
use super::model_id::{ModelHasher, TensorHasher};
use super::{BundleError, ModelId};
use crate::file::{self, NewDirectory};
use crate::header;
use crate::layout;
use crate::sampling::SamplingDefaults;
use crate::source::{SourceModel, TextReport};
use crate::split::{Role, Split};
use crate::tensor::{DType, Layout};

/// Bytes of a tensor that are packed and written together.
const BYTES_TOGETHER: usize = 1 << 20;

/// Types of the matrices in a bundle.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Weights {
    /// As in the source, bit for bit.
    #[default]
    Keep,
    /// All f16.
    F16,
    /// At most eight bits: larger types become q8_0.
    Q8,
    /// At most four bits in the layers: larger types become q4_1; embedding and LM head as `Q8`.
    Q4,
}

/// Options of cutting and storing a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BundleOptions {
    /// Layers of the input submodel.
    pub split_layer: usize,
    /// Layers of the output submodel.
    pub tail_layers: usize,
    /// Types of the matrices.
    pub weights: Weights,
}

/// Progress of the writing.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// The tensor that is written next.
    pub tensor: &'a str,
    /// Bytes of weights written.
    pub bytes: u64,
    /// Bytes of weights in both bundles.
    pub bytes_total: u64,
}

/// Summary of a bundle that was written.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Report {
    /// The model's name.
    pub model_name: String,
    /// Sampling settings that the model's makers recommend.
    pub sampling: SamplingDefaults,
    /// The identity that both halves carry.
    pub model_id: ModelId,
    /// Layers of the input submodel.
    pub split_layer: usize,
    /// Layers of the output submodel.
    pub tail_layers: usize,
    /// Layers of the whole model.
    pub num_hidden_layers: usize,
    /// Numbers in one row.
    pub hidden_size: usize,
    /// Control tokens, ends of an answer, and what the vocabulary was read as.
    pub text: TextReport,
    /// Types of the tensors, in the source and as stored.
    pub types: Vec<TypeReport>,
    /// Matrices that kept another type than the one asked for, and why.
    pub kept: BTreeMap<String, String>,
    /// The device's half.
    pub device: RoleReport,
    /// The cloud's half.
    pub cloud: RoleReport,
}

/// Tensors that have one type in the source and one in the bundles.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct TypeReport {
    /// Name of the type in the source.
    pub from: String,
    /// Bits that a weight takes there.
    pub bits: f64,
    /// [`DType::name`] of the type as stored.
    pub stored: &'static str,
    /// Bits that a weight takes as stored, padding left out.
    pub stored_bits: f64,
    /// True if the stored numbers are those of the source, bit for bit as f32.
    pub is_exact: bool,
    /// Number of such tensors.
    pub tensors: usize,
}

/// One role's half.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct RoleReport {
    /// Runs of decoder layers, `[first, one past the last]`.
    pub layers: Vec<[usize; 2]>,
    /// Number of tensors.
    pub tensors: usize,
    /// Bytes of tensors by type, padding left out.
    pub bytes_by_dtype: BTreeMap<String, u64>,
    /// Bytes of each file.
    pub files: BTreeMap<String, u64>,
    /// Bytes of all files.
    pub bytes: u64,
}

/// Writes `directory/device` and `directory/cloud`. `directory` must not exist, or be empty; it
/// appears when both are complete and on disk.
///
/// # Errors
/// The split is impossible, a tensor can't be converted, the directory exists, or the disk says
/// no; nothing is left behind then.
pub fn write_bundles(
    model: &SourceModel,
    options: BundleOptions,
    directory: &Path,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Report, BundleError> {
    let layers = model.config().num_hidden_layers;
    let split =
        Split::new(layers, options.split_layer, options.tail_layers).map_err(BundleError::Split)?;
    let roles = [Role::Device, Role::Cloud];
    let plans = roles
        .iter()
        .map(|role| Plan::new(model, &split, *role, options.weights))
        .collect::<Result<Vec<_>, _>>()?;
    let types = types(model, &plans)?;
    let kept = plans.iter().flat_map(|plan| plan.kept.clone()).collect();
    check_free(directory)?;
    let staging = NewDirectory::create(directory).map_err(BundleError::io(directory))?;

    let mut state = Writing {
        model,
        hasher: ModelHasher::default(),
        bytes: 0,
        bytes_total: plans.iter().map(|plan| plan.bytes).sum(),
        progress,
    };
    let mut files = Vec::new();
    for plan in &plans {
        let path = staging.path().join(plan.role.name());
        fs::create_dir(&path).map_err(BundleError::io(&path))?;
        files.push(state.write_role(plan, &path)?);
    }
    let model_id = state.hasher.finish(model.config());
    let mut reports = Vec::new();
    for (plan, files) in plans.into_iter().zip(files) {
        let path = staging.path().join(plan.role.name());
        reports.push(write_manifest(model, &split, plan, files, model_id, &path)?);
    }
    // An empty directory is replaced; a full one that came meanwhile is not.
    staging.publish(directory).map_err(|error| match error.kind() {
        io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists => {
            BundleError::Exists { path: directory.to_owned() }
        }
        _ => BundleError::io(directory)(error),
    })?;

    let (cloud, device) = (reports.pop(), reports.pop());
    Ok(Report {
        model_name: model.name().to_owned(),
        sampling: model.sampling(),
        model_id,
        split_layer: split.split_layer(),
        tail_layers: split.tail_layers(),
        num_hidden_layers: layers,
        hidden_size: model.config().hidden_size,
        text: model.text_report().clone(),
        types,
        kept,
        device: device.expect("one report a role"),
        cloud: cloud.expect("one report a role"),
    })
}

/// The tensors of a role's weights file, in order: matrices in the order of use, then vectors.
struct Plan {
    role: Role,
    tensors: Vec<(TensorEntry, Stored)>,
    bytes: u64,
    /// Matrices that keep another type than asked for, and why.
    kept: BTreeMap<String, String>,
}

impl Plan {
    fn new(
        model: &SourceModel,
        split: &Split,
        role: Role,
        weights: Weights,
    ) -> Result<Self, BundleError> {
        let mut specs = split.role_tensors(role, model.config());
        specs.sort_by_key(|spec| spec.shape.len() == 1);
        let mut tensors = Vec::with_capacity(specs.len());
        let mut kept = BTreeMap::new();
        for spec in specs {
            let source = model.source(&spec.name)?.origin.kept;
            let asked = convert::stored_dtype(&spec, source, weights);
            let dtype = match convert::misfit(&spec, source, asked) {
                None => asked,
                Some((dtype, why)) => {
                    kept.insert(
                        spec.name.clone(),
                        format!("{} instead of {}: {why}", dtype.name(), asked.name()),
                    );
                    dtype
                }
            };
            let entry = TensorEntry::new(&spec.name, dtype, &spec.shape);
            let stored = Stored::of(&entry).map_err(|error| BundleError::Convert {
                name: spec.name,
                dtype: dtype.name(),
                reason: error.reason,
            })?;
            tensors.push((entry, stored));
        }
        let bytes = tensors.iter().map(|(_, stored)| stored.file_bytes as u64).sum();
        Ok(Self { role, tensors, bytes, kept })
    }
}

/// State carried from tensor to tensor.
struct Writing<'a> {
    model: &'a SourceModel,
    hasher: ModelHasher,
    bytes: u64,
    bytes_total: u64,
    progress: &'a mut dyn FnMut(Progress<'_>),
}

impl Writing<'_> {
    /// Writes all files of a role but the manifest.
    fn write_role(
        &mut self,
        plan: &Plan,
        directory: &Path,
    ) -> Result<BTreeMap<String, FileEntry>, BundleError> {
        let mut files = BTreeMap::new();
        let path = directory.join(WEIGHTS);
        files.insert(WEIGHTS.to_owned(), self.write_weights(plan, &path)?);
        if plan.role == Role::Device {
            let settings = serde_json::to_string_pretty(self.model.token_settings())
                .expect("strings and flags serialise");
            for (name, text) in
                [(TOKENIZER, self.model.tokenizer_json()), (TOKENIZER_CONFIG, &settings)]
            {
                files.insert(name.to_owned(), write_text(&directory.join(name), text)?);
            }
        }
        Ok(files)
    }

    fn write_weights(&mut self, plan: &Plan, path: &Path) -> Result<FileEntry, BundleError> {
        let mut out = HashedFile::create(path)?;
        let lengths: Vec<[usize; 1]> =
            plan.tensors.iter().map(|(_, stored)| [stored.file_len]).collect();
        let listed: Vec<_> = plan
            .tensors
            .iter()
            .zip(&lengths)
            .map(|((entry, stored), shape)| {
                (entry.name.as_str(), stored.file_dtype, shape.as_slice(), stored.file_bytes)
            })
            .collect();
        out.write(&header::write(&listed, ALIGNMENT))?;

        for (entry, stored) in &plan.tensors {
            let (tensor, bytes_total) = (entry.name.as_str(), self.bytes_total);
            (self.progress)(Progress { tensor, bytes: self.bytes, bytes_total });
            self.write_tensor(entry, stored, &mut out)?;
            self.bytes += stored.file_bytes as u64;
        }
        out.finish()
    }

    /// Converts, packs and writes a tensor, some rows at a time.
    fn write_tensor(
        &mut self,
        entry: &TensorEntry,
        stored: &Stored,
        out: &mut HashedFile,
    ) -> Result<(), BundleError> {
        let source = self.model.source(&entry.name)?;
        let (rows, k) = source.size();
        let conversion = Conversion { name: &entry.name, from: source.dtype, to: stored.dtype, k };
        let mut hasher = TensorHasher::new(stored.dtype, &entry.shape);
        let [mut made, mut converted, mut packed] = [const { Vec::new() }; 3];
        let together = rows_together(stored.dtype, k);
        for first in (0..rows).step_by(together) {
            let n = together.min(rows - first);
            let bytes = source.rows(first..first + n, &mut made);
            let bytes = conversion.rows(bytes, first, &mut converted)?;
            hasher.update(bytes);
            match stored.layout {
                Layout::Rows => out.write(bytes)?,
                Layout::Panel16 => {
                    let bytes_packed = layout::packed_bytes(stored.dtype, n, k);
                    packed.resize(bytes_packed.expect("the plan is made of whole blocks"), 0);
                    layout::pack(stored.dtype, n, k, bytes, &mut packed);
                    out.write(&packed)?;
                }
            }
        }
        out.write(&[0; ALIGNMENT][..stored.file_bytes - stored.bytes])?;
        self.hasher.add(&entry.name, hasher);
        Ok(())
    }
}

/// Rows that are converted and packed together: whole panels, of about [`BYTES_TOGETHER`].
fn rows_together(dtype: DType, k: usize) -> usize {
    let panel = layout::packed_bytes(dtype, layout::PANEL, k).unwrap_or(0).max(1);
    (BYTES_TOGETHER / panel).max(1) * layout::PANEL
}

/// The types of the plans' tensors, each in the file and as stored.
fn types(model: &SourceModel, plans: &[Plan]) -> Result<Vec<TypeReport>, BundleError> {
    let mut types = BTreeMap::new();
    for (entry, stored) in plans.iter().flat_map(|plan| &plan.tensors) {
        let source = model.source(&entry.name)?;
        let key = (source.origin.name.clone(), stored.dtype.name());
        let row = types.entry(key).or_insert_with(|| TypeReport {
            from: source.origin.name.to_string(),
            bits: source.origin.bits,
            stored: stored.dtype.name(),
            stored_bits: stored.dtype.bits(),
            is_exact: true,
            tensors: 0,
        });
        row.is_exact &= source.is_exact_as(stored.dtype);
        row.tensors += 1;
    }
    Ok(types.into_values().collect())
}

fn write_manifest(
    model: &SourceModel,
    split: &Split,
    plan: Plan,
    files: BTreeMap<String, FileEntry>,
    model_id: ModelId,
    directory: &Path,
) -> Result<RoleReport, BundleError> {
    let mut report = RoleReport {
        layers: held_layers(split, plan.role),
        tensors: plan.tensors.len(),
        files: files.iter().map(|(name, entry)| (name.clone(), entry.bytes)).collect(),
        ..RoleReport::default()
    };
    for (entry, stored) in &plan.tensors {
        *report.bytes_by_dtype.entry(entry.dtype.clone()).or_default() += stored.bytes as u64;
    }
    let manifest = Manifest {
        format_version: FORMAT_VERSION,
        role: plan.role,
        model_name: model.name().to_owned(),
        model_id,
        split_layer: split.split_layer(),
        tail_layers: split.tail_layers(),
        layers: report.layers.clone(),
        hidden_size: model.config().hidden_size,
        wire: WIRE_DEFAULT.to_owned(),
        control_tokens: (plan.role == Role::Device)
            .then(|| model.text_report().control_tokens.keys().copied().collect()),
        config: model.config().clone(),
        sampling: match plan.role {
            Role::Device => model.sampling(),
            Role::Cloud => SamplingDefaults::default(),
        },
        files,
        tensors: plan.tensors.into_iter().map(|(entry, _)| entry).collect(),
    };
    let path = directory.join(MANIFEST);
    manifest.check().map_err(BundleError::manifest(&path))?;
    let json = serde_json::to_string_pretty(&manifest).map_err(BundleError::json(&path))?;
    let written = write_text(&path, &json)?;
    file::sync_directory(directory).map_err(BundleError::io(directory))?;
    report.files.insert(MANIFEST.to_owned(), written.bytes);
    report.bytes = report.files.values().sum();
    Ok(report)
}

/// A file that is hashed as it is written.
struct HashedFile {
    path: PathBuf,
    file: File,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl HashedFile {
    fn create(path: &Path) -> Result<Self, BundleError> {
        let file = File::create_new(path).map_err(BundleError::io(path))?;
        Ok(Self { path: path.to_owned(), file, hasher: blake3::Hasher::new(), bytes: 0 })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), BundleError> {
        self.file.write_all(bytes).map_err(BundleError::io(&self.path))?;
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    fn finish(self) -> Result<FileEntry, BundleError> {
        self.file.sync_all().map_err(BundleError::io(&self.path))?;
        Ok(FileEntry { bytes: self.bytes, blake3: self.hasher.finalize().to_hex().to_string() })
    }
}

fn write_text(path: &Path, text: &str) -> Result<FileEntry, BundleError> {
    write_file(path, text.as_bytes())
}

/// Writes a new file, to the disk.
fn write_file(path: &Path, bytes: &[u8]) -> Result<FileEntry, BundleError> {
    let mut file = HashedFile::create(path)?;
    file.write(bytes)?;
    file.finish()
}

/// Checks that a bundle can be written to `target`: nothing is there, or an empty directory.
///
/// # Errors
/// [`BundleError::Exists`], or what the system says.
pub fn check_free(target: &Path) -> Result<(), BundleError> {
    match fs::read_dir(target) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(BundleError::io(target)(error)),
        Ok(mut entries) => match entries.next() {
            None => Ok(()),
            Some(_) => Err(BundleError::Exists { path: target.to_owned() }),
        },
    }
}
