//! The operations of dev.cuh on a warp's registers against the tables of the PTX ISA, written anew
//! from there: of "Warp-level Matrix Instructions" the parts "Matrix Fragments for mma.m16n8k16"
//! (with floating point and with integer type), "for mma.m16n8k32" and "ldmatrix", of "Data
//! Movement" the part "cp.async". Kernel and emulator can't share a misreading of them then. And
//! what the independence of rows rests on: what a product of matrices gives for a row does not
//! depend on the others, nor on where it stands.

use half::{bf16, f16};
use hat_cuda::gpu::Memory as _;
use hat_cuda::testkit::fragments::{LANES, PRODUCT_WORDS, Product, Rows, multiply, rows};
use hat_cuda::testkit::test_gpu::TestGpu;

use crate::stand::{Random, bits, gpu, memory, numbers, room, same_under_all_schedules as same};

const ROWS: usize = 16; // m of m16n8k16
const COLUMNS: usize = 8; // n
const DEPTH: usize = 16; // k

/// Bytes that are all different in their neighbourhood, as 32 rows of 8 numbers of 16 bits.
fn tile(random: &mut Random) -> Vec<[u16; 8]> {
    (0..LANES).map(|_| std::array::from_fn(|_| random.next() as u16)).collect()
}

fn words(tile: &[[u16; 8]]) -> Vec<u32> {
    let pair = |pair: &[u16]| u32::from(pair[0]) | u32::from(pair[1]) << 16;
    tile.iter().flat_map(|row| row.chunks(2).map(pair)).collect()
}

fn run(gpu: &mut TestGpu, what: Rows, tile: &[[u16; 8]], lanes: &[u32]) -> Vec<u32> {
    let (from, lanes) = (memory(gpu, &words(tile)), memory(gpu, lanes));
    let mut out = room::<u32>(gpu, 4 * LANES);
    rows(gpu, what, from.slice(), lanes.slice(), out.slice_mut()).unwrap();
    numbers(gpu, &out, 4 * LANES)
}

