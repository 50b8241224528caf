//! The roles on a bundle that is changed: before they start, and under them.
use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use crate::support::{Bundles, collect, long_prompt};
use hat_compute::backend::cpu::{CpuBackend, CpuConfig};
use hat_engine::options::{Codec, RequestError, Verify};
use hat_engine::reference_run::ReferenceRun;
use hat_engine::{Cloud, CloudConfig, Engine, EngineConfig, Error, Metrics, Request};

const WEIGHTS: &str = "weights.safetensors";
/// Limit on a wait that only a hang reaches.
const PATIENCE: Duration = Duration::from_secs(120);

fn looking(every: Duration) -> Verify {
    let mut verify = Verify::default();
    verify.every = every;
    verify
}

fn rarely() -> Verify {
    looking(Duration::from_secs(3600))
}

fn often() -> Verify {
    looking(Duration::from_millis(10))
}

fn cloud(bundles: &Bundles, verify: Verify) -> Result<Cloud, Error> {
    let mut config = CloudConfig::new(bundles.path.join("cloud"));
    config.verify = verify;
    Cloud::start(config)
}

fn device(bundles: &Bundles, cloud: &Cloud, verify: Verify) -> Result<Engine, Error> {
    let config = EngineConfig::new(bundles.path.join("device"));
    let mut config = config.cloud(cloud.address().to_string()).verify(verify);
    config.reconnect = Duration::from_secs(2);
    Engine::open(config)
}

fn request() -> Request {
    Request::tokens(long_prompt(40)).max_tokens(12).ignore_eos().hash_logits()
}

fn answer(bundles: &Bundles) -> Metrics {
    let cloud = cloud(bundles, rarely()).unwrap();
    collect(&device(bundles, &cloud, rarely()).unwrap(), request())
}

/// Changes up to `count` bytes in the middle of a file, in place.
fn overwrite(path: &Path, count: usize) {
    let mut bytes = fs::read(path).unwrap();
    let start = bytes.len() / 2 - count.min(bytes.len() / 2) / 2;
    bytes[start..].iter_mut().take(count).for_each(|byte| *byte ^= 1);
    File::options().write(true).open(path).unwrap().write_all(&bytes).unwrap();
}

