//! The schedule in virtual time: nothing here reads a clock.

use std::time::Duration;

use proptest::prelude::*;

use super::report::Histogram;
use super::schedule::{Cuts, Draws};
use super::{CutConfig, DirectionConfig, EmulatorConfig, EmulatorError, Piece, Shape, StallConfig};

const MS: u64 = 1_000_000;
const KIB: usize = 1 << 10;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn rated(mbit: u64) -> DirectionConfig {
    DirectionConfig {
        rate_bits_s: Some(mbit * 1_000_000),
        queue_bytes: 1 << 30,
        ..DirectionConfig::default()
    }
}

fn stalling(every: u64, lasts: u64) -> DirectionConfig {
    let stall = Some(StallConfig { every: ms(every), lasts: ms(lasts) });
    DirectionConfig { stall, queue_bytes: 1 << 30, ..DirectionConfig::default() }
}

fn enter(shape: &mut Shape, now: u64, bytes: usize) -> Vec<Piece> {
    let mut pieces = Vec::new();
    shape.enter(now, bytes, |piece| pieces.push(piece));
    assert_eq!(pieces.iter().map(|piece| piece.bytes).sum::<usize>(), bytes);
    pieces
}

fn last(shape: &mut Shape, now: u64, bytes: usize) -> Piece {
    *enter(shape, now, bytes).last().unwrap()
}

#[test]
fn a_rate_takes_its_time_for_each_byte() {
    let mut shape = Shape::new(&rated(60), 0, 0);
    // 4 MiB at 60 Mbit/s: 559.24 ms, however they are cut up.
    let bytes = 4096 * KIB;
    let exact = bytes as u64 * 8 * 1000 / 60;
    assert_eq!(last(&mut shape, 0, bytes).release, exact);
    let mut shape = Shape::new(&rated(60), 0, 0);
    let mut end = 0;
    for _ in 0..bytes / 16 {
        end = last(&mut shape, 0, 16).release;
    }
    assert_eq!(end, exact, "no rounding is lost over 262144 pieces");
    // After a rest the link owes nothing: 1250 bytes at 10 Mbit/s take 1 ms.
    let mut shape = Shape::new(&rated(10), 0, 0);
    assert_eq!(last(&mut shape, 0, 1250).release, MS);
    assert_eq!(last(&mut shape, 7 * MS, 1250).release, 8 * MS);
    assert_eq!(last(&mut shape, 7 * MS + 1, 1250).release, 9 * MS, "it waits for the first");
}

#[test]
fn bytes_come_out_in_small_pieces() {
    let mut shape = Shape::new(&rated(100), 0, 0);
    let pieces = enter(&mut shape, 0, 64 * KIB);
    for pair in pieces.windows(2) {
        assert!(pair[1].release - pair[0].release <= MS / 4, "{pair:?}");
    }
    assert_eq!(pieces[0].release, 250_000);
}

#[test]
fn a_delay_comes_after_the_rate() {
    let config = DirectionConfig { delay: ms(20), ..rated(10) };
    let mut shape = Shape::new(&config, 0, 0);
    let piece = last(&mut shape, 5 * MS, 1250);
    assert_eq!((piece.begun, piece.sent, piece.release), (5 * MS, 6 * MS, 26 * MS));
    let config = DirectionConfig { delay: ms(20), ..DirectionConfig::default() };
    let mut shape = Shape::new(&config, 0, 0);
    assert_eq!(last(&mut shape, 5 * MS, 4096 * KIB).release, 25 * MS, "no rate, no time");
    assert_eq!(last(&mut shape, 6 * MS, 0).release, 26 * MS, "an end travels too");
}

