//! Two GPUs, a pipeline stage on each: rows go from one to the other without the host.

use super::counts::Counts;
use super::*;

const TWO: [&str; 4] = ["--processor", "cuda", "--gpus", "0,1"];

/// A cloud on a driver, asked once; what it says at first, its answer, what it says later.
pub fn asked(driver: &Driver<'_>, bundle: &Path, more: &[&str]) -> (String, Value, String) {
    asked_for(driver, bundle, more, "auto")
}

/// The same, with the drafts of this mode.
pub fn asked_for(
    driver: &Driver<'_>,
    bundle: &Path,
    more: &[&str],
    draft: &str,
) -> (String, Value, String) {
    let cloud = CloudProcess::start(driver, bundle, more).unwrap();
    let ask = ["--cloud", &cloud.address, "--draft", draft];
    let ask = Driver::new(driver.folder, "").generate(bundle, &ask);
    let answer = object(&{ ask }.output().unwrap());
    // What nobody waits for any more is computed to its end, too.
    std::thread::sleep(std::time::Duration::from_millis(200));
    (cloud.first.clone(), answer, cloud.kill())
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn rows_go_from_gpu_to_gpu_and_say_what_one_gpu_says() {
    let Some(folder) = driver() else { return };
    let bundles = Bundles::with_kernels();
    let directory = tempfile::tempdir().unwrap();
    let (_, one, _) = asked(&Driver::new(&folder, ""), &bundles.path, &["--processor", "cuda"]);
    for (kind, way) in [("", "from GPU to GPU"), ("no-peer", "by the driver")] {
        let file = directory.path().join(format!("counts{kind}"));
        let driver = Driver { devices: 2, counts: Some(&file), ..Driver::new(&folder, kind) };
        let (first, two, _) = asked(&driver, &bundles.path, &TWO);
        assert!(first.contains("2 stages of cuda: ") && first.contains(way), "{first}");
        assert_eq!(two["token_ids"], one["token_ids"], "{kind}");
        assert_eq!(two["logits_blake3"], one["logits_blake3"], "{kind}");
        let counts = Counts::read(&file);
        // The first GPU sends nothing to the host, the second one gets no rows from there: both
        // stages have a layer of the same size, so the rest that goes up is the same.
        assert!(counts.peer_copies > 4, "{counts:?}");
        // Of a prompt the host wants the last row alone.
        assert!(counts.down_bytes[0] == 0 && counts.down_bytes[1] >= 12 * 64 * 4, "{counts:?}");
        assert!(counts.down_bytes[1] < counts.peer_bytes / 2, "{counts:?}");
        assert_eq!(counts.up_bytes[0] - counts.up_bytes[1], counts.peer_bytes, "{counts:?}");
        let staged = if kind.is_empty() { 0 } else { counts.peer_copies };
        assert_eq!(counts.staged_copies, staged, "{counts:?}");
        // Each step's rows are left in a buffer of the first GPU.
        assert_eq!(counts.same_gpu_copies, counts.peer_copies, "{counts:?}");
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn stages_that_share_a_gpu_hand_over_within_it() {
    let Some(folder) = driver() else { return };
    let bundles = Bundles::with_kernels();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("counts");
    let driver = Driver { counts: Some(&file), ..Driver::new(&folder, "") };
    let more = ["--processor", "cuda", "--gpus", "0,0"];
    let (first, _, _) = asked(&driver, &bundles.path, &more);
    assert!(first.contains("rows within the GPU"), "{first}");
    let counts = Counts::read(&file);
    assert!(counts.peer_copies == 0 && counts.same_gpu_copies > 8, "{counts:?}");
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn one_lost_gpu_of_two_ends_the_cloud_or_hands_over_to_the_cpu() {
    let Some(folder) = driver() else { return };
    let bundles = Bundles::with_kernels();
    let fine = Driver::new(&folder, "");
    let whole = object(&fine.generate(&bundles.path, &["--whole"]).output().unwrap());
    let two = Driver { devices: 2, ..Driver::new(&folder, "fault-1") };

    let lost = Driver { after: 25, ..two.clone() };
    let cloud = CloudProcess::start(&lost, &bundles.path, &TWO).unwrap();
    let more = ["--cloud", &cloud.address, "--reconnect-s", "1"];
    let answer = fine.generate(&bundles.path, &more).output().unwrap();
    assert!(!answer.status.success(), "{:?}", said(&answer));
    let text = cloud.rest();
    assert!(text.contains("the cloud stopped: cuda: ") && text.contains("is lost"), "{text}");

    for after in [0, 25, 40] {
        let lost = Driver { after, ..two.clone() };
        let more = ["--processor", "cuda-else-cpu", "--gpus", "0,1"];
        let cloud = CloudProcess::start(&lost, &bundles.path, &more).unwrap();
        let to = ["--cloud", &cloud.address];
        let answer = object(&fine.generate(&bundles.path, &to).output().unwrap());
        assert_eq!(answer["token_ids"].as_array().unwrap().len(), 12, "after {after} kernels");
        // Before the first kernel nothing was computed on a GPU.
        let ids = if after == 0 { serde_json::json!([1]) } else { serde_json::json!([2, 1]) };
        assert_eq!(answer["timings"]["arithmetic_ids"], ids, "after {after} kernels");
        let again = object(&fine.generate(&bundles.path, &to).output().unwrap());
        assert_eq!(again["logits_blake3"], whole["logits_blake3"], "after {after} kernels");
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn a_lack_of_memory_on_one_gpu_of_two_costs_time_not_text() {
    let Some(folder) = driver() else { return };
    let bundles = Bundles::with_kernels();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("counts");
    let two = Driver { devices: 2, counts: Some(&file), ..Driver::new(&folder, "") };
    // What is allocated after the start is what runs short.
    let cloud = CloudProcess::start(&two, &bundles.path, &TWO).unwrap();
    let start = Counts::read(&file).allocations as usize;
    drop(cloud);
    let (_, expected, _) = asked(&two, &bundles.path, &TWO);
    let end = Counts::read(&file).allocations as usize - start;
    assert!(end > start + 4, "{start} to {end}");
    for after in [start, start + (end - start) / 2, end - 1] {
        let short = Driver { after, counts: None, ..Driver::new(&folder, "no-memory-once") };
        let short = Driver { devices: 2, ..short };
        let (_, answer, text) = asked(&short, &bundles.path, &TWO);
        let faults = text.matches("a step was not computed").count();
        assert_eq!(faults, 1, "after {after} allocations: {text}");
        assert_eq!(answer["token_ids"], expected["token_ids"], "after {after} allocations");
        assert_eq!(answer["logits_blake3"], expected["logits_blake3"]);
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn a_gpu_too_many_is_named() {
    let Some(folder) = driver() else { return };
    let bundles = Bundles::with_kernels();
    let one = Driver::new(&folder, "");
    let mut command = one.program();
    command.args(["cloud", "--listen", "127.0.0.1:0", "--threads", "1", "--bundle"]);
    let line = refusal(command.arg(bundles.path.join("cloud")).args(TWO));
    assert!(line.contains("GPU 1 of 1: there is none with this number"), "{line}");
    // All stages or none.
    let more = ["--processor", "cuda-else-cpu", "--gpus", "0,1"];
    let (first, answer, _) = asked(&one, &bundles.path, &more);
    assert!(first.contains("2 stages of cpu") && !first.contains("rows"), "{first}");
    assert_eq!(answer["timings"]["arithmetic_ids"], serde_json::json!([1]));
}
