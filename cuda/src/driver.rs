//! A GPU through NVIDIA's driver, which is looked for when it is wanted.
//!
//! One stream, one owner. Nothing here panics where the driver is missing or broken: the library
//! and every function are looked up before the first call. An error that loses the GPU (a fault in
//! a kernel) is kept, and every later call gives it again.

mod event;
mod load;
mod memory;
mod queue;
mod register;

use std::ffi::c_void;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::{result, sys};

pub use self::event::Mark;
pub use self::load::Usage;
use self::memory::Allocation;
pub use self::memory::CudaMemory;
pub use self::queue::{CopyCounts, LaunchCounts};
use self::queue::{Failed, Queue};
use self::register::Weights;

use crate::artefact::{self, Form};
use crate::gpu::{Gpu, GpuError, HostMap, Launch, Memory as _, Number, Reach, bytes, bytes_mut};
use crate::kernel::Kernel;

/// Lowest driver whose CUDA reads our cubins: 12.0.
const VERSION_MIN: i32 = 12_000;
/// Lowest driver whose CUDA reads our PTX, which is of ISA 8.5: 12.5.
const VERSION_MIN_PTX: i32 = 12_050;

/// Every function that is called below, with spaces between them.
const FUNCTIONS: &str = "\
    cuCtxEnablePeerAccess cuCtxSetCurrent cuDeviceCanAccessPeer cuDeviceGet cuDeviceGetAttribute \
    cuDeviceGetCount cuDeviceGetName cuDevicePrimaryCtxRelease_v2 cuDevicePrimaryCtxRetain \
    cuDevicePrimaryCtxSetFlags_v2 cuDriverGetVersion cuEventCreate cuEventDestroy_v2 \
    cuEventElapsedTime cuEventRecord cuFuncGetAttribute cuFuncSetAttribute cuGetErrorName \
    cuGraphDestroy cuGraphExecDestroy cuGraphInstantiateWithFlags cuGraphLaunch cuInit \
    cuLaunchKernel cuMemAlloc_v2 cuMemFreeHost cuMemFree_v2 cuMemHostAlloc \
    cuMemHostGetDevicePointer_v2 cuMemHostRegister_v2 cuMemHostUnregister cuMemcpyDtoDAsync_v2 \
    cuMemcpyDtoHAsync_v2 cuMemcpyHtoDAsync_v2 cuMemcpyPeerAsync cuModuleGetFunction \
    cuModuleLoadDataEx cuModuleUnload cuStreamBeginCapture_v2 cuStreamCreate cuStreamDestroy_v2 \
    cuStreamEndCapture cuStreamSynchronize";

/// Reason that a GPU can't be used; one line each.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// There is no libcuda.
    #[error("no NVIDIA driver: libcuda is not installed")]
    NoDriver,
    /// A libcuda that only programs can be linked with, or a very old one.
    #[error("libcuda is no whole driver ({0}); a toolkit's stub may stand before the real one")]
    Stub(String),
    /// The driver is older than the kernels.
    #[error("the NVIDIA driver is for CUDA {found}; {what} needs {needed}: update the driver")]
    TooOld {
        /// The driver's CUDA.
        found: String,
        /// Part that does not work with this driver.
        what: &'static str,
        /// The lowest that does.
        needed: String,
    },
    /// The driver knows no GPU.
    #[error("the NVIDIA driver finds no GPU")]
    NoGpu,
    /// There are GPUs, but not this one.
    #[error("GPU {ordinal} of {count}: there is none with this number")]
    NoSuchGpu {
        /// Ordinal that was asked for, from 0.
        ordinal: usize,
        /// Number of GPUs that the driver knows.
        count: usize,
    },
    /// The GPU lacks instructions that the kernels use.
    #[error("{name} has compute capability {capability}; the kernels need 8.0")]
    OldGpu {
        /// The GPU's name.
        name: String,
        /// Its compute capability.
        capability: String,
    },
    /// The driver's compiler refuses our PTX.
    #[error("the driver does not translate the PTX of {module} ({reason}): {log}")]
    Ptx {
        /// The kernel file.
        module: &'static str,
        /// The driver's name for it.
        reason: String,
        /// The compiler's messages, in one line.
        log: String,
    },
    /// Another error of the driver.
    #[error("{what} failed: {reason}")]
    Driver {
        /// Name of the call that failed.
        what: &'static str,
        /// The driver's name for it.
        reason: String,
    },
}

