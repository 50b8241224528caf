//! Steps that are not computed, or come back late, or not at all; devices that do not read.

use hat_transport::message::{CloseCode, End, Hello, Message, RowsHead, SessionErrorCode, Want};

use super::super::LinkEvent;
use super::bed::{Bed, Heard, MS, fault, hello, prompt};
use super::ledger::digest;

/// A fault in the first of two steps that are out closes every session, also one without a row in
/// them, and un-names pages that were named when they were planned. The second step comes back all
/// the same, and finds nobody.
#[test]
fn a_fault_closes_everybody_and_the_step_behind_it_finds_nobody() {
    let mut bed = Bed::new();
    let devices = [bed.connect(), bed.connect(), bed.connect()];
    let [one, other, silent] = devices;
    bed.open(silent, 1, &[]);
    bed.open(one, 1, &[[1; 16]]);
    bed.rows(one, 1, prompt(1, 40), &[], &[1; 40]);
    assert_eq!(bed.plan(), 1);
    bed.open(other, 1, &[[2; 16]]);
    bed.rows(other, 1, RowsHead { want: Want::Last, ..prompt(1, 40) }, &[], &[1; 40]);
    bed.rows(one, 1, RowsHead { want: Want::Last, ..prompt(41, 1) }, &[], &[1]);
    assert_eq!(bed.plan(), 1);
    bed.finish(Some(fault(false)));
    let closed = Heard::Error(SessionErrorCode::Resource);
    for device in devices {
        assert_eq!(bed.heard(device, 1), [Heard::Opened(0), closed.clone()]);
    }
    let figures = bed.core.figures();
    assert_eq!((figures.sessions, figures.pages_free, figures.pages_idle), (0, 1000, 0));
    assert_eq!((figures.faults, figures.refused), (1, 0));
    bed.finish(None);
    assert_eq!(bed.core.poll_fault(bed.now()), None, "it passed");
    assert_eq!(bed.plan(), 0);

    // Their devices replay, and find no page: what was planned was not computed.
    for (device, name) in [(one, [1; 16]), (other, [2; 16])] {
        bed.open(device, 2, &[name]);
        let rows: Vec<u32> = (1..=40).collect();
        bed.rows(device, 2, RowsHead { want: Want::Last, ..prompt(1, 40) }, &[], &rows);
        bed.settle();
        let rows = Heard::Rows(vec![(40, digest(1..=40))]);
        assert_eq!(bed.heard(device, 2), [Heard::Opened(0), rows]);
    }
}

/// A commit's moves that wait for a step are stale by a fault: the pages are others' by then.
#[test]
fn a_fault_drops_the_moves_that_wait() {
    let mut bed = Bed::new();
    let (one, other) = (bed.connect(), bed.connect());
    bed.open(one, 1, &[]);
    bed.open(other, 1, &[]);
    bed.rows(one, 1, RowsHead { want: Want::Last, ..prompt(1, 1) }, &[], &[1]);
    bed.settle();
    let tree = RowsHead { tree: true, ..super::bed::pending_rows(2, 2, 1) };
    bed.rows(one, 1, tree, &[1, 1], &[2, 3]);
    bed.settle();
    bed.rows(other, 1, RowsHead { want: Want::Last, ..prompt(1, 1) }, &[], &[1]);
    assert_eq!(bed.plan(), 1);
    bed.message(one, 1, &Message::End(End { commit: 3, pages: &[] }));
    bed.finish(Some(fault(false)));
    bed.open(other, 2, &[]);
    bed.rows(other, 2, RowsHead { want: Want::Last, ..prompt(1, 1) }, &[], &[1]);
    assert_eq!(bed.plan(), 1);
    assert!(bed.out[0].step.moves.is_empty(), "{:?}", bed.out[0].step.moves);
}

/// A fault that lasts is told once, behind the errors of the sessions.
#[test]
fn a_fault_that_lasts_is_told() {
    let mut bed = Bed::new();
    let device = bed.connect();
    bed.open(device, 1, &[]);
    bed.rows(device, 1, prompt(1, 1), &[], &[1]);
    bed.plan();
    bed.finish(Some(fault(true)));
    assert_eq!(bed.core.poll_fault(bed.now()), Some(fault(true)));
    assert_eq!(bed.core.poll_fault(bed.now()), None);
    let closed = Heard::Error(SessionErrorCode::Resource);
    assert_eq!(bed.heard(device, 1), [Heard::Opened(0), closed]);
}

