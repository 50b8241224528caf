//! Files that were changed on disk: before a bundle is opened, between two starts, while it is
//! used; and paths that lead to no regular file.
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use crate::files::write_directory;
use hat_loader::bundle::{ADAPTER, MANIFEST, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS};
use hat_loader::{
    Bundle, BundleError, BundleOptions, DType, SourceModel, TinyModel, Verified, Watch, Weights,
    add_drafter, generated, write_bundles,
};

/// Limit on a wait that only a hang reaches.
const PATIENCE: Duration = Duration::from_secs(120);

fn bundles(directory: &Path) -> PathBuf {
    let out = directory.join("bundle");
    let options = BundleOptions { split_layer: 1, tail_layers: 0, weights: Weights::Keep };
    write_bundles(&generated(&TinyModel::default()), options, &out, &mut |_| {}).unwrap();
    out
}

fn verify(half: &Path, memory: Option<&Path>) -> Result<Verified, String> {
    let bundle = Bundle::open(half).map_err(|error| error.to_string())?;
    bundle
        .watch()
        .verify(memory, SystemTime::now(), 2, &mut |_| {})
        .map_err(|error| error.to_string())
}

/// Verifies until a verdict is remembered: one is kept once the file's last change is past.
fn remember(half: &Path, memory: &Path) {
    let start = Instant::now();
    while verify(half, Some(memory)).unwrap().hashed > 0 {
        assert!(start.elapsed() < PATIENCE, "nothing is remembered");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Changes bytes in the middle of a file, and neither its size nor its inode.
fn flip(path: &Path, count: usize) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    let end = (middle + count).min(bytes.len());
    bytes[middle..end].iter_mut().for_each(|byte| *byte ^= 1);
    fs::OpenOptions::new().write(true).open(path).unwrap().write_all(&bytes).unwrap();
}

#[test]
fn a_changed_byte_of_any_file_is_found_with_and_without_a_memory() {
    for (half, names) in
        [("device", &[WEIGHTS, TOKENIZER, TOKENIZER_CONFIG][..]), ("cloud", &[WEIGHTS])]
    {
        for name in names {
            let directory = tempfile::tempdir().unwrap();
            let half = bundles(directory.path()).join(half);
            let memory = directory.path().join("memory");
            remember(&half, &memory);
            flip(&half.join(name), 1);
            for memory in [None, Some(&*memory)] {
                let error = verify(&half, memory).unwrap_err();
                assert!(error.contains(name) && error.contains("split again"), "{error}");
            }
        }
    }
}

#[test]
fn a_verdict_is_remembered_for_the_file_and_not_for_the_path() {
    let directory = tempfile::tempdir().unwrap();
    let half = bundles(directory.path()).join("cloud");
    let memory = directory.path().join("deep/memory");
    let bytes = Bundle::open(&half).unwrap().weights_bytes();
    remember(&half, &memory);
    // Renamed, its times stay but for ctime: hashed once more, and then known again.
    let moved = directory.path().join("moved");
    fs::rename(&half, &moved).unwrap();
    assert_eq!(verify(&moved, Some(&memory)), Ok(Verified { hashed: 0, remembered: bytes }));
    // Another time, the same content.
    let times = fs::FileTimes::new().set_modified(SystemTime::UNIX_EPOCH);
    File::options().write(true).open(moved.join(WEIGHTS)).unwrap().set_times(times).unwrap();
    assert_eq!(verify(&moved, Some(&memory)), Ok(Verified { hashed: bytes, remembered: 0 }));
    remember(&moved, &memory);
}

#[test]
fn a_memory_that_is_torn_foreign_or_nowhere_fails_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let half = bundles(directory.path()).join("cloud");
    let memory = directory.path().join("memory");
    let bytes = Bundle::open(&half).unwrap().weights_bytes();
    let all = Ok(Verified { hashed: bytes, remembered: 0 });
    remember(&half, &memory);
    let file = memory.join("verified");
    let good = fs::read_to_string(&file).unwrap();
    assert!(good.lines().count() >= 2, "{good}");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o622)).unwrap();
        assert_eq!(verify(&half, Some(&memory)), all, "others can write it");
        remember(&half, &memory);
    }
    for cut in 0..good.len() {
        fs::write(&file, &good[..cut]).unwrap();
        assert_eq!(verify(&half, Some(&memory)), all, "cut at {cut}");
    }
    let foreign = ["", "{}", "\0\0\0\0", &good.replace("files 1", "files 2"), &good[1..]];
    for text in foreign {
        fs::write(&file, text).unwrap();
        assert_eq!(verify(&half, Some(&memory)), all, "{text:?}");
    }
    fs::write(&file, [0xff; 100]).unwrap();
    assert_eq!(verify(&half, Some(&memory)), all);
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    assert_eq!(verify(&half, Some(&memory)), all, "a directory is in its place");
    assert_eq!(verify(&half, Some(&half.join(WEIGHTS))), all, "a file for a directory");
    assert_eq!(verify(&half, Some(Path::new("/proc/nowhere"))), all);
}

