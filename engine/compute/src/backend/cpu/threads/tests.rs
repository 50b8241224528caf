//! The promise of the pool: each piece runs once, `run` returns when all have ended, and a worker
//! that is parked wakes. A pool that breaks its promise fails here; it does not hang.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::*;

/// Limit that is longer than any machine keeps a thread from a core.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs a test on a thread of its own, and does not wait for ever.
fn bounded(test: impl FnOnce() + Send + 'static) {
    let (ended, is_ended) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        test();
        let _ = ended.send(());
    });
    match is_ended.recv_timeout(2 * PATIENCE) {
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("the pool hangs"),
        _ => thread.join().unwrap_or_else(|payload| std::panic::resume_unwind(payload)),
    }
}

/// Waits for a condition; returns true if it came.
fn came(condition: impl Fn() -> bool) -> bool {
    let began = Instant::now();
    while !condition() {
        if began.elapsed() > PATIENCE {
            return false;
        }
        std::thread::yield_now();
    }
    true
}

impl Threads {
    fn wait_parked(&self) {
        let parked = || self.shared.parked.iter().all(|parked| parked.load(Ordering::SeqCst));
        assert!(came(parked), "a worker without work does not park");
    }
}

#[test]
fn every_element_is_written_once_whatever_the_split() {
    bounded(|| {
        for count in 1..5 {
            let mut threads = Threads::new(count, 0).unwrap();
            for (rows, width, grain) in
                [(1, 1, 16), (1, 100, 16), (7, 33, 8), (3, 64, 16), (0, 5, 1)]
            {
                let mut out = vec![0usize; rows * width + 3];
                threads.columns(&mut out, width, rows, grain, |columns, part| {
                    assert!(columns.start.is_multiple_of(grain));
                    for row in 0..part.rows() {
                        for (out, column) in part.row(row).iter_mut().zip(columns.clone()) {
                            *out += row * width + column + 1;
                        }
                    }
                });
                threads.rows(&mut out, width, rows, |deal, part| {
                    for i in 0..part.rows() {
                        for out in part.row(i) {
                            *out += (deal.first + i * deal.step) * 1000;
                        }
                    }
                });
                for (i, out) in out.iter().enumerate().take(rows * width) {
                    assert_eq!(*out, i + 1 + i / width * 1000);
                }
                assert_eq!(out[rows * width..], [0; 3]);
            }
        }
    });
}

#[test]
fn every_piece_runs_once_in_many_jobs_and_after_a_pause() {
    bounded(|| {
        let mut threads = Threads::new(3, 0).unwrap();
        let counts: [AtomicUsize; 7] = Default::default();
        for i in 0..2000 {
            threads.run(7, &|thread, piece| {
                assert!(thread < 3);
                counts[piece].fetch_add(1, Ordering::Relaxed);
            });
            if i % 500 == 0 {
                threads.wait_parked();
            }
        }
        let counts = counts.map(|count| count.load(Ordering::Relaxed));
        assert_eq!(counts, [2000; 7]);
    });
}

