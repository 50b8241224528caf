//! The terminal of a conversation: what is typed at any time belongs to the conversation, and is
//! never left to the shell.
//!
//! From start to end the terminal neither echoes nor edits by itself and marks pasted text, but
//! for the time in which the line editor has its own settings: so a text that is pasted while a
//! model is opened or an answer runs waits for the next prompt as one piece.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::{
    InputModes, LocalModes, OptionalActions, QueueSelector, SpecialCodeIndex, Termios, tcflush,
    tcgetattr, tcsetattr,
};
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

/// Pasted text comes between two marks, so that its line breaks are no ends of a message.
const PASTES_MARKED: &[u8] = b"\x1b[?2004h";
const PASTES_PLAIN: &[u8] = b"\x1b[?2004l";

/// Silence after which nothing more is expected of a paste.
const QUIET_NS: i64 = 50_000_000;

/// Looks at a terminal that never falls silent before its settings are given back all the same.
const DRAIN_LOOKS_MAX: u32 = 10_000;

/// State of a conversation, which decides what a signal does.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Phase {
    /// A model is opened: ctrl-C ends the program.
    Opening,
    /// The prompt stands: the line editor reads keys, ctrl-C among them.
    Prompt,
    /// An answer runs: ctrl-C stops it.
    Answer,
}

/// Standard input, which is a terminal. Its settings are given back when this is dropped.
pub(super) struct Terminal {
    shared: Arc<Shared>,
}

struct Shared {
    /// Terminal on which marks are switched on and off.
    control: Option<File>,
    original: Termios,
    /// Settings between prompts; none for a terminal without a line editor.
    quiet: Option<Termios>,
    phase: AtomicU8,
    interrupted: AtomicBool,
}

impl Terminal {
    /// Takes standard input if it is a terminal; signals give it back, too.
    pub(super) fn take() -> io::Result<Option<Self>> {
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        let original = tcgetattr(stdin())?;
        let shared = Arc::new(Shared {
            control: control(),
            quiet: can_edit().then(|| quiet(&original)),
            original,
            phase: AtomicU8::new(Phase::Opening as u8),
            interrupted: AtomicBool::new(false),
        });
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGCONT])?;
        let told = shared.clone();
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            for signal in signals.forever() {
                told.signal(signal);
            }
        })?;
        shared.hush()?;
        Ok(Some(Self { shared }))
    }

    /// True if lines can be edited here.
    pub(super) fn can_edit(&self) -> bool {
        self.shared.quiet.is_some()
    }

    /// Sets what a signal does from now on.
    pub(super) fn enter(&self, phase: Phase) -> io::Result<()> {
        self.shared.interrupted.store(false, Ordering::SeqCst);
        self.shared.phase.store(phase as u8, Ordering::SeqCst);
        // The line editor, or a shell in between, may have left other settings.
        if phase == Phase::Prompt { Ok(()) } else { self.shared.hush() }
    }

    /// True once ctrl-C was pressed in this answer.
    pub(super) fn is_interrupted(&self) -> bool {
        self.shared.interrupted.load(Ordering::SeqCst)
    }

    /// Forgets what is typed and not read yet.
    pub(super) fn drain(&self) {
        self.shared.drain();
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.shared.give_back();
    }
}

impl Shared {
    fn is_in(&self, phase: Phase) -> bool {
        self.phase.load(Ordering::SeqCst) == phase as u8
    }

    fn signal(&self, signal: i32) {
        let editor = self.quiet.is_some();
        match signal {
            SIGINT if self.is_in(Phase::Answer) => self.interrupted.store(true, Ordering::SeqCst),
            // The line editor reads the key, and sets the terminal up again after a pause.
            SIGINT | SIGCONT if editor && self.is_in(Phase::Prompt) => {}
            SIGCONT => {
                let _ = self.hush();
            }
            _ => {
                self.give_back();
                let _ = emulate_default_handler(signal);
            }
        }
    }

    fn hush(&self) -> io::Result<()> {
        let Some(quiet) = &self.quiet else { return Ok(()) };
        tcsetattr(stdin(), OptionalActions::Now, quiet)?;
        self.write(PASTES_MARKED);
        Ok(())
    }

    /// A terminal that is gone can't be helped, here and below.
    fn give_back(&self) {
        if self.quiet.is_some() {
            self.write(PASTES_PLAIN);
        }
        self.drain();
        let _ = tcsetattr(stdin(), OptionalActions::Flush, &self.original);
    }

    /// Reads away what is there, and what is still coming: a long paste comes in pieces.
    fn drain(&self) {
        let quiet = Timespec { tv_sec: 0, tv_nsec: QUIET_NS };
        for _ in 0..DRAIN_LOOKS_MAX {
            if tcflush(stdin(), QueueSelector::IFlush).is_err() {
                return;
            }
            let input = stdin();
            let mut fds = [PollFd::new(&input, PollFlags::IN)];
            match poll(&mut fds, Some(&quiet)) {
                Ok(1) if fds[0].revents() == PollFlags::IN => {}
                Err(rustix::io::Errno::INTR) => {}
                _ => return,
            }
        }
    }

    fn write(&self, bytes: &[u8]) {
        if let Some(mut control) = self.control.as_ref() {
            let _ = control.write_all(bytes);
        }
    }
}

fn stdin() -> BorrowedFd<'static> {
    rustix::stdio::stdin()
}

/// A way to the screen: standard output may be somewhere else.
fn control() -> Option<File> {
    let stdout = io::stdout();
    if stdout.is_terminal() {
        return stdout.as_fd().try_clone_to_owned().ok().map(File::from);
    }
    OpenOptions::new().write(true).open("/dev/tty").ok()
}

/// True for a terminal whose cursor moves; `dumb` is one whose does not.
fn can_edit() -> bool {
    std::env::var_os("TERM")
        .is_none_or(|name| !matches!(name.to_str(), Some("dumb" | "cons25" | "emacs")))
}

/// Settings in which bytes wait as they came; ctrl-C is still a signal.
fn quiet(original: &Termios) -> Termios {
    let mut quiet = original.clone();
    quiet.local_modes -= LocalModes::ECHO | LocalModes::ICANON | LocalModes::IEXTEN;
    quiet.input_modes -=
        InputModes::ICRNL | InputModes::INLCR | InputModes::IGNCR | InputModes::ISTRIP;
    quiet.special_codes[SpecialCodeIndex::VMIN] = 1;
    quiet.special_codes[SpecialCodeIndex::VTIME] = 0;
    quiet
}
