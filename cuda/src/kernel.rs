//! The kernels by name: the file that each stands in, and the threads of its block.

macro_rules! kernels {
    (
        $($kernel:ident = $module:literal, $name:literal, $threads:literal;)*
        @testkit
        $($test:ident = $test_module:literal, $test_name:literal, $test_threads:literal;)*
    ) => {
        /// A kernel. Its file says what it computes.
        #[expect(missing_docs, reason = "named as the functions of `kernels/`")]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Kernel {
            $($kernel,)*
            $(#[cfg(feature = "testkit")] $test,)*
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
    Embed = "embed", "embed", 256;
    RmsNorm = "rms_norm", "rms_norm", 256;
    SiluMul = "silu_mul", "silu_mul", 256;
    RopeAngles = "rope_angles", "rope_angles", 256;
    RopeAppend = "rope_append", "rope_append", 256;
    AttendVerify32 = "attend_verify", "attend_verify_32", 128;
    AttendVerify64 = "attend_verify", "attend_verify_64", 128;
    AttendVerify96 = "attend_verify", "attend_verify_96", 128;
    AttendVerify128 = "attend_verify", "attend_verify_128", 128;
    AttendMerge32 = "attend_verify", "attend_merge_32", 32;
    AttendMerge64 = "attend_verify", "attend_merge_64", 32;
    AttendMerge96 = "attend_verify", "attend_merge_96", 32;
    AttendMerge128 = "attend_verify", "attend_merge_128", 32;
    AttendPrefill32 = "attend_prefill", "attend_prefill_32", 128;
    AttendPrefill64 = "attend_prefill", "attend_prefill_64", 128;
    AttendPrefill96 = "attend_prefill", "attend_prefill_96", 128;
    AttendPrefill128 = "attend_prefill", "attend_prefill_128", 128;
    QuantiseQ8 = "quantise_rows", "quantise_q8", 256;
    RoundF16 = "quantise_rows", "round_f16", 256;
    RoundBf16 = "quantise_rows", "round_bf16", 256;
    GemvQ80x8 = "gemv", "gemv_q8_0_8", 256;
    GemvQ80x16 = "gemv", "gemv_q8_0_16", 256;
    GemvQ40x8 = "gemv", "gemv_q4_0_8", 256;
    GemvQ40x16 = "gemv", "gemv_q4_0_16", 256;
    GemvQ41x8 = "gemv", "gemv_q4_1_8", 256;
    GemvQ41x16 = "gemv", "gemv_q4_1_16", 256;
    GemvQ6Kx8 = "gemv", "gemv_q6_k_8", 256;
    GemvQ6Kx16 = "gemv", "gemv_q6_k_16", 256;
    LinearQ80 = "linear", "linear_q8_0", 256;
    LinearQ40 = "linear", "linear_q4_0", 256;
    LinearQ41 = "linear", "linear_q4_1", 256;
    LinearQ6K = "linear", "linear_q6_k", 256;
    LinearF16 = "linear_float", "linear_f16", 256;
    LinearBf16 = "linear_float", "linear_bf16", 256;
    TopKSlices = "top_k", "top_k_slices", 256;
    TopKMerge = "top_k", "top_k_merge", 256;
    Compact = "compact", "compact", 32;

    @testkit

    FragmentLoad = "fragments", "fragment_load", 32;
    FragmentLoadTransposed = "fragments", "fragment_load_transposed", 32;
    FragmentCopy = "fragments", "fragment_copy", 32;
    FragmentCopyWords = "fragments", "fragment_copy_words", 32;
    FragmentMultiplyBytes = "fragments", "fragment_multiply_bytes", 32;
    FragmentMultiplyBytes16 = "fragments", "fragment_multiply_bytes_16", 32;
    FragmentMultiply = "fragments", "fragment_multiply", 32;
    FragmentMultiplyBf16 = "fragments", "fragment_multiply_bf16", 32;
    PeakCopy = "peak", "peak_copy", 256;
    PeakMultiply = "peak", "peak_multiply", 256;
    PeakMultiplyBytes = "peak", "peak_multiply_bytes", 256;
}
