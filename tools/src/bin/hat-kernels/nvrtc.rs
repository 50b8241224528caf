//! NVIDIA's run-time compiler, opened by path: CUDA C++ to a cubin or to PTX, without a GPU.
//!
//! Headers are handed over in memory, so no path of this machine can get into the output.

use std::ffi::{CString, c_char, c_int};
use std::path::Path;
use std::ptr;

use anyhow::{Context as _, bail, ensure};
use libloading::Library;

/// Kind of artefact that the compiler is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// Machine code for one architecture: 86 is `sm_86`.
    Cubin(u32),
    /// Text that a driver translates for its GPU: 80 is `compute_80`.
    Ptx(u32),
}

impl Target {
    /// The name that the compiler knows.
    pub(crate) fn name(self) -> String {
        match self {
            Self::Cubin(arch) => format!("sm_{arch}"),
            Self::Ptx(arch) => format!("compute_{arch}"),
        }
    }
}

/// A file of source text.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Source<'a> {
    /// The name that `#include` and messages use.
    pub(crate) name: &'a str,
    /// Its content.
    pub(crate) text: &'a str,
}

type Program = *mut std::ffi::c_void;
type Create = unsafe extern "C" fn(
    *mut Program,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> c_int;
type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Copy = unsafe extern "C" fn(Program, *mut c_char) -> c_int;
type Destroy = unsafe extern "C" fn(*mut Program) -> c_int;
type Version = unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int;

/// The functions of an open library.
pub(crate) struct Nvrtc {
    create: Create,
    compile: Compile,
    destroy: Destroy,
    version: Version,
    log: (Size, Copy),
    cubin: (Size, Copy),
    ptx: (Size, Copy),
    _library: Library, // last: the functions live in it
}

/// One compilation; destroyed when it goes.
struct Compilation<'a> {
    nvrtc: &'a Nvrtc,
    program: Program,
}

impl Drop for Compilation<'_> {
    fn drop(&mut self) {
        // SAFETY: `program` was made by `create` and is destroyed here alone.
        unsafe { (self.nvrtc.destroy)(&raw mut self.program) };
    }
}

impl Nvrtc {
    /// Opens the library.
    pub(crate) fn open(path: &Path) -> anyhow::Result<Self> {
        let load = || {
            // SAFETY: NVRTC's initialisers have no requirement; the types below are nvrtc.h's.
            unsafe {
                let library = Library::new(path)?;
                let pair = |size: &[u8], copy: &[u8]| -> Result<(Size, Copy), libloading::Error> {
                    Ok((*library.get::<Size>(size)?, *library.get::<Copy>(copy)?))
                };
                Ok(Self {
                    create: *library.get(b"nvrtcCreateProgram\0")?,
                    compile: *library.get(b"nvrtcCompileProgram\0")?,
                    destroy: *library.get(b"nvrtcDestroyProgram\0")?,
                    version: *library.get(b"nvrtcVersion\0")?,
                    log: pair(b"nvrtcGetProgramLogSize\0", b"nvrtcGetProgramLog\0")?,
                    cubin: pair(b"nvrtcGetCUBINSize\0", b"nvrtcGetCUBIN\0")?,
                    ptx: pair(b"nvrtcGetPTXSize\0", b"nvrtcGetPTX\0")?,
                    _library: library,
                })
            }
        };
        let opened: Result<Self, libloading::Error> = load();
        opened.with_context(|| format!("{}: not an NVRTC library", path.display()))
    }

    /// Major and minor version of the CUDA that it belongs to.
    pub(crate) fn version(&self) -> anyhow::Result<(i32, i32)> {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both pointers are to live numbers.
        check("nvrtcVersion", unsafe { (self.version)(&raw mut major, &raw mut minor) })?;
        Ok((major, minor))
    }

    /// Compiles one source; `headers` are what it may include.
    pub(crate) fn compile(
        &self,
        source: Source<'_>,
        headers: &[Source<'_>],
        target: Target,
        flags: &[&str],
    ) -> anyhow::Result<Vec<u8>> {
        let compilation = self.create(source, headers)?;
        let arch = format!("--gpu-architecture={}", target.name());
        let options: Vec<CString> = std::iter::once(arch.as_str())
            .chain(flags.iter().copied())
            .map(|flag| terminated(flag, source.name))
            .collect::<Result<_, _>>()?;
        let pointers: Vec<*const c_char> = options.iter().map(|flag| flag.as_ptr()).collect();
        let count = pointers.len() as c_int;
        // SAFETY: `pointers` holds `count` terminated strings that outlive the call.
        let code = unsafe { (self.compile)(compilation.program, count, pointers.as_ptr()) };
        if code != 0 {
            let log = compilation.output("nvrtcGetProgramLog", self.log)?;
            let log = String::from_utf8_lossy(&log);
            bail!("{} for {}:\n{}", source.name, target.name(), log.trim_end_matches('\0'));
        }
        match target {
            Target::Cubin(_) => compilation.output("nvrtcGetCUBIN", self.cubin),
            Target::Ptx(_) => compilation.output("nvrtcGetPTX", self.ptx),
        }
    }

    fn create(
        &self,
        source: Source<'_>,
        headers: &[Source<'_>],
    ) -> anyhow::Result<Compilation<'_>> {
        let text = terminated(source.text, source.name)?;
        let name = terminated(source.name, source.name)?;
        let strings = |part: fn(&Source<'_>) -> String| -> anyhow::Result<Vec<CString>> {
            headers.iter().map(|header| terminated(&part(header), header.name)).collect()
        };
        let names_kept = strings(|header| header.name.to_owned())?;
        let texts_kept = strings(|header| header.text.to_owned())?;
        let names: Vec<*const c_char> = names_kept.iter().map(|name| name.as_ptr()).collect();
        let texts: Vec<*const c_char> = texts_kept.iter().map(|text| text.as_ptr()).collect();
        let mut program = ptr::null_mut();
        // SAFETY: all strings are terminated and live until the call returns (it copies them);
        // the two lists have as many entries as it is told.
        let code = unsafe {
            (self.create)(
                &raw mut program,
                text.as_ptr(),
                name.as_ptr(),
                headers.len() as c_int,
                texts.as_ptr(),
                names.as_ptr(),
            )
        };
        check("nvrtcCreateProgram", code)?;
        Ok(Compilation { nvrtc: self, program })
    }
}

impl Compilation<'_> {
    fn output(&self, call: &str, (size, copy): (Size, Copy)) -> anyhow::Result<Vec<u8>> {
        let mut bytes = 0;
        // SAFETY: the program lives, the pointer is to a live number.
        check(call, unsafe { size(self.program, &raw mut bytes) })?;
        let mut out = vec![0u8; bytes];
        // SAFETY: `out` has the length that the library asked for.
        check(call, unsafe { copy(self.program, out.as_mut_ptr().cast()) })?;
        Ok(out)
    }
}

fn check(call: &str, code: c_int) -> anyhow::Result<()> {
    ensure!(code == 0, "{call} failed with code {code}"); // nvrtc.h lists them
    Ok(())
}

fn terminated(text: &str, name: &str) -> anyhow::Result<CString> {
    CString::new(text).with_context(|| format!("{name}: a zero byte in the source"))
}
