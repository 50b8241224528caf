//! Rules that a device could lose without anybody's text changing: orders, priorities, turns, and
//! what is measured.

use hat_transport::message::{Computed, Dropped, RowsHead};

use super::*;

/// A frame that finds no room leaves later, as it was: with its commit, its parents, its promise of
/// more.
#[test]
fn frames_that_find_no_room_leave_later() {
    for draft in DraftMode::ALL {
        for every in 2..6 {
            let mut bed = Bed::new();
            bed.sink.refuses = Some(every);
            bed.up(false);
            bed.submit(draft);
            assert_eq!(bed.run(|_, _| {}), expected(), "{}, one in {every}", draft.name());
        }
    }
}

/// A queue that is full of a prompt keeps no round of another request waiting.
#[test]
fn rows_that_somebody_waits_for_pass_a_prompt_that_finds_no_room() {
    let mut bed = Bed::with(false);
    bed.up(false);
    bed.submit(DraftMode::Off);
    let said = bed.run(|bed, tokens| {
        if tokens == 3 && !std::mem::replace(&mut bed.sink.refuses_prompts, true) {
            bed.submit_long(400, 4, DraftMode::Off);
        }
    });
    assert_eq!(said, expected());
    assert_eq!(bed.core.running(), 1, "the prompt waits");
    bed.sink.refuses_prompts = false;
    assert_eq!(bed.run(|_, _| {}).len(), 4);
}

/// Requests that decode without a pause leave a long prompt its turns.
#[test]
fn a_long_prompt_gets_its_turns() {
    let mut bed = Bed::with(false);
    bed.up(false);
    for _ in 0..3 {
        bed.submit_long(6, 300, DraftMode::Off);
    }
    let (mut tokens, mut is_whole, mut asked) = (0, false, None);
    for _ in 0..100_000 {
        bed.step();
        bed.answer();
        while let Some((id, event)) = bed.core.poll_event() {
            match event {
                RequestEvent::Said(Event::Token { .. }) => tokens += 1,
                RequestEvent::Said(Event::Prefill { sent, total }) => {
                    is_whole |= asked == Some(id) && sent == total;
                }
                _ => {}
            }
        }
        if tokens == 30 && asked.is_none() {
            asked = Some(bed.submit_long(400, 4, DraftMode::Off));
        }
        if is_whole {
            break;
        }
    }
    assert!(is_whole && tokens < 300, "a prompt of 7 pieces waited for {tokens} tokens");
}

/// A replay passes nobody's rounds: it goes up as the prompt that it is.
#[test]
fn a_replay_goes_up_as_a_prompt() {
    let evicted = SessionError { code: SessionErrorCode::Evicted, text: "made room" };
    let mut bed = Bed::with(false);
    bed.up(false);
    bed.submit(DraftMode::Off);
    let mut is_lost = false;
    bed.run(|bed, tokens| {
        if tokens == 7 && !std::mem::replace(&mut is_lost, true) {
            bed.say(1, &Message::SessionError(evicted));
        }
    });
    let replay: Vec<_> = bed.sent_rows.iter().filter(|(session, ..)| *session == 2).collect();
    assert!(replay.len() > 5, "{replay:?}");
    for (at, (session, priority, decided)) in bed.sent_rows.iter().enumerate() {
        let wanted = if *decided > 1 { Priority::Prompt } else { Priority::Verify };
        assert_eq!(*priority, wanted, "session {session}, frame {at}: {decided} rows");
    }
}

/// Neither rows that an outage fell upon nor those that were dropped say how long a round takes.
#[test]
fn rows_that_come_late_or_never_are_not_timed() {
    let timed = |bed: &Bed| {
        let mut open = bed.core.requests.values().filter_map(|it| it.session.open());
        open.next().and_then(|open| open.timed)
    };
    let mut bed = Bed::with(false);
    bed.up(false);
    bed.submit(DraftMode::Off);
    for _ in 0..4 {
        while bed.step() {}
        bed.answer();
    }
    while bed.step() {}
    assert!(timed(&bed).is_some(), "a row is away");
    bed.core.handle_inbound(Inbound::Down { reason: "the cable is out".into() });
    bed.up(true);
    bed.step();
    assert!(timed(&bed).is_none());

    // Of a prompt that is away only the last row is waited for.
    let mut bed = Bed::with(false);
    bed.up(false);
    bed.submit(DraftMode::Off);
    bed.step();
    bed.answer();
    while bed.step() {}
    let first_id = timed(&bed).expect("a prompt is away").first_id;
    for (first_id, is_timed) in [(first_id + 1, true), (first_id, false)] {
        bed.say(1, &Message::Dropped(Dropped { first_id, count: 1 }));
        bed.step();
        assert_eq!(timed(&bed).is_some(), is_timed, "without row {first_id}");
    }
}

