//! A fixed set of compute threads, and matrices split among them.
//!
//! A job is one closure and a number of pieces. The caller is thread 0; it and the workers claim
//! pieces one by one until none is left, so a worker that the system has not given a core to holds
//! nobody up. Workers wait for a job by spinning for some microseconds and then parking, so an idle
//! engine costs nothing. Nothing is allocated for a job.
//!
//! The unsafe room of this backend beside the instruction sets: a job's borrowed closure is handed
//! to other threads until the job ends, and a matrix is written by several threads at once. Both
//! are safe to use from outside, since only this file splits a [`Part`] or starts a job.

use std::any::Any;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};

/// Turns of a waiting loop before the thread parks: some tens of microseconds.
const SPINS: u32 = 2000;
/// Pieces for each thread, so that a slow one does less.
const PIECES: usize = 4;
/// Rows that a piece has at least, if there are enough for all threads.
const PIECE_ROWS: usize = 8;

/// A job: `job(thread, piece)`.
type Job<'a> = &'a (dyn Fn(usize, usize) + Sync);

/// State shared by the threads.
struct Shared {
    /// Number of the job, its pieces, and the next piece: 32, 16 and 16 bits. A change of the first
    /// starts a job; a piece belongs to the thread that raises the last.
    state: AtomicU64,
    /// Points at the current `Job`; valid while one of its pieces is claimed and not done.
    job: AtomicPtr<()>,
    /// Pieces of the current job that are done.
    done: AtomicUsize,
    /// The first panic of a worker's piece.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// One for each worker: it is parked or about to be.
    parked: Box<[AtomicBool]>,
    /// Workers that have begun to wait for jobs.
    started: AtomicUsize,
    /// The threads end.
    stop: AtomicBool,
    /// Number of times that a caller found pieces of others unfinished.
    #[cfg(test)]
    waits: AtomicUsize,
}

/// Claims the next piece, if there is one.
fn claim(state: &AtomicU64) -> Option<usize> {
    let mut seen = state.load(Ordering::SeqCst);
    loop {
        let (pieces, next) = (seen >> 16 & 0xffff, seen & 0xffff);
        if next >= pieces {
            return None;
        }
        match state.compare_exchange_weak(seen, seen + 1, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => return Some(next as usize),
            Err(now) => seen = now,
        }
    }
}

/// The threads of one backend.
pub(super) struct Threads {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    handles: Vec<Thread>,
}

