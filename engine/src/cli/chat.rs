//! `chat`: a conversation on this terminal.

use std::fmt::Display;
use std::io::{self, BufRead, IsTerminal as _, Read as _, Write as _};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use hat_engine::options::{Message, Role, SamplerConfig};
use hat_engine::{Engine, Event, Request};
use hat_program::out::OutError;
use hat_program::{note, out, outln};
use rustyline::error::{ReadlineError, Signal};
use rustyline::history::MemHistory;
use rustyline::{Behavior, Config, Editor};

use super::prompt::{self, TEXT_BYTES_MAX};
use super::terminal::{Phase, Terminal};
use super::{DeviceRunArgs, DraftArgs, ModelArg, SamplerArgs, flagged, words};

/// Pause between two looks at ctrl-C while an answer computes.
const INTERRUPT_LOOK: Duration = Duration::from_millis(20);

/// Time in which a second ctrl-C at the prompt ends the chat.
const TWICE_WITHIN: Duration = Duration::from_secs(3);

/// A conversation on this terminal: /quit, or ctrl-D at an empty line, ends it.
///
/// Pasted text is one message, whatever lines it has. Ctrl-C stops an answer; the part that came
/// stays in the conversation. Ctrl-C twice at the prompt ends the chat. Where standard input is no
/// terminal, each line of it is a message.
#[derive(Args)]
pub(crate) struct ChatArgs {
    #[command(flatten)]
    model: ModelArg,
    #[command(flatten)]
    device: DeviceRunArgs,
    #[command(flatten)]
    pub(super) sampler: SamplerArgs,
    #[command(flatten)]
    draft: DraftArgs,
    /// A system message; @FILE reads it from a file, and @@ stands for a first @.
    #[arg(long, value_name = "TEXT|@FILE", allow_hyphen_values = true)]
    system: Option<String>,
    /// Most tokens of one answer.
    #[arg(long, value_name = "N")]
    max_tokens: Option<u32>,
}

impl ChatArgs {
    pub(crate) fn run(self, cache: &Path) -> anyhow::Result<()> {
        let system = self.system.as_deref().map(prompt::system).transpose()?;
        // Before the model is opened: what is typed meanwhile is for the first prompt.
        let mut asked = Request::conversation(Vec::new());
        asked.sampler = self.sampler.config(&SamplerConfig::default());
        asked.max_tokens = self.max_tokens;
        asked.check().map_err(|error| flagged(error.into()))?;
        let terminal = Terminal::take().context("preparing the terminal")?;
        let engine = Engine::open(self.device.clone().named(self.model.clone())?.config(cache)?)?;
        let mut conversation = Conversation::new(system);
        let mut input = Input::new(terminal.as_ref())?;
        let mut model = engine.sampling();
        if terminal.is_some() {
            let sampling = described(&self.sampler.config(&model), &model);
            note!("{}: {sampling}", engine.model_name());
            note!("{}", words::drafter(&engine));
            note!("/quit or ctrl-D ends the chat, ctrl-C stops an answer");
        }
        let mut interrupts = Interrupts::default();
        loop {
            let message = match input.next(terminal.as_ref())? {
                Typed::Message(text) => text,
                Typed::Nothing => continue,
                Typed::Interrupt if interrupts.is_second(Instant::now()) => break,
                Typed::Interrupt => {
                    note!("ctrl-C once more ends the chat, as ctrl-D and /quit do");
                    continue;
                }
                Typed::End => break,
            };
            interrupts = Interrupts::default();
            if let Some(terminal) = &terminal {
                terminal.enter(Phase::Answer)?;
            }
            model.seed = random_seed()?;
            let mut request = conversation.ask(message);
            request.sampler = self.sampler.config(&model);
            request.draft = self.draft.draft;
            request.max_tokens = self.max_tokens;
            let is_stopped = || terminal.as_ref().is_some_and(Terminal::is_interrupted);
            let text = match answer(&engine, request, &is_stopped) {
                Err(error) if error.is::<OutError>() => return Err(error),
                Err(error) => {
                    note!("{error:#}");
                    String::new()
                }
                Ok(text) => text,
            };
            conversation.answered(text);
            outln!()?;
            if is_stopped() {
                note!("(stopped)");
            }
        }
        Ok(())
    }
}

