//! Cuts a byte stream into frames, in bounded memory whatever comes in.
//!
//! Bytes are received into a pool buffer that the deframer lends out. A frame that has a buffer
//! nearly to itself leaves *in* that buffer, uncopied; otherwise its body is copied once. The
//! decision compares the two costs: the body, or the bytes that stand behind it.

use super::{BODY_BYTES_MAX, HEADER_BYTES, Header, HeaderError};
use crate::pool::{Buf, LARGE_BYTES, Pool, SMALL_BYTES};

/// A frame whose header and body checksums are right.
#[derive(Debug)]
pub struct RawFrame {
    /// Its header.
    pub header: Header,
    /// Its body.
    pub body: Buf,
}

/// An error in a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The header.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// The checksum over the body does not match.
    #[error("body checksum of a frame of kind {kind} is {got:#010x}, expected {expected:#010x}")]
    Body {
        /// The frame's kind.
        kind: u8,
        /// Computed here.
        expected: u32,
        /// Value in the header.
        got: u32,
    },
}

/// Result of a deframer.
#[derive(Debug)]
pub enum Deframed {
    /// The next frame.
    Frame(RawFrame),
    /// Nothing whole has come in yet.
    NeedBytes,
    /// The pool is empty; ask again when buffers have come back.
    NeedBuffer,
}

/// Frames out of a byte stream.
#[derive(Debug)]
pub struct Deframer {
    pool: Pool,
    /// Bytes `start..` in use are not parsed yet. `None` while lent out, or when nothing waits.
    room: Option<Buf>,
    lent: bool,
    start: usize,
    /// Header of the frame at `start`, once its 32 bytes are there.
    header: Option<Header>,
    body_bytes_max: usize,
    copied_bytes: u64,
}

impl Deframer {
    /// A deframer that takes its memory from `pool`, at most two buffers at a time.
    #[must_use]
    pub fn new(pool: Pool) -> Self {
        Self {
            pool,
            room: None,
            lent: false,
            start: 0,
            header: None,
            body_bytes_max: BODY_BYTES_MAX,
            copied_bytes: 0,
        }
    }

    /// Refuses longer bodies from now on.
    pub fn limit(&mut self, body_bytes_max: usize) {
        self.body_bytes_max = body_bytes_max;
    }

    /// The buffer to receive into, with free bytes behind those in use. Until it is given back by
    /// [`Deframer::put_room`] no frame comes out. `None` if the pool is empty or the buffer is
    /// lent already.
    pub fn take_room(&mut self) -> Option<Buf> {
        if self.lent || !self.make_room() {
            return None;
        }
        self.lent = true;
        self.room.take()
    }

    /// Gives back the buffer of [`Deframer::take_room`], with or without new bytes.
    ///
    /// # Panics
    /// If none was lent.
    pub fn put_room(&mut self, buf: Buf) {
        assert!(self.lent, "a receive buffer comes back once");
        self.lent = false;
        self.room = Some(buf);
    }

    /// Copies from the front of `bytes` and returns how many; 0 if the pool is empty or a frame has
    /// to be taken out first.
    pub fn push(&mut self, bytes: &[u8]) -> usize {
        let Some(mut buf) = self.take_room() else {
            return 0;
        };
        let room = buf.spare_mut();
        let count = bytes.len().min(room.len());
        room[..count].copy_from_slice(&bytes[..count]);
        buf.advance(count);
        self.put_room(buf);
        count
    }

    /// The next whole frame.
    ///
    /// # Errors
    /// At the first wrong header or body; the stream is lost from there on.
    pub fn next_frame(&mut self) -> Result<Deframed, FrameError> {
        let Some(room) = &self.room else {
            return Ok(Deframed::NeedBytes);
        };
        let unparsed = &room.wire()[self.start..];
        let Some(header_bytes) = unparsed.first_chunk() else {
            return Ok(Deframed::NeedBytes);
        };
        let header = match self.header {
            Some(header) => header,
            None => *self.header.insert(Header::decode(header_bytes)?),
        };
        let body_bytes = header.len as usize;
        if body_bytes > self.body_bytes_max {
            let (len, max) = (header.len, self.body_bytes_max as u32);
            return Err(HeaderError::Length { len, max }.into());
        }
        let Some(body) = unparsed[HEADER_BYTES..].get(..body_bytes) else {
            return Ok(Deframed::NeedBytes);
        };
        let expected = crc32c::crc32c(body);
        if header.body_crc != expected {
            let (kind, got) = (header.kind, header.body_crc);
            return Err(FrameError::Body { kind, expected, got });
        }
        let Some(body) = self.body_out(body_bytes) else {
            return Ok(Deframed::NeedBuffer);
        };
        self.header = None;
        Ok(Deframed::Frame(RawFrame { header, body }))
    }