fn name_of(error: result::DriverError) -> String {
    match error.error_name() {
        Ok(name) => name.to_string_lossy().into_owned(),
        Err(_) => format!("error {}", error.0 as u32),
    }
}

fn open_error(what: &'static str) -> impl Fn(result::DriverError) -> OpenError {
    move |error| OpenError::Driver { what, reason: name_of(error) }
}

fn version(number: i32) -> String {
    format!("{}.{}", number / 1000, number % 1000 / 10)
}

/// Number of GPUs that the driver knows.
///
/// # Errors
/// If there is no driver that can be used.
pub fn gpu_count() -> Result<usize, OpenError> {
    // SAFETY: opening libcuda runs its initialisers, which ask nothing of us.
    if !unsafe { sys::is_culib_present() } {
        return Err(OpenError::NoDriver);
    }
    // SAFETY: it is present, so this does not panic.
    let library = unsafe { sys::culib() };
    for name in FUNCTIONS.split(' ') {
        // SAFETY: the symbol is only looked for.
        let found = unsafe { library.get::<*const c_void>(name.as_bytes()) };
        if found.is_err() {
            return Err(OpenError::Stub(format!("it has no {name}")));
        }
    }
    match result::init() {
        Ok(()) => {}
        Err(error) if error.0 == sys::CUresult::CUDA_ERROR_STUB_LIBRARY => {
            return Err(OpenError::Stub(name_of(error)));
        }
        Err(error) if error.0 == sys::CUresult::CUDA_ERROR_NO_DEVICE => {
            return Err(OpenError::NoGpu);
        }
        Err(error) => return Err(open_error("cuInit")(error)),
    }
    let count = result::device::get_count().map_err(open_error("cuDeviceGetCount"))?;
    Ok(usize::try_from(count).unwrap_or(0))
}

fn driver_version() -> Result<i32, OpenError> {
    let mut number = 0;
    // SAFETY: the pointer is to a live number.
    let code = unsafe { sys::cuDriverGetVersion(&raw mut number) };
    code.result().map_err(open_error("cuDriverGetVersion"))?;
    Ok(number)
}

fn capability(device: sys::CUdevice) -> Result<u32, OpenError> {
    use sys::CUdevice_attribute_enum as Attribute;
    let attribute = |attribute| {
        // SAFETY: the device came from the driver.
        unsafe { result::device::get_attribute(device, attribute) }
            .map_err(open_error("cuDeviceGetAttribute"))
    };
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    Ok(u32::try_from(major * 10 + minor).unwrap_or(0))
}

/// A GPU's context and stream, kept alive by all memory of the GPU.
struct Context {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// Copies and launches that wait for the stream. Memory that goes away empties it first.
    queue: Option<Mutex<Queue>>,
    modules: Vec<sys::CUmodule>,
    name: String,
}

// SAFETY: the driver's handles may be used from any thread; each call makes the context current
// first, and the stream has one owner.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    fn make_current(&self) -> Result<(), result::DriverError> {
        // SAFETY: the context was retained and is released when this goes.
        unsafe { result::ctx::set_current(self.context) }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        let queue = self.queue.as_ref().expect("made before the context is handed out");
        queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // What fails here fails because the GPU is lost, and then there is nothing to free.
        let _ = self.make_current();
        if let Some(queue) = &mut self.queue {
            // SAFETY: the stream lives; its work is over before what it uses goes.
            let _ = unsafe { result::stream::synchronize(self.stream) };
            queue.get_mut().unwrap_or_else(PoisonError::into_inner).close();
        }
        if !self.stream.is_null() {
            // SAFETY: the stream was made for this context and is destroyed here alone.
            let _ = unsafe { result::stream::destroy(self.stream) };
        }
        for module in &self.modules {
            // SAFETY: as the stream.
            let _ = unsafe { result::module::unload(*module) };
        }
        // SAFETY: it was retained once.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// Way in which a thread waits for a GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wait {
    /// As the driver chooses: it spins while there are more cores than contexts, and yields else.
    #[default]
    Driver,
    /// Asleep until the GPU's interrupt: no core is taken, and each wait is longer.
    Asleep,
}