/// The last piece ends only once the caller is seen to wait for it, or has gone on without it.
#[test]
fn a_job_returns_after_its_last_piece() {
    struct Seen {
        started: AtomicBool,
        returned: AtomicBool,
        ended: AtomicUsize,
        ended_late: AtomicBool,
    }
    bounded(|| {
        let mut threads = Threads::new(2, 0).unwrap();
        let pool = Arc::clone(&threads.shared);
        // Leaked: a pool that does not wait would go on reading it.
        let seen: &'static Seen = Box::leak(Box::new(Seen {
            started: AtomicBool::new(false),
            returned: AtomicBool::new(false),
            ended: AtomicUsize::new(0),
            ended_late: AtomicBool::new(false),
        }));
        let job: Job<'static> = Box::leak(Box::new(move |thread: usize, _piece: usize| {
            if thread == 0 {
                assert!(came(|| seen.started.load(Ordering::SeqCst)), "no worker takes a piece");
                return;
            }
            seen.started.store(true, Ordering::SeqCst);
            let before = pool.waits.load(Ordering::SeqCst);
            let is_waited_for = || pool.waits.load(Ordering::SeqCst) > before;
            came(|| is_waited_for() || seen.returned.load(Ordering::SeqCst));
            seen.ended_late.fetch_or(seen.returned.load(Ordering::SeqCst), Ordering::SeqCst);
            seen.ended.fetch_add(1, Ordering::SeqCst);
        }));
        for turn in 1..=100 {
            seen.started.store(false, Ordering::SeqCst);
            threads.run(2, job);
            seen.returned.store(true, Ordering::SeqCst);
            assert!(came(|| seen.ended.load(Ordering::SeqCst) == turn));
            assert!(
                !seen.ended_late.load(Ordering::SeqCst),
                "`run` returned before its last piece"
            );
            seen.returned.store(false, Ordering::SeqCst);
        }
    });
}

/// As many pieces as threads, each of which ends when all have begun: every worker has to take one.
#[test]
fn every_parked_worker_wakes() {
    bounded(|| {
        let mut threads = Threads::new(4, 0).unwrap();
        for _ in 0..50 {
            threads.wait_parked();
            let begun = AtomicUsize::new(0);
            threads.run(4, &|_, _| {
                begun.fetch_add(1, Ordering::SeqCst);
                let all = || begun.load(Ordering::SeqCst) == 4;
                assert!(came(all), "a worker was not woken");
            });
        }
    });
}

#[test]
fn a_pool_without_work_ends() {
    bounded(|| {
        for _ in 0..50 {
            let threads = Threads::new(3, 0).unwrap();
            threads.wait_parked();
        }
    });
}

#[test]
fn a_panic_reaches_the_caller_after_all_have_ended() {
    bounded(|| {
        let mut threads = Threads::new(2, 0).unwrap();
        for guilty in 0..2 {
            let (begun, ended) = (AtomicUsize::new(0), AtomicUsize::new(0));
            let caught = catch_unwind(AssertUnwindSafe(|| {
                threads.run(2, &|thread, _| {
                    begun.fetch_add(1, Ordering::SeqCst);
                    assert!(came(|| begun.load(Ordering::SeqCst) == 2), "one thread has both");
                    assert_ne!(thread, guilty, "planted");
                    ended.fetch_add(1, Ordering::Relaxed);
                });
            }));
            let message = *caught.unwrap_err().downcast::<String>().unwrap();
            assert!(message.contains("planted"), "{message}");
            assert_eq!(ended.load(Ordering::Relaxed), 1);
        }
    });
}

/// Policy and niceness of the thread that asks.
fn priority() -> (Option<i32>, i32) {
    (policy(), rustix::process::getpriority_process(None).unwrap())
}

#[test]
fn workers_are_batch_jobs_with_the_share_they_were_given() {
    bounded(|| {
        let (given, given_nice) = priority();
        // Whoever runs the tests may have chosen another policy: it stays.
        let normal = given == Some(libc::SCHED_OTHER);
        let policy = if normal { Some(libc::SCHED_BATCH) } else { given };
        for nice in [0, 3, 19, 255] {
            let mut threads = Threads::new(3, nice).unwrap();
            let seen = PerThread::new(3, || None);
            let begun = AtomicUsize::new(0);
            threads.run(3, &|thread, _| {
                begun.fetch_add(1, Ordering::SeqCst);
                assert!(came(|| begun.load(Ordering::SeqCst) == 3));
                seen.with(thread, |seen| *seen = Some(priority()));
            });
            assert_eq!(seen.with(0, |seen| *seen), Some((given, given_nice)), "the caller");
            for worker in 1..3 {
                let expected = (policy, (given_nice + i32::from(nice)).min(19));
                assert_eq!(seen.with(worker, |seen| *seen), Some(expected), "nice {nice}");
            }
        }
    });
}
