//! Quantised matrices of Hugging Face directories, by the `quantization_config` of `config.json`:
//! GPTQ, AWQ, compressed-tensors and FP8.
//!
//! Such a matrix stands in several tensors: codes, scales, and maybe zeros. It is read as q4_0 or
//! q8_0 where these hold the same numbers, else as f32 numbers.

mod matrix;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::Value;

use crate::config::short;
use crate::error::{ConfigError, LoadError};
use crate::rows::SourceTensor;
use crate::tensor::{DType, TensorBytes};

use matrix::{Along, Axis, Element, Field, Matrix, Zeros};

/// A tensor of a safetensors file, whatever its type.
pub(crate) struct RawTensor {
    pub(crate) path: PathBuf,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: TensorBytes,
}

/// All tensors of a directory by name.
pub(crate) type RawTensors = BTreeMap<String, RawTensor>;

/// The form of a model's quantised matrices.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Scheme {
    method: &'static str,
    codes: Codes,
    scales: Scales,
}

/// Form of the codes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Codes {
    /// `qweight` in words along K, `qzeros` in words along N, less one if `offset` is 1.
    Gptq { bits: u32, offset: i32 },
    /// `qweight` and `qzeros` in words along N, in an order of their own.
    Awq,
    /// `weight_packed` in words along K, `weight_zero_point` in words along N unless symmetric.
    Packed { bits: u32, symmetric: bool },
    /// `weight` of signed bytes.
    Bytes { symmetric: bool },
    /// `weight` of E4M3 numbers.
    Float8,
}

/// Weights that share a scale.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Scales {
    Tensor,
    Row,
    Group(usize),
    Block(usize, usize),
}

/// Places of eight columns in a word of AWQ.
const AWQ_ORDER: [u32; 8] = [0, 4, 1, 5, 2, 6, 3, 7];
const KEY: &str = "quantization_config";
const FLOATS: &[Dtype] = &[Dtype::F32, Dtype::F16, Dtype::BF16];

impl Scheme {
    /// The scheme that a `config.json` names, if it names one.
    ///
    /// # Errors
    /// The key whose value is not supported.
    pub(crate) fn of(json: &Value) -> Result<Option<Self>, ConfigError> {
        let Some(json) = json.get(KEY).filter(|value| !value.is_null()) else {
            return Ok(None);
        };
        if !json.is_object() {
            return Err(ConfigError::new(KEY, format!("{} is not an object", short(json))));
        }
        let keys = Keys(json);
        Ok(Some(match keys.text("quant_method")? {
            "gptq" => Self::gptq(&keys)?,
            "awq" => Self::awq(&keys)?,
            "fp8" => Self::fp8(&keys)?,
            "compressed-tensors" => Self::compressed(&keys)?,
            _ => {
                let reason = format!(
                    "{} is not supported; gptq, awq, fp8, compressed-tensors, the unquantised \
                     model and GGUF files are",
                    keys.shown("quant_method")
                );
                return Err(ConfigError::new(KEY, reason));
            }
        }))
    }

    fn gptq(keys: &Keys<'_>) -> Result<Self, ConfigError> {
        if keys.0.get("desc_act").and_then(Value::as_bool) == Some(true) {
            let reason = "not supported: rows in the order of activation (act-order)";
            return Err(keys.refuse("desc_act", reason));
        }
        let offset = match keys.0.get("checkpoint_format").map_or(Some("gptq"), Value::as_str) {
            Some("gptq") => 1,
            Some("gptq_v2") => 0,
            _ => return Err(keys.refuse("checkpoint_format", "not gptq or gptq_v2")),
        };
        let bits = keys.bits("bits", &[2, 4, 8])?;
        let codes = Codes::Gptq { bits, offset };
        Ok(Self { method: "gptq", codes, scales: keys.group("group_size")? })
    }

