//! Texts of a command line: given as they are, in a file, or at standard input.

use std::io::{self, IsTerminal as _, Read};
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use clap::Args;

/// Longest text that is read from a file or standard input.
pub(super) const TEXT_BYTES_MAX: u64 = 16 << 20;

/// The prompt of one answer.
#[derive(Args)]
pub(super) struct PromptArgs {
    /// The prompt. @FILE reads a file, - standard input; @@ stands for a first @. Without a
    /// prompt, standard input is read unless it is a terminal. A line break at the very end of
    /// what is read is left out, but with --raw.
    #[arg(value_name = "PROMPT", conflicts_with = "flag")]
    positional: Option<String>,
    /// The same as PROMPT.
    #[arg(id = "flag", short = 'p', long = "prompt", value_name = "PROMPT")]
    #[arg(allow_hyphen_values = true)]
    flag: Option<String>,
}

impl PromptArgs {
    /// The text of the prompt. `raw` keeps a line break at its end.
    pub(super) fn read(&self, raw: bool) -> anyhow::Result<String> {
        let (source, place) = match self.given() {
            Some(text) => (Source::of(text), "reading the prompt"),
            None if io::stdin().is_terminal() => bail!(
                "no prompt: give one, as in hat-engine generate \"Why is the sky blue?\", name a \
                 file with @FILE, or pipe text in"
            ),
            None => (Source::Stdin, "no prompt is given, and instead of it"),
        };
        self.refuse_two()?;
        source.read(&mut io::stdin(), raw).context(place)
    }

    /// Refuses text at standard input that nobody would read, since the prompt is given.
    ///
    /// A pipe whose writer has not begun can't be told from one that nobody writes to, so this is
    /// asked again right before the prompt is used.
    pub(super) fn refuse_two(&self) -> anyhow::Result<()> {
        let is_read = self.given().is_none_or(|text| Source::of(text) == Source::Stdin);
        ensure!(
            is_read || !holds_text(),
            "a prompt is given, and there is text at standard input, too: leave one of them out \
             (< /dev/null leaves standard input out)"
        );
        Ok(())
    }

    fn given(&self) -> Option<&str> {
        self.positional.as_deref().or(self.flag.as_deref())
    }
}

/// True if there are bytes at standard input that wait to be read.
fn holds_text() -> bool {
    let stdin = io::stdin();
    // A device such as /dev/null counts nothing.
    let waiting = rustix::io::ioctl_fionread(&stdin).unwrap_or(0);
    !stdin.is_terminal() && (1..=i32::MAX as u64).contains(&waiting)
}

/// A text that stands where another flag has its own; it can be at standard input, too.
pub(super) fn text(given: &str) -> anyhow::Result<String> {
    Source::of(given).read(&mut io::stdin(), false).context("reading the prompt")
}

/// A system message.
pub(super) fn system(given: &str) -> anyhow::Result<String> {
    let source = Source::of(given);
    ensure!(
        source != Source::Stdin,
        "--system: standard input is not for the system message; @FILE reads a file"
    );
    source.read(&mut io::empty(), false).context("reading the system message")
}

