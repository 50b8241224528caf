//! Regular files, opened and written by one set of rules.
//!
//! Opening anything else (a FIFO, a socket, a device, a directory) is an error that says what it
//! is: a FIFO would wait for a writer for ever, a device may do anything. Writing is whole or not
//! at all: into a file or directory of another name beside the target, synced, renamed. Such a
//! temporary is locked as long as its process lives, so the next one can tell what a killed
//! process left behind, and removes it.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, FileType, Metadata, OpenOptions};
use std::io::{self, Read as _, Write};
use std::path::{Path, PathBuf};

/// Opens a regular file for reading. Returns at once, whatever is at `path`.
///
/// # Errors
/// The system's error; `InvalidInput`, which says what is there, for anything but a regular
/// file.
pub fn open(path: &Path) -> io::Result<File> {
    // Looked at first, since opening a device can have effects; and again afterwards, since
    // another file may have come in between.
    check_regular(fs::metadata(path)?.file_type())?;
    let mut options = OpenOptions::new();
    options.read(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt as _;
        // On a regular file it changes nothing; on a FIFO it is what keeps `open` from waiting.
        options.custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed());
    }
    let file = options.open(path)?;
    check_regular(file.metadata()?.file_type())?;
    Ok(file)
}

/// True if a regular file can be looked for at `path`: something is there, whatever it is.
pub(crate) fn is_there(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

/// Reads a regular file of at most `bytes_max` bytes.
///
/// # Errors
/// As [`open`]; `FileTooLarge` for a longer one.
pub fn read(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    let file = open(path)?;
    let room = usize::try_from(file.metadata()?.len().min(bytes_max)).unwrap_or(0);
    let mut bytes = Vec::with_capacity(room);
    file.take(bytes_max.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > bytes_max {
        let text = format!("longer than the {bytes_max} bytes that are read");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
    }
    Ok(bytes)
}

/// Reads a regular file of at most `bytes_max` bytes as text.
///
/// # Errors
/// As [`read`]; `InvalidData` if it is not UTF-8.
pub fn read_text(path: &Path, bytes_max: u64) -> io::Result<String> {
    String::from_utf8(read(path, bytes_max)?)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.utf8_error()))
}

fn check_regular(found: FileType) -> io::Result<()> {
    if found.is_file() {
        return Ok(());
    }
    let text = format!("{}, a regular file is wanted", kind(found));
    Err(io::Error::new(io::ErrorKind::InvalidInput, text))
}

/// The kind of something that is no regular file, with its article.
fn kind(found: FileType) -> &'static str {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt as _;
        if found.is_fifo() {
            return "a FIFO";
        }
        if found.is_socket() {
            return "a socket";
        }
        if found.is_char_device() || found.is_block_device() {
            return "a device";
        }
    }
    if found.is_dir() { "a directory" } else { "no regular file" }
}

/// Identity, size and times of a file: as long as they stay, so does its content, but for what is
/// written within one tick of the file system's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) device: u64,
    pub(crate) inode: u64,
    pub(crate) bytes: u64,
    pub(crate) modified_ns: i128,
    pub(crate) changed_ns: i128,
}

impl Stamp {
    /// Identity of a file by its metadata.
    #[cfg(unix)]
    pub(crate) fn of(metadata: &Metadata) -> Self {
        use std::os::unix::fs::MetadataExt as _;
        let ns = |seconds: i64, ns: i64| i128::from(seconds) * 1_000_000_000 + i128::from(ns);
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.len(),
            modified_ns: ns(metadata.mtime(), metadata.mtime_nsec()),
            changed_ns: ns(metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// Identity of a file by its metadata; a system without inodes knows size and time alone.
    #[cfg(not(unix))]
    pub(crate) fn of(metadata: &Metadata) -> Self {
        let since = metadata.modified().ok().and_then(|time| {
            time.duration_since(std::time::UNIX_EPOCH).ok().map(|since| since.as_nanos())
        });
        let modified_ns = since.and_then(|ns| i128::try_from(ns).ok()).unwrap_or(0);
        let bytes = metadata.len();
        Self { device: 0, inode: 0, bytes, modified_ns, changed_ns: modified_ns }
    }

    /// True if the last change is so long before `now_ns`, by the same clock, that another one
    /// would have had another time: more than a few ticks, or than the two seconds of file
    /// systems that keep whole seconds.
    pub(crate) fn is_settled(&self, now_ns: i128) -> bool {
        let whole_seconds = self.changed_ns % 1_000_000_000 == 0;
        let ticks_ns = if whole_seconds { 2_000_000_000 } else { 100_000_000 };
        now_ns - self.changed_ns.max(self.modified_ns) > ticks_ns
    }
}

/// A file under another name beside its target, removed unless it is [published](Self::publish).
pub struct NewFile {
    target: PathBuf,
    path: PathBuf,
    file: File,
}

impl NewFile {
    /// Creates `.NAME.tmp-PID-N` beside `target`, for its owner alone if it `is_private`, and
    /// removes what killed processes left there for the same target.
    ///
    /// # Errors
    /// The operating system's error.
    pub fn create(target: &Path, is_private: bool) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.write(true).create_new(true);
        #[cfg(unix)]
        if is_private {
            std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        }
        let (path, file) = claim(target, |path| options.open(path), |path| fs::remove_file(path))?;
        Ok(Self { target: target.to_owned(), path, file })
    }

    /// Puts the file in the target's place, on the disk.
    ///
    /// # Errors
    /// The operating system's error; the target is then as it was.
    pub fn publish(self) -> io::Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.path, &self.target)?;
        sync_directory(parent(&self.target))
    }

    /// Puts the file where the target is to be, on the disk, unless somebody was there first.
    ///
    /// # Errors
    /// The operating system's error; `AlreadyExists` if there is a target, which stays as it is.
    pub fn publish_new(self) -> io::Result<()> {
        self.file.sync_all()?;
        fs::hard_link(&self.path, &self.target)?;
        sync_directory(parent(&self.target))
    }
}