/// A step that does not come back is a fault; the time begins anew with each one that does.
#[test]
fn a_step_that_does_not_end_is_a_fault() {
    let mut bed = Bed::with(1000, |config| config.step_within = 500 * MS);
    let device = bed.connect();
    bed.open(device, 1, &[]);
    bed.transmit();
    assert_eq!(bed.core.poll_timeout(), None, "nothing is on its way");
    bed.rows(device, 1, prompt(1, 10), &[], &[0; 10]);
    bed.rows(device, 1, prompt(11, 10), &[], &[0; 10]);
    assert_eq!(bed.plan(), 2);
    assert_eq!(bed.core.poll_timeout(), Some(bed.now() + 500 * MS));
    bed.now += 200 * MS;
    // One that is planned meanwhile is no news of those before it.
    bed.rows(device, 1, prompt(21, 10), &[], &[0; 10]);
    bed.at_first = 0;
    assert_eq!(bed.plan(), 1);
    assert_eq!(bed.core.poll_timeout(), Some(bed.now() + 300 * MS));
    bed.now += 200 * MS;
    bed.finish(None);
    assert_eq!(bed.core.poll_timeout(), Some(bed.now() + 500 * MS));
    bed.now += 499 * MS;
    assert_eq!(bed.core.poll_fault(bed.now()), None);
    bed.now += MS;
    let fault = bed.core.poll_fault(bed.now()).expect("the backend hangs");
    assert!(fault.lasts && fault.reason.contains("0.5 s"), "{fault}");
}

/// A step comes back after its session has ended: nothing is sent, and whoever has the pages by
/// then gets what belongs to it, since its rows are written later.
#[test]
fn a_step_that_outlives_its_session_harms_nobody() {
    let mut bed = Bed::with(4, |_| {});
    let (one, other) = (bed.connect(), bed.connect());
    bed.open(one, 1, &[]);
    bed.rows(one, 1, RowsHead { want: Want::Last, ..prompt(1, 40) }, &[], &[7; 40]);
    assert_eq!(bed.plan(), 1);
    bed.message(one, 1, &Message::End(End::default()));
    assert_eq!(bed.heard(one, 1), [Heard::Opened(0), Heard::Ended]);
    bed.open(other, 1, &[]);
    let rows: Vec<u32> = (1..=40).collect();
    bed.rows(other, 1, RowsHead { want: Want::Last, ..prompt(1, 40) }, &[], &rows);
    bed.now += 2000 * MS; // the first one's verifies would have come
    assert_eq!(bed.plan(), 1);
    bed.settle();
    assert!(bed.heard(one, 1).is_empty());
    let rows = Heard::Rows(vec![(40, digest(1..=40))]);
    assert_eq!(bed.heard(other, 1), [Heard::Opened(0), rows]);
}

/// Outputs that find no buffer wait, in order, and go as soon as there are some; answers pass them.
#[test]
fn outputs_wait_for_buffers_in_order() {
    let mut bed = Bed::new();
    let device = bed.connect();
    bed.open(device, 1, &[]);
    bed.heard(device, 1);
    bed.sink.has_buffers = false;
    for id in 1..=3 {
        bed.rows(device, 1, RowsHead { want: Want::Last, ..prompt(id, 1) }, &[], &[id]);
        bed.settle();
    }
    bed.rows(device, 1, prompt(4, 1), &[], &[4]);
    bed.settle();
    assert_eq!(bed.heard(device, 1), [Heard::Computed(4, 1)], "an answer needs no such buffer");
    assert_eq!(bed.core.poll_timeout(), Some(bed.now() + MS));
    bed.sink.has_buffers = true;
    // One that is computed now waits behind them.
    bed.rows(device, 1, RowsHead { want: Want::Last, ..prompt(5, 1) }, &[], &[5]);
    bed.plan();
    bed.finish(None);
    let rows = |id: u32| Heard::Rows(vec![(id, digest(1..=id))]);
    assert_eq!(bed.heard(device, 1), [rows(1), rows(2), rows(3), rows(5)]);
    assert_eq!(bed.core.poll_timeout(), None);
}

/// Outputs that wait when their session ends are not sent any more.
#[test]
fn outputs_of_an_ended_session_are_not_sent() {
    let mut bed = Bed::new();
    let device = bed.connect();
    bed.open(device, 1, &[]);
    bed.heard(device, 1);
    bed.sink.has_buffers = false;
    bed.rows(device, 1, RowsHead { want: Want::Last, ..prompt(1, 1) }, &[], &[1]);
    bed.settle();
    bed.message(device, 1, &Message::End(End::default()));
    bed.sink.has_buffers = true;
    assert_eq!(bed.heard(device, 1), [Heard::Ended]);
}