/// A sampler in words, and where it is from.
fn described(used: &SamplerConfig, model: &SamplerConfig) -> String {
    let off = SamplerConfig::default();
    let mut parts = Vec::new();
    let mut add = |name: &str, matters: bool, value: &dyn Display| {
        if matters {
            parts.push(format!("{name} {value}"));
        }
    };
    let samples = used.temperature != off.temperature;
    add("temperature", samples, &used.temperature);
    add("top_k", samples && used.top_k != off.top_k, &used.top_k);
    add("top_p", samples && used.top_p != off.top_p, &used.top_p);
    add("min_p", samples && used.min_p != off.min_p, &used.min_p);
    let seen = [
        ("repetition_penalty", used.repetition_penalty, off.repetition_penalty),
        ("presence_penalty", used.presence_penalty, off.presence_penalty),
        ("frequency_penalty", used.frequency_penalty, off.frequency_penalty),
    ];
    for (name, penalty, none) in seen {
        add(name, penalty != none, &penalty);
    }
    if !samples {
        parts.insert(0, "greedy".to_owned());
    }
    if used == model && used != &off {
        parts.push("as its makers recommend".to_owned());
    }
    parts.join(", ")
}

fn random_seed() -> anyhow::Result<u64> {
    let mut seed = [0; 8];
    getrandom::fill(&mut seed).context("the system has no random numbers for a seed")?;
    Ok(u64::from_le_bytes(seed))
}

/// The messages so far.
struct Conversation {
    messages: Vec<Message>,
}

impl Conversation {
    fn new(system: Option<String>) -> Self {
        Self { messages: Vec::from_iter(system.map(|text| Message::new(Role::System, text))) }
    }

    fn ask(&mut self, text: String) -> Request {
        self.messages.push(Message::new(Role::User, text));
        Request::conversation(self.messages.clone())
    }

    /// Takes the answer to the last question, or the part of it that came. A question to which
    /// nothing came is forgotten.
    fn answered(&mut self, text: String) {
        match text.is_empty() {
            true => drop(self.messages.pop()),
            false => self.messages.push(Message::new(Role::Assistant, text)),
        }
    }
}

/// Prints an answer as it comes, and gives its text: the part that came, once it is stopped.
fn answer(
    engine: &Engine,
    request: Request,
    is_stopped: &dyn Fn() -> bool,
) -> anyhow::Result<String> {
    let mut generation = engine.generate(request)?;
    let mut answer = String::new();
    while !is_stopped() {
        let event = match generation.next_timeout(INTERRUPT_LOOK) {
            Some(event) => event?,
            None if generation.is_finished() => {
                anyhow::bail!("the answer ended without a last event")
            }
            None => continue,
        };
        if let Event::Token { text, .. } | Event::Done { text, .. } = &event {
            out!("{text}")?;
            answer.push_str(text);
        }
        if let Event::Done { metrics, .. } = event {
            return Ok(metrics.text);
        }
    }
    Ok(answer)
}

/// Ctrl-C at the prompt.
#[derive(Default)]
struct Interrupts {
    last: Option<Instant>,
}

impl Interrupts {
    /// Takes one, and tells whether another came shortly before it.
    fn is_second(&mut self, now: Instant) -> bool {
        let last = self.last.replace(now);
        last.is_some_and(|last| now.duration_since(last) <= TWICE_WITHIN)
    }
}

/// Input from the prompt.
#[derive(Debug, PartialEq, Eq)]
enum Typed {
    Message(String),
    /// An empty line.
    Nothing,
    Interrupt,
    End,
}

impl Typed {
    /// A line, or what was pasted into one.
    fn line(text: &str) -> Self {
        match text.trim() {
            "" => Self::Nothing,
            "/quit" => Self::End,
            _ => Self::Message(text.trim_end_matches(['\r', '\n']).to_owned()),
        }
    }
}

/// Source of messages.
enum Input {
    /// A terminal.
    Editor(Box<Editor<(), MemHistory>>),
    /// Anything else, and a terminal that has no cursor. The prompt sign is for the latter.
    Lines { sign: &'static str },
}

impl Input {
    fn new(terminal: Option<&Terminal>) -> anyhow::Result<Self> {
        match terminal {
            Some(terminal) if terminal.can_edit() => {
                // Standard output may be a file: then the terminal itself shows the line.
                let shown = io::stdout().is_terminal();
                let behavior = if shown { Behavior::Stdio } else { Behavior::PreferTerm };
                let config = Config::builder().behavior(behavior).build();
                let history = MemHistory::with_config(&config);
                let editor =
                    Editor::with_history(config, history).context("preparing the line editor")?;
                Ok(Self::Editor(Box::new(editor)))
            }
            Some(_) => Ok(Self::Lines { sign: "> " }),
            None => Ok(Self::Lines { sign: "" }),
        }
    }

