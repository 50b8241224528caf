//! Prompts: files of questions, instructions and dialogues, and prompts that the model writes.
//!
//! Job number `n` is a pure function of the seed and the files, so gathering can stop and go on
//! at any place. The kinds take turns in a fixed pattern; a prompt that comes round again is
//! answered by sampling, with another seed.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use hat_core::sample::SamplerConfig;
use hat_core::sample::noise::philox;
use serde_json::Value;

/// Text of the user.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Prompt {
    /// This text, as one user turn.
    Text(String),
    /// The model's own continuation of this beginning of a user turn, sampled.
    Written {
        /// The first words.
        start: &'static str,
        /// Seed of the sampling.
        seed: u64,
    },
}

/// Purpose of the prompts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// To learn from.
    Training {
        /// True if the model writes prompts of its own.
        written: bool,
    },
    /// To measure with.
    Evaluation,
}

/// One answer to gather.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Job {
    pub(crate) number: u64,
    pub(crate) source: String,
    pub(crate) prompt: Prompt,
    /// Rule that chooses the answer's tokens.
    pub(crate) sampler: SamplerConfig,
}

/// Kinds of prompts in the order in which they take turns; those without a file are skipped.
const TURNS: [Kind; 20] = {
    use Kind::{Dialogue as D, Instruction as I, Question as Q, Task as T, Written as W};
    [W, Q, I, W, T, Q, W, I, W, D, Q, W, T, I, W, Q, T, W, I, Q]
};

/// Greedy answers to a prompt's first round, in ten.
const GREEDY_IN_TEN: u32 = 7;
/// Longest prompt in characters; longer ones are cut at a line's end.
const CHARACTERS_MAX: usize = 2400;

/// Beginnings of every other prompt of the model's own; the rest begin with nothing.
const STARTS: [&str; 16] = [
    "Translate German to English: ",
    "Summarize: ",
    "Write ",
    "What ",
    "Explain ",
    "Who ",
    "Translate German to English: Die ",
    "How ",
    "Where ",
    "When ",
    "Write a Python ",
    "Which ",
    "Give ",
    "Describe ",
    "Imagine you are ",
    "Summarize the following article:\n\n",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// GSM8K: `question`.
    Question,
    /// Self-instruct: `instruction` and `instances`.
    Instruction,
    /// Taskmaster: what has been said so far.
    Dialogue,
    /// Something to do with a text of Taskmaster or GSM8K.
    Task,
    /// The model writes the prompt itself.
    Written,
}

impl Kind {
    const fn name(self) -> &'static str {
        ["question", "instruction", "dialogue", "task", "written"][self as usize]
    }
}

/// All prompts that there are.
pub(crate) struct Prompts {
    /// Prompts of an evaluation set with their categories; then nothing else is there.
    evaluation: Vec<(String, String)>,
    /// Prompts by kind; the last has none.
    lists: [Vec<String>; 5],
    turns: Vec<Kind>,
    seed: u64,
}

