use proptest::prelude::*;

use super::*;

fn packed(codec: Codec, rows: &[f32], hidden: usize) -> Vec<u8> {
    let mut bytes = vec![0; codec.row_bytes(hidden) * (rows.len() / hidden)];
    codec.encode(rows, hidden, &mut bytes).unwrap();
    bytes
}

fn crossed(codec: Codec, rows: &[f32], hidden: usize) -> Vec<f32> {
    let mut out = vec![0.0; rows.len()];
    codec.decode(&packed(codec, rows, hidden), hidden, &mut out).unwrap();
    out
}

#[test]
fn names_and_ids_are_fixed() {
    assert_eq!(
        Codec::ALL.map(|codec| (codec.id(), codec.name(), codec.row_bytes(576))),
        [(0, "f32", 2304), (4, "f16", 1153), (5, "int8", 613), (6, "int4", 361)]
    );
    for codec in Codec::ALL {
        assert_eq!(Codec::from_id(codec.id()), Some(codec));
        assert_eq!(Codec::from_name(codec.name()), Some(codec));
    }
    assert_eq!(Codec::Int4.down(), Codec::Int8);
    for codec in [Codec::F32, Codec::F16, Codec::Int8] {
        assert_eq!(codec.down(), codec);
    }
    // Rows without an exponent were 1 to 3.
    assert_eq!([1, 2, 3, 7, 255].map(Codec::from_id), [None; 5]);
    assert_eq!(["int5", "", "F16"].map(Codec::from_name), [None, None, None]);
    // A block and a short one; an odd number of halves.
    assert_eq!((Codec::Int8.row_bytes(65), Codec::Int4.row_bytes(37)), (74, 28));
    assert_eq!((Codec::Int8.row_bytes(64), Codec::Int4.row_bytes(32)), (69, 21));
}

#[test]
fn bytes_are_little_endian_and_dense() {
    let rows = [1.0f32, -2.0, 0.5, 65504.0];
    assert_eq!(packed(Codec::F32, &rows, 2)[..8], [0, 0, 0x80, 0x3F, 0, 0, 0, 0xC0]);
    assert_eq!(packed(Codec::F16, &rows, 2), [142, 0, 0x3C, 0, 0xC0, 142, 0, 0x38, 0xFF, 0x7B]);
}

#[test]
fn blocks_are_a_scale_the_largest_number_and_codes() {
    // The largest is 1000, the next 127: scale 1. Ties go to even.
    let row = [3.0f32, -127.0, 1000.0, 2.5, 3.5];
    let bytes = [142, 0, 0x3C, 0xD0, 0x63, 3, 0x81, 0x80, 2, 4];
    assert_eq!(packed(Codec::Int8, &row, 5), bytes);
    assert_eq!(crossed(Codec::Int8, &row, 5), [3.0, -127.0, 1000.0, 2.0, 4.0]);
    // Scale 0.5; of two largest ones the first is apart. Low halves: 8, 7, -2; high: -7, 1.
    let row = [-10.0f32, 3.5, -1.0, -3.5, 0.5];
    assert_eq!(packed(Codec::Int4, &row, 5), [142, 0, 0x38, 0, 0xC9, 0x98, 0x17, 0x0E]);
    assert_eq!(crossed(Codec::Int4, &row, 5), row);
    assert_eq!(packed(Codec::Int4, &[2.0, -2.0], 2), [142, 0x92, 0x34, 0, 0x40, 0x98]);
    // Nothing but zeros, and one number alone.
    assert_eq!(packed(Codec::Int8, &[0.0; 3], 3), [142, 0, 0, 0, 0, 0x80, 0, 0]);
    assert_eq!(crossed(Codec::Int4, &[-7.25], 1), [-7.25]);
}

#[test]
fn one_great_number_leaves_its_neighbours_alone() {
    let mut row: Vec<f32> = (0..64).map(|index| (index as f32 * 0.7).sin()).collect();
    row[40] = 22_544.0;
    for (codec, most) in [(Codec::Int8, 0.005), (Codec::Int4, 0.08)] {
        let got = crossed(codec, &row, 64);
        assert_eq!(got[40], 22_544.0);
        for (got, wanted) in got.iter().zip(&row) {
            assert!((got - wanted).abs() < most, "{codec:?}: {got} for {wanted}");
        }
    }
}