/// A permutation of the lanes.
fn shuffled(random: &mut Random, count: usize) -> Vec<u32> {
    let mut all: Vec<u32> = (0..count as u32).collect();
    for end in (1..count).rev() {
        all.swap(end, random.below(end + 1));
    }
    all
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn matrices_are_loaded_as_the_isa_says() {
    let Some(mut gpu) = gpu() else { return };
    let mut random = Random(60);
    let tile = tile(&mut random);
    for lanes in [shuffled(&mut random, LANES), (0..32).collect()] {
        // Threads 8 m .. 8 m + 8 name the rows of matrix m. Thread t gets of each row-major matrix
        // elements 2 (t % 4) and the next of row t / 4, the first in the low half; with .trans the
        // same of the transposed matrix.
        let row = |matrix: usize, row: usize| tile[lanes[8 * matrix + row] as usize];
        for (what, transposed) in [(Rows::Load, false), (Rows::LoadTransposed, true)] {
            let found = same(&mut gpu, |gpu| run(gpu, what, &tile, &lanes));
            for thread in 0..LANES {
                for matrix in 0..4 {
                    let element = |i: usize| {
                        let (line, place) = (thread / 4, 2 * (thread % 4) + i);
                        let (line, place) = if transposed { (place, line) } else { (line, place) };
                        u32::from(row(matrix, line)[place])
                    };
                    let expected = element(0) | element(1) << 16;
                    let found = found[4 * thread + matrix];
                    assert_eq!(found, expected, "{what:?}: thread {thread}, register {matrix}");
                }
            }
        }
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn copies_arrive_where_they_are_sent_and_zeros_where_nothing_is() {
    let Some(mut gpu) = gpu() else { return };
    let mut random = Random(61);
    let tile = tile(&mut random);
    // src-size 0: none of the 16 bytes are read, and the destination is filled with zeros.
    let lanes: Vec<u32> = shuffled(&mut random, LANES)
        .into_iter()
        .enumerate()
        .map(|(lane, place)| place + if lane % 3 == 1 { 32 } else { 0 })
        .collect();
    for what in [Rows::Copy, Rows::CopyWords] {
        let found = same(&mut gpu, |gpu| run(gpu, what, &tile, &lanes));
        for (lane, place) in lanes.iter().enumerate() {
            let expected = if *place < 32 { tile[lane] } else { [0; 8] };
            let at = 4 * (*place as usize % LANES);
            assert_eq!(found[at..at + 4], words(&[expected]), "{what:?}: row {lane} at {place}");
        }
    }
}

/// A and B of one product, row by row: `a[m][k]`, `b[k][n]`.
#[derive(Clone)]
struct Step {
    a: [[f16; DEPTH]; ROWS],
    b: [[f16; COLUMNS]; DEPTH],
}

/// Each thread's registers: 4 of A, 2 of B.
fn registers(steps: &[Step]) -> Vec<u32> {
    let mut all = Vec::with_capacity(steps.len() * LANES * PRODUCT_WORDS);
    for step in steps {
        for thread in 0..LANES {
            let (group, in_group) = (thread / 4, thread % 4);
            // a0..a8: row = group for a0, a1, a4, a5, else group + 8; column =
            // 2 in_group + (i & 1), and 8 more from a4 on.
            let a = (0..8).map(|i| {
                let row = if i < 2 || (4..6).contains(&i) { group } else { group + 8 };
                step.a[row][in_group * 2 + (i & 1) + if i >= 4 { 8 } else { 0 }]
            });
            // b0..b4: row = 2 in_group + (i & 1), 8 more from b2 on; column = group.
            let b =
                (0..4).map(|i| step.b[in_group * 2 + (i & 1) + if i >= 2 { 8 } else { 0 }][group]);
            let halves: Vec<u32> = a.chain(b).map(|half| u32::from(half.to_bits())).collect();
            all.extend(halves.chunks(2).map(|pair| pair[0] | pair[1] << 16));
        }
    }
    all
}

type Sums = [[f32; COLUMNS]; ROWS];

/// Row and column of sum `i` of a thread: c0 and c1 in row group, c2 and c3 in group + 8; columns
/// 2 in_group + (i & 1).
fn place(thread: usize, i: usize) -> (usize, usize) {
    (thread / 4 + if i < 2 { 0 } else { 8 }, thread % 4 * 2 + (i & 1))
}

/// D of `steps` products added to `c`.
fn multiplied(gpu: &mut TestGpu, steps: &[Step], c: &Sums) -> Sums {
    let lay_out = |thread: usize| (0..4).map(move |i| place(thread, i));
    let before: Vec<f32> =
        (0..LANES).flat_map(lay_out).map(|(row, column)| c[row][column]).collect();
    let (from, mut sums) = (memory(gpu, &registers(steps)), memory(gpu, &before));
    multiply(gpu, Product::Halves, steps.len(), from.slice(), sums.slice_mut::<f32>()).unwrap();
    let after: Vec<f32> = numbers(gpu, &sums, 4 * LANES);
    let mut d = Sums::default();
    for ((row, column), sum) in (0..LANES).flat_map(lay_out).zip(after) {
        d[row][column] = sum;
    }
    d
}

/// A matrix of what `number` gives.
fn matrix<const N: usize, const M: usize>(mut number: impl FnMut() -> f16) -> [[f16; N]; M] {
    std::array::from_fn(|_| std::array::from_fn(|_| number()))
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn a_product_has_its_numbers_where_the_isa_says() {
    let Some(mut gpu) = gpu() else { return };
    let mut random = Random(62);
    // Whole numbers: every sum is exact in any order.
    let mut number = || f16::from_f32(random.below(33) as f32 - 16.0);
    let steps: Vec<Step> =
        (0..2).map(|_| Step { a: matrix(&mut number), b: matrix(&mut number) }).collect();
    let c: Sums = std::array::from_fn(|_| std::array::from_fn(|_| number().to_f32() * 64.0));
    let found = same(&mut gpu, |gpu| multiplied(gpu, &steps, &c));
    for row in 0..ROWS {
        for column in 0..COLUMNS {
            let products = steps.iter().flat_map(|step| {
                (0..DEPTH).map(|k| step.a[row][k].to_f32() * step.b[k][column].to_f32())
            });
            let expected = c[row][column] + products.sum::<f32>();
            assert_eq!(found[row][column], expected, "row {row}, column {column}");
        }
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn products_of_bf16_have_the_places_of_f16() {
    let Some(mut gpu) = gpu() else { return };
    let mut random = Random(65);
    let mut number = || f16::from_f32(random.below(33) as f32 - 16.0);
    let step = Step { a: matrix(&mut number), b: matrix(&mut number) };
    let c: Sums = std::array::from_fn(|_| std::array::from_fn(|_| number().to_f32() * 64.0));
    let expected = multiplied(&mut gpu, std::slice::from_ref(&step), &c);
    // The same whole numbers, which bf16 holds too.
    let other =
        |half: u32| u32::from(bf16::from_f32(f16::from_bits(half as u16).to_f32()).to_bits());
    let registers: Vec<u32> = registers(&[step])
        .into_iter()
        .map(|pair| other(pair & 0xffff) | other(pair >> 16) << 16)
        .collect();
    let lanes = || (0..LANES).flat_map(|thread| (0..4).map(move |i| place(thread, i)));
    let before: Vec<f32> = lanes().map(|(row, column)| c[row][column]).collect();
    let (from, mut sums) = (memory(&mut gpu, &registers), memory(&mut gpu, &before));
    multiply(&mut gpu, Product::Bf16, 1, from.slice(), sums.slice_mut::<f32>()).unwrap();
    let found: Vec<f32> = numbers(&mut gpu, &sums, 4 * LANES);
    for ((row, column), found) in lanes().zip(found) {
        assert_eq!(found, expected[row][column], "row {row}, column {column}");
    }
}

/// `(row, column)` of byte `i` of a thread's A, and of its B, in a product of bytes of this depth.
/// k16: row = group for i < 4, else group + 8; column = 4 in_group + (i & 3); of B row
/// 4 in_group + i. k32: row = group for i < 4 and 8 <= i < 12, else group + 8, and 16 columns more
/// from a8 on; of B 16 rows more from b4 on. B's column = group.
fn byte_of_a(depth: usize, thread: usize, i: usize) -> (usize, usize) {
    let (group, in_group) = (thread / 4, thread % 4);
    let upper = if depth == 16 { i < 4 } else { i < 4 || (8..12).contains(&i) };
    (if upper { group } else { group + 8 }, in_group * 4 + (i & 3) + if i < 8 { 0 } else { 16 })
}

fn byte_of_b(thread: usize, i: usize) -> (usize, usize) {
    (thread % 4 * 4 + (i & 3) + if i < 4 { 0 } else { 16 }, thread / 4)
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn a_product_of_bytes_has_its_numbers_where_the_isa_says() {
    let Some(mut gpu) = gpu() else { return };
    let mut random = Random(65);
    for (what, depth) in [(Product::Bytes, 32), (Product::Bytes16, 16)] {
        let a: Vec<i8> = (0..ROWS * depth).map(|_| random.next() as i8).collect();
        let b: Vec<i8> = (0..depth * COLUMNS).map(|_| random.next() as i8).collect();
        let c: Vec<i32> = (0..4 * LANES).map(|_| random.next() as i32 >> 8).collect();
        let mut registers = Vec::new();
        for thread in 0..LANES {
            let word = |bytes: &mut dyn Iterator<Item = i8>| {
                bytes.enumerate().fold(0, |word, (i, byte)| word | u32::from(byte as u8) << (8 * i))
            };
            let words_of_a = (0..depth / 8).map(|register| {
                word(&mut (0..4).map(|i| {
                    let (row, column) = byte_of_a(depth, thread, 4 * register + i);
                    a[row * depth + column]
                }))
            });
            let words_of_b = (0..depth / 16).map(|register| {
                word(&mut (0..4).map(|i| {
                    let (row, column) = byte_of_b(thread, 4 * register + i);
                    b[row * COLUMNS + column]
                }))
            });
            // What the shorter product does not take is anything.
            let mut six = [0x7b7b_7b7b; PRODUCT_WORDS];
            words_of_a.enumerate().for_each(|(at, word)| six[at] = word);
            words_of_b.enumerate().for_each(|(at, word)| six[4 + at] = word);
            registers.extend(six);
        }
        let found = same(&mut gpu, |gpu| {
            let (from, mut sums) = (memory(gpu, &registers), memory(gpu, &c));
            multiply(gpu, what, 1, from.slice(), sums.slice_mut::<i32>()).unwrap();
            numbers::<i32>(gpu, &sums, 4 * LANES)
        });
        for thread in 0..LANES {
            for i in 0..4 {
                let (row, column) = place(thread, i);
                let products = (0..depth)
                    .map(|k| i32::from(a[row * depth + k]) * i32::from(b[k * COLUMNS + column]));
                let expected = c[4 * thread + i] + products.sum::<i32>();
                assert_eq!(found[4 * thread + i], expected, "{what:?}: row {row}, column {column}");
            }
        }
    }
}

/// A number of any magnitude that f16 has, the smallest ones too.
fn any_magnitude(random: &mut Random) -> f16 {
    let bits = random.next() as u16;
    // Not infinite and no NaN.
    f16::from_bits(if bits & 0x7c00 == 0x7c00 { bits & !0x4000 } else { bits })
}

fn steps_of_any_magnitude(random: &mut Random, count: usize) -> Vec<Step> {
    let mut number = || any_magnitude(random);
    (0..count).map(|_| Step { a: matrix(&mut number), b: matrix(&mut number) }).collect()
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn a_row_of_a_product_depends_on_no_other_row_and_not_on_its_place() {
    let Some(mut gpu) = gpu() else { return };
    let mut random = Random(63);
    for round in 0..24 {
        let steps = steps_of_any_magnitude(&mut random, 1 + round % 5);
        let c: Sums = std::array::from_fn(|_| {
            std::array::from_fn(|_| random.number() * 2f32.powi(random.below(40) as i32 - 20))
        });
        let d = multiplied(&mut gpu, &steps, &c);
        // Rows in another order.
        let order = shuffled(&mut random, ROWS);
        let moved: Vec<Step> = steps
            .iter()
            .map(|step| Step { a: std::array::from_fn(|row| step.a[order[row] as usize]), ..*step })
            .collect();
        let c_moved: Sums = std::array::from_fn(|row| c[order[row] as usize]);
        let d_moved = multiplied(&mut gpu, &moved, &c_moved);
        for (row, from) in order.iter().enumerate() {
            let same_bits = bits(&d_moved[row]) == bits(&d[*from as usize]);
            assert!(same_bits, "round {round}: row {from} at {row}");
        }
        // One row among others, which are anything: numbers, zeros, infinite, NaN.
        let kept = random.below(ROWS);
        let mut others = || match random.below(4) {
            0 => f16::ZERO,
            1 => f16::INFINITY,
            2 => f16::NAN,
            _ => any_magnitude(&mut random),
        };
        let mut among = steps.clone();
        for step in &mut among {
            for row in (0..ROWS).filter(|row| *row != kept) {
                step.a[row] = std::array::from_fn(|_| others());
            }
        }
        let d_among = multiplied(&mut gpu, &among, &c);
        assert_eq!(bits(&d_among[kept]), bits(&d[kept]), "round {round}: row {kept} among others");
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn a_column_of_a_product_depends_on_no_other_column_and_not_on_its_place() {
    let Some(mut gpu) = gpu() else { return };
    let mut random = Random(64);
    for round in 0..24 {
        let steps = steps_of_any_magnitude(&mut random, 1 + round % 5);
        let d = multiplied(&mut gpu, &steps, &Sums::default());
        let order = shuffled(&mut random, COLUMNS);
        let moved = |row: &[f16; COLUMNS]| std::array::from_fn(|at| row[order[at] as usize]);
        let moved: Vec<Step> = steps
            .iter()
            .map(|step| Step { b: std::array::from_fn(|k| moved(&step.b[k])), ..*step })
            .collect();
        let d_moved = multiplied(&mut gpu, &moved, &Sums::default());
        for row in 0..ROWS {
            for (column, from) in order.iter().enumerate() {
                let (found, expected) = (d_moved[row][column], d[row][*from as usize]);
                assert_eq!(
                    found.to_bits(),
                    expected.to_bits(),
                    "round {round}: {from} at {column}"
                );
            }
        }
    }
}
