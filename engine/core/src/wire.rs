//! Facts that both roles state on the wire, and checks of the other side's.

use std::ops::Range;

use hat_plan::{ARITHMETIC_CPU, ARITHMETIC_CUDA, PAGE_SIZE};
use hat_transport::codec::Codec;
use hat_transport::frame::{FRAME_BYTES_MAX, HEADER_BYTES};
pub use hat_transport::message::Role;
use hat_transport::message::{Hello, KV_F16, KvPages, PAGE_ID_BYTES, PAGE_IDS_MAX};

use crate::sequence::PENDING_ROWS_MAX;

/// Arithmetics that this version knows.
const ARITHMETICS: [u32; 2] = [ARITHMETIC_CPU, ARITHMETIC_CUDA];

/// Facts of a bundle that the protocol speaks about.
#[derive(Clone, Debug)]
pub struct BundleFacts {
    /// Width of a row.
    pub hidden_size: usize,
    /// Positions of the model.
    pub context: u32,
    /// Layers that the cloud holds, or that the device wants computed.
    pub layers: Range<u32>,
    /// Identity that both halves of one model share.
    pub model_id: [u8; 32],
    /// The device runs the last layers, so all rows come back.
    pub has_tail: bool,
}

/// A HELLO with everything that follows from the model and from this program; the arithmetic is the
/// CPU's unless a backend names another.
#[must_use]
pub fn hello(role: Role, model_id: [u8; 32], hidden_size: usize, layers: Range<u32>) -> Hello {
    let layer = |layer: u32| u16::try_from(layer).expect("a model has fewer than 65,536 layers");
    Hello {
        model_id,
        arithmetic_id: ARITHMETIC_CPU,
        hidden_size: u32::try_from(hidden_size).expect("rows are narrower than 2^32"),
        entry_layer: layer(layers.start),
        exit_layer: layer(layers.end),
        codecs: Codec::ALL.iter().fold(0, |set, codec| set | 1 << codec.id()),
        rows_pending_max: u16::try_from(PENDING_ROWS_MAX).expect("64"),
        kv: KvPages { kv_type: KV_F16, page_size: u16::try_from(PAGE_SIZE).expect("32") },
        ..Hello::new(role)
    }
}

/// Checks that the peer's layers compute in an arithmetic that this version knows and `wanted`
/// allows: that one alone, or any.
///
/// # Errors
/// The reason, for people.
pub fn check_arithmetic(there: u32, wanted: Option<u32>) -> Result<(), String> {
    match wanted {
        None if ARITHMETICS.contains(&there) => Ok(()),
        Some(wanted) if wanted == there => Ok(()),
        Some(wanted) => Err(format!("arithmetic {there} there, {wanted} is wanted here")),
        None => Err(format!(
            "arithmetic {there} there, {ARITHMETICS:?} are known here: run the same version on \
             both sides"
        )),
    }
}

/// Compares the HELLOs of a device and a cloud as `docs/PROTOCOL.md` says: each end does.
///
/// # Errors
/// The reason to close with INCOMPATIBLE: the first field that does not go together, with both
/// values.
pub fn check_peer(ours: &Hello, peer: &Hello) -> Result<(), String> {
    if peer.model_id != ours.model_id || peer.hidden_size != ours.hidden_size {
        return Err(format!(
            "two different models: {} (rows of {}) here, {} (rows of {}) there; \
             split one model and give each side its half",
            short(&ours.model_id),
            ours.hidden_size,
            short(&peer.model_id),
            peer.hidden_size
        ));
    }
    check_arithmetic(peer.arithmetic_id, None)?;
    let equal = [
        ("kv_type", u32::from(ours.kv.kv_type), u32::from(peer.kv.kv_type)),
        ("page_size", u32::from(ours.kv.page_size), u32::from(peer.kv.page_size)),
    ];
    if let Some((field, here, there)) = equal.iter().find(|(_, here, there)| here != there) {
        return Err(format!("{field} is {here} here, {there} there: run the same version on both"));
    }
    if ours.codecs & peer.codecs == 0 {
        return Err(format!("no common codec: {:#b} here, {:#b} there", ours.codecs, peer.codecs));
    }
    let (device, cloud) = if ours.role == Role::Device { (ours, peer) } else { (peer, ours) };
    let layers = |hello: &Hello| u32::from(hello.entry_layer)..u32::from(hello.exit_layer);
    check_layers(layers(device), &layers(cloud))?;
    if cloud.row_budget == 0 {
        return Err("row_budget is 0: the cloud would take no chunk".to_owned());
    }
    let held = layers(cloud).len();
    if usize::from(cloud.stages) > held {
        return Err(format!("stages is {}, but the cloud holds {held} layers", cloud.stages));
    }
    Ok(())
}

