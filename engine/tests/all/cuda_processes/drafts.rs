//! The trained drafter beside the device's layers on the GPU: it decides no text there either.

use hat_loader::DrafterArchitecture;
use serde_json::Value;

use super::lost::DeviceProcess;
use super::{Bundles, Driver, driver, object};
use crate::support::drafter::add_noise;

/// Answers of the split engine, and of the whole model, whose text drafts must not change.
#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn a_drafter_on_the_gpu_changes_nothing() {
    let Some(folder) = driver() else { return };
    let driver = Driver::new(&folder, "");
    let (greedy, seeded) = (&[][..], &["--temperature", "0.8", "--seed", "3"][..]);
    let run = |bundles: &Bundles, sampler: &[&str], more: &[&str]| -> Value {
        let more = [&["--processor", "cuda"], sampler, more].concat();
        object(&driver.generate(&bundles.path, &more).output().unwrap())
    };
    // Drafters know nothing of each other's bundles; the model is one.
    let bundles = DrafterArchitecture::ALL.map(|kind| {
        let bundles = Bundles::with_kernels();
        add_noise(&bundles, kind);
        (kind, bundles)
    });
    for (sampler, modes) in [
        (
            greedy,
            &[
                (DrafterArchitecture::Deep, "tree"),
                (DrafterArchitecture::Layer, "chain"),
                (DrafterArchitecture::Paper, "tree"),
            ][..],
        ),
        (seeded, &[(DrafterArchitecture::Deep, "chain"), (DrafterArchitecture::Layer, "tree")][..]),
    ] {
        let whole = run(&bundles[0].1, sampler, &["--whole"]);
        for (kind, mode) in modes {
            let (_, bundles) = bundles.iter().find(|(known, _)| known == kind).unwrap();
            let split = run(bundles, sampler, &["--draft", mode]);
            let case = format!("{}, {mode}, {sampler:?}", kind.name());
            assert_eq!(split["token_ids"], whole["token_ids"], "{case}");
            assert_eq!(split["logits_blake3"], whole["logits_blake3"], "{case}");
            let drafted = split["timings"]["drafters"]["adapter"]["drafted"].as_u64();
            assert!(drafted > Some(0), "{case}: {}", split["timings"]);
        }
    }
}

/// It computes where the device's layers do, and goes on with the CPU with them.
#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn a_drafter_follows_its_device() {
    let Some(folder) = driver() else { return };
    let bundles = Bundles::with_kernels();
    add_noise(&bundles, DrafterArchitecture::Deep);
    for (kind, processor, backend) in [
        ("", "cuda", "deep rows; cuda: "),
        ("", "auto", "deep rows; cpu"),
        ("no-gpu", "cuda-else-cpu", "deep rows; cpu"),
    ] {
        let driver = Driver::new(&folder, kind);
        let more = ["--processor", processor];
        let device = DeviceProcess::start(&driver, &bundles.path, &more).unwrap();
        let drafter = device.backend("drafter");
        assert!(drafter.contains(backend), "{kind} {processor}: {drafter}");
    }
    let fine = Driver::new(&folder, "");
    let on_cpu = object(&fine.generate(&bundles.path, &["--whole"]).output().unwrap());
    let lost = Driver { after: 60, ..Driver::new(&folder, "fault") };
    let more = ["--processor", "cuda-else-cpu"];
    let device = DeviceProcess::start(&lost, &bundles.path, &more).unwrap();
    assert!(device.backend("drafter").contains("deep rows; cuda: "));
    let (refused, answer) = device.ask_until_answered();
    assert_eq!((refused, &answer["choices"][0]["text"]), (1, &on_cpu["text"]), "{answer}");
    assert!(device.backend("drafter").contains("deep rows; cpu"));
}

/// A GPU with room for the device's layers alone: the drafter takes the CPU, with a line.
#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn a_drafter_without_room_on_the_gpu_takes_the_cpu() {
    let Some(folder) = driver() else { return };
    let bundles = Bundles::with_kernels();
    add_noise(&bundles, DrafterArchitecture::Deep);
    let cloud = Driver::new(&folder, "");
    let cloud = super::CloudProcess::start(&cloud, &bundles.path, &[]).unwrap();
    let more = ["--processor", "cuda", "--cloud", &cloud.address];
    let mut seen = 0;
    for after in 1..200 {
        // The first allocation that fails belongs to the layers, then to the drafter.
        let short = Driver { after, ..Driver::new(&folder, "no-memory-once") };
        let Some(device) = DeviceProcess::start(&short, &bundles.path, &more) else { continue };
        let drafter = device.backend("drafter");
        if !drafter.contains("cpu") {
            break;
        }
        assert!(device.backend("device").starts_with("cuda: "), "after {after} allocations");
        if seen == 0 {
            let (refused, answer) = device.ask_until_answered();
            assert_eq!(refused, 0, "{answer}");
        }
        seen += 1;
        if seen == 3 {
            break;
        }
    }
    assert!(seen > 0, "the drafter always had room");
}
