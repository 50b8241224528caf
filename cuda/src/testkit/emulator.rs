//! The GPU that is none: the same kernels, compiled as host C++ and run on the CPU.
//!
//! The system's C++ compiler makes one library of `emu/emulator.cpp` and the kernels, on first
//! use, kept under a folder by the hash of what it is made of. Memory is poisoned: what was never
//! written reads as NaN, and what is written outside of an allocation is noticed.

use std::collections::hash_map::DefaultHasher;
use std::ffi::{CStr, CString, c_char, c_void};
use std::hash::Hasher as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use libloading::Library;

use crate::gpu::{Gpu, GpuError, Launch, Memory, Number, Reach, bytes, bytes_mut};
use crate::kernel::Kernel;

const GPU: &str = "emulator";
/// Byte that fills memory before it is written: NaN as f16 and as f32.
const POISON: u8 = 0xff;
/// Bytes before and behind an allocation that nobody may write.
const MARGIN: usize = 4096;
const ALIGNMENT: usize = 256;

/// An error in building the emulator.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EmulatorError {
    /// None of `$CXX`, c++, g++, clang++ can be started.
    #[error("no C++ compiler: $CXX, c++, g++ and clang++ can't be started")]
    NoCompiler,
    /// The kernels do not compile as host C++.
    #[error("{compiler} failed:\n{log}")]
    Compile {
        /// Path of the compiler.
        compiler: String,
        /// The compiler's output.
        log: String,
    },
    /// A file can't be read, written or opened.
    #[error("{path}: {reason}")]
    File {
        /// Path of the file.
        path: String,
        /// The system's text.
        reason: String,
    },
}

/// Order in which the threads of a block, and the blocks, run. A right kernel gives the same bits
/// under each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    /// All threads in turn.
    InOrder,
    /// The first warp as far as barriers allow, then the next.
    WarpsAhead,
    /// The same from the last warp and the last block.
    WarpsBehind,
    /// At random, from a seed.
    Shuffled(u32),
}

impl Schedule {
    /// All thread orders that tests try.
    pub const ALL: [Self; 5] =
        [Self::InOrder, Self::WarpsAhead, Self::WarpsBehind, Self::Shuffled(0), Self::Shuffled(1)];

    fn number(self) -> u32 {
        match self {
            Self::InOrder => 0,
            Self::WarpsAhead => 1,
            Self::WarpsBehind => 2,
            Self::Shuffled(seed) => 3u32.saturating_add(seed),
        }
    }
}

/// Totals over the launches so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Counts {
    /// Blocks run.
    pub blocks: u64,
    /// Times that a thread gave way.
    pub switches: u64,
    /// Loads of matrices, each by a warp.
    pub ldmatrix: u64,
    /// Products of matrices, each by a warp.
    pub mma: u64,
    /// Asynchronous copies, each by a thread.
    pub async_copies: u64,
    /// Rows of matrices that waited for a bank.
    pub bank_conflicts: u64,
}

#[repr(C)]
struct RawLaunch {
    kernel: *const c_char,
    params: *const c_void,
    params_bytes: u64,
    grid: [u32; 3],
    threads: u32,
    schedule: u32,
}

type LaunchFn = unsafe extern "C" fn(*const RawLaunch, *mut Counts) -> *const c_char;
type KernelFn = unsafe extern "C" fn(u32, *mut u64) -> *const c_char;

/// The library runs one launch at a time, whoever asks.
static RUNNING: Mutex<()> = Mutex::new(());

/// Sources of the library, and who compiles them.
#[derive(Clone, Debug)]
pub struct Build {
    /// The folder of the kernels; tests of tests have changed ones.
    pub kernels: PathBuf,
    /// The folder of the emulator.
    pub emulator: PathBuf,
    /// Folder in which compiled libraries are kept.
    pub cache: PathBuf,
}

