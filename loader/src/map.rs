//! Files as borrowed bytes. The only unsafe room of this crate.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;

/// A whole file, mapped read-only. The pages are shared with everybody who has the file open, so
/// what others write to it shows here.
///
/// # Contract
/// A mapped file must not be changed or shortened as long as the map lives: its bytes would change
/// under a borrow, and a read beyond a new end kills the process with `SIGBUS`. Rust can't check
/// that, so it is the promise of whoever opens a model or a bundle, and the public `open`
/// functions repeat it. What this project writes, it writes under another name and renames, which
/// leaves old maps as they are.
pub(crate) struct FileMap {
    map: Mmap,
}

impl FileMap {
    /// Maps the file at `path`. Reads no byte of it.
    ///
    /// # Errors
    /// The operating system's error; something that is no regular file is `InvalidInput`.
    pub(crate) fn open(path: &Path) -> io::Result<Arc<Self>> {
        Self::of(&crate::file::open(path)?)
    }

    /// Maps an open file. Reads no byte of it.
    ///
    /// # Errors
    /// The operating system's error.
    pub(crate) fn of(file: &File) -> io::Result<Arc<Self>> {
        // SAFETY: the map is read-only and we never write to the file; that nobody else does is
        // the contract above, handed to the caller of the public `open` functions.
        let map = unsafe { Mmap::map(file)? };
        Ok(Arc::new(Self { map }))
    }
}

impl AsRef<[u8]> for FileMap {
    fn as_ref(&self) -> &[u8] {
        &self.map
    }
}
