//! Generated bundles for a machine that has no model: what `cuda/run-on-gpu.sh` asks.

use std::path::PathBuf;

use hat_loader::{BundleOptions, TinyModel, Weights, generated, write_bundles};

use super::*;
use crate::support::drafter::add_noise_at;

/// Models that launch every product and heads of two sizes, each with a kind of drafter.
fn models() -> [(TinyModel, AdapterKind); 5] {
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
        (narrow(DType::Q4_1), AdapterKind::Deep),
        (narrow(DType::F16), AdapterKind::Deep),
        (narrow(DType::Q4_0), AdapterKind::Layer),
        (wide(DType::Q8_0), AdapterKind::Paper),
        (wide(DType::Q6K), AdapterKind::Deep),
    ]
}

#[test]
#[ignore = "run by cuda/run-on-gpu.sh, which asks the bundles"]
fn bundles_for_a_gpu() {
    let folder = std::env::var_os("HAT_TEST_BUNDLES").expect("HAT_TEST_BUNDLES names a folder");
    let folder = PathBuf::from(folder);
    for (model, drafter) in models() {
        let path = folder.join(model.dtype.name());
        let options = BundleOptions { split_layer: 1, tail_layers: 0, weights: Weights::Keep };
        write_bundles(&generated(&model), options, &path, &mut |_| {}).unwrap();
        add_noise_at(&path, drafter);
    }
}