impl Build {
    /// The sources of this crate.
    #[must_use]
    pub fn new(cache: &Path) -> Self {
        let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
        let (kernels, emulator) = (crate_dir.join("kernels"), crate_dir.join("emu"));
        Self { kernels, emulator, cache: cache.to_owned() }
    }

    /// Compiles `main` of the emulator's folder with `flags`, unless that was done before, to
    /// a file with the extension `kind`.
    ///
    /// # Errors
    /// If there is no compiler, or it says no.
    pub fn compile(
        &self,
        main: &str,
        flags: &[&str],
        kind: &str,
    ) -> Result<PathBuf, EmulatorError> {
        let compiler = compiler().ok_or(EmulatorError::NoCompiler)?;
        let mut hasher = blake3::Hasher::new();
        for part in [compiler.as_str(), main].iter().chain(flags) {
            hasher.update(part.as_bytes()).update(b"\0");
        }
        for folder in [&self.kernels, &self.emulator] {
            for path in sources(folder)? {
                let text = std::fs::read(&path).map_err(|error| file_error(&path, error))?;
                hasher.update(path.file_name().unwrap_or_default().as_encoded_bytes());
                hasher.update(&(text.len() as u64).to_le_bytes()).update(&text);
            }
        }
        let stem = main.trim_end_matches(".cpp");
        let name = format!("{stem}-{}.{kind}", &hasher.finalize().to_hex()[..16]);
        let library = self.cache.join(name);
        if library.is_file() {
            return Ok(library);
        }
        std::fs::create_dir_all(&self.cache).map_err(|error| file_error(&self.cache, error))?;
        // Other processes may be at the same: each writes its own file, the last rename stays.
        let own = library.with_extension(format!("{}-{}", std::process::id(), unique()));
        let output = Command::new(&compiler)
            .args(["-std=c++17", "-DHAT_EMULATOR", "-ffp-contract=off", "-Wall", "-Wextra"])
            .args(["-Wno-unknown-pragmas", "-Wno-unused-function", "-Werror"])
            .args(flags)
            .arg("-I")
            .arg(&self.kernels)
            .arg("-I")
            .arg(&self.emulator)
            .arg(self.emulator.join(main))
            .arg("-o")
            .arg(&own)
            .output()
            .map_err(|_| EmulatorError::NoCompiler)?;
        if !output.status.success() {
            let log = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(EmulatorError::Compile { compiler, log });
        }
        std::fs::rename(&own, &library).map_err(|error| file_error(&library, error))?;
        Ok(library)
    }

    /// A folder with a libcuda.so of our own, which runs the kernels on the emulator.
    ///
    /// # Errors
    /// If there is no compiler, or it says no.
    pub fn driver(&self, flags: &[&str]) -> Result<PathBuf, EmulatorError> {
        let common = ["-O2", "-fPIC", "-shared", "-fvisibility=hidden"];
        let library = self.compile("fake_driver.cpp", &[&common, flags].concat(), "so")?;
        let folder = library.with_extension("driver");
        std::fs::create_dir_all(&folder).map_err(|error| file_error(&folder, error))?;
        // Of several tests at once each copies; the last one stays, and all are the same.
        let own = folder.join(format!("{}-{}", std::process::id(), unique()));
        std::fs::copy(&library, &own).map_err(|error| file_error(&own, error))?;
        std::fs::rename(&own, folder.join("libcuda.so"))
            .map_err(|error| file_error(&own, error))?;
        Ok(folder)
    }
}

/// A number that no other thread of this process has.
fn unique() -> u64 {
    let mut hasher = DefaultHasher::new();
    std::hash::Hash::hash(&std::thread::current().id(), &mut hasher);
    hasher.finish()
}

fn file_error(path: &Path, error: impl std::fmt::Display) -> EmulatorError {
    EmulatorError::File { path: path.display().to_string(), reason: error.to_string() }
}