#[test]
fn the_memory_is_bounded() {
    let directory = tempfile::tempdir().unwrap();
    let half = bundles(directory.path()).join("cloud");
    let memory = directory.path().join("memory");
    fs::create_dir(&memory).unwrap();
    let line = format!("1 2 3 4 5 {}\n", "0".repeat(64));
    let mut text = "hat-engine verified files 1\n".to_owned();
    (0..700).for_each(|number| text += &format!("{number}{line}"));
    fs::write(memory.join("verified"), &text).unwrap();
    remember(&half, &memory);
    let kept = fs::read_to_string(memory.join("verified")).unwrap();
    assert!(kept.lines().count() <= 257, "{}", kept.lines().count());
}

#[test]
fn a_change_while_it_is_used_is_found_and_a_touch_is_none() {
    type Change = fn(&Path);
    let changes: [(&str, Change, bool); 7] = [
        (
            "touched",
            |path| {
                let times = fs::FileTimes::new().set_modified(SystemTime::UNIX_EPOCH);
                File::options().write(true).open(path).unwrap().set_times(times).unwrap();
            },
            true,
        ),
        (
            "replaced by the same",
            |path| {
                let copy = path.with_extension("copy");
                fs::copy(path, &copy).unwrap();
                fs::rename(copy, path).unwrap();
            },
            true,
        ),
        ("overwritten", |path| flip(path, 200_000), false),
        ("one byte", |path| flip(path, 1), false),
        (
            "replaced by another",
            |path| {
                let copy = path.with_extension("copy");
                fs::copy(path, &copy).unwrap();
                flip(&copy, 1);
                fs::rename(copy, path).unwrap();
            },
            false,
        ),
        ("removed", |path| fs::remove_file(path).unwrap(), false),
        (
            "shortened",
            |path| File::options().write(true).open(path).unwrap().set_len(9).unwrap(),
            false,
        ),
    ];
    for (what, change, is_harmless) in changes {
        for name in [WEIGHTS, TOKENIZER] {
            let directory = tempfile::tempdir().unwrap();
            let half = bundles(directory.path()).join("device");
            let memory = directory.path().join("memory");
            remember(&half, &memory);
            let mut watch = Bundle::open(&half).unwrap().watch();
            watch.verify(Some(&memory), SystemTime::now(), 1, &mut |_| {}).unwrap();
            assert!(!watch.may_have_changed().unwrap(), "{what}");
            change(&half.join(name));
            let looked = watch.may_have_changed();
            assert!(!matches!(looked, Ok(false)), "{name} {what}: not seen");
            match watch.verify_changed(1) {
                Ok(()) => {
                    assert!(is_harmless, "{name} {what}: not found");
                    assert!(!watch.may_have_changed().unwrap(), "{what}: seen for ever");
                }
                Err(error) => {
                    assert!(!is_harmless, "{name} {what}: {error}");
                    assert!(error.to_string().contains(name), "{error}");
                }
            }
        }
    }
}

#[test]
fn a_file_of_its_own_is_known_by_size_and_hash() {
    let directory = tempfile::tempdir().unwrap();
    let (path, memory) = (directory.path().join("model"), directory.path().join("memory"));
    fs::write(&path, "what was fetched").unwrap();
    let hash = blake3::hash(b"what was fetched").to_hex();
    let check = |bytes| -> Result<Verified, BundleError> {
        let mut watch = Watch::of_file(&path, bytes, &hash)?;
        watch.verify(Some(&memory), SystemTime::now(), 1, &mut |_| {})
    };
    assert_eq!(check(16).unwrap().hashed, 16);
    assert!(matches!(check(17), Err(BundleError::FileSize { got: 16, expected: 17, .. })));
    let start = Instant::now();
    while check(16).unwrap().remembered < 16 {
        assert!(start.elapsed() < PATIENCE, "nothing is remembered");
        std::thread::sleep(Duration::from_millis(20));
    }
    flip(&path, 1);
    assert!(matches!(check(16), Err(BundleError::FileHash { .. })));
}

