//! A cost file for `hat-sim` of this GPU as the cloud.

use std::path::Path;

use hat_loader::DType;
use serde_json::{Value, json};

use crate::Peaks;
use crate::model::Model;
use crate::step::Timed;

/// Testbeds whose devices, link and requests the file takes over.
const TESTBEDS: [(&str, &str); 2] = [
    ("7b", include_str!("../../tools/src/bin/hat-sim/costs/specbench-7b.json")),
    ("13b", include_str!("../../tools/src/bin/hat-sim/costs/cnndm-13b.json")),
];

/// Writes the file: the testbed of the model's size, its cloud replaced by one stage of this GPU
/// with the shares of its peaks that the measured steps reach.
pub fn write(
    path: &Path,
    gpu: &str,
    model: &Model,
    dtype: DType,
    peaks: &Peaks,
    steps: &[Timed],
) -> Result<(), String> {
    let testbed = TESTBEDS.iter().find(|(name, _)| *name == model.name).unwrap_or(&TESTBEDS[0]);
    let mut file: Value = serde_json::from_str(testbed.1).map_err(|error| error.to_string())?;
    let (params, bytes) = model.layer_size(dtype);
    let layers = model.middle_layers();
    let [read, compute] = shares(model, dtype, peaks, steps)?;
    let name: String = format!("{}-{}-{gpu}", model.name, dtype.name())
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    file["name"] = json!(name);
    file["source"] = json!(format!(
        "benches/cuda on {gpu}: copy and product peaks, and step times of a {} middle submodel \
         with made-up {} weights. Devices, link, requests and drafters: {}.",
        model.name,
        dtype.name(),
        testbed.0
    ));
    file["model"]["hidden_size"] = json!(model.config.hidden_size);
    file["model"]["cloud_layers"] = json!(layers);
    file["model"]["device_layers"] = json!(2);
    file["model"]["layer_params"] = json!(params as f64);
    file["model"]["layer_bytes"] = json!(bytes as f64);
    file["model"]["kv_bytes"] = json!(model.kv_row_bytes() as f64);
    file["cloud"] = json!({
        "stages": 1, "read_gb_s": peaks.copy / 1e9, "tera_flop_s": peak(dtype, peaks) / 1e12,
        "rows_max": 512,
    });
    let around = |share: f64| json!({ "value": share, "low": share * 0.9, "high": share * 1.1 });
    file["calibrated"]["cloud_read"] = around(read);
    file["calibrated"]["cloud_compute"] = around(compute);
    // What was published is of another cloud.
    file["published"] = json!([]);
    let text = serde_json::to_string_pretty(&file).map_err(|error| error.to_string())?;
    std::fs::write(path, text + "\n").map_err(|error| format!("{}: {error}", path.display()))?;
    println!(
        "{}: reads at {:.0} %, computes at {:.0} %",
        path.display(),
        read * 1e2,
        compute * 1e2
    );
    Ok(())
}

/// Operations a second of products with such weights.
fn peak(dtype: DType, peaks: &Peaks) -> f64 {
    if matches!(dtype, DType::F16 | DType::Bf16) { peaks.multiply } else { peaks.bytes }
}

/// Shares of the copy bandwidth and of the products' peak that hat-sim's model of a step (the
/// longer of the two) takes for the smallest and for the largest step.
fn shares(model: &Model, dtype: DType, peaks: &Peaks, steps: &[Timed]) -> Result<[f64; 2], String> {
    let layers = model.middle_layers() as f64;
    let (params, bytes) = model.layer_size(dtype);
    let chains = || steps.iter().filter(|step| !step.load.tree);
    let few = chains().filter(|step| step.load.chunk == 0).min_by_key(|step| step.load.all());
    let many = chains().max_by_key(|step| step.load.all());
    let (Some(few), Some(many)) = (few, many) else { return Err("no step was timed".to_owned()) };
    let context = few.load.sessions * few.load.context * model.kv_row_bytes();
    let read = layers * (bytes + context) as f64 / peaks.copy / few.seconds;
    let flops = 2.0 * layers * params as f64 * many.load.all() as f64;
    let compute = flops / peak(dtype, peaks) / many.seconds;
    Ok([read, compute].map(|share| share.clamp(1e-6, 100.0)))
}