/// The first compiler that can be started.
fn compiler() -> Option<String> {
    let given = std::env::var("CXX").ok().filter(|name| !name.is_empty());
    let known = ["c++", "g++", "clang++"].map(str::to_owned);
    given.into_iter().chain(known).find(|name| {
        Command::new(name).arg("--version").output().is_ok_and(|output| output.status.success())
    })
}

/// The files of a folder that can be included, in order.
fn sources(folder: &Path) -> Result<Vec<PathBuf>, EmulatorError> {
    let entries = std::fs::read_dir(folder).map_err(|error| file_error(folder, error))?;
    let mut paths: Vec<PathBuf> = entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| {
            path.extension().is_some_and(|end| ["h", "cuh", "cu", "cpp"].iter().any(|e| end == *e))
        })
        .collect();
    paths.sort();
    Ok(paths)
}

/// An open library.
struct Functions {
    launch: LaunchFn,
    kernel: KernelFn,
    _library: Library, // last: the functions live in it
}

/// A GPU on the CPU.
pub struct Emulator {
    functions: Arc<Functions>,
    schedule: Schedule,
    counts: Counts,
    allocations: Vec<Weak<Block>>,
    recorder: Option<Recorder>,
}

/// File of launches, to be run again by another build (`emu/replay.cpp`).
struct Recorder {
    folder: PathBuf,
    /// Launches so far, by kernel.
    recorded: Vec<(Kernel, u32)>,
}

/// Launches of one kernel that are written down at most.
const RECORDED_MAX: u32 = 8;

/// Memory of the emulator.
pub struct EmulatorMemory {
    block: Arc<Block>,
}

/// One allocation: margin, content, margin. Kernels write it by its address.
struct Block {
    storage: *mut [u8], // a box
    begin: usize,
    bytes: usize,
}

// SAFETY: the content is touched by kernels, under `RUNNING`, and by copies that hold the
// emulator and the memory; no two threads do so at once.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: it was a box, and nobody else frees it.
        drop(unsafe { Box::from_raw(self.storage) });
    }
}

impl Memory for EmulatorMemory {
    fn address(&self) -> u64 {
        self.block.pointer() as u64
    }

    fn bytes(&self) -> usize {
        self.block.bytes
    }
}

impl Block {
    fn new(bytes: usize) -> Self {
        let storage = vec![POISON; bytes + 2 * MARGIN + ALIGNMENT].into_boxed_slice();
        let storage = Box::into_raw(storage);
        let first = storage.cast::<u8>().addr();
        let begin = (first + MARGIN).next_multiple_of(ALIGNMENT) - first;
        Self { storage, begin, bytes }
    }

    fn pointer(&self) -> *mut u8 {
        self.storage.cast::<u8>().wrapping_add(self.begin)
    }

    /// True if the guard bytes around the content are untouched.
    fn is_whole(&self) -> bool {
        // SAFETY: the storage lives as long as `self`; no kernel runs, see `Send`.
        let all = unsafe { &*self.storage };
        let around = all[..self.begin].iter().chain(&all[self.begin + self.bytes..]);
        around.into_iter().all(|byte| *byte == POISON)
    }
}

impl Emulator {
    /// Compiles the library if needed, and opens it.
    ///
    /// # Errors
    /// If there is no compiler, or it says no.
    pub fn new(build: &Build) -> Result<Self, EmulatorError> {
        let flags = ["-O2", "-fPIC", "-shared", "-fvisibility=hidden"];
        let path = build.compile("emulator.cpp", &flags, "so")?;
        // SAFETY: our own library: no initialiser with requirements; the types are those of
        // emulator.cpp, which is part of its name.
        let functions = unsafe {
            let library = Library::new(&path).map_err(|error| file_error(&path, error))?;
            let launch = *library
                .get::<LaunchFn>(b"hat_emu_launch\0")
                .map_err(|error| file_error(&path, error))?;
            let kernel = *library
                .get::<KernelFn>(b"hat_emu_kernel\0")
                .map_err(|error| file_error(&path, error))?;
            Functions { launch, kernel, _library: library }
        };
        Ok(Self {
            functions: Arc::new(functions),
            schedule: Schedule::InOrder,
            counts: Counts::default(),
            allocations: Vec::new(),
            recorder: None,
        })
    }

