//! Launches and small copies on their way to a stream.
//!
//! Launches are gathered until something needs their results, or they are many. When the same
//! ones come again (the layers of one more decode step), they are captured as a CUDA graph, and go
//! out as one call from then on. Two runs of launches are the same if every kernel, grid and
//! parameter block is: the launchers see to it that a bucket of shapes keeps its addresses.
//!
//! Copies of a step's rows and plans go through pinned memory, so that the caller waits for none.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::memory::Allocation;
use crate::gpu::Launch;

/// Runs of launches that are known at a time; the one unused for longest gives way.
const GRAPHS_MAX: usize = 256;
/// A shorter run is not worth a graph.
const GRAPH_LAUNCHES_MIN: usize = 4;
/// Launches in a run after which it goes out unasked: the GPU begins while the rest of a step is
/// gathered.
const RUN_LAUNCHES_MAX: usize = 64;
/// Pinned bytes for each direction.
const STAGING_BYTES: usize = 8 << 20;
/// Alignment of a copy in pinned memory, in bytes.
const STAGING_ALIGN: usize = 256;
/// Copies from other GPUs between two waits, without an allocation here.
const FETCHES: usize = 8;

/// A call that the driver refused, or an error of work before it.
pub(super) type Failed = (&'static str, DriverError);

/// Counts of the launches and calls that went to the driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LaunchCounts {
    /// Kernels launched one by one.
    pub single: u64,
    /// Graphs launched.
    pub graphs: u64,
    /// Kernels in those graphs.
    pub in_graphs: u64,
    /// Graphs made.
    pub captured: u64,
}

/// Counts of copies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CopyCounts {
    /// From the host.
    pub up_bytes: u64,
    /// To the host.
    pub down_bytes: u64,
    /// Copies from other [`super::Cuda`]s.
    pub fetches: u64,
    /// Bytes that copies from other GPUs fetched.
    pub fetched_bytes: u64,
}

/// A launch, its parameters behind those of the launches before it.
#[derive(Clone, Copy, PartialEq)]
struct Call {
    function: sys::CUfunction,
    launch: Launch,
    params_end: usize,
}

/// A run of launches.
#[derive(Clone, Default, PartialEq)]
struct Run {
    calls: Vec<Call>,
    params: Vec<u64>,
}

impl Run {
    fn launch_all(&self, stream: sys::CUstream) -> Result<(), Failed> {
        let mut begin = 0;
        for Call { function, launch, params_end } in &self.calls {
            let block = self.params[begin..].as_ptr().cast_mut().cast::<c_void>();
            let [x, y, z] = launch.grid;
            let threads = (launch.kernel.threads(), 1, 1);
            // SAFETY: the driver copies the block before the call returns; `Queue::push`'s
            // promise covers what the kernel does with it.
            unsafe {
                result::launch_kernel(*function, (x, y, z), threads, 0, stream, &mut [block])
            }
            .map_err(|error| (launch.kernel.name(), error))?;
            begin = *params_end;
        }
        Ok(())
    }
}

/// A run that was launched before: its launches, and the graph that repeats it.
struct Known {
    run: Run,
    graph: Graph,
    used: u64,
}

enum Graph {
    /// The run came once.
    No,
    Made(sys::CUgraphExec),
    /// The driver would not.
    Never,
}

/// Pinned host memory, from its begin.
struct Staging {
    address: *mut u8,
    used: usize,
}

impl Staging {
    fn new() -> Option<Self> {
        // SAFETY: nothing reads the memory before it is written.
        let address = unsafe { result::malloc_host(STAGING_BYTES, 0) }.ok()?;
        Some(Self { address: address.cast(), used: 0 })
    }

    /// The next `bytes` of it, if there are as many.
    fn take(&mut self, bytes: usize) -> Option<*mut u8> {
        let end = self.used.checked_add(bytes).filter(|end| *end <= STAGING_BYTES)?;
        // SAFETY: within the allocation.
        let at = unsafe { self.address.add(self.used) };
        self.used = end.next_multiple_of(STAGING_ALIGN);
        Some(at)
    }
}

/// Launches and copies that wait for a stream, and the runs that were launched before.
pub(super) struct Queue {
    stream: sys::CUstream,
    pending: Run,
    known: Vec<Known>,
    run_number: u64,
    up: Option<Staging>,
    down: Option<Staging>,
    counts: LaunchCounts,
    copied: CopyCounts,
    /// Memory of other GPUs that copies on their way read.
    fetched: Vec<Arc<Allocation>>,
    /// Failure that no caller has been told of yet.
    failed: Option<Failed>,
}

// SAFETY: the handles and the pinned memory are the queue's own, and the driver takes them from any
// thread in which the context is current.
unsafe impl Send for Queue {}

