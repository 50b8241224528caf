//! Step times of whole middle submodels, each beside the sum of its launches' bounds.

use hat_compute::backend::cuda::numbers;
use hat_cuda::bound::{self, Work};
use hat_cuda::driver::Cuda;
use hat_cuda::plan::AttendShape;
use hat_cuda::table::WeightDType;
use hat_loader::DType;

use crate::model::{Load, Middle, Model, Room};
use crate::{Bench, Peaks};

/// Steps to measure.
#[derive(clap::Args)]
pub struct Wanted {
    /// `7b`, `13b`, `small`.
    #[arg(long, value_delimiter = ',', default_value = "7b,13b")]
    pub models: Vec<String>,
    /// Number formats of the weights.
    #[arg(long, value_delimiter = ',', default_value = "q4_1")]
    #[arg(value_parser = |name: &str| DType::from_name(name).ok_or("no type of weights"))]
    pub weights: Vec<DType>,
    /// Most layers that are loaded; fewer where memory is short.
    #[arg(long, default_value_t = usize::MAX)]
    pub layers: usize,
    /// A few of them.
    #[arg(long)]
    pub quick: bool,
    /// All combinations of sessions, rows and chunks, and not a row and a column of them.
    #[arg(long)]
    pub full: bool,
}

/// One step that was timed.
pub struct Timed {
    /// Rows of the step.
    pub load: Load,
    /// Seconds of all middle layers.
    pub seconds: f64,
    /// Part of it that does not grow with the layers: copies, plan, launches.
    pub outside: f64,
    /// Sum of the launches' bounds.
    pub bound: f64,
}

/// The launches of one layer: the least seconds of each, by bytes or by operations.
fn layer_bounds(model: &Model, numbers: WeightDType, load: &Load, peaks: &Peaks) -> Vec<f64> {
    let config = &model.config;
    let (hidden, inner, rows) = (config.hidden_size, config.intermediate_size, load.all());
    let (query, key_value) = (config.query_size(), config.key_value_size());
    let least =
        |work: Work, peak: f64| (work.bytes as f64 / peaks.copy).max(work.flops as f64 / peak);
    let moved = |bytes: usize| bytes as f64 / peaks.copy;
    let halves = matches!(numbers, WeightDType::F16 | WeightDType::Bf16);
    let peak = if halves { peaks.multiply } else { peaks.bytes };
    let product =
        |columns: usize, outputs: usize| least(bound::gemv(numbers, rows, columns, outputs), peak);
    let prepared = |columns: usize| least(bound::prepare(numbers, rows, columns), peak);
    let heads = AttendShape {
        heads: config.num_attention_heads,
        kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        window: None,
    };
    let attention = load.keys().iter().map(|keys| bound::attend(&heads, keys)).sum();
    let attention = least(attention, peaks.multiply);
    let norm = moved(8 * rows * hidden);
    let rope = moved(rows * (8 * query + 4 * key_value + 8 * key_value));
    let gate = least(bound::silu_mul(rows * inner), peaks.multiply);
    vec![
        norm,
        prepared(hidden),
        product(hidden, query),
        product(hidden, key_value),
        product(hidden, key_value),
        rope,
        attention,
        prepared(query),
        product(query, hidden),
        norm,
        prepared(hidden),
        product(hidden, inner),
        product(hidden, inner),
        gate,
        prepared(inner),
        product(inner, hidden),
    ]
}

/// The steps that are timed.
fn loads(wanted: &Wanted, small: bool) -> Vec<Load> {
    let (context, before) = if small { (40, 24) } else { (1024, 512) };
    let load = |sessions, rows, chunk| Load { sessions, rows, tree: false, context, chunk, before };
    let [sessions, rows, chunks]: [&[usize]; 3] = match (small, wanted.quick) {
        (true, _) => [&[1, 3], &[1, 4], &[33]],
        (false, true) => [&[1, 30], &[1, 8], &[512]],
        (false, false) => [&[1, 8, 30, 128], &[1, 2, 4, 8, 16], &[128, 512, 2048]],
    };
    let verify = || sessions.iter().flat_map(|count| rows.iter().map(|rows| (*count, *rows)));
    let mut all: Vec<Load> = verify().map(|(count, rows)| load(count, rows, 0)).collect();
    let most = if small { 5 } else { 16 };
    let trees = sessions.iter().map(|count| Load { tree: true, ..load(*count, most, 0) });
    all.extend(trees);
    for chunk in chunks {
        all.push(load(0, 0, *chunk));
        if wanted.full {
            all.extend(verify().map(|(count, rows)| load(count, rows, *chunk)));
        } else {
            let (count, rows) = if small { (3, 4) } else { (30, 8) };
            all.push(load(count, rows, *chunk));
        }
    }
    all
}

