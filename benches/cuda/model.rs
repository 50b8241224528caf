//! A middle submodel with made-up weights, through the engine's own layers and CUDA backend, and
//! the steps that a cloud gives it.

use std::cell::RefCell;
use std::collections::HashMap;

use hat_benches::{made_up, seconds, spread};
use hat_compute::backend::cuda::CudaBackend;
use hat_compute::{LoadError, MiddleModel, Tensors};
use hat_core::page::pages_for;
use hat_core::sequence::Sequence;
use hat_cuda::driver::Cuda;
use hat_cuda::gpu::{Gpu as _, GpuError};
use hat_loader::{DType, LlamaConfig, Tensor, layout, split};
use hat_plan::{BatchBuffers, Computes as _, MiddleForward as _, MiddleStep};
use serde_json::json;

/// A model whose middle is measured.
#[derive(Clone)]
pub struct Model {
    /// Name in the table.
    pub name: &'static str,
    /// Its shape; all layers are counted as the cloud's but the first two.
    pub config: LlamaConfig,
}

impl Model {
    /// The shapes by their names: `7b`, `13b` (Vicuna's), and one that the emulator runs.
    pub fn named(name: &str) -> Option<Self> {
        let (name, hidden, intermediate, layers, heads) = match name {
            "7b" => ("7b", 4096, 11_008, 32, 32),
            "13b" => ("13b", 5120, 13_824, 40, 40),
            "small" => ("small", 128, 160, 6, 2),
            _ => return None,
        };
        let config = LlamaConfig::from_hf(&json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "hidden_size": hidden, "intermediate_size": intermediate,
            "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": heads, "rms_norm_eps": 1e-5, "vocab_size": 32_000,
            "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2,
            "tie_word_embeddings": false,
        }));
        Some(Self { name, config: config.expect("a shape that we compute") })
    }

    /// Layers between the device's two and the norm.
    pub fn middle_layers(&self) -> usize {
        self.config.num_hidden_layers - 2
    }

    /// True if its rows are whole blocks of a type.
    pub fn takes(&self, dtype: DType) -> bool {
        let mut specs = split::layer_tensors(0, &self.config).into_iter();
        specs.all(|spec| spec.shape.get(1).is_none_or(|k| dtype.row_bytes(*k).is_some()))
    }

    /// Parameters of a layer's matrices, and their bytes.
    pub fn layer_size(&self, dtype: DType) -> (usize, usize) {
        let (mut params, mut bytes) = (0, 0);
        for spec in split::layer_tensors(0, &self.config) {
            if let &[n, k] = &spec.shape[..] {
                params += n * k;
                bytes += layout::packed_bytes(dtype, n, k).expect("whole blocks");
            }
        }
        (params, bytes)
    }

    /// Bytes of K and V of a row in one layer.
    pub fn kv_row_bytes(&self) -> usize {
        4 * self.config.key_value_size()
    }
}

/// Weights that are made up: of each shape one.
struct MadeUp {
    config: LlamaConfig,
    dtype: DType,
    known: RefCell<HashMap<Vec<usize>, Tensor>>,
}

impl Tensors for MadeUp {
    fn config(&self) -> &LlamaConfig {
        &self.config
    }

    fn tensor(&self, name: &str) -> Result<Tensor, LoadError> {
        let specs = split::model_tensors(&self.config);
        let spec = specs.into_iter().find(|spec| spec.name == name).expect("a name of the model");
        let mut known = self.known.borrow_mut();
        let make = || made_up(name, self.dtype, &spec.shape);
        let tensor = known.entry(spec.shape.clone()).or_insert_with(make);
        Ok(Tensor { name: name.to_owned(), ..tensor.clone() })
    }
}

/// Rows of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Sessions that verify.
    pub sessions: usize,
    /// Rows of each.
    pub rows: usize,
    /// Binary trees of them, level by level, instead of chains.
    pub tree: bool,
    /// Rows that each of them has in its store.
    pub context: usize,
    /// Rows of a prompt's chunk beside them; 0 for none.
    pub chunk: usize,
    /// Rows of that prompt before the chunk.
    pub before: usize,
}

impl Load {
    /// All rows.
    pub fn all(&self) -> usize {
        self.sessions * self.rows + self.chunk
    }

    /// Pages of the store.
    pub fn pages(&self) -> usize {
        // One more row of context in every other step.
        let chunk = if self.chunk > 0 { pages_for(self.before + self.chunk + 1) } else { 0 };
        self.sessions * pages_for(self.context + 1 + self.rows) + chunk
    }

    /// Keys that each row sees, sequence by sequence.
    pub fn keys(&self) -> Vec<Vec<usize>> {
        let seen = |from: usize, rows: usize| (from + 1..=from + rows).collect();
        let chain: Vec<usize> = seen(self.context, self.rows);
        // Nodes that stand at the same depth see as many.
        let tree = (1..=self.rows).map(|node| self.context + 1 + node.ilog2() as usize);
        let each = if self.tree { tree.collect() } else { chain };
        let mut all = vec![each; self.sessions];
        if self.chunk > 0 {
            all.push(seen(self.before, self.chunk));
        }
        all
    }

