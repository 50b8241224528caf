//! Generated bundles for a machine that has no model: what `cuda/run-on-gpu.sh` asks.

use std::path::PathBuf;

use hat_loader::{BundleOptions, TinyModel, Weights, generated, write_bundles};

use super::*;
use crate::support::drafter::add_noise_at;

/// Models that launch every product and heads of two sizes, each with a kind of drafter.
fn models() -> [(TinyModel, DrafterArchitecture); 5] {
    let wide = |dtype| TinyModel {
        head_dim: 128,
        hidden: 256,
        intermediate: 256,
        heads: 2,
        kv_heads: 2,
        layers: 3,
        dtype,
        ..TinyModel::default()
    };
    let narrow =
        |dtype| TinyModel { head_dim: 64, hidden: 64, heads: 3, kv_heads: 1, ..wide(dtype) };
    [
        (narrow(DType::Q4_1), DrafterArchitecture::Deep),
        (narrow(DType::F16), DrafterArchitecture::Deep),
        (narrow(DType::Q4_0), DrafterArchitecture::Layer),
        (wide(DType::Q8_0), DrafterArchitecture::Paper),
        (wide(DType::Q6K), DrafterArchitecture::Deep),
    ]
}

/// `HAT_TEST_BUNDLES` names a folder that keeps them, for `cuda/run-on-gpu.sh`.
#[test]
fn bundles_for_a_gpu() {
    let own = tempfile::tempdir().unwrap();
    let asked = std::env::var_os("HAT_TEST_BUNDLES").map(PathBuf::from);
    let folder = asked.as_deref().unwrap_or(own.path());
    for (model, drafter) in models() {
        let path = folder.join(model.dtype.name());
        let options = BundleOptions { split_layer: 1, tail_layers: 0, weights: Weights::Keep };
        write_bundles(&generated(&model), options, &path, &mut |_| {}).unwrap();
        add_noise_at(&path, drafter);
        let [device, cloud] =
            ["device", "cloud"].map(|half| Bundle::open(&path.join(half)).unwrap());
        assert_eq!(device.adapter().unwrap().unwrap().kind(), drafter);
        assert_eq!(device.model_id(), cloud.model_id());
    }
}
