//! A model that keeps accounts: each layer turns a row into a hash of the K/V rows that its plan
//! lets it see, in logical order, and a K/V row into one of the row that went in and its position.
//! A wrong page, slot, move, commit, parent or position changes the text with certainty, and the
//! text without any of these is known in closed form, without pages: [`ReferenceRun`].

use hat_plan::{
    AttendBatch, BackendFault, Computes, DeviceForward, MiddleForward, MiddleStep, PAGE_SIZE,
    RowMove, TokenId,
};

/// Layers of the whole model.
pub const LAYERS: usize = 4;
/// Numbers of a row that say something; the others are 0.
const PIECES: usize = 21;
/// Bits of each of them: so few that every codec brings them across.
const PIECE_BITS: usize = 3;
/// Narrowest row.
pub const WIDTH_MIN: usize = PIECES + 1;

/// Next state of a row's digest, after one more row of K/V that it sees.
fn mix(seen: u64, next: u64) -> u64 {
    let bits = (seen ^ next).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (bits ^ (bits >> 31)) & ((1 << (PIECES * PIECE_BITS)) - 1)
}

fn embed(token: TokenId) -> u64 {
    mix(0x5EED, u64::from(token))
}

fn kv_of(row: u64, position: u32) -> u64 {
    mix(row, u64::from(position) << 20)
}

fn write(row: u64, numbers: &mut [f32]) {
    numbers.fill(0.0);
    for (index, number) in numbers[..PIECES].iter_mut().enumerate() {
        *number = (row >> (PIECE_BITS * index) & 7) as f32;
    }
    // Codecs keep the largest number of a block apart, and scale by the next one.
    numbers[PIECES] = 7.0;
}

/// The row of these numbers, after whatever a codec did to them.
pub fn read(numbers: &[f32]) -> u64 {
    let piece =
        |(index, number): (usize, &f32)| (number.round() as u64 & 7) << (PIECE_BITS * index);
    numbers[..PIECES].iter().enumerate().map(piece).sum()
}

/// The token that follows a last row, one of so many.
pub fn token_of(row: u64, alphabet: u32) -> TokenId {
    let token = row % u64::from(alphabet);
    300 + TokenId::try_from(token).expect("alphabets are small")
}

/// A run of layers with its K/V store.
pub struct Ledger {
    /// Number of its first layer.
    first: usize,
    kv: Vec<Vec<u64>>, // [layers][rows]
    width: usize,
    rows: Vec<u64>,
}

fn at((page, row): (u32, u32)) -> usize {
    page as usize * PAGE_SIZE + row as usize
}

impl Ledger {
    /// Layers of the whole model, over this many pages of rows of this width.
    pub fn new(layers: std::ops::Range<usize>, pages: usize, width: usize) -> Self {
        let kv = layers.clone().map(|_| vec![0; pages * PAGE_SIZE]).collect();
        Self { first: layers.start, kv, width, rows: Vec::new() }
    }

    /// Garbles the store, as a fault may.
    pub fn garble(&mut self) {
        self.kv.iter_mut().flatten().for_each(|row| *row = mix(*row, 0xBAD));
    }

    fn compact(&mut self, moves: &[RowMove]) {
        for kv in &mut self.kv {
            moves.iter().for_each(|step| kv[at(step.to)] = kv[at(step.from)]);
        }
    }

    /// Runs the rows of a plan in place; `runs` says whether a sequence goes through a layer.
    fn forward(
        &mut self,
        plan: &AttendBatch<'_>,
        hidden: &mut [f32],
        runs: impl Fn(usize, usize) -> bool,
    ) {
        let width = self.width;
        self.rows.clear();
        self.rows.extend(hidden.chunks_exact(width).map(read));
        for (index, kv) in self.kv.iter_mut().enumerate() {
            let layer = self.first + index;
            for sequence in (0..plan.q_indptr.len() - 1).filter(|it| runs(*it, layer)) {
                let pages = &plan.page_indices[plan.page_indptr[sequence] as usize..];
                let place = |slot: u32| {
                    let slot = slot as usize;
                    pages[slot / PAGE_SIZE] as usize * PAGE_SIZE + slot % PAGE_SIZE
                };
                let of_sequence =
                    plan.q_indptr[sequence] as usize..plan.q_indptr[sequence + 1] as usize;
                for row in of_sequence.clone() {
                    kv[place(plan.slots[row])] = kv_of(self.rows[row], plan.positions[row]);
                }
                for row in of_sequence {
                    let tail = plan.tail_indptr[row] as usize..plan.tail_indptr[row + 1] as usize;
                    let mut seen = layer as u64;
                    let mut left = plan.prefix_len[row] as usize;
                    for page in pages {
                        let rows = left.min(PAGE_SIZE);
                        let from = *page as usize * PAGE_SIZE;
                        seen = kv[from..from + rows].iter().fold(seen, |seen, kv| mix(seen, *kv));
                        left -= rows;
                        if left == 0 {
                            break;
                        }
                    }
                    let tail = plan.tail_slots[tail].iter();
                    self.rows[row] = tail.fold(seen, |seen, slot| mix(seen, kv[place(*slot)]));
                }
            }
        }
        let rows = self.rows.iter().zip(hidden.chunks_exact_mut(width));
        rows.for_each(|(row, numbers)| write(*row, numbers));
    }
}