/// A row's way ends when its output comes, not when the heads of others before it are done.
#[test]
fn a_wait_ends_when_the_output_comes() {
    let mut bed = Bed::with(false);
    bed.up(false);
    bed.submit(DraftMode::Off);
    bed.submit(DraftMode::Off);
    let away = |bed: &Bed| {
        let open = bed.core.requests.values().filter_map(|it| it.session.open());
        open.filter(|open| open.timed.is_some()).count()
    };
    for _ in 0..4 {
        while bed.step() {}
        bed.answer();
    }
    while bed.step() {}
    assert_eq!(away(&bed), 2);
    bed.answer();
    let work = bed.core.poll_work(bed.now, true).expect("rows are back");
    assert!(matches!(work, DeviceWork::Head { .. }));
    compute(work);
    assert_eq!(away(&bed), 0, "the second output has come, too");
}

/// Moves come before the next row whosever that is: pages may have changed hands.
#[test]
fn moves_ride_with_the_next_input_of_anybody() {
    let mut bed = Bed::new();
    bed.up(false);
    // Of two that want a row the older is first.
    let other = bed.submit_long(36, 100, DraftMode::Off);
    bed.submit_long(36, 100, DraftMode::Tree);
    let mut inputs = 0;
    bed.run(|bed, _| {
        if std::mem::replace(&mut inputs, bed.carried.len()) < bed.carried.len() {
            assert!(bed.core.cx.moves.is_empty(), "a row was computed before moves");
        }
    });
    let carried = |of: &(RequestId, usize)| of.0 == other && of.1 > 0;
    assert!(bed.carried.iter().any(carried), "a tree's moves came with nobody else's row");
}

/// The last rows of an answer are committed, wherever they stood in a tree, before pages are named.
#[test]
fn all_pages_of_an_answer_are_named() {
    for draft in DraftMode::ALL {
        let mut bed = Bed::with_names(true, true);
        bed.up(false);
        // The last token has no row: 36 + 29 - 1 rows fill two pages.
        bed.submit_long(36, 29, draft);
        assert_eq!(bed.run(|_, _| {}).len(), 29);
        assert_eq!(bed.named, [(2, 64)], "{}", draft.name());
    }
}

/// An END that finds no room goes without names, and then keeps nothing.
#[test]
fn an_end_that_does_not_fit_is_shorter() {
    for fits in [true, false] {
        let mut bed = Bed::with_names(false, true);
        bed.up(false);
        let id = bed.submit(DraftMode::Off);
        for _ in 0..4 {
            while bed.step() {}
            bed.answer();
        }
        bed.core.cancel(id);
        if !fits {
            bed.sink.refuse_next();
        }
        bed.step();
        let pages: Vec<usize> = bed.named.iter().map(|(pages, _)| *pages).collect();
        assert_eq!(pages, [usize::from(fits)]);
    }
}

/// Position at which a prompt begins to be computed, once the cloud has opened its session.
fn first_row(bed: &mut Bed) -> usize {
    bed.step();
    bed.answer();
    let work = bed.core.poll_work(bed.now, true).expect("a prompt is to be computed");
    let DeviceWork::Input { plan, .. } = &work else { panic!("not a prompt's rows") };
    let first = plan.positions[0] as usize;
    compute(work);
    bed.core.handle_work(bed.now, MS, None, &EndTokens::default());
    first
}

/// After a fault the KV store means nothing: nobody begins behind its pages.
#[test]
fn pages_are_forgotten_after_a_fault() {
    for fails in [false, true] {
        let mut bed = Bed::with_names(false, true);
        bed.up(false);
        bed.submit_long(100, 4, DraftMode::Off);
        bed.run(|_, _| {});
        if fails {
            bed.submit_long(100, 4, DraftMode::Off);
            bed.fails_in = Some(0);
            while bed.core.running() + bed.core.waiting() > 0 {
                bed.step();
                bed.answer();
            }
            while bed.core.poll_event().is_some() {}
            bed.fails_in = None;
        }
        bed.held = 3;
        bed.submit_long(100, 4, DraftMode::Off);
        assert_eq!(first_row(&mut bed), if fails { 0 } else { 3 * PAGE_SIZE });
        assert_eq!(bed.run(|_, _| {}).len(), 4);
    }
}

/// A session that ended before its connection did is nothing to the next one.
#[test]
fn ends_are_not_sent_over_another_connection() {
    let mut bed = Bed::with(false);
    bed.up(false);
    let id = bed.submit(DraftMode::Off);
    bed.step();
    bed.answer();
    while bed.step() {}
    bed.sink.sent.clear();
    bed.core.cancel(id);
    let reason = "the cable is out".to_owned();
    bed.core.handle_inbound(Inbound::Gone { reason, is_final: false });
    bed.up(false);
    bed.step();
    assert!(bed.sink.sent.is_empty(), "{} frames", bed.sink.sent.len());
}

