//! The key of this device's page names: one file, made on first use, for its owner alone.

use std::io::{ErrorKind, Write as _};
use std::path::Path;

use anyhow::{Context as _, bail};
use hat_engine::options::PrefixSecret;

/// The name of the file in the state directory.
const FILE: &str = "prefix-secret";

/// The key in the state directory `state`; a new one if there is no file. `None` if none can be
/// kept there: the engine then makes a key for itself, and finds its own pages alone.
///
/// # Errors
/// A file that can't be read, or holds something else.
pub(super) fn prefix_secret(state: &Path) -> anyhow::Result<Option<PrefixSecret>> {
    let path = state.join(FILE);
    if let Some(secret) = read(&path)? {
        return Ok(Some(secret));
    }
    match write(&path) {
        Ok(()) => read(&path),
        Err(error) => {
            let path = path.display();
            tracing::warn!(%path, %error, "no key for page names can be kept: prompts are shared \
                within this process alone");
            Ok(None)
        }
    }
}

fn read(path: &Path) -> anyhow::Result<Option<PrefixSecret>> {
    let bytes = match hat_loader::file::read(path, 4096) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => {
            return Err(error).with_context(|| {
                format!("reading {}, the key of page names; or use --prefix off", path.display())
            });
        }
    };
    match PrefixSecret::try_from(&bytes[..]) {
        Ok(secret) => Ok(Some(secret)),
        Err(_) => bail!(
            "{} holds {} bytes, a key of page names has 32: remove the file, and a new one is \
             made; or use --prefix off",
            path.display(),
            bytes.len()
        ),
    }
}

/// Makes a new key, whole or not at all; one that somebody else makes at this time stays.
fn write(path: &Path) -> std::io::Result<()> {
    let mut secret = [0; 32];
    getrandom::fill(&mut secret)?;
    let directory = path.parent().expect("a file in the state directory");
    std::fs::create_dir_all(directory)?;
    let new = directory.join(format!("{FILE}.{}", std::process::id()));
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let written = options.open(&new)?.write_all(&secret);
    let linked = written.and_then(|()| std::fs::hard_link(&new, path));
    std::fs::remove_file(&new)?;
    match linked {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        linked => linked,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_made_once_and_kept_for_its_owner() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        let first = prefix_secret(&state).unwrap().unwrap();
        assert_eq!(prefix_secret(&state).unwrap(), Some(first));
        assert_ne!(first, [0; 32].into());
        assert_eq!(std::fs::read_dir(&state).unwrap().count(), 1);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt as _;
            let mode = std::fs::metadata(state.join(FILE)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
        // Another device has another.
        let other = prefix_secret(&directory.path().join("other")).unwrap().unwrap();
        assert_ne!(first, other);
    }

    #[test]
    fn a_file_that_holds_something_else_is_named() {
        let directory = tempfile::tempdir().unwrap();
        for bytes in [&b""[..], &[7; 31], &[7; 33]] {
            std::fs::write(directory.path().join(FILE), bytes).unwrap();
            let error = prefix_secret(directory.path()).unwrap_err().to_string();
            assert!(error.contains(FILE) && error.contains("remove the file"), "{error}");
        }
        std::fs::remove_file(directory.path().join(FILE)).unwrap();
        std::fs::create_dir(directory.path().join(FILE)).unwrap();
        let error = prefix_secret(directory.path()).unwrap_err().to_string();
        assert!(error.contains(FILE), "{error}");
    }

    #[test]
    fn no_place_to_keep_it_is_no_error() {
        let directory = tempfile::tempdir().unwrap();
        let nowhere = directory.path().join("nowhere");
        std::os::unix::fs::symlink(directory.path().join("gone"), &nowhere).unwrap();
        assert_eq!(prefix_secret(&nowhere).unwrap(), None);
    }
}