    fn awq(keys: &Keys<'_>) -> Result<Self, ConfigError> {
        keys.bits("bits", &[4])?;
        let version = keys.0.get("version").and_then(Value::as_str).unwrap_or("gemm");
        if !version.eq_ignore_ascii_case("gemm") {
            return Err(keys.refuse("version", "not supported, only gemm"));
        }
        Ok(Self { method: "awq", codes: Codes::Awq, scales: keys.group("group_size")? })
    }

    fn fp8(keys: &Keys<'_>) -> Result<Self, ConfigError> {
        if keys.0.get("fmt").is_some_and(|format| format.as_str() != Some("e4m3")) {
            return Err(keys.refuse("fmt", "not supported, only e4m3"));
        }
        let scales = match keys.0.get("weight_block_size").filter(|value| !value.is_null()) {
            None => Scales::Tensor,
            Some(_) => keys.block("weight_block_size")?,
        };
        Ok(Self { method: "fp8", codes: Codes::Float8, scales })
    }

    fn compressed(keys: &Keys<'_>) -> Result<Self, ConfigError> {
        let groups = keys.0.get("config_groups").and_then(Value::as_object);
        let mut groups = groups.into_iter().flatten();
        let (Some((_, group)), None) = (groups.next(), groups.next()) else {
            return Err(keys.refuse("config_groups", "not supported, only one group"));
        };
        let weights = Keys(group.get("weights").unwrap_or(&Value::Null));
        let symmetric = weights.0.get("symmetric").and_then(Value::as_bool).unwrap_or(true);
        let codes = match (keys.text("format")?, weights.text("type")?) {
            ("pack-quantized", "int") => {
                Codes::Packed { bits: weights.bits("num_bits", &[2, 4, 8])?, symmetric }
            }
            ("int-quantized" | "naive-quantized", "int") => {
                weights.bits("num_bits", &[8])?;
                Codes::Bytes { symmetric }
            }
            ("float-quantized" | "naive-quantized", "float") => {
                weights.bits("num_bits", &[8])?;
                Codes::Float8
            }
            _ => {
                let reason = "not supported; supported: pack-quantized, int-quantized, \
                              naive-quantized and float-quantized, of int or float";
                return Err(keys.refuse("format", reason));
            }
        };
        let scales = match weights.text("strategy")? {
            "tensor" => Scales::Tensor,
            "channel" => Scales::Row,
            "group" => weights.group("group_size")?,
            "block" => weights.block("block_structure")?,
            _ => return Err(weights.refuse("strategy", "not tensor, channel, group or block")),
        };
        Ok(Self { method: "compressed-tensors", codes, scales })
    }

    /// Name of the tensor of codes behind that of its module, and its types.
    fn codes_name(&self) -> (&'static str, Dtype) {
        match self.codes {
            Codes::Gptq { .. } | Codes::Awq => (".qweight", Dtype::I32),
            Codes::Packed { .. } => (".weight_packed", Dtype::I32),
            Codes::Bytes { .. } => (".weight", Dtype::I8),
            Codes::Float8 => (".weight", Dtype::F8_E4M3),
        }
    }

    fn bits(&self) -> u32 {
        match self.codes {
            Codes::Gptq { bits, .. } | Codes::Packed { bits, .. } => bits,
            Codes::Awq => 4,
            Codes::Bytes { .. } | Codes::Float8 => 8,
        }
    }

