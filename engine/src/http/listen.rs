//! The listening socket: a loopback address, or a file for this user alone.

use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::{fs, io};

use super::HttpConfig;
use super::stream::Listener;
use crate::Error;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// A socket that is bound, before the runtime has it.
pub(super) enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Socket {
    /// The same on the current runtime.
    pub(super) fn on_runtime(self) -> io::Result<Listener> {
        match self {
            Self::Tcp(listener) => {
                listener.set_nonblocking(true)?;
                tokio::net::TcpListener::from_std(listener).map(Listener::Tcp)
            }
            Self::Unix(listener) => {
                listener.set_nonblocking(true)?;
                tokio::net::UnixListener::from_std(listener).map(Listener::Unix)
            }
        }
    }
}

/// A bound socket of the API. Who connects waits until [`HttpServer::start_at`] serves it.
///
/// [`HttpServer::start_at`]: super::HttpServer::start_at
pub struct HttpSocket {
    pub(super) socket: Socket,
    pub(super) bound: Bound,
}

/// The place of a socket. Dropping it removes the file of a Unix socket, if it is still that one.
pub(super) struct Bound {
    pub(super) address: SocketAddr,
    file: Option<File>,
}

struct File {
    path: PathBuf,
    /// Device and inode.
    id: (u64, u64),
}

impl Bound {
    pub(super) fn place(&self) -> String {
        match &self.file {
            None => format!("http://{}", self.address),
            Some(file) => format!("unix:{}", file.path.display()),
        }
    }

    /// The words for an error.
    pub(super) fn what(&self) -> String {
        format!("listening at {}", self.place())
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        if let Some(file) = &self.file
            && file_id(&file.path).is_ok_and(|id| id == file.id)
        {
            let _ = fs::remove_file(&file.path); // a file that stays is replaced at the next start
        }
    }
}

fn file_id(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

impl HttpSocket {
    /// Binds the address or the path of `config`.
    ///
    /// # Errors
    /// [`Error::Input`] as [`HttpConfig::check`], or `http` if the path of a Unix socket is taken
    /// by another server or another kind of file; [`Error::Io`] if the address can't be had.
    pub fn bind(config: &HttpConfig) -> Result<Self, Error> {
        config.check()?;
        let mut bound = Bound { address: config.listen, file: None };
        let Some(path) = &config.unix else {
            let failed = |error| Error::io(format!("listening at http://{}", config.listen), error);
            let listener = TcpListener::bind(config.listen).map_err(failed)?;
            bound.address = listener.local_addr().map_err(failed)?;
            return Ok(Self { socket: Socket::Tcp(listener), bound });
        };
        make_room(path)?;
        let failed = |error| Error::io(format!("listening at unix:{}", path.display()), error);
        let listener = bind_unix(path).map_err(failed)?;
        bound.file = Some(File { path: path.clone(), id: file_id(path).map_err(failed)? });
        Ok(Self { socket: Socket::Unix(listener), bound })
    }
}

/// Nobody can connect before `listen`, so the mode holds from the first connection on.
fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

    let address = SocketAddrUnix::new(path)?;
    let (family, kind, flags) = (AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC);
    let socket = rustix::net::socket_with(family, kind, flags, None)?;
    rustix::net::bind(&socket, &address)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(UnixListener::from(socket))
}

/// Removes the socket of a server that is gone. Whatever else is there stays.
fn make_room(path: &Path) -> Result<(), Error> {
    let refuse =
        |reason: &str| Err(Error::field("http", format!("unix:{} {reason}", path.display())));
    let failed = |error| Error::io(format!("looking at {}", path.display()), error);
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    if !metadata.file_type().is_socket() {
        return refuse("exists and is no socket: choose another path, or remove it");
    }
    match UnixStream::connect(path) {
        Ok(_) => refuse("is taken: a server listens there"),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed)
        }
        Err(error) => Err(failed(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(path: &Path) -> HttpConfig {
        let mut config = HttpConfig::new(([127, 0, 0, 1], 0).into());
        config.unix = Some(path.to_owned());
        config
    }

    #[test]
    fn a_socket_is_its_owners_and_goes_with_the_server() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("http.sock");
        let HttpSocket { socket: _socket, bound } = HttpSocket::bind(&config(&path)).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(bound.place(), format!("unix:{}", path.display()));
        let error = HttpSocket::bind(&config(&path)).err().unwrap().to_string();
        assert!(error.contains("a server listens there"), "{error}");
        drop(bound);
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced_and_another_file_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("http.sock");
        let HttpSocket { socket, mut bound } = HttpSocket::bind(&config(&path)).unwrap();
        bound.file = None; // as after a kill
        drop((socket, bound));
        assert!(path.exists());
        let HttpSocket { socket: _socket, bound } = HttpSocket::bind(&config(&path)).unwrap();
        // A successor's socket stays when this one goes.
        fs::remove_file(&path).unwrap();
        let _successor = HttpSocket::bind(&config(&path)).unwrap();
        drop(bound);
        assert!(path.exists());

        let file = directory.path().join("file");
        fs::write(&file, "precious").unwrap();
        let error = HttpSocket::bind(&config(&file)).err().unwrap().to_string();
        assert!(error.contains("no socket"), "{error}");
        assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
        let error =
            HttpSocket::bind(&config(&directory.path().join("no/such.sock"))).err().unwrap();
        assert!(error.to_string().contains("no/such.sock"), "{error}");
        let long = directory.path().join("x".repeat(200));
        assert!(HttpSocket::bind(&config(&long)).is_err());
    }
}