/// Checks that the peer takes rows of `codec`, up and down.
///
/// # Errors
/// The reason, with both values.
pub fn check_codec(codec: Codec, hidden_size: usize, peer: &Hello) -> Result<(), String> {
    for codec in [codec, codec.down()] {
        if peer.codecs & 1 << codec.id() == 0 {
            let (name, known) = (codec.name(), peer.codecs);
            return Err(format!("codec {name} is not among the peer's ({known:#b})"));
        }
        check_row(codec, hidden_size, frame_bytes_max(peer))?;
    }
    Ok(())
}

/// Checks that one row fits a frame.
///
/// # Errors
/// The reason, with both sizes.
pub fn check_row(codec: Codec, hidden_size: usize, frame_bytes_max: usize) -> Result<(), String> {
    if rows_per_frame(codec, hidden_size, frame_bytes_max) > 0 {
        return Ok(());
    }
    let bytes = codec.row_bytes(hidden_size);
    Err(format!("frame_bytes_max is {frame_bytes_max}, too short for a row of {bytes} bytes"))
}

/// Bytes of the longest frame that may go to a peer, header included.
#[must_use]
pub fn frame_bytes_max(peer: &Hello) -> usize {
    (peer.frame_bytes_max as usize).min(FRAME_BYTES_MAX)
}

/// Most names of pages in a frame to a peer.
#[must_use]
pub fn pages_per_frame(frame_bytes_max: usize) -> usize {
    let bytes = frame_bytes_max.saturating_sub(HEADER_BYTES + OPEN_BYTES);
    (bytes / PAGE_ID_BYTES).min(PAGE_IDS_MAX)
}

/// Checks that `held` covers `wanted`.
///
/// # Errors
/// The reason, with both ranges.
pub fn check_layers(wanted: Range<u32>, held: &Range<u32>) -> Result<(), String> {
    if wanted.start < wanted.end && wanted.start >= held.start && wanted.end <= held.end {
        return Ok(());
    }
    Err(format!(
        "layers {}..{} are wanted, the cloud holds {}..{}",
        wanted.start, wanted.end, held.start, held.end
    ))
}

