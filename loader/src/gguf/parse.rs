//! The container: header, metadata, tensor infos. Bytes from outside are hostile. Pure.
//!
//! Nothing is allocated from a count or a length before that many bytes are known to be there.
//! Arrays are read once to find their end and kept as byte ranges.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::ops::Range;

use super::GgufError;
use super::types::GgufType;

/// Limits on a file's counts and lengths.
const METADATA_MAX: u64 = 1 << 16;
const TENSORS_MAX: u64 = 1 << 16;
const NAME_BYTES_MAX: usize = 256;
const DIMENSIONS_MAX: u32 = 4;
const ALIGNMENT_DEFAULT: usize = 32;
const ALIGNMENT_MAX: u32 = 1 << 16;

/// The parts of a file, as ranges of it.
#[derive(Debug)]
pub(crate) struct Container<'a> {
    pub(crate) metadata: BTreeMap<String, Value<'a>>,
    pub(crate) tensors: BTreeMap<String, TensorInfo>,
}

/// A tensor's place in the file.
#[derive(Debug, Clone)]
pub(crate) struct TensorInfo {
    pub(crate) kind: &'static GgufType,
    /// Slowest dimension first, as everywhere in this crate; the file has the reverse.
    pub(crate) shape: Vec<usize>,
    /// Bytes in the file, counted from its start.
    pub(crate) range: Range<usize>,
    /// File that holds it, of those of its model.
    pub(crate) part: usize,
}

/// One metadata value.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Value<'a> {
    /// u8, u16, u32, u64.
    Unsigned(u64),
    /// i8, i16, i32, i64.
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(&'a str),
    Array(Array<'a>),
}

/// Description for messages: short, whatever the file holds.
impl fmt::Debug for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const CHARS_MAX: usize = 40;
        match self {
            Self::Unsigned(value) => write!(f, "{value}"),
            Self::Signed(value) => write!(f, "{value}"),
            Self::Float(value) => write!(f, "{value}"),
            Self::Bool(value) => write!(f, "{value}"),
            Self::Array(array) => write!(f, "an array of {}", array.len),
            Self::Text(text) => match text.char_indices().nth(CHARS_MAX) {
                None => write!(f, "{text:?}"),
                Some((end, _)) => write!(f, "{:?}...", &text[..end]),
            },
        }
    }
}

/// An array whose elements have been read once, so that reading them again can't fail.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Array<'a> {
    kind: ElementKind,
    len: usize,
    bytes: &'a [u8],
}

impl<'a> Array<'a> {
    pub(crate) fn len(self) -> usize {
        self.len
    }

    /// The elements, one after another.
    pub(crate) fn iter(self) -> impl Iterator<Item = Value<'a>> {
        let mut reader = Reader { bytes: self.bytes, at: 0 };
        (0..self.len).map(move |_| reader.value(self.kind, "").expect("read at parsing"))
    }
}

/// Types of metadata values by their number in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ElementKind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Text,
    U64,
    I64,
    F64,
}

/// The number of the type "array".
const ARRAY: u32 = 9;

impl ElementKind {
    fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::U8,
            1 => Self::I8,
            2 => Self::U16,
            3 => Self::I16,
            4 => Self::U32,
            5 => Self::I32,
            6 => Self::F32,
            7 => Self::Bool,
            8 => Self::Text,
            10 => Self::U64,
            11 => Self::I64,
            12 => Self::F64,
            _ => return None,
        })
    }
}

/// Parses everything in front of the data and checks where the data lies. Touches no weight.
pub(crate) fn parse(file: &[u8]) -> Result<Container<'_>, GgufError> {
    let mut reader = Reader { bytes: file, at: 0 };
    let magic: [u8; 4] = reader.array("magic")?;
    if &magic != b"GGUF" {
        return Err(GgufError::Magic { got: magic });
    }
    match reader.u32("version")? {
        2 | 3 => {}
        version if matches!(version.swap_bytes(), 1..=3) => return Err(GgufError::BigEndian),
        version => return Err(GgufError::Version { version }),
    }
    let tensor_count = reader.count("tensor count", TENSORS_MAX)?;
    let metadata_count = reader.count("metadata count", METADATA_MAX)?;

    let mut metadata = BTreeMap::new();
    for _ in 0..metadata_count {
        let key = reader.name("metadata key")?;
        let value = reader.metadata_value(key)?;
        if metadata.insert(key.to_owned(), value).is_some() {
            return Err(GgufError::Duplicate { what: "metadata key", name: key.to_owned() });
        }
    }
    let alignment = alignment(&metadata)?;

    let mut infos = Vec::new();
    let mut names = HashSet::new();
    for _ in 0..tensor_count {
        let info = reader.tensor_info()?;
        if !names.insert(info.name) {
            return Err(GgufError::Duplicate { what: "tensor", name: info.name.to_owned() });
        }
        infos.push(info);
    }
    let data_start = reader
        .at
        .checked_next_multiple_of(alignment)
        .filter(|start| *start <= file.len() || infos.is_empty())
        .ok_or(GgufError::Truncated { what: "tensor data".into(), at: reader.at })?;
    let tensors = place(&infos, data_start, alignment, file.len())?;
    Ok(Container { metadata, tensors })
}