impl Queue {
    /// A queue before `stream`; the context is current.
    pub(super) fn new(stream: sys::CUstream) -> Self {
        Self {
            stream,
            pending: Run::default(),
            known: Vec::new(),
            run_number: 0,
            up: Staging::new(),
            down: Staging::new(),
            counts: LaunchCounts::default(),
            copied: CopyCounts::default(),
            fetched: Vec::with_capacity(FETCHES),
            failed: None,
        }
    }

    pub(super) fn counts(&self) -> LaunchCounts {
        self.counts
    }

    pub(super) fn copied(&self) -> CopyCounts {
        self.copied
    }

    /// True if enough launches wait for the run to go out.
    pub(super) fn is_long(&self) -> bool {
        self.pending.calls.len() >= RUN_LAUNCHES_MAX
    }

    /// Adds a launch.
    ///
    /// # Safety
    /// As [`crate::gpu::Gpu::launch`]: `params` is the block of this kernel, without padding, and
    /// what it points to lives until the queue is flushed and the stream has run it.
    pub(super) unsafe fn push<P: Copy>(
        &mut self,
        function: sys::CUfunction,
        launch: Launch,
        params: &P,
    ) {
        let Run { calls, params: blocks } = &mut self.pending;
        let begin = blocks.len();
        blocks.resize(begin + size_of::<P>().div_ceil(8), 0);
        // SAFETY: there is room for it since the line above; blocks of `abi.h` have no padding, so
        // all bytes are initialised.
        unsafe {
            let to = blocks[begin..].as_mut_ptr().cast::<u8>();
            std::ptr::from_ref(params).cast::<u8>().copy_to_nonoverlapping(to, size_of::<P>());
        }
        calls.push(Call { function, launch, params_end: blocks.len() });
    }

    /// Gives the stream what waits. The context is current.
    pub(super) fn flush(&mut self) -> Result<(), Failed> {
        if let Some(failed) = self.failed.take() {
            self.pending.calls.clear();
            self.pending.params.clear();
            return Err(failed);
        }
        if self.pending.calls.is_empty() {
            return Ok(());
        }
        self.run_number += 1;
        let run = std::mem::take(&mut self.pending);
        let done = self.launch(&run);
        // The memory is kept for the next run.
        self.pending = run;
        self.pending.calls.clear();
        self.pending.params.clear();
        done
    }

    /// As [`Queue::flush`], where nobody can be told of an error: the next flush says it.
    pub(super) fn flush_unheard(&mut self) {
        if let Err(failed) = self.flush() {
            self.failed = Some(failed);
        }
    }

    fn launch(&mut self, run: &Run) -> Result<(), Failed> {
        let count = run.calls.len() as u64;
        let worth = run.calls.len() >= GRAPH_LAUNCHES_MIN;
        let (run_number, stream) = (self.run_number, self.stream);
        let known = self.known.iter_mut().find(|known| worth && known.run == *run);
        if let Some(known) = known {
            known.used = run_number;
            if matches!(known.graph, Graph::No) {
                known.graph = capture(run, stream);
                self.counts.captured += u64::from(matches!(known.graph, Graph::Made(_)));
            }
            if let Graph::Made(graph) = known.graph {
                self.counts.graphs += 1;
                self.counts.in_graphs += count;
                // SAFETY: the graph was made for this context. Its launches are those that wait
                // now, to the bit, so the promises made for them hold for it.
                return unsafe { result::graph::launch(graph, stream) }
                    .map_err(|error| ("cuGraphLaunch", error));
            }
        } else if worth {
            self.remember(run);
        }
        self.counts.single += count;
        run.launch_all(stream)
    }

    fn remember(&mut self, run: &Run) {
        if self.known.len() == GRAPHS_MAX {
            let oldest = (0..GRAPHS_MAX).min_by_key(|index| self.known[*index].used);
            self.known.swap_remove(oldest.expect("there are some")).forget();
        }
        self.known.push(Known { run: run.clone(), graph: Graph::No, used: self.run_number });
    }

    /// Queues a copy to the GPU behind what waits.
    ///
    /// # Safety
    /// `to` is memory of this context with room for `from`.
    pub(super) unsafe fn upload(
        &mut self,
        to: sys::CUdeviceptr,
        from: &[u8],
    ) -> Result<(), Failed> {
        self.flush()?;
        self.copied.up_bytes += from.len() as u64;
        let staged = self.up.as_mut().and_then(|staging| staging.take(from.len()));
        let from = match staged {
            Some(at) => {
                // SAFETY: `take` gave this many bytes to nobody else since the stream was last
                // waited for.
                unsafe {
                    from.as_ptr().copy_to_nonoverlapping(at, from.len());
                    std::slice::from_raw_parts(at, from.len())
                }
            }
            // Pageable memory is copied before the call returns.
            None => from,
        };
        // SAFETY: the caller's promise; staged bytes stay as they are until the stream is waited
        // for.
        unsafe { result::memcpy_htod_async(to, from, self.stream) }
            .map_err(|error| ("cuMemcpyHtoDAsync", error))
    }