#[test]
fn jitter_spreads_evenly_and_repeats_with_its_seed() {
    let config = DirectionConfig { jitter: ms(5), delay: ms(10), ..DirectionConfig::default() };
    let releases = |seed: u64, stream: u64| -> Vec<u64> {
        let mut shape = Shape::new(&config, seed, stream);
        (0..4000).map(|k| last(&mut shape, k * 20 * MS, 100).release - k * 20 * MS).collect()
    };
    let first = releases(1, 0);
    assert_eq!(first, releases(1, 0));
    assert_ne!(first, releases(2, 0), "seeds differ");
    assert_ne!(first, releases(1, 1), "directions differ");
    assert!(first.iter().all(|travel| (10 * MS..15 * MS).contains(travel)));
    let mean = first.iter().sum::<u64>() as f64 / first.len() as f64 / MS as f64;
    assert!((mean - 12.5).abs() < 0.1, "mean {mean}");
    let early = first.iter().filter(|travel| **travel < 11 * MS).count();
    assert!((700..900).contains(&early), "{early} of 4000 in the first fifth");
}

#[test]
fn jitter_does_not_depend_on_traffic() {
    let config = DirectionConfig { jitter: ms(5), ..DirectionConfig::default() };
    let mut quiet = Shape::new(&config, 1, 0);
    let mut busy = quiet.clone();
    for k in 0..50 {
        last(&mut busy, k * MS, 100);
    }
    let [quiet, busy] = [&mut quiet, &mut busy].map(|shape| last(shape, 100 * MS, 1).release);
    assert_eq!(quiet, busy);
}

#[test]
fn nothing_leaves_in_a_stall() {
    let config = stalling(1000, 300);
    let mut shape = Shape::new(&config, 7, 0);
    // A piece each ms; each period has one hole of 300 ms, and all else passes at once.
    let sent: Vec<u64> = (0..20_000).map(|t| last(&mut shape, t * MS, 1).sent).collect();
    for period in 0..20 {
        let held: Vec<u64> =
            (period * 1000..(period + 1) * 1000).filter(|t| sent[*t as usize] != t * MS).collect();
        assert!((299..=300).contains(&held.len()), "period {period}: {}", held.len());
        let first = held[0];
        assert_eq!(held, (first..first + held.len() as u64).collect::<Vec<u64>>(), "in one run");
        let ends = sent[first as usize];
        assert!(held.iter().all(|t| sent[*t as usize] == ends), "they leave when it ends");
    }
    assert_eq!(shape.stalls_begun(20_000 * MS - 1), 20);
    let again: Vec<u64> = {
        let mut shape = Shape::new(&config, 7, 0);
        (0..20_000).map(|t| last(&mut shape, t * MS, 1).sent).collect()
    };
    assert_eq!(sent, again);
    let mut other = Shape::new(&config, 8, 0);
    assert_ne!(sent, (0..20_000).map(|t| last(&mut other, t * MS, 1).sent).collect::<Vec<u64>>());
}

#[test]
fn a_stall_stops_the_bottleneck_and_not_what_travels() {
    let config = DirectionConfig { delay: ms(50), ..stalling(1000, 300) };
    let mut shape = Shape::new(&config, 7, 0);
    let begins =
        (0..1000 * MS).step_by(100_000).find(|t| last(&mut shape, *t, 1).sent != *t).unwrap();
    let mut shape = Shape::new(&config, 7, 0);
    let travels = last(&mut shape, begins - MS, 1);
    assert_eq!(travels.release, begins + 49 * MS);
    // With a rate the work of the stall is done after it: 1 s of traffic in each 1.3 s.
    let config = DirectionConfig { rate_bits_s: Some(1_000_000), ..stalling(1000, 300) };
    let mut shape = Shape::new(&config, 7, 0);
    let pieces = enter(&mut shape, 0, 7 * 125_000);
    let sent = pieces[pieces.len() - 1].sent;
    let stalled: u64 = pieces.iter().map(|piece| piece.stalled).sum();
    assert_eq!(sent - stalled, 7000 * MS);
    assert!((9_700 * MS..=10_000 * MS).contains(&sent), "7 s of work, 300 ms rest each: {sent}");
}

