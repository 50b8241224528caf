//! The check that a bundle's files hold what its manifest says: hashed when it is opened,
//! remembered for the next time, and looked at again while it is used.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use super::BundleError;
use super::manifest::FileEntry;
use crate::file::{self, NewFile, Stamp};
use crate::hash::hash;

/// The name of the file of verdicts.
const FILE: &str = "verified";
/// Its first line: another one is another program's.
const HEADER: &str = "hat-engine verified files 1";
/// Verdicts that are kept, the newest.
const VERDICTS_MAX: usize = 256;
/// Longest file of verdicts that is read.
const BYTES_MAX: u64 = 64 << 10;
/// Attempts at hashing a file that changes meanwhile.
const TRIES: usize = 3;

/// A file that a bundle has open.
#[derive(Clone)]
pub(super) struct OpenFile {
    path: PathBuf,
    file: Arc<File>,
    entry: FileEntry,
    /// Identity of the open file, and of the file that the path leads to.
    stamps: [Stamp; 2],
}

impl OpenFile {
    /// Opens a file of the manifest and checks its size.
    pub(super) fn open(path: PathBuf, entry: &FileEntry) -> Result<Self, BundleError> {
        let file = file::open(&path).map_err(BundleError::io(&path))?;
        let stamp = Stamp::of(&file.metadata().map_err(BundleError::io(&path))?);
        if stamp.bytes != entry.bytes {
            let (expected, got) = (entry.bytes, stamp.bytes);
            return Err(BundleError::FileSize { path, expected, got });
        }
        Ok(Self { path, file: Arc::new(file), entry: entry.clone(), stamps: [stamp, stamp] })
    }

    pub(super) fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// The operating system's answer now, for the open file and for the path.
    fn look(&self) -> Result<[Stamp; 2], BundleError> {
        let open = self.file.metadata().map_err(BundleError::io(&self.path))?;
        let path = fs::metadata(&self.path).map_err(BundleError::io(&self.path))?;
        Ok([Stamp::of(&open), Stamp::of(&path)])
    }

    /// Hashes the open file, and what the path leads to if that is another, until it is known
    /// what was hashed.
    fn hash(&mut self, threads: usize, on_piece: &mut dyn FnMut()) -> Result<(), BundleError> {
        for _ in 0..TRIES {
            let before = self.look()?;
            self.check_hash(&self.file, before[0], threads, on_piece)?;
            if (before[0].device, before[0].inode) != (before[1].device, before[1].inode) {
                let other = file::open(&self.path).map_err(BundleError::io(&self.path))?;
                self.check_hash(&other, before[1], threads, on_piece)?;
            }
            if self.look()? == before {
                self.stamps = before;
                return Ok(());
            }
        }
        let error = io::Error::other("somebody keeps writing to it");
        Err(BundleError::io(&self.path)(error))
    }

    fn check_hash(
        &self,
        file: &File,
        stamp: Stamp,
        threads: usize,
        on_piece: &mut dyn FnMut(),
    ) -> Result<(), BundleError> {
        if stamp.bytes != self.entry.bytes {
            let (path, expected) = (self.path.clone(), self.entry.bytes);
            return Err(BundleError::FileSize { path, expected, got: stamp.bytes });
        }
        let got =
            hash(file, stamp.bytes, threads, on_piece).map_err(BundleError::io(&self.path))?;
        super::check_hash(&self.path, &self.entry, got)
    }
}

/// Result of verifying a bundle's files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Bytes that were hashed.
    pub hashed: u64,
    /// Bytes whose verdict was remembered.
    pub remembered: u64,
}

/// The files of an open bundle, to be looked at again while it is used.
#[derive(Clone)]
pub struct Watch {
    files: Vec<OpenFile>,
    /// True if a change since the last hash would show in a file's times.
    is_settled: bool,
}

impl Watch {
    pub(super) fn new(files: Vec<OpenFile>) -> Self {
        Self { files, is_settled: false }
    }

    /// A file beside the bundles: of `bytes` bytes, with this BLAKE3 in hex.
    ///
    /// # Errors
    /// A file that can't be opened, is no regular one, or has another size.
    pub fn of_file(path: &Path, bytes: u64, blake3: &str) -> Result<Self, BundleError> {
        let entry = FileEntry { bytes, blake3: blake3.to_owned() };
        Ok(Self::new(vec![OpenFile::open(path.to_owned(), &entry)?]))
    }

    /// Hashes every file.
    ///
    /// # Errors
    /// The first that differs.
    pub(super) fn hash_all(&mut self, threads: usize) -> Result<(), BundleError> {
        self.files.iter_mut().try_for_each(|file| file.hash(threads, &mut || {}))
    }

    /// Verifies every file, by a verdict that is remembered in the directory `memory` or by its
    /// hash; remembers what it hashed. A memory that can't be read or written is no error.
    /// `now` tells whether a file's last change is past; `on_piece` hears of the file at hand
    /// several times a second.
    ///
    /// # Errors
    /// The first file that differs or can't be read.
    pub fn verify(
        &mut self,
        memory: Option<&Path>,
        now: SystemTime,
        threads: usize,
        on_piece: &mut dyn FnMut(&Path),
    ) -> Result<Verified, BundleError> {
        let now = since_epoch_ns(now);
        let mut verdicts = memory.map(Verdicts::read).unwrap_or_default();
        let mut verified = Verified::default();
        // A file that was written just now could be written again within the same tick: no
        // verdict is kept of it, and it is hashed at the next look.
        self.is_settled = true;
        for file in &mut self.files {
            let stamps = file.look()?;
            let is_known = |stamp| verdicts.lines.contains(&line(stamp, &file.entry));
            if stamps.iter().all(is_known) {
                file.stamps = stamps;
                verified.remembered += file.entry.bytes;
                continue;
            }
            let path = file.path.clone();
            file.hash(threads, &mut || on_piece(&path))?;
            verified.hashed += file.entry.bytes;
            if file.stamps.iter().all(|stamp| stamp.is_settled(now)) {
                verdicts.new.extend(file.stamps.iter().map(|stamp| line(stamp, &file.entry)));
            } else {
                self.is_settled = false;
            }
        }
        if let Some(memory) = memory
            && !verdicts.new.is_empty()
        {
            let _ = verdicts.write(memory);
        }
        Ok(verified)
    }

