//! Models by path: a bundle, or a GGUF file or a Hugging Face directory, which is split into the
//! cache once. A split is kept under the hash of what it was made from, so a file that changes or
//! moves is never taken for another.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context as _, bail};
use hat_loader::bundle::{FORMAT_VERSION, MANIFEST, WIRE_DEFAULT, content_hash};
use hat_loader::file::{self, NewDirectory};
use hat_loader::{BundleOptions, Role, Weights, gguf_files};
use hat_transport::clock::unix_seconds;
use indicatif::ProgressBar;

use crate::note;
use crate::pull::{self, SPLIT_LAYER_DEFAULT};

/// The first bytes of a GGUF file.
const GGUF: &[u8] = b"GGUF";
/// Longest part of a file's name that a split's name keeps.
const STEM_CHARS_MAX: usize = 60;
/// Files of a Hugging Face directory that a split can depend on, by the ends of their names.
const PARTS: [&str; 3] = [".json", ".safetensors", ".jinja"];

/// A path that names a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Model {
    /// A bundle's directory, with `device/` and `cloud/` in it, or with one of them.
    Bundle(PathBuf),
    /// One half of a bundle.
    Half(PathBuf),
    /// A GGUF file.
    Gguf(PathBuf),
    /// A Hugging Face directory.
    HuggingFace(PathBuf),
    /// The default model, by the name `default`.
    Default,
}

/// Numbers of layers at the device that were asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cut {
    /// Layers in front of the cloud's.
    pub split_layer: Option<u32>,
    /// Layers behind the cloud's.
    pub tail_layers: Option<u32>,
}

impl Cut {
    fn options(self) -> BundleOptions {
        BundleOptions {
            split_layer: self.split_layer.map_or(SPLIT_LAYER_DEFAULT, |layer| layer as usize),
            tail_layers: self.tail_layers.unwrap_or(0) as usize,
            weights: Weights::Keep,
        }
    }
}

impl Model {
    /// Refuses a cut that the default model can't have, before it is fetched.
    ///
    /// # Errors
    /// The flag, and why.
    pub fn check(&self, cut: Cut) -> anyhow::Result<()> {
        match self {
            Self::Default => pull::check_default(cut.options()),
            _ => Ok(()), // whoever opens it says so
        }
    }

    /// Looks at what is at `path`, and changes nothing.
    ///
    /// # Errors
    /// The path, what is there, and what would be right.
    pub fn at(path: &Path) -> anyhow::Result<Self> {
        let shown = path.display();
        let metadata = match fs::metadata(path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if path == Path::new("default") {
                    return Ok(Self::Default);
                }
                bail!("{shown}: no such file or directory; {ACCEPTED}");
            }
            Err(error) => return Err(error).with_context(|| format!("{shown}; {ACCEPTED}")),
        };
        let path = path.to_owned();
        if metadata.is_dir() {
            return Self::in_directory(path);
        }
        let file = file::open(&path).with_context(|| format!("{shown}; {ACCEPTED}"))?;
        let mut magic = Vec::new();
        file.take(GGUF.len() as u64)
            .read_to_end(&mut magic)
            .with_context(|| format!("reading {shown}"))?;
        if magic == GGUF {
            return Ok(Self::Gguf(path));
        }
        let is_part = path.extension().is_some_and(|extension| extension == "safetensors");
        match path.parent().filter(|_| is_part) {
            Some(directory) => {
                bail!("{shown} is a part of a model: give its directory, {}", directory.display())
            }
            None => bail!("{shown} is no GGUF file: it does not begin with GGUF; {ACCEPTED}"),
        }
    }

    fn in_directory(path: PathBuf) -> anyhow::Result<Self> {
        let has = |name: &str| path.join(name).is_file();
        if has(MANIFEST) {
            return Ok(Self::Half(path));
        }
        if [Role::Device, Role::Cloud]
            .iter()
            .any(|role| has(&format!("{}/{MANIFEST}", role.name())))
        {
            return Ok(Self::Bundle(path));
        }
        if has("config.json") {
            return Ok(Self::HuggingFace(path));
        }
        let mut inside: Vec<PathBuf> = fs::read_dir(&path)
            .with_context(|| format!("reading {}", path.display()))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|extension| extension == "gguf"))
            .collect();
        inside.sort();
        match inside.first() {
            Some(file) => {
                bail!("{} is a directory: did you mean {}?", path.display(), file.display())
            }
            None => bail!("{} holds no model: {ACCEPTED}", path.display()),
        }
    }

    /// The directory that holds the halves, or one of them. What is no bundle is split into
    /// `cache` as `cut` says, unless that was done before.
    ///
    /// # Errors
    /// An error of reading, splitting or writing. A split is there as a whole or not at all.
    pub fn bundle(&self, cache: &Path, cut: Cut) -> anyhow::Result<PathBuf> {
        match self {
            Self::Bundle(path) => Ok(path.clone()),
            Self::Half(path) => {
                let absolute =
                    path.canonicalize().with_context(|| format!("reading {}", path.display()))?;
                Ok(absolute.parent().map_or(absolute.clone(), Path::to_owned))
            }
            Self::Gguf(path) => {
                // The split says it of a file that is wrong.
                let files = gguf_files(path).unwrap_or_else(|_| vec![path.clone()]);
                split_once(cache, &files[0], &|| gguf_content(cache, &files), cut)
            }
            Self::HuggingFace(path) => {
                split_once(cache, path, &|| directory_content(cache, path), cut)
            }
            Self::Default => {
                let BundleOptions { split_layer, tail_layers, .. } = cut.options();
                pull::default_bundle(cache, split_layer, tail_layers)
            }
        }
    }

    /// The half of a role: the one that was named, whatever it is, or the one in the bundle.
    ///
    /// # Errors
    /// As [`Model::bundle`].
    pub fn half(&self, cache: &Path, role: Role, cut: Cut) -> anyhow::Result<PathBuf> {
        match self {
            Self::Half(path) => Ok(path.clone()),
            _ => Ok(self.bundle(cache, cut)?.join(role.name())),
        }
    }
}

