//! Sessions of devices that keep the rules.

use hat_transport::message::{
    Commit, End, Message, Open, RowsHead, SessionErrorCode as Code, Want,
};

use super::bed::{Bed, Heard, MS, open, pending_rows, prompt};
use super::ledger::digest;

/// A prompt in two frames, a tree below it, and a commit of a path that has to move.
#[test]
fn a_session_gets_the_rows_that_its_path_gives() {
    let mut bed = Bed::new();
    let device = bed.connect();
    bed.open(device, 1, &[]);
    assert_eq!(bed.heard(device, 1), [Heard::Opened(0)]);
    let path: Vec<u32> = (100..140).collect();
    bed.rows(device, 1, RowsHead { more: true, ..prompt(1, 30) }, &[], &path[..30]);
    assert_eq!(bed.plan(), 0, "the chunk goes on");
    bed.rows(device, 1, RowsHead { want: Want::Last, ..prompt(31, 10) }, &[], &path[30..]);
    bed.settle();
    assert_eq!(bed.heard(device, 1), [Heard::Rows(vec![(40, digest(path.clone()))])]);

    // 41 and 42 below the prompt, 43 below 41, 44 below 42: 42 and 44 are right.
    let tree = RowsHead { tree: true, ..pending_rows(41, 4, 40) };
    bed.rows(device, 1, tree, &[40, 40, 41, 42], &[7, 8, 9, 10]);
    bed.settle();
    let of = |rest: &[u32]| digest(path.iter().chain(rest).copied());
    let rows = vec![(41, of(&[7])), (42, of(&[8])), (43, of(&[7, 9])), (44, of(&[8, 10]))];
    assert_eq!(bed.heard(device, 1), [Heard::Rows(rows)]);

    // The path to 44 stays, and moves to where it belongs.
    let head = RowsHead { commit: 44, parent: 44, want: Want::All, ..prompt(45, 1) };
    bed.rows(device, 1, head, &[], &[11]);
    bed.settle();
    assert_eq!(bed.heard(device, 1), [Heard::Rows(vec![(45, of(&[8, 10, 11]))])]);
    // Anybody who comes behind these rows sees them there, too.
    bed.rows(device, 1, RowsHead { want: Want::Last, ..prompt(46, 2) }, &[], &[12, 13]);
    bed.settle();
    assert_eq!(bed.heard(device, 1), [Heard::Rows(vec![(47, of(&[8, 10, 11, 12, 13]))])]);

    bed.message(device, 1, &Message::End(End::default()));
    assert_eq!(bed.heard(device, 1), [Heard::Ended]);
    assert_eq!(bed.free_pages(), 1000);
}

/// A commit that comes on its own moves rows at the front of the next step, whosever that is.
#[test]
fn moves_ride_with_the_next_step() {
    let mut bed = Bed::new();
    let (one, other) = (bed.connect(), bed.connect());
    for device in [one, other] {
        bed.open(device, 1, &[]);
    }
    bed.rows(one, 1, RowsHead { want: Want::Last, ..prompt(1, 2) }, &[], &[1, 2]);
    bed.settle();
    bed.rows(one, 1, RowsHead { tree: true, ..pending_rows(3, 2, 2) }, &[2, 2], &[3, 4]);
    bed.settle();
    bed.message(one, 1, &Message::Commit(Commit { row: 4 }));
    bed.rows(other, 1, prompt(1, 1), &[], &[9]);
    assert_eq!(bed.plan(), 1);
    assert_eq!(bed.out[0].step.moves.len(), 1, "row 4 goes to the place of row 3");
    bed.settle();
    bed.heard(one, 1);
    bed.rows(one, 1, RowsHead { parent: 4, want: Want::All, ..prompt(5, 1) }, &[], &[5]);
    bed.settle();
    assert_eq!(bed.heard(one, 1), [Heard::Rows(vec![(5, digest([1, 2, 4, 5]))])]);
}

