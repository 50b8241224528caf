//! The header of a safetensors file, read with distrust. Pure: no IO.
//!
//! The crate `safetensors` checks that shapes, types and offsets agree and that tensors tile the
//! data without holes. What it leaves to us: names that occur twice, and sums near `u64::MAX`.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::ops::Range;

use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, SafeTensorError};
use serde::Deserializer;
use serde::de::{Error as _, MapAccess, Visitor};

/// Bytes in front of the header: its length, little-endian.
const LENGTH_BYTES: usize = 8;
/// Longest header that is looked at.
const HEADER_BYTES_MAX: usize = 100_000_000;
/// Most dimensions of one tensor.
const DIMENSIONS_MAX: usize = 8;

/// An error in a safetensors header.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// The file ends within the eight bytes of the header's length.
    #[error("safetensors file of {bytes} bytes is too short to hold a header")]
    TooShort {
        /// Size of the file.
        bytes: usize,
    },
    /// The header's length is beyond the file or the limit.
    #[error("safetensors header says it has {header} bytes; {available} are possible")]
    Length {
        /// The length that the file states.
        header: u64,
        /// The length that it could have.
        available: usize,
    },
    /// The header is no JSON of the expected form, or names a tensor twice.
    #[error("safetensors header: {0}")]
    Json(#[from] serde_json::Error),
    /// Shapes, types and offsets contradict each other.
    #[error("safetensors header: {0}")]
    Tensors(#[from] SafeTensorError),
    /// A tensor has an absurd number of dimensions.
    #[error("tensor {name} has {dimensions} dimensions, at most {DIMENSIONS_MAX} are possible")]
    Dimensions {
        /// The tensor.
        name: String,
        /// Number of its dimensions.
        dimensions: usize,
    },
    /// The tensors and the file have different sizes.
    #[error("tensors end at byte {tensors} of the data, the file has {file} bytes of data")]
    DataLength {
        /// End of the last tensor, in bytes.
        tensors: usize,
        /// Bytes after the header.
        file: usize,
    },
}

/// One tensor of a safetensors file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// Bytes in the file, counted from its start.
    pub(crate) range: Range<usize>,
}

/// All tensors of a safetensors file by name. Touches nothing behind the header.
pub(crate) fn read(file: &[u8]) -> Result<BTreeMap<String, Entry>, HeaderError> {
    Ok(read_with_metadata(file)?.0)
}

/// Texts that a file says of itself, by name.
pub(crate) type Texts = HashMap<String, String>;

/// As [`read`], with the file's own texts.
pub(crate) fn read_with_metadata(
    file: &[u8],
) -> Result<(BTreeMap<String, Entry>, Texts), HeaderError> {
    let Some(length) = file.first_chunk::<LENGTH_BYTES>() else {
        return Err(HeaderError::TooShort { bytes: file.len() });
    };
    let length = u64::from_le_bytes(*length);
    let available = (file.len() - LENGTH_BYTES).min(HEADER_BYTES_MAX);
    let header = usize::try_from(length)
        .ok()
        .filter(|length| *length <= available)
        .and_then(|length| file.get(LENGTH_BYTES..LENGTH_BYTES + length))
        .ok_or(HeaderError::Length { header: length, available })?;

    let mut tensors = serde_json::Deserializer::from_slice(header);
    let (mut list, texts) = (&mut tensors).deserialize_map(HeaderVisitor)?;
    tensors.end()?;
    for (name, info) in &list {
        if info.shape.len() > DIMENSIONS_MAX {
            let dimensions = info.shape.len();
            return Err(HeaderError::Dimensions { name: name.clone(), dimensions });
        }
    }
    list.sort_by_key(|(_, info)| info.data_offsets);
    let metadata = Metadata::new(None, list)?;

    let data_start = LENGTH_BYTES + header.len();
    let data_bytes = file.len() - data_start;
    if metadata.data_len() != data_bytes {
        return Err(HeaderError::DataLength { tensors: metadata.data_len(), file: data_bytes });
    }
    let entries = metadata.tensors().into_iter().map(|(name, info)| {
        let (start, end) = info.data_offsets;
        let range = data_start + start..data_start + end;
        (name, Entry { dtype: info.dtype, shape: info.shape.clone(), range })
    });
    Ok((entries.collect(), texts))
}

/// Reads the header's JSON object as a list, so that a name that occurs twice is seen.
struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = (Vec<(String, TensorInfo)>, Texts);

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let (mut list, mut texts) = (Vec::new(), Texts::new());
        let mut seen = std::collections::HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if !seen.insert(name.clone()) {
                return Err(A::Error::custom(format_args!("{name} occurs twice")));
            }
            if name == "__metadata__" {
                texts = map.next_value()?;
            } else {
                let info: TensorInfo = map
                    .next_value()
                    .map_err(|error| A::Error::custom(format_args!("tensor {name}: {error}")))?;
                list.push((name, info));
            }
        }
        Ok((list, texts))
    }
}

/// The header of a file whose tensors stand one after another in the given order, padded with
/// spaces so that the data begins at a multiple of `align` bytes. Sizes are `shape x dtype`.
pub(crate) fn write(tensors: &[(&str, Dtype, &[usize], usize)], align: usize) -> Vec<u8> {
    let mut map = serde_json::Map::new();
    let mut offset = 0;
    for (name, dtype, shape, bytes) in tensors {
        let info = serde_json::json!({
            "dtype": dtype, "shape": shape, "data_offsets": [offset, offset + bytes],
        });
        map.insert((*name).to_owned(), info);
        offset += bytes;
    }
    let mut json = serde_json::Value::Object(map).to_string().into_bytes();
    let padded = (LENGTH_BYTES + json.len()).next_multiple_of(align) - LENGTH_BYTES;
    json.resize(padded, b' ');
    let mut header = (padded as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    header
}