/// Times the steps of one model; `None` (and a line that says why) if it can't be measured.
pub fn measure(
    bench: &mut Bench,
    ordinal: usize,
    wanted: &Wanted,
    model: &Model,
    dtype: DType,
) -> Option<Vec<Timed>> {
    let what = format!("{} {}", model.name, dtype.name());
    let Some(numbers) = numbers(dtype).filter(|_| model.takes(dtype)) else {
        println!("{what}: no such weights on a GPU");
        return None;
    };
    let mut gpu = match Cuda::open(ordinal) {
        Ok(gpu) => gpu,
        Err(error) => {
            println!("{what}: {error}");
            return None;
        }
    };
    let (loads, layers) = fitting(&mut gpu, bench.small, wanted, model, dtype)?;
    let capacity = loads.iter().map(Load::all).max()?;
    let pages = loads.iter().map(Load::pages).max()?;
    let middle = Middle::load(gpu, model, dtype, layers, capacity, pages);
    let mut middle = match middle {
        Ok(middle) => middle,
        Err(error) => {
            println!("{what}: {error}");
            return None;
        }
    };
    let whole = model.middle_layers();
    println!("{what}: {layers} of {whole} layers on the GPU; all {whole} of them in each time");
    let mut timed = Vec::new();
    for load in loads {
        match middle.seconds(&load, bench.runs) {
            Ok([half, all]) => {
                let per_layer = (all - half).max(0.0) / (layers - layers.div_ceil(2)) as f64;
                let outside = (all - per_layer * middle.layers() as f64).max(0.0);
                let of_layer: f64 =
                    layer_bounds(model, numbers, &load, &bench.peaks).into_iter().sum();
                let (seconds, bound) =
                    (outside + per_layer * whole as f64, of_layer * whole as f64);
                let line = Timed { load, seconds, outside, bound };
                print(bench, &what, &line);
                timed.push(line);
            }
            Err(fault) => {
                println!("{what} {load:?}: {fault}");
                return None;
            }
        }
    }
    Some(timed)
}

/// The steps and layers for which there is memory.
fn fitting(
    gpu: &mut Cuda,
    small: bool,
    wanted: &Wanted,
    model: &Model,
    dtype: DType,
) -> Option<(Vec<Load>, usize)> {
    let mut loads = loads(wanted, small);
    let mut layers = wanted.layers.clamp(2, model.middle_layers());
    loop {
        let capacity = loads.iter().map(Load::all).max()?;
        let pages = loads.iter().map(Load::pages).max()?;
        let room = Room::of(model, dtype, layers, pages, capacity);
        match room.fits(gpu) {
            Ok(true) => return Some((loads, layers)),
            Ok(false) => {}
            Err(error) => {
                println!("{} {}: {error}", model.name, dtype.name());
                return None;
            }
        }
        let giga = |bytes: usize| bytes as f64 / 1e9;
        print!(
            "{} {}: {layers} layers and {pages} pages take {:.1} GB of weights, {:.1} of K and V, \
             {:.1} of rows, more than is free",
            model.name,
            dtype.name(),
            giga(room.weights),
            giga(room.kv),
            giga(room.rows)
        );
        // A few layers say as much as all; fewer sessions are another question.
        if layers > 4 {
            layers = layers.div_ceil(2).max(4);
            println!("; trying {layers} layers");
            continue;
        }
        let most = loads.iter().map(|load| load.sessions).max().unwrap_or(0);
        loads.retain(|load| load.sessions < most);
        if loads.is_empty() {
            println!("; it does not fit");
            return None;
        }
        println!("; trying without {most} sessions");
    }
}

fn print(bench: &mut Bench, what: &str, timed: &Timed) {
    let Timed { load, seconds, outside, bound } = timed;
    let Load { sessions, rows, tree, context, chunk, before } = load;
    let tree_text = if *tree { " trees" } else { "" };
    let chunk_text = if *chunk > 0 { format!(" + {chunk}@{before}") } else { String::new() };
    let name = format!("{what} {sessions}x{rows}@{context}{tree_text}{chunk_text}");
    let (ratio, share) = (seconds / bound, outside / seconds * 100.0);
    let [us, bound_us, outside_us] = [seconds, bound, outside].map(|seconds| seconds * 1e6);
    println!(
        "{name:<36} {us:10.1} us  bound {bound_us:10.1} us  ratio {ratio:5.2} (aim 1.4)  \
         outside kernels {outside_us:8.1} us {share:4.1} % (aim 3)"
    );
    bench.json(serde_json::json!({
        "kind": "step", "what": what, "sessions": sessions, "rows": rows, "tree": tree,
        "context": context, "chunk": chunk, "before": before, "us": us, "bound_us": bound_us,
        "outside_us": outside_us,
    }));
}