    /// Waits for all that was queued, and copies from the GPU.
    ///
    /// # Safety
    /// `from` is memory of this context that holds at least the bytes of `to`.
    pub(super) unsafe fn download(
        &mut self,
        from: sys::CUdeviceptr,
        to: &mut [u8],
    ) -> Result<(), Failed> {
        self.flush()?;
        self.copied.down_bytes += to.len() as u64;
        let staged = self.down.as_mut().and_then(|staging| staging.take(to.len()));
        if !to.is_empty() {
            let into = match staged {
                // SAFETY: `take` gave this many bytes, and they are initialised by the copy before
                // anyone reads them.
                Some(at) => unsafe { std::slice::from_raw_parts_mut(at, to.len()) },
                None => &mut *to,
            };
            // SAFETY: the caller's promise; both places live until the wait below.
            unsafe { result::memcpy_dtoh_async(into, from, self.stream) }
                .map_err(|error| ("cuMemcpyDtoHAsync", error))?;
        }
        self.wait()?;
        if let Some(at) = staged {
            // SAFETY: the copy above is over.
            unsafe { at.copy_to_nonoverlapping(to.as_mut_ptr(), to.len()) };
        }
        Ok(())
    }

    /// Waits for all that was queued. The context is current.
    pub(super) fn wait(&mut self) -> Result<(), Failed> {
        self.flush()?;
        // SAFETY: the stream lives as long as the queue.
        unsafe { result::stream::synchronize(self.stream) }
            .map_err(|error| ("cuStreamSynchronize", error))?;
        for staging in [&mut self.up, &mut self.down].into_iter().flatten() {
            staging.used = 0;
        }
        self.fetched.clear();
        Ok(())
    }

    /// Queues a copy within the GPU behind what waits.
    ///
    /// # Safety
    /// Both are memory of this context with room for `bytes`.
    pub(super) unsafe fn copy(
        &mut self,
        to: sys::CUdeviceptr,
        from: sys::CUdeviceptr,
        bytes: usize,
    ) -> Result<(), Failed> {
        self.flush()?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream) }
            .map_err(|error| ("cuMemcpyDtoDAsync", error))
    }

    /// Queues a copy of memory that another queue has filled and waited for, and keeps that memory
    /// until the copy is over.
    ///
    /// # Safety
    /// `to` is memory of this context, which is `context`, and `from` of another one that may share
    /// its handle; both have room for `bytes`.
    pub(super) unsafe fn fetch(
        &mut self,
        to: sys::CUdeviceptr,
        context: sys::CUcontext,
        from: &Arc<Allocation>,
        bytes: usize,
    ) -> Result<(), Failed> {
        self.copied.fetches += 1;
        self.copied.fetched_bytes += bytes as u64;
        let (address, its) = (from.address(), from.context().context);
        self.fetched.push(Arc::clone(from));
        if context == its {
            // SAFETY: the caller's promise; the memory is kept above.
            return unsafe { self.copy(to, address, bytes) };
        }
        self.flush()?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: as above; the memory keeps its context.
        unsafe { result::memcpy_peer_async(context, to, its, address, bytes, self.stream) }
            .map_err(|error| ("cuMemcpyPeerAsync", error))
    }

    /// Frees what the queue holds; the context is current and the stream has run all of it.
    pub(super) fn close(&mut self) {
        self.fetched.clear();
        for known in self.known.drain(..) {
            known.forget();
        }
        for staging in [&mut self.up, &mut self.down].into_iter().filter_map(Option::take) {
            // SAFETY: it was allocated once, and no copy is on its way.
            let _ = unsafe { result::free_host(staging.address.cast()) };
        }
    }
}

impl Known {
    fn forget(self) {
        if let Graph::Made(graph) = self.graph {
            // SAFETY: it was made once; the driver waits for a launch of it that still runs.
            let _ = unsafe { result::graph::exec_destroy(graph) };
        }
    }
}

/// A graph of these launches, if the driver makes one.
fn capture(run: &Run, stream: sys::CUstream) -> Graph {
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    // SAFETY: the stream lives, and nothing but the launches below happens to it until the end.
    if unsafe { result::stream::begin_capture(stream, mode) }.is_err() {
        return Graph::Never;
    }
    let launched = run.launch_all(stream);
    // SAFETY: the capture was begun above, and ends here even if a launch was refused.
    let Ok(graph) = (unsafe { result::stream::end_capture(stream) }) else { return Graph::Never };
    if graph.is_null() {
        return Graph::Never;
    }
    let made = launched.ok().and_then(|()| {
        let flags = sys::CUgraphInstantiate_flags(0);
        // SAFETY: the graph came from the driver.
        unsafe { result::graph::instantiate(graph, flags) }.ok()
    });
    // SAFETY: as above; the executable graph does not need it.
    let _ = unsafe { result::graph::destroy(graph) };
    made.map_or(Graph::Never, Graph::Made)
}
