//! Tests of admission, eviction and the return of pages.

use hat_transport::message::{End, Message, RowsHead, SessionErrorCode, Want};

use super::super::LinkEvent;
use super::bed::{Bed, Heard, MS, prompt};
use super::ledger::digest;

fn retry_of(heard: &[Heard]) -> u32 {
    match heard {
        [Heard::Busy(ms)] => *ms,
        other => panic!("{other:?}"),
    }
}

/// Out of pages a device is told when to come back, and gets in when another one has ended. One
/// that was refused three times goes before one that comes by.
#[test]
fn out_of_pages_devices_come_back_and_take_turns() {
    let mut bed = Bed::with(4, |_| {});
    let (first, waits, passer) = (bed.connect(), bed.connect(), bed.connect());
    bed.open(first, 1, &[]);
    assert_eq!(bed.heard(first, 1), [Heard::Opened(0)]);
    for time in 1..=3 {
        bed.open(waits, time, &[]);
        let retry = retry_of(&bed.heard(waits, time));
        assert!((50..=10_000).contains(&retry), "{retry}");
        // The session at work is not idle: it sends a row now and then.
        bed.now += retry * MS;
        bed.rows(first, 1, prompt(time, 1), &[], &[time]);
        bed.settle();
    }
    assert_eq!(bed.core.figures().busy, 3);
    bed.message(first, 1, &Message::End(End::default()));
    bed.open(passer, 1, &[]);
    retry_of(&bed.heard(passer, 1));
    bed.open(waits, 4, &[]);
    assert_eq!(bed.heard(waits, 4), [Heard::Opened(0)]);
    bed.message(waits, 4, &Message::End(End::default()));
    bed.open(passer, 2, &[]);
    assert_eq!(bed.heard(passer, 2), [Heard::Opened(0)]);
    bed.message(passer, 2, &Message::End(End::default()));
    let figures = bed.core.figures();
    assert_eq!((figures.sessions, figures.pages_free, figures.evicted), (0, 4, 0));
}

/// A session of which nothing is heard gives way, but not one that has rows on their way.
#[test]
fn an_idle_session_gives_way_and_a_busy_one_does_not() {
    let mut bed = Bed::with(8, |_| {});
    let (idle, busy, next) = (bed.connect(), bed.connect(), bed.connect());
    bed.open(idle, 1, &[]);
    bed.open(busy, 1, &[]);
    bed.rows(busy, 1, RowsHead { want: Want::Last, ..prompt(1, 3) }, &[], &[1, 2, 3]);
    assert_eq!(bed.plan(), 1);
    bed.now += 999 * MS;
    bed.open(next, 1, &[]);
    retry_of(&bed.heard(next, 1));
    bed.now += MS;
    bed.open(next, 2, &[]);
    assert_eq!(bed.heard(next, 2), [Heard::Opened(0)]);
    let evicted = Heard::Error(SessionErrorCode::Evicted);
    assert_eq!(bed.heard(idle, 1), [Heard::Opened(0), evicted]);
    bed.open(next, 3, &[]);
    retry_of(&bed.heard(next, 3));
    assert_eq!(bed.core.figures().evicted, 1);
    bed.settle();
    let rows = Heard::Rows(vec![(3, digest([1, 2, 3]))]);
    assert_eq!(bed.heard(busy, 1), [Heard::Opened(0), rows]);
}

/// A session whose step has taken long is not idle when it ends: its device hears of it first.
#[test]
fn a_session_is_idle_from_the_end_of_its_last_step_on() {
    let mut bed = Bed::with(4, |_| {});
    let (one, next) = (bed.connect(), bed.connect());
    bed.open(one, 1, &[]);
    bed.rows(one, 1, RowsHead { want: Want::Last, ..prompt(1, 1) }, &[], &[1]);
    assert_eq!(bed.plan(), 1);
    bed.now += 5000 * MS;
    bed.settle();
    bed.open(next, 1, &[]);
    retry_of(&bed.heard(next, 1));
    bed.now += 1000 * MS;
    bed.open(next, 2, &[]);
    assert_eq!(bed.heard(next, 2), [Heard::Opened(0)]);
}

/// None is ended where that would not make enough room.
#[test]
fn nobody_gives_way_in_vain() {
    let mut bed = Bed::with(8, |_| {});
    let (idle, busy, next) = (bed.connect(), bed.connect(), bed.connect());
    bed.open(idle, 1, &[]);
    bed.open(busy, 1, &[]);
    bed.rows(busy, 1, prompt(1, 3), &[], &[1, 2, 3]);
    bed.plan();
    bed.now += 2000 * MS;
    let large = hat_transport::message::Open { rows_max: 128, ..super::bed::open() };
    bed.message(next, 1, &Message::Open(large));
    retry_of(&bed.heard(next, 1));
    assert_eq!(bed.core.figures().evicted, 0);
}

/// Sessions of a device without a socket go first, and at once; with the connection all go.
#[test]
fn a_device_that_is_away_gives_way_at_once() {
    let mut bed = Bed::with(12, |_| {});
    let (away, here, next) = (bed.connect(), bed.connect(), bed.connect());
    bed.open(here, 1, &[]);
    bed.now += 5000 * MS; // idle for long
    bed.open(away, 1, &[]);
    bed.open(away, 2, &[]);
    bed.link(away, LinkEvent::Down);
    bed.open(next, 1, &[]);
    let evicted = Heard::Error(SessionErrorCode::Evicted);
    assert_eq!(bed.heard(away, 1), [Heard::Opened(0), evicted], "the older of the two");
    assert_eq!(bed.heard(here, 1), [Heard::Opened(0)]);
    bed.up(away, true);
    bed.rows(away, 2, RowsHead { want: Want::Last, ..prompt(1, 1) }, &[], &[1]);
    bed.settle();
    let rows = Heard::Rows(vec![(1, digest([1]))]);
    assert_eq!(bed.heard(away, 2), [Heard::Opened(0), rows], "it went on where it was");
    bed.up(away, false);
    assert_eq!(bed.core.figures().sessions, 2, "its memory is of another life");
    bed.link(here, LinkEvent::Gone);
    assert_eq!((bed.core.figures().sessions, bed.free_pages()), (1, 8));
}

/// A connection that begins anew hears nothing of what was asked before.
#[test]
fn answers_to_a_former_life_are_not_sent() {
    let mut bed = Bed::new();
    let (device, other) = (bed.connect(), bed.connect());
    bed.open(device, 1, &[]);
    bed.open(other, 1, &[]);
    bed.up(device, false);
    assert!(bed.heard(device, 1).is_empty());
    assert_eq!(bed.heard(other, 1), [Heard::Opened(0)]);
    bed.open(device, 1, &[]);
    assert_eq!(bed.heard(device, 1), [Heard::Opened(0)]);
}

/// A device has so many sessions and no more, whatever is free.
#[test]
fn a_device_has_its_share_of_sessions() {
    let mut bed = Bed::with(1000, |config| config.sessions_per_device_max = 2);
    let (hog, other) = (bed.connect(), bed.connect());
    for session in 1..=2 {
        bed.open(hog, session, &[]);
        assert_eq!(bed.heard(hog, session), [Heard::Opened(0)]);
    }
    bed.open(hog, 3, &[]);
    retry_of(&bed.heard(hog, 3));
    bed.open(other, 1, &[]);
    assert_eq!(bed.heard(other, 1), [Heard::Opened(0)]);
}