fn alignment(metadata: &BTreeMap<String, Value<'_>>) -> Result<usize, GgufError> {
    let key = "general.alignment";
    match metadata.get(key) {
        None => Ok(ALIGNMENT_DEFAULT),
        Some(Value::Unsigned(value)) if (1..=u64::from(ALIGNMENT_MAX)).contains(value) => {
            let alignment = *value as usize;
            if alignment.is_power_of_two() {
                return Ok(alignment);
            }
            let reason = format!("{alignment} is not a power of two");
            Err(GgufError::Metadata { key: key.to_owned(), reason })
        }
        Some(other) => {
            let reason = format!("{other:?} is not in 1..={ALIGNMENT_MAX}");
            Err(GgufError::Metadata { key: key.to_owned(), reason })
        }
    }
}

/// Turns offsets into ranges of the file: inside it, aligned, and apart from each other.
fn place(
    infos: &[RawInfo<'_>],
    data_start: usize,
    alignment: usize,
    file_bytes: usize,
) -> Result<BTreeMap<String, TensorInfo>, GgufError> {
    let mut tensors = BTreeMap::new();
    let mut ranges = Vec::with_capacity(infos.len());
    for info in infos {
        let name = info.name.to_owned();
        let bytes = info.bytes().ok_or_else(|| GgufError::Overflow { tensor: name.clone() })?;
        let offset = usize::try_from(info.offset).ok();
        let start = offset.and_then(|offset| offset.checked_add(data_start));
        let end = start.and_then(|start| start.checked_add(bytes));
        let (Some(start), Some(end)) = (start, end) else {
            return Err(GgufError::Overflow { tensor: name });
        };
        if !info.offset.is_multiple_of(alignment as u64) {
            return Err(GgufError::Misaligned { tensor: name, offset: info.offset, alignment });
        }
        if end > file_bytes {
            return Err(GgufError::Outside { tensor: name, end, file_bytes });
        }
        ranges.push((start, end, info.name));
        let tensor =
            TensorInfo { kind: info.kind, shape: info.shape.clone(), range: start..end, part: 0 };
        tensors.insert(name, tensor);
    }
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        if pair[1].0 < pair[0].1 {
            let (first, second) = (pair[0].2.to_owned(), pair[1].2.to_owned());
            return Err(GgufError::Overlap { first, second });
        }
    }
    Ok(tensors)
}

/// A tensor info before its offset is believed.
struct RawInfo<'a> {
    name: &'a str,
    kind: &'static GgufType,
    /// Slowest dimension first.
    shape: Vec<usize>,
    offset: u64,
}

impl RawInfo<'_> {
    /// Bytes of the data; `None` if that overflows or rows are no whole number of blocks.
    fn bytes(&self) -> Option<usize> {
        let (row, rows) = self.shape.split_last()?;
        let rows = rows.iter().copied().try_fold(1usize, usize::checked_mul)?;
        self.kind.row_bytes(*row)?.checked_mul(rows)
    }
}