/// Moves of a step run in the order in which their commits came: one may read what another wrote.
#[test]
fn moves_of_a_step_keep_their_order() {
    let mut bed = Bed::new();
    let device = bed.connect();
    bed.open(device, 1, &[]);
    bed.rows(device, 1, RowsHead { want: Want::Last, ..prompt(1, 3) }, &[], &[1, 2, 3]);
    bed.settle();
    let tree = RowsHead { tree: true, ..pending_rows(4, 5, 3) };
    bed.rows(device, 1, tree, &[3, 3, 3, 6, 6], &[4, 5, 6, 7, 8]);
    bed.settle();
    bed.heard(device, 1);
    // 6 goes to the place of 4, 7 and 8 behind it; then 8 to the place that 7 had.
    bed.message(device, 1, &Message::Commit(Commit { row: 6 }));
    bed.rows(device, 1, RowsHead { commit: 8, ..pending_rows(9, 1, 8) }, &[], &[9]);
    assert_eq!(bed.plan(), 1);
    assert_eq!(bed.out[0].step.moves.len(), 4);
    bed.settle();
    assert_eq!(bed.heard(device, 1), [Heard::Rows(vec![(9, digest([1, 2, 3, 6, 8, 9]))])]);
}

/// Chunks of a session run one a step, in order, and two of its steps may be out at once.
#[test]
fn a_session_has_one_work_in_a_step_and_rows_in_several_steps() {
    let mut bed = Bed::new();
    let device = bed.connect();
    bed.open(device, 1, &[]);
    for first_id in [1, 11, 21] {
        let rows: Vec<u32> = (first_id..first_id + 10).collect();
        let want = if first_id == 21 { Want::Last } else { Want::None };
        bed.rows(device, 1, RowsHead { want, ..prompt(first_id, 10) }, &[], &rows);
    }
    assert_eq!(bed.plan(), 2);
    let rows: Vec<_> = bed.out.iter().map(|batch| batch.step.plan.rows()).collect();
    assert_eq!(rows, [10, 10]);
    bed.settle();
    let last = Heard::Rows(vec![(30, digest(1..=30))]);
    let heard = bed.heard(device, 1);
    assert_eq!(heard, [Heard::Opened(0), Heard::Computed(1, 10), Heard::Computed(11, 10), last]);
}

/// Batches of drafts that wait while their device goes another way are dropped, with what they
/// committed kept.
#[test]
fn stale_batches_are_dropped_and_what_they_committed_stays() {
    let mut bed = Bed::new();
    let (device, other) = (bed.connect(), bed.connect());
    bed.open(device, 1, &[]);
    bed.open(other, 1, &[]);
    bed.rows(device, 1, RowsHead { want: Want::Last, ..prompt(1, 1) }, &[], &[1]);
    bed.rows(device, 1, pending_rows(2, 2, 1), &[], &[2, 3]);
    bed.settle();
    bed.heard(device, 1);
    // A step of another session keeps the first stage busy.
    bed.rows(other, 1, RowsHead { want: Want::All, ..prompt(1, 1) }, &[], &[1]);
    assert_eq!(bed.plan(), 1);
    bed.rows(device, 1, pending_rows(4, 2, 3), &[], &[4, 5]);
    bed.rows(device, 1, RowsHead { commit: 2, ..pending_rows(6, 1, 3) }, &[], &[6]);
    // It goes on behind row 2, whose commit came with the last of these.
    bed.rows(device, 1, RowsHead { parent: 2, want: Want::All, ..prompt(7, 1) }, &[], &[7]);
    let dropped = [Heard::Dropped(6, 1), Heard::Dropped(4, 2)];
    assert_eq!(bed.heard(device, 1), dropped);
    assert_eq!(bed.core.figures().dropped, 3);
    bed.settle();
    assert_eq!(bed.heard(device, 1), [Heard::Rows(vec![(7, digest([1, 2, 7]))])]);
}