    /// The matrix of a module; its tensors are taken out of `raw`.
    fn matrix(&self, module: &str, raw: &mut RawTensors) -> Result<SourceTensor, LoadError> {
        let (suffix, dtype) = self.codes_name();
        let name = format!("{module}{suffix}");
        let codes = raw.remove(&name).expect("modules are found by it");
        let mut parts = Parts { module, raw, path: &codes.path };
        let (rows, columns) = match *codes.shape {
            [rows, columns] if rows > 0 && columns > 0 => (rows, columns),
            _ => return Err(mismatch(&codes, &name, format!("{dtype:?} of two dimensions"))),
        };
        let per_word = 32 / self.bits() as usize;
        let (n, k) = match self.codes {
            Codes::Gptq { .. } => (columns, rows.saturating_mul(per_word)),
            Codes::Awq => (columns.saturating_mul(per_word), rows),
            Codes::Packed { .. } => parts.packed_shape(rows, columns, per_word)?,
            Codes::Bytes { .. } | Codes::Float8 => (rows, columns),
        };
        let word = |along, order| Element::Word { bits: self.bits(), along, order };
        let (element, n_axis, k_axis) = match self.codes {
            Codes::Gptq { .. } => (word(Along::K, None), Axis::new(1, 1), Axis::new(per_word, n)),
            Codes::Awq => {
                let order = Some(&AWQ_ORDER);
                (word(Along::N, order), Axis::new(per_word, 1), Axis::new(1, columns))
            }
            Codes::Packed { .. } => {
                (word(Along::K, None), Axis::new(1, columns), Axis::new(per_word, 1))
            }
            Codes::Bytes { .. } => (Element::I8, Axis::new(1, columns), Axis::new(1, 1)),
            Codes::Float8 => (Element::F8, Axis::new(1, columns), Axis::new(1, 1)),
        };
        let field = Field { bytes: codes.bytes.clone(), element, n: n_axis, k: k_axis };
        let scales = self.scale_field(&mut parts, n, k)?;
        let zeros = self.zeros(&mut parts, n, k)?;
        self.check_order(&mut parts, k)?;
        parts.raw.remove(&format!("{module}.input_scale"));
        let matrix = Matrix { codes: field, bits: self.bits(), zeros, scales, n, k };
        let name = format!("{} {} bits", self.method, self.bits());
        Ok(matrix.tensor(codes.path, name))
    }

    /// Weights of K that share a scale.
    fn group(&self, k: usize) -> usize {
        match self.scales {
            Scales::Tensor | Scales::Row => k.max(1),
            Scales::Group(group) | Scales::Block(_, group) => group,
        }
    }

    fn scale_field(&self, parts: &mut Parts<'_>, n: usize, k: usize) -> Result<Field, LoadError> {
        let groups = k.div_ceil(self.group(k));
        let is_turned = matches!(self.codes, Codes::Gptq { .. } | Codes::Awq);
        let name = match (self.codes, self.method) {
            _ if is_turned => "scales",
            (_, "fp8") if self.scales != Scales::Tensor => "weight_scale_inv",
            _ => "weight_scale",
        };
        let (shapes, n_axis, k_axis) = match self.scales {
            Scales::Tensor => (vec![vec![], vec![1], vec![1, 1]], Axis::new(n, 0), Axis::new(k, 0)),
            Scales::Row | Scales::Group(_) if is_turned => {
                let each = self.group(k);
                (vec![vec![groups, n]], Axis::new(1, 1), Axis::new(each, n))
            }
            Scales::Row => (vec![vec![n, 1], vec![n]], Axis::new(1, 1), Axis::new(k, 0)),
            Scales::Group(each) => {
                (vec![vec![n, groups]], Axis::new(1, groups), Axis::new(each, 1))
            }
            Scales::Block(rows, each) => {
                let shape = vec![n.div_ceil(rows), groups];
                (vec![shape], Axis::new(rows, groups), Axis::new(each, 1))
            }
        };
        let scales = parts.take(name, FLOATS, &shapes)?;
        let element = match scales.dtype {
            Dtype::F16 => Element::F16,
            Dtype::BF16 => Element::Bf16,
            _ => Element::F32,
        };
        Ok(Field { bytes: scales.bytes, element, n: n_axis, k: k_axis })
    }

