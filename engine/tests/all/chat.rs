//! A conversation on a real terminal: what is pasted is one message, ctrl-C stops an answer, and
//! whoever reads the terminal next finds nothing there.
#![cfg(target_os = "linux")]
#![expect(unsafe_code, reason = "a child of ours takes a terminal before it runs the program")]

use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use hat_program::pull;
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Termios, Winsize, tcgetattr, tcsetwinsize};

const PROGRAM: &str = env!("CARGO_BIN_EXE_hat-engine");

/// Longest that a test waits for what has to come.
const PATIENCE: Duration = Duration::from_secs(120);

const LETTER: &str =
    "Please summarise this text:\n\nThe sky is blue.\n/quit\necho typed\n\nThe end.";

const CTRL_C: &str = "\x03";
const CTRL_D: &str = "\x04";

/// A terminal as a person has one: the keys go in at the master, the screen comes out there.
struct Terminal {
    keys: File,
    /// The side of the programs that run in it.
    programs: File,
    screen: Arc<(Mutex<String>, Condvar)>,
    original: Termios,
}

impl Terminal {
    fn new() -> Self {
        let master =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
        let no_ctty = rustix::fs::OFlags::NOCTTY.bits().cast_signed();
        let programs =
            OpenOptions::new().read(true).write(true).custom_flags(no_ctty).open(name).unwrap();
        // Wide enough that the line editor wraps nothing.
        let size = Winsize { ws_row: 50, ws_col: 400, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&programs, size).unwrap();
        let original = tcgetattr(&programs).unwrap();
        let keys = File::from(master);
        let screen = Arc::new((Mutex::new(String::new()), Condvar::new()));
        let (mut shown, told) = (keys.try_clone().unwrap(), screen.clone());
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = shown.read(&mut bytes) {
                let text = String::from_utf8_lossy(&bytes[..count]).replace('\r', "");
                told.0.lock().unwrap().push_str(&text);
                told.1.notify_all();
            }
        });
        Self { keys, programs, screen, original }
    }

    /// Starts a chat as the program that has this terminal.
    fn chat(&self, args: &[&str], stdout: Option<Stdio>) -> Child {
        let end = || Stdio::from(self.programs.try_clone().unwrap());
        let mut command = Command::new(PROGRAM);
        command.arg("chat").args(args).env("TERM", "xterm");
        command.stdin(end()).stdout(stdout.unwrap_or_else(end)).stderr(end());
        // SAFETY: between fork and exec there are two system calls, which take no lock and
        // allocate nothing.
        unsafe {
            command.pre_exec(|| {
                rustix::process::setsid()?;
                Ok(rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?)
            });
        }
        command.spawn().unwrap()
    }

    fn press(&self, keys: &str) {
        (&self.keys).write_all(keys.as_bytes()).unwrap();
    }

    /// Text as a terminal pastes it once a program has asked for marks around it.
    fn paste(&self, text: &str) {
        self.press(&format!("\x1b[200~{}\x1b[201~", text.replace('\n', "\r")));
    }

    /// Text on the screen so far, without the marks that move its cursor.
    fn shown(&self) -> String {
        plain(&self.screen.0.lock().unwrap())
    }

    /// Waits until `text` stands on the screen after its first `from` bytes, and gives the place
    /// where it ends.
    fn wait(&self, from: usize, text: &str) -> usize {
        let deadline = Instant::now() + PATIENCE;
        let mut screen = self.screen.0.lock().unwrap();
        loop {
            let shown = plain(&screen);
            if let Some(at) = shown.get(from..).and_then(|rest| rest.find(text)) {
                return from + at + text.len();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{text:?} did not come: {:?}", shown.get(from..));
            screen = self.screen.1.wait_timeout(screen, left).unwrap().0;
        }
    }

    /// Asserts that the next reader of the terminal, such as a shell, reads what is typed from now
    /// on alone, and has the settings from before.
    fn is_as_before(&self) {
        let now = tcgetattr(&self.programs).unwrap();
        assert_eq!(now.local_modes, self.original.local_modes);
        assert_eq!(now.input_modes, self.original.input_modes);
        self.press("what the shell reads\n");
        let mut line = String::new();
        BufReader::new(&self.programs).read_line(&mut line).unwrap();
        assert_eq!(line, "what the shell reads\n");
    }
}

/// A screen's text without escape sequences.
fn plain(screen: &str) -> String {
    let mut text = String::new();
    let mut rest = screen;
    while let Some((before, after)) = rest.split_once("\x1b[") {
        text.push_str(before);
        let end = after.find(|c: char| ('@'..='~').contains(&c));
        rest = end.map_or("", |end| &after[end + 1..]);
    }
    text + rest
}

