//! One long history made from a seed, and what was planned on it.

use std::time::Duration;

use hat_transport::conn::ConnectionId;
use hat_transport::frame::{Kind, Priority};
use hat_transport::message::{Commit, End, Message, Open, RowsHead, Want};

use super::bed::{Bed, MS};
use super::ledger::{HIDDEN, Ledger};

const DEVICES: u64 = 4;
const SESSIONS: usize = 3;
const ROWS_MAX: u32 = 1500;

/// A generator of numbers, good enough to spread a schedule.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

/// A device's view of one of its sessions.
#[derive(Default)]
struct Client {
    wire_id: u32,
    /// The last committed row, and the last row of all.
    tip: u32,
    last: u32,
    committed: u32,
    /// Pending rows, a chain below the tip.
    pending: Vec<u32>,
}

/// The history of `seed`: what was planned, a line a step, and the bed behind it.
fn run(seed: u64, ticks: u32, model: Option<Ledger>) -> (Vec<String>, Bed) {
    let mut bed = Bed::with(12 * 49, |_| {});
    bed.model = model;
    for _ in 0..DEVICES {
        bed.connect();
    }
    let (mut random, mut log) = (Random(seed), Vec::new());
    let mut clients: [[Client; SESSIONS]; DEVICES as usize] = Default::default();
    let mut next_id = 1;
    for tick in 0..ticks {
        // While nobody decodes, steps are longer and planned ahead.
        let is_quiet = tick / 700 % 2 == 1;
        let device = random.below(DEVICES);
        let session = random.below(SESSIONS as u64) as usize;
        let client = &mut clients[device as usize][session];
        act(&mut bed, ConnectionId(device + 1), client, &mut next_id, &mut random, is_quiet);
        plan(&mut bed, &mut log);
        match random.below(5) {
            0 | 1 => bed.at_first = bed.at_first.saturating_sub(1),
            2 | 3 if bed.out.len() as u64 > bed.at_first => {
                let rows = bed.out[0].step.plan.rows() as u32;
                bed.finish_in(2 * MS + rows * Duration::from_micros(300));
                bed.transmit();
            }
            _ => {}
        }
        if bed.model.is_none() {
            bed.sink.sent.clear(); // nobody reads them
        }
        bed.now += Duration::from_micros(random.below(12_000));
        plan(&mut bed, &mut log);
    }
    (log, bed)
}

/// Plans what may be planned; each step goes to the end of the log.
fn plan(bed: &mut Bed, log: &mut Vec<String>) {
    let before = bed.out.len();
    bed.plan();
    for batch in bed.out.range(before..) {
        let step = &batch.step;
        let mut line = format!("to {} moves {}:", step.exit_layer, step.moves.len());
        for index in 0..batch.sessions.len() {
            let (key, entry) = (batch.sessions[index].0, step.entry_layers[index]);
            let (count, rows) = (step.plan.rows_of(index).len(), &batch.rows[index]);
            let (first, wanted) = (rows.ids.first(), rows.wanted.len());
            line += &format!(" {key} from {entry} x{count} id {first:?} want {wanted};");
        }
        log.push(line);
    }
}

