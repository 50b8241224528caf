//! Shards: what `collect` writes and `fit` reads, one safetensors file for some sequences.
//!
//! A sequence is its tokens, a shallow row for each of them but the last at each split layer, and
//! deep rows from `deep_first` on. The deep row is the model's last hidden row before the final
//! norm, as the wire returns it: norm and head make the target's whole distribution of it again,
//! in less room than the 200 most likely tokens would take, and a drafter reads the row itself.

use std::collections::HashMap;
use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use half::f16;
use safetensors::tensor::{Dtype, Metadata, TensorView, View};
use serde::{Deserialize, Serialize};

/// Origin of a sequence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SequenceFacts {
    /// Number of the job in the seeded order.
    pub(crate) job: u64,
    /// Kind of prompt.
    pub(crate) source: String,
    /// Tokens of the prompt.
    pub(crate) prompt: usize,
    /// All tokens; the last one has no rows.
    pub(crate) tokens: usize,
    /// Position of the first deep row that is kept.
    pub(crate) deep_first: usize,
    /// True if the answer was sampled.
    pub(crate) sampled: bool,
}

/// One job in so many is never trained on; a prime, so that each kind of prompt has its share.
const HELD_OUT_EVERY: u64 = 53;

impl SequenceFacts {
    /// True if the sequence is kept for `eval`.
    pub(crate) const fn is_held_out(&self) -> bool {
        self.job % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    }
}

/// One prompt and its answer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Recording {
    pub(crate) facts: SequenceFacts,
    pub(crate) tokens: Vec<u32>,
    /// `[split layers][(tokens - 1) * hidden_size]`
    pub(crate) shallow: Vec<Vec<f16>>,
    /// `[(tokens - 1 - deep_first) * hidden_size]`
    pub(crate) deep: Vec<f16>,
}

/// Facts shared by all shards of a directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Collection {
    pub(crate) format_version: u32,
    pub(crate) model_id: String,
    pub(crate) hidden_size: usize,
    pub(crate) split_layers: Vec<usize>,
    pub(crate) seed: u64,
    pub(crate) max_tokens: usize,
    /// Name and BLAKE3 of each prompt file, in the order given.
    pub(crate) prompts: Vec<(String, String)>,
    /// True if these are answers to measure with.
    #[serde(default)]
    pub(crate) evaluation: bool,
}

/// The format of shards.
pub(crate) const FORMAT_VERSION: u32 = 1;
const COLLECTION: &str = "collection.json";

impl Collection {
    /// Begins a directory, or checks that it was begun with the same arguments.
    pub(crate) fn begin(&self, directory: &Path) -> anyhow::Result<()> {
        fs::create_dir_all(directory)
            .with_context(|| format!("creating {}", directory.display()))?;
        let path = directory.join(COLLECTION);
        if path.is_file() {
            let found = Self::read(directory)?;
            ensure!(
                &found == self,
                "{} was begun with other arguments: {found:?}, now {self:?}",
                directory.display()
            );
            return Ok(());
        }
        fs::write(&path, serde_json::to_string_pretty(self)?)
            .with_context(|| format!("writing {}", path.display()))
    }

    /// Reads the facts of a directory.
    pub(crate) fn read(directory: &Path) -> anyhow::Result<Self> {
        let path = directory.join(COLLECTION);
        let text = fs::read_to_string(&path)
            .with_context(|| format!("{}: is this what collect wrote?", path.display()))?;
        let found: Self =
            serde_json::from_str(&text).with_context(|| format!("in {}", path.display()))?;
        let version = found.format_version;
        ensure!(
            version == FORMAT_VERSION,
            "{}: format {version}, this program reads {FORMAT_VERSION}",
            path.display()
        );
        Ok(found)
    }
}

/// The shards of a directory, in order of name.
pub(crate) fn list(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))?;
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// Writes a shard under a temporary name and renames it, so that there is never half of one.
pub(crate) fn write(
    path: &Path,
    collection: &Collection,
    recordings: &[Recording],
) -> anyhow::Result<()> {
    let facts: Vec<&SequenceFacts> = recordings.iter().map(|r| &r.facts).collect();
    let metadata = HashMap::from([
        ("format_version".to_owned(), FORMAT_VERSION.to_string()),
        ("model_id".to_owned(), collection.model_id.clone()),
        ("sequences".to_owned(), serde_json::to_string(&facts)?),
    ]);
    let tokens: Vec<u32> = recordings.iter().flat_map(|r| r.tokens.iter().copied()).collect();
    let mut rows: Vec<(String, Vec<f16>)> = Vec::new();
    for (index, layer) in collection.split_layers.iter().enumerate() {
        let all = recordings.iter().flat_map(|r| r.shallow[index].iter().copied()).collect();
        rows.push((format!("shallow.{layer}"), all));
    }
    rows.push(("deep".into(), recordings.iter().flat_map(|r| r.deep.iter().copied()).collect()));
    let mut views = vec![(
        "tokens".to_owned(),
        TensorView::new(Dtype::U32, vec![tokens.len()], bytemuck::cast_slice(&tokens))?,
    )];
    let hidden = collection.hidden_size;
    for (name, rows) in &rows {
        let shape = vec![rows.len() / hidden, hidden];
        views.push((name.clone(), TensorView::new(Dtype::F16, shape, bytemuck::cast_slice(rows))?));
    }
    write_tensors(path, views, metadata)
}