impl Prompts {
    /// Reads the files; which kind one is of is told by its fields. Also returns each file's
    /// name and BLAKE3.
    pub(crate) fn read(
        files: &[PathBuf],
        mode: Mode,
        seed: u64,
    ) -> anyhow::Result<(Self, Vec<(String, String)>)> {
        let (evaluation, lists, turns) = (Vec::new(), Default::default(), Vec::new());
        let mut prompts = Self { evaluation, lists, turns, seed };
        let mut names = Vec::new();
        for path in files {
            let text = fs::read_to_string(path)
                .with_context(|| format!("reading prompts from {}", path.display()))?;
            if mode == Mode::Evaluation {
                prompts.take_lines(path, &text, Self::take_evaluation)?;
            } else {
                prompts.take(path, &text)?;
            }
            let name = path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into());
            names.push((name, blake3::hash(text.as_bytes()).to_hex().to_string()));
        }
        for (stream, list) in (1..).zip(&mut prompts.lists) {
            shuffle(list, |last| words(seed, last as u64, stream)[0]);
        }
        let has = |kind: &Kind| match kind {
            Kind::Written => mode == Mode::Training { written: true },
            kind => !prompts.lists[*kind as usize].is_empty(),
        };
        prompts.turns = TURNS.into_iter().filter(has).collect();
        ensure!(
            !prompts.turns.is_empty() || !prompts.evaluation.is_empty(),
            "no prompts: give files of them"
        );
        Ok((prompts, names))
    }

    /// Number of prompts of each kind, as text.
    pub(crate) fn describe(&self) -> String {
        let [questions, instructions, dialogues, tasks, _] = self.lists.each_ref().map(Vec::len);
        match self.evaluation.len() {
            0 => format!(
                "{questions} questions, {instructions} instructions, {dialogues} dialogues, \
                 {tasks} tasks"
            ),
            count => format!("{count} prompts of an evaluation set"),
        }
    }

    /// Job `number`: of an evaluation set in its own order, each prompt once and greedily;
    /// otherwise of the seeded order, which does not end.
    pub(crate) fn job(&self, number: u64) -> Option<Job> {
        if self.turns.is_empty() {
            let (source, text) = self.evaluation.get(usize::try_from(number).ok()?)?.clone();
            let (prompt, sampler) = (Prompt::Text(text), SamplerConfig::default());
            return Some(Job { number, source, prompt, sampler });
        }
        let turns = self.turns.len() as u64;
        let (round, turn) = (number / turns, (number % turns) as usize);
        let kind = self.turns[turn];
        let a_round = self.turns.iter().filter(|other| **other == kind).count() as u64;
        let before = self.turns[..turn].iter().filter(|other| **other == kind).count() as u64;
        let occurrence = round * a_round + before;
        let [dice, heat, low, high] = words(self.seed, number, 0);
        let list = &self.lists[kind as usize];
        let (prompt, again) = if kind == Kind::Written {
            let start = (occurrence / 2 % STARTS.len() as u64) as usize;
            let start = if occurrence.is_multiple_of(2) { "" } else { STARTS[start] };
            (Prompt::Written { start, seed: u64::from(low) << 32 | u64::from(high) }, false)
        } else {
            let index = (occurrence % list.len() as u64) as usize;
            (Prompt::Text(list[index].clone()), occurrence >= list.len() as u64)
        };
        let sampled = again || dice % 10 >= GREEDY_IN_TEN;
        let sampler = SamplerConfig {
            temperature: if sampled { 0.7 + (heat % 301) as f32 / 1000.0 } else { 0.0 },
            seed: u64::from(high) << 32 | u64::from(low),
            ..SamplerConfig::default()
        };
        Some(Job { number, source: kind.name().to_owned(), prompt, sampler })
    }

    fn take(&mut self, path: &Path, text: &str) -> anyhow::Result<()> {
        if text.trim_start().starts_with('[') {
            let dialogues: Vec<Value> = serde_json::from_str(text)
                .with_context(|| format!("{}: no JSON array", path.display()))?;
            for (index, dialogue) in dialogues.iter().enumerate() {
                self.take_dialogue(dialogue)
                    .with_context(|| format!("{}: dialogue {index}", path.display()))?;
            }
            return Ok(());
        }
        self.take_lines(path, text, Self::take_line)
    }

    fn take_lines(
        &mut self,
        path: &Path,
        text: &str,
        mut take: impl FnMut(&mut Self, &Value) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let at = || format!("{}: line {}", path.display(), index + 1);
            let value: Value = serde_json::from_str(line).with_context(at)?;
            take(self, &value).with_context(at)?;
        }
        Ok(())
    }

    /// Spec-Bench and MT-bench: the first of `turns`, and `category`.
    fn take_evaluation(&mut self, value: &Value) -> anyhow::Result<()> {
        let text = value["turns"][0].as_str().context("no turns")?;
        let category = value["category"].as_str().context("no category")?;
        self.evaluation.push((category.to_owned(), text.to_owned()));
        Ok(())
    }

    fn take_line(&mut self, value: &Value) -> anyhow::Result<()> {
        if let Some(question) = value["question"].as_str() {
            let questions = &mut self.lists[Kind::Question as usize];
            questions.push(question.to_owned());
            let n = questions.len();
            if n.is_multiple_of(16) {
                let language = ["German", "French", "Spanish", "Italian"][n / 16 % 4];
                self.lists[Kind::Task as usize]
                    .push(format!("Translate English to {language}: {question}"));
            }
            return Ok(());
        }
        let Some(instruction) = value["instruction"].as_str() else {
            ensure!(value["turns"].is_null(), "an evaluation set: no drafter is trained on it");
            bail!("neither a question nor an instruction");
        };
        let instances = value["instances"].as_array().map_or(&[][..], Vec::as_slice);
        for instance in instances.iter().take(2) {
            let input = instance["input"].as_str().unwrap_or_default();
            let text = if input.is_empty() {
                instruction.to_owned()
            } else {
                format!("{instruction}\n\n{input}")
            };
            self.lists[Kind::Instruction as usize].push(cut(text));
        }
        Ok(())
    }

    fn take_dialogue(&mut self, dialogue: &Value) -> anyhow::Result<()> {
        let utterances = dialogue["utterances"].as_array().context("no utterances")?;
        let mut turns = Vec::new();
        for utterance in utterances {
            let text = utterance["text"].as_str().context("an utterance without text")?;
            let speaker = match utterance["speaker"].as_str() {
                Some("user") => "Customer",
                _ => "Clerk",
            };
            turns.push((speaker, text));
        }
        let said = |turns: &[(&str, &str)]| {
            turns.iter().map(|(who, text)| format!("{who}: {text}\n")).collect::<String>()
        };
        let n = self.lists[Kind::Dialogue as usize].len();
        let customer: Vec<usize> =
            (0..turns.len()).filter(|turn| turns[*turn].0 == "Customer").collect();
        let Some(last) = customer.get(n % customer.len().max(1)) else { return Ok(()) };
        self.lists[Kind::Dialogue as usize].push(if *last == 0 {
            turns[0].1.to_owned()
        } else {
            let so_far = said(&turns[..=*last]);
            cut(format!("You are the clerk of a shop. What do you answer?\n\n{so_far}"))
        });
        let whole = cut(said(&turns));
        let whole = whole.trim_end();
        self.lists[Kind::Task as usize].push(match n % 6 {
            0 => format!("Summarize: {whole}"),
            1 => format!("Summarize the following conversation.\n\n{whole}"),
            2 => format!("{whole}\n\nWhat did the customer order, and what did the clerk ask?"),
            3 => format!("Write a short report about this conversation:\n\n{whole}"),
            4 => format!("Rewrite this conversation in a more formal tone.\n\n{whole}"),
            _ => format!("Answer from the text below: what does the customer want?\n\n{whole}"),
        });
        Ok(())
    }
}

