//! Opening a link over sockets: io_uring where it can run, mio elsewhere.

use std::io;
use std::net::SocketAddr;

use super::mio::MioLink;
#[cfg(target_os = "linux")]
pub(super) use super::uring::limit_unsent;
use super::{Link, LinkKind};

/// Tells of a listener that takes no peers, and of the first one that it takes again: once each,
/// however often it is tried between.
#[derive(Debug, Default)]
pub(super) struct Accepting {
    failures: u64,
}

impl Accepting {
    /// A peer wanted in, and this is what came between.
    pub(super) fn note(&mut self, error: Option<&io::Error>) {
        let change = self.change(error.is_some());
        match (change, error) {
            (Some(_), Some(error)) => tracing::warn!(%error, "no peer is accepted; trying on"),
            (Some(failures), None) => tracing::info!(failures, "peers are accepted again"),
            (None, _) => {}
        }
    }

    /// The failures so far if this one changes something: the first, or the end of them.
    fn change(&mut self, has_failed: bool) -> Option<u64> {
        if has_failed {
            self.failures += 1;
            return (self.failures == 1).then_some(1);
        }
        Some(std::mem::take(&mut self.failures)).filter(|failures| *failures > 0)
    }
}

/// Only Linux has a call for it; elsewhere frames wait in the kernel's buffer.
#[cfg(not(target_os = "linux"))]
pub(super) fn limit_unsent<S>(_socket: &S) -> io::Result<()> {
    Ok(())
}

/// A socket link that is open, and which one it is.
pub struct Opened {
    /// The link.
    pub link: Box<dyn Link>,
    /// Kind that runs.
    pub kind: LinkKind,
    /// Reason that another link runs than was asked for.
    pub fallback: Option<String>,
}

/// Opens a socket link that listens at `listen`, or only connects. io_uring is probed first; where
/// it can't run, mio does, and [`Opened::fallback`] says why.
///
/// # Errors
/// If the address can't be listened at, or [`LinkKind::Memory`] is asked for: its ends meet in a
/// [`super::memory::MemoryNet`].
pub fn open(kind: LinkKind, listen: Option<SocketAddr>) -> io::Result<Opened> {
    open_probed(kind, listen, probe_uring)
}

/// As [`open`], with the answer of another probe than the kernel's.
///
/// # Errors
/// As [`open`].
pub fn open_probed(
    kind: LinkKind,
    listen: Option<SocketAddr>,
    probe: impl FnOnce() -> Result<(), String>,
) -> io::Result<Opened> {
    let mio = |fallback| -> io::Result<Opened> {
        let link = Box::new(MioLink::new(listen)?);
        Ok(Opened { link, kind: LinkKind::Mio, fallback })
    };
    match kind {
        LinkKind::Memory => {
            let text = "a memory link comes from a MemoryNet, not from an address";
            Err(io::Error::new(io::ErrorKind::InvalidInput, text))
        }
        LinkKind::Mio => mio(None),
        LinkKind::IoUring => match probe() {
            Ok(()) => open_uring(listen),
            Err(reason) => {
                tracing::info!(reason, "io_uring is not available, mio runs instead");
                mio(Some(reason))
            }
        },
    }
}

/// Probes io_uring on this machine.
///
/// # Errors
/// The reason, with the setting to change where there is one.
pub fn probe_uring() -> Result<(), String> {
    #[cfg(target_os = "linux")]
    return super::uring::probe();
    #[cfg(not(target_os = "linux"))]
    return Err("io_uring is there on Linux alone".to_owned());
}

#[cfg(target_os = "linux")]
fn open_uring(listen: Option<SocketAddr>) -> io::Result<Opened> {
    let link = Box::new(super::uring::UringLink::new(listen)?);
    Ok(Opened { link, kind: LinkKind::IoUring, fallback: None })
}

#[cfg(not(target_os = "linux"))]
fn open_uring(_listen: Option<SocketAddr>) -> io::Result<Opened> {
    Err(io::Error::from(io::ErrorKind::Unsupported))
}

#[cfg(test)]
mod tests {
    use super::Accepting;

    #[test]
    fn a_listener_without_descriptors_is_told_of_twice() {
        let mut accepting = Accepting::default();
        assert_eq!(accepting.change(false), None);
        let told: Vec<_> = (0..1000).filter_map(|_| accepting.change(true)).collect();
        assert_eq!(told, [1]);
        assert_eq!(accepting.change(false), Some(1000));
        assert_eq!(accepting.change(false), None);
    }
}