impl Threads {
    /// `count` threads, the caller among them; the others are as [`compute_priority`] makes them.
    pub(super) fn new(count: usize, nice: u8) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: AtomicPtr::new(std::ptr::null_mut()),
            done: AtomicUsize::new(0),
            panic: Mutex::new(None),
            parked: (1..count).map(|_| AtomicBool::new(false)).collect(),
            started: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            #[cfg(test)]
            waits: AtomicUsize::new(0),
        });
        let mut threads = Self { shared, workers: Vec::new(), handles: Vec::new() };
        for index in 1..count {
            let shared = Arc::clone(&threads.shared);
            let builder = std::thread::Builder::new().name(format!("compute-{index}"));
            let worker = builder.spawn(move || work(&shared, index, nice))?;
            threads.handles.push(worker.thread().clone());
            threads.workers.push(worker);
        }
        // What a thread allocates when it starts is not to fall into a step.
        while threads.shared.started.load(Ordering::Acquire) < threads.workers.len() {
            std::thread::yield_now();
        }
        Ok(threads)
    }

    /// Number of threads that run a job.
    pub(super) fn count(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `job(thread, piece)` once for each piece, and waits for all. At most one piece runs on
    /// a thread at a time.
    ///
    /// # Panics
    /// If a piece panicked; after all have ended.
    fn run(&mut self, pieces: usize, job: Job<'_>) {
        let shared = &*self.shared;
        assert!(pieces <= 0xffff, "{pieces} pieces");
        shared.job.store(std::ptr::from_ref(&job).cast_mut().cast(), Ordering::Relaxed);
        shared.done.store(0, Ordering::Relaxed);
        let number = (shared.state.load(Ordering::Relaxed) >> 32).wrapping_add(1);
        shared.state.store(number << 32 | (pieces as u64) << 16, Ordering::SeqCst);
        self.wake();
        let mut panic = None;
        while let Some(piece) = claim(&shared.state) {
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| job(0, piece))) {
                panic = Some(payload);
            }
            shared.done.fetch_add(1, Ordering::Release);
        }
        // The workers borrow `job`: no way out of this function before their pieces are done.
        let mut turns = 0;
        while shared.done.load(Ordering::Acquire) < pieces {
            #[cfg(test)]
            shared.waits.fetch_add(1, Ordering::SeqCst);
            turns += 1;
            if turns < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        let theirs = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(payload) = panic.or(theirs) {
            std::panic::resume_unwind(payload);
        }
    }

    fn wake(&self) {
        for (parked, handle) in self.shared.parked.iter().zip(&self.handles) {
            if parked.load(Ordering::SeqCst) {
                handle.unpark();
            }
        }
    }

    /// Splits the columns of `out` (rows of `width`, the first `rows` of them) into runs, cut at
    /// multiples of `grain`; `job(columns, part)` fills them.
    pub(super) fn columns<T: Send>(
        &mut self,
        out: &mut [T],
        width: usize,
        rows: usize,
        grain: usize,
        job: impl Fn(Range<usize>, &mut Part<'_, T>) + Sync,
    ) {
        self.columns_each([(out, width)], rows, grain, |_, columns, part| job(columns, part));
    }

    /// As [`Threads::columns`] over several matrices at once, given with their widths;
    /// `job(matrix, columns, part)`.
    pub(super) fn columns_each<T: Send, const N: usize>(
        &mut self,
        outs: [(&mut [T], usize); N],
        rows: usize,
        grain: usize,
        job: impl Fn(usize, Range<usize>, &mut Part<'_, T>) + Sync,
    ) {
        let mut wholes = outs.map(|(out, width)| Part::new(out, width, rows));
        let grains = wholes.each_ref().map(|whole| whole.columns.div_ceil(grain));
        let all: usize = grains.iter().sum();
        if self.count() == 1 || all <= N {
            for (i, whole) in wholes.iter_mut().enumerate() {
                job(i, 0..whole.columns, whole);
            }
            return;
        }
        let pieces = (self.count() * PIECES).min(all);
        self.run(pieces, &|_, piece| {
            // The piece's run of all grains, and what of it each matrix has.
            let (from, end) = (all * piece / pieces, all * (piece + 1) / pieces);
            let mut before = 0;
            for (i, whole) in wholes.iter().enumerate() {
                let cut = |at: usize| {
                    (at.clamp(before, before + grains[i]) - before)
                        .saturating_mul(grain)
                        .min(whole.columns)
                };
                let columns = cut(from)..cut(end);
                before += grains[i];
                if columns.is_empty() {
                    continue;
                }
                // SAFETY: `cut` rises, so these columns belong to this piece alone; they are
                // inside the matrix, which `wholes` borrows until `run` returns.
                let mut part =
                    unsafe { whole.part(columns.start, whole.columns, rows, columns.len()) };
                job(i, columns, &mut part);
            }
        });
    }

    /// Splits `0..count` into runs cut at multiples of `grain`; `job(thread, run)` takes each. A
    /// thread gets its runs in rising order.
    pub(super) fn ranges(
        &mut self,
        count: usize,
        grain: usize,
        job: impl Fn(usize, Range<usize>) + Sync,
    ) {
        let grains = count.div_ceil(grain);
        let pieces = (self.count() * PIECES).min(grains);
        if self.count() == 1 || pieces <= 1 {
            return job(0, 0..count);
        }
        let cut = |i: usize| (grains * i / pieces * grain).min(count);
        self.run(pieces, &|thread, piece| job(thread, cut(piece)..cut(piece + 1)));
    }

    /// Deals the rows of `out` (rows of `width`, the first `rows` of them) in turn to parts:
    /// row `i` of `part` is row `deal.first + i * deal.step` of `out`.
    pub(super) fn rows<T: Send>(
        &mut self,
        out: &mut [T],
        width: usize,
        rows: usize,
        job: impl Fn(Deal, &mut Part<'_, T>) + Sync,
    ) {
        self.rows_of_both(out, width, &mut [(); 0], 0, rows, |deal, part, _| job(deal, part));
    }

    /// As [`Threads::rows`] over the same rows of two matrices.
    pub(super) fn rows_of_both<T: Send, U: Send>(
        &mut self,
        out: &mut [T],
        width: usize,
        other: &mut [U],
        other_width: usize,
        rows: usize,
        job: impl Fn(Deal, &mut Part<'_, T>, &mut Part<'_, U>) + Sync,
    ) {
        let mut whole = Part::new(out, width, rows);
        let mut other = Part::new(other, other_width, rows);
        if self.count() == 1 || rows <= 1 {
            return job(Deal { thread: 0, first: 0, step: 1 }, &mut whole, &mut other);
        }
        let count = self.count();
        let step = (rows / PIECE_ROWS).clamp(count, count * PIECES).min(rows);
        self.run(step, &|thread, first| {
            let mine = (rows - first).div_ceil(step);
            // SAFETY: rows `first + i * step` with `first < step` belong to this piece alone;
            // they are inside `rows`, and `whole` borrows `out` until `run` returns.
            let mut part = unsafe { whole.part(first * width, step * width, mine, width) };
            // SAFETY: the same, of the other matrix.
            let mut other =
                unsafe { other.part(first * other_width, step * other_width, mine, other_width) };
            job(Deal { thread, first, step }, &mut part, &mut other);
        });
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.wake();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of jobs, so it ends in order.
            let _ = worker.join();
        }
    }
}

/// Makes the calling thread one that computes: it keeps the share of the cores that the process
/// was given, less by `nice`, as a batch job (`SCHED_BATCH`), which preempts nobody when it wakes.
/// Needs no privilege; where the system refuses, the thread stays as it is.
pub fn compute_priority(nice: u8) {
    let set = || -> std::io::Result<()> {
        if policy() == Some(libc::SCHED_OTHER) {
            set_policy(libc::SCHED_BATCH)?;
        }
        if nice > 0 {
            let given = rustix::process::getpriority_process(None)?;
            rustix::process::setpriority_process(None, (given + i32::from(nice)).min(19))?;
        }
        Ok(())
    };
    if let Err(error) = set() {
        tracing::debug!(%error, "a compute thread keeps its priority");
    }
}

/// The calling thread's scheduling policy.
fn policy() -> Option<i32> {
    // SAFETY: no pointer is passed; 0 is the calling thread.
    let policy = unsafe { libc::syscall(libc::SYS_sched_getscheduler, 0) };
    i32::try_from(policy).ok().filter(|policy| *policy >= 0)
}

/// Gives the calling thread a policy without a priority of its own.
fn set_policy(policy: i32) -> std::io::Result<()> {
    // struct sched_param of the kernel: one int, the priority.
    let priority: libc::c_int = 0;
    // SAFETY: 0 is the calling thread, and the kernel reads one int behind the pointer.
    let result =
        unsafe { libc::syscall(libc::SYS_sched_setscheduler, 0, policy, &raw const priority) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// The loop of a worker.
fn work(shared: &Shared, index: usize, nice: u8) {
    compute_priority(nice);
    let parked = &shared.parked[index - 1];
    let mut turns = 0;
    shared.started.fetch_add(1, Ordering::Release);
    while !shared.stop.load(Ordering::SeqCst) {
        if let Some(piece) = claim(&shared.state) {
            run_piece(shared, index, piece);
            turns = 0;
        } else if turns < SPINS {
            turns += 1;
            std::hint::spin_loop();
        } else {
            parked.store(true, Ordering::SeqCst);
            let state = shared.state.load(Ordering::SeqCst);
            if state & 0xffff >= state >> 16 & 0xffff && !shared.stop.load(Ordering::SeqCst) {
                std::thread::park();
            }
            parked.store(false, Ordering::SeqCst);
            turns = 0;
        }
    }
}

fn run_piece(shared: &Shared, index: usize, piece: usize) {
    let job = shared.job.load(Ordering::Relaxed).cast::<Job<'_>>();
    // SAFETY: `run` stored the address of its argument before it made this piece claimable, and
    // does not return before the piece is counted as done below.
    let job = unsafe { *job };
    if let Err(payload) = catch_unwind(AssertUnwindSafe(|| job(index, piece))) {
        *shared.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(payload);
    }
    shared.done.fetch_add(1, Ordering::Release);
}

/// Rows that [`Threads::rows`] dealt to a part.
#[derive(Clone, Copy)]
pub(super) struct Deal {
    /// The thread that has it.
    pub(super) thread: usize,
    /// Row of the matrix that is row 0 of the part.
    pub(super) first: usize,
    /// Rows of the matrix from one row of the part to the next.
    pub(super) step: usize,
}

/// Some columns of some rows of a matrix, held by one thread.
pub(super) struct Part<'a, T> {
    start: NonNull<T>,
    /// Elements from one row to the next.
    stride: usize,
    rows: usize,
    columns: usize,
    matrix: PhantomData<&'a mut [T]>,
}

// SAFETY: a part is a mutable borrow of elements that no other part has.
unsafe impl<T: Send> Send for Part<'_, T> {}
// SAFETY: a shared part gives no element away, except to `part`, whose caller keeps parts apart.
unsafe impl<T: Send> Sync for Part<'_, T> {}

impl<'a, T> Part<'a, T> {
    /// The first `rows` rows of a matrix of `width` columns.
    ///
    /// # Panics
    /// If `out` is shorter.
    pub(super) fn new(out: &'a mut [T], width: usize, rows: usize) -> Self {
        let needed = rows.checked_mul(width).expect("a matrix fits the address space");
        assert!(out.len() >= needed, "{rows} rows of {width} in {} elements", out.len());
        let start = NonNull::from(out).cast();
        Self { start, stride: width, rows, columns: width, matrix: PhantomData }
    }

    /// `rows` runs of `columns` elements, from element `first`, `stride` apart.
    ///
    /// # Safety
    /// The runs are inside this matrix, and no two parts that live at the same time overlap.
    unsafe fn part(&self, first: usize, stride: usize, rows: usize, columns: usize) -> Part<'a, T> {
        // SAFETY: the caller's promise; a part without rows points at the end at most.
        let start = unsafe { self.start.add(first) };
        Part { start, stride, rows, columns, matrix: PhantomData }
    }

    /// Number of rows.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// A range of its columns.
    ///
    /// # Panics
    /// If it has not so many.
    pub(super) fn columns(&mut self, columns: Range<usize>) -> Part<'_, T> {
        assert!(columns.end <= self.columns, "columns {columns:?} of {}", self.columns);
        // SAFETY: inside this part, which is borrowed as long as the new one lives.
        unsafe { self.part(columns.start, self.stride, self.rows, columns.len()) }
    }

    /// One row.
    ///
    /// # Panics
    /// If there is no such row.
    #[inline(always)]
    pub(super) fn row(&mut self, row: usize) -> &mut [T] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: row < rows, so the run is inside the matrix; `&mut self` borrows this part,
        // and no other part has these elements.
        unsafe {
            let start = self.start.add(row * self.stride).as_ptr();
            std::slice::from_raw_parts_mut(start, self.columns)
        }
    }
}

/// One value for each thread, reached without contention.
pub(super) struct PerThread<T>(Box<[Mutex<T>]>);

impl<T> PerThread<T> {
    pub(super) fn new(count: usize, mut one: impl FnMut() -> T) -> Self {
        Self((0..count).map(|_| Mutex::new(one())).collect())
    }

    /// Runs `f` on each value.
    pub(super) fn each(&mut self, f: impl FnMut(&mut T)) {
        let values = self.0.iter_mut();
        values.map(|one| one.get_mut().unwrap_or_else(PoisonError::into_inner)).for_each(f);
    }

    /// Runs `f` on the value of `thread`.
    pub(super) fn with<R>(&self, thread: usize, f: impl FnOnce(&mut T) -> R) -> R {
        f(&mut self.0[thread].lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests;
