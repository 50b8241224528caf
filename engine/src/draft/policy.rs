//! How good guesses are, learned as they are tested.

use super::{CLASSES, Drafter, Source};

/// Share of the past in a moving average, as in the paper.
pub const PAST: f32 = 0.8;

/// How often guesses of each drafter and class are right.
#[derive(Clone, Debug)]
pub struct Acceptance {
    rates: [[f32; CLASSES]; Drafter::ALL.len()],
}

impl Default for Acceptance {
    fn default() -> Self {
        Self { rates: [LOOKUP_FIRST] }
    }
}

/// Where lookup begins, by match length 1..=8, first choices and then the others.
const LOOKUP_FIRST: [f32; CLASSES] = [
    0.25, 0.4, 0.55, 0.65, 0.72, 0.78, 0.82, 0.85, //
    0.08, 0.2, 0.4, 0.6, 0.7, 0.75, 0.8, 0.82,
];

/// Weight of one test in the average: tests are single tokens, of which a round has many.
const PRESENT: f32 = 0.02;

impl Acceptance {
    /// How often guesses from `source` are right. `0..=1`
    #[must_use]
    pub fn rate(&self, source: Source) -> f32 {
        self.rates[source.drafter as usize][usize::from(source.class)]
    }

    /// A guess from `source` was compared with the decided token.
    pub fn note(&mut self, source: Source, right: bool) {
        let rate = &mut self.rates[source.drafter as usize][usize::from(source.class)];
        *rate += PRESENT * (f32::from(u8::from(right)) - *rate);
    }
}
