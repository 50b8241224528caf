//! Sampling defaults: from the model's files to the device's half of a bundle.

use crate::files::bundle::{options, tiny, write};
use crate::files::gguf::{Gguf, Meta, open};
use crate::files::{edit_json, write_directory, write_json};
use hat_loader::{
    Bundle, DType, Role, SamplingDefaults, SourceModel, TinyModel, Weights, generated,
};
use serde_json::json;

#[test]
fn a_directory_says_how_to_sample_and_the_devices_half_keeps_it() {
    let directory = tempfile::tempdir().unwrap();
    let tiny = TinyModel { dtype: DType::F16, ..tiny() };
    write_directory(&generated(&tiny), directory.path(), 1);
    assert!(SourceModel::open(directory.path()).unwrap().sampling().is_empty());
    let path = directory.path().join("generation_config.json");
    write_json(&path, &json!({"do_sample": true, "temperature": 0.6, "top_p": 0.95, "top_k": 20}));
    let model = SourceModel::open(directory.path()).unwrap();
    assert_eq!(model.sampling().to_string(), "temperature 0.6, top_k 20, top_p 0.95");
    let written = write(&model, options(2, 0, Weights::Keep));
    let half = |role: Role| Bundle::open(&written.directory.join(role.name())).unwrap();
    assert_eq!(half(Role::Device).sampling(), model.sampling());
    assert!(half(Role::Cloud).sampling().is_empty());

    write_json(&path, &json!({"temperature": -1}));
    let text = SourceModel::open(directory.path()).err().unwrap().to_string();
    assert!(text.contains("generation_config.json: temperature: -1"), "{text}");
}

#[test]
fn a_gguf_file_says_how_to_sample() {
    let mut gguf = Gguf::of(&generated(&tiny()));
    assert!(open(&gguf).unwrap().sampling().is_empty());
    for (name, value) in [("temp", 0.75), ("top_p", 0.5), ("min_p", 0.25), ("penalty_repeat", 1.5)]
    {
        gguf.set(&format!("general.sampling.{name}"), Meta::F32(value));
    }
    gguf.set("general.sampling.top_k", Meta::I32(20));
    gguf.set("general.sampling.penalty_last_n", Meta::I32(-1));
    let sampling = open(&gguf).unwrap().sampling();
    let expected = "temperature 0.75, top_k 20, top_p 0.5, min_p 0.25, repetition_penalty 1.5";
    assert_eq!(sampling.to_string(), expected);
    assert_eq!(sampling.repeat_last_n, Some(u32::MAX));
    for (name, value) in [
        ("temp", Meta::F32(-1.0)),
        ("top_p", Meta::F32(f32::NAN)),
        ("top_k", Meta::I32(-2)),
        ("penalty_repeat", Meta::Text("much".into())),
    ] {
        let mut bad = gguf.clone();
        bad.set(&format!("general.sampling.{name}"), value);
        let text = open(&bad).err().unwrap().to_string();
        assert!(text.contains(&format!("general.sampling.{name}")), "{text}");
    }
}

#[test]
fn a_bundle_of_the_first_format_opens_and_is_greedy() {
    let written = write(&generated(&tiny()), options(2, 0, Weights::Keep));
    let device = written.directory.join("device");
    edit_json(&device.join("bundle.json"), |manifest| {
        manifest["format_version"] = json!(1);
        manifest.as_object_mut().unwrap().remove("control_tokens").unwrap();
    });
    let bundle = Bundle::open(&device).unwrap();
    assert_eq!(bundle.manifest().control_tokens, None);
    assert_eq!(bundle.sampling(), SamplingDefaults::default());
    assert_eq!(bundle.sampling().to_string(), "greedy");
}