    /// True if a frame has come in part; `None` while its buffer is lent out.
    #[must_use]
    pub fn is_mid_frame(&self) -> Option<bool> {
        let in_part = self.room.as_ref().is_some_and(|room| room.wire().len() > self.start);
        (!self.lent).then_some(in_part)
    }

    /// Body bytes that were copied so far, and bytes moved to make room.
    #[must_use]
    pub fn copied_bytes(&self) -> u64 {
        self.copied_bytes
    }

    /// Takes the whole frame at `start` out; `None` if that needs a buffer and there is none.
    fn body_out(&mut self, body_bytes: usize) -> Option<Buf> {
        let mut room = self.room.take().expect("the caller saw the frame in it");
        let end = self.start + HEADER_BYTES + body_bytes;
        let behind = room.wire().len() - end;
        let fits_small = HEADER_BYTES + body_bytes <= SMALL_BYTES;
        let is_small = room.raw().len() == SMALL_BYTES;
        if body_bytes == 0 {
            self.keep(room, end);
            return Some(Buf::empty());
        }
        if self.start == 0 && behind < body_bytes && (is_small || !fits_small) {
            // The frame leaves in the buffer that it came in; the bytes behind it move.
            if behind > 0 {
                let Some(mut next) = self.pool.take(room.capacity()) else {
                    self.room = Some(room);
                    return None;
                };
                next.clear();
                next.spare_mut()[..behind].copy_from_slice(&room.wire()[end..]);
                next.advance(behind);
                self.copied_bytes += behind as u64;
                self.keep(next, 0);
            }
            room.set_len(body_bytes);
            return Some(room);
        }
        let Some(mut body) = self.pool.take(body_bytes) else {
            self.room = Some(room);
            return None;
        };
        body.body_mut().copy_from_slice(&room.wire()[end - body_bytes..end]);
        self.copied_bytes += body_bytes as u64;
        self.keep(room, end);
        Some(body)
    }

    /// Goes on with `room` at `start`, or returns it to the pool if nothing is left in it.
    fn keep(&mut self, room: Buf, start: usize) {
        let empty = start == room.wire().len();
        self.start = if empty { 0 } else { start };
        self.room = (!empty).then_some(room);
    }

    /// Makes `room` a buffer that holds the rest of the frame at `start`, if it has to.
    fn make_room(&mut self) -> bool {
        let Some(mut room) = self.room.take() else {
            self.start = 0;
            let Some(mut fresh) = self.pool.take(0) else {
                return false;
            };
            fresh.clear();
            self.room = Some(fresh);
            return true;
        };
        let needed = HEADER_BYTES + self.header.map_or(0, |header| header.len as usize);
        let unparsed = room.wire().len() - self.start;
        if needed > room.raw().len() {
            let Some(mut large) = self.pool.take(BODY_BYTES_MAX) else {
                self.room = Some(room);
                return false;
            };
            large.clear();
            large.spare_mut()[..unparsed].copy_from_slice(&room.wire()[self.start..]);
            large.advance(unparsed);
            self.copied_bytes += unparsed as u64;
            room = large;
            self.start = 0;
        } else if self.start > 0 && self.start + needed.max(unparsed + 1) > room.raw().len() {
            let end = room.wire().len();
            room.raw_mut().copy_within(self.start..end, 0);
            room.clear();
            room.advance(unparsed);
            self.copied_bytes += unparsed as u64;
            self.start = 0;
        }
        let has_room = room.wire().len() < room.raw().len();
        self.room = Some(room);
        has_room
    }
}

const _: () = assert!(LARGE_BYTES >= HEADER_BYTES + BODY_BYTES_MAX);

#[cfg(test)]
mod tests {
    use super::super::{Kind, Priority};
    use super::*;
    use crate::pool::PoolConfig;
    use proptest::prelude::*;

    fn frame(kind: Kind, body: &[u8]) -> Vec<u8> {
        let header = Header {
            len: body.len() as u32,
            kind: kind as u8,
            flags: 0,
            priority: Priority::Verify,
            version: 1,
            session: u32::from(kind.is_sequenced()),
            body_crc: crc32c::crc32c(body),
            seq: 0,
            ack: 0,
            credit: 0,
        };
        [&header.encode()[..], body].concat()
    }

