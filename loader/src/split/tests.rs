use std::collections::HashSet;

use super::{Role, Split, Submodel, model_tensors};
use crate::config::{Family, LlamaConfig};
use crate::generated::{TinyModel, generated};

fn config(architecture: Family, tied: bool) -> LlamaConfig {
    let tiny = TinyModel { architecture, tied, layers: 5, ..TinyModel::default() };
    generated(&tiny).config().clone()
}

#[test]
fn submodels_tile_the_layers() {
    for split_layer in 0..5 {
        for tail_layers in 0..5 - split_layer {
            let split = Split::new(5, split_layer, tail_layers).unwrap();
            let layers: Vec<usize> = [Submodel::Input, Submodel::Middle, Submodel::Output]
                .into_iter()
                .flat_map(|submodel| split.layers(submodel))
                .collect();
            assert_eq!(layers, [0, 1, 2, 3, 4]);
            assert_eq!(split.layers(Submodel::Input).len(), split_layer);
            assert_eq!(split.layers(Submodel::Output).len(), tail_layers);
            assert!(!split.layers(Submodel::Middle).is_empty());
        }
    }
}

#[test]
fn every_tensor_has_one_role() {
    for (architecture, tied) in [(Family::Llama, false), (Family::Qwen2, true)] {
        let config = config(architecture, tied);
        let all: HashSet<String> = model_tensors(&config).into_iter().map(|t| t.name).collect();
        for (split_layer, tail_layers) in [(0, 0), (2, 0), (1, 3)] {
            let split = Split::new(5, split_layer, tail_layers).unwrap();
            let device = split.role_tensors(Role::Device, &config);
            let cloud = split.role_tensors(Role::Cloud, &config);
            let names: HashSet<String> =
                device.iter().chain(&cloud).map(|tensor| tensor.name.clone()).collect();
            assert_eq!(names, all);
            assert_eq!(device.len() + cloud.len(), all.len());
            assert!(cloud.iter().all(|tensor| tensor.name.starts_with("model.layers.")));
        }
        assert_eq!(all.contains("lm_head.weight"), !tied);
        let has_bias = all.contains("model.layers.4.self_attn.v_proj.bias");
        assert_eq!(has_bias, architecture == Family::Qwen2);
    }
}

#[test]
fn a_split_leaves_layers_to_the_cloud() {
    for (split_layer, tail_layers, key) in [
        (5, 0, "split_layer"),
        (usize::MAX, 0, "split_layer"),
        (0, 5, "tail_layers"),
        (3, 2, "tail_layers"),
        (1, usize::MAX, "tail_layers"),
    ] {
        assert_eq!(Split::new(5, split_layer, tail_layers).unwrap_err().key, key);
    }
}