/// Choices for [`Cuda::open_with`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// PTX through the driver's compiler, also where there is machine code for the GPU.
    pub ptx: bool,
    /// Way in which threads of this process wait for this GPU.
    pub wait: Wait,
}

/// One GPU, and the stream on which it works.
pub struct Cuda {
    context: Arc<Context>,
    form: Form,
    /// By the number of the kernel.
    functions: Vec<sys::CUfunction>,
    weights: Weights,
    /// Reason that the GPU is lost, if it is.
    lost: Option<String>,
}

// SAFETY: functions belong to the context's modules; see there.
unsafe impl Send for Cuda {}

impl Cuda {
    /// Opens a GPU and loads the kernels.
    ///
    /// # Errors
    /// If it can't be used; the error says why and what to do.
    pub fn open(ordinal: usize) -> Result<Self, OpenError> {
        Self::open_with(ordinal, Options::default())
    }

    /// As [`Cuda::open`], with other choices than the usual ones.
    ///
    /// # Errors
    /// As [`Cuda::open`].
    pub fn open_with(ordinal: usize, options: Options) -> Result<Self, OpenError> {
        let count = gpu_count()?;
        let too_old = |what, found, needed| {
            let (found, needed) = (version(found), version(needed));
            Err(OpenError::TooOld { found, what, needed })
        };
        let found = driver_version()?;
        if found < VERSION_MIN {
            return too_old("the kernels' machine code", found, VERSION_MIN);
        }
        if count == 0 {
            return Err(OpenError::NoGpu);
        }
        let number = i32::try_from(ordinal).ok().filter(|_| ordinal < count);
        let number = number.ok_or(OpenError::NoSuchGpu { ordinal, count })?;
        let device = result::device::get(number).map_err(open_error("cuDeviceGet"))?;
        let name = result::device::get_name(device).map_err(open_error("cuDeviceGetName"))?;
        let capability = capability(device)?;
        let Some(form) = artefact::form(capability) else {
            let capability = format!("{}.{}", capability / 10, capability % 10);
            return Err(OpenError::OldGpu { name, capability });
        };
        let form = if options.ptx { Form::Ptx } else { form };
        if form == Form::Ptx && found < VERSION_MIN_PTX {
            return too_old("PTX for this GPU", found, VERSION_MIN_PTX);
        }
        if options.wait == Wait::Asleep {
            let flags = sys::CUctx_flags::CU_CTX_SCHED_BLOCKING_SYNC as u32;
            // SAFETY: the device came from the driver.
            unsafe { sys::cuDevicePrimaryCtxSetFlags_v2(device, flags) }
                .result()
                .map_err(open_error("cuDevicePrimaryCtxSetFlags"))?;
        }
        // SAFETY: the device came from the driver.
        let handle = unsafe { result::primary_ctx::retain(device) }
            .map_err(open_error("cuDevicePrimaryCtxRetain"))?;
        let (stream, modules) = (std::ptr::null_mut(), Vec::new());
        let mut context = Context { device, context: handle, stream, queue: None, modules, name };
        context.make_current().map_err(open_error("cuCtxSetCurrent"))?;
        context.stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(open_error("cuStreamCreate"))?;
        context.queue = Some(Mutex::new(Queue::new(context.stream)));
        let mut functions = vec![std::ptr::null_mut(); Kernel::ALL.len()];
        for artefact in artefact::ALL {
            load::load(artefact, form, &mut context, &mut functions)?;
        }
        let weights = Weights::of(device);
        Ok(Self { context: Arc::new(context), form, functions, weights, lost: None })
    }

    /// The form of the code that runs.
    #[must_use]
    pub fn form(&self) -> Form {
        self.form
    }

