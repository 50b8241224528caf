//! Parts that the levels of x86-64 share, written once over their registers: the entry into a
//! level, and the steps of attention.

use std::arch::x86_64::*;

use super::math;

/// The table of a level and the functions that enter it: each body is compiled for its
/// instructions.
macro_rules! level {
    (
        $name:literal, $features:tt, needs $needs:tt, tiles of $rows:literal,
        quantise_row: $quantise_row:path
    ) => {
        /// The kernels of this level, or the instruction set that this CPU lacks.
        pub(super) fn kernels() -> Result<&'static Kernels, &'static str> {
            $crate::backend::cpu::x86::need!($needs);
            Ok(&KERNELS)
        }

        static KERNELS: Kernels = Kernels {
            name: $name,
            quantise_row,
            rms_norm_row,
            f32_to_f16,
            rope_angles_row,
            rotate,
            attend,
            linear,
        };

        $crate::backend::cpu::x86::enter! { $features,
            fn quantise_row(x: &[f32], out: &mut [Block]) { $quantise_row(x, out) }
            fn rms_norm_row(x: &[f32], weight: &[u8], eps: f32, out: &mut [f32]) {
                math::rms_norm_row(x, weight, eps, out)
            }
            fn f32_to_f16(from: &[f32], to: &mut [u16]) { x86::f32_to_f16(from, to) }
            fn rope_angles_row(position: u32, inv_freq: &[f32], angles: &mut [f32]) {
                math::rope_angles_row(position, inv_freq, angles)
            }
            fn rotate(head: &mut [f32], angles: &[f32]) { math::rotate(head, angles) }
            fn attend(
                task: &AttendTask<'_>,
                scratch: &mut AttendScratch,
                out: &mut Part<'_, f32>,
                at: (usize, usize)
            ) {
                attend_task(task, scratch, out, at, Steps)
            }
            fn linear(job: &Linear<'_>, columns: Range<usize>, out: &mut Part<'_, f32>) {
                linear_of_type(job, columns, out)
            }
        }

        macro_rules! inside_this_level {
            ($call:expr) => {
                // SAFETY: tiles are made only in `linear_of_type`, which only `linear` above calls.
                unsafe { $call }
            };
        }

        weight_types! { inside_this_level, $rows }
    };
}
pub(super) use level;

macro_rules! need {
    ([$($name:tt)*]) => {
        $(if !is_x86_feature_detected!($name) {
            return Err($name);
        })*
    };
}
pub(super) use need;

macro_rules! enter {
    ($features:tt, $(fn $name:ident($($arg:ident: $ty:ty),*) $body:block)*) => {$(
        fn $name($($arg: $ty),*) {
            #[target_feature(enable = $features)]
            fn inside($($arg: $ty),*) $body
            // SAFETY: reached only through `KERNELS`, which leaves this file only through
            // `kernels`, which has checked that the CPU has these instructions.
            unsafe { inside($($arg),*) }
        }
    )*};
}
pub(super) use enter;

