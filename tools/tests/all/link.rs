//! `hat-link` as a process: what it says of wrong flags, and what it reports at its end.
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::Duration;

use serde_json::Value;

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hat-link"));
    command.args(args);
    command
}

/// Text on stderr when it refuses.
fn refusal(args: &[&str]) -> String {
    let output = command(args).output().unwrap();
    assert!(!output.status.success(), "{args:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn a_wrong_flag_is_named_with_its_range() {
    let cases: [(&[&str], &[&str]); 17] = [
        (&["--up-mbit", "0"], &["--up-mbit", "0.01 to 100000 Mbit/s"]),
        (&["--down-mbit", "fast"], &["--down-mbit", "not a number of Mbit/s"]),
        (&["--rtt-ms", "20001"], &["--rtt-ms", "0 to 20000 ms"]),
        (&["--rtt-ms", "-1"], &["--rtt-ms", "0 to 20000 ms"]),
        (&["--delay-up-ms", "NaN"], &["--delay-up-ms", "0 to 10000 ms"]),
        (&["--delay-down-ms", "1e9"], &["--delay-down-ms", "0 to 10000 ms"]),
        (&["--jitter-ms", "inf"], &["--jitter-ms", "0 to 10000 ms"]),
        (&["--stall", "1000"], &["--stall", "EVERY_MS:LASTS_MS[:up|down]"]),
        (&["--stall", "1000:950"], &["--stall", "LASTS_MS", "1 to 900 ms"]),
        (&["--stall", "1:1"], &["--stall", "EVERY_MS", "10 to 86400000 ms"]),
        (&["--stall", "1000:10:left"], &["--stall", ":up or :down"]),
        (&["--stall", "99:9", "--stall", "99:9:up"], &["--stall", "more than once"]),
        (&["--cut-after", "5"], &["--cut-after", "500000b", "1500ms"]),
        (&["--cut-after", "0b"], &["--cut-after", "1b and more"]),
        (&["--cut-every", "1"], &["--cut-every", "10 to 86400000 ms"]),
        (&["--queue-bytes", "1"], &["--queue-bytes", "4096..=1073741824"]),
        (&["--rtt-ms", "1", "--delay-up-ms", "1"], &["--rtt-ms", "--delay-up-ms"]),
    ];
    for (flags, parts) in cases {
        let whole = [&["--listen", "127.0.0.1:0", "--to", "127.0.0.1:1"], flags].concat();
        let said = refusal(&whole);
        assert!(parts.iter().all(|part| said.contains(part)), "{flags:?}: {said}");
    }
    assert!(refusal(&["--to", "127.0.0.1:1"]).contains("--listen"));
    let said = refusal(&["--listen", "nonsense.invalid", "--to", "127.0.0.1:1", "--no-calibrate"]);
    assert!(said.contains("--listen") && said.contains("nonsense"), "{said}");
}

/// A running hat-link without calibration, and where it listens.
fn start(to: SocketAddr, flags: &[&str]) -> (Child, SocketAddr, BufReader<ChildStderr>) {
    let to = to.to_string();
    let fixed = ["--listen", "127.0.0.1:0", "--to", &to, "--json", "--no-calibrate"];
    let mut child = command(&[&fixed, flags].concat())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    let address = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    (child, address, said)
}

/// The one line of JSON that it prints when it ends.
fn report(child: Child) -> Value {
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    serde_json::from_str(&text).unwrap()
}

#[test]
fn it_ends_with_its_connections_and_reports() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let flags = ["--once", "--rtt-ms", "4", "--up-mbit", "60", "--down-mbit", "100"];
    let (child, address, _said) = start(listener.local_addr().unwrap(), &flags);
    let mut client = TcpStream::connect(address).unwrap();
    client.write_all(&[7; 30_000]).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut server = listener.accept().unwrap().0;
    let mut got = Vec::new();
    server.read_to_end(&mut got).unwrap();
    assert_eq!(got, [7; 30_000]);
    server.write_all(b"answer").unwrap();
    drop(server);
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer");
    let report = report(child);
    assert_eq!(
        (&report["up"]["bytes_in"], &report["up"]["bytes_out"]),
        (&30_000.into(), &30_000.into())
    );
    assert_eq!(report["down"]["bytes_out"], 6);
    assert!(report["up"]["busy_mbit_s"].as_f64().unwrap() <= 60.01);
    assert!(report["up"]["planned"]["p50_us"].as_f64().unwrap() >= 1940.0);
    assert!(report["up"]["late"]["p99_us"].is_number() && report["down"]["actual"].is_object());
    assert_eq!((&report["connections"], &report["cuts"]), (&1.into(), &0.into()));
    assert_eq!(report["calibration"], Value::Null);
}

#[test]
fn a_signal_ends_it_and_an_unreachable_end_does_not() {
    let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (child, address, mut said) = start(gone, &[]);
    let mut client = TcpStream::connect(address).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    assert_eq!(client.read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    assert!(line.contains(&gone.to_string()) && line.contains("refused"), "{line}");
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    let report = report(child);
    assert_eq!((&report["connections"], &report["unreachable"]), (&1.into(), &1.into()));
    assert_eq!(report["up"]["bytes_in"], 0);
}

#[test]
fn calibrating_alone_prints_and_ends() {
    let output = command(&["--calibrate", "--rtt-ms", "2", "--json"]).output().unwrap();
    assert!(output.status.success());
    let calibration: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(calibration["delayed"]["p50_us"].as_f64().unwrap() >= 2000.0);
    assert!(calibration["added_us"].as_f64().unwrap() <= 500.0);
    assert!(String::from_utf8(output.stderr).unwrap().contains("direct"));
}
