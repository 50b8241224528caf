//! A device daemon whose GPU is lost: it ends, or goes on with the CPU where it may.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Bundles, Driver, driver, object, said};

/// Longest time for anything.
const PATIENCE: Duration = Duration::from_secs(120);

/// A device with its HTTP API and a cloud of its own. Killed when dropped.
pub struct DeviceProcess {
    child: Child,
    address: String,
    lines: Receiver<String>,
}

impl DeviceProcess {
    /// `None` if it ends before it listens.
    pub fn start(driver: &Driver<'_>, bundle: &Path, more: &[&str]) -> Option<Self> {
        let mut command = driver.program();
        command.args(["device", "--http", "127.0.0.1:0", "--no-api-key", "--threads", "1"]);
        command.arg("--bundle").arg(bundle).args(more).env("RUST_LOG", "warn");
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (to, lines) = channel();
        std::thread::spawn(move || {
            stderr.lines().map_while(Result::ok).try_for_each(|line| to.send(line))
        });
        loop {
            let Ok(line) = lines.recv_timeout(PATIENCE) else {
                let _ = child.kill();
                let _ = child.wait();
                return None;
            };
            if let Some((_, address)) = line.split_once("http://") {
                return Some(Self { child, address: address.trim().to_owned(), lines });
            }
        }
    }

    /// Status and body of what comes back.
    fn http(&self, request: &str, body: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let head = "Host: localhost\r\nContent-Type: application/json\r\nConnection: close";
        let bytes = body.len();
        write!(stream, "{request} HTTP/1.1\r\n{head}\r\nContent-Length: {bytes}\r\n\r\n{body}")
            .unwrap();
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
        (status.unwrap_or(0), answer)
    }

    fn ask(&self) -> (u16, String) {
        let ask = json!({"prompt": PROMPT, "max_tokens": 12, "ignore_eos": true});
        self.http("POST /v1/completions", &ask.to_string())
    }

    /// Asks until there is an answer; how often it was refused because the GPU was lost.
    #[track_caller]
    pub fn ask_until_answered(&self) -> (usize, Value) {
        for refused in 0..4 {
            let (status, answer) = self.ask();
            if status == 200 {
                let body = answer.split_once("\r\n\r\n").unwrap().1;
                return (refused, serde_json::from_str(body).unwrap());
            }
            assert_eq!(status, 500, "{answer}");
            assert!(answer.contains("\"code\":\"resource\""), "{answer}");
            let why = answer.contains("is lost to this process") || answer.contains("allocated");
            assert!(why, "{answer}");
        }
        panic!("no answer");
    }

    /// Description of a role's backend.
    pub fn backend(&self, role: &str) -> String {
        let (_, metrics) = self.http("GET /metrics", "");
        let begin = format!("hat_backend_info{{role=\"{role}\",backend=\"");
        let line = metrics.lines().find_map(|line| line.strip_prefix(&begin));
        line.unwrap().split('"').next().unwrap().to_owned()
    }

    /// Output until it ends by itself, which it does with an error.
    #[track_caller]
    fn rest(mut self) -> Vec<String> {
        let begin = Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            assert!(begin.elapsed() < PATIENCE, "it goes on");
            std::thread::sleep(Duration::from_millis(10));
        }
        let lines: Vec<String> = self.lines.iter().collect();
        assert!(!self.child.wait().unwrap().success(), "{lines:?}");
        lines
    }
}