    fn deframer() -> Deframer {
        Deframer::new(Pool::new(PoolConfig { small: 3, large: 3 }))
    }

    fn next(deframer: &mut Deframer) -> RawFrame {
        match deframer.next_frame().unwrap() {
            Deframed::Frame(frame) => frame,
            other => panic!("{other:?}"),
        }
    }

    /// Receives as a link does, at most `piece` bytes at a time, and counts the frames.
    fn stream(deframer: &mut Deframer, mut bytes: &[u8], piece: usize) -> usize {
        let mut frames = 0;
        while !bytes.is_empty() {
            let pushed = deframer.push(&bytes[..piece.min(bytes.len())]);
            assert!(pushed > 0);
            bytes = &bytes[pushed..];
            while let Deframed::Frame(_) = deframer.next_frame().unwrap() {
                frames += 1;
            }
        }
        frames
    }

    #[test]
    fn a_frame_alone_is_not_copied() {
        for body in [1, 1168, 16_000, 40_000, BODY_BYTES_MAX] {
            let mut deframer = deframer();
            let wire = frame(Kind::Rows, &vec![7; body]);
            // What fills a small buffer moves once to a large one; else nothing moves.
            assert_eq!(stream(&mut deframer, &wire, wire.len()), 1);
            let moved = if wire.len() > SMALL_BYTES { SMALL_BYTES } else { 0 };
            assert_eq!(deframer.copied_bytes(), moved as u64, "{body}");
        }
    }

    #[test]
    fn an_upload_copies_little() {
        let mut deframer = deframer();
        let wire = frame(Kind::Rows, &[7; BODY_BYTES_MAX]).repeat(100);
        assert_eq!(stream(&mut deframer, &wire, usize::MAX), 100);
        // The first frame grows out of a small buffer; each then moves the bytes behind it.
        let bound = SMALL_BYTES + 100 * (LARGE_BYTES - HEADER_BYTES - BODY_BYTES_MAX);
        assert!(deframer.copied_bytes() <= bound as u64, "{}", deframer.copied_bytes());
    }

    #[test]
    fn a_body_is_copied_at_most_once() {
        let mut deframer = deframer();
        let wire = frame(Kind::Rows, &[7; 1168]).repeat(100);
        assert_eq!(stream(&mut deframer, &wire, usize::MAX), 100);
        // Besides, less than one frame moves for each buffer that fills up.
        let moves = wire.len() / SMALL_BYTES * 1200;
        assert!(deframer.copied_bytes() <= (wire.len() + moves) as u64);
    }

    #[test]
    fn a_damaged_body_is_an_error() {
        let mut deframer = deframer();
        let mut wire = frame(Kind::Rows, &[7; 100]);
        wire[50] ^= 1;
        deframer.push(&wire);
        let error = deframer.next_frame().unwrap_err();
        assert!(matches!(error, FrameError::Body { kind: 18, .. }), "{error}");
    }

    #[test]
    fn an_empty_pool_is_waited_for() {
        let pool = Pool::new(PoolConfig { small: 1, large: 0 });
        let mut deframer = Deframer::new(pool.clone());
        let held = pool.take(1).unwrap();
        assert!(deframer.take_room().is_none());
        drop(held);
        // Two frames in the one buffer: the first can't leave before there is another buffer.
        let wire = [frame(Kind::Rows, &[1; 64]), frame(Kind::Rows, &[2; 64])].concat();
        assert_eq!(deframer.push(&wire), wire.len());
        assert!(matches!(deframer.next_frame().unwrap(), Deframed::NeedBuffer));
        assert!(matches!(deframer.next_frame().unwrap(), Deframed::NeedBuffer));
    }

