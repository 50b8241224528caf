//! Models by path: what is taken, what is refused, and what is left in the cache; and the drafters
//! that bundles find.
#[path = "../../../loader/tests/files/mod.rs"]
mod files;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::support::drafter::write_noise;
use crate::support::{Bundles, names_once, said};
use files::gguf::{Gguf, part_path, write_parts};
use hat_engine::options::Drafters;
use hat_engine::{Engine, EngineConfig};
use hat_loader::bundle::{MANIFEST, TOKENIZER, TOKENIZER_CONFIG};
use hat_loader::{DType, DrafterArchitecture, Role, SourceModel, TinyModel, generated};
use hat_program::out;
use hat_program::pull::models::{Cut, Model};

/// A user's directories, and models in them.
struct Place {
    directory: tempfile::TempDir,
    cache: PathBuf,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let cache = directory.path().join("cache");
        Self { directory, cache }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn gguf(&self, name: &str, seed: u64) -> PathBuf {
        let path = self.path(name);
        Gguf::of(&model(seed)).write(&path);
        path
    }

    fn hugging_face(&self, name: &str, shards: usize) -> PathBuf {
        let path = self.path(name);
        files::write_directory(&model(1), &path, shards);
        path
    }

    /// Names in the cache's directory of bundles, hidden ones too.
    fn bundles(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.cache.join("bundles")) else { return Vec::new() };
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.collect();
        names.sort();
        names
    }

    /// Our program without a key, a prompt or a model of its own.
    fn command<S: AsRef<OsStr>>(&self, line: &[S]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hat-engine"));
        command.env("PATH", "/nowhere").env("HOME", self.directory.path());
        command.env("HAT_CACHE_DIR", &self.cache).env_remove("HAT_BUNDLE");
        command.args(line).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// An answer's ids and logits, and what was said beside it.
    fn answer(&self, model: &Path) -> (String, String) {
        let line = ["generate", "-p", "etaoin", "--raw", "--max-tokens", "6", "--ignore-eos"];
        let mut command = self.command(&line);
        command.args(["--json", "--split-layer", "1", "--bundle"]).arg(model);
        let output = command.output().unwrap();
        let said = said(&output);
        assert!(output.status.success(), "{said}");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let json: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        (format!("{} {}", json["token_ids"], json["logits_blake3"]), said)
    }
}

fn model(seed: u64) -> SourceModel {
    generated(&TinyModel { dtype: DType::F16, seed, ..TinyModel::default() })
}

fn cut(split_layer: u32, tail_layers: u32) -> Cut {
    Cut { split_layer: Some(split_layer), tail_layers: Some(tail_layers) }
}

/// A GGUF file, a directory of one file or of shards, a bundle and each of its halves all answer
/// alike, and a second start splits nothing.
#[test]
fn every_form_of_a_model_gives_the_same_answer() {
    let place = Place::new();
    let bundle = Bundles::of(&TinyModel { dtype: DType::F16, ..TinyModel::default() }, 1, 0);
    let (wanted, said) = place.answer(&bundle.path);
    assert!(!said.contains("splitting"), "{said}");
    assert!(place.bundles().is_empty());
    assert_eq!(place.answer(&bundle.path.join("device")).0, wanted);
    let models = [
        place.gguf("tiny.gguf", 1),
        place.hugging_face("one file", 1),
        place.hugging_face("shards", 3),
    ];
    for (index, path) in models.iter().enumerate() {
        let (answer, said) = place.answer(path);
        assert_eq!(answer, wanted, "{}", path.display());
        assert!(said.contains("splitting"), "{said}");
        let (answer, said) = place.answer(path);
        assert_eq!(answer, wanted);
        assert!(!said.contains("splitting"), "split again: {said}");
        assert_eq!(place.bundles().len(), index + 1, "{:?}", place.bundles());
    }
}

