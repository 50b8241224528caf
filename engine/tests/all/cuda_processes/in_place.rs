//! A GPU that has no memory but the host's: weights are read from the mapped bundle.

use hat_loader::Bundle;

use super::counts::Counts;
use super::stages::asked_for;
use super::*;

/// Bytes of all tensors of a half.
fn tensor_bytes(half: &Path) -> u64 {
    let bundle = Bundle::open(half).unwrap();
    bundle.tensor_names().map(|name| bundle.tensor(name).unwrap().bytes.len() as u64).sum()
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn weights_take_no_memory_of_an_integrated_gpu() {
    let Some(folder) = driver() else { return };
    let bundles = Bundles::with_kernels();
    let directory = tempfile::tempdir().unwrap();
    let weights = ["device", "cloud"].map(|half| tensor_bytes(&bundles.path.join(half)));
    let run = |kind: &str, more: &[&str]| {
        let file = directory.path().join("counts");
        let _ = std::fs::remove_file(&file);
        let driver = Driver { counts: Some(&file), ..Driver::new(&folder, kind) };
        // Without drafts all steps have the same rows each time, and so take the same memory.
        let more = [more, &["--draft", "off"]].concat();
        let answer = object(&driver.generate(&bundles.path, &more).output().unwrap());
        (answer, Counts::read(&file))
    };
    for more in [&["--processor", "cuda"][..], &["--processor", "cuda", "--whole"]] {
        let (expected, copied) = run("", more);
        assert_eq!(copied.registered, 0);
        for kind in ["integrated", "integrated-other-pointer"] {
            let (answer, counts) = run(kind, more);
            assert_eq!(answer["token_ids"], expected["token_ids"], "{kind}");
            assert_eq!(answer["logits_blake3"], expected["logits_blake3"], "{kind}");
            // What is missing is all weights, to the byte.
            let saved = copied.allocated_bytes - counts.allocated_bytes;
            assert_eq!(saved, weights.iter().sum::<u64>(), "{kind} {more:?}");
            assert_eq!(copied.up_bytes[0] - counts.up_bytes[0], saved, "{kind} {more:?}");
            assert_eq!([counts.registered, counts.unregistered], [2, 2], "{kind}: {counts:?}");
            assert!(counts.registered_bytes >= saved, "{counts:?}");
        }
    }
    // Who wants a copy gets one.
    let (answer, counts) = run("integrated", &["--processor", "cuda", "--weights", "copied"]);
    let (expected, copied) = run("", &["--processor", "cuda"]);
    assert_eq!(answer["logits_blake3"], expected["logits_blake3"]);
    assert_eq!([counts.allocated_bytes, 0], [copied.allocated_bytes, counts.registered]);
    // A driver that registers nothing that is mapped to be read alone, and one that refuses.
    for kind in ["integrated-writable", "integrated-refused"] {
        let (answer, counts) = run(kind, &["--processor", "cuda"]);
        assert_eq!(answer["logits_blake3"], expected["logits_blake3"], "{kind}");
        assert_eq!(counts.allocated_bytes, copied.allocated_bytes, "{kind}");
        assert_eq!(counts.registered, 0, "{kind}");
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn stages_of_an_integrated_gpu_register_their_bundle_once() {
    let Some(folder) = driver() else { return };
    let bundles = Bundles::with_kernels();
    let directory = tempfile::tempdir().unwrap();
    let answers = ["", "integrated"].map(|kind| {
        let file = directory.path().join(format!("counts{kind}"));
        let driver = Driver { counts: Some(&file), ..Driver::new(&folder, kind) };
        let more = ["--processor", "cuda", "--gpus", "0,0"];
        let (first, answer, _) = asked_for(&driver, &bundles.path, &more, "off");
        (first, answer, Counts::read(&file))
    });
    let [(_, expected, copied), (first, answer, counts)] = answers;
    assert!(first.contains("weights in place"), "{first}");
    assert_eq!(answer["logits_blake3"], expected["logits_blake3"]);
    assert_eq!(counts.registered, 1);
    let saved = copied.allocated_bytes - counts.allocated_bytes;
    assert_eq!(saved, tensor_bytes(&bundles.path.join("cloud")));
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn doctor_says_where_weights_are() {
    let Some(folder) = driver() else { return };
    let bundles = Bundles::with_kernels();
    for (kind, expected, start) in [
        ("", "0: Fake GPU: sm_86, weights copied\n", "weights copied"),
        ("integrated", "0: Fake GPU: sm_86, weights in place\n", "weights in place"),
        ("integrated-refused", "weights in place", "weights copied, since cuMemHostRegister: "),
        ("integrated-no-register", "weights copied, since it registers no", "weights copied"),
    ] {
        let mut command = Driver::new(&folder, kind).program();
        command.args(["doctor", "--threads", "1", "--processor", "cuda", "--bundle"]);
        let mut child = command.arg(&bundles.path).stdout(Stdio::piped()).spawn().unwrap();
        // What comes after that takes its time on the emulator.
        let (mut stdout, mut line) = (String::new(), String::new());
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        while !line.starts_with("start-up: ") {
            line.clear();
            assert!(lines.read_line(&mut line).unwrap() > 0, "{kind}: {stdout}");
            stdout += &line;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(stdout.contains(expected), "{kind}: {stdout}");
        assert!(line.contains(start), "{kind}: {line}");
    }
}
