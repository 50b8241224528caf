//! Bundles on the disk.

use std::path::PathBuf;

use hat_loader::{
    Bundle, BundleError, BundleOptions, Report, Role, SourceModel, TinyModel, Weights,
    write_bundles,
};
use serde_json::Value;
use tempfile::TempDir;

use super::edit_json;

pub(crate) fn tiny() -> TinyModel {
    TinyModel { layers: 5, ..TinyModel::default() }
}

pub(crate) fn options(split_layer: usize, tail_layers: usize, weights: Weights) -> BundleOptions {
    BundleOptions { split_layer, tail_layers, weights }
}

pub(crate) struct Written {
    _parent: TempDir,
    pub(crate) directory: PathBuf,
    pub(crate) report: Report,
}

impl Written {
    pub(crate) fn open(&self, role: Role) -> Result<Bundle, BundleError> {
        Bundle::open(&self.path(role))
    }

    pub(crate) fn path(&self, role: Role) -> PathBuf {
        self.directory.join(role.name())
    }

    /// Changes the device's manifest; it must then be refused, with each of `parts` named.
    pub(crate) fn refused(&self, change: impl FnOnce(&mut Value), parts: &[&str]) {
        let path = self.path(Role::Device).join("bundle.json");
        let good = std::fs::read(&path).unwrap();
        edit_json(&path, change);
        let text = self.open(Role::Device).expect_err("it opens").to_string();
        assert!(text.contains("bundle.json"), "{text}");
        for part in parts {
            assert!(text.contains(part), "{text:?} without {part:?}");
        }
        std::fs::write(&path, good).unwrap();
    }
}

pub(crate) fn write(model: &SourceModel, options: BundleOptions) -> Written {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("out");
    let report = write_bundles(model, options, &directory, &mut |_| {}).unwrap();
    Written { _parent: parent, directory, report }
}