/// A split's key has all that the split depends on, and nothing else.
#[test]
fn a_split_is_found_again_by_content_and_cut_alone() {
    let place = Place::new();
    let bundle = |path: &Path, cut| Model::at(path).unwrap().bundle(&place.cache, cut).unwrap();
    let path = place.gguf("tiny.gguf", 1);
    let first = bundle(&path, cut(1, 0));
    assert_eq!(bundle(&path, cut(1, 0)), first);
    // The same file elsewhere.
    fs::create_dir(place.path("other")).unwrap();
    let copy = place.path("other").join("tiny.gguf");
    fs::copy(&path, &copy).unwrap();
    assert_eq!(bundle(&copy, cut(1, 0)), first);
    assert_eq!(place.bundles().len(), 1);
    // Another cut, another file in the same place with the same size and time.
    let second = bundle(&path, cut(1, 1));
    assert_ne!(second, first);
    let modified = fs::metadata(&path).unwrap().modified().unwrap();
    let bytes = fs::metadata(&path).unwrap().len();
    place.gguf("tiny.gguf", 2);
    File::options().write(true).open(&path).unwrap().set_modified(modified).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), bytes);
    let third = bundle(&path, cut(1, 0));
    assert!(third != first && third != second);
    let id = |path: &Path| hat_loader::Bundle::open(&path.join("device")).unwrap().model_id();
    assert_eq!(id(&first), id(&second));
    assert_ne!(id(&first), id(&third));

    // A model in several files is one by any of them, and another if any of them is.
    let directory = place.path("parts");
    fs::create_dir(&directory).unwrap();
    let parts = |seed| Gguf::of(&model(seed)).parts(3);
    write_parts(&directory, &parts(1));
    let part = |number| part_path(&directory, number, 3);
    let first = bundle(&part(1), cut(1, 0));
    assert_eq!(bundle(&part(3), cut(1, 0)), first);
    parts(2)[1].write(&part(2));
    assert_ne!(bundle(&part(1), cut(1, 0)), first);

    // One changed byte in any part of a directory.
    let path = place.hugging_face("hf", 1);
    let first = bundle(&path, cut(1, 0));
    let generation = path.join("generation_config.json");
    fs::write(&generation, r#"{"temperature": 0.7, "do_sample": true}"#).unwrap();
    let second = bundle(&path, cut(1, 0));
    assert_ne!(first, second);
    fs::remove_file(&generation).unwrap();
    fs::write(path.join("README.md"), "no part of it").unwrap();
    assert_eq!(bundle(&path, cut(1, 0)), first);
}

#[test]
fn what_is_no_model_is_named_with_what_would_be_one() {
    let place = Place::new();
    let at = |name: &str| Model::at(&place.path(name)).unwrap_err();
    fs::create_dir(place.path("empty")).unwrap();
    fs::create_dir(place.path("folder")).unwrap();
    place.gguf("folder/inner.gguf", 1);
    let hugging_face = place.hugging_face("hf", 1);
    fs::write(place.path("text.txt"), "no model").unwrap();
    fs::write(place.path("short.gguf"), "GG").unwrap();
    fs::write(place.path("nothing.gguf"), "").unwrap();
    let fifo = Command::new("mkfifo").arg(place.path("fifo.gguf")).status().unwrap();
    assert!(fifo.success());
    let _listener = UnixListener::bind(place.path("socket")).unwrap();
    for (name, words) in [
        ("nowhere", &["no such file", "a GGUF file", "Hugging Face directory"][..]),
        ("empty", &["holds no model", "a GGUF file"]),
        ("folder", &["did you mean", "folder/inner.gguf"]),
        ("text.txt", &["is no GGUF file", "a bundle that hat-split made"]),
        ("short.gguf", &["is no GGUF file"]),
        ("nothing.gguf", &["is no GGUF file"]),
        ("fifo.gguf", &["a FIFO", "a GGUF file"]),
        ("socket", &["a socket", "a GGUF file"]),
    ] {
        let error = out::said(&at(name));
        names_once(&error);
        let path = place.path(name).display().to_string();
        assert!(error.contains(&path), "{error}");
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    }
    let error = format!("{:#}", Model::at(Path::new("/dev/null")).unwrap_err());
    assert!(error.contains("/dev/null") && error.contains("a device"), "{error}");
    let part = hugging_face.join("model.safetensors");
    let error = format!("{:#}", Model::at(&part).unwrap_err());
    assert!(error.contains("give its directory"), "{error}");
    assert_eq!(Model::at(Path::new("default")).unwrap(), Model::Default);
}

/// Contents that no file of a model has, and a FIFO in its place.
const BAD: [Option<&str>; 6] = [Some(""), Some("{"), Some("{}"), Some("[]"), Some("null"), None];

/// Replaces a file's content.
fn spoil(path: &Path, content: Option<&str>) {
    fs::remove_file(path).unwrap();
    match content {
        Some(text) => fs::write(path, text).unwrap(),
        None => assert!(Command::new("mkfifo").arg(path).status().unwrap().success()),
    }
}

/// The parts of a model's directory, one spoilt after another: the errors that there were.
fn errors_of_spoilt(directory: &Path, open: &dyn Fn() -> Option<String>) -> usize {
    let mut errors = 0;
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let good = fs::read(&path).unwrap();
        for content in BAD {
            spoil(&path, content);
            if let Some(error) = open() {
                names_once(&error);
                errors += 1;
            }
        }
        fs::remove_file(&path).unwrap();
        open().iter().for_each(|error| names_once(error));
        fs::write(&path, good).unwrap();
    }
    assert_eq!(open(), None);
    errors
}