/// Rows that the cloud lacks are computed here, and rows that the drafter lacks, too.
#[test]
fn a_device_begins_behind_what_cloud_and_drafter_have() {
    for (held, kept) in [(0, 3), (1, 3), (2, 0), (3, 1), (3, 3)] {
        let mut bed = Bed::with_names(true, true);
        bed.up(false);
        bed.submit_long(100, 4, DraftMode::Tree);
        bed.run(|_, _| {});
        bed.core.drafter = Some(Box::new(Proposer { kept, ..Proposer::default() }));
        bed.held = held;
        bed.submit_long(100, 4, DraftMode::Tree);
        let begin = first_row(&mut bed);
        assert_eq!(begin, kept.min(usize::from(held)) * PAGE_SIZE, "{held} there, {kept} here");
        assert_eq!(bed.run(|_, _| {}).len(), 4);
    }
}

/// A drafter that is not asked can become better: its drafts are tested all the same.
#[test]
fn guesses_that_were_held_back_are_tested() {
    let mut bed = Bed::with(false);
    bed.up(false);
    bed.submit(DraftMode::Off);
    for _ in 0..4 {
        while bed.step() {}
        bed.answer();
    }
    let source = Source { drafter: DrafterKind::Model, class: 3 };
    let rate = |bed: &Bed| bed.core.cx.learned.acceptance.rate(source);
    let request = bed.core.requests.values_mut().next().expect("it runs");
    let last = *request.path.tokens.last().expect("it has a prompt");
    let open = request.session.open_mut().expect("it has a session");
    // The head that is due decides the token behind the last one.
    open.drafts.withheld.push((next(last), source));
    let before = rate(&bed);
    while bed.step() {}
    let better = rate(&bed);
    assert!(better > before, "{before} -> {better}");
}

/// COMPUTED may pass OUTPUT of the same rows, and so may what ends their session.
#[test]
fn control_messages_may_come_early() {
    for draft in DraftMode::ALL {
        let mut bed = Bed::new();
        bed.up(false);
        bed.submit(draft);
        let said = bed.run(|bed, _| {
            let sent = bed.sink.sent.iter().rev().find_map(|(_, frame)| {
                match Message::decode(frame.kind, frame.body.body()) {
                    Ok(Message::Rows(rows)) => Some((frame.session, rows.head)),
                    _ => None,
                }
            });
            if let Some((session, RowsHead { first_id, count, .. })) = sent {
                let (arrivals, step_rows) = (Arrivals::default(), 3);
                let computed =
                    Computed { first_id, count, queue_us: 1, step_us: 2, step_rows, arrivals };
                bed.say(session, &Message::Computed(computed));
            }
        });
        assert_eq!(said, expected(), "{}", draft.name());
    }
}

/// Nothing depends on the order of a map, an address or a clock.
#[test]
fn a_run_repeats_itself() {
    let run = || {
        let mut bed = Bed::new();
        bed.up(false);
        for draft in DraftMode::ALL {
            bed.submit(draft);
        }
        for round in 0..100 {
            while bed.step() {}
            bed.now += 20 * MS;
            if round % 30 == 29 {
                bed.up(false);
                bed.sink.sent.clear();
            }
            bed.answer();
        }
        bed.sent_rows
    };
    let first = run();
    assert!(first.len() > 50, "{}", first.len());
    assert_eq!(run(), first);
}

/// A session that the cloud has lost leaves no frame behind: nobody waits for its rows.
#[test]
fn rows_of_a_lost_session_do_not_leave() {
    let mut bed = Bed::new();
    bed.up(false);
    bed.submit(DraftMode::Off);
    bed.step();
    bed.answer();
    while bed.step() {}
    assert!(bed.sink.sent.iter().any(|(_, frame)| frame.kind == Kind::Rows));
    let evicted = SessionError { code: SessionErrorCode::Evicted, text: "made room" };
    bed.say(bed.opens, &Message::SessionError(evicted));
    while bed.step() {}
    assert!(bed.sink.sent.iter().all(|(_, frame)| frame.kind != Kind::Rows));
}

/// The owner is told when a cloud without room is to be asked again.
#[test]
fn a_busy_cloud_is_asked_again_in_time() {
    let mut bed = Bed::new();
    bed.up(false);
    bed.submit(DraftMode::Off);
    bed.step();
    bed.sink.sent.clear();
    bed.say(1, &Message::Busy(hat_transport::message::Busy { retry_after_ms: 700 }));
    while bed.step() {}
    while bed.core.poll_event().is_some() {}
    let wait = bed.core.poll_timeout(bed.now).expect("there is a time to ask again");
    assert!(wait <= 700 * MS && wait > 600 * MS, "{wait:?}");
    bed.now += wait;
    bed.step();
    assert!(bed.sink.sent.iter().any(|(_, frame)| frame.kind == Kind::Open));
}