    /// Writes launches from now on to files in `folder`, with the memory that they name: some of
    /// each kernel.
    pub fn record_to(&mut self, folder: &Path) {
        self.recorder = Some(Recorder { folder: folder.to_owned(), recorded: Vec::new() });
    }

    /// The order of threads from now on.
    pub fn set_schedule(&mut self, schedule: Schedule) {
        self.schedule = schedule;
    }

    /// Totals over the launches so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// The kernels that the library holds, each with the size of its parameter block.
    #[must_use]
    pub fn kernels(&self) -> Vec<(String, u64)> {
        let entry = |index| {
            let mut bytes = 0;
            // SAFETY: the pointer is to a live number; the text, if any, is a constant.
            let name = unsafe { (self.functions.kernel)(index, &raw mut bytes) };
            // SAFETY: checked; see above.
            let name = (!name.is_null()).then(|| unsafe { CStr::from_ptr(name) })?;
            Some((name.to_string_lossy().into_owned(), bytes))
        };
        (0..).map_while(entry).collect()
    }
}

fn running() -> MutexGuard<'static, ()> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The part of an allocation that a copy touches.
fn part<T: Number>(memory: &EmulatorMemory, at: usize, count: usize) -> *mut u8 {
    let (from, end) = (at * size_of::<T>(), (at + count) * size_of::<T>());
    let bytes = memory.block.bytes;
    assert!(end <= bytes, "bytes {from}..{end} of {bytes}");
    memory.block.pointer().wrapping_add(from)
}

impl Gpu for Emulator {
    type Memory = EmulatorMemory;

    fn describe(&self) -> String {
        "emulator: the kernels as host C++".to_owned()
    }

    fn alloc(&mut self, bytes: usize, _: &'static str) -> Result<EmulatorMemory, GpuError> {
        let block = Arc::new(Block::new(bytes));
        self.allocations.retain(|known| known.strong_count() > 0);
        self.allocations.push(Arc::downgrade(&block));
        Ok(EmulatorMemory { block })
    }

    fn upload<T: Number>(
        &mut self,
        from: &[T],
        to: &mut EmulatorMemory,
        at: usize,
    ) -> Result<(), GpuError> {
        let from = bytes(from);
        let to = part::<T>(to, at, from.len() / size_of::<T>());
        // SAFETY: `part` checked the range; the storage is ours and no kernel runs.
        unsafe { to.copy_from(from.as_ptr(), from.len()) };
        Ok(())
    }