impl Write for NewFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        // After `publish` there is nothing of this name.
        let _ = fs::remove_file(&self.path);
    }
}

/// Writes `bytes` to the file at `path`, whole or not at all.
///
/// # Errors
/// The operating system's error; the file is then as it was.
pub fn replace(path: &Path, bytes: &[u8], is_private: bool) -> io::Result<()> {
    let mut file = NewFile::create(path, is_private)?;
    file.write_all(bytes)?;
    file.publish()
}

/// A directory under another name beside its target, removed with all that is in it unless it is
/// [published](Self::publish).
pub struct NewDirectory {
    path: PathBuf,
    _lock: File,
}

impl NewDirectory {
    /// Creates `.NAME.tmp-PID-N` beside `target`, the directories above it too, and removes what
    /// killed processes left there for the same target.
    ///
    /// # Errors
    /// The operating system's error.
    pub fn create(target: &Path) -> io::Result<Self> {
        fs::create_dir_all(parent(target))?;
        let make = |path: &Path| {
            fs::create_dir(path)?;
            File::open(path)
        };
        let (path, lock) = claim(target, make, |path| fs::remove_dir_all(path))?;
        Ok(Self { path, _lock: lock })
    }

    /// Current path of the file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Puts the directory in the target's place, which is free or an empty directory.
    ///
    /// # Errors
    /// The operating system's error; nothing is at the target then that was not.
    pub fn publish(self, target: &Path) -> io::Result<()> {
        sync_directory(&self.path)?;
        fs::rename(&self.path, target)?;
        sync_directory(parent(target))
    }
}

impl Drop for NewDirectory {
    fn drop(&mut self) {
        // After `publish` there is nothing of this name; what can't be removed stays under a name
        // that says what it is, until the next one comes.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Makes a temporary for `target` and locks it, after removing those that no living process locks.
fn claim(
    target: &Path,
    make: impl Fn(&Path) -> io::Result<File>,
    remove: impl Fn(&Path) -> io::Result<()>,
) -> io::Result<(PathBuf, File)> {
    let name = target.file_name().ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidInput, "the path ends in no name for a file")
    })?;
    let parent = parent(target);
    let mut stem = OsString::from(".");
    stem.push(name);
    stem.push(".tmp-");
    sweep(parent, &stem, remove);
    let mut number = 0u32;
    loop {
        let mut name = stem.clone();
        name.push(format!("{}-{number}", std::process::id()));
        let path = parent.join(name);
        number += 1;
        match make(&path) {
            // A file system without locks has none to lose: nobody sweeps there either.
            Ok(file) => match file.try_lock() {
                Ok(()) | Err(fs::TryLockError::Error(_)) if is_there(&path) => {
                    return Ok((path, file));
                }
                _ => {} // a sweeper took it for a dead one's in between
            },
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
}

/// Removes the temporaries in `directory` whose names begin with `stem` and whose makers are gone.
/// A file that can't be removed is in nobody's way.
fn sweep(directory: &Path, stem: &OsStr, remove: impl Fn(&Path) -> io::Result<()>) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let is_ours = name.as_encoded_bytes().starts_with(stem.as_encoded_bytes());
        let is_plain = entry.file_type().is_ok_and(|kind| kind.is_file() || kind.is_dir());
        if !is_ours || !is_plain {
            continue;
        }
        let path = entry.path();
        if let Ok(file) = File::open(&path)
            && file.try_lock().is_ok()
        {
            let _ = remove(&path);
        }
    }
}

/// The directory of a path; the current one for a bare name.
fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Waits until the names in a directory are on the disk.
///
/// # Errors
/// The operating system's error.
pub(crate) fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests;