    #[test]
    fn an_unknown_peer_costs_one_small_buffer() {
        let pool = Pool::new(PoolConfig { small: 2, large: 2 });
        let mut deframer = Deframer::new(pool.clone());
        deframer.push(b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n");
        let error = deframer.next_frame().unwrap_err();
        assert!(matches!(error, FrameError::Header(HeaderError::Http { verb: "asked" })));
        assert_eq!(pool.free(), (1, 2));
    }

    #[test]
    fn no_byte_behind_a_frame_is_lost() {
        // A frame that leaves in its buffer, one that is copied out, and one without a body; cut
        // at each byte of the next one's header.
        for body in [0, 1, 100, 5000, 20_000] {
            for behind in 0..=HEADER_BYTES + 1 {
                let mut deframer = deframer();
                let wire = [frame(Kind::Rows, &vec![7; body]), frame(Kind::Rows, b"next")].concat();
                let cut = HEADER_BYTES + body + behind;
                assert_eq!(stream(&mut deframer, &wire[..cut], usize::MAX), 1, "{body}, {behind}");
                let pushed = deframer.push(&wire[cut..]);
                assert_eq!(pushed, wire.len() - cut, "{body}, {behind}");
                assert_eq!(&next(&mut deframer).body[..], b"next", "{body}, {behind}");
            }
        }
    }

    #[test]
    fn a_lent_buffer_keeps_its_bytes() {
        let mut deframer = deframer();
        let wire = frame(Kind::Rows, b"hidden");
        assert_eq!(deframer.push(&wire[..20]), 20);
        let mut room = deframer.take_room().unwrap();
        assert!(deframer.take_room().is_none());
        assert!(matches!(deframer.next_frame().unwrap(), Deframed::NeedBytes));
        room.spare_mut()[..wire.len() - 20].copy_from_slice(&wire[20..]);
        room.advance(wire.len() - 20);
        deframer.put_room(room);
        assert_eq!(&next(&mut deframer).body[..], b"hidden");
    }

    /// `data` as a byte stream, in pieces whose sizes it chooses: what comes out is what went in.
    fn deframe_pieces(data: &[u8]) {
        let pool = Pool::new(PoolConfig { small: 2, large: 2 });
        let mut deframer = Deframer::new(pool.clone());
        let (mut rest, mut seen) = (data, 0);
        'stream: while !rest.is_empty() {
            let piece = rest.len().min(usize::from(rest[0]) * 16 + 1);
            let mut bytes = &rest[..piece];
            rest = &rest[piece..];
            while !bytes.is_empty() {
                let pushed = deframer.push(bytes);
                assert!(pushed > 0, "there is room after all frames are out");
                bytes = &bytes[pushed..];
                loop {
                    match deframer.next_frame() {
                        Ok(Deframed::Frame(frame)) => {
                            let wire = frame.header.encode();
                            assert_eq!(wire, data[seen..][..HEADER_BYTES]);
                            seen += HEADER_BYTES;
                            assert_eq!(frame.body[..], data[seen..][..frame.body.len()]);
                            seen += frame.body.len();
                        }
                        Ok(Deframed::NeedBytes) => break,
                        Ok(Deframed::NeedBuffer) => panic!("two buffers of each size are enough"),
                        Err(_) => break 'stream,
                    }
                }
            }
        }
        drop(deframer);
        assert_eq!(pool.free(), (2, 2));
    }

    proptest! {
        #[test]
        fn any_cut_gives_the_same_frames(
            sizes in prop::collection::vec(0usize..20_000, 1..8),
            pieces in prop::collection::vec(1usize..30_000, 1..20),
        ) {
            let mut wire = Vec::new();
            for (index, size) in sizes.iter().enumerate() {
                wire.extend(frame(Kind::Rows, &vec![index as u8; *size]));
            }
            let mut deframer = Deframer::new(Pool::new(PoolConfig { small: 3, large: 3 }));
            let (mut bytes, mut got) = (&wire[..], Vec::new());
            for piece in pieces.iter().cycle() {
                if bytes.is_empty() {
                    break;
                }
                let pushed = deframer.push(&bytes[..bytes.len().min(*piece)]);
                prop_assert!(pushed > 0);
                bytes = &bytes[pushed..];
                while let Deframed::Frame(frame) = deframer.next_frame().unwrap() {
                    let fill = got.len() as u8;
                    prop_assert!(frame.body.iter().all(|byte| *byte == fill));
                    got.push(frame.body.len());
                }
            }
            prop_assert_eq!(got, sizes);
        }

        #[test]
        fn no_bytes_break_the_deframer(
            noise in prop::collection::vec(any::<u8>(), 0..300),
            body in prop::collection::vec(any::<u8>(), 0..2000),
            flip in prop::option::of(any::<prop::sample::Index>()),
        ) {
            deframe_pieces(&noise);
            let mut wire = frame(Kind::Rows, &body);
            wire.extend(frame(Kind::Ping, &body));
            if let Some(flip) = flip {
                let at = flip.index(wire.len());
                wire[at] ^= 0x10;
            }
            wire.extend(noise);
            deframe_pieces(&wire);
        }
    }
}