fn touch(path: &Path) {
    let times = fs::FileTimes::new().set_modified(SystemTime::UNIX_EPOCH);
    File::options().write(true).open(path).unwrap().set_times(times).unwrap();
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn named(error: &Error, half: &str) {
    let text = error.to_string();
    let file = Path::new(half).join(WEIGHTS);
    assert!(text.contains(file.to_str().unwrap()), "{text}");
    assert!(text.contains("split again"), "{text}");
}

#[test]
fn three_flipped_bytes_before_start_are_refused() {
    for half in ["device", "cloud"] {
        let bundles = Bundles::generated(1, 0);
        overwrite(&bundles.path.join(half).join(WEIGHTS), 3);
        // A cloud of its own: both halves are this engine's.
        let config = EngineConfig::new(bundles.path.join("device"));
        named(&Engine::open(config.clone()).err().expect("refused"), half);
        let backend = CpuBackend::new(CpuConfig::default()).unwrap();
        let whole = ReferenceRun::open(backend, &bundles.path, None, Codec::default(), 64);
        named(&whole.err().expect("refused"), half);
        let cloud = cloud(&bundles, rarely());
        match (half, cloud) {
            ("cloud", cloud) => named(&cloud.err().expect("refused"), half),
            (_, cloud) => {
                named(&device(&bundles, &cloud.unwrap(), rarely()).err().expect("refused"), half);
            }
        }
        // Whoever asks not to look gets what is there.
        let mut unverified = Verify::default();
        unverified.enabled = false;
        let engine = Engine::open(config.verify(unverified)).unwrap();
        assert_eq!(collect(&engine, request()).token_ids.len(), 12);
    }
}

#[test]
fn a_cloud_whose_weights_are_overwritten_ends_at_the_next_look() {
    let bundles = Bundles::generated(1, 0);
    let cloud = cloud(&bundles, often()).unwrap();
    let engine = device(&bundles, &cloud, rarely()).unwrap();
    collect(&engine, request());
    overwrite(&bundles.path.join("cloud").join(WEIGHTS), 200_000);
    assert!(cloud.join().is_none());
    let error = engine.generate(request()).unwrap().find_map(Result::err).expect("an error");
    assert!(matches!(error, Error::Request(RequestError::Peer { .. })), "{error}");
}

#[test]
fn a_device_whose_weights_are_overwritten_ends_its_requests_by_name() {
    let bundles = Bundles::generated(1, 0);
    let cloud = cloud(&bundles, rarely()).unwrap();
    let engine = device(&bundles, &cloud, often()).unwrap();
    let mut generation =
        engine.generate(Request::tokens(long_prompt(40)).max_tokens(1500).ignore_eos()).unwrap();
    generation.next().unwrap().unwrap();
    overwrite(&bundles.path.join("device").join(WEIGHTS), 200_000);
    wait_until("the device goes on", || engine.has_stopped());
    if let Some(error) = generation.find_map(Result::err) {
        named(&error, "device");
    }
    assert!(matches!(engine.generate(request()), Err(Error::Request(RequestError::Stopped(_)))));
}

/// Looks are an hour apart here: it is the connection that asks for one.
#[test]
fn a_session_does_not_begin_or_go_on_with_changed_weights() {
    let bundles = Bundles::generated(1, 0);
    let cloud = cloud(&bundles, rarely()).unwrap();
    let first = device(&bundles, &cloud, rarely()).unwrap();
    collect(&first, request());
    overwrite(&bundles.path.join("cloud").join(WEIGHTS), 3);
    let second = device(&bundles, &cloud, rarely()).unwrap();
    let error = second.generate(request()).unwrap().find_map(Result::err).expect("an error");
    assert!(matches!(error, Error::Request(RequestError::Peer { .. })), "{error}");
    assert!(cloud.join().is_none());
}

#[test]
fn a_touch_changes_nothing() {
    let bundles = Bundles::generated(1, 0);
    let before = answer(&bundles);
    let cloud = cloud(&bundles, often()).unwrap();
    let engine = device(&bundles, &cloud, often()).unwrap();
    for half in ["device", "cloud", "device", "cloud"] {
        touch(&bundles.path.join(half).join(WEIGHTS));
        let after = collect(&engine, request());
        assert_eq!(after.logits_blake3, before.logits_blake3);
    }
    assert!(!engine.has_stopped());
}

/// A cloud as a process of its own, killed when dropped.
struct CloudProcess {
    child: std::process::Child,
    lines: std::io::Lines<std::io::BufReader<std::process::ChildStderr>>,
    address: String,
}

impl CloudProcess {
    fn start(bundles: &Bundles) -> Self {
        use std::io::BufRead as _;
        let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_hat-engine"))
            .args(["cloud", "--listen", "127.0.0.1:0", "--bundle"])
            .arg(bundles.path.join("cloud"))
            .env("HAT_CACHE_DIR", bundles.path.join("cache"))
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = std::io::BufReader::new(child.stderr.take().unwrap()).lines();
        let line = lines.by_ref().map(Result::unwrap).find(|line| line.contains("listening at "));
        let address = line.unwrap().trim().rsplit(' ').next().unwrap().to_owned();
        Self { child, lines, address }
    }

    /// Its exit status, and what it said to the end.
    fn end(mut self) -> (std::process::ExitStatus, String) {
        let said: Vec<_> = self.lines.by_ref().map(Result::unwrap).collect();
        (self.child.wait().unwrap(), said.join("\n"))
    }
}

impl Drop for CloudProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_mapped_file_that_shrinks_ends_its_process_by_name() {
    let bundles = Bundles::generated(1, 0);
    let cloud = CloudProcess::start(&bundles);
    let config = EngineConfig::new(bundles.path.join("device")).cloud(&cloud.address);
    let mut config = config.prefix(false).verify(rarely());
    config.reconnect = Duration::from_secs(2);
    let engine = Engine::open(config).unwrap();
    collect(&engine, request());
    let weights = bundles.path.join("cloud").join(WEIGHTS);
    File::options().write(true).open(&weights).unwrap().set_len(4096).unwrap();
    let error = engine.generate(request()).unwrap().find_map(Result::err).expect("an error");
    assert!(matches!(error, Error::Request(RequestError::Peer { .. })), "{error}");
    let (status, said) = cloud.end();
    assert_eq!(status.code(), Some(70), "{status}: {said}");
    let lines: Vec<_> =
        said.lines().filter(|line| line.contains(weights.to_str().unwrap())).collect();
    assert_eq!(lines.len(), 1, "{said}");
    assert!(lines[0].starts_with("hat-engine: ") && lines[0].contains("shorter"), "{said}");
}

#[cfg(target_os = "linux")]
#[test]
fn a_sigbus_of_another_cause_does_what_it_always_does() {
    use std::os::unix::process::ExitStatusExt as _;
    let bundles = Bundles::generated(1, 0);
    let cloud = CloudProcess::start(&bundles);
    let pid = cloud.child.id().to_string();
    assert!(std::process::Command::new("kill").args(["-BUS", &pid]).status().unwrap().success());
    let (status, said) = cloud.end();
    assert_eq!(status.signal(), Some(7), "{status}: {said}");
}