/// At most [`CHARACTERS_MAX`] characters, whole lines.
fn cut(text: String) -> String {
    let Some((end, _)) = text.char_indices().nth(CHARACTERS_MAX) else { return text };
    let end = text[..end].rfind('\n').unwrap_or(end);
    text[..end].to_owned()
}

/// Four words of job `number`, stream `stream`.
fn words(seed: u64, number: u64, stream: u32) -> [u32; 4] {
    philox([number as u32, (number >> 32) as u32, stream, 0xC0], [seed as u32, (seed >> 32) as u32])
}

/// Fisher and Yates, by a word of chance for each place.
pub(crate) fn shuffle<T>(list: &mut [T], word: impl Fn(usize) -> u32) {
    for last in (1..list.len()).rev() {
        list.swap(last, word(last) as usize % (last + 1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompts(seed: u64) -> Prompts {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = directory.path().join(name);
            fs::write(&path, text).unwrap();
            path
        };
        let questions: String =
            (0..40).map(|n| format!("{{\"question\": \"How much is {n}?\"}}\n")).collect();
        let files = [
            file("q.jsonl", &questions),
            file("i.jsonl", r#"{"instruction": "Do", "instances": [{"input": "this"}]}"#),
            file(
                "d.json",
                r#"[{"utterances": [{"speaker": "user", "text": "tea"},
                    {"speaker": "assistant", "text": "milk?"}]}]"#,
            ),
        ];
        Prompts::read(&files, Mode::Training { written: true }, seed).unwrap().0
    }

    #[test]
    fn jobs_depend_on_the_seed_and_the_number_alone() {
        let (one, two, other) = (prompts(1), prompts(1), prompts(2));
        let jobs = |from: &Prompts| (0..200).map(|n| from.job(n)).collect::<Vec<_>>();
        assert_eq!(jobs(&one), jobs(&two));
        assert_ne!(jobs(&one), jobs(&other));
        assert_eq!(one.job(150), jobs(&one)[150]);
    }

    #[test]
    fn all_questions_come_before_one_comes_again_and_then_it_is_sampled() {
        let prompts = prompts(3);
        let mut seen = std::collections::HashMap::new();
        for job in (0..400).filter_map(|n| prompts.job(n)).filter(|job| job.source == "question") {
            let Prompt::Text(text) = job.prompt else { panic!("a question is a text") };
            let before = seen.entry(text).or_insert(0);
            assert!(*before == 0 || job.sampler.temperature >= 0.7);
            *before += 1;
        }
        assert_eq!(seen.len(), 40);
        let counts: Vec<_> = seen.values().collect();
        assert!(*counts.iter().max().unwrap() - *counts.iter().min().unwrap() <= 1);
    }

    #[test]
    fn an_evaluation_set_is_asked_once_and_never_trained_on() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bench.jsonl");
        fs::write(&path, r#"{"category": "qa", "turns": ["Why?", "And?"]}"#).unwrap();
        let files = [path];
        let error = Prompts::read(&files, Mode::Training { written: true }, 0).err().unwrap();
        assert!(format!("{error:#}").contains("no drafter is trained on it"), "{error:#}");
        let prompts = Prompts::read(&files, Mode::Evaluation, 0).unwrap().0;
        let job = prompts.job(0).unwrap();
        assert_eq!((job.source.as_str(), job.prompt), ("qa", Prompt::Text("Why?".into())));
        assert!(job.sampler.is_plain_greedy());
        assert_eq!(prompts.job(1), None);
    }

    #[test]
    fn a_line_that_is_no_prompt_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bad.jsonl");
        fs::write(&path, "{\"question\": \"?\"}\n{\"text\": 3}\n").unwrap();
        let error = Prompts::read(&[path], Mode::Training { written: true }, 0).err().unwrap();
        assert!(format!("{error:#}").contains("line 2"), "{error:#}");
    }
}