/// Writes tensors and texts to `path`, under another name first.
pub(crate) fn write_tensors(
    path: &Path,
    tensors: Vec<(String, impl View)>,
    texts: HashMap<String, String>,
) -> anyhow::Result<()> {
    let partial = path.with_extension("partial");
    safetensors::serialize_to_file(tensors, Some(texts), &partial)
        .with_context(|| format!("writing {}", partial.display()))?;
    fs::rename(&partial, path).with_context(|| format!("renaming to {}", path.display()))
}

/// A shard that is open for reading.
pub(crate) struct Shard {
    path: PathBuf,
    file: fs::File,
    header: Metadata,
    /// Begin of the tensors, in bytes.
    start: u64,
    hidden_size: usize,
    pub(crate) facts: Vec<SequenceFacts>,
}

/// Largest header that is read, in bytes.
const HEADER_BYTES_MAX: u64 = 16 << 20;

impl Shard {
    /// Reads the header of a shard.
    pub(crate) fn open(path: &Path, collection: &Collection) -> anyhow::Result<Self> {
        let at = || format!("reading {}", path.display());
        let mut file = fs::File::open(path).with_context(at)?;
        let mut length = [0; 8];
        file.read_exact(&mut length).with_context(at)?;
        let length = u64::from_le_bytes(length);
        ensure!(length <= HEADER_BYTES_MAX, "{}: a header of {length} bytes", path.display());
        let mut text = vec![0; usize::try_from(length)?];
        file.read_exact(&mut text).with_context(at)?;
        let header: Metadata =
            serde_json::from_slice(&text).with_context(|| format!("in {}", path.display()))?;
        let field = |name: &str| {
            let value = header.metadata().as_ref().and_then(|texts| texts.get(name));
            value.with_context(|| format!("{}: no {name} in its metadata", path.display()))
        };
        let version = field("format_version")?;
        if version.parse() != Ok(FORMAT_VERSION) {
            bail!("{}: format {version}, this program reads {FORMAT_VERSION}", path.display());
        }
        let (model_id, expected) = (field("model_id")?, &collection.model_id);
        ensure!(model_id == expected, "{}: of model {model_id}, not {expected}", path.display());
        let facts: Vec<SequenceFacts> = serde_json::from_str(field("sequences")?)
            .with_context(|| format!("{}: sequences", path.display()))?;
        for facts in &facts {
            let is_sound = facts.tokens >= 2
                && (1..facts.tokens).contains(&facts.prompt)
                && facts.deep_first < facts.prompt;
            ensure!(
                is_sound,
                "{}: job {} contradicts itself: {facts:?}",
                path.display(),
                facts.job
            );
        }
        let wanted = (8 + length).saturating_add(header.data_len() as u64);
        let bytes = file.metadata()?.len();
        ensure!(bytes == wanted, "{}: {bytes} bytes of {wanted}", path.display());
        let hidden_size = collection.hidden_size;
        let path = path.to_owned();
        Ok(Self { path, file, header, start: 8 + length, hidden_size, facts })
    }

    /// All tokens, sequence after sequence.
    pub(crate) fn tokens(&mut self) -> anyhow::Result<Vec<u32>> {
        let count = self.facts.iter().map(|facts| facts.tokens).sum();
        Ok(bytemuck::pod_collect_to_vec(&self.tensor("tokens", Dtype::U32, &[count])?))
    }

