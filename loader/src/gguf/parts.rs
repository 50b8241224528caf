//! Models in several files, `NAME-00001-of-00003.gguf` and so on: the first one has the metadata,
//! and each has tensors.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::GgufError;
use super::parse::{self, Container, Value};
use crate::error::LoadError;
use crate::map::FileMap;
use crate::tensor::Owner;

const COUNT: &str = "split.count";
const NUMBER: &str = "split.no";
const TENSORS: &str = "split.tensors.count";

/// One of a model's files.
pub(super) struct Part {
    pub(super) path: PathBuf,
    pub(super) file: Owner,
}

impl Part {
    fn open(path: PathBuf) -> Result<Self, LoadError> {
        let file = FileMap::open(&path).map_err(|error| LoadError::io(&path, error))?;
        Ok(Self { path, file })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        (*self.file).as_ref()
    }

    /// The file's content.
    pub(super) fn parse(&self) -> Result<Container<'_>, LoadError> {
        parse::parse(self.bytes()).map_err(|error| self.wrong(error))
    }

    /// An error in this file.
    pub(super) fn wrong(&self, error: GgufError) -> LoadError {
        LoadError::Gguf { path: self.path.clone(), error }
    }
}

/// All files of the GGUF model that `path` is a file of, in their order.
///
/// # Errors
/// The first file that can't be opened, is missing, or is no GGUF file.
pub fn gguf_files(path: &Path) -> Result<Vec<PathBuf>, LoadError> {
    Ok(open(path)?.into_iter().map(|part| part.path).collect())
}

/// Opens all files of the model that `path` is a file of, in their order.
pub(super) fn open(path: &Path) -> Result<Vec<Part>, LoadError> {
    let part = Part::open(path.to_owned())?;
    let count = number(&part.parse()?, COUNT, 1).map_err(|error| part.wrong(error))?;
    if count == 1 {
        return Ok(vec![part]);
    }
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let Some((stem, _)) = stem(name).filter(|(_, of)| *of == count) else {
        let reason = format!(
            "the file is one of {count}, and its name does not end in -00001-of-{count:05}.gguf or \
             the like: the others can't be found"
        );
        return Err(part.wrong(GgufError::metadata(COUNT, reason)));
    };
    let others = (1..=count).map(|number| {
        let path = path.with_file_name(format!("{stem}-{number:05}-of-{count:05}.gguf"));
        Part::open(path.clone()).map_err(|error| match error {
            LoadError::Io { error, .. } if error.kind() == ErrorKind::NotFound => {
                LoadError::Gguf { path, error: GgufError::MissingPart { number, count } }
            }
            other => other,
        })
    });
    others.collect()
}

/// A file's name without its number, and the number of files in it: `NAME-00001-of-00003.gguf`.
pub(super) fn stem(name: &str) -> Option<(&str, u64)> {
    let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let five_digits = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
    if !five_digits(number) || !five_digits(count) || stem.is_empty() {
        return None;
    }
    Some((stem, count.parse().ok()?))
}

/// Puts the tensors of all files into the first one's container.
pub(super) fn merge<'a>(
    parts: &[Part],
    containers: Vec<Container<'a>>,
) -> Result<Container<'a>, LoadError> {
    let mut merged: Option<Container<'_>> = None;
    for (index, (part, mut container)) in parts.iter().zip(containers).enumerate() {
        check(&container, index, parts.len()).map_err(|error| part.wrong(error))?;
        for info in container.tensors.values_mut() {
            info.part = index;
        }
        let Some(merged) = &mut merged else {
            merged = Some(container);
            continue;
        };
        for (name, info) in container.tensors {
            if merged.tensors.insert(name.clone(), info).is_some() {
                return Err(part.wrong(GgufError::Duplicate { what: "tensor", name }));
            }
        }
    }
    let merged = merged.expect("a model has a file");
    let held = merged.tensors.len() as u64;
    let count = number(&merged, TENSORS, held).map_err(|error| parts[0].wrong(error))?;
    if count != held {
        let reason = format!("{count}, but the files hold {held} tensors");
        return Err(parts[0].wrong(GgufError::metadata(TENSORS, reason)));
    }
    Ok(merged)
}

/// Checks that a file is the one of its number.
fn check(container: &Container<'_>, index: usize, parts: usize) -> Result<(), GgufError> {
    let (number, count) = (number(container, NUMBER, 0)?, number(container, COUNT, 1)?);
    if count != parts as u64 {
        let reason = format!("{count}, but the model has {parts} files");
        return Err(GgufError::metadata(COUNT, reason));
    }
    if parts > 1 && number != index as u64 {
        let reason = format!("{number}, but by its name the file is number {index} from 0");
        return Err(GgufError::metadata(NUMBER, reason));
    }
    Ok(())
}

/// A number of the metadata; 0 files are one.
fn number(container: &Container<'_>, key: &str, absent: u64) -> Result<u64, GgufError> {
    let value = match container.metadata.get(key) {
        None => return Ok(absent),
        Some(Value::Unsigned(value)) => Some(*value),
        Some(Value::Signed(value)) => u64::try_from(*value).ok(),
        Some(_) => None,
    };
    match value {
        Some(0) if key == COUNT => Ok(1),
        Some(value) if value <= u64::from(u16::MAX) => Ok(value),
        _ => Err(GgufError::metadata(key, "not a whole number from 0 to 65535")),
    }
}