/// Pages whose rows may be no numbers are not found by anybody.
#[test]
fn pages_of_an_output_that_is_no_number_are_forgotten() {
    let mut bed = Bed::new();
    bed.model = None;
    let device = bed.connect();
    bed.open(device, 1, &[[1; 16]]);
    bed.rows(device, 1, RowsHead { want: Want::Last, ..prompt(1, 40) }, &[], &[1; 40]);
    assert_eq!(bed.plan(), 1);
    bed.out[0].step.hidden.fill(f32::NAN);
    bed.finish(None);
    let error = Heard::Error(SessionErrorCode::Internal);
    assert_eq!(bed.heard(device, 1), [Heard::Opened(0), error]);
    bed.open(device, 2, &[[1; 16]]);
    assert_eq!(bed.heard(device, 2), [Heard::Opened(0)]);
}

/// A device whose queue stays full holds up nobody, and is sent away in the end.
#[test]
fn a_device_that_does_not_read_is_sent_away() {
    let mut bed = Bed::new();
    let (deaf, other) = (bed.connect(), bed.connect());
    bed.open(deaf, 1, &[]);
    bed.open(other, 1, &[]);
    bed.transmit();
    bed.sink.full.insert(deaf);
    for (device, id) in [(deaf, 1), (deaf, 2), (other, 1), (other, 2)] {
        bed.rows(device, 1, RowsHead { want: Want::Last, ..prompt(id, 1) }, &[], &[id]);
        bed.settle();
    }
    let rows = |id: u32| Heard::Rows(vec![(id, digest(1..=id))]);
    assert_eq!(bed.heard(other, 1), [Heard::Opened(0), rows(1), rows(2)]);
    assert_eq!(bed.core.poll_timeout(), Some(bed.now() + 20 * MS));
    bed.now += 900 * MS;
    bed.transmit();
    assert!(bed.core.poll_close().is_none(), "it may still read");
    bed.now += 200 * MS;
    bed.transmit();
    let (connection, code, _) = bed.core.poll_close().expect("it is sent away");
    assert_eq!((connection, code), (deaf, CloseCode::Overload));
    assert_eq!((bed.core.figures().refused, bed.core.poll_timeout()), (1, None));
    // What it sends is not taken any more, and its sessions end with it.
    bed.rows(deaf, 1, prompt(3, 1), &[], &[3]);
    assert_eq!(bed.plan(), 0);
    bed.link(deaf, LinkEvent::Gone);
    assert_eq!(bed.core.figures().sessions, 1);
}

/// A device that takes some of its outputs now and then reads: its time begins anew with each.
#[test]
fn a_device_that_reads_slowly_is_not_sent_away() {
    let mut bed = Bed::new();
    let device = bed.connect();
    bed.open(device, 1, &[]);
    bed.transmit();
    for id in 1..=6 {
        bed.sink.full.insert(device);
        for id in [2 * id - 1, 2 * id] {
            bed.rows(device, 1, RowsHead { want: Want::Last, ..prompt(id, 1) }, &[], &[id]);
            bed.settle();
        }
        bed.now += 600 * MS;
        bed.sink.full.clear();
        bed.transmit();
        assert!(bed.core.poll_close().is_none(), "it took some after 600 ms");
    }
}

/// A device whose queue has no room for an answer either is not waited for at all.
#[test]
fn a_device_that_takes_no_answer_is_closed_once() {
    let mut bed = Bed::new();
    let device = bed.connect();
    bed.sink.deaf.insert(device);
    bed.open(device, 1, &[]);
    bed.open(device, 2, &[]);
    bed.transmit();
    let (connection, code, reason) = bed.core.poll_close().expect("it is closed");
    assert_eq!((connection, code), (device, CloseCode::Overload));
    assert!(reason.contains("do not read"), "{reason}");
    assert!(bed.core.poll_close().is_none());
}

/// A device of another model is told so, and nothing of it is taken.
#[test]
fn a_device_of_another_model_is_closed() {
    let mut bed = Bed::new();
    let device = bed.connect();
    bed.open(device, 1, &[]);
    let other = Hello { model_id: [8; 32], ..hello(hat_transport::message::Role::Device) };
    bed.link(device, LinkEvent::Up { hello: other, resumed: true });
    let (connection, code, reason) = bed.core.poll_close().expect("it is closed");
    assert_eq!((connection, code), (device, CloseCode::Incompatible));
    assert!(reason.contains("two different models"), "{reason}");
    bed.open(device, 2, &[]);
    assert_eq!(bed.core.figures().opened, 1);
}