    /// The sequences, with the shallow rows of one split layer alone.
    pub(crate) fn recordings(&mut self, split_layer: usize) -> anyhow::Result<Vec<Recording>> {
        let hidden = self.hidden_size;
        let rows: usize = self.facts.iter().map(|facts| facts.tokens - 1).sum();
        let deep_rows = self.facts.iter().map(|facts| facts.tokens - 1 - facts.deep_first).sum();
        let tokens = self.tokens()?;
        let name = format!("shallow.{split_layer}");
        let shallow: Vec<f16> =
            bytemuck::pod_collect_to_vec(&self.tensor(&name, Dtype::F16, &[rows, hidden])?);
        let deep: Vec<f16> =
            bytemuck::pod_collect_to_vec(&self.tensor("deep", Dtype::F16, &[deep_rows, hidden])?);
        let (mut tokens, mut shallow, mut deep) = (&tokens[..], &shallow[..], &deep[..]);
        let mut recordings = Vec::with_capacity(self.facts.len());
        for facts in &self.facts {
            let rows = facts.tokens - 1;
            recordings.push(Recording {
                tokens: front(&mut tokens, facts.tokens),
                shallow: vec![front(&mut shallow, rows * hidden)],
                deep: front(&mut deep, (rows - facts.deep_first) * hidden),
                facts: facts.clone(),
            });
        }
        Ok(recordings)
    }

    fn tensor(&mut self, name: &str, dtype: Dtype, shape: &[usize]) -> anyhow::Result<Vec<u8>> {
        let path = self.path.display();
        let entry = self.header.info(name).with_context(|| format!("{path}: no {name} in it"))?;
        ensure!(
            entry.dtype == dtype && entry.shape == shape,
            "{path}: {name} is {:?} {:?}, expected {dtype:?} {shape:?}",
            entry.dtype,
            entry.shape
        );
        let (begin, end) = entry.data_offsets;
        self.file.seek(SeekFrom::Start(self.start + begin as u64))?;
        let mut data = vec![0; end - begin];
        self.file.read_exact(&mut data).with_context(|| format!("reading {path}"))?;
        Ok(data)
    }
}

fn front<T: Copy>(from: &mut &[T], count: usize) -> Vec<T> {
    let (front, rest) = from.split_at(count);
    *from = rest;
    front.to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn collection() -> Collection {
        Collection {
            format_version: FORMAT_VERSION,
            model_id: "ab".repeat(32),
            hidden_size: 4,
            split_layers: vec![2, 4],
            seed: 1,
            max_tokens: 9,
            prompts: vec![],
            evaluation: false,
        }
    }

    fn recording(job: u64, tokens: usize, prompt: usize, deep_first: usize) -> Recording {
        let rows = |from: usize, count: usize| -> Vec<f16> {
            (0..count * 4).map(|i| f16::from_f32((from * 100 + i) as f32)).collect()
        };
        let source = "test".to_owned();
        Recording {
            facts: SequenceFacts { job, source, prompt, tokens, deep_first, sampled: false },
            tokens: (0..tokens).map(|t| u32::try_from(t).unwrap() + 7).collect(),
            shallow: vec![rows(1, tokens - 1), rows(2, tokens - 1)],
            deep: rows(3, tokens - 1 - deep_first),
        }
    }

    #[test]
    fn what_is_written_is_read_again() {
        let directory = tempfile::tempdir().unwrap();
        let collection = collection();
        collection.begin(directory.path()).unwrap();
        collection.begin(directory.path()).unwrap();
        let other = Collection { seed: 2, ..collection.clone() };
        assert!(other.begin(directory.path()).unwrap_err().to_string().contains("other arguments"));
        let written = [recording(3, 9, 5, 2), recording(9, 4, 1, 0)];
        let path = directory.path().join("a.safetensors");
        write(&path, &collection, &written).unwrap();
        assert_eq!(list(directory.path()).unwrap(), std::slice::from_ref(&path));
        let mut shard = Shard::open(&path, &collection).unwrap();
        assert_eq!(shard.facts, [written[0].facts.clone(), written[1].facts.clone()]);
        let found = shard.recordings(4).unwrap();
        for (found, written) in found.iter().zip(&written) {
            assert_eq!(found.tokens, written.tokens);
            assert_eq!(found.shallow[0], written.shallow[1]);
            assert_eq!(found.deep, written.deep);
        }
        assert_eq!(found.len(), 2);
    }

    #[test]
    fn a_shard_of_another_model_and_half_a_shard_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let collection = collection();
        let path = directory.path().join("a.safetensors");
        write(&path, &collection, &[recording(3, 9, 5, 2)]).unwrap();
        let other = Collection { model_id: "cd".repeat(32), ..collection.clone() };
        let read = |collection, layer| Shard::open(&path, collection)?.recordings(layer);
        assert!(read(&other, 2).unwrap_err().to_string().contains("of model abab"));
        assert!(read(&collection, 8).unwrap_err().to_string().contains("shallow.8"));
        let bytes = fs::read(&path).unwrap();
        for keep in [0, 7, 40, bytes.len() - 1] {
            fs::write(&path, &bytes[..keep]).unwrap();
            assert!(read(&collection, 2).is_err(), "{keep} bytes");
        }
    }
}
