//! `hat-engine X`: the program `hat-X`, which stands beside this one or in a directory of `PATH`.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, bail};
use clap::CommandFactory as _;

/// Becomes the program of the first word, with the others as its arguments.
///
/// # Errors
/// There is no such program; this program's own commands are named.
pub(crate) fn run(words: &[OsString]) -> anyhow::Result<()> {
    let (word, arguments) = words.split_first().context("a command is wanted")?;
    let Some(path) = program(word) else { bail!(unknown(word)) };
    let mut command = Command::new(&path);
    command.args(arguments);
    #[cfg(unix)]
    let failed: std::io::Error = std::os::unix::process::CommandExt::exec(&mut command);
    #[cfg(not(unix))]
    let failed = match command.status() {
        Ok(status) => std::process::exit(status.code().unwrap_or(1)),
        Err(error) => error,
    };
    Err(failed).with_context(|| format!("starting {}", path.display()))
}

/// The file of `hat-WORD`.
fn program(word: &OsStr) -> Option<PathBuf> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    if !word.as_encoded_bytes().iter().all(|byte| is_plain(*byte)) {
        return None;
    }
    let mut name = OsString::from("hat-");
    name.push(word);
    name.push(std::env::consts::EXE_SUFFIX);
    let beside = std::env::current_exe().ok().and_then(|path| Some(path.parent()?.to_owned()));
    let search = std::env::var_os("PATH").unwrap_or_default();
    let mut directories = beside.into_iter().chain(std::env::split_paths(&search));
    directories.find_map(|directory| Some(directory.join(&name)).filter(|path| path.is_file()))
}

fn unknown(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    let cli = super::Cli::command();
    let own: Vec<&str> = cli.get_subcommands().map(clap::Command::get_name).collect();
    format!(
        "{word:?} is no command, and no program hat-{word} is beside this one or in PATH; the \
         commands are {}",
        own.join(", ")
    )
}
