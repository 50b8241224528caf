//! Secrets of this user's roles, each in a file of its own, made on first use for its owner
//! alone: the key of this device's page names, and the key of its HTTP API.

use std::io::{ErrorKind, IsTerminal as _, Write as _};
use std::path::Path;

use anyhow::{Context as _, bail};
use hat_engine::options::PrefixSecret;
use hat_loader::file::NewFile;

use super::log::tell;

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
        warn_if_open(&path);
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

/// Makes a new key.
fn write(path: &Path) -> std::io::Result<()> {
    let mut secret = [0; 32];
    getrandom::fill(&mut secret)?;
    write_new(path, &secret)
}

/// Writes a file for its owner alone, whole or not at all; one that somebody else makes at this
/// time stays.
fn write_new(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let mut file = NewFile::create(path, true)?;
    file.write_all(bytes)?;
    match file.publish_new() {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        published => published,
    }
}

/// Says so if others of this machine can read a secret. It is used all the same: the owner may
/// have given it to a group on purpose.
fn warn_if_open(path: &Path) {
    #[cfg(unix)]
    if let Some(warning) = open_to_others(path) {
        tell(&warning);
    }
}

#[cfg(unix)]
fn open_to_others(path: &Path) -> Option<String> {
    use std::os::unix::fs::PermissionsExt as _;
    let mode = std::fs::metadata(path).ok()?.permissions().mode() & 0o777;
    let path = path.display();
    (mode & 0o077 != 0).then(|| {
        format!(
            "warning: {path} is open to others on this machine (mode {mode:04o}): \
             run `chmod 600 {path}`"
        )
    })
}

/// Shortest API key that is taken from a file, in characters.
const API_KEY_CHARS_MIN: usize = 16;

/// Refuses a file with no usable key in it; makes none.
///
/// # Errors
/// As [`api_key`].
pub(super) fn check_api_key(path: &Path) -> anyhow::Result<()> {
    read_api_key(path).map(drop)
}

/// The API key in the file at `path`; a new one if there is no file. It is shown once, and to a
/// person at a terminal alone: what a service prints is kept in a log.
///
/// # Errors
/// A file that can't be read or written, or holds no usable key.
pub(super) fn api_key(path: &Path) -> anyhow::Result<String> {
    if let Some(key) = read_api_key(path)? {
        warn_if_open(path);
        return Ok(key);
    }
    let mut random = [0u8; 24];
    getrandom::fill(&mut random).context("the system gave no random bytes")?;
    let key = random.iter().fold("hat-".to_owned(), |key, byte| key + &format!("{byte:02x}"));
    write_new(path, format!("{key}\n").as_bytes())
        .with_context(|| format!("writing {}", path.display()))?;
    // Another process may have been first.
    let kept = read_api_key(path)?.with_context(|| format!("{} is gone", path.display()))?;
    if kept == key && std::io::stderr().is_terminal() {
        tell(&format!("new API key, shown this once: {key}"));
    }
    Ok(kept)
}

fn read_api_key(path: &Path) -> anyhow::Result<Option<String>> {
    let shown = path.display();
    let text = match hat_loader::file::read_text(path, 4096) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("reading {shown}")),
    };
    let key = text.trim();
    let chars = key.chars().count();
    if chars < API_KEY_CHARS_MIN {
        bail!(
            "{shown} holds {chars} characters, an API key has at least {API_KEY_CHARS_MIN}: \
             remove the file, and a new key is made"
        );
    }
    if !key.bytes().all(|byte| byte.is_ascii_graphic()) {
        bail!("{shown}: an API key is one word of printable ASCII characters");
    }
    Ok(Some(key.to_owned()))
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

    #[test]
    fn an_api_key_is_made_once_and_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state/api-key");
        let key = api_key(&path).unwrap();
        assert!(key.starts_with("hat-") && key.len() == 52, "{key}");
        assert_eq!(api_key(&path).unwrap(), key);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{key}\n"));
        assert_eq!(std::fs::read_dir(directory.path().join("state")).unwrap().count(), 1);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt as _;
            let set = |mode| {
                let mode = std::fs::Permissions::from_mode(mode);
                std::fs::set_permissions(&path, mode).unwrap();
            };
            assert_eq!(open_to_others(&path), None);
            for (mode, text) in [(0o644, "0644"), (0o640, "0640"), (0o602, "0602")] {
                set(mode);
                let warning = open_to_others(&path).unwrap();
                assert!(warning.contains(text) && warning.contains("chmod 600"), "{warning}");
                assert_eq!(api_key(&path).unwrap(), key, "it works all the same");
            }
        }
    }

    #[test]
    fn an_unusable_api_key_is_named_and_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api-key");
        for text in ["", "\n", "short", "two words of a long key", "ключ-ключ-ключ-ключ"]
        {
            std::fs::write(&path, text).unwrap();
            let error = api_key(&path).unwrap_err().to_string();
            assert!(error.contains("api-key") && !error.contains("words"), "{error}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
    }

    /// A file that can't be linked into place leaves nothing behind, as on a full disk.
    #[test]
    fn a_key_that_cant_be_written_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("gone");
        std::os::unix::fs::symlink("/proc/no/such", &path).unwrap();
        assert!(api_key(&path).is_err());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