#[test]
fn f16_rounds_to_even() {
    let rows = [2049.0f32, 2051.0, 6e-8, 2e-8, -0.0, 65503.0, 65519.0, -1.0];
    let got = crossed(Codec::F16, &rows, 8);
    assert_eq!(got[..2], [2048.0, 2052.0]);
    assert_eq!(got[2], 2f32.powi(-24));
    assert_eq!((got[3], got[4].to_bits()), (0.0, (-0.0f32).to_bits()));
    assert_eq!(got[5..], [65504.0, 65504.0, -1.0]);
}

/// The exponent's byte, and what comes back, where a row's largest number is at an edge.
#[test]
fn a_row_has_the_least_exponent_that_holds_it() {
    let edges = [
        (65504.0f32, 142),
        (65519.996, 142),
        (65520.0, 143),
        (131_039.99, 143),
        (131_040.0, 144),
        (f32::MAX, 255),
        (1.0, 142),
        (2f32.powi(-14), 142),
        (2f32.powi(-15), 142 - 30),
        (f32::MIN_POSITIVE, 142 - 141),
        (f32::from_bits(1), 0),
        (0.0, 142),
    ];
    for (number, byte) in edges {
        let row = [0.0, -number, number / 2.0];
        assert_eq!(packed(Codec::F16, &row, 3)[0], byte, "{number}");
        for codec in Codec::ALL {
            let got = crossed(codec, &row, 3);
            let error = (f64::from(got[1]) - f64::from(row[1])).abs();
            assert!(error <= f64::from(number) / 2048.0, "{codec:?}: {number} came as {}", got[1]);
        }
    }
    // The largest numbers would be rounded up beyond f32.
    assert_eq!(crossed(Codec::F16, &[f32::MAX, -f32::MAX], 2), [f32::MAX, -f32::MAX]);
    // int8 and int4 need more room below, for their scales.
    for (codec, least) in [(Codec::Int8, 2f32.powi(-7)), (Codec::Int4, 2f32.powi(-11))] {
        let bytes = [least, least / 2.0].map(|number| packed(codec, &[number], 1)[0]);
        assert_eq!(bytes[0], 142);
        assert!(bytes[1] < 142);
    }
}

#[test]
fn what_is_not_finite_is_refused_on_both_sides() {
    let refused = Err(CodecError::NotFinite { row: 2, column: 7 });
    for codec in Codec::ALL {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut rows = vec![1.0f32; 3 * 300];
            let mut bytes = packed(codec, &rows, 300);
            rows[2 * 300 + 7] = bad;
            assert_eq!(codec.encode(&rows, 300, &mut bytes.clone()), refused);
            let row = 2 * codec.row_bytes(300);
            match codec {
                Codec::F32 => bytes[row + 28..][..4].copy_from_slice(&bad.to_le_bytes()),
                Codec::F16 => {
                    bytes[row + 15..][..2].copy_from_slice(&f16::from_f32(bad).to_le_bytes());
                }
                Codec::Int8 | Codec::Int4 => {
                    // The number apart is bad, and then the scale: that takes all with it.
                    bytes[row + 3..][..2].copy_from_slice(&f16::from_f32(bad).to_le_bytes());
                    bytes[row + 5] = if codec == Codec::Int8 { 1 } else { 0x11 };
                    let byte = row + 5 + 7;
                    bytes[byte] = if codec == Codec::Int8 { 0x80 } else { 0x18 };
                    let refused = codec.decode(&bytes, 300, &mut rows.clone());
                    assert_eq!(refused, Err(CodecError::NotFinite { row: 2, column: 7 }));
                    bytes[row + 1..][..2].copy_from_slice(&f16::from_f32(bad).to_le_bytes());
                    let refused = codec.decode(&bytes, 300, &mut rows);
                    assert_eq!(refused, Err(CodecError::NotFinite { row: 2, column: 0 }));
                    continue;
                }
            }
            assert_eq!(codec.decode(&bytes, 300, &mut rows), refused);
        }
    }
}