/// Place of a text.
#[derive(Debug, PartialEq, Eq)]
enum Source<'a> {
    Text(&'a str),
    File(&'a Path),
    Stdin,
}

impl<'a> Source<'a> {
    fn of(given: &'a str) -> Self {
        match given.strip_prefix('@') {
            None if given == "-" => Self::Stdin,
            None => Self::Text(given),
            Some("-") => Self::Stdin,
            Some(escaped) if escaped.starts_with('@') => Self::Text(escaped),
            Some(path) => Self::File(Path::new(path)),
        }
    }

    fn read(&self, stdin: &mut dyn Read, raw: bool) -> anyhow::Result<String> {
        let (read, place) = match self {
            Self::Text(text) => return Ok((*text).to_owned()),
            Self::File(path) => (file(path)?, path.display().to_string()),
            Self::Stdin => {
                let place = "standard input";
                (all(stdin).context(place)?, place.to_owned())
            }
        };
        let text = if raw { &read } else { without_last_break(&read) };
        ensure!(!text.is_empty(), "{place} is empty");
        Ok(text.to_owned())
    }
}

fn file(path: &Path) -> anyhow::Result<String> {
    ensure!(!path.as_os_str().is_empty(), "@ names no file; @@ stands for a first @");
    hat_loader::file::read_text(path, TEXT_BYTES_MAX).with_context(|| match path.exists() {
        true => path.display().to_string(),
        false => format!("{} (@@ stands for a first @)", path.display()),
    })
}

fn all(input: &mut dyn Read) -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    input.take(TEXT_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    ensure!(
        bytes.len() as u64 <= TEXT_BYTES_MAX,
        "longer than the {TEXT_BYTES_MAX} bytes that are read"
    );
    Ok(String::from_utf8(bytes).map_err(|error| error.utf8_error())?)
}

/// A text without the line break that ends a file's last line.
fn without_last_break(text: &str) -> &str {
    let line = text.strip_suffix('\n').unwrap_or(text);
    if line.len() < text.len() { line.strip_suffix('\r').unwrap_or(line) } else { line }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(given: &str, stdin: &str, raw: bool) -> Result<String, String> {
        let text = Source::of(given).read(&mut stdin.as_bytes(), raw);
        text.map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn every_text_can_be_given() {
        for text in ["hi", "", "-x", "--", "a@b", "two\nlines\n", " @ ", "-\n"] {
            assert_eq!(read(text, "unread", false), Ok(text.to_owned()));
        }
        for text in ["@", "@bob says hi", "@@", "@-", "@/etc/passwd"] {
            assert_eq!(read(&format!("@{text}"), "unread", false), Ok(text.to_owned()));
        }
    }

    #[test]
    fn standard_input_and_files_lose_one_line_break() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let by_file = format!("@{}", file.path().display());
        for (held, text) in
            [("hi", "hi"), ("hi\n", "hi"), ("hi\r\n", "hi"), ("a\n\n\n", "a\n\n"), ("a\r", "a\r")]
        {
            std::fs::write(file.path(), held).unwrap();
            for given in ["-", "@-", &by_file] {
                assert_eq!(read(given, held, false), Ok(text.to_owned()), "{given} {held:?}");
                assert_eq!(read(given, held, true), Ok(held.to_owned()), "{given} {held:?}");
            }
        }
    }

    #[test]
    fn what_can_not_be_read_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let refused = |path: &Path, why: &str| {
            let said = read(&format!("@{}", path.display()), "unread", false).unwrap_err();
            let name = path.to_str().unwrap();
            assert!(said.contains(name) && said.contains(why), "{said}");
        };
        refused(folder.path(), "a directory");
        refused(&path("none"), "@@ stands for a first @");
        let fifo = path("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RWXU).unwrap();
        refused(&fifo, "a FIFO");
        std::fs::write(path("bytes"), b"caf\xe9 au lait").unwrap();
        refused(&path("bytes"), "invalid utf-8");
        std::fs::write(path("empty"), "\n").unwrap();
        refused(&path("empty"), "is empty");
        let long = std::fs::File::create(path("long")).unwrap();
        long.set_len(TEXT_BYTES_MAX + 1).unwrap();
        refused(&path("long"), "longer than the 16777216 bytes");

        assert_eq!(read("-", "", true).unwrap_err(), "standard input is empty");
        assert!(read("@", "", false).unwrap_err().contains("names no file"));
        let mut endless = io::repeat(b'x');
        let said = Source::Stdin.read(&mut endless, false).unwrap_err();
        assert!(format!("{said:#}").contains("standard input: longer than the 16777216 bytes"));
        let said = Source::Stdin.read(&mut &b"caf\xe9"[..], false).unwrap_err();
        assert!(format!("{said:#}").contains("standard input: incomplete utf-8"));
    }
}