/// A batch of drafts stays whole if its device goes on behind any row of it, and so does what leads
/// there.
#[test]
fn waves_that_lead_to_the_row_that_is_kept_stay_whole() {
    let mut bed = Bed::new();
    let (device, other) = (bed.connect(), bed.connect());
    bed.open(device, 1, &[]);
    bed.open(other, 1, &[]);
    bed.rows(device, 1, RowsHead { want: Want::Last, ..prompt(1, 1) }, &[], &[1]);
    bed.settle();
    bed.heard(device, 1);
    // A step of another session keeps the first stage busy.
    bed.rows(other, 1, RowsHead { want: Want::All, ..prompt(1, 1) }, &[], &[1]);
    assert_eq!(bed.plan(), 1);
    bed.rows(device, 1, pending_rows(2, 2, 1), &[], &[2, 3]);
    bed.rows(device, 1, pending_rows(4, 2, 2), &[], &[4, 5]);
    bed.rows(device, 1, pending_rows(6, 2, 3), &[], &[6, 7]);
    let head = RowsHead { commit: 5, parent: 5, want: Want::All, ..prompt(8, 1) };
    bed.rows(device, 1, head, &[], &[8]);
    assert_eq!(bed.heard(device, 1), [Heard::Dropped(6, 2)]);
    bed.settle();
    let rows = |rows: &[(u32, &[u32])]| {
        Heard::Rows(rows.iter().map(|(id, path)| (*id, digest(path.iter().copied()))).collect())
    };
    let first = rows(&[(2, &[1, 2]), (3, &[1, 2, 3])]);
    let second = rows(&[(4, &[1, 2, 4]), (5, &[1, 2, 4, 5])]);
    assert_eq!(bed.heard(device, 1), [first, second, rows(&[(8, &[1, 2, 4, 5, 8])])]);
}

/// A chunk that is begun names rows as well: the batch of drafts below which it hangs is needed.
#[test]
fn a_wave_below_which_a_chunk_is_begun_stays() {
    let mut bed = Bed::new();
    let (device, other) = (bed.connect(), bed.connect());
    bed.open(device, 1, &[]);
    bed.open(other, 1, &[]);
    bed.rows(other, 1, RowsHead { want: Want::Last, ..prompt(1, 1) }, &[], &[1]);
    bed.settle();
    bed.rows(other, 1, RowsHead { want: Want::All, ..prompt(2, 1) }, &[], &[1]);
    assert_eq!(bed.plan(), 1);
    bed.rows(device, 1, prompt(1, 1), &[], &[1]);
    bed.rows(device, 1, pending_rows(2, 1, 1), &[], &[2]);
    bed.rows(device, 1, pending_rows(3, 1, 1), &[], &[3]);
    bed.rows(device, 1, RowsHead { more: true, ..pending_rows(4, 1, 2) }, &[], &[4]);
    // Decided rows end the chunk that hangs below row 2.
    let head = RowsHead { parent: 1, want: Want::All, ..prompt(5, 1) };
    bed.rows(device, 1, head, &[], &[5]);
    let dropped = [Heard::Opened(0), Heard::Dropped(3, 1)];
    assert_eq!(bed.heard(device, 1), dropped);
}

/// Rows that wait are forgotten by CANCEL; those that have run stay.
#[test]
fn a_cancelled_session_goes_on_behind_the_rows_that_ran() {
    let mut bed = Bed::new();
    let device = bed.connect();
    bed.open(device, 1, &[]);
    bed.rows(device, 1, prompt(1, 10), &[], &(1..=10).collect::<Vec<_>>());
    bed.settle();
    bed.rows(device, 1, prompt(11, 10), &[], &[0; 10]);
    bed.rows(device, 1, RowsHead { more: true, ..prompt(21, 10) }, &[], &[0; 10]);
    bed.message(device, 1, &Message::Cancel);
    assert_eq!(bed.plan(), 0);
    let head = RowsHead { parent: 10, want: Want::Last, ..prompt(31, 1) };
    bed.rows(device, 1, head, &[], &[11]);
    bed.settle();
    let last = Heard::Rows(vec![(31, digest(1..=11))]);
    let first = [Heard::Opened(0), Heard::Computed(1, 10), Heard::Cancelled, last];
    assert_eq!(bed.heard(device, 1), first);
}

