//! The kernels by name: the file that each stands in, and the threads of its block.

macro_rules! kernels {
    ($($(#[$doc:meta])* $kernel:ident = $module:literal, $name:literal, $threads:literal;)*) => {
        /// A kernel.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Kernel {
            $($(#[$doc])* $kernel,)*
        }

        impl Kernel {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$kernel),*];

            /// The name by which it is launched.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$kernel => $name,)*
                }
            }

            /// The stem of the file that it stands in.
            #[must_use]
            pub const fn module(self) -> &'static str {
                match self {
                    $(Self::$kernel => $module,)*
                }
            }

            /// Threads of a block.
            #[must_use]
            pub const fn threads(self) -> u32 {
                match self {
                    $(Self::$kernel => $threads,)*
                }
            }
        }
    };
}

kernels! {
    /// Root mean square norm, with the residual added before.
    RmsNorm = "rms_norm", "rms_norm", 256;
}
