//! Bytes that each row codec writes: another build must read them.

use hat_engine::options::Codec;

/// A seeded source of numbers.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// Between -1 and 1.
    fn number(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((self.0 >> 32) as u32).cast_signed() as f32 / 2_147_483_648.0
    }
}

/// Rows like a residual stream's: small numbers, and in each row one channel far above them.
fn rows(hidden: usize, random: &mut Random) -> Vec<f32> {
    let mut rows: Vec<f32> = (0..4 * hidden).map(|_| random.number() * 3.0).collect();
    rows.chunks_mut(hidden).for_each(|row| row[hidden / 3] = 22_544.0);
    rows
}

#[test]
fn codecs_write_the_bytes_that_are_written_down() {
    let mut random = Random::new(31);
    let mut got = String::new();
    for hidden in [576, 100, 4096] {
        let rows = rows(hidden, &mut random);
        for codec in Codec::ALL {
            let mut bytes = vec![0; 4 * codec.row_bytes(hidden)];
            assert_eq!(codec.encode(&rows, hidden, &mut bytes), Ok(()));
            let mut back = vec![0.0; rows.len()];
            codec.decode(&bytes, hidden, &mut back).expect("its own bytes");
            let back: Vec<u8> = back.iter().flat_map(|number| number.to_le_bytes()).collect();
            let hash = |bytes: &[u8]| blake3::hash(bytes).to_hex()[..16].to_owned();
            got += &format!("{} {hidden} {} {}\n", codec.name(), hash(&bytes), hash(&back));
        }
    }
    assert_eq!(got, PINNED);
}

/// Codec, numbers of a row, hash of the bytes, hash of the numbers that come back.
const PINNED: &str = "\
f32 576 e4eedcbbcba67b9a e4eedcbbcba67b9a
f16 576 e66fab90a4b340a8 a1637993ab21748f
int8 576 bd4a85a6020c476b bb25363e2aa557b1
int4 576 ba1d64d0468dcd65 40cfb967c8f31a97
f32 100 6444ac358406d6c3 6444ac358406d6c3
f16 100 e36ad8bbfa4e68f0 86374ecaff32a652
int8 100 b6ffe986eb921ae0 3eb0f7282e57c0cd
int4 100 24a862fce785c2c9 48f3bd85afe4f905
f32 4096 62f1276f5cdc6951 62f1276f5cdc6951
f16 4096 f1c544cfa459bb03 6914843ebe2fd162
int8 4096 0adcaa563189c466 ef64945e6451f8c5
int4 4096 1874ae5d0b08ff96 fef6339bab853077
";
