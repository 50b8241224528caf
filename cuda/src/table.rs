//! Matrices and tables in panels, as the loader packs them: shape, type, bytes.

use crate::abi;
use crate::gpu::Slice;
use crate::kernel::Kernel;

/// The number formats, a row each: numbers of a block and its bytes, its name in `abi.h`, and the
/// kernels of its products: for 8 rows, for 16 and for tiles, or one for all.
macro_rules! formats {
    ($($(#[$doc:meta])* $name:ident: $block:literal, $bytes:literal, $id:ident,
        [$($kernel:ident)*];)*) => {
        /// Number format of a matrix.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum WeightDType {
            $($(#[$doc])* $name,)*
        }

        impl WeightDType {
            /// Numbers of a row that are written together.
            #[must_use]
            pub const fn block(self) -> usize {
                match self {
                    $(Self::$name => $block,)*
                }
            }

            /// Bytes of a block of one row.
            #[must_use]
            pub const fn block_bytes(self) -> usize {
                match self {
                    $(Self::$name => $bytes,)*
                }
            }

            pub(crate) const fn id(self) -> u32 {
                match self {
                    $(Self::$name => abi::$id,)*
                }
            }

            pub(crate) const fn products(self) -> &'static [Kernel] {
                match self {
                    $(Self::$name => &[$(Kernel::$kernel),*],)*
                }
            }
        }
    };
}

formats! {
    /// IEEE binary32.
    F32: 1, 4, HAT_F32, [];
    /// IEEE binary16.
    F16: 1, 2, HAT_F16, [LinearF16];
    /// bfloat16.
    Bf16: 1, 2, HAT_BF16, [LinearBf16];
    /// Blocks of 32: f16 scale, 32 signed bytes.
    Q8_0: 32, 34, HAT_Q8_0, [GemvQ80x8 GemvQ80x16 LinearQ80];
    /// Blocks of 32: f16 scale, 32 nibbles less 8.
    Q4_0: 32, 18, HAT_Q4_0, [GemvQ40x8 GemvQ40x16 LinearQ40];
    /// Blocks of 32: f16 scale, f16 minimum, 32 nibbles.
    Q4_1: 32, 20, HAT_Q4_1, [GemvQ41x8 GemvQ41x16 LinearQ41];
    /// Blocks of 256: f16 scale, 16 signed bytes that scale 16 weights each, 6 bits less 32.
    Q6K: 256, 210, HAT_Q6_K, [GemvQ6Kx8 GemvQ6Kx16 LinearQ6K];
}

impl WeightDType {
    /// Bytes of `[rows][columns]` in panels; `None` if a row is no whole number of blocks or the
    /// product overflows.
    #[must_use]
    pub fn panel_bytes(self, rows: usize, columns: usize) -> Option<usize> {
        if !columns.is_multiple_of(self.block()) {
            return None;
        }
        let rows = rows.checked_next_multiple_of(abi::HAT_PANEL as usize)?;
        (columns / self.block()).checked_mul(self.block_bytes())?.checked_mul(rows)
    }
}

/// A matrix `[rows][columns]` in panels of 16 rows, in memory of a GPU.
#[derive(Clone, Copy, Debug)]
pub struct Table<'a> {
    bytes: Slice<'a, u8>,
    numbers: WeightDType,
    rows: usize,
    columns: usize,
}

impl<'a> Table<'a> {
    /// A matrix over bytes, which may be more than it needs.
    ///
    /// # Panics
    /// If they are fewer, or the shape is none of this type.
    #[must_use]
    pub fn new(bytes: Slice<'a, u8>, numbers: WeightDType, rows: usize, columns: usize) -> Self {
        let needed = numbers.panel_bytes(rows, columns);
        let fits = needed.is_some_and(|needed| needed <= bytes.len());
        assert!(fits, "{numbers:?} [{rows}, {columns}] in {} bytes", bytes.len());
        Self { bytes, numbers, rows, columns }
    }

    /// Number format of its elements.
    #[must_use]
    pub fn numbers(&self) -> WeightDType {
        self.numbers
    }

    /// Rows: tokens of a table, outputs of a matrix.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Numbers of a row.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    pub(crate) fn pointer(&self) -> *const u8 {
        self.bytes.vectors()
    }
}
