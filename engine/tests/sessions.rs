//! An open session that waits costs its pages, and next to nothing beside them.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hat_engine::{Cloud, CloudConfig};
use hat_transport::endpoint::Event;
use hat_transport::message::Message;
use support::Bundles;
use support::hand::Hand;

/// Counts bytes that are allocated and not given back.
struct Counting;

static BYTES: AtomicUsize = AtomicUsize::new(0);

#[expect(unsafe_code, reason = "a global allocator; it only counts")]
// SAFETY: every call goes to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        BYTES.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        BYTES.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise. Pages that nobody touches stay the system's.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        BYTES.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const SESSIONS: u32 = 5000;
/// Bytes of a session beside its pages: what the cloud keeps of it, and its places in maps.
const SESSION_BYTES_MAX: usize = 1024;

/// One test in this binary: others would allocate meanwhile.
#[test]
fn five_thousand_sessions_cost_little_beside_their_pages() {
    let bundles = Bundles::generated(1, 0);
    let mut config = CloudConfig::new(bundles.path.join("cloud")).threads(1);
    config.limits.sessions_max = SESSIONS;
    config.limits.sessions_per_device_max = SESSIONS;
    config.limits.kv_rows_max = SESSIONS * 96;
    let cloud = Cloud::start(config).unwrap();
    let mut hand = Hand::connect(&bundles, &cloud);
    let mut opened = 0;
    let mut open = |sessions: std::ops::RangeInclusive<u32>| {
        for session in sessions {
            hand.open(session, |open| open.rows_max = 32);
            if session % 200 == 0 {
                while opened < session {
                    hand.turn_for(Duration::from_millis(1), |event| {
                        if let Event::Frame { frame, .. } = event {
                            let message = Message::decode(frame.kind, &frame.body);
                            assert!(matches!(message.unwrap(), Message::Opened(_)));
                            opened += 1;
                        }
                    });
                }
            }
        }
    };
    open(1..=200);
    let before = BYTES.load(Ordering::Relaxed);
    open(201..=SESSIONS);
    let bytes = BYTES.load(Ordering::Relaxed).saturating_sub(before) / (SESSIONS as usize - 200);
    println!("{bytes} bytes a session");
    assert!(bytes > 0 && bytes <= SESSION_BYTES_MAX, "{bytes} bytes a session");
    assert_eq!(cloud.counters().sessions.load(Ordering::Relaxed), u64::from(SESSIONS));
}
