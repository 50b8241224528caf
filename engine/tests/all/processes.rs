//! The roles as processes of their own, on the default model: what they hold in memory, and what
//! happens when the cloud is killed in the middle of an answer.
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hat_program::pull;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_hat-engine");

fn bundle() -> PathBuf {
    pull::default_bundle(&pull::cache_dir().unwrap(), 2, 0).unwrap()
}

/// A cloud process and where it listens. Killed when dropped.
struct CloudProcess {
    child: Child,
    address: String,
}

impl CloudProcess {
    fn start(bundle: &Path, listen: &str) -> Self {
        Self::start_with(bundle, &["--listen", listen])
    }

    fn start_with(bundle: &Path, more: &[&str]) -> Self {
        let mut child = Command::new(PROGRAM)
            .args(["cloud", "--bundle"])
            .arg(bundle.join("cloud"))
            .args(more)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
        let line = lines.find(|line| line.contains("listening at ")).unwrap();
        let address = line.trim().rsplit(' ').next().unwrap().to_owned();
        assert!(address.starts_with("127.0.0.1:"), "{line}");
        Self { child, address }
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for CloudProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A device process with its HTTP API. Killed when dropped.
struct DeviceProcess {
    child: Child,
    address: String,
    /// Output before it listened.
    said: String,
}

impl DeviceProcess {
    fn start(bundle: &Path, more: &[&str]) -> Self {
        let mut child = Command::new(PROGRAM)
            .args(["device", "--no-api-key", "--http", "127.0.0.1:0", "--bundle"])
            .arg(bundle)
            .args(more)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
        let mut said = String::new();
        let address = loop {
            let line = lines.next().unwrap();
            if let Some((_, address)) = line.split_once("listening at http://") {
                break address.trim().to_owned();
            }
            said += &line;
            said.push('\n');
        };
        Self { child, address, said }
    }

    /// Sends a request; the answer is read by the caller.
    fn send(&self, head: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let head = format!(
            "{head} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream
    }

    /// The whole answer, its head included.
    fn ask(&self, head: &str, body: &str) -> String {
        let mut text = String::new();
        self.send(head, body).read_to_string(&mut text).unwrap();
        text
    }

    /// Begins a streamed answer and waits for its first bytes.
    fn stream(&self, max_tokens: u32) -> TcpStream {
        let body = serde_json::json!({
            "prompt": "Write a short story about a lighthouse keeper.", "stream": true,
            "max_tokens": max_tokens, "ignore_eos": true,
        })
        .to_string();
        let mut stream = self.send("POST /v1/completions", &body);
        stream.read_exact(&mut [0; 32]).unwrap();
        stream
    }
}

impl Drop for DeviceProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn signal(child: &Child, signal: Signal) {
    let pid = Pid::from_raw(child.id().try_into().unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

fn generate(bundle: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(["generate", "--json", "--ignore-eos", "--max-tokens", "40", "-p"]);
    command.arg("Write a short story about a lighthouse keeper.");
    command.arg("--bundle").arg(bundle).args(more);
    command
}

/// The object in the last line of what a command prints.
fn object(output: &str) -> Value {
    serde_json::from_str(output.lines().last().unwrap()).unwrap()
}

fn field_kb(pid: u32, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_killed_cloud_comes_back_and_the_text_goes_on() {
    let bundle = bundle();
    let whole = generate(&bundle, &["--whole", "--wire", "int8"]).output().unwrap();
    let whole = object(&String::from_utf8(whole.stdout).unwrap());
    assert_eq!(whole["token_ids"].as_array().unwrap().len(), 40);

    let mut cloud = CloudProcess::start(&bundle, "127.0.0.1:0");
    let address = cloud.address.clone();
    let mut device =
        generate(&bundle, &["--cloud", &address]).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdout = device.stdout.take().unwrap();
    let mut said = vec![0; 16];
    stdout.read_exact(&mut said).unwrap();
    cloud.kill();
    std::thread::sleep(Duration::from_millis(300));
    let _second = CloudProcess::start(&bundle, &address);
    stdout.read_to_end(&mut said).unwrap();
    assert!(device.wait().unwrap().success());
    let split = object(&String::from_utf8(said).unwrap());
    assert_eq!(split["token_ids"], whole["token_ids"]);
    assert_eq!(split["logits_blake3"], whole["logits_blake3"]);
}

/// Without a codec the whole model is the model itself, wherever it would be cut; with one it is
/// what a session has to say, and `--check` holds the session to both.
#[test]
fn whole_is_the_model_itself_and_check_compares_with_both() {
    let bundle = bundle();
    let answer = |args: &[&str]| {
        let output = generate(&bundle, args).output().unwrap();
        assert!(output.status.success(), "{args:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        (object(&text), text)
    };
    let whole = answer(&["--whole"]).0;
    for same in [&["--wire", "f32"][..], &["--split-layer", "4"]] {
        let other = answer(&[&["--whole"], same].concat()).0;
        assert_eq!(other["logits_blake3"], whole["logits_blake3"], "{same:?}");
    }
    let unlike = |ids: &Value, others: &Value| {
        let [ids, others] = [ids, others].map(|ids| ids.as_array().unwrap());
        let at = ids.iter().zip(others).take_while(|(one, other)| one == other).count();
        (at < ids.len().max(others.len())).then_some(at)
    };
    let mut hashes = std::collections::HashSet::new();
    for wire in ["f32", "f16", "int8", "int4"] {
        let coded = answer(&["--whole", "--wire", wire]).0;
        // int8 is what a bundle asks for.
        let chosen = if wire == "int8" { &["--check"][..] } else { &["--check", "--wire", wire] };
        let (split, text) = answer(chosen);
        assert_eq!(split["logits_blake3"], coded["logits_blake3"], "{wire}");
        hashes.insert(split["logits_blake3"].to_string());
        let at = unlike(&split["token_ids"], &whole["token_ids"]);
        assert_eq!(
            split["check"],
            serde_json::json!({
                "wire": wire,
                "same_as_whole": true,
                "first_token_unlike_whole": null,
                "first_token_unlike_f32": at,
            })
        );
        let at = at.map_or("none".to_owned(), |at| at.to_string());
        assert!(
            text.contains(&format!(
                "same as the whole model with {wire} rows: yes\n\
                 first token that differs from f32 rows: {at}\n"
            )),
            "{text}"
        );
    }
    assert_eq!(hashes.len(), 4, "codecs that can't be told apart test nothing");
}

#[test]
fn each_role_maps_its_own_weights_and_little_else() {
    let bundle = bundle();
    let cloud = CloudProcess::start(&bundle, "127.0.0.1:0");
    let mut device =
        generate(&bundle, &["--cloud", &cloud.address]).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdout = device.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 32]).unwrap();

    // KV that was written: 30 layers, 3 heads of 64, two bytes, K and V; 200 positions at most.
    let kv_kb = 30 * 3 * 64 * 2 * 2 * 224 / 1024;
    for (role, other, pid) in
        [("device", "cloud", device.id()), ("cloud", "device", cloud.child.id())]
    {
        let anonymous_kb = field_kb(pid, "RssAnon:");
        println!("{role}: {anonymous_kb} KB anonymous, {} KB of files", field_kb(pid, "RssFile:"));
        // A copy of the weights would be 41 MB more. Of this, 70 MB are what reading the tokenizer
        // took at its height; whether the allocator gives 17 MB of it back is chance.
        assert!(anonymous_kb <= kv_kb + 96 * 1024, "{role}: {anonymous_kb} KB anonymous");
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        assert!(maps.contains(&format!("{role}/weights.safetensors")), "{role} maps no weights");
        assert!(!maps.contains(&format!("{other}/weights")), "{role} maps the {other}'s weights");
    }
    stdout.read_to_end(&mut Vec::new()).unwrap();
    assert!(device.wait().unwrap().success());
}

/// Name, policy and niceness of the thread that has this `stat` file.
fn priority(stat: &Path) -> Option<(String, i32, i32)> {
    let stat = std::fs::read_to_string(stat).ok()?;
    let (name, rest) = stat.split_once('(').unwrap().1.rsplit_once(')').unwrap();
    // From the state on, which is field 3 of proc(5): niceness is 19, the policy 41.
    let fields: Vec<&str> = rest.split_whitespace().collect();
    Some((name.to_owned(), fields[38].parse().unwrap(), fields[16].parse().unwrap()))
}

/// Scheduling numbers of each thread of a process, by its name.
fn priorities(pid: u32) -> Vec<(String, i32, i32)> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let mut found: Vec<_> =
        tasks.filter_map(|task| priority(&task.unwrap().path().join("stat"))).collect();
    found.sort();
    found
}

#[test]
fn compute_threads_are_batch_jobs_and_the_network_s_is_not() {
    const OTHER: i32 = 0;
    const BATCH: i32 = 3;
    let bundle = bundle();
    let (_, given, given_nice) = priority(Path::new("/proc/self/stat")).unwrap();
    for nice in [0, 7] {
        let nice_text = nice.to_string();
        let cloud = CloudProcess::start_with(
            &bundle,
            &["--listen", "127.0.0.1:0", "--threads", "2", "--nice", &nice_text],
        );
        let policy = if given == OTHER { BATCH } else { given };
        let computes = (policy, (given_nice + nice).min(19));
        let expected = [
            ("compute-", computes),
            ("hat-cloud-step", computes),
            ("hat-cloud-io", (given, given_nice)),
        ];
        // A thread sets its own, a moment after it is there.
        let began = Instant::now();
        loop {
            let found = priorities(cloud.child.id());
            let is_so = expected.iter().all(|(start, (policy, nice))| {
                let named = found.iter().filter(|(name, ..)| name.starts_with(start));
                let named: Vec<_> = named.map(|(_, policy, nice)| (*policy, *nice)).collect();
                named == [(*policy, *nice)]
            });
            if is_so {
                break;
            }
            assert!(began.elapsed() < Duration::from_secs(60), "{found:?}, not {expected:?}");
            std::thread::yield_now();
        }
    }
}

#[test]
fn unknown_flags_and_files_are_named() {
    let said = |args: &[&str]| {
        let output = Command::new(PROGRAM).args(args).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(said(&["generate", "-p", "x", "--tempreture", "1"]).contains("--temperature"));
    assert!(said(&["generate", "-p", "@/no/such/file"]).contains("/no/such/file"));
    let text = said(&["cloud", "--bundle", "/no/such/bundle"]);
    assert!(text.contains("/no/such/bundle"), "{text}");
    let text = said(&["generate", "-p", "x", "--bundle", "/no/such/bundle"]);
    assert!(text.contains("/no/such/bundle"), "{text}");
    assert!(said(&["generate", "-p", "x", "--wire", "int3"]).contains("int3"));
    for nice in ["20", "-1", "very"] {
        let text = said(&["generate", "-p", "x", &format!("--nice={nice}")]);
        assert!(text.contains("--nice") && text.contains(nice), "{text}");
    }
    let text =
        said(&["cloud", "--bundle", bundle().join("cloud").to_str().unwrap(), "--stages", "29"]);
    assert!(text.contains("stages") && text.contains("layers"), "{text}");
}

#[test]
fn a_cloud_that_is_told_to_end_is_an_outage_and_the_text_goes_on() {
    let bundle = bundle();
    let whole = generate(&bundle, &["--whole", "--wire", "int8"]).output().unwrap();
    let whole = object(&String::from_utf8(whole.stdout).unwrap());
    for ask in [Signal::TERM, Signal::INT] {
        let mut cloud = CloudProcess::start(&bundle, "127.0.0.1:0");
        let address = cloud.address.clone();
        let mut device =
            generate(&bundle, &["--cloud", &address]).stdout(Stdio::piped()).spawn().unwrap();
        let mut stdout = device.stdout.take().unwrap();
        let mut said = vec![0; 16];
        stdout.read_exact(&mut said).unwrap();
        signal(&cloud.child, ask);
        assert_eq!(cloud.child.wait().unwrap().code(), Some(0), "{ask:?}");
        let _second = CloudProcess::start(&bundle, &address);
        stdout.read_to_end(&mut said).unwrap();
        assert!(device.wait().unwrap().success());
        let split = object(&String::from_utf8(said).unwrap());
        assert_eq!(split["token_ids"], whole["token_ids"]);
        assert_eq!(split["logits_blake3"], whole["logits_blake3"]);
    }
}

/// Waits until so many requests wait for a session.
fn wait_for_waiting(device: &DeviceProcess, count: usize) {
    let begin = Instant::now();
    let line = format!("\nhat_requests_waiting {count}\n");
    loop {
        let text = device.ask("GET /metrics", "");
        if text.contains(&line) {
            return;
        }
        assert!(begin.elapsed() < Duration::from_secs(60), "not {count} wait: {text}");
        std::thread::yield_now();
    }
}

#[test]
fn a_device_keeps_the_sessions_and_the_context_that_it_was_given() {
    let bundle = bundle();
    let short = DeviceProcess::start(&bundle, &["--sessions-max", "3", "--context", "64"]);
    assert!(short.said.contains("3 answers at once, of 64 tokens each"), "{}", short.said);
    let prompt = "Tell me about the sea. ".repeat(40);
    let body = serde_json::json!({"prompt": prompt}).to_string();
    let text = short.ask("POST /v1/completions", &body);
    assert!(text.starts_with("HTTP/1.1 400") && text.contains("context_length_exceeded"), "{text}");
    let body = serde_json::json!({"prompt": "Hello", "ignore_eos": true}).to_string();
    let text = short.ask("POST /v1/completions", &body);
    assert!(text.contains("\"total_tokens\":64") && text.contains("\"length\""), "{text}");

    let narrow = DeviceProcess::start(&bundle, &["--sessions-max", "1"]);
    let first = narrow.stream(4000);
    let second = narrow.send(
        "POST /v1/completions",
        &serde_json::json!({"prompt": "Hello", "max_tokens": 2}).to_string(),
    );
    wait_for_waiting(&narrow, 1);
    drop(first);
    let mut text = String::new();
    { second }.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    wait_for_waiting(&narrow, 0);
}

#[test]
fn a_cloud_keeps_the_sessions_and_the_context_that_it_was_given() {
    let bundle = bundle();
    let cloud = |flag: [&str; 2]| {
        CloudProcess::start_with(&bundle, &[&["--listen", "127.0.0.1:0"][..], &flag].concat())
    };
    let device = |cloud: &CloudProcess| {
        DeviceProcess::start(&bundle, &["--cloud", &cloud.address, "--reconnect-s", "1"])
    };
    let ask = |device: &DeviceProcess, max_tokens: u32| {
        let body = serde_json::json!({"prompt": "Hello", "max_tokens": max_tokens});
        device.ask("POST /v1/completions", &body.to_string())
    };
    let short = cloud(["--context", "64"]);
    let text = ask(&device(&short), 100);
    assert!(text.contains("the context is 64"), "{text}");

    let narrow = cloud(["--sessions-max", "1"]);
    let (first, second) = (device(&narrow), device(&narrow));
    let stream = first.stream(4000);
    let text = ask(&second, 2);
    assert!(text.contains("busy"), "{text}");
    drop(stream);
    let begin = Instant::now();
    while !ask(&second, 2).starts_with("HTTP/1.1 200") {
        assert!(begin.elapsed() < Duration::from_secs(120), "the place does not become free");
    }
}

#[test]
fn bounds_that_leave_no_room_are_refused_by_flag() {
    for (role, flag, value) in [
        ("device", "--sessions-max", "0"),
        ("device", "--sessions-max", "many"),
        ("device", "--context", "1"),
        ("device", "--context", "-4"),
        ("cloud", "--sessions-max", "0"),
        ("cloud", "--context", "1"),
        ("cloud", "--kv-rows-max", "0"),
        ("cloud", "--sessions-per-device-max", "0"),
    ] {
        let output = Command::new(PROGRAM).args([role, &format!("{flag}={value}")]).output();
        let output = output.unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{role} {flag} {value}: {text}");
        assert!(text.contains(flag) && text.contains(value), "{text}");
    }
}

#[test]
fn a_device_that_is_told_to_end_lets_its_answers_end() {
    let mut device = DeviceProcess::start(&bundle(), &["--drain", "600"]);
    let mut stream = device.stream(60);
    signal(&device.child, Signal::TERM);
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert!(text.contains("data: [DONE]"), "{text}");
    assert_eq!(device.child.wait().unwrap().code(), Some(0));
    assert!(TcpStream::connect(&device.address).is_err());
}

#[test]
fn the_end_of_the_drain_is_told_and_a_second_signal_does_not_wait_for_it() {
    let bundle = bundle();
    let mut device = DeviceProcess::start(&bundle, &["--drain", "0.1"]);
    let mut stream = device.stream(4000);
    signal(&device.child, Signal::INT);
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert!(text.contains("shutting down") && !text.contains("[DONE]"), "{text}");
    assert_eq!(device.child.wait().unwrap().code(), Some(0));

    let mut device = DeviceProcess::start(&bundle, &["--drain", "600"]);
    let _stream = device.stream(4000);
    signal(&device.child, Signal::TERM);
    // The first has been taken once nobody listens any more.
    while TcpStream::connect(&device.address).is_ok() {
        std::thread::yield_now();
    }
    signal(&device.child, Signal::TERM);
    assert_eq!(device.child.wait().unwrap().signal(), Some(Signal::TERM.as_raw()));
}
