//! Tests that the artefacts committed under `kernels/gen/` belong to the sources beside it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use hat_cuda::kernel::Kernel;
use serde_json::Value;

use hat_cuda::testkit::test_gpu::Kind;

use crate::stand::gpu;

fn kernels() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels")
}

fn manifest() -> Value {
    let text = std::fs::read(kernels().join("gen/manifest.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

fn hash(path: &Path) -> String {
    blake3::hash(&std::fs::read(path).unwrap()).to_hex().to_string()
}

const REMEDY: &str = "run hat-kernels (docs/KERNELS.md) and commit what it writes";

#[test]
fn artefacts_are_made_of_these_sources() {
    let manifest = manifest();
    let known = manifest["sources"].as_object().unwrap();
    let is_source = |path: &PathBuf| {
        path.extension().is_some_and(|end| ["h", "cu", "cuh"].iter().any(|known| end == *known))
    };
    let entries = std::fs::read_dir(kernels()).unwrap().map(|entry| entry.unwrap().path());
    let mut sources = 0;
    for path in entries.filter(is_source) {
        let name = path.file_name().unwrap().to_str().unwrap();
        let compiled = known.get(name).and_then(Value::as_str);
        assert_eq!(compiled, Some(hash(&path).as_str()), "{name} is newer: {REMEDY}");
        sources += 1;
    }
    assert_eq!(sources, known.len(), "a source is gone: {REMEDY}");
}

#[test]
fn artefacts_are_whole_and_hold_every_kernel() {
    let manifest = manifest();
    let artefacts = manifest["artefacts"].as_object().unwrap();
    let targets = ["sm_80", "sm_86", "sm_87", "sm_89", "sm_90"];
    for (file, artefact) in artefacts {
        let path = kernels().join("gen").join(file);
        assert_eq!(artefact["blake3"].as_str(), Some(hash(&path).as_str()), "{file}: {REMEDY}");
    }
    for kernel in Kernel::ALL {
        let (module, name) = (kernel.module(), kernel.name());
        for target in targets {
            let found = artefacts[&format!("{module}.{target}.cubin")]["kernels"].as_array();
            let has = found.unwrap().iter().any(|usage| usage["kernel"] == name);
            assert!(has, "{module}.{target}.cubin holds no {name}: {REMEDY}");
        }
        let ptx = kernels().join(format!("gen/{module}.compute_80.ptx"));
        let ptx = std::fs::read_to_string(ptx).unwrap();
        assert!(ptx.contains(&format!(".entry {name}(")), "{module}: PTX without {name}");
        // What the launcher starts is what the kernel was compiled for.
        let threads = format!(".maxntid {}", kernel.threads());
        let body = ptx.split(&format!(".entry {name}(")).nth(1).unwrap();
        let body = &body[..body.find('{').unwrap()];
        assert!(body.contains(&threads), "{name}: {body}, not {threads}");
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn the_emulator_holds_every_kernel() {
    let Some(Kind::Emulator(emulator)) = gpu().map(|gpu| gpu.kind) else { return };
    let names = |kernels: Vec<String>| kernels.into_iter().collect::<BTreeSet<_>>();
    let emulated = emulator.kernels().into_iter().map(|(name, _)| name).collect();
    let all = Kernel::ALL.iter().map(|kernel| kernel.name().to_owned()).collect();
    assert_eq!(names(emulated), names(all));
}