    /// The plan of the rows, sessions `later` rows on.
    pub fn plan(&self, later: usize) -> BatchBuffers {
        let number = |count: usize| u32::try_from(count).expect("few rows");
        let mut plan = BatchBuffers::default();
        plan.clear(); // an empty plan has its first borders
        let mut first_page = 0;
        let mut sequence = |committed: usize, rows: usize| {
            let pages = pages_for(committed + rows);
            let numbers = (number(first_page)..number(first_page + pages)).collect();
            first_page += pages;
            let mut sequence = Sequence::new(numbers, number(committed + rows));
            if committed > 0 {
                sequence.append_committed(1, number(committed), 0).expect("rows that fit");
            }
            sequence
        };
        for _ in 0..self.sessions {
            let context = self.context + later;
            let mut sequence = sequence(context, self.rows);
            let first = number(context) + 1;
            let parent = |node: u32| match (self.tree, node) {
                (true, 1..) => first + (node - 1) / 2,
                _ => first + node - 1,
            };
            let parents: Vec<u32> = (0..number(self.rows)).map(parent).collect();
            sequence.append_pending(first, &parents).expect("rows that fit");
            for id in first..first + number(self.rows) {
                assert!(sequence.push_row(id, &mut plan), "it pends");
            }
            plan.end_sequence(sequence.pages());
        }
        if self.chunk > 0 {
            let before = self.before + later;
            let mut sequence = sequence(before, self.chunk);
            let first = number(before) + 1;
            let place = sequence.append_committed(first, number(self.chunk), number(before));
            plan.push_committed(place.expect("rows that fit"), number(self.chunk));
            plan.end_sequence(sequence.pages());
        }
        plan
    }

    /// The step, its sessions `later` rows on.
    fn step(&self, model: &Model, later: usize) -> MiddleStep {
        let sequences = self.sessions + usize::from(self.chunk > 0);
        let numbers = self.all() * model.config.hidden_size;
        MiddleStep {
            plan: self.plan(later),
            entry_layers: vec![2; sequences],
            hidden: (0..numbers).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect(),
            ..MiddleStep::default()
        }
    }
}

/// The middle layers on a GPU.
pub struct Middle {
    model: Model,
    layers: usize,
    on_gpu: MiddleModel<CudaBackend<Cuda>>,
}

/// Memory that a middle submodel takes on the GPU beside its work space.
pub struct Room {
    /// Bytes of weights.
    pub weights: usize,
    /// Bytes of K and V.
    pub kv: usize,
    /// Bytes of rows between layers.
    pub rows: usize,
}

impl Room {
    /// Memory for this many layers, pages and rows.
    pub fn of(model: &Model, dtype: DType, layers: usize, pages: usize, capacity: usize) -> Self {
        let config = &model.config;
        let columns = 3 * config.hidden_size
            + 2 * config.query_size()
            + 2 * config.key_value_size()
            + 4 * config.intermediate_size;
        Self {
            weights: layers * model.layer_size(dtype).1,
            kv: layers * pages * hat_cuda::plan::PAGE_SIZE * model.kv_row_bytes(),
            rows: 4 * capacity * columns,
        }
    }

    /// All of it.
    pub fn bytes(&self) -> usize {
        self.weights + self.kv + self.rows
    }

    /// True if the GPU has as much free now.
    pub fn fits(&self, gpu: &mut Cuda) -> Result<bool, GpuError> {
        match gpu.alloc(self.bytes(), "a middle submodel") {
            Ok(_) => Ok(true),
            Err(GpuError::OutOfMemory { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

impl Middle {
    /// `layers` of the middle layers on a GPU.
    pub fn load(
        gpu: Cuda,
        model: &Model,
        dtype: DType,
        layers: usize,
        capacity: usize,
        pages: usize,
    ) -> Result<Self, LoadError> {
        let known = RefCell::default();
        let tensors = MadeUp { config: model.config.clone(), dtype, known };
        let backend = CudaBackend::new(gpu);
        let on_gpu = MiddleModel::load(backend, &tensors, 2..2 + layers, capacity, pages)?;
        Ok(Self { model: model.clone(), layers, on_gpu })
    }

    /// Median seconds of a step, through the first half of the layers and through all.
    pub fn seconds(&mut self, load: &Load, runs: usize) -> Result<[f64; 2], String> {
        let halves = [self.layers.div_ceil(2), self.layers];
        let mut steps = [0, 1].map(|later| load.step(&self.model, later));
        let rows = steps[0].hidden.clone();
        let mut medians = [0.0; 2];
        for (layers, median) in halves.into_iter().zip(&mut medians) {
            let mut times = Vec::with_capacity(runs);
            // The first are for clocks and graphs; a step's plan is never that of the one before.
            for run in 0..runs + 4 {
                let step = &mut steps[run % 2];
                step.hidden.copy_from_slice(&rows);
                step.exit_layer = u32::try_from(2 + layers).expect("few layers");
                let time = seconds(|| self.on_gpu.forward(step));
                if run >= 4 {
                    times.push(time);
                }
                if let Some(fault) = self.on_gpu.fault() {
                    return Err(fault.to_string());
                }
            }
            *median = spread(times).median;
        }
        Ok(medians)
    }

    /// Number of its layers.
    pub fn layers(&self) -> usize {
        self.layers
    }
}