impl Computes for Ledger {
    fn describe(&self) -> String {
        "a ledger".to_owned()
    }
}

impl MiddleForward for Ledger {
    fn forward(&mut self, step: &mut MiddleStep) {
        self.compact(&step.moves);
        let (entry, exit) = (&step.entry_layers, step.exit_layer as usize);
        let runs = |sequence: usize, layer| (entry[sequence] as usize..exit).contains(&layer);
        Self::forward(self, &step.plan.batch(), &mut step.hidden, runs);
    }
}

/// A device's layers and its head.
pub struct DeviceLedger {
    pub input: Ledger,
    pub tail: Option<Ledger>,
    /// Tokens that the text is made of.
    pub alphabet: u32,
}

impl Computes for DeviceLedger {
    fn describe(&self) -> String {
        "a ledger".to_owned()
    }
}

impl DeviceForward for DeviceLedger {
    fn input(&mut self, plan: &AttendBatch<'_>, tokens: &[TokenId], hidden: &mut [f32]) {
        let width = self.input.width;
        for (token, numbers) in tokens.iter().zip(hidden.chunks_exact_mut(width)) {
            write(embed(*token), numbers);
        }
        self.input.forward(plan, hidden, |_, _| true);
    }

    fn tail(&mut self, plan: &AttendBatch<'_>, hidden: &mut [f32]) {
        if let Some(tail) = &mut self.tail {
            tail.forward(plan, hidden, |_, _| true);
        }
    }

    fn head(&mut self, hidden: &[f32], logits: &mut [f32]) {
        logits.fill(0.0);
        logits[token_of(read(hidden), self.alphabet) as usize] = 1.0;
    }

    fn argmax(&mut self, hidden: &[f32]) -> Option<(TokenId, f32)> {
        Some((token_of(read(hidden), self.alphabet), 1.0))
    }

    fn compact(&mut self, moves: &[RowMove]) {
        self.input.compact(moves);
        self.tail.iter_mut().for_each(|tail| tail.compact(moves));
    }
}

/// The whole model behind some tokens: no pages, no plan.
#[derive(Clone, Copy)]
pub struct ReferenceRun {
    seen: [u64; LAYERS],
    position: u32,
}

impl ReferenceRun {
    pub fn new() -> Self {
        Self { seen: std::array::from_fn(|layer| layer as u64), position: 0 }
    }

    /// Tokens so far.
    pub fn position(&self) -> u32 {
        self.position
    }

    /// The row of the last token after a layer.
    pub fn row(&self, layer: usize) -> u64 {
        self.seen[layer]
    }

    /// The next token; returns its row after each layer.
    pub fn push(&mut self, token: TokenId) -> [u64; LAYERS] {
        let mut row = embed(token);
        for seen in &mut self.seen {
            *seen = mix(*seen, kv_of(row, self.position));
            row = *seen;
        }
        self.position += 1;
        self.seen
    }
}

/// The answer to a prompt: this many tokens.
pub fn answer(prompt: &[TokenId], tokens: u32, alphabet: u32) -> Vec<TokenId> {
    let mut whole = ReferenceRun::new();
    let mut last = 0;
    prompt.iter().for_each(|token| last = whole.push(*token)[LAYERS - 1]);
    let said = (0..tokens).map(|_| {
        let token = token_of(last, alphabet);
        last = whole.push(token)[LAYERS - 1];
        token
    });
    said.collect()
}

/// A fault of a backend that was planted.
pub fn fault(lasts: bool) -> BackendFault {
    BackendFault { backend: "a ledger", reason: "the plug was pulled".to_owned(), lasts }
}

#[cfg(test)]
mod tests {
    use hat_transport::codec::Codec;

    use super::*;

    #[test]
    fn every_codec_brings_a_row_across() {
        for codec in Codec::ALL {
            for width in [WIDTH_MIN, 32, 100, 4096] {
                for seed in 0..200 {
                    let row = mix(seed, 77);
                    let mut numbers = vec![0.0; width];
                    write(row, &mut numbers);
                    let mut bytes = vec![0; codec.row_bytes(width)];
                    codec.encode(&numbers, width, &mut bytes).unwrap();
                    codec.decode(&bytes, width, &mut numbers).unwrap();
                    assert_eq!(read(&numbers), row, "{} at width {width}", codec.name());
                }
            }
        }
    }
}