/// A file that was written a moment ago could be written again within the same tick of the clock.
#[test]
fn a_fresh_file_is_hashed_once_more() {
    let directory = tempfile::tempdir().unwrap();
    let half = bundles(directory.path()).join("cloud");
    let mut watch = Bundle::open(&half).unwrap().watch();
    let written = fs::metadata(half.join(WEIGHTS)).unwrap().modified().unwrap();
    watch.verify(None, written, 1, &mut |_| {}).unwrap();
    assert!(watch.may_have_changed().unwrap());
    watch.verify_changed(1).unwrap();
    assert!(!watch.may_have_changed().unwrap());
}

/// Puts an impostor in its place.
#[cfg(unix)]
type Put = Box<dyn Fn()>;

/// Kinds of things that stand where a regular file belongs.
#[cfg(unix)]
fn impostors(path: &Path) -> Vec<(&'static str, Put)> {
    let path = path.to_owned();
    let (a, b, c, d) = (path.clone(), path.clone(), path.clone(), path);
    vec![
        (
            "a FIFO",
            Box::new(move || {
                assert!(std::process::Command::new("mkfifo").arg(&a).status().unwrap().success());
            }),
        ),
        (
            "a socket",
            Box::new(move || {
                std::os::unix::net::UnixListener::bind(&b).unwrap();
            }),
        ),
        ("a device", Box::new(move || std::os::unix::fs::symlink("/dev/zero", &c).unwrap())),
        ("a directory", Box::new(move || fs::create_dir(&d).unwrap())),
    ]
}

/// Puts each impostor in the place of `path`, and wants an error that names it from `open`; one
/// that waits is found by its thread not ending.
#[cfg(unix)]
fn refuses(path: &Path, open: impl Fn() -> Result<(), String> + Clone + Send + 'static) {
    for (kind, put) in impostors(path) {
        if path.is_dir() {
            fs::remove_dir_all(path).unwrap();
        } else {
            let _ = fs::remove_file(path);
        }
        put();
        let (done, end) = std::sync::mpsc::channel();
        let open = open.clone();
        std::thread::spawn(move || done.send(open()));
        let error = end.recv_timeout(PATIENCE).expect("it hangs").unwrap_err();
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(error.contains(name) && error.contains(kind), "{kind} as {name}: {error}");
    }
}

/// Files of a Hugging Face directory, also those that need not be there.
#[cfg(unix)]
const HUGGING_FACE: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
];

#[cfg(unix)]
#[test]
fn nothing_but_a_regular_file_is_opened() {
    let short = || tempfile::Builder::new().prefix("f").tempdir().unwrap();
    for name in [MANIFEST, WEIGHTS, TOKENIZER, TOKENIZER_CONFIG] {
        let directory = short();
        let half = bundles(directory.path()).join("device");
        let path = half.join(name);
        refuses(&path, move || Bundle::open(&half).map(drop).map_err(|error| error.to_string()));
    }
    for name in HUGGING_FACE {
        let directory = short();
        let model = generated(&TinyModel { dtype: DType::Bf16, ..TinyModel::default() });
        write_directory(&model, directory.path(), 1);
        let model = directory.path().to_owned();
        let open = move || SourceModel::open(&model).map(drop).map_err(|e| e.to_string());
        refuses(&directory.path().join(name), open);
    }
    // A drafter that is to be added, a GGUF file.
    let directory = short();
    let half = bundles(directory.path()).join("device");
    let path = directory.path().join(ADAPTER);
    let file = path.clone();
    refuses(&path, move || add_drafter(&half, &file).map_err(|error| error.to_string()));
    let path = directory.path().join("model.gguf");
    let file = path.clone();
    let open = |path: &Path| SourceModel::open(path).map(drop).map_err(|error| error.to_string());
    for (kind, put) in impostors(&path).into_iter().filter(|(kind, _)| *kind != "a directory") {
        let _ = fs::remove_file(&path);
        put();
        let error = open(&file).unwrap_err();
        assert!(error.contains("model.gguf") && error.contains(kind), "{error}");
    }
}
