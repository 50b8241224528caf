//! Standard output and command lines of our programs.
//!
//! All output passes [`write()`], through [`out!`](crate::out!) and [`outln!`](crate::outln!), so
//! that each program treats a reader that is gone and a full disk alike: a closed pipe ends the
//! program quietly with exit code 0, as a reader like `head` wants it, and any other failure is
//! one line on standard error that names standard output, with exit code 1.

use std::fmt::{self, Write as _};
use std::io::{self, IsTerminal as _, Write as _};
use std::process::ExitCode;

use clap::builder::Resettable;

/// Standard output takes no more.
#[derive(Debug, thiserror::Error)]
#[error("standard output: {0}")]
pub struct OutError(#[from] io::Error);

impl OutError {
    /// True if the reader went away, which is no fault of ours.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.0.kind() == io::ErrorKind::BrokenPipe
    }
}

/// Writes to standard output, and past its buffer.
///
/// # Errors
/// The operating system's error.
pub fn write(text: fmt::Arguments<'_>) -> Result<(), OutError> {
    // One call for the whole text: a reader never sees half a line because of us.
    let mut buffer = String::new();
    let _ = buffer.write_fmt(text);
    let mut stdout = io::stdout().lock();
    stdout.write_all(buffer.as_bytes())?;
    Ok(stdout.flush()?)
}

/// Writes a line for people to standard error; nobody may be reading there any more.
pub fn note(text: fmt::Arguments<'_>) {
    let _ = io::stderr().write_all(format!("{text}\n").as_bytes());
}

/// `print!`, with the error as its value.
#[macro_export]
macro_rules! out {
    ($($argument:tt)*) => { $crate::out::write(::std::format_args!($($argument)*)) };
}

/// `println!`, with the error as its value.
#[macro_export]
macro_rules! outln {
    () => { $crate::out::write(::std::format_args!("\n")) };
    ($($argument:tt)*) => {
        $crate::out::write(::std::format_args!("{}\n", ::std::format_args!($($argument)*)))
    };
}

/// `eprintln!`, which does not panic when standard error is closed.
#[macro_export]
macro_rules! note {
    ($($argument:tt)*) => { $crate::out::note(::std::format_args!($($argument)*)) };
}

/// The command line of a program.
///
/// # Errors
/// The exit code with which the program ends now: help and version are output like any other, and
/// a wrong flag is an error on standard error with code 2.
pub fn parse<P: clap::Parser>() -> Result<P, ExitCode> {
    let program = P::command().get_name().to_owned();
    let error = match parse_from(std::env::args_os()) {
        Ok(parsed) => return Ok(parsed),
        Err(error) => error,
    };
    if error.use_stderr() {
        let _ = error.print();
        return Err(ExitCode::from(2));
    }
    let text = error.render();
    let coloured = io::stdout().is_terminal()
        && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let written = match coloured {
        true => write(format_args!("{}", text.ansi())),
        false => write(format_args!("{text}")),
    };
    Err(finish(&program, written.map_err(anyhow::Error::from)))
}

/// A command line, read. A variable that is set and empty counts as one that is not set: that is
/// how a unit file, a container or a shell says "none".
fn parse_from<P: clap::Parser>(
    line: impl IntoIterator<Item = std::ffi::OsString>,
) -> Result<P, clap::Error> {
    let mut matches = without_empty_variables(P::command()).try_get_matches_from(line)?;
    P::from_arg_matches_mut(&mut matches).map_err(|error| error.format(&mut P::command()))
}

fn without_empty_variables(command: clap::Command) -> clap::Command {
    let is_empty =
        |name: &std::ffi::OsStr| std::env::var_os(name).is_some_and(|value| value.is_empty());
    let command = command.mut_args(|arg| match arg.get_env() {
        Some(name) if is_empty(name) => arg.env(Resettable::Reset),
        _ => arg,
    });
    command.mut_subcommands(without_empty_variables)
}

/// The exit code of a program that has ended so, after its line about what went wrong.
#[must_use]
pub fn finish(program: &str, result: anyhow::Result<()>) -> ExitCode {
    match ended(result) {
        Ok(()) => ExitCode::SUCCESS,
        Err(said) => {
            note(format_args!("{program}: {said}"));
            ExitCode::FAILURE
        }
    }
}

/// The way in which a program has ended: a reader of its output that went away is no failure.
///
/// # Errors
/// The error, as one line for people.
pub fn ended(result: anyhow::Result<()>) -> Result<(), String> {
    let Err(error) = result else { return Ok(()) };
    let closed = error.chain().any(|cause| cause.downcast_ref().is_some_and(OutError::is_closed));
    if closed { Ok(()) } else { Err(said(&error)) }
}

/// An error with its causes, without what the one above has said already: a whole cause, or the
/// file that it begins with.
#[must_use]
pub fn said(error: &anyhow::Error) -> String {
    let mut text = String::new();
    let mut above = String::new();
    for cause in error.chain().map(ToString::to_string) {
        let ends_above = |word: &str| {
            let before = above.strip_suffix(word);
            before.is_some_and(|before| before.is_empty() || before.ends_with([' ', '\n']))
        };
        let rest = match cause.split_once(": ") {
            Some((file, rest)) if ends_above(file) => rest,
            _ => &cause,
        };
        if !above.ends_with(&cause) {
            text += if text.is_empty() { "" } else { ": " };
            text += rest;
        }
        above = cause;
    }
    text
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn a_cause_is_said_once() {
        let full = || OutError::from(io::Error::from_raw_os_error(28));
        let once = "standard output: No space left on device (os error 28)";
        assert_eq!(said(&full().into()), once);
        let with_context = Err::<(), _>(full()).context("printing the table").unwrap_err();
        assert_eq!(said(&with_context), format!("printing the table: {once}"));
        let plain = anyhow::anyhow!("inner").context("middle").context("outer");
        assert_eq!(said(&plain), "outer: middle: inner");
        for (above, cause, expected) in [
            ("reading /a b/c", "/a b/c: no such file", "reading /a b/c: no such file"),
            ("/a", "/a: no bundle: /a/x", "/a: no bundle: /a/x"),
            ("reading /a/c", "c: gone", "reading /a/c: c: gone"),
            ("reading /a", "/a/c: gone", "reading /a: /a/c: gone"),
        ] {
            assert_eq!(said(&anyhow::anyhow!(cause).context(above)), expected);
        }
    }

    #[test]
    fn a_reader_that_is_gone_is_no_failure_and_anything_else_is() {
        let failed = |kind: io::ErrorKind| {
            Err::<(), _>(OutError::from(io::Error::from(kind))).context("while answering")
        };
        let code = |result| format!("{:?}", finish("test", result));
        assert_eq!(code(Ok(())), format!("{:?}", ExitCode::SUCCESS));
        assert_eq!(code(failed(io::ErrorKind::BrokenPipe)), format!("{:?}", ExitCode::SUCCESS));
        assert_eq!(code(failed(io::ErrorKind::StorageFull)), format!("{:?}", ExitCode::FAILURE));
        // A broken connection is not a broken standard output.
        let peer = Err(anyhow::Error::from(io::Error::from(io::ErrorKind::BrokenPipe)));
        assert_eq!(code(peer), format!("{:?}", ExitCode::FAILURE));
    }
}
