//! Bounds-checked reading and writing of little-endian fields.

use super::{MessageError, PAGE_ID_BYTES, PAGE_IDS_MAX, PageId, TEXT_BYTES_MAX};

/// Reads fields from the front of a body.
pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(rest: &'a [u8]) -> Self {
        Self { rest }
    }

    pub(super) fn bytes(
        &mut self,
        field: &'static str,
        count: usize,
    ) -> Result<&'a [u8], MessageError> {
        let Some((bytes, rest)) = self.rest.split_at_checked(count) else {
            let left = self.rest.len();
            return Err(MessageError::Short { field, needed: count, left });
        };
        self.rest = rest;
        Ok(bytes)
    }

    pub(super) fn array<const N: usize>(
        &mut self,
        field: &'static str,
    ) -> Result<[u8; N], MessageError> {
        let bytes = self.bytes(field, N)?;
        Ok(bytes.try_into().expect("the reader gave N bytes"))
    }

    pub(super) fn u8(&mut self, field: &'static str) -> Result<u8, MessageError> {
        Ok(self.array::<1>(field)?[0])
    }

    pub(super) fn u16(&mut self, field: &'static str) -> Result<u16, MessageError> {
        self.array(field).map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self, field: &'static str) -> Result<u32, MessageError> {
        self.array(field).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, field: &'static str) -> Result<u64, MessageError> {
        self.array(field).map(u64::from_le_bytes)
    }

    /// A row id that names a row: not 0.
    pub(super) fn id(&mut self, field: &'static str) -> Result<u32, MessageError> {
        match self.u32(field)? {
            0 => Err(value(field, "a row id, from 1 on", 0u32)),
            id => Ok(id),
        }
    }

    /// A number of rows: not 0.
    pub(super) fn count(&mut self, field: &'static str) -> Result<u16, MessageError> {
        match self.u16(field)? {
            0 => Err(value(field, "at least 1", 0u32)),
            count => Ok(count),
        }
    }

    /// A range of layers that is not turned round.
    pub(super) fn layers(&mut self) -> Result<(u16, u16), MessageError> {
        let (entry, exit) = (self.u16("entry_layer")?, self.u16("exit_layer")?);
        if entry > exit {
            return Err(value("entry_layer", "at most exit_layer", entry));
        }
        Ok((entry, exit))
    }

    /// A count, and so many page ids.
    pub(super) fn page_ids(&mut self) -> Result<&'a [PageId], MessageError> {
        let count = usize::from(self.u16("pages")?);
        if count > PAGE_IDS_MAX {
            return Err(value("pages", "at most 4095 page ids", count as u64));
        }
        Ok(self.bytes("pages", count * PAGE_ID_BYTES)?.as_chunks().0)
    }

    /// All that is left, as text.
    pub(super) fn text(&mut self, field: &'static str) -> Result<&'a str, MessageError> {
        if self.rest.len() > TEXT_BYTES_MAX {
            return Err(value(field, "text of at most 512 bytes", self.rest.len() as u64));
        }
        let bytes = self.bytes(field, self.rest.len())?;
        std::str::from_utf8(bytes).map_err(|_| MessageError::Text { field })
    }

    /// All that is left: `rows` rows of equal size.
    pub(super) fn payload(&mut self, rows: u16) -> Result<&'a [u8], MessageError> {
        let (bytes, rows) = (self.rest.len(), usize::from(rows));
        if bytes == 0 || !bytes.is_multiple_of(rows) {
            return Err(MessageError::Payload { bytes, rows });
        }
        self.bytes("payload", bytes)
    }

    pub(super) fn finish(self) -> Result<(), MessageError> {
        match self.rest.len() {
            0 => Ok(()),
            bytes => Err(MessageError::Trailing { bytes }),
        }
    }
}

/// Writes fields to the front of a body, or counts their bytes alone. Too small a body is a bug of
/// the caller, and panics.
pub(super) struct Writer<'a> {
    to: Option<&'a mut [u8]>,
    written: usize,
}

impl<'a> Writer<'a> {
    pub(super) fn new(to: &'a mut [u8]) -> Self {
        Self { to: Some(to), written: 0 }
    }

    pub(super) fn counting() -> Self {
        Self { to: None, written: 0 }
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        if let Some(to) = &mut self.to {
            to[self.written..][..bytes.len()].copy_from_slice(bytes);
        }
        self.written += bytes.len();
    }

    pub(super) fn u8(&mut self, number: u8) {
        self.bytes(&[number]);
    }

    pub(super) fn u16(&mut self, number: u16) {
        self.bytes(&number.to_le_bytes());
    }

    pub(super) fn u32(&mut self, number: u32) {
        self.bytes(&number.to_le_bytes());
    }

    pub(super) fn u64(&mut self, number: u64) {
        self.bytes(&number.to_le_bytes());
    }

    /// A count, and so many page ids.
    pub(super) fn page_ids(&mut self, ids: &[PageId]) {
        assert!(ids.len() <= PAGE_IDS_MAX, "{} page ids in one message", ids.len());
        self.u16(u16::try_from(ids.len()).expect("checked above"));
        self.bytes(ids.as_flattened());
    }

    pub(super) fn written(&self) -> usize {
        self.written
    }
}

/// The id of the last of `count` consecutive rows; ids do not wrap.
pub(super) fn last_id(first_id: u32, count: u16) -> Result<u32, MessageError> {
    first_id
        .checked_add(u32::from(count) - 1)
        .ok_or_else(|| value("first_id", "ids that do not wrap", first_id))
}

pub(super) fn value(
    field: &'static str,
    expected: &'static str,
    got: impl Into<u64>,
) -> MessageError {
    MessageError::Value { field, expected, got: got.into() }
}

/// `text`, cut to at most [`TEXT_BYTES_MAX`] bytes of whole characters.
pub(super) fn cut(text: &str) -> &str {
    let mut end = text.len().min(TEXT_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}
