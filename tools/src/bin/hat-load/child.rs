//! A child process that is this program in another role. It lives no longer than its stdin: also
//! when the tool is killed, nothing is left behind.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{ChildStdin, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde::Serialize;

use crate::protocol::Report;

/// Time that a child may take to end by itself.
const PATIENCE: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(5);

/// Dropping it ends the process.
pub(crate) struct Child {
    process: std::process::Child,
    input: Option<ChildStdin>,
    reader: Option<JoinHandle<()>>,
}

impl Child {
    /// Starts this program as `role`, with the tool's own command line, for a bundle and a cloud
    /// at an address. `hear` gets each report, [`Report::Gone`] at the end.
    pub(crate) fn start(
        role: &str,
        bundle: &Path,
        cloud: &str,
        mut hear: impl FnMut(Report) + Send + 'static,
    ) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("where this program is")?;
        let mut process = Command::new(program)
            .args(std::env::args_os().skip(1))
            .args(["--role", role, "--role-cloud", cloud, "--role-bundle"])
            .arg(bundle)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting a {role} process"))?;
        let input = process.stdin.take();
        let output = process.stdout.take().expect("it is piped");
        let mut child = Self { process, input, reader: None };
        let reader = std::thread::Builder::new().name(format!("hears {role}")).spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let wrong = |error| Report::Failed(format!("it says {line:?}: {error}"));
                hear(serde_json::from_str(&line).unwrap_or_else(wrong));
            }
            hear(Report::Gone);
        });
        child.reader = Some(reader.context("starting a thread")?);
        Ok(child)
    }

    /// Tells it something.
    pub(crate) fn say(&mut self, what: &impl Serialize) -> anyhow::Result<()> {
        let mut line = serde_json::to_string(what)?;
        line.push('\n');
        let input = self.input.as_mut().context("it was told to end")?;
        input.write_all(line.as_bytes()).context("it reads no more")
    }

    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    /// Its exit status, if it has ended.
    pub(crate) fn ended(&mut self) -> Option<std::process::ExitStatus> {
        self.process.try_wait().ok().flatten()
    }

    /// Tells it to end, and does not wait.
    pub(crate) fn close(&mut self) {
        self.input = None;
    }

    /// Ends it at once.
    pub(crate) fn kill(&mut self) {
        // It may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.close();
        let end = Instant::now() + PATIENCE;
        while self.ended().is_none() && Instant::now() < end {
            std::thread::sleep(LOOK);
        }
        self.kill();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}