/// A device does one thing in one of its sessions.
fn act(
    bed: &mut Bed,
    device: ConnectionId,
    client: &mut Client,
    next_id: &mut u32,
    random: &mut Random,
    is_quiet: bool,
) {
    if client.wire_id == 0 || client.committed + 200 > ROWS_MAX {
        if client.wire_id != 0 {
            bed.message(device, client.wire_id, &Message::End(End::default()));
        }
        *client = Client { wire_id: *next_id, ..Client::default() };
        *next_id += 1;
        let open = Open {
            entry_layer: 1 + random.below(2) as u16,
            exit_layer: 3 + u16::from(random.below(4) > 0),
            rows_max: ROWS_MAX,
            ..super::bed::open()
        };
        bed.message(device, client.wire_id, &Message::Open(open));
    }
    let session = client.wire_id;
    match random.below(if is_quiet { 4 } else { 10 }) {
        // A piece of a prompt, in one frame or several.
        0..=3 => {
            let frames = 1 + random.below(3);
            client.pending.clear();
            for frame in 0..frames {
                let count = 1 + random.below(40) as u16;
                let want = if random.below(8) == 0 && !is_quiet { Want::Last } else { Want::None };
                let body = client.decided(count, 0, want, frame + 1 < frames);
                bed.frame(device, Kind::Rows, session, Priority::Prompt, &body);
            }
        }
        // A verify: a root and a chain of drafts below it.
        4..=7 => {
            let kept = random.below(client.pending.len() as u64 + 1) as usize;
            let commit = client.commit(kept);
            let body = client.decided(1, commit, Want::All, true);
            bed.frame(device, Kind::Rows, session, Priority::Verify, &body);
            let body = client.pending_rows(1 + random.below(7) as u16, 0);
            bed.frame(device, Kind::Rows, session, Priority::Verify, &body);
        }
        // A batch of drafts below what pends, or a commit alone.
        8 if !client.pending.is_empty() && client.pending.len() < 40 => {
            let body = client.pending_rows(1 + random.below(6) as u16, 0);
            bed.frame(device, Kind::Rows, session, Priority::Verify, &body);
        }
        9 if !client.pending.is_empty() => {
            let row = client.commit(1);
            bed.message(device, session, &Message::Commit(Commit { row }));
        }
        _ => {}
    }
}

impl Client {
    /// Keeps the first `kept` pending rows; says which commit that is.
    fn commit(&mut self, kept: usize) -> u32 {
        let Some(row) = kept.checked_sub(1).map(|last| self.pending[last]) else {
            return 0;
        };
        self.pending.drain(..kept);
        (self.tip, self.committed) = (row, self.committed + kept as u32);
        row
    }

    fn decided(&mut self, count: u16, commit: u32, want: Want, more: bool) -> Vec<u8> {
        let (first_id, parent) = (self.last + 1, self.tip);
        self.pending.clear();
        self.last += u32::from(count);
        (self.tip, self.committed) = (self.last, self.committed + u32::from(count));
        rows(RowsHead { first_id, count, tree: false, more, decided: true, want, parent, commit })
    }

    fn pending_rows(&mut self, count: u16, commit: u32) -> Vec<u8> {
        let (first_id, parent) = (self.last + 1, self.pending.last().copied().unwrap_or(self.tip));
        self.last += u32::from(count);
        self.pending.extend(first_id..=self.last);
        let (more, want) = (false, Want::All);
        rows(RowsHead { first_id, count, tree: false, more, decided: false, want, parent, commit })
    }
}

fn rows(head: RowsHead) -> Vec<u8> {
    let mut body = vec![0; head.payload_start() + usize::from(head.count) * HIDDEN * 4];
    head.encode(&[], &mut body);
    body
}

/// Steps are planned as they were before the cloud was a core, but for the time of steps with
/// prompts while somebody decodes.
#[test]
fn steps_are_planned_as_they_always_were() {
    let (log, bed) = run(7, 20_000, None);
    let figures = bed.core.figures();
    assert_eq!((log.len(), figures.refused, figures.evicted, figures.busy), (6076, 0, 0, 0));
    let digest = blake3::hash(log.join("\n").as_bytes());
    assert_eq!(
        digest.to_hex().as_str(),
        "20ccfb90ad5f38478da26c7e79aaa9fa5f670d5cabed9ca87f90ce385a355c9d"
    );
}

/// One history gives the same frames in the same order, byte for byte, however often it is told.
#[test]
fn the_same_history_gives_the_same_bytes() {
    let bytes_of = |seed| {
        let (_, bed) = run(seed, 400, Some(Ledger::default()));
        let mut hasher = blake3::Hasher::new();
        for (to, frame) in &bed.sink.sent {
            hasher.update(&[frame.kind as u8]);
            hasher.update(&to.0.to_le_bytes());
            hasher.update(&frame.session.to_le_bytes());
            hasher.update(&frame.body);
        }
        (bed.sink.sent.len(), hasher.finalize())
    };
    for seed in 0..3 {
        assert_eq!(bytes_of(seed), bytes_of(seed), "seed {seed}");
    }
    assert_ne!(bytes_of(0), bytes_of(1));
}