    fn download<T: Number>(
        &mut self,
        from: &EmulatorMemory,
        at: usize,
        to: &mut [T],
    ) -> Result<(), GpuError> {
        let from = part::<T>(from, at, to.len());
        let to = bytes_mut(to);
        // SAFETY: as in `upload`.
        unsafe { from.copy_to(to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    unsafe fn launch<P: Copy>(&mut self, launch: Launch, params: &P) -> Result<(), GpuError> {
        let kernel: Kernel = launch.kernel;
        let failed = |reason: String| GpuError::Launch {
            gpu: GPU.to_owned(),
            kernel: kernel.name(),
            reason,
        };
        let name = CString::new(kernel.name()).expect("names of kernels have no zero byte");
        let raw = RawLaunch {
            kernel: name.as_ptr(),
            params: std::ptr::from_ref(params).cast(),
            params_bytes: size_of::<P>() as u64,
            grid: launch.grid,
            threads: kernel.threads(),
            schedule: self.schedule.number(),
        };
        let mut counts = Counts::default();
        let blocks: Vec<_> = self.allocations.iter().filter_map(Weak::upgrade).collect();
        let guard = running();
        // The same launches come again under other schedules.
        let recorder = self.recorder.as_mut().filter(|_| self.schedule == Schedule::InOrder);
        if let Some(recorder) = recorder {
            // SAFETY: the block is plain numbers and pointers; `abi.h` leaves no padding.
            let params = unsafe { std::slice::from_raw_parts(raw.params.cast(), size_of::<P>()) };
            let recorded = recorder.record(launch, params, &blocks);
            recorded.map_err(|error| failed(format!("recording: {error}")))?;
        }
        // SAFETY: the block has the size that it says, and the caller's promise covers the rest.
        let message = unsafe { (self.functions.launch)(&raw const raw, &raw mut counts) };
        let message = (!message.is_null())
            // SAFETY: a terminated text that lives until the next launch, which waits for `guard`.
            .then(|| unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned());
        if let Some(message) = message {
            return Err(failed(message));
        }
        if !blocks.iter().all(|block| block.is_whole()) {
            return Err(failed("it wrote outside of an allocation".to_owned()));
        }
        drop(guard);
        self.counts.add(counts);
        Ok(())
    }

    fn reach(&mut self, _: &Self) -> Result<Reach, GpuError> {
        Ok(Reach::Same)
    }

    fn copy(
        &mut self,
        bytes: usize,
        from: &EmulatorMemory,
        to: &mut EmulatorMemory,
    ) -> Result<(), GpuError> {
        let (from, to) = (part::<u8>(from, 0, bytes), part::<u8>(to, 0, bytes));
        // SAFETY: `part` checked the ranges; two allocations, and no kernel runs.
        unsafe { to.copy_from_nonoverlapping(from, bytes) };
        Ok(())
    }

    fn fetch(
        &mut self,
        bytes: usize,
        from: &EmulatorMemory,
        to: &mut EmulatorMemory,
    ) -> Result<(), GpuError> {
        self.copy(bytes, from, to)
    }

    fn finish(&mut self) -> Result<(), GpuError> {
        Ok(())
    }
}

impl Recorder {
    /// One file: the kernel, its grid and block, and the memory that it names. Numbers are u64,
    /// little-endian; texts and contents follow their lengths.
    fn record(
        &mut self,
        launch: Launch,
        params: &[u8],
        blocks: &[Arc<Block>],
    ) -> std::io::Result<()> {
        let kernel = launch.kernel;
        let at = self.recorded.iter().position(|(known, _)| *known == kernel);
        let at = at.unwrap_or_else(|| {
            self.recorded.push((kernel, 0));
            self.recorded.len() - 1
        });
        let number = self.recorded[at].1;
        self.recorded[at].1 += 1;
        if number >= RECORDED_MAX {
            return Ok(());
        }
        let mut file = Vec::new();
        let mut part = |part: &[u8]| {
            file.extend((part.len() as u64).to_le_bytes());
            file.extend(part);
        };
        part(kernel.name().as_bytes());
        let [x, y, z] = launch.grid;
        let shape = [x, y, z, kernel.threads()].map(u32::to_le_bytes);
        part(shape.as_flattened());
        part(params);
        for block in blocks {
            let begin = block.pointer() as u64;
            let is_named = |word: &[u8; 8]| {
                let word = u64::from_le_bytes(*word);
                word >= begin && word < begin + block.bytes as u64
            };
            if params.as_chunks().0.iter().any(is_named) {
                part(&begin.to_le_bytes());
                // SAFETY: the content lives as long as the block; no kernel runs.
                part(unsafe { std::slice::from_raw_parts(block.pointer(), block.bytes) });
            }
        }
        let thread = unique();
        let name = format!("{}-{thread:x}-{number}.launch", kernel.name());
        std::fs::write(self.folder.join(name), file)
    }
}

impl Counts {
    fn add(&mut self, more: Self) {
        self.blocks += more.blocks;
        self.switches += more.switches;
        self.ldmatrix += more.ldmatrix;
        self.mma += more.mma;
        self.async_copies += more.async_copies;
        self.bank_conflicts += more.bank_conflicts;
    }
}