#[test]
fn a_full_queue_has_no_room_until_bytes_have_left() {
    let config = DirectionConfig { queue_bytes: 64 * KIB, ..rated(8) };
    let mut shape = Shape::new(&config, 0, 0);
    assert_eq!(shape.room(0), 64 * KIB);
    last(&mut shape, 0, 60 * KIB);
    assert_eq!(shape.room(0), 0, "4 KiB are not worth a read");
    // 1 byte a microsecond: 12 KiB have left after 12.288 ms, in whole pieces of 1448 bytes.
    let at = shape.room_at();
    assert!((12_288_000..12_288_000 + 1_448_000).contains(&at), "{at}");
    assert_eq!(shape.room(at - 1), 0);
    let room = shape.room(at);
    assert!(room >= 16 * KIB);
    last(&mut shape, at, room);
    assert_eq!(shape.room(at), 0);
    assert_eq!(shape.room(at + 100 * MS), 64 * KIB, "all of it has left");
    let delayed = DirectionConfig { delay: ms(1000), ..config };
    let mut shape = Shape::new(&delayed, 0, 0);
    last(&mut shape, 0, 64 * KIB);
    assert_eq!(shape.room(70 * MS), 64 * KIB, "what travels does not wait");
}

#[test]
fn a_cut_link_forgets_what_waited() {
    let config = DirectionConfig { queue_bytes: 64 * KIB, delay: ms(5), ..rated(8) };
    let mut shape = Shape::new(&config, 0, 0);
    last(&mut shape, 0, 64 * KIB);
    shape.clear(MS);
    assert_eq!(shape.room(MS), 64 * KIB);
    assert_eq!(last(&mut shape, MS, 1000).release, 7 * MS);
}

fn cut_times(config: CutConfig, seed: u64, until: u64) -> Vec<u64> {
    let mut cuts = Cuts::new(Draws::new(seed, 2), config);
    (0..until).step_by(MS as usize).filter(|now| cuts.take(*now)).collect()
}

#[test]
fn cuts_come_when_the_seed_says() {
    let config = CutConfig { every: Some(ms(1000)), ..CutConfig::default() };
    let times = cut_times(config, 3, 20_000 * MS);
    assert_eq!(times.len(), 20);
    for (period, at) in (0..).zip(&times) {
        let of_period = at - period * 1000 * MS;
        assert!((500 * MS..=1000 * MS).contains(&of_period), "{of_period}");
    }
    assert_eq!(times, cut_times(config, 3, 20_000 * MS));
    assert_ne!(times, cut_times(config, 4, 20_000 * MS));
    let once = CutConfig { after: Some(ms(700)), ..CutConfig::default() };
    assert_eq!(cut_times(once, 3, 5_000 * MS), [700 * MS]);
    assert!(cut_times(CutConfig::default(), 3, 5_000 * MS).is_empty());
    let both = CutConfig { after: Some(ms(100)), ..config };
    assert_eq!(cut_times(both, 3, 20_000 * MS), [&[100 * MS], &times[..]].concat());
}

#[test]
fn bytes_cut_once() {
    let config = CutConfig { after_bytes: Some(100), ..CutConfig::default() };
    let mut cuts = Cuts::new(Draws::new(0, 2), config);
    assert!(!cuts.pass(99));
    assert_eq!(cuts.bytes_left(), Some(1));
    assert!(cuts.pass(1));
    assert_eq!(cuts.bytes_left(), None);
    assert!(!cuts.pass(1000));
}

