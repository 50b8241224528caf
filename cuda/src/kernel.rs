//! The kernels by name: the file that each stands in, and the threads of its block.

macro_rules! kernels {
    (
        $($(#[$doc:meta])* $kernel:ident = $module:literal, $name:literal, $threads:literal;)*
        @testkit
        $($(#[$test_doc:meta])* $test:ident = $test_module:literal, $test_name:literal,
            $test_threads:literal;)*
    ) => {
        /// A kernel.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Kernel {
            $($(#[$doc])* $kernel,)*
            $($(#[$test_doc])* #[cfg(feature = "testkit")] $test,)*
        }

        impl Kernel {
            /// All of them.
            pub const ALL: &[Self] =
                &[$(Self::$kernel,)* $(#[cfg(feature = "testkit")] Self::$test,)*];

            /// The name by which it is launched.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$kernel => $name,)*
                    $(#[cfg(feature = "testkit")] Self::$test => $test_name,)*
                }
            }

            /// The stem of the file that it stands in.
            #[must_use]
            pub const fn module(self) -> &'static str {
                match self {
                    $(Self::$kernel => $module,)*
                    $(#[cfg(feature = "testkit")] Self::$test => $test_module,)*
                }
            }

            /// Threads of a block.
            #[must_use]
            pub const fn threads(self) -> u32 {
                match self {
                    $(Self::$kernel => $threads,)*
                    $(#[cfg(feature = "testkit")] Self::$test => $test_threads,)*
                }
            }
        }
    };
}

kernels! {
    /// Rows of a table.
    Embed = "embed", "embed", 256;
    /// Root mean square norm.
    RmsNorm = "rms_norm", "rms_norm", 256;
    /// The gate of a feed-forward part.
    SiluMul = "silu_mul", "silu_mul", 256;
    /// Cosines and sines of rotary positions.
    RopeAngles = "rope_angles", "rope_angles", 256;
    /// Rotary positions; k and v into pages.
    RopeAppend = "rope_append", "rope_append", 256;
    /// Attention in splits, heads of 32.
    AttendVerify32 = "attend_verify", "attend_verify_32", 128;
    /// Attention in splits, heads of 64.
    AttendVerify64 = "attend_verify", "attend_verify_64", 128;
    /// Attention in splits, heads of 96.
    AttendVerify96 = "attend_verify", "attend_verify_96", 128;
    /// Attention in splits, heads of 128.
    AttendVerify128 = "attend_verify", "attend_verify_128", 128;
    /// Splits put together, heads of 32.
    AttendMerge32 = "attend_verify", "attend_merge_32", 32;
    /// Splits put together, heads of 64.
    AttendMerge64 = "attend_verify", "attend_merge_64", 32;
    /// Splits put together, heads of 96.
    AttendMerge96 = "attend_verify", "attend_merge_96", 32;
    /// Splits put together, heads of 128.
    AttendMerge128 = "attend_verify", "attend_merge_128", 32;
    /// Attention of many rows, heads of 32.
    AttendPrefill32 = "attend_prefill", "attend_prefill_32", 128;
    /// Attention of many rows, heads of 64.
    AttendPrefill64 = "attend_prefill", "attend_prefill_64", 128;
    /// Attention of many rows, heads of 96.
    AttendPrefill96 = "attend_prefill", "attend_prefill_96", 128;
    /// Attention of many rows, heads of 128.
    AttendPrefill128 = "attend_prefill", "attend_prefill_128", 128;
    /// Rows to int8 blocks.
    QuantiseQ8 = "quantise_rows", "quantise_q8", 256;
    /// Numbers to f16, as a product takes them.
    RoundF16 = "quantise_rows", "round_f16", 256;
    /// Numbers to bf16.
    RoundBf16 = "quantise_rows", "round_bf16", 256;
    /// Up to 8 rows at a time times a q8_0 matrix.
    GemvQ80x8 = "gemv", "gemv_q8_0_8", 256;
    /// Up to 16 rows at a time times a q8_0 matrix.
    GemvQ80x16 = "gemv", "gemv_q8_0_16", 256;
    /// Up to 8 rows at a time times a q4_0 matrix.
    GemvQ40x8 = "gemv", "gemv_q4_0_8", 256;
    /// Up to 16 rows at a time times a q4_0 matrix.
    GemvQ40x16 = "gemv", "gemv_q4_0_16", 256;
    /// Up to 8 rows at a time times a q4_1 matrix.
    GemvQ41x8 = "gemv", "gemv_q4_1_8", 256;
    /// Up to 16 rows at a time times a q4_1 matrix.
    GemvQ41x16 = "gemv", "gemv_q4_1_16", 256;
    /// Up to 8 rows at a time times a q6_k matrix.
    GemvQ6Kx8 = "gemv", "gemv_q6_k_8", 256;
    /// Up to 16 rows at a time times a q6_k matrix.
    GemvQ6Kx16 = "gemv", "gemv_q6_k_16", 256;
    /// Many rows times a q8_0 matrix.
    LinearQ80 = "linear", "linear_q8_0", 256;
    /// Many rows times a q4_0 matrix.
    LinearQ40 = "linear", "linear_q4_0", 256;
    /// Many rows times a q4_1 matrix.
    LinearQ41 = "linear", "linear_q4_1", 256;
    /// Many rows times a q6_k matrix.
    LinearQ6K = "linear", "linear_q6_k", 256;
    /// Rows times an f16 matrix.
    LinearF16 = "linear_float", "linear_f16", 256;
    /// Rows times a bf16 matrix.
    LinearBf16 = "linear_float", "linear_bf16", 256;
    /// The largest of each slice of a row.
    TopKSlices = "top_k", "top_k_slices", 256;
    /// The largest of all slices.
    TopKMerge = "top_k", "top_k_merge", 256;
    /// K and V rows to other places.
    Compact = "compact", "compact", 32;

    @testkit

    /// Registers of a load of matrices.
    FragmentLoad = "fragments", "fragment_load", 32;
    /// Registers of a load of transposed matrices.
    FragmentLoadTransposed = "fragments", "fragment_load_transposed", 32;
    /// Copies to shared memory that nobody waits for.
    FragmentCopy = "fragments", "fragment_copy", 32;
    /// The same by words.
    FragmentCopyWords = "fragments", "fragment_copy_words", 32;
    /// Registers of a product of matrices of signed bytes.
    FragmentMultiplyBytes = "fragments", "fragment_multiply_bytes", 32;
    /// The same of half as many.
    FragmentMultiplyBytes16 = "fragments", "fragment_multiply_bytes_16", 32;
    /// Registers of a product of matrices in f16.
    FragmentMultiply = "fragments", "fragment_multiply", 32;
    /// Products of matrices of bf16.
    FragmentMultiplyBf16 = "fragments", "fragment_multiply_bf16", 32;
    /// A copy of memory.
    PeakCopy = "peak", "peak_copy", 256;
    /// Products of matrices in f16 from registers.
    PeakMultiply = "peak", "peak_multiply", 256;
    /// Products of matrices of signed bytes from registers.
    PeakMultiplyBytes = "peak", "peak_multiply_bytes", 256;
}