/// The next one may have a prompt's pages as soon as its rows are planned: it runs later.
#[test]
fn a_prompt_that_is_planned_is_found_by_the_next_session() {
    let mut bed = Bed::new();
    let (one, other) = (bed.connect(), bed.connect());
    bed.open(one, 1, &[[1; 16]]);
    bed.rows(one, 1, prompt(1, 40), &[], &(1..=40).collect::<Vec<_>>());
    assert_eq!(bed.plan(), 1);
    bed.open(other, 1, &[[1; 16]]);
    let head = RowsHead { want: Want::Last, ..prompt(33, 8) };
    bed.rows(other, 1, head, &[], &(33..=40).collect::<Vec<_>>());
    bed.settle();
    let rows = Heard::Rows(vec![(40, digest(1..=40))]);
    assert_eq!(bed.heard(other, 1), [Heard::Opened(1), rows]);
    for device in [one, other] {
        bed.message(device, 1, &Message::End(End::default()));
    }
    let figures = bed.core.figures();
    assert_eq!((figures.pages_free, figures.pages_idle, figures.pages_reused), (1000, 1, 1));
}

/// END names the pages of the whole path, after the commit that it brings.
#[test]
fn the_pages_that_an_end_names_are_found() {
    let mut bed = Bed::new();
    let device = bed.connect();
    bed.open(device, 1, &[]);
    bed.rows(device, 1, prompt(1, 31), &[], &(1..=31).collect::<Vec<_>>());
    bed.rows(device, 1, pending_rows(32, 1, 31), &[], &[32]);
    bed.settle();
    let end = End { commit: 32, pages: &[[1; 16], [2; 16]] };
    bed.message(device, 1, &Message::End(end));
    bed.open(device, 2, &[[1; 16]]);
    assert_eq!(bed.heard(device, 2), [Heard::Opened(1)], "one page is full");
    bed.rows(device, 2, RowsHead { want: Want::Last, ..prompt(33, 1) }, &[], &[33]);
    bed.settle();
    assert_eq!(bed.heard(device, 2), [Heard::Rows(vec![(33, digest(1..=33))])]);
}

/// Pages may change hands with the commit of an END: its moves run before any row of the step, so
/// whoever has the pages next sees them as they are to be.
#[test]
fn moves_run_before_the_rows_of_whoever_has_the_pages_next() {
    let mut bed = Bed::new();
    let device = bed.connect();
    bed.open(device, 1, &[]);
    bed.rows(device, 1, prompt(1, 31), &[], &(1..=31).collect::<Vec<_>>());
    bed.rows(device, 1, RowsHead { tree: true, ..pending_rows(32, 2, 31) }, &[31, 31], &[77, 32]);
    bed.settle();
    bed.message(device, 1, &Message::End(End { commit: 33, pages: &[[1; 16]] }));
    bed.open(device, 2, &[[1; 16]]);
    assert_eq!(bed.heard(device, 2), [Heard::Opened(1)]);
    bed.rows(device, 2, RowsHead { want: Want::Last, ..prompt(33, 1) }, &[], &[33]);
    assert_eq!(bed.plan(), 1);
    assert_eq!(bed.out[0].step.moves.len(), 1);
    bed.settle();
    assert_eq!(bed.heard(device, 2), [Heard::Rows(vec![(33, digest(1..=33))])]);
}