    /// True if a file may have changed since it was verified: another inode, size or time, of the
    /// open file or at its path. Reads none of them.
    ///
    /// # Errors
    /// A file that is not there any more, with its path.
    pub fn may_have_changed(&self) -> Result<bool, BundleError> {
        let mut changed = !self.is_settled;
        for file in &self.files {
            changed |= file.look()? != file.stamps;
        }
        Ok(changed)
    }

    /// Hashes the files that may have changed.
    ///
    /// # Errors
    /// The first file that differs or can't be read.
    pub fn verify_changed(&mut self, threads: usize) -> Result<(), BundleError> {
        for file in &mut self.files {
            if !self.is_settled || file.look()? != file.stamps {
                file.hash(threads, &mut || {})?;
            }
        }
        // Looks are far enough apart for a later change to have another time.
        self.is_settled = true;
        Ok(())
    }
}

/// BLAKE3 of a regular file, as it is remembered in the directory `memory` or by reading it;
/// remembers what it read. `now` and `on_piece` are as in [`Watch::verify`].
///
/// # Errors
/// The operating system's error; a file that somebody keeps writing to.
pub fn content_hash(
    path: &Path,
    memory: Option<&Path>,
    now: SystemTime,
    threads: usize,
    on_piece: &mut dyn FnMut(),
) -> io::Result<blake3::Hash> {
    let file = file::open(path)?;
    let stamp = || file.metadata().map(|metadata| Stamp::of(&metadata));
    let mut verdicts = memory.map(Verdicts::read).unwrap_or_default();
    if let Some(known) = verdicts.hash_of(&stamp()?) {
        return Ok(known);
    }
    for _ in 0..TRIES {
        let before = stamp()?;
        let found = hash(&file, before.bytes, threads, on_piece)?;
        if stamp()? != before {
            continue;
        }
        if let Some(memory) = memory
            && before.is_settled(since_epoch_ns(now))
        {
            let entry = FileEntry { bytes: before.bytes, blake3: found.to_hex().to_string() };
            verdicts.new.push(line(&before, &entry));
            let _ = verdicts.write(memory);
        }
        return Ok(found);
    }
    Err(io::Error::other("somebody keeps writing to it"))
}

fn since_epoch_ns(now: SystemTime) -> i128 {
    let now = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    i128::try_from(now).unwrap_or(i128::MAX)
}

/// The remembered verdicts, a line each.
#[derive(Default)]
struct Verdicts {
    lines: Vec<String>,
    new: Vec<String>,
}

/// A verdict: which file, at which state, has which content.
fn line(stamp: &Stamp, entry: &FileEntry) -> String {
    let Stamp { device, inode, bytes, modified_ns, changed_ns } = stamp;
    format!("{device} {inode} {bytes} {modified_ns} {changed_ns} {}", entry.blake3)
}

impl Verdicts {
    /// Reads the hashes noted in `directory`; none if the file is not whole, another program's, or
    /// one that others can write.
    fn read(directory: &Path) -> Self {
        let path = directory.join(FILE);
        let text = Some(&path).filter(|path| is_private(path));
        let text = text.and_then(|path| file::read_text(path, BYTES_MAX).ok()).unwrap_or_default();
        let mut lines = text.split_inclusive('\n').map_while(|line| line.strip_suffix('\n'));
        let is_ours = lines.next() == Some(HEADER);
        let lines = lines.filter(|_| is_ours).map(str::to_owned).collect();
        Self { lines, new: Vec::new() }
    }

    /// The content of a file in this state, if it is remembered.
    fn hash_of(&self, stamp: &Stamp) -> Option<blake3::Hash> {
        let entry = FileEntry { bytes: stamp.bytes, blake3: String::new() };
        let beginning = line(stamp, &entry);
        let known = self.lines.iter().find_map(|line| line.strip_prefix(&beginning));
        known.and_then(|hash| blake3::Hash::from_hex(hash).ok())
    }

    /// Adds the new ones.
    fn write(self, directory: &Path) -> io::Result<()> {
        fs::create_dir_all(directory)?;
        let mut file = NewFile::create(&directory.join(FILE), true)?;
        file.write_all(HEADER.as_bytes())?;
        file.write_all(b"\n")?;
        let mut seen = BTreeSet::new();
        let newest = self.new.iter().chain(&self.lines).filter(|line| seen.insert(line.as_str()));
        for line in newest.take(VERDICTS_MAX) {
            writeln!(file, "{line}")?;
        }
        file.publish()
    }
}

/// True if nobody but this user can have written the file.
fn is_private(path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt as _;
        let own = |found: &fs::Metadata| {
            found.uid() == rustix::process::geteuid().as_raw() && found.mode() & 0o022 == 0
        };
        fs::symlink_metadata(path).is_ok_and(|found| found.is_file() && own(&found))
    }
    #[cfg(not(unix))]
    {
        path.is_file()
    }
}
