//! `generate` and `demo`: one answer.

use std::path::Path;

use clap::Args;
use hat_compute::{open, with_backend};
use hat_engine::options::{Codec, DeviceLimits, FinishReason, Message, Role, SamplerConfig};
use hat_engine::reference_run::ReferenceRun;
use hat_engine::{Engine, Event, Metrics, Request};
use hat_program::out::OutError;
use hat_program::{note, out, outln};
use serde_json::json;

use super::check::Check;
use super::prompt::{self, PromptArgs};
use super::{DeviceRunArgs, DraftArgs, SamplerArgs, flagged, words};

/// One answer to one prompt.
#[derive(Args)]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    device: DeviceRunArgs,
    #[command(flatten)]
    pub(super) sampler: SamplerArgs,
    #[command(flatten)]
    prompt: PromptArgs,
    /// A system message; @FILE reads a file, @@ stands for a first @.
    #[arg(long, value_name = "TEXT", conflicts_with = "raw", allow_hyphen_values = true)]
    system: Option<String>,
    /// Most tokens of the answer [default: up to the end of the context].
    #[arg(long, value_name = "N")]
    max_tokens: Option<u32>,
    /// A string that ends the answer; may be repeated, up to 64 times.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    #[command(flatten)]
    draft: DraftArgs,
    /// Pass the prompt without the chat template.
    #[arg(long)]
    raw: bool,
    /// Continue after end-of-sequence tokens.
    #[arg(long)]
    ignore_eos: bool,
    /// Print one JSON object as the last line.
    #[arg(long)]
    json: bool,
    /// Run the whole model in one process, one row at a time: with f32 rows, which is the model
    /// itself, or with rows of the codec that --wire names, which is what a session has to say.
    #[arg(long)]
    whole: bool,
    /// Compare the answer with the whole model's, and print the first token that differs with f32
    /// rows. Fails unless the answer with the same codec is the same.
    #[arg(long, conflicts_with = "whole")]
    check: bool,
}

impl GenerateArgs {
    pub(crate) fn run(self, cache: &Path) -> anyhow::Result<()> {
        let request = self.request()?;
        request.check().map_err(|error| flagged(error.into()))?;
        self.device.check(cache)?;
        let mut check = None;
        let (reason, metrics) = if self.whole {
            let wire = self.device.wire().unwrap_or(Codec::F32);
            let answer = self.whole(cache, wire, request, print_text)?;
            outln!()?;
            answer
        } else {
            let engine = Engine::open(self.device.config(cache)?)?;
            self.prompt.refuse_two()?;
            let answer = answer(&engine, request.clone())?;
            outln!()?;
            if self.check {
                let whole = |wire| Ok(*self.whole(cache, wire, request.clone(), |_| Ok(()))?.1);
                let found = Check::of(engine.wire(), &answer.1, whole)?;
                outln!("{found}")?;
                check = Some(found);
            }
            answer
        };
        if self.json {
            let mut object = object(reason, &metrics);
            if let Some(check) = &check {
                object["check"] = check.json();
            }
            outln!("{object}")?;
        }
        check.map_or(Ok(()), |check| check.verdict())
    }

    /// Answer of the whole model with rows that go through `wire`.
    fn whole(
        &self,
        cache: &Path,
        wire: Codec,
        request: Request,
        mut on_event: impl FnMut(&Event) -> Result<(), OutError>,
    ) -> anyhow::Result<(FinishReason, Box<Metrics>)> {
        let directory = self.device.bundle.directory(cache)?;
        let split_layer = self.device.bundle.split_layer();
        let run = &self.device.run;
        let chosen = open::choose(&run.compute())?;
        let context = DeviceLimits::default().context_max;
        let verify = run.verify(cache);
        self.prompt.refuse_two()?;
        let mut printed = Ok(());
        let on_event = |event: &Event| {
            if printed.is_ok() {
                printed = on_event(event);
            }
        };
        let answer = with_backend!(chosen, backend => {
            ReferenceRun::open_verified(backend, &directory, split_layer, wire, context, &verify)?
                .generate(request, on_event)?
        });
        printed?;
        Ok(answer)
    }

    fn request(&self) -> anyhow::Result<Request> {
        let prompt = self.prompt.read(self.raw)?;
        let mut request = if self.raw {
            Request::text(prompt)
        } else if let Some(system) = &self.system {
            let system = Message::new(Role::System, prompt::system(system)?);
            Request::conversation(vec![system, Message::new(Role::User, prompt)])
        } else {
            Request::chat(prompt)
        };
        request.sampler = self.sampler.config(&SamplerConfig::default());
        request.max_tokens = self.max_tokens;
        request.stop.clone_from(&self.stop);
        request.ignore_eos = self.ignore_eos;
        request.hash_logits = self.json || self.check;
        request.draft = self.draft.draft;
        Ok(request)
    }
}

/// The object that `--json` prints.
fn object(reason: FinishReason, metrics: &Metrics) -> serde_json::Value {
    json!({
        "text": metrics.text,
        "token_ids": metrics.token_ids,
        "finish_reason": reason.name(),
        "timings": metrics.timings,
        "logits_blake3": metrics.logits_blake3,
    })
}

fn print_text(event: &Event) -> Result<(), OutError> {
    match event {
        Event::Token { text, .. } | Event::Done { text, .. } => out!("{text}"),
        _ => Ok(()),
    }
}

fn answer(engine: &Engine, request: Request) -> anyhow::Result<(FinishReason, Box<Metrics>)> {
    for event in engine.generate(request)? {
        let event = event?;
        print_text(&event)?;
        if let Event::Done { finish_reason, metrics, .. } = event {
            return Ok((finish_reason, metrics));
        }
    }
    anyhow::bail!("the answer ended without a last event")
}

/// One question to the default model.
#[derive(Args)]
pub(crate) struct DemoArgs {
    #[command(flatten)]
    device: DeviceRunArgs,
    #[command(flatten)]
    draft: DraftArgs,
    /// The question. @FILE reads a file, - standard input; @@ stands for a first @.
    #[arg(short, long, default_value = "Why is the sky blue? Answer in two sentences.")]
    #[arg(allow_hyphen_values = true)]
    prompt: String,
    /// Most tokens of the answer.
    #[arg(long, default_value_t = 96)]
    max_tokens: u32,
}

impl DemoArgs {
    pub(crate) fn run(self, cache: &Path) -> anyhow::Result<()> {
        let prompt = prompt::text(&self.prompt)?;
        let request = Request::chat(&prompt).max_tokens(self.max_tokens).draft(self.draft.draft);
        request.check().map_err(|error| flagged(error.into()))?;
        let engine = Engine::open(self.device.config(cache)?)?;
        note!("device: {}; {}", engine.model_name(), engine.describe());
        note!("{}", words::drafter(&engine));
        note!("{}", self.device.cloud_words(&engine));
        outln!("> {prompt}")?;
        let (_, metrics) = answer(&engine, request)?;
        outln!()?;
        let timings = &metrics.timings;
        note!(
            "{} prompt tokens, {} answered; {}",
            timings.prompt_n,
            timings.predicted_n,
            words::pace(timings),
        );
        note!(
            "on the wire: {} bytes up, {} bytes down, in {} round trips after the prompt \
             ({:.2} tokens each; {} drafted, {} of them right)",
            timings.bytes_up,
            timings.bytes_down,
            timings.rounds,
            timings.accept_len,
            timings.draft_n,
            timings.draft_n_accepted,
        );
        Ok(())
    }
}
