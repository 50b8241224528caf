//! The generated model is deterministic, and its greedy text varies.

use hat_loader::layout::dequantise_row;
use hat_loader::{DType, SourceModel, Tensor, TinyModel, generated};

#[test]
fn the_same_seed_gives_the_same_model() {
    let (a, b) = (generated(&TinyModel::default()), generated(&TinyModel::default()));
    let other = generated(&TinyModel { seed: 2, ..TinyModel::default() });
    for name in a.tensor_names() {
        let bytes = |model: &SourceModel| model.tensor(name).unwrap().bytes.to_vec();
        assert!(bytes(&a) == bytes(&b), "{name}");
        assert!(bytes(&a) != bytes(&other), "{name}");
    }
}

#[test]
fn the_tokenizer_has_as_many_tokens_as_the_embedding_rows() {
    for vocab in [259, 260, 512, 2000] {
        let model = generated(&TinyModel { vocab, ..TinyModel::default() });
        let tokenizer: tokenizers::Tokenizer = model.tokenizer_json().parse().unwrap();
        assert_eq!(tokenizer.get_vocab_size(true), vocab);
        let text = "A nation's tin \u{e9}\u{1f980} <|im_end|>\n";
        let ids = tokenizer.encode(text, true).unwrap().get_ids().to_vec();
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        assert!(ids.iter().all(|id| (*id as usize) < vocab));
    }
}

#[test]
fn greedy_text_has_many_distinct_tokens() {
    for dtype in [DType::Q8_0, DType::Q4_0, DType::Q4_1, DType::Bf16] {
        for seed in 1..=3 {
            let model = generated(&TinyModel { dtype, seed, ..TinyModel::default() });
            let mut tokens = Forward::new(&model).greedy(40, 96);
            tokens.sort_unstable();
            tokens.dedup();
            assert!(tokens.len() >= 30, "{dtype:?} {seed}: {} distinct tokens", tokens.len());
            assert!(tokens.iter().all(|token| *token >= 3), "a special token");
        }
    }
}

/// A plain forward pass in f32 over one sequence.
struct Forward<'a> {
    model: &'a SourceModel,
    /// Keys and values by layer and position.
    cache: Vec<Vec<(Vec<f32>, Vec<f32>)>>,
}

impl<'a> Forward<'a> {
    fn new(model: &'a SourceModel) -> Self {
        Self { model, cache: vec![Vec::new(); model.config().num_hidden_layers] }
    }

    fn greedy(&mut self, mut token: usize, steps: usize) -> Vec<usize> {
        let mut tokens = Vec::new();
        for position in 0..steps {
            let logits = self.step(token, position);
            token = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
            tokens.push(token);
        }
        tokens
    }

    fn step(&mut self, token: usize, position: usize) -> Vec<f32> {
        let mut x = rows(&self.tensor("model.embed_tokens.weight")).swap_remove(token);
        for layer in 0..self.cache.len() {
            let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
            let normed = norm(&x, &self.vector(&name("input_layernorm")));
            let attended = self.attend(layer, position, &normed);
            add(&mut x, &self.linear(&name("self_attn.o_proj"), &attended));
            let normed = norm(&x, &self.vector(&name("post_attention_layernorm")));
            let up = self.linear(&name("mlp.up_proj"), &normed);
            let gate = self.linear(&name("mlp.gate_proj"), &normed);
            let silu = |g: f32| g / (1.0 + (-g).exp());
            let product: Vec<f32> = gate.iter().zip(up).map(|(g, u)| silu(*g) * u).collect();
            add(&mut x, &self.linear(&name("mlp.down_proj"), &product));
        }
        self.linear("lm_head.weight", &norm(&x, &self.vector("model.norm.weight")))
    }

    fn attend(&mut self, layer: usize, position: usize, x: &[f32]) -> Vec<f32> {
        let config = self.model.config();
        let (dim, group) =
            (config.head_dim, config.num_attention_heads / config.num_key_value_heads);
        let name = |part: &str| format!("model.layers.{layer}.self_attn.{part}.weight");
        let mut q = self.linear(&name("q_proj"), x);
        let mut k = self.linear(&name("k_proj"), x);
        let v = self.linear(&name("v_proj"), x);
        for head in q.chunks_mut(dim).chain(k.chunks_mut(dim)) {
            rotate(head, position, &config.inv_freq());
        }
        self.cache[layer].push((k, v));
        let mut out = Vec::new();
        for (head, q) in q.chunks(dim).enumerate() {
            let part = head / group * dim..(head / group + 1) * dim;
            let scores = self.cache[layer].iter().map(|(k, _)| {
                let dot: f32 = q.iter().zip(&k[part.clone()]).map(|(a, b)| a * b).sum();
                (dot / (dim as f32).sqrt()).exp()
            });
            let scores: Vec<f32> = scores.collect();
            let total: f32 = scores.iter().sum();
            let mut sum = vec![0.0; dim];
            for (score, (_, v)) in scores.iter().zip(&self.cache[layer]) {
                let weighted: Vec<f32> =
                    v[part.clone()].iter().map(|v| v * score / total).collect();
                add(&mut sum, &weighted);
            }
            out.append(&mut sum);
        }
        out
    }

    fn tensor(&self, name: &str) -> Tensor {
        self.model.tensor(name).unwrap()
    }

    fn vector(&self, name: &str) -> Vec<f32> {
        let tensor = self.tensor(name);
        tensor.bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn linear(&self, name: &str, x: &[f32]) -> Vec<f32> {
        let weights = rows(&self.tensor(name));
        weights.iter().map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
    }
}

fn rows(tensor: &Tensor) -> Vec<Vec<f32>> {
    let k = tensor.shape[1];
    let row_bytes = tensor.dtype.row_bytes(k).unwrap();
    let row = |bytes: &[u8]| {
        let mut row = vec![0.0; k];
        dequantise_row(tensor.dtype, k, bytes, &mut row);
        row
    };
    tensor.bytes.chunks(row_bytes).map(row).collect()
}

fn norm(x: &[f32], weight: &[f32]) -> Vec<f32> {
    let square = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
    let scale = 1.0 / (square + 1e-5).sqrt();
    x.iter().zip(weight).map(|(x, w)| x * scale * w).collect()
}

fn rotate(head: &mut [f32], position: usize, inv_freq: &[f32]) {
    let half = head.len() / 2;
    for i in 0..half {
        let (sin, cos) = (position as f32 * inv_freq[i]).sin_cos();
        let (a, b) = (head[i], head[i + half]);
        head[i] = a * cos - b * sin;
        head[i + half] = b * cos + a * sin;
    }
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}