    fn zeros(&self, parts: &mut Parts<'_>, n: usize, k: usize) -> Result<Zeros, LoadError> {
        let bits = self.bits();
        let per_word = 32 / bits as usize;
        let words = n.div_ceil(per_word);
        let each = self.group(k);
        let groups = k.div_ceil(each);
        let word = |order| Element::Word { bits, along: Along::N, order };
        let half = 1 << (bits - 1);
        let (name, dtype, shape, element, n_axis, k_axis, plus) = match self.codes {
            Codes::Packed { symmetric: true, .. } => return Ok(Zeros::All(half)),
            Codes::Bytes { symmetric: true } | Codes::Float8 => return Ok(Zeros::All(0)),
            Codes::Gptq { offset, .. } => {
                let (n_axis, k_axis) = (Axis::new(per_word, 1), Axis::new(each, words));
                ("qzeros", Dtype::I32, [groups, words], word(None), n_axis, k_axis, offset)
            }
            Codes::Awq => {
                let (n_axis, k_axis) = (Axis::new(per_word, 1), Axis::new(each, words));
                let element = word(Some(&AWQ_ORDER));
                ("qzeros", Dtype::I32, [groups, words], element, n_axis, k_axis, 0)
            }
            // Zeros have the offset of the codes, which takes itself off.
            Codes::Packed { .. } => {
                let (n_axis, k_axis) = (Axis::new(per_word, groups), Axis::new(each, 1));
                let shape = [words, groups];
                ("weight_zero_point", Dtype::I32, shape, word(None), n_axis, k_axis, 0)
            }
            Codes::Bytes { .. } => {
                let (n_axis, k_axis) = (Axis::new(1, groups), Axis::new(each, 1));
                ("weight_zero_point", Dtype::I8, [n, groups], Element::I8, n_axis, k_axis, 0)
            }
        };
        let bytes = parts.take(name, &[dtype], &[shape.to_vec()])?.bytes;
        Ok(Zeros::Each(Field { bytes, element, n: n_axis, k: k_axis }, plus))
    }

    /// Rows of K must stand in their own order: a list of their groups may say otherwise.
    fn check_order(&self, parts: &mut Parts<'_>, k: usize) -> Result<(), LoadError> {
        let name = match self.codes {
            Codes::Packed { .. } => "weight_g_idx",
            _ => "g_idx",
        };
        if !parts.has(name) {
            return Ok(());
        }
        let list = parts.take(name, &[Dtype::I32], &[vec![k]])?;
        let group = self.group(k);
        for (at, bytes) in list.bytes.as_chunks().0.iter().enumerate() {
            let got = i32::from_le_bytes(*bytes);
            if usize::try_from(got) != Ok(at / group) {
                let name = format!("{}.{name}", parts.module);
                let expected = format!("{} for row {at} (act-order is not supported)", at / group);
                let (path, got) = (list.path, got.to_string());
                return Err(LoadError::TensorMismatch { path, name, expected, got });
            }
        }
        Ok(())
    }
}

/// The tensors of a model, matrices of its scheme put together.
pub(crate) fn assemble(
    mut raw: RawTensors,
    scheme: Option<&Scheme>,
) -> Result<BTreeMap<String, SourceTensor>, LoadError> {
    let mut tensors = BTreeMap::new();
    if let Some(scheme) = scheme {
        let (suffix, dtype) = scheme.codes_name();
        let modules = raw.iter().filter(|(_, tensor)| tensor.dtype == dtype);
        let modules = modules.filter_map(|(name, _)| name.strip_suffix(suffix).map(str::to_owned));
        for module in modules.collect::<Vec<_>>() {
            let tensor = scheme.matrix(&module, &mut raw)?;
            tensors.insert(format!("{module}.weight"), tensor);
        }
    }
    for (name, tensor) in raw {
        let dtype = match tensor.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::Bf16,
            _ => return Err(mismatch(&tensor, &name, "f32, f16 or bf16".into())),
        };
        if tensors.contains_key(&name) {
            return Err(mismatch(&tensor, &name, "one form of it, it is also quantised".into()));
        }
        let RawTensor { path, shape, bytes, .. } = tensor;
        tensors.insert(name, SourceTensor::stored(path, dtype, shape, bytes));
    }
    Ok(tensors)
}

/// The tensors of one module.
struct Parts<'a> {
    module: &'a str,
    raw: &'a mut RawTensors,
    /// File of its codes.
    path: &'a Path,
}