/// Writes the size and the hash that a file of a half has now into its manifest.
fn state(half: &Path, name: &str) {
    let manifest = half.join(MANIFEST);
    let Ok(content) = fs::read(half.join(name)) else { return };
    let mut json: serde_json::Value =
        serde_json::from_slice(&fs::read(&manifest).unwrap()).unwrap();
    let hash = blake3::hash(&content).to_hex().to_string();
    json["files"][name] = serde_json::json!({"bytes": content.len(), "blake3": hash});
    fs::write(manifest, json.to_string()).unwrap();
}

/// An error names a file of a model once, whatever is wrong with it.
#[test]
fn an_error_names_a_file_once() {
    let place = Place::new();
    let hugging_face = place.hugging_face("hf", 1);
    let opened = || {
        let model = Model::at(&hugging_face);
        model.and_then(|model| model.bundle(&place.cache, cut(1, 0))).err()
    };
    let errors = errors_of_spoilt(&hugging_face, &|| opened().as_ref().map(out::said));
    assert!(errors >= 15, "{errors}");

    // A bundle's files, as changed behind its back, and as written by who wrote the manifest.
    let bundles = Bundles::of(&TinyModel { dtype: DType::F16, ..TinyModel::default() }, 1, 0);
    let device = bundles.path.join(Role::Device.name());
    let opened = || Engine::open(EngineConfig::new(&device)).err().map(|error| error.to_string());
    let errors = errors_of_spoilt(&device, &opened);
    assert!(errors >= 20, "{errors}");
    let mut stated = 0;
    for name in [TOKENIZER, TOKENIZER_CONFIG] {
        let (path, manifest) = (device.join(name), fs::read(device.join(MANIFEST)).unwrap());
        let good = fs::read(&path).unwrap();
        for content in BAD.iter().flatten().copied().chain([r#"{"version": "2.0"}"#]) {
            spoil(&path, Some(content));
            state(&device, name);
            if let Some(error) = opened() {
                names_once(&error);
                stated += 1;
            }
        }
        fs::write(&path, good).unwrap();
        fs::write(device.join(MANIFEST), manifest).unwrap();
    }
    assert!(stated >= 8, "{stated}");
}

/// Every command that names a model takes it without a flag, and refuses what is none before it
/// makes anything.
#[test]
fn a_model_needs_no_flag_and_two_models_are_one_too_many() {
    let place = Place::new();
    let path = place.path("nothing here");
    let shown = path.display().to_string();
    let (path, shown) = (path.as_os_str(), &shown);
    let word = OsStr::new;
    for command in ["chat", "device", "cloud", "doctor", "pull"] {
        for line in [
            vec![word(command), path],
            vec![word(command), word("--bundle"), path],
            vec![word(command), word("--model"), path],
            vec![word(command), word("-m"), path],
        ] {
            let output = place.command(&line).output().unwrap();
            let said = said(&output);
            assert!(!output.status.success() && said.contains(shown), "{line:?}: {said}");
        }
        let line = [word(command), path, word("--bundle"), word("other")];
        let said = said(&place.command(&line).output().unwrap());
        assert!(said.contains("two models") && said.contains("other"), "{command}: {said}");
        // A variable is what counts where nothing else does.
        let line = [word(command), path];
        let output = place.command(&line).env("HAT_BUNDLE", "other").output().unwrap();
        let said = self::said(&output);
        assert!(said.contains(shown) && !said.contains("two models"), "{command}: {said}");
    }
    let left: Vec<_> = fs::read_dir(place.directory.path()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Several processes that meet the same new file split it once, and all go on.
#[test]
fn processes_that_start_together_share_one_split() {
    let place = Place::new();
    let path = place.gguf("tiny.gguf", 1);
    let start =
        || -> Child { place.command(&["pull", "--split-layer", "1"]).arg(&path).spawn().unwrap() };
    let children: Vec<Child> = (0..6).map(|_| start()).collect();
    let mut splits = 0;
    let mut printed = Vec::new();
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
        splits += usize::from(said(&output).contains("splitting"));
        printed.push(String::from_utf8(output.stdout).unwrap());
    }
    assert_eq!(splits, 1);
    printed.dedup();
    assert_eq!(printed.len(), 1, "{printed:?}");
    assert_eq!(place.bundles().len(), 1, "{:?}", place.bundles());
    for role in ["device", "cloud"] {
        let half = Path::new(printed[0].trim_end()).join(role);
        hat_loader::Bundle::open(&half).unwrap().verify().unwrap();
    }
}

/// A bundle that a full disk or a kill left unfinished is no bundle, and goes.
#[test]
fn a_split_that_fails_leaves_nothing() {
    let place = Place::new();
    let path = place.gguf("tiny.gguf", 1);
    // A limit on the size of files fails a write as a full disk does.
    let mut command = place.command(&[] as &[&str]);
    let program = command.get_program().to_owned();
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", "trap '' XFSZ; ulimit -f 8; exec \"$@\"", "sh"]);
    shell.arg(&program).args(["pull", "--split-layer", "1"]).arg(&path);
    shell.env("HOME", place.directory.path()).env("HAT_CACHE_DIR", &place.cache);
    let output = shell.output().unwrap();
    let said = said(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("File too large") && said.contains("bundles"), "{said}");
    assert!(place.bundles().is_empty(), "{:?}", place.bundles());

    // A killed process can't clean up: the next one does.
    let bundle = Model::at(&path).unwrap().bundle(&place.cache, cut(1, 0)).unwrap();
    let name = bundle.file_name().unwrap().to_str().unwrap().to_owned();
    fs::remove_dir_all(&bundle).unwrap();
    let dead = place.cache.join("bundles").join(format!(".{name}.tmp-1-0"));
    fs::create_dir_all(dead.join("bundle/device")).unwrap();
    fs::write(dead.join("bundle/device/bundle.json"), "{").unwrap();
    command = place.command(&["pull", "--split-layer", "1"]);
    let output = command.arg(&path).output().unwrap();
    assert!(output.status.success(), "{}", self::said(&output));
    assert_eq!(place.bundles(), [name]);

    // A model that can't be split, and a cut that leaves the cloud nothing.
    fs::write(place.path("bad.gguf"), "GGUF and no more").unwrap();
    for (name, split, words) in
        [("bad.gguf", "1", "bad.gguf"), ("tiny.gguf", "9", "no layer to the cloud")]
    {
        let mut command = place.command(&["pull", "--split-layer", split]);
        let output = command.arg(place.path(name)).output().unwrap();
        let said = self::said(&output);
        assert!(!output.status.success() && said.contains(words), "{said}");
        assert_eq!(place.bundles().len(), 1, "{:?}", place.bundles());
    }
}