const ACCEPTED: &str = "a model is a bundle that hat-split made, a GGUF file, or a Hugging Face \
    directory (config.json, tokenizer.json, *.safetensors)";

/// The split of a checkpoint, made if it is not there.
fn split_once(
    cache: &Path,
    path: &Path,
    content: &dyn Fn() -> anyhow::Result<blake3::Hash>,
    cut: Cut,
) -> anyhow::Result<PathBuf> {
    let hash = content()?;
    let options = cut.options();
    let bundles = cache.join("bundles");
    let out = bundles.join(name_of(path, hash, options)?);
    if is_whole(&out) {
        return Ok(out);
    }
    fs::create_dir_all(&bundles).with_context(|| format!("creating {}", bundles.display()))?;
    let _lock = lock(&bundles);
    if is_whole(&out) {
        return Ok(out); // another process has been first
    }
    note!("splitting {} into {} (once)", path.display(), bundles.display());
    let staging = NewDirectory::create(&out)
        .with_context(|| format!("creating a directory in {}", bundles.display()))?;
    let made = staging.path().join("bundle");
    pull::split(path, None, options, &made)?;
    if content()? != hash {
        bail!("{} was changed while it was split; try again", path.display());
    }
    pull::add_drafter(&made.join(Role::Device.name()));
    fs::rename(&made, &out).with_context(|| format!("moving the split to {}", out.display()))?;
    Ok(out)
}

/// True if both halves of a bundle are there.
pub(super) fn is_whole(out: &Path) -> bool {
    [Role::Device, Role::Cloud].iter().all(|role| out.join(role.name()).join(MANIFEST).is_file())
}

/// Keeps other processes from splitting at the same time, as long as it lives. A file system
/// without locks has several work for one.
fn lock(directory: &Path) -> Option<File> {
    let file = File::open(directory).ok()?;
    match file.try_lock() {
        Ok(()) => return Some(file),
        Err(fs::TryLockError::WouldBlock) => {
            note!("waiting for another process that splits a model into {}", directory.display());
        }
        Err(fs::TryLockError::Error(_)) => return None,
    }
    file.lock().ok().map(|()| file)
}

/// The name of a split: whatever its content depends on is in it. The file's own name is the name
/// of a model that states none.
fn name_of(path: &Path, content: blake3::Hash, options: BundleOptions) -> anyhow::Result<String> {
    let path = path.canonicalize().with_context(|| format!("reading {}", path.display()))?;
    let name = path.file_name().unwrap_or_default();
    let mut hasher = blake3::Hasher::new();
    hasher.update(content.as_bytes());
    hasher.update(name.as_encoded_bytes());
    let BundleOptions { split_layer, tail_layers, weights } = options;
    hasher.update(format!("{weights:?} {WIRE_DEFAULT}").as_bytes());
    let key = &hasher.finalize().to_hex()[..16];
    let stem = name.to_string_lossy();
    let stem = stem.strip_suffix(".gguf").unwrap_or(&stem).chars().take(STEM_CHARS_MAX);
    let plain = |char: char| match char {
        char if char.is_ascii_alphanumeric() || matches!(char, '-' | '_' | '.') => char,
        _ => '_',
    };
    let stem: String = stem.map(plain).collect();
    let stem = stem.trim_start_matches('.');
    Ok(format!("{stem}-{key}-split{split_layer}-tail{tail_layers}-v{FORMAT_VERSION}"))
}

/// Hash of a file's content, or of those of all files of a model.
fn gguf_content(cache: &Path, files: &[PathBuf]) -> anyhow::Result<blake3::Hash> {
    let spinner = Reading::spinner(&files[0]);
    if let [file] = files {
        return spinner.hash(cache, file);
    }
    let mut hasher = blake3::Hasher::new();
    for file in files {
        hasher.update(spinner.hash(cache, file)?.as_bytes());
    }
    Ok(hasher.finalize())
}

/// Hash of the names and contents of all parts, in the order of the names.
fn directory_content(cache: &Path, path: &Path) -> anyhow::Result<blake3::Hash> {
    let reading = || format!("reading {}", path.display());
    let mut names = Vec::new();
    for entry in fs::read_dir(path).with_context(reading)? {
        let name = entry.with_context(reading)?.file_name();
        if PARTS.iter().any(|part| name.as_encoded_bytes().ends_with(part.as_bytes())) {
            names.push(name);
        }
    }
    names.sort();
    let mut hasher = blake3::Hasher::new();
    let spinner = Reading::spinner(path);
    for name in names {
        let content = spinner.hash(cache, &path.join(&name))?;
        hasher.update(name.as_encoded_bytes());
        hasher.update(&[0]);
        hasher.update(content.as_bytes());
    }
    Ok(hasher.finalize())
}

/// A spinner at a terminal while files are read.
struct Reading(ProgressBar);

impl Reading {
    fn spinner(path: &Path) -> Self {
        Self(ProgressBar::new_spinner().with_message(format!("reading {}", path.display())))
    }

    fn hash(&self, cache: &Path, path: &Path) -> anyhow::Result<blake3::Hash> {
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let now = UNIX_EPOCH + Duration::from_secs(unix_seconds());
        Ok(content_hash(path, Some(cache), now, threads, &mut || self.0.tick())?)
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
