//! Trained drafters, found by the model that they were trained for.

use std::fs;
use std::path::{Path, PathBuf};

use crate::{Bundle, BundleError, DrafterFile, file};

/// Largest file of a drafter that is looked at, in bytes.
const BYTES_MAX: u64 = 1 << 30;

/// Drafters beside those that bundles hold.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Drafters {
    /// Drafters of the program, by name: the contents of files.
    pub built_in: &'static [(&'static str, &'static [u8])],
    /// A directory of files, `*.safetensors`. One that is not there holds none.
    pub directory: Option<PathBuf>,
}

/// A drafter for a bundle's model and split.
pub struct Fitting {
    /// Its origin, for people.
    pub origin: String,
    /// The drafter.
    pub adapter: DrafterFile,
}

impl Drafters {
    /// A drafter for the model of a device's `bundle` whose rows are those after `split_layer`
    /// layers: the bundle's own, one of the program's, or one of the directory, in this order.
    ///
    /// # Errors
    /// The bundle's own is bad. A bad file of the directory is left out, with a warning.
    pub fn find(
        &self,
        bundle: &Bundle,
        split_layer: usize,
    ) -> Result<Option<Fitting>, BundleError> {
        if let Some(adapter) = bundle.adapter()?.filter(|own| own.split_layer() == split_layer) {
            return Ok(Some(Fitting { origin: "in the bundle".to_owned(), adapter }));
        }
        let built_in = self.built_in.iter().find_map(|(name, bytes)| {
            Some((
                format!("built in: {name}"),
                fitting(Path::new(name), bytes, bundle, split_layer)?,
            ))
        });
        let found = built_in.or_else(|| {
            self.files().into_iter().find_map(|path| {
                let bytes = file::read(&path, BYTES_MAX)
                    .map_err(|error| BundleError::Io { path: path.clone(), error })
                    .inspect_err(left_out)
                    .ok()?;
                let adapter = fitting(&path, &bytes, bundle, split_layer)?;
                Some((path.display().to_string(), adapter))
            })
        });
        Ok(found.map(|(origin, adapter)| Fitting { origin, adapter }))
    }

    /// The directory's files, by name.
    fn files(&self) -> Vec<PathBuf> {
        let entries = self.directory.as_ref().and_then(|directory| fs::read_dir(directory).ok());
        let paths = entries.into_iter().flatten().flatten().map(|entry| entry.path());
        let is_ours =
            |path: &PathBuf| path.extension().is_some_and(|extension| extension == "safetensors");
        let mut paths: Vec<PathBuf> = paths.filter(is_ours).collect();
        paths.sort();
        paths
    }
}

/// The drafter in `bytes`, if it was trained for the bundle's model and this split.
fn fitting(name: &Path, bytes: &[u8], bundle: &Bundle, split_layer: usize) -> Option<DrafterFile> {
    let (model, split) = DrafterFile::trained_for(name, bytes).inspect_err(left_out).ok()?;
    if model != bundle.model_id() || split != split_layer {
        return None;
    }
    DrafterFile::of_bytes(name, bytes, bundle).inspect_err(left_out).ok()
}

fn left_out(error: &BundleError) {
    tracing::warn!(%error, "a drafter is left out");
}