/// A violation of the protocol ends its session alone, wherever it is found.
#[test]
fn a_violation_ends_its_session_alone() {
    let mut bed = Bed::new();
    let device = bed.connect();
    let honest = bed.connect();
    bed.open(honest, 1, &[]);
    type Change = fn(&mut RowsHead, &mut Vec<u32>);
    let cases: [(Code, Change); 6] = [
        (Code::BadShape, |_, rows| rows.push(0)),
        (Code::BadShape, |head, _| head.first_id = u32::MAX),
        (Code::BadParent, |head, _| (head.first_id, head.parent) = (9, 8)),
        (Code::BadCommit, |head, _| (head.first_id, head.commit) = (9, 8)),
        (Code::BadShape, |head, rows| {
            (head.count, head.more) = (161, true);
            rows.resize(161, 0);
        }),
        (Code::BadShape, |head, rows| {
            head.count = 65;
            rows.resize(65, 0);
        }),
    ];
    for (session, (code, change)) in (10..).zip(cases) {
        bed.open(device, session, &[]);
        let (mut head, mut rows) = (prompt(1, 1), vec![0]);
        change(&mut head, &mut rows);
        bed.rows(device, session, head, &[], &rows);
        bed.settle();
        let heard = bed.heard(device, session);
        assert_eq!(heard, [Heard::Opened(0), Heard::Error(code)], "session {session}");
    }
    // What is wrong with a chunk that is planned behind good rows ends it all the same.
    bed.open(device, 1, &[]);
    bed.rows(device, 1, RowsHead { more: true, ..prompt(1, 2) }, &[], &[1, 2]);
    bed.rows(device, 1, RowsHead { parent: 9, want: Want::Last, ..prompt(11, 1) }, &[], &[3]);
    bed.rows(honest, 1, RowsHead { want: Want::Last, ..prompt(1, 3) }, &[], &[4, 5, 6]);
    // Sessions that enter later stand behind it in the step.
    let late = bed.connect();
    bed.message(late, 1, &Message::Open(Open { entry_layer: 2, ..open() }));
    bed.rows(late, 1, RowsHead { want: Want::Last, ..prompt(1, 3) }, &[], &[7, 8, 9]);
    assert_eq!(bed.plan(), 1);
    assert_eq!(bed.out[0].step.plan.rows(), 8, "two rows of the liar run as zeros");
    bed.settle();
    assert_eq!(bed.heard(device, 1), [Heard::Opened(0), Heard::Error(Code::BadParent)]);
    bed.message(device, 1, &Message::Commit(Commit { row: 1 }));
    assert_eq!(bed.heard(device, 1), [Heard::Error(Code::NoSuchSession)]);
    bed.message(device, 1, &Message::End(End::default()));
    assert!(bed.heard(device, 1).is_empty(), "an END may cross the error");

    let rows = Heard::Rows(vec![(3, digest([4, 5, 6]))]);
    assert_eq!(bed.heard(honest, 1), [Heard::Opened(0), rows]);
    let rows = Heard::Rows(vec![(3, digest([7, 8, 9]))]);
    assert_eq!(bed.heard(late, 1), [Heard::Opened(0), rows]);
    for device in [honest, late] {
        bed.message(device, 1, &Message::End(End::default()));
    }
    assert_eq!((bed.free_pages(), bed.core.figures().sessions), (1000, 0));
}

/// Chunks that are begun hold buffers that are everybody's: one device has few of them, and what a
/// session gives back is counted no more.
#[test]
fn frames_of_begun_chunks_are_counted_over_all_sessions() {
    let mut bed = Bed::new();
    let device = bed.connect();
    let begin = |bed: &mut Bed, session, ids: std::ops::RangeInclusive<u32>| {
        for id in ids {
            bed.rows(device, session, RowsHead { more: true, ..prompt(id, 1) }, &[], &[id]);
        }
    };
    for session in 1..=9 {
        bed.open(device, session, &[]);
        begin(&mut bed, session, 1..=56);
    }
    // 504 so far: a cancelled session gives its frames back, as one that ends does.
    bed.message(device, 1, &Message::Cancel);
    bed.message(device, 2, &Message::End(End::default()));
    for session in [10, 11] {
        bed.open(device, session, &[]);
        begin(&mut bed, session, 1..=56);
    }
    bed.open(device, 12, &[]);
    begin(&mut bed, 12, 1..=9);
    let refused = Heard::Error(Code::BadShape);
    assert_eq!(bed.heard(device, 11), [Heard::Opened(0)]);
    assert_eq!(bed.heard(device, 12), [Heard::Opened(0), refused], "the 513th");
}