/// A cursor that never leaves its bytes.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize, what: &str) -> Result<&'a [u8], GgufError> {
        let truncated = || GgufError::Truncated { what: what.to_owned(), at: self.at };
        let end = self.at.checked_add(len).ok_or_else(truncated)?;
        let bytes = self.bytes.get(self.at..end).ok_or_else(truncated)?;
        self.at = end;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], GgufError> {
        Ok(self.take(N, what)?.try_into().expect("taken N bytes"))
    }

    fn u32(&mut self, what: &str) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn count(&mut self, what: &'static str, max: u64) -> Result<u64, GgufError> {
        let count = self.u64(what)?;
        if count > max {
            return Err(GgufError::Count { what, count, max });
        }
        Ok(count)
    }

    fn text(&mut self, what: &str) -> Result<&'a str, GgufError> {
        let at = self.at;
        let len = self.u64(what)?;
        let len =
            usize::try_from(len).map_err(|_| GgufError::Truncated { what: what.to_owned(), at })?;
        let bytes = self.take(len, what)?;
        std::str::from_utf8(bytes).map_err(|_| GgufError::NotUtf8 { what: what.to_owned(), at })
    }

    /// A metadata key or a tensor's name.
    fn name(&mut self, what: &'static str) -> Result<&'a str, GgufError> {
        let name = self.text(what)?;
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            return Err(GgufError::NameLength { what, bytes: name.len(), max: NAME_BYTES_MAX });
        }
        Ok(name)
    }

    fn metadata_value(&mut self, key: &str) -> Result<Value<'a>, GgufError> {
        let number = self.u32(key)?;
        if number != ARRAY {
            return self.value(self.kind(number, key)?, key);
        }
        let number = self.u32(key)?;
        let kind = self.kind(number, key)?;
        let len = self.u64(key)?;
        let truncated = |_| GgufError::Truncated { what: key.to_owned(), at: self.at };
        let len = usize::try_from(len).map_err(truncated)?;
        // However large the length, reading ends with the file: each element takes a byte.
        let start = self.at;
        for _ in 0..len {
            self.value(kind, key)?;
        }
        Ok(Value::Array(Array { kind, len, bytes: &self.bytes[start..self.at] }))
    }

    /// The type of a value or of an array's elements; arrays of arrays are not used by anybody.
    fn kind(&self, number: u32, key: &str) -> Result<ElementKind, GgufError> {
        ElementKind::from_number(number).ok_or_else(|| GgufError::Metadata {
            key: key.to_owned(),
            reason: format!("value type {number} is not known or not possible here"),
        })
    }

    fn value(&mut self, kind: ElementKind, key: &str) -> Result<Value<'a>, GgufError> {
        Ok(match kind {
            ElementKind::U8 => Value::Unsigned(u64::from(self.array::<1>(key)?[0])),
            ElementKind::I8 => Value::Signed(i64::from(i8::from_le_bytes(self.array(key)?))),
            ElementKind::U16 => Value::Unsigned(u64::from(u16::from_le_bytes(self.array(key)?))),
            ElementKind::I16 => Value::Signed(i64::from(i16::from_le_bytes(self.array(key)?))),
            ElementKind::U32 => Value::Unsigned(u64::from(self.u32(key)?)),
            ElementKind::I32 => Value::Signed(i64::from(i32::from_le_bytes(self.array(key)?))),
            ElementKind::U64 => Value::Unsigned(self.u64(key)?),
            ElementKind::I64 => Value::Signed(i64::from_le_bytes(self.array(key)?)),
            ElementKind::F32 => Value::Float(f64::from(f32::from_le_bytes(self.array(key)?))),
            ElementKind::F64 => Value::Float(f64::from_le_bytes(self.array(key)?)),
            ElementKind::Text => Value::Text(self.text(key)?),
            ElementKind::Bool => match self.array::<1>(key)?[0] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                byte => {
                    let reason = format!("{byte} is neither true nor false");
                    return Err(GgufError::Metadata { key: key.to_owned(), reason });
                }
            },
        })
    }

    fn tensor_info(&mut self) -> Result<RawInfo<'a>, GgufError> {
        let name = self.name("tensor name")?;
        let dimensions = self.u32(name)?;
        if dimensions == 0 || dimensions > DIMENSIONS_MAX {
            let max = DIMENSIONS_MAX;
            return Err(GgufError::Dimensions { tensor: name.to_owned(), dimensions, max });
        }
        let mut shape = Vec::with_capacity(dimensions as usize);
        for _ in 0..dimensions {
            let overflow = |_| GgufError::Overflow { tensor: name.to_owned() };
            shape.push(usize::try_from(self.u64(name)?).map_err(overflow)?);
        }
        shape.reverse();
        let number = self.u32(name)?;
        let kind = GgufType::of(number);
        let kind =
            kind.filter(|kind| kind.form.is_some()).ok_or_else(|| GgufError::TensorType {
                tensor: name.to_owned(),
                number,
                kind: kind.map_or("unknown", |kind| kind.name),
            })?;
        let row = shape.last().copied().unwrap_or(0);
        let block = kind.block.0;
        if !row.is_multiple_of(block) {
            return Err(GgufError::Blocks { tensor: name.to_owned(), row, block });
        }
        let offset = self.u64(name)?;
        Ok(RawInfo { name, kind, shape, offset })
    }
}