#[test]
fn settings_out_of_range_are_named() {
    let to = "127.0.0.1:1".parse().unwrap();
    let name = |change: fn(&mut EmulatorConfig)| {
        let mut config = EmulatorConfig::new(to);
        change(&mut config);
        match config.check() {
            Err(EmulatorError::Setting { name, .. }) => name,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(name(|c| c.up.rate_bits_s = Some(0)), "rate_bits_s");
    assert_eq!(name(|c| c.down.delay = ms(10_001)), "delay");
    assert_eq!(name(|c| c.down.jitter = Duration::MAX), "jitter");
    assert_eq!(name(|c| c.up.queue_bytes = 0), "queue_bytes");
    assert_eq!(name(|c| c.up.stall = stalling(0, 0).stall), "stall.every");
    assert_eq!(name(|c| c.up.stall = stalling(100, 91).stall), "stall.lasts");
    assert_eq!(name(|c| c.cut.after_bytes = Some(0)), "cut.after_bytes");
    assert_eq!(name(|c| c.cut.every = Some(Duration::ZERO)), "cut.every");
    assert_eq!(name(|c| c.cut.after = Some(Duration::MAX)), "cut.after");
    assert_eq!(name(|c| c.cut.away = Duration::MAX), "cut.away");
    let mut config = EmulatorConfig::new(to).rtt(ms(20)).mbit(60.0, 100.0);
    config.up.stall = stalling(100, 90).stall;
    config.check().unwrap();
}

#[test]
fn quantiles_are_known_to_three_percent() {
    let mut histogram = Histogram::default();
    assert_eq!(histogram.quantile_us(0.5), None);
    for ns in 1..=100_000 {
        histogram.add(ns);
    }
    for (q, us) in [(0.5, 50.0), (0.99, 99.0), (0.0, 0.001), (1.0, 100.0)] {
        let found = histogram.quantile_us(q).unwrap();
        assert!((found - us).abs() <= 0.03 * us, "{q}: {found}");
    }
    histogram.add(u64::MAX);
    let most = histogram.quantile_us(1.0).unwrap();
    assert!((most / (u64::MAX as f64 / 1e3) - 1.0).abs() < 0.03);
}

proptest! {
    #[test]
    fn pieces_keep_their_order_and_the_queue_its_bound(
        seed: u64,
        rate in proptest::option::of(1u64..200),
        delay in 0u64..50,
        jitter in 0u64..50,
        stall in proptest::option::of((10u64..200, 1u64..180)),
        queue in 4096usize..100_000,
        steps in proptest::collection::vec((0u64..20_000_000, 1usize..70_000), 1..100),
    ) {
        let config = DirectionConfig {
            rate_bits_s: rate.map(|mbit| mbit * 1_000_000),
            delay: ms(delay),
            jitter: ms(jitter),
            stall: stall.filter(|(every, lasts)| lasts * 10 <= every * 9).map(|(every, lasts)| {
                StallConfig { every: ms(every), lasts: ms(lasts) }
            }),
            queue_bytes: queue,
        };
        let mut shape = Shape::new(&config, seed, 0);
        let (mut now, mut last_release, mut last_sent) = (0, 0, 0);
        let mut all: Vec<Piece> = Vec::new();
        for (pause, bytes) in steps {
            now += pause;
            let room = shape.room(now);
            prop_assert!(room <= queue);
            if room == 0 {
                let at = shape.room_at();
                prop_assert!(at > now);
                now = at;
            }
            let bytes = bytes.min(shape.room(now));
            prop_assert!(bytes > 0, "room_at is a promise");
            shape.enter(now, bytes, |piece| all.push(piece));
            let waiting: usize =
                all.iter().filter(|piece| piece.sent > now).map(|piece| piece.bytes).sum();
            prop_assert!(waiting <= queue, "{waiting} wait, {queue} may");
        }
        for piece in all {
            prop_assert!(piece.sent >= last_sent && piece.begun <= piece.sent);
            prop_assert!(piece.release >= last_release.max(piece.sent + delay * MS));
            prop_assert!(piece.release < piece.sent.max(last_release) + (delay + jitter) * MS + 1);
            (last_release, last_sent) = (piece.release, piece.sent);
        }
    }
}