impl Parts<'_> {
    fn has(&self, name: &str) -> bool {
        self.raw.contains_key(&format!("{}.{name}", self.module))
    }

    /// Takes a tensor of one of these types and shapes.
    fn take(
        &mut self,
        name: &str,
        dtypes: &[Dtype],
        shapes: &[Vec<usize>],
    ) -> Result<RawTensor, LoadError> {
        let name = format!("{}.{name}", self.module);
        let Some(tensor) = self.raw.remove(&name) else {
            return Err(LoadError::MissingTensor { path: self.path.to_owned(), name });
        };
        if dtypes.contains(&tensor.dtype) && shapes.contains(&tensor.shape) {
            return Ok(tensor);
        }
        Err(mismatch(&tensor, &name, format!("one of {dtypes:?} in one of {shapes:?}")))
    }

    /// N and K of a packed matrix, which `weight_shape` says.
    fn packed_shape(
        &mut self,
        rows: usize,
        words: usize,
        per_word: usize,
    ) -> Result<(usize, usize), LoadError> {
        let list = self.take("weight_shape", &[Dtype::I64, Dtype::I32], &[vec![2]])?;
        let width = list.bytes.len() / 2;
        let number = |at: usize| {
            let bytes = &list.bytes[at * width..][..width];
            let mut wide = [0; 8];
            wide[..width].copy_from_slice(bytes);
            usize::try_from(u64::from_le_bytes(wide)).unwrap_or(usize::MAX)
        };
        let (n, k) = (number(0), number(1));
        if n == rows && k.div_ceil(per_word) == words {
            return Ok((n, k));
        }
        let expected = format!("[{rows}, K], {words} words of K");
        let name = format!("{}.weight_shape", self.module);
        let (path, got) = (list.path, format!("[{n}, {k}]"));
        Err(LoadError::TensorMismatch { path, name, expected, got })
    }
}

fn mismatch(tensor: &RawTensor, name: &str, expected: String) -> LoadError {
    LoadError::TensorMismatch {
        path: tensor.path.clone(),
        name: name.to_owned(),
        expected,
        got: format!("{:?} {:?}", tensor.dtype, tensor.shape),
    }
}

/// Keys of a `quantization_config`, or of an object in it.
struct Keys<'a>(&'a Value);

impl<'a> Keys<'a> {
    fn refuse(&self, key: &str, reason: &str) -> ConfigError {
        ConfigError::new(format!("{KEY}.{key}"), format!("{}: {reason}", self.shown(key)))
    }

    fn shown(&self, key: &str) -> String {
        self.0.get(key).map_or("missing".to_owned(), short)
    }

    fn text(&self, key: &str) -> Result<&'a str, ConfigError> {
        let text = self.0.get(key).and_then(Value::as_str);
        text.ok_or_else(|| self.refuse(key, "not a string"))
    }

    fn bits(&self, key: &str, known: &[u32]) -> Result<u32, ConfigError> {
        let bits = self.0.get(key).and_then(Value::as_u64);
        let bits = known.iter().find(|known| bits == Some(u64::from(**known)));
        bits.copied().ok_or_else(|| self.refuse(key, &format!("not one of {known:?}")))
    }

    /// Rows of K that share a scale; -1 stands for all.
    fn group(&self, key: &str) -> Result<Scales, ConfigError> {
        match self.0.get(key).and_then(Value::as_i64) {
            Some(-1) => Ok(Scales::Row),
            Some(group @ 1..) if u32::try_from(group).is_ok() => Ok(Scales::Group(group as usize)),
            _ => Err(self.refuse(key, "not -1 or a whole number from 1")),
        }
    }

    fn block(&self, key: &str) -> Result<Scales, ConfigError> {
        let list = self.0.get(key).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let size = |value: &Value| value.as_u64().filter(|size| (1..=1 << 20).contains(size));
        match list {
            [rows, columns] => match (size(rows), size(columns)) {
                (Some(rows), Some(columns)) => Ok(Scales::Block(rows as usize, columns as usize)),
                _ => Err(self.refuse(key, "not two whole numbers from 1")),
            },
            _ => Err(self.refuse(key, "not two whole numbers from 1")),
        }
    }
}
