//! Start-up: how long a bundle takes to open, how many bytes of weights that touches, and what
//! writing and checking bundles costs.
//!
//! The model has the shape and the types of SmolLM2-135M in Q4_1, with generated weights.
//! Arguments: `--model PATH` measures another one. Times are with a warm page cache, and on a
//! shared machine they are noise; the bytes are exact.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hat_benches::{Timing, read_bandwidth, time};
use hat_loader::bundle::WEIGHTS;
use hat_loader::{
    Bundle, BundleOptions, DType, Role, SourceModel, TinyModel, Weights, generated, write_bundles,
};

const BUDGET: Duration = Duration::from_millis(500);

fn main() {
    let model_path = model_argument();
    let read_bytes = read_bandwidth(1);
    println!("limit of one thread: read {:.1} GB/s", read_bytes / 1e9);
    let report = Report { read_bytes };

    let directory = std::env::temp_dir().join(format!("hat-bench-loader-{}", std::process::id()));
    let bundles = directory.join("bundles");
    let model = match &model_path {
        Some(path) => SourceModel::open(path).expect("the model opens"),
        None => generated(&default_shape()),
    };
    if let Some(path) = &model_path {
        let opened = time(BUDGET, || drop(SourceModel::open(path)));
        println!("{:<28} {:9.3} ms", "SourceModel::open", opened.seconds * 1e3);
    }
    let options = BundleOptions { split_layer: 2, tail_layers: 0, weights: Weights::Keep };
    let mut bytes = 0;
    let written = time(BUDGET, || {
        let _ = std::fs::remove_dir_all(&bundles);
        let report = write_bundles(&model, options, &bundles, &mut |_| {});
        let report = report.expect("bundles are written");
        bytes = report.device.bytes + report.cloud.bytes;
    });
    report.line("write_bundles, synced", written, bytes);
    for role in [Role::Device, Role::Cloud] {
        open_lines(&report, role, &bundles.join(role.name()));
    }
    let _ = std::fs::remove_dir_all(&directory);
}

fn open_lines(report: &Report, role: Role, directory: &Path) {
    let name = role.name();
    let opened = time(BUDGET, || drop(Bundle::open(directory)));
    let bundle = Bundle::open(directory).expect("the bundle opens");
    report.line(&format!("Bundle::open, {name}"), opened, parsed_bytes(&bundle));
    let weights = directory.join(WEIGHTS);
    match resident_bytes(&weights) {
        Some(resident) => println!(
            "  weights resident after open: {resident} of {} bytes (bound: header {}, \
             rounded up by the system's read around a fault)",
            bundle.weights_bytes(),
            header_bytes(&bundle),
        ),
        None => println!("  weights resident after open: not measured on this system"),
    }
    if role == Role::Device {
        let tokenizer = bundle.tokenizer_json().expect("it is there").unwrap_or_default();
        let read = time(BUDGET, || drop(bundle.tokenizer_json()));
        report.line("tokenizer_json, hashed", read, tokenizer.len() as u64);
    }
    let bytes = bundle.manifest().files.values().map(|file| file.bytes).sum();
    let verified = time(BUDGET, || bundle.verify().expect("nothing has changed"));
    report.line(&format!("Bundle::verify, {name}"), verified, bytes);
}

/// Times beside the time that reading this many bytes from memory takes.
struct Report {
    read_bytes: f64,
}

impl Report {
    fn line(&self, what: &str, timing: Timing, bytes: u64) {
        let [median, min, max] = [timing.seconds, timing.min, timing.max].map(|s| s * 1e3);
        let bound = bytes as f64 / self.read_bytes * 1e3;
        println!(
            "{what:<28} {median:9.3} ms ({min:.3}-{max:.3})  {bytes:>11} bytes, \
             bound {bound:.3} ms: {:.0} %",
            bound / median * 100.0
        );
    }
}

/// Bytes that opening has to parse: manifest, header of the weights, token settings.
fn parsed_bytes(bundle: &Bundle) -> u64 {
    let size = |name: &str| {
        let path = bundle.directory().join(name);
        std::fs::metadata(path).map_or(0, |metadata| metadata.len())
    };
    let settings = match bundle.role() {
        Role::Device => size(hat_loader::bundle::TOKENIZER_CONFIG),
        Role::Cloud => 0,
    };
    size(hat_loader::bundle::MANIFEST) + settings + header_bytes(bundle)
}

/// The header's length with the eight bytes that state it.
fn header_bytes(bundle: &Bundle) -> u64 {
    use std::io::Read as _;

    let mut length = [0; 8];
    std::fs::File::open(bundle.directory().join(WEIGHTS))
        .and_then(|mut file| file.read_exact(&mut length))
        .expect("the bundle is open");
    u64::from_le_bytes(length) + 8
}

/// Bytes of a file's mapping that are in this process's memory; `None` without `/proc`.
fn resident_bytes(path: &Path) -> Option<usize> {
    let maps = std::fs::read_to_string("/proc/self/smaps").ok()?;
    let path = path.to_str()?;
    let mut lines = maps.lines().skip_while(|line| !line.ends_with(path));
    let rss = lines.find(|line| line.starts_with("Rss:"))?;
    Some(rss.split_whitespace().nth(1)?.parse::<usize>().ok()? << 10)
}

fn model_argument() -> Option<PathBuf> {
    let mut arguments = std::env::args().skip_while(|argument| argument != "--model");
    arguments.nth(1).map(PathBuf::from)
}

fn default_shape() -> TinyModel {
    TinyModel {
        layers: 30,
        hidden: 576,
        intermediate: 1536,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        vocab: 49_152,
        positions: 8192,
        tied: true,
        dtype: DType::Q4_1,
        ..TinyModel::default()
    }
}