    /// Reads no weights in place from now on.
    pub fn copy_weights(&mut self) {
        self.weights = Weights::Copied;
    }

    /// True if the GPU is lost to this process.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.lost.is_some()
    }

    /// Counts of the launches and calls that went to the driver so far.
    #[must_use]
    pub fn launch_counts(&self) -> LaunchCounts {
        self.context.queue().counts()
    }

    /// Counts of copies so far, over the host and from other GPUs.
    #[must_use]
    pub fn copy_counts(&self) -> CopyCounts {
        self.context.queue().copied()
    }

    /// Runs calls on the queue, with the context current.
    fn with_queue(
        &mut self,
        work: impl FnOnce(&mut Queue) -> Result<(), Failed>,
    ) -> Result<(), GpuError> {
        let current = self.context.make_current();
        self.check("cuCtxSetCurrent", current)?;
        let done = work(&mut self.context.queue());
        let (what, done) = match done {
            Ok(()) => return Ok(()),
            Err((what, error)) => (what, Err(error)),
        };
        self.check(what, done)
    }

    fn lost(&self) -> Result<(), GpuError> {
        let gpu = || self.context.name.clone();
        match &self.lost {
            Some(reason) => Err(GpuError::Lost { gpu: gpu(), reason: reason.clone() }),
            None => Ok(()),
        }
    }

    /// Sorts an error: the GPU is lost unless the call was merely refused.
    fn check<T>(
        &mut self,
        what: &'static str,
        result: Result<T, result::DriverError>,
    ) -> Result<T, GpuError> {
        use sys::CUresult as Code;
        result.map_err(|error| {
            let (gpu, name) = (self.context.name.clone(), name_of(error));
            let reason = format!("{what}: {name}");
            match error.0 {
                Code::CUDA_ERROR_INVALID_VALUE
                | Code::CUDA_ERROR_INVALID_IMAGE
                | Code::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES
                | Code::CUDA_ERROR_NOT_SUPPORTED => {
                    GpuError::Launch { gpu, kernel: what, reason: name }
                }
                _ => {
                    self.lost = Some(reason.clone());
                    GpuError::Lost { gpu, reason }
                }
            }
        })
    }
}

/// The part of an allocation that a copy touches.
fn part<T: Number>(memory: &CudaMemory, at: usize, count: usize) -> sys::CUdeviceptr {
    let (from, end) = (at * size_of::<T>(), (at + count) * size_of::<T>());
    assert!(end <= memory.bytes(), "bytes {from}..{end} of {}", memory.bytes());
    memory.address() + from as u64
}

/// As [`part`], to write.
fn part_mut<T: Number>(memory: &CudaMemory, at: usize, count: usize) -> sys::CUdeviceptr {
    assert!(!memory.allocation().is_in_place(), "a copy to host memory that is read in place");
    part::<T>(memory, at, count)
}

/// Lets work of `context` read and write memory of `other`; whether that can be.
fn give_access(context: &Context, other: &Context) -> Result<bool, result::DriverError> {
    let mut can = 0;
    // SAFETY: the devices came from the driver, the pointer is to a live number.
    unsafe { sys::cuDeviceCanAccessPeer(&raw mut can, context.device, other.device) }.result()?;
    if can == 0 {
        return Ok(false);
    }
    context.make_current()?;
    // SAFETY: both contexts are retained; what is copied from `other` keeps it so.
    let enabled = unsafe { sys::cuCtxEnablePeerAccess(other.context, 0) }.result();
    let already = sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED;
    Ok(match enabled {
        Ok(()) => true,
        // What it refuses it copies through the host.
        Err(error) => error.0 == already,
    })
}

impl Gpu for Cuda {
    type Memory = CudaMemory;

    fn describe(&self) -> String {
        let form = match self.form {
            Form::Cubin(capability) => format!("sm_{capability}"),
            Form::Ptx => "PTX of compute_80".to_owned(),
        };
        format!("{}: {form}, {}", self.context.name, self.weights.describe())
    }

