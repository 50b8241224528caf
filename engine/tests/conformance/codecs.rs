//! What each row codec writes, to the byte: another build must read it.

use hat_engine::options::Codec;

use crate::cases::Random;

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
            assert_eq!(codec.pack(&rows, hidden, &mut bytes), Ok(0));
            let mut back = vec![0.0; rows.len()];
            codec.unpack(&bytes, hidden, &mut back).expect("its own bytes");
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
f16 576 82ec34b5dde57de2 a1637993ab21748f
int8 576 c79f57c8f2d49812 bb25363e2aa557b1
int4 576 f517eedce295fe34 40cfb967c8f31a97
f32 100 6444ac358406d6c3 6444ac358406d6c3
f16 100 b4b82cea4485333d 86374ecaff32a652
int8 100 8b6a51513e494263 3eb0f7282e57c0cd
int4 100 192ebc25d4c5a052 48f3bd85afe4f905
f32 4096 62f1276f5cdc6951 62f1276f5cdc6951
f16 4096 f1611f6eba508e39 6914843ebe2fd162
int8 4096 5e2788dd42e496a9 ef64945e6451f8c5
int4 4096 910ac960d2dfbfa2 fef6339bab853077
";