/// The largest or the sum of a tile, by folding the upper half onto the lower; of the level itself,
/// so that it is compiled into the loop that calls it.
macro_rules! fold {
    ($features:tt, $name:ident: $eight:ident, $four:ident, $one:ident) => {
        #[inline]
        #[target_feature(enable = $features)]
        fn $name(tile: &Tile) -> f32 {
            // SAFETY: loads of exactly the 8 numbers that each array has.
            let load = |eight: &[f32; 8]| unsafe { _mm256_loadu_ps(eight.as_ptr()) };
            let [a, b, c, d] = bytemuck::cast_ref::<Tile, [[f32; 8]; 4]>(tile).each_ref().map(load);
            let eight = $eight($eight(a, c), $eight(b, d));
            let four = $four(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = $four(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32($one(two, _mm_movehdup_ps(two)))
        }
    };
}
pub(super) use fold;

/// Attention's steps over registers of so many numbers, for some queries at a time.
macro_rules! attend_steps {
    (
        $features:tt, $Register:ty, $lanes:literal, together $together:literal,
        zero: $zero:ident, broadcast: $broadcast:ident, mul: $mul:ident, fmadd: $fmadd:ident,
        load: $load:ident, load_halves: $load_halves:ident, f16_to_f32: $f16_to_f32:ident
    ) => {
        /// Numbers in a register.
        const LANES: usize = $lanes;
        /// Registers of one tile's keys.
        const TILE: usize = PAGE_SIZE / LANES;

        /// Attention's steps; made only inside this level.
        #[derive(Clone, Copy)]
        struct Steps;

        impl TileOps for Steps {
            const TOGETHER: usize = $together;

            #[inline(always)]
            fn f16_to_f32(self, from: &[u16], to: &mut [f32]) {
                // SAFETY: `Steps` are made only in `attend`, which is inside this level.
                unsafe { f16_to_f32(from, to) }
            }

            #[inline(always)]
            fn largest(self, tile: &Tile) -> f32 {
                // SAFETY: `Steps` are made only in `attend`, which is inside this level.
                unsafe { largest(tile) }
            }

            #[inline(always)]
            fn total(self, tile: &Tile) -> f32 {
                // SAFETY: `Steps` are made only in `attend`, which is inside this level.
                unsafe { total(tile) }
            }

            #[inline(always)]
            fn scores<const Q: usize>(self, q: [&[f32]; Q], k: KvData<'_>) -> [Tile; Q] {
                // SAFETY: `Steps` are made only in `attend`, which is inside this level.
                unsafe {
                    match k {
                        KvData::Half(k) => scores(q, k, |k| wide::<TILE>(k)),
                        KvData::Full(k) => scores(q, k, |k| full::<TILE>(k)),
                    }
                }
            }

            #[inline(always)]
            fn add_values<const Q: usize>(
                self,
                weights: [&[f32]; Q],
                fades: [f32; Q],
                v: KvData<'_>,
                sums: [&mut [f32]; Q],
            ) {
                // SAFETY: `Steps` are made only in `attend`, which is inside this level.
                unsafe {
                    match v {
                        KvData::Half(v) => {
                            add_values(weights, fades, v, sums, |v| wide::<4>(v), |v| wide::<1>(v));
                        }
                        KvData::Full(v) => {
                            add_values(weights, fades, v, sums, |v| full::<4>(v), |v| full::<1>(v));
                        }
                    }
                }
            }
        }

        x86::fold! { $features, largest: _mm256_max_ps, _mm_max_ps, _mm_max_ss }
        x86::fold! { $features, total: _mm256_add_ps, _mm_add_ps, _mm_add_ss }

        /// Runs of f16 numbers as f32, from the front.
        #[inline]
        #[target_feature(enable = $features)]
        fn wide<const N: usize>(numbers: &[u16]) -> [$Register; N] {
            let (runs, _) = numbers[..LANES * N].as_chunks::<LANES>();
            // SAFETY: loads of exactly the numbers that each array has.
            from_fn(|i| unsafe { $f16_to_f32($load_halves(runs[i].as_ptr().cast())) })
        }

        /// Runs of numbers, from the front.
        #[inline]
        #[target_feature(enable = $features)]
        fn full<const N: usize>(numbers: &[f32]) -> [$Register; N] {
            let (runs, _) = numbers[..LANES * N].as_chunks::<LANES>();
            // SAFETY: loads of exactly the numbers that each array has.
            from_fn(|i| unsafe { $load(runs[i].as_ptr()) })
        }

        #[target_feature(enable = $features)]
        fn f16_to_f32(from: &[u16], to: &mut [f32]) {
            let (from, from_rest) = from.as_chunks::<LANES>();
            let (to, to_rest) = to[..from.len() * LANES + from_rest.len()].as_chunks_mut::<LANES>();
            for (from, to) in from.iter().zip(to) {
                *to = bytemuck::cast(wide::<1>(from));
            }
            for (to, from) in to_rest.iter_mut().zip(from_rest) {
                *to = math::f16_to_f32(*from);
            }
        }

        #[inline]
        #[target_feature(enable = $features)]
        fn scores<const Q: usize, N>(
            q: [&[f32]; Q],
            k: &[N],
            load: impl Fn(&[N]) -> [$Register; TILE],
        ) -> [Tile; Q] {
            let mut sums = [[$zero(); TILE]; Q];
            let head_dim = k.len() / PAGE_SIZE;
            let q = q.map(|q| &q[..head_dim]);
            for (d, keys) in k.as_chunks::<PAGE_SIZE>().0.iter().enumerate() {
                let keys = load(keys);
                for r in 0..Q {
                    let q = $broadcast(q[r][d]);
                    for i in 0..TILE {
                        sums[r][i] = $fmadd(q, keys[i], sums[r][i]);
                    }
                }
            }
            sums.map(bytemuck::cast)
        }

        #[inline]
        #[target_feature(enable = $features)]
        fn add_values<const Q: usize, N: Key>(
            weights: [&[f32]; Q],
            fades: [f32; Q],
            v: &[N],
            mut sums: [&mut [f32]; Q],
            load_four: impl Fn(&[N]) -> [$Register; 4],
            load_one: impl Fn(&[N]) -> [$Register; 1],
        ) {
            let head_dim = sums[0].len();
            let mut at = 0;
            while at + 4 * LANES <= head_dim {
                add_run(weights, fades, v, at, &mut sums, &load_four);
                at += 4 * LANES;
            }
            while at + LANES <= head_dim {
                add_run(weights, fades, v, at, &mut sums, &load_one);
                at += LANES;
            }
            for d in at..head_dim {
                for r in 0..Q {
                    let column = v[d..].iter().step_by(head_dim).zip(weights[r]);
                    let chain = |sum: f32, (v, weight): (&N, &f32)| weight.mul_add(v.number(), sum);
                    sums[r][d] = column.fold(sums[r][d] * fades[r], chain);
                }
            }
        }

        /// Dimensions `at..at + LANES * N`.
        #[inline]
        #[target_feature(enable = $features)]
        fn add_run<const Q: usize, const N: usize, T>(
            weights: [&[f32]; Q],
            fades: [f32; Q],
            v: &[T],
            at: usize,
            sums: &mut [&mut [f32]; Q],
            load: impl Fn(&[T]) -> [$Register; N],
        ) {
            let mut run = [[$zero(); N]; Q];
            for r in 0..Q {
                let fade = $broadcast(fades[r]);
                run[r] = full::<N>(&sums[r][at..]).map(|sum| $mul(sum, fade));
            }
            let keys = weights[0].len();
            let weights = weights.map(|weights| &weights[..keys]);
            for (j, v) in v.chunks_exact(sums[0].len()).enumerate().take(keys) {
                let v = load(&v[at..]);
                for r in 0..Q {
                    let weight = $broadcast(weights[r][j]);
                    for i in 0..N {
                        run[r][i] = $fmadd(weight, v[i], run[r][i]);
                    }
                }
            }
            for r in 0..Q {
                let (runs, _) = sums[r][at..at + LANES * N].as_chunks_mut::<LANES>();
                for i in 0..N {
                    runs[i] = bytemuck::cast(run[r][i]);
                }
            }
        }
    };
}
pub(super) use attend_steps;

/// As [`math::f32_to_f16_all`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn f32_to_f16(from: &[f32], to: &mut [u16]) {
    let (eights, rest) = from.as_chunks::<8>();
    let (to, to_rest) = to.as_chunks_mut::<8>();
    for (from, to) in eights.iter().zip(to) {
        // SAFETY: a load of exactly the 8 numbers that the array has.
        let eight = unsafe { _mm256_loadu_ps(from.as_ptr()) };
        *to = bytemuck::cast(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(eight));
    }
    math::f32_to_f16_all(rest, to_rest);
}