/// Waits for the end of a program, which does not hang.
fn end(child: &mut Child) -> ExitStatus {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("the chat does not end");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Flags with which an answer does not end by itself: the model's two end tokens never come.
const ENDLESS: [&str; 4] = ["--logit-bias", "0=-100", "--logit-bias", "2=-100"];

/// The answer to a conversation of one message.
fn answer(prompt: &str, max_tokens: &str) -> String {
    let output = Command::new(PROGRAM)
        .args(["generate", "--max-tokens", max_tokens, "-p", prompt])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn fetch() {
    pull::default_bundle(&pull::cache_dir().unwrap(), 2, 0).unwrap();
}

#[test]
fn a_pasted_text_with_an_empty_line_is_one_message() {
    fetch();
    let expected = answer(LETTER, "12");
    assert_ne!(expected, answer(LETTER.lines().next().unwrap(), "12"));
    let terminal = Terminal::new();
    let mut chat = terminal.chat(&["--temperature", "0", "--max-tokens", "12"], None);
    let prompt = terminal.wait(0, "\n> ");
    terminal.press("\r"); // an empty line does nothing
    let prompt = terminal.wait(prompt, "\n> ");
    terminal.paste(LETTER);
    let pasted = terminal.wait(prompt, "The end.");
    terminal.press("\r");
    let answered = terminal.wait(pasted, &expected);
    let prompt = terminal.wait(answered, "> ");
    terminal.press(CTRL_D);
    assert_eq!(end(&mut chat).code(), Some(0));
    terminal.is_as_before();
    // Nothing was answered but the one message.
    let after = terminal.wait(prompt, "what the shell reads\n");
    assert_eq!(terminal.shown()[prompt..after].trim(), "what the shell reads");
}

#[test]
fn what_is_pasted_before_the_first_prompt_is_one_message() {
    fetch();
    let terminal = Terminal::new();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("answers");
    let answers = File::create(&path).unwrap();
    let args = ["--temperature", "0", "--max-tokens", "1"];
    let mut chat = terminal.chat(&args, Some(answers.into()));
    // The program has the terminal, and has opened no model yet.
    let deadline = Instant::now() + PATIENCE;
    let marks = "\x1b[?2004h";
    while !terminal.screen.0.lock().unwrap().contains(marks) {
        assert!(Instant::now() < deadline, "the chat asks for no marks around pasted text");
        std::thread::sleep(Duration::from_millis(1));
    }
    terminal.paste(LETTER);
    terminal.press("\r");
    terminal.press(CTRL_D);
    assert_eq!(end(&mut chat).code(), Some(0));
    terminal.is_as_before();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), answer(LETTER, "1"));
    // The first thing that it says comes when its model is open.
    let screen = terminal.screen.0.lock().unwrap();
    let (asked, opened) = (screen.find(marks).unwrap(), screen.find("ctrl-D ends").unwrap());
    assert!(asked < opened, "{screen:?}");
}

#[test]
fn what_is_unread_at_the_end_is_gone() {
    fetch();
    let typed = "/quit\recho this would run\r\r".to_owned() + &"echo and this\r".repeat(100);
    let terminal = Terminal::new();
    let mut chat = terminal.chat(&[], None);
    terminal.wait(0, "\n> ");
    terminal.press(&typed);
    assert_eq!(end(&mut chat).code(), Some(0));
    terminal.is_as_before();

    // A chat that does not begin, and one that is ended from outside.
    let terminal = Terminal::new();
    terminal.press(&typed.replace('\r', "\n"));
    let mut chat = terminal.chat(&["--bundle", "no/such/bundle"], None);
    assert_eq!(end(&mut chat).code(), Some(1));
    terminal.is_as_before();

    let terminal = Terminal::new();
    let mut chat = terminal.chat(&[], None);
    terminal.wait(0, "\n> ");
    terminal.press("half a mess");
    terminal.wait(0, "half a mess");
    kill_process(Pid::from_raw(chat.id().try_into().unwrap()).unwrap(), Signal::TERM).unwrap();
    assert_eq!(end(&mut chat).signal(), Some(Signal::TERM.as_raw()));
    terminal.is_as_before();
}

#[test]
fn ctrl_c_stops_an_answer_and_twice_the_program() {
    fetch();
    let terminal = Terminal::new();
    let args = [&["--temperature", "0"][..], &ENDLESS].concat();
    let mut chat = terminal.chat(&args, None);
    let prompt = terminal.wait(0, "\n> ");
    terminal.press("Count from one to a million.\r");
    let asked = terminal.wait(prompt, "million.\n");
    let begun = terminal.wait(asked, " ");
    terminal.press(CTRL_C);
    let stopped = terminal.wait(begun, "(stopped)\n> ");
    // It goes on.
    terminal.press("Now count down.\r");
    let asked = terminal.wait(stopped, "count down.\n");
    let begun = terminal.wait(asked, " ");
    terminal.press(CTRL_C);
    let mut prompt = terminal.wait(begun, "(stopped)\n> ");
    assert!(chat.try_wait().unwrap().is_none());
    // Twice shortly after one another, for which a busy machine may need several trials.
    let deadline = Instant::now() + PATIENCE;
    while chat.try_wait().unwrap().is_none() {
        terminal.press(CTRL_C);
        let asked_again = || terminal.shown().get(prompt..)?.find("\n> ");
        while chat.try_wait().unwrap().is_none() && asked_again().is_none() {
            assert!(Instant::now() < deadline, "{:?}", terminal.shown());
            std::thread::sleep(Duration::from_millis(1));
        }
        prompt += asked_again().map_or(0, |at| at + "\n> ".len());
    }
    assert_eq!(end(&mut chat).code(), Some(0));
    terminal.is_as_before();
}

#[test]
fn lines_of_a_pipe_are_messages() {
    fetch();
    let mut chat = Command::new(PROGRAM)
        .args(["chat", "--temperature", "0", "--max-tokens", "1"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = chat.stdin.take().unwrap();
    stdin.write_all(b"Name a colour.\n\n/quit\nnever asked\n").unwrap();
    drop(stdin);
    let output = chat.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(String::from_utf8(output.stdout).unwrap(), answer("Name a colour.", "1"));
}
