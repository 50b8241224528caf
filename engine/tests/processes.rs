//! The roles as processes of their own, on the default model: what they hold in memory, and what
//! happens when the cloud is killed in the middle of an answer.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use hat_engine::pull;
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
        let mut child = Command::new(PROGRAM)
            .args(["cloud", "--listen", listen, "--bundle"])
            .arg(bundle.join("cloud"))
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
    let whole = generate(&bundle, &["--whole"]).output().unwrap();
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
        assert!(anonymous_kb <= kv_kb + 80 * 1024, "{role}: {anonymous_kb} KB anonymous");
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        assert!(maps.contains(&format!("{role}/weights.safetensors")), "{role} maps no weights");
        assert!(!maps.contains(&format!("{other}/weights")), "{role} maps the {other}'s weights");
    }
    stdout.read_to_end(&mut Vec::new()).unwrap();
    assert!(device.wait().unwrap().success());
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
    for share in ["1", "-0.1", "NaN", "most"] {
        let text = said(&["generate", "-p", "x", &format!("--past-share={share}")]);
        assert!(text.contains("--past-share") && text.contains(share), "{text}");
    }
    let text =
        said(&["cloud", "--bundle", bundle().join("cloud").to_str().unwrap(), "--stages", "29"]);
    assert!(text.contains("stages") && text.contains("layers"), "{text}");
}
