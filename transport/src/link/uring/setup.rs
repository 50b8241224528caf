//! Setting up a ring, finding out beforehand whether that works, and one socket option.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use io_uring::{IoUring, Probe, opcode};

/// Submissions that fit before the kernel is called.
const ENTRIES: u32 = 256;
/// Completions that fit without overflowing into the kernel's memory.
const COMPLETIONS: u32 = 2048;

/// Probes io_uring on this machine.
///
/// # Errors
/// The reason, with the setting to change where there is one.
pub fn probe() -> Result<(), String> {
    let (ring, _) = build().map_err(|error| match error.raw_os_error() {
        Some(libc::ENOSYS) => "this kernel has no io_uring".to_owned(),
        Some(libc::EPERM | libc::EACCES) => {
            "io_uring is not permitted: see the sysctl kernel.io_uring_disabled, or the seccomp \
             profile of the container"
                .to_owned()
        }
        Some(libc::ENOMEM) => "io_uring may not lock memory: raise RLIMIT_MEMLOCK".to_owned(),
        _ => format!("io_uring can't be set up: {error}"),
    })?;
    if !ring.params().is_feature_ext_arg() {
        return Err("this kernel's io_uring can't wait with a timeout (Linux 5.11)".to_owned());
    }
    let mut known = Probe::new();
    ring.submitter()
        .register_probe(&mut known)
        .map_err(|error| format!("io_uring can't be probed: {error}"))?;
    for (name, code) in [
        ("ACCEPT", opcode::Accept::CODE),
        ("CONNECT", opcode::Connect::CODE),
        ("SENDMSG", opcode::SendMsg::CODE),
        ("RECV", opcode::Recv::CODE),
        ("READ", opcode::Read::CODE),
        ("ASYNC_CANCEL", opcode::AsyncCancel::CODE),
    ] {
        if !known.is_supported(code) {
            return Err(format!("this kernel's io_uring has no {name}"));
        }
    }
    Ok(())
}

/// A ring for one thread if the kernel knows that (Linux 6.1), else a plain one; and whether it
/// has to be enabled.
pub(super) fn build() -> io::Result<(IoUring, bool)> {
    let one_thread = IoUring::builder()
        .setup_cqsize(COMPLETIONS)
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_r_disabled()
        .build(ENTRIES);
    match one_thread {
        Ok(ring) => Ok((ring, true)),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            Ok((IoUring::builder().setup_cqsize(COMPLETIONS).build(ENTRIES)?, false))
        }
        Err(error) => Err(error),
    }
}

/// Bytes that the kernel may hold of a socket without being able to send them yet.
const UNSENT_BYTES_MAX: libc::c_int = 32 << 10;

/// Keeps the kernel's share of what waits small: what is in its buffer can't be overtaken by
/// anything more urgent. Both socket links use this; it stands here because
/// it needs a call that no safe crate of ours has.
pub(crate) fn limit_unsent(socket: &impl AsFd) -> io::Result<()> {
    let value = UNSENT_BYTES_MAX;
    let socket = socket.as_fd().as_raw_fd();
    let (level, option) = (libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT);
    let (from, len) = ((&raw const value).cast(), size_of_val(&value) as libc::socklen_t);
    // SAFETY: the socket is borrowed, so it is open, and `value` is an int as the option wants.
    match unsafe { libc::setsockopt(socket, level, option, from, len) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
