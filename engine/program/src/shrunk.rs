//! Message of a program when a file that it has mapped becomes shorter: the kernel then answers a
//! read of the missing part with `SIGBUS`, which would end the process without a word.
//!
//! Programs install it; the library never does.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Mode, OFlags};

/// The exit status of a process that a shorter file ended.
const STATUS: libc::c_int = 70;
/// Bytes of a buffer for a line of `/proc/self/maps`, little enough for any thread's stack.
const BUFFER_BYTES: usize = 8192;

/// The program's name.
static PROGRAM: OnceLock<&str> = OnceLock::new();
/// True if a thread says it already.
static IS_SAID: AtomicBool = AtomicBool::new(false);

/// From now on the process ends with status 70 and one line that names the file, when the missing
/// part of a mapped file is read. `SIGBUS` for any other reason does what it does by default.
///
/// # Errors
/// The operating system's error.
pub fn install(program: &'static str) -> io::Result<()> {
    PROGRAM.get_or_init(|| program);
    // SAFETY: all zeroes is a `sigaction` without flags and with an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_sigbus as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: `action` is whole, its function has the signature that SA_SIGINFO asks for and calls
    // nothing but system calls on memory of its own stack.
    match unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Runs on the thread that read, at the read. Calls system calls alone.
extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel gives a whole `siginfo_t`; the address is only used as a number.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    if code == libc::BUS_ADRERR {
        if IS_SAID.swap(true, Ordering::SeqCst) {
            // Another thread read there too, and is about to end the process.
            loop {
                std::hint::spin_loop();
            }
        }
        if say(address as u64) {
            // SAFETY: ends the process without running anything of ours.
            unsafe { libc::_exit(STATUS) }
        }
    }
    // SAFETY: both are async-signal-safe. The signal is blocked here, so it is taken, by its
    // default action, when this returns.
    unsafe {
        libc::signal(libc::SIGBUS, libc::SIG_DFL);
        libc::raise(libc::SIGBUS);
    }
}

/// Names the file that is mapped at `address`; true if there is one.
fn say(address: u64) -> bool {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let Ok(maps) = rustix::fs::open(c"/proc/self/maps", flags, Mode::empty()) else { return false };
    let mut buffer = [0; BUFFER_BYTES];
    let mut filled = 0;
    loop {
        let Ok(read @ 1..) = rustix::io::read(&maps, &mut buffer[filled..]) else { return false };
        filled += read;
        let mut start = 0;
        while let Some(end) = buffer[start..filled].iter().position(|byte| *byte == b'\n') {
            if let Some(path) = file_at(&buffer[start..start + end], address) {
                let program = PROGRAM.get().copied().unwrap_or_default();
                for part in [
                    program.as_bytes(),
                    b": ",
                    path,
                    b": the file became shorter while it was in use, or can't be read any more: \
                      put the whole file back, or split again, and start again\n",
                ] {
                    let _ = rustix::io::write(rustix::stdio::stderr(), part);
                }
                return true;
            }
            start += end + 1;
        }
        buffer.copy_within(start..filled, 0);
        filled -= start;
        if filled == BUFFER_BYTES {
            return false;
        }
    }
}

/// The path in a line of `/proc/self/maps`, if it is of a file that is mapped at `address`:
/// `START-END PERMISSIONS OFFSET DEVICE INODE PATH`.
fn file_at(line: &[u8], address: u64) -> Option<&[u8]> {
    let mut rest = line;
    let mut fields = [&line[..0]; 5];
    for field in &mut fields {
        let end = rest.iter().position(|byte| *byte == b' ')?;
        (*field, rest) = (&rest[..end], &rest[end + 1..]);
    }
    let dash = fields[0].iter().position(|byte| *byte == b'-')?;
    let (start, end) = (hex(&fields[0][..dash])?, hex(&fields[0][dash + 1..])?);
    let path = &rest[rest.iter().position(|byte| *byte != b' ')?..];
    ((start..end).contains(&address) && path.starts_with(b"/")).then_some(path)
}

fn hex(digits: &[u8]) -> Option<u64> {
    digits.iter().try_fold(0u64, |number, digit| {
        let digit = char::from(*digit).to_digit(16)?;
        number.checked_mul(16)?.checked_add(u64::from(digit))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_maps_names_its_file() {
        let line =
            b"7f00aa000000-7f00aa004000 r--s 00000000 08:01 42      /models/a b/w.safetensors";
        let path = Some(&b"/models/a b/w.safetensors"[..]);
        assert_eq!(file_at(line, 0x7f00_aa00_0000), path);
        assert_eq!(file_at(line, 0x7f00_aa00_3fff), path);
        assert_eq!(file_at(line, 0x7f00_aa00_4000), None);
        assert_eq!(file_at(line, 0), None);
        let stack = b"7f00aa000000-7f00aa004000 rw-p 00000000 00:00 0                    [stack]";
        assert_eq!(file_at(stack, 0x7f00_aa00_0000), None);
        for cut in 0..line.len() - 26 {
            assert_eq!(file_at(&line[..cut], 0x7f00_aa00_0000), None, "{cut}");
        }
        assert_eq!(file_at(b"7f00aa000000-7f00aa004000 rw-p 00000000 00:00 0 ", 1), None);
    }
}