    fn alloc(&mut self, bytes: usize, purpose: &'static str) -> Result<CudaMemory, GpuError> {
        self.lost()?;
        let current = self.context.make_current();
        self.check("cuCtxSetCurrent", current)?;
        // SAFETY: the context is current.
        match unsafe { Allocation::new(&self.context, bytes) } {
            Ok(allocation) => Ok(CudaMemory::new(allocation)),
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                Err(GpuError::OutOfMemory { gpu: self.context.name.clone(), bytes, purpose })
            }
            Err(error) => self.check("cuMemAlloc", Err(error)),
        }
    }

    fn upload<T: Number>(
        &mut self,
        from: &[T],
        to: &mut CudaMemory,
        at: usize,
    ) -> Result<(), GpuError> {
        self.lost()?;
        let address = part_mut::<T>(to, at, from.len());
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: `part` checked the range.
        self.with_queue(|queue| unsafe { queue.upload(address, bytes(from)) })
    }

    fn download<T: Number>(
        &mut self,
        from: &CudaMemory,
        at: usize,
        to: &mut [T],
    ) -> Result<(), GpuError> {
        self.lost()?;
        let address = part::<T>(from, at, to.len());
        // SAFETY: `part` checked the range.
        self.with_queue(|queue| unsafe { queue.download(address, bytes_mut(to)) })
    }

    unsafe fn launch<P: Copy>(&mut self, launch: Launch, params: &P) -> Result<(), GpuError> {
        self.lost()?;
        let function = self.functions[launch.kernel as usize];
        // SAFETY: the caller's promise; memory that goes away flushes the queue first.
        unsafe { self.context.queue().push(function, launch, params) };
        let is_long = self.context.queue().is_long();
        if is_long { self.with_queue(Queue::flush) } else { Ok(()) }
    }

    fn reach(&mut self, other: &Self) -> Result<Reach, GpuError> {
        self.lost()?;
        let (own, its) = (Arc::clone(&self.context), &other.context);
        if own.context == its.context {
            return Ok(Reach::Same);
        }
        // A copy may be driven from either end.
        let mut reach = Reach::Peer;
        for (from, to) in [(its, &own), (&own, its)] {
            let given = give_access(from, to);
            if !self.check("cuCtxEnablePeerAccess", given)? {
                reach = Reach::Staged;
            }
        }
        Ok(reach)
    }

    fn copy(
        &mut self,
        bytes: usize,
        from: &CudaMemory,
        to: &mut CudaMemory,
    ) -> Result<(), GpuError> {
        self.lost()?;
        let (from, to) = (part::<u8>(from, 0, bytes), part_mut::<u8>(to, 0, bytes));
        // SAFETY: `part` checked the ranges, and memory of this GPU waits for it when it goes.
        self.with_queue(|queue| unsafe { queue.copy(to, from, bytes) })
    }

    fn fetch(
        &mut self,
        bytes: usize,
        from_memory: &CudaMemory,
        to: &mut CudaMemory,
    ) -> Result<(), GpuError> {
        let from = from_memory.allocation();
        if Arc::ptr_eq(from.context(), &self.context) {
            // The queue would keep itself.
            return self.copy(bytes, from_memory, to);
        }
        self.lost()?;
        let _ = part::<u8>(from_memory, 0, bytes);
        let (address, context) = (part_mut::<u8>(to, 0, bytes), self.context.context);
        // SAFETY: `part` checked the ranges; the queue keeps where it copies from.
        self.with_queue(|queue| unsafe { queue.fetch(address, context, from, bytes) })
    }

    fn finish(&mut self) -> Result<(), GpuError> {
        self.lost()?;
        self.with_queue(Queue::wait)
    }

    fn in_place(&mut self, map: &HostMap, range: Range<usize>) -> Option<CudaMemory> {
        let all = (**map).as_ref().len();
        assert!(range.start <= range.end && range.end <= all, "{range:?} of {all}");
        if range.is_empty() || self.context.make_current().is_err() {
            return None;
        }
        let (registered, address) = self.weights.register(&self.context, map, range.start)?;
        let memory = Allocation::in_place(&self.context, registered, address, range.len());
        Some(CudaMemory::new(memory))
    }
}
