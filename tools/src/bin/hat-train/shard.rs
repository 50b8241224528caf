//! Shards: what `collect` writes and `fit` reads, one safetensors file for some sequences.
//!
//! A sequence is its tokens, a shallow row for each of them but the last at each split layer, and deep rows
//! from `deep_first` on. The deep row is the model's last hidden row before the final norm, as
//! the wire returns it: norm and head make the target's whole distribution of it again, in less
//! room than the 200 most likely tokens would take, and a drafter reads the row itself.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use half::f16;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

/// Where a sequence comes from.
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
    /// Whether the answer was sampled.
    pub(crate) sampled: bool,
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

/// What all shards of a directory share.
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

    /// What a directory says of itself.
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
    let partial = path.with_extension("partial");
    safetensors::serialize_to_file(views, Some(metadata), &partial)
        .with_context(|| format!("writing {}", partial.display()))?;
    fs::rename(&partial, path).with_context(|| format!("renaming {}", partial.display()))
}

/// The sequences of a shard, from its header alone.
pub(crate) fn read_facts(
    path: &Path,
    collection: &Collection,
) -> anyhow::Result<Vec<SequenceFacts>> {
    use std::io::Read as _;
    let mut file = fs::File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let mut length = [0; 8];
    file.read_exact(&mut length).with_context(|| format!("reading {}", path.display()))?;
    let length = u64::from_le_bytes(length);
    ensure!(length < 16 << 20, "{}: a header of {length} bytes", path.display());
    let mut header = vec![0; 8 + usize::try_from(length)?];
    header[..8].copy_from_slice(&length.to_le_bytes());
    file.read_exact(&mut header[8..]).with_context(|| format!("reading {}", path.display()))?;
    let (_, metadata) =
        SafeTensors::read_metadata(&header).with_context(|| format!("in {}", path.display()))?;
    facts_of(path, collection, metadata.metadata().as_ref())
}

fn facts_of(
    path: &Path,
    collection: &Collection,
    metadata: Option<&HashMap<String, String>>,
) -> anyhow::Result<Vec<SequenceFacts>> {
    let field = |name: &str| {
        metadata
            .and_then(|metadata| metadata.get(name))
            .with_context(|| format!("{}: no {name} in its metadata", path.display()))
    };
    let version = field("format_version")?;
    if version.parse() != Ok(FORMAT_VERSION) {
        bail!("{}: format {version}, this program reads {FORMAT_VERSION}", path.display());
    }
    let model_id = field("model_id")?;
    let expected = &collection.model_id;
    ensure!(model_id == expected, "{}: of model {model_id}, not {expected}", path.display());
    serde_json::from_str(field("sequences")?)
        .with_context(|| format!("{}: sequences", path.display()))
}

/// Reads a shard, with the shallow rows of one split layer alone.
pub(crate) fn read(
    path: &Path,
    collection: &Collection,
    split_layer: usize,
) -> anyhow::Result<Vec<Recording>> {
    let bytes = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    let (_, metadata) =
        SafeTensors::read_metadata(&bytes).with_context(|| format!("in {}", path.display()))?;
    let facts = facts_of(path, collection, metadata.metadata().as_ref())?;
    let file =
        SafeTensors::deserialize(&bytes).with_context(|| format!("in {}", path.display()))?;
    let hidden = collection.hidden_size;
    let rows_wanted: usize = facts.iter().map(|f| f.tokens.saturating_sub(1)).sum();
    let deep_wanted: usize = facts.iter().map(|f| f.tokens.saturating_sub(1 + f.deep_first)).sum();
    let tokens_wanted = facts.iter().map(|f| f.tokens).sum();
    let tensor = |name: &str, dtype: Dtype, shape: &[usize]| -> anyhow::Result<Vec<u8>> {
        let view = file.tensor(name).with_context(|| format!("{}: {name}", path.display()))?;
        ensure!(
            view.dtype() == dtype && view.shape() == shape,
            "{}: {name} is {:?} {:?}, expected {dtype:?} {shape:?}",
            path.display(),
            view.dtype(),
            view.shape()
        );
        Ok(view.data().to_vec())
    };
    let tokens: Vec<u32> =
        bytemuck::pod_collect_to_vec(&tensor("tokens", Dtype::U32, &[tokens_wanted])?);
    let name = format!("shallow.{split_layer}");
    let shallow: Vec<f16> =
        bytemuck::pod_collect_to_vec(&tensor(&name, Dtype::F16, &[rows_wanted, hidden])?);
    let deep: Vec<f16> =
        bytemuck::pod_collect_to_vec(&tensor("deep", Dtype::F16, &[deep_wanted, hidden])?);
    let (mut token, mut row, mut deep_row) = (0, 0, 0);
    let mut recordings = Vec::with_capacity(facts.len());
    for facts in facts {
        let is_sound = facts.tokens >= 2
            && (1..facts.tokens).contains(&facts.prompt)
            && facts.deep_first < facts.prompt;
        ensure!(is_sound, "{}: job {} contradicts itself: {facts:?}", path.display(), facts.job);
        let rows = facts.tokens - 1;
        let deep_rows = rows - facts.deep_first;
        recordings.push(Recording {
            tokens: tokens[token..token + facts.tokens].to_vec(),
            shallow: vec![shallow[row * hidden..(row + rows) * hidden].to_vec()],
            deep: deep[deep_row * hidden..(deep_row + deep_rows) * hidden].to_vec(),
            facts,
        });
        token += rows + 1;
        row += rows;
        deep_row += deep_rows;
    }
    Ok(recordings)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test may panic")]

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
        let facts = read_facts(&path, &collection).unwrap();
        assert_eq!(facts, [written[0].facts.clone(), written[1].facts.clone()]);
        let found = read(&path, &collection, 4).unwrap();
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
        assert!(read(&path, &other, 2).unwrap_err().to_string().contains("of model abab"));
        assert!(read(&path, &collection, 8).unwrap_err().to_string().contains("shallow.8"));
        let bytes = fs::read(&path).unwrap();
        for keep in [0, 7, 40, bytes.len() - 1] {
            fs::write(&path, &bytes[..keep]).unwrap();
            assert!(read(&path, &collection, 2).is_err(), "{keep} bytes");
        }
    }
}
