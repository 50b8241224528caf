//! BLAKE3 of an open file on several threads, read beside its map: a file that can't be read is
//! an error here, where a map would end the process, and no page of the map is touched.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use blake3::hazmat::{
    ChainingValue, HasherExt as _, Mode, left_subtree_len, merge_subtrees_non_root,
    merge_subtrees_root,
};

/// Bytes that one thread hashes at a time: a subtree of the hash, so a power of two.
const PIECE_BYTES: u64 = 4 << 20;
/// Bytes that are read at a time: they stay in a core's cache until they are hashed.
const READ_BYTES: usize = 128 << 10;

/// The hash of the first `bytes` of `file`, on up to `threads` threads. `on_piece` hears of the
/// bytes of each piece that the calling thread has hashed.
///
/// # Errors
/// The operating system's error; `UnexpectedEof` if the file is shorter.
pub(crate) fn hash(
    file: &File,
    bytes: u64,
    threads: usize,
    on_piece: &mut dyn FnMut(),
) -> io::Result<blake3::Hash> {
    if bytes <= PIECE_BYTES {
        let mut hasher = blake3::Hasher::new();
        update(&mut hasher, file, 0, bytes)?;
        return Ok(hasher.finalize());
    }
    let pieces = usize::try_from(bytes.div_ceil(PIECE_BYTES)).expect("a file that can be mapped");
    let values = Mutex::new(vec![ChainingValue::default(); pieces]);
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let work = |on_piece: &mut dyn FnMut()| -> io::Result<()> {
        while !failed.load(Ordering::Relaxed) {
            let piece = next.fetch_add(1, Ordering::Relaxed);
            if piece >= pieces {
                break;
            }
            let start = piece as u64 * PIECE_BYTES;
            let mut hasher = blake3::Hasher::new();
            hasher.set_input_offset(start);
            let read = update(&mut hasher, file, start, PIECE_BYTES.min(bytes - start));
            read.inspect_err(|_| failed.store(true, Ordering::Relaxed))?;
            values.lock().unwrap_or_else(PoisonError::into_inner)[piece] =
                hasher.finalize_non_root();
            on_piece();
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let others: Vec<_> =
            (1..threads.min(pieces)).map(|_| scope.spawn(|| work(&mut || {}))).collect();
        let own = work(on_piece);
        let joined = others.into_iter().map(|thread| thread.join().expect("hashing can't panic"));
        joined.fold(own, |all, one| all.and(one))
    })?;
    let values = values.into_inner().unwrap_or_else(PoisonError::into_inner);
    let left = left_subtree_len(bytes);
    let (first, second) = values.split_at(usize::try_from(left / PIECE_BYTES).expect("as above"));
    let second = merge(second, bytes - left);
    Ok(merge_subtrees_root(&merge(first, left), &second, Mode::Hash))
}

/// The value of a subtree of `bytes` from those of its pieces.
fn merge(values: &[ChainingValue], bytes: u64) -> ChainingValue {
    if let [value] = values {
        return *value;
    }
    let left = left_subtree_len(bytes);
    let (first, second) =
        values.split_at(usize::try_from(left / PIECE_BYTES).expect("fewer than the pieces"));
    merge_subtrees_non_root(&merge(first, left), &merge(second, bytes - left), Mode::Hash)
}

/// Hashes the `bytes` from `start` on.
fn update(hasher: &mut blake3::Hasher, file: &File, start: u64, bytes: u64) -> io::Result<()> {
    let mut buffer = vec![0; READ_BYTES];
    let mut done = 0;
    while done < bytes {
        let wanted = usize::try_from(bytes - done).unwrap_or(READ_BYTES).min(READ_BYTES);
        let read = read_at(file, &mut buffer[..wanted], start + done)?;
        if read == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it became shorter"));
        }
        hasher.update(&buffer[..read]);
        done += read as u64;
    }
    Ok(())
}

fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    loop {
        #[cfg(unix)]
        let read = std::os::unix::fs::FileExt::read_at(file, buffer, offset);
        #[cfg(windows)]
        let read = std::os::windows::fs::FileExt::seek_read(file, buffer, offset);
        match read {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            read => return read,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn pieces_on_threads_give_the_hash_of_the_whole() {
        let mut file = tempfile::tempfile().unwrap();
        let piece = usize::try_from(PIECE_BYTES).unwrap();
        let bytes: Vec<u8> = (0..5 * piece + 1).map(|at| (at * 7 + at / 251) as u8).collect();
        file.write_all(&bytes).unwrap();
        for len in [0, 1, 1024, 1025, piece - 1, piece, piece + 1, 2 * piece, 3 * piece - 1]
            .into_iter()
            .chain([4 * piece, 4 * piece + 1, 5 * piece + 1])
        {
            for threads in [0, 1, 3] {
                let got = hash(&file, len as u64, threads, &mut || {}).unwrap();
                assert_eq!(got, blake3::hash(&bytes[..len]), "{len} bytes, {threads} threads");
            }
        }
        let error = hash(&file, 6 * PIECE_BYTES, 3, &mut || {}).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