#[test]
fn lengths_of_a_peer_are_checked() {
    for codec in Codec::ALL {
        let expected = 2 * codec.row_bytes(4);
        let bytes = vec![0; expected + 1];
        for got in [0, 1, expected - 1, expected + 1] {
            let refused = Err(CodecError::Length { expected, got });
            assert_eq!(codec.decode(&bytes[..got], 4, &mut [0.0; 8]), refused);
        }
        assert_eq!(codec.decode(&[], 4, &mut []), Ok(()));
    }
}

/// Residual rows: mostly small numbers, some great ones, and all kinds of bits.
fn any_rows() -> impl Strategy<Value = Vec<f32>> {
    let number = prop_oneof![
        8 => -3.0f32..3.0,
        1 => -30000.0f32..30000.0,
        1 => any::<u32>().prop_map(f32::from_bits)
            .prop_map(|x| if x.is_finite() { x } else { 1.0 }),
    ];
    prop::collection::vec(number, 1..700)
}

/// True if a codec whose codes have so many bits takes a row without an exponent.
fn within_reach(rows: &[f32], bits: i32) -> bool {
    let largest = rows.iter().copied().map(f32::abs).fold(0.0, f32::max);
    largest == 0.0 || (2f32.powi(bits - 14)..65520.0).contains(&largest)
}

