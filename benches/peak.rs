//! Arithmetic peaks of one core, by loops that do nothing else.
//!
//! The unsafe room of this crate: vector instructions behind a check of the CPU.

use std::arch::asm;
use std::arch::x86_64::*;

/// Iterations of one measurement: some milliseconds.
const ROUNDS: u64 = 2_000_000;

/// Multiplications a second of 8-bit whole numbers with the sums in 32 bits, the way of AVX2
/// without VNNI: three instructions for 32 of them. `None` on a CPU without AVX2.
pub(crate) fn whole_numbers() -> Option<f64> {
    // SAFETY: the CPU has AVX2, by the check.
    is_x86_feature_detected!("avx2").then(|| rate(256, || unsafe { whole_loop() }))
}

/// Fused multiply-adds a second of f32. `None` on a CPU without AVX2 and FMA.
pub(crate) fn fused() -> Option<f64> {
    let has = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    // SAFETY: the CPU has AVX2 and FMA, by the check.
    has.then(|| rate(80, || unsafe { fused_loop() }))
}

/// The best of five: a peak is what the core can do when nobody disturbs it.
fn rate(per_round: u64, run: impl Fn()) -> f64 {
    (ROUNDS * per_round) as f64 / crate::spread((0..5).map(|_| crate::seconds(&run))).least
}

#[target_feature(enable = "avx2")]
fn whole_loop() {
    let (mut a, mut b, ones) = (_mm256_set1_epi8(3), _mm256_set1_epi8(-5), _mm256_set1_epi16(1));
    let mut sums = [_mm256_setzero_si256(); 8];
    for _ in 0..ROUNDS {
        for sum in &mut sums {
            // SAFETY: a comment; it makes the operands new, so that no product is kept.
            unsafe { asm!("/* {0} {1} */", inout(ymm_reg) a, inout(ymm_reg) b) };
            let pairs = _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones);
            *sum = _mm256_add_epi32(*sum, pairs);
        }
    }
    std::hint::black_box(sums);
}

#[target_feature(enable = "avx2,fma")]
fn fused_loop() {
    let (a, b) = (_mm256_set1_ps(0.999), _mm256_set1_ps(1e-3));
    let mut sums = [_mm256_setzero_ps(); 10];
    for _ in 0..ROUNDS {
        for sum in &mut sums {
            *sum = _mm256_fmadd_ps(*sum, a, b);
        }
    }
    std::hint::black_box(sums);
}