/// OPEN is answered by what is wrong with it; a session that is open under its id lives on.
#[test]
fn an_open_that_cannot_be_is_refused_by_code() {
    let mut bed = Bed::new();
    let device = bed.connect();
    bed.open(device, 1, &[]);
    let names = [[1; 16], [2; 16]];
    let cases = [
        (1, Code::NoSuchSession, open()),
        (2, Code::Layers, Open { entry_layer: 0, ..open() }),
        (3, Code::Codec, Open { codec: 9, ..open() }),
        (4, Code::Arithmetic, Open { arithmetic_id: 7, ..open() }),
        (5, Code::BadShape, Open { rows_max: 2001, ..open() }),
        (6, Code::BadShape, Open { pages: &names, ..open() }),
    ];
    for (session, code, open) in cases {
        bed.heard(device, session);
        bed.message(device, session, &Message::Open(open));
        assert_eq!(bed.heard(device, session), [Heard::Error(code)], "session {session}");
    }
    bed.rows(device, 1, RowsHead { want: Want::Last, ..prompt(1, 1) }, &[], &[1]);
    bed.settle();
    assert_eq!(bed.heard(device, 1), [Heard::Rows(vec![(1, digest([1]))])]);
    assert_eq!((bed.core.figures().refused, bed.core.figures().opened), (6, 1));
}

/// A device is told how fast its frames came in since it was last told.
#[test]
fn arrivals_are_told_once() {
    let mut bed = Bed::new();
    let device = bed.connect();
    bed.open(device, 1, &[]);
    let mut told = Vec::new();
    for (id, bytes) in [(1, 1000), (2, 1000), (3, 4000)] {
        bed.rows(device, 1, RowsHead { want: Want::Last, ..prompt(id, 1) }, &[], &[id]);
        bed.bytes_arrived(device, bytes, u32::try_from(bytes).unwrap() * MS);
        bed.settle();
        let (_, frame) = bed.sink.sent.pop().unwrap();
        let Ok(Message::Output(output)) = Message::decode(frame.kind, &frame.body) else {
            panic!("{:?} came", frame.kind);
        };
        told.push((output.head.arrivals.bytes, output.head.arrivals.us));
    }
    assert_eq!(told, [(1000, 1_000_000), (0, 0), (3000, 3_000_000)]);
}

/// The end of a prompt is computed in one step, and not cut for the sake of the answer that it
/// begins. Once that answer has begun, another's prompt is cut for it.
#[test]
fn a_prompt_is_cut_for_other_answers_than_its_own() {
    let mut bed = Bed::new();
    let (one, other) = (bed.connect(), bed.connect());
    for device in [one, other] {
        bed.open(device, 1, &[]);
    }
    let mut first_id = 1;
    for count in [1, 2, 4, 8, 16] {
        bed.rows(one, 1, prompt(first_id, count), &[], &vec![5; usize::from(count)]);
        assert_eq!(bed.plan(), 1);
        bed.finish_in(MS * (2 + u32::from(count)));
        bed.at_first = 0;
        first_id += u32::from(count);
    }
    bed.rows(one, 1, RowsHead { want: Want::Last, ..prompt(first_id, 30) }, &[], &[5; 30]);
    bed.plan();
    assert_eq!(bed.out[0].step.plan.rows(), 30);
    bed.finish_in(32 * MS);
    bed.at_first = 0;
    bed.rows(other, 1, RowsHead { want: Want::Last, ..prompt(1, 30) }, &[], &[5; 30]);
    bed.plan();
    let rows = bed.out[0].step.plan.rows();
    assert!((1..10).contains(&rows), "{rows} rows, as long as three verifies of 3 ms");
    bed.settle();
    assert_eq!(bed.heard(other, 1).last(), Some(&Heard::Rows(vec![(30, digest([5; 30]))])));
}