proptest! {
    /// F32 and F16 give what `half` gives, at any alignment, and a second crossing changes
    /// nothing.
    #[test]
    fn plain_codecs_round_each_number(rows in any_rows(), offset in 0usize..4) {
        let hidden = rows.len();
        for codec in [Codec::F32, Codec::F16] {
            let mut bytes = vec![0; offset + codec.row_bytes(hidden)];
            codec.encode(&rows, hidden, &mut bytes[offset..]).unwrap();
            let mut got = vec![0.0; hidden];
            codec.decode(&bytes[offset..], hidden, &mut got).unwrap();
            let bits = |rows: &[f32]| rows.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(&crossed(codec, &got, hidden)), bits(&got));
            for (&x, &y) in rows.iter().zip(&got) {
                let wanted = match codec {
                    Codec::F32 => Some(x),
                    _ => within_reach(&rows, 0).then(|| f16::from_f32(x).to_f32()),
                };
                prop_assert!(wanted.is_none_or(|wanted| y.to_bits() == wanted.to_bits()));
            }
        }
    }

    /// No row is out of reach: each number comes back within the codec's step of the row's
    /// largest, be that as great or as small as f32 has. f16 writes what came back as it was
    /// written, and so do the others where the largest number of each block is well apart.
    #[test]
    fn rows_of_any_size_come_back(
        rows in prop::collection::vec(-1.0f32..1.0, 1..200), exponent in -148i32..=127,
        apart in any::<bool>(),
    ) {
        let mut rows = rows;
        if apart {
            rows.chunks_mut(32).for_each(|block| block[0] = 4.0);
            rows.chunks_mut(64).for_each(|block| block[0] = 8.0);
        }
        let power = 2f64.powi(if apart { exponent - 3 } else { exponent });
        let rows: Vec<f32> = rows.iter().map(|x| (f64::from(*x) * power) as f32).collect();
        let largest = rows.iter().map(|x| f64::from(x.abs())).fold(0.0, f64::max);
        let steps = [(Codec::F16, 2048.0), (Codec::Int8, 253.0), (Codec::Int4, 13.9)];
        for (codec, steps) in steps {
            let got = crossed(codec, &rows, rows.len());
            for (&got, &wanted) in got.iter().zip(&rows) {
                // Where f32 is subnormal it has steps of its own.
                let allowed = largest / steps + f64::from(f32::from_bits(1));
                let error = (f64::from(got) - f64::from(wanted)).abs();
                prop_assert!(error <= allowed, "{codec:?}: {got} for {wanted} of {largest}");
            }
            if codec == Codec::F16 || (apart && exponent > -120) {
                let bytes = packed(codec, &rows, rows.len());
                prop_assert_eq!(packed(codec, &got, rows.len()), bytes, "{:?}", codec);
            }
        }
    }

    /// A row out of reach has the bytes of one that is just within reach, but for the exponent.
    #[test]
    fn the_exponent_alone_tells_rows_apart(rows in any_rows(), far in 17i32..100) {
        let mut rows: Vec<f32> = rows.iter().map(|x| x.clamp(-30000.0, 30000.0)).collect();
        rows[0] = 30000.0;
        for codec in [Codec::F16, Codec::Int8, Codec::Int4] {
            let near = packed(codec, &rows, rows.len());
            let scaled: Vec<f32> = rows.iter().map(|x| x * 2f32.powi(far)).collect();
            // Brought to where f16 ends, as those of a row twice as great.
            let twice: Vec<f32> = rows.iter().map(|x| x * 2.0).collect();
            let [scaled, twice] = [&scaled, &twice].map(|rows| packed(codec, rows, rows.len()));
            prop_assert_eq!(near[0], 142);
            prop_assert_eq!(&scaled[1..], &twice[1..]);
        }
    }

    /// In each block the largest number comes back as f16, and the others within half a step of
    /// the next largest one's scale.
    #[test]
    fn blocks_keep_their_promise(rows in any_rows()) {
        for (codec, block, most) in [(Codec::Int8, 64, 127.0f32), (Codec::Int4, 32, 7.0)] {
            let got = crossed(codec, &rows, rows.len());
            if !within_reach(&rows, most.log2().ceil() as i32) {
                continue;
            }
            for (got, rows) in got.chunks(block).zip(rows.chunks(block)) {
                let mut sizes: Vec<f32> = rows.iter().map(|x| x.abs()).collect();
                let largest = sizes.iter().copied().fold(0.0, f32::max);
                let at = sizes.iter().position(|&size| size == largest).unwrap();
                sizes.remove(at);
                let scale = sizes.iter().copied().fold(0.0, f32::max) / most;
                prop_assert_eq!(got[at], f16::from_f32(rows[at]).to_f32());
                for (index, (&got, &wanted)) in got.iter().zip(rows).enumerate() {
                    // f16 rounds the scale, by as much as its least step for the tiniest.
                    let allowed = scale * 0.505 + most * 3.1e-8;
                    prop_assert!(index == at || (got - wanted).abs() <= allowed,
                        "{codec:?} {index}: {got} for {wanted}, scale {scale}");
                }
            }
        }
    }

    /// A row's bytes depend on nothing but the row, and not on the instructions either.
    #[test]
    fn rows_are_packed_one_by_one_and_the_same_everywhere(rows in any_rows(), parts in 1usize..4) {
        let hidden = rows.len() / parts.min(rows.len());
        let rows = &rows[..rows.len() / hidden * hidden];
        for codec in [Codec::Int8, Codec::Int4] {
            let row_bytes = codec.row_bytes(hidden);
            let bytes = packed(codec, rows, hidden);
            let mut portable = vec![0; bytes.len()];
            for (row, out) in rows.chunks(hidden).zip(portable.chunks_mut(row_bytes)) {
                match codec {
                    Codec::Int8 => block::encode_row::<Bytes, 64>(row, out),
                    _ => block::encode_row::<Nibbles, 32>(row, out),
                }
            }
            let mut back = vec![0.0; rows.len()];
            for (row, bytes) in back.chunks_mut(hidden).zip(bytes.chunks(row_bytes)) {
                match codec {
                    Codec::Int8 => block::decode_row::<Bytes, 64>(bytes, row),
                    _ => block::decode_row::<Nibbles, 32>(bytes, row),
                }
                Exponent::from_byte(bytes[0]).put_back(row);
            }
            prop_assert_eq!(&portable, &bytes);
            prop_assert_eq!(&back, &crossed(codec, rows, hidden));
            for (row, bytes) in rows.chunks(hidden).zip(bytes.chunks(row_bytes)) {
                prop_assert_eq!(&packed(codec, row, hidden), bytes);
            }
        }
    }

    #[test]
    fn any_bytes_are_rows_or_refused(
        bytes in prop::collection::vec(any::<u8>(), 0..200), hidden in 1usize..100,
    ) {
        for codec in Codec::ALL {
            let rows = bytes.len() / codec.row_bytes(hidden);
            let mut out = vec![0.0; rows * hidden];
            let taken = codec.decode(&bytes[..rows * codec.row_bytes(hidden)], hidden, &mut out);
            prop_assert_eq!(taken.is_ok(), out.iter().all(|number| number.is_finite()));
        }
    }
}