/// A drafter is found by the model and the split that it was trained for, wherever it is.
#[test]
fn a_bundle_finds_its_drafter_by_model_and_split() {
    let bundles = Bundles::generated(2, 0);
    let other = Bundles::of(&TinyModel { seed: 2, ..TinyModel::default() }, 1, 0);
    let directory = tempfile::tempdir().unwrap();
    let mut drafters = Drafters::default();
    drafters.directory = Some(directory.path().to_owned());
    let origin = |split_layer: u32| {
        let mut config = EngineConfig::new(bundles.path.join("device"));
        config.drafters = drafters.clone();
        let engine = Engine::open(config.split_layer(split_layer)).unwrap();
        engine.drafter_origin().map(str::to_owned)
    };
    let file = |name: &str| directory.path().join(name);
    fs::write(file("0-bad.safetensors"), "no drafter").unwrap();
    write_noise(&other.path, DrafterArchitecture::Layer, 1, &file("1-other-model.safetensors"));
    write_noise(&bundles.path, DrafterArchitecture::Layer, 2, &file("2-other-split.safetensors"));
    fs::write(file("3.txt"), "no file of ours").unwrap();
    assert_eq!(origin(1), None);
    write_noise(&bundles.path, DrafterArchitecture::Layer, 1, &file("4-right.safetensors"));
    assert_eq!(origin(1), Some(file("4-right.safetensors").display().to_string()));
    assert_eq!(origin(2), Some(file("2-other-split.safetensors").display().to_string()));
    // The bundle's own comes first, where it fits.
    let device = bundles.path.join(Role::Device.name());
    hat_loader::add_drafter(&device, &file("4-right.safetensors")).unwrap();
    assert_eq!(origin(1).as_deref(), Some("in the bundle"));
    assert_eq!(origin(2), Some(file("2-other-split.safetensors").display().to_string()));
}

/// A user's drafters of other models are no fault, and nothing is said of them.
#[test]
fn a_drafter_of_another_model_is_left_out_without_a_word() {
    let bundles = Bundles::generated(1, 0);
    let other = Bundles::of(&TinyModel { seed: 2, ..TinyModel::default() }, 1, 0);
    let place = Place::new();
    let drafters = place.cache.join("drafters");
    fs::create_dir_all(&drafters).unwrap();
    write_noise(&other.path, DrafterArchitecture::Layer, 1, &drafters.join("other.safetensors"));
    let (_, said) = place.answer(&bundles.path);
    assert!(!said.contains("left out"), "{said}");
    fs::write(drafters.join("bad.safetensors"), "no drafter").unwrap();
    let (_, said) = place.answer(&bundles.path);
    assert!(said.contains("left out") && said.contains("bad.safetensors"), "{said}");
    // Nor of this program's own, for a model that is split.
    let (_, said) = place.answer(&place.gguf("tiny.gguf", 1));
    assert!(said.contains("splitting") && !said.contains("stays without"), "{said}");
}