    fn next(&mut self, terminal: Option<&Terminal>) -> anyhow::Result<Typed> {
        if let Some(terminal) = terminal {
            terminal.enter(Phase::Prompt)?;
        }
        let typed = match self {
            Self::Editor(editor) => edited(editor, terminal),
            Self::Lines { sign } => {
                let _ = io::stderr().write_all(sign.as_bytes());
                line(&mut io::stdin().lock())
            }
        };
        typed.context("reading your message")
    }
}

fn edited(
    editor: &mut Editor<(), MemHistory>,
    terminal: Option<&Terminal>,
) -> anyhow::Result<Typed> {
    loop {
        return match editor.readline("> ") {
            Ok(text) => {
                let typed = Typed::line(&text);
                if matches!(typed, Typed::Message(_)) {
                    editor.add_history_entry(text)?;
                }
                Ok(typed)
            }
            Err(ReadlineError::Eof) => Ok(Typed::End),
            Err(ReadlineError::Interrupted | ReadlineError::Signal(Signal::Interrupt)) => {
                Ok(Typed::Interrupt)
            }
            Err(ReadlineError::Signal(_)) => continue, // the window has another size
            Err(ReadlineError::Io(error)) if error.kind() == io::ErrorKind::InvalidData => {
                // The rest of it would be read as messages of its own.
                terminal.inspect(|terminal| terminal.drain());
                note!("that was no UTF-8 text; nothing was sent");
                Ok(Typed::Nothing)
            }
            Err(error) => Err(error.into()),
        };
    }
}

/// The next line of a file or a pipe.
fn line(input: &mut dyn BufRead) -> anyhow::Result<Typed> {
    let mut bytes = Vec::new();
    input.take(TEXT_BYTES_MAX + 1).read_until(b'\n', &mut bytes)?;
    anyhow::ensure!(
        bytes.len() as u64 <= TEXT_BYTES_MAX,
        "a line is longer than the {TEXT_BYTES_MAX} bytes that are read"
    );
    match bytes.is_empty() {
        true => Ok(Typed::End),
        false => Ok(Typed::line(std::str::from_utf8(&bytes)?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_quit_ends_and_an_empty_line_does_nothing() {
        for nothing in ["", "\n", "\r\n", "  \t"] {
            assert_eq!(Typed::line(nothing), Typed::Nothing);
        }
        for quit in ["/quit", "/quit\n", " /quit \r\n"] {
            assert_eq!(Typed::line(quit), Typed::End);
        }
        for message in ["quit", "/quit now", "see:\n/quit", "a\n\nb", " x"] {
            assert_eq!(Typed::line(message), Typed::Message(message.to_owned()));
        }
        assert_eq!(Typed::line("a\n\nb\r\n\n"), Typed::Message("a\n\nb".to_owned()));
    }

    #[test]
    fn the_first_lines_say_how_tokens_are_chosen() {
        let greedy = SamplerConfig::default();
        let model = SamplerConfig { temperature: 0.2, top_p: 0.9, ..SamplerConfig::default() };
        assert_eq!(described(&greedy, &greedy), "greedy");
        assert_eq!(described(&greedy, &model), "greedy");
        let recommended = "temperature 0.2, top_p 0.9, as its makers recommend";
        assert_eq!(described(&model, &model), recommended);
        let used = SamplerConfig { top_k: 5, presence_penalty: -1.0, ..model.clone() };
        let text = "temperature 0.2, top_k 5, top_p 0.9, presence_penalty -1";
        assert_eq!(described(&used, &model), text);
    }

    #[test]
    fn a_stopped_answer_stays_as_far_as_it_came() {
        let mut conversation = Conversation::new(Some("Be brief.".to_owned()));
        for (question, came) in [("one", "1"), ("stopped", "half an ans"), ("failed", "")] {
            conversation.ask(question.to_owned());
            conversation.answered(came.to_owned());
        }
        let got: Vec<_> =
            conversation.messages.iter().map(|message| message.content.as_str()).collect();
        assert_eq!(got, ["Be brief.", "one", "1", "stopped", "half an ans"]);
    }

    #[test]
    fn two_ctrl_c_count_as_two_within_a_while() {
        let start = Instant::now();
        let mut interrupts = Interrupts::default();
        assert!(!interrupts.is_second(start));
        let late = start + TWICE_WITHIN + Duration::from_millis(1);
        assert!(!interrupts.is_second(late));
        assert!(interrupts.is_second(late + TWICE_WITHIN));
    }

    #[test]
    fn lines_of_a_pipe_are_messages_one_by_one() {
        let mut input: &[u8] = b"one\n\ntwo\r\nlast";
        let all: Vec<_> = std::iter::from_fn(|| Some(line(&mut input).unwrap())).take(5).collect();
        let message = |text: &str| Typed::Message(text.to_owned());
        let expected =
            [message("one"), Typed::Nothing, message("two"), message("last"), Typed::End];
        assert_eq!(all, expected);
        assert!(line(&mut &b"caf\xe9\n"[..]).is_err());
        let long = vec![b'x'; usize::try_from(TEXT_BYTES_MAX).unwrap() + 1];
        assert!(line(&mut &long[..]).unwrap_err().to_string().contains("longer than"));
    }
}