/// The first bytes of a model id, for people.
#[must_use]
pub fn short(model_id: &[u8; 32]) -> String {
    model_id[..6].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes in front of the rows in `ROWS` and `OUTPUT`, ids or parents not counted.
const HEAD_BYTES: usize = 32;
/// Bytes in front of the names in OPEN, which has more of them than END.
const OPEN_BYTES: usize = 16;

/// Rows that fit one frame of `frame_bytes_max` bytes, with four bytes each for an id or a parent;
/// 0 if not even one does.
#[must_use]
pub fn rows_per_frame(codec: Codec, hidden_size: usize, frame_bytes_max: usize) -> usize {
    let bytes = frame_bytes_max.min(FRAME_BYTES_MAX).saturating_sub(HEADER_BYTES + HEAD_BYTES);
    bytes / (codec.row_bytes(hidden_size) + 4)
}

/// Most rows of a chunk on a connection with so many sessions.
///
/// A chunk keeps its bytes of the window until the cloud has all of it, and the window of a cloud
/// has room for two of its largest steps in the longest rows. So as many chunks of which a part is
/// still on its way fit it as there are sessions, or each would wait for the credit of the others.
#[must_use]
pub fn chunk_rows_max(row_budget: u32, codec: Codec, hidden_size: usize, sessions: usize) -> u32 {
    let row_bytes = |codec: Codec| codec.row_bytes(hidden_size) as u64 + 4;
    let window = 2 * u64::from(row_budget) * row_bytes(Codec::F32);
    let rows = window / (row_bytes(codec) * sessions.max(1) as u64);
    u32::try_from(rows).unwrap_or(u32::MAX).clamp(1, row_budget.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_of_all_sessions_fit_a_window_of_two() {
        for (budget, hidden_size) in [(16, 4096), (64, 896), (512, 5120)] {
            for codec in Codec::ALL {
                let rows = |sessions| chunk_rows_max(budget, codec, hidden_size, sessions);
                let bytes = |codec: Codec| codec.row_bytes(hidden_size) + 4;
                for sessions in 1..=2 * budget as usize {
                    let window = 2 * budget as usize * bytes(Codec::F32);
                    assert!(rows(sessions) as usize * bytes(codec) * sessions <= window);
                    assert!((1..=budget).contains(&rows(sessions)));
                }
                assert_eq!([rows(1), rows(2)], [budget; 2], "one or two take what there is");
            }
        }
        assert_eq!(chunk_rows_max(512, Codec::F32, 4096, 4), 256);
        assert_eq!(chunk_rows_max(512, Codec::Int8, 4096, 7), 512);
    }

    fn hello(role: Role) -> Hello {
        let own = super::hello(role, [7; 32], 64, 1..4);
        match role {
            Role::Device => own,
            Role::Cloud => Hello { row_budget: 512, stages: 1, ..own },
        }
    }

    #[test]
    fn hellos_that_go_together_pass_at_both_ends() {
        let (device, cloud) = (hello(Role::Device), hello(Role::Cloud));
        assert_eq!(check_peer(&device, &cloud), Ok(()));
        assert_eq!(check_peer(&cloud, &device), Ok(()));
        // A cloud may hold more than is asked for, and compute in another arithmetic.
        let wide = Hello { entry_layer: 0, exit_layer: 9, arithmetic_id: ARITHMETIC_CUDA, ..cloud };
        assert_eq!(check_peer(&device, &wide), Ok(()));
        let one = Hello { codecs: 1, frame_bytes_max: 4096, rows_pending_max: 0, ..cloud };
        assert_eq!(check_peer(&device, &one), Ok(()));
    }

    #[test]
    fn each_field_that_does_not_go_together_is_named_at_both_ends() {
        type Change = fn(&mut Hello);
        let cases: [(&str, Change); 8] = [
            ("two different models", |hello| hello.model_id[31] = 0),
            ("rows of 65", |hello| hello.hidden_size = 65),
            ("arithmetic 9", |hello| hello.arithmetic_id = 9),
            ("kv_type", |hello| hello.kv.kv_type = 9),
            ("page_size", |hello| hello.kv.page_size = 1),
            ("codec", |hello| hello.codecs = 1 << 20),
            ("layers", |hello| hello.exit_layer = hello.entry_layer),
            ("layers", |hello| hello.entry_layer = 3),
        ];
        for (role, other) in [(Role::Device, Role::Cloud), (Role::Cloud, Role::Device)] {
            for (number, (named, change)) in cases.iter().enumerate() {
                let mut peer = hello(other);
                change(&mut peer);
                // A device may ask for fewer layers than the cloud has.
                if other == Role::Device && number == 7 {
                    peer.entry_layer = 0;
                }
                let reason = check_peer(&hello(role), &peer).expect_err(named);
                assert!(reason.contains(named), "{reason}");
            }
        }
        let cloud = |change: Change| {
            let mut cloud = hello(Role::Cloud);
            change(&mut cloud);
            check_peer(&hello(Role::Device), &cloud).unwrap_err()
        };
        assert!(cloud(|cloud| cloud.row_budget = 0).contains("row_budget"));
        assert!(cloud(|cloud| cloud.stages = u16::MAX).contains("stages is 65535"));
    }

    #[test]
    fn a_codec_has_to_be_known_there_and_its_rows_to_fit() {
        let known =
            |codecs, frame_bytes_max| Hello { codecs, frame_bytes_max, ..hello(Role::Cloud) };
        assert_eq!(check_codec(Codec::F32, 64, &known(1, 4096)), Ok(()));
        let text = check_codec(Codec::F16, 64, &known(1, 4096)).unwrap_err();
        assert!(text.contains("codec f16"), "{text}");
        // What comes down is coded as int8.
        let int4_alone = 1 << Codec::Int4.id();
        assert!(check_codec(Codec::Int4, 64, &known(int4_alone, 4096)).is_err());
        let text = check_codec(Codec::F32, 2048, &known(1, 4096)).unwrap_err();
        assert!(text.contains("4096") && text.contains("8192"), "{text}");
    }

    #[test]
    fn frames_hold_what_the_peer_takes() {
        for frame in [4096, 5000, FRAME_BYTES_MAX, FRAME_BYTES_MAX + 1, usize::MAX] {
            for codec in Codec::ALL {
                let rows = rows_per_frame(codec, 64, frame);
                let bytes = |rows: usize| HEADER_BYTES + 32 + rows * (codec.row_bytes(64) + 4);
                let frame = frame.min(FRAME_BYTES_MAX);
                assert!(rows > 0 && bytes(rows) <= frame && bytes(rows + 1) > frame);
            }
        }
        assert_eq!(rows_per_frame(Codec::F32, 2048, 4096), 0);
        assert_eq!(pages_per_frame(FRAME_BYTES_MAX), PAGE_IDS_MAX);
        assert!(32 + 16 + 16 * pages_per_frame(4096) <= 4096);
    }
}