impl Drop for DeviceProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const PROMPT: &str = "A tiny model says this and that and this.";
const ELSE_CPU: [&str; 2] = ["--processor", "cuda-else-cpu"];

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn a_device_daemon_that_lost_its_gpu_ends() {
    let Some(folder) = driver() else { return };
    let bundles = Bundles::with_kernels();
    let lost = Driver::new(&folder, "fault");
    let device = DeviceProcess::start(&lost, &bundles.path, &["--processor", "cuda"]).unwrap();
    let (status, answer) = device.ask();
    assert_ne!(status, 200, "{answer}");
    let rest = device.rest();
    assert!(rest.iter().any(|line| line.contains("the device stopped by itself")), "{rest:?}");
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn a_device_daemon_goes_on_with_the_cpu() {
    let Some(folder) = driver() else { return };
    let bundles = Bundles::with_kernels();
    let fine = Driver::new(&folder, "");
    let on_cpu = object(&fine.generate(&bundles.path, &["--whole"]).output().unwrap());
    // At the first kernel, in the prompt, while tokens are decoded; over a link that is no socket.
    for (after, link) in [(0, "mio"), (25, "memory"), (90, "mio"), (160, "uring")] {
        let lost = Driver { after, ..Driver::new(&folder, "fault") };
        let more = [&ELSE_CPU[..], &["--link", link]].concat();
        let device = DeviceProcess::start(&lost, &bundles.path, &more).unwrap();
        assert!(device.backend("device").starts_with("cuda: "), "{after}");
        let (refused, answer) = device.ask_until_answered();
        let case = format!("after {after} launches, {link}: {answer}");
        assert_eq!(refused, 1, "{case}");
        assert_eq!(answer["choices"][0]["text"], on_cpu["text"], "{case}");
        assert_eq!(answer["timings"]["arithmetic_ids"], json!([1]), "{case}");
        // The second answer knows the first one's pages, here and in the cloud.
        assert_eq!(device.ask_until_answered().1["choices"], answer["choices"], "{case}");
        for role in ["device", "cloud"] {
            assert!(device.backend(role).starts_with("cpu"), "{case}: {}", device.backend(role));
        }
        let said: Vec<String> = device.lines.try_iter().collect();
        let once = said.iter().filter(|line| line.contains("the device's GPU is lost")).count();
        assert_eq!(once, 1, "{said:#?}");
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn a_device_that_the_cpu_cannot_take_over_says_both_reasons() {
    let Some(folder) = driver() else { return };
    let lost = Driver { after: 25, ..Driver::new(&folder, "fault") };
    for (moved_in, reason) in [(None, "bundle.json"), (Some(()), "it holds another model")] {
        let (bundles, others) = (Bundles::with_kernels(), Bundles::generated(1, 0));
        let half = bundles.path.join("device");
        // Looked at, a bundle that is moved away ends the device before its GPU does.
        let more = [&ELSE_CPU[..], &["--no-verify"]].concat();
        let device = DeviceProcess::start(&lost, &bundles.path, &more).unwrap();
        std::fs::rename(&half, bundles.path.join("away")).unwrap();
        if moved_in.is_some() {
            std::fs::rename(others.path.join("device"), &half).unwrap();
        }
        let (status, answer) = device.ask();
        assert_ne!(status, 200, "{answer}");
        let rest = device.rest();
        let ends = rest.iter().find(|line| line.contains("the CPU can't go on: "));
        let both = |line: &String| line.contains("is lost to this") && line.contains(reason);
        assert!(ends.is_some_and(both), "{rest:#?}");
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn a_device_whose_memory_ran_short_once_stays_on_its_gpu() {
    let Some(folder) = driver() else { return };
    let bundles = Bundles::with_kernels();
    let fine = Driver::new(&folder, "");
    let whole = ["--processor", "cuda", "--whole"];
    let expected = object(&fine.generate(&bundles.path, &whole).output().unwrap());
    // What is allocated after the start is what runs short; how much that is before, is found.
    let (mut after, mut tried) = (1, 0);
    while tried < 3 {
        let short = Driver { after, ..Driver::new(&folder, "no-memory-once") };
        after += 1;
        assert!(after < 200, "the device never starts on its GPU");
        let Some(device) = DeviceProcess::start(&short, &bundles.path, &ELSE_CPU) else { continue };
        let is_on_gpu = |role| device.backend(role).starts_with("cuda: ");
        if !is_on_gpu("device") || !is_on_gpu("cloud") {
            continue;
        }
        // What the device lacked ends the request, what the cloud lacked is replayed.
        let (refused, answer) = device.ask_until_answered();
        let case = format!("after {after} allocations: {answer}");
        assert!(refused <= 1, "{case}");
        assert_eq!(answer["choices"][0]["text"], expected["text"], "{case}");
        assert_eq!(answer["timings"]["arithmetic_ids"], json!([2]), "{case}");
        assert!(is_on_gpu("device") && is_on_gpu("cloud"), "{case}");
        tried += refused.max(usize::from(tried == 2));
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn a_generate_that_lost_its_gpu_ends_with_one_line() {
    let Some(folder) = driver() else { return };
    let bundles = Bundles::with_kernels();
    for (after, more) in [(40, vec![]), (120, vec![]), (40, vec!["--whole"])] {
        let lost = Driver { after, ..Driver::new(&folder, "fault") };
        let more = [&ELSE_CPU[..], &more[..]].concat();
        let output = lost.generate(&bundles.path, &more).output().unwrap();
        let (stdout, stderr) = said(&output);
        assert!(!output.status.success() && !stderr.contains("panicked"), "{stdout}{stderr}");
        let last = stderr.lines().last().unwrap_or_default();
        assert!(last.contains("is lost to this process"), "{more:?}: {stderr}");
    }
}
