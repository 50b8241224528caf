//! Rules that a device could lose without anybody's text changing: orders, priorities, turns, and
//! what is measured.

use hat_transport::message::{Computed, RowsHead};

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
