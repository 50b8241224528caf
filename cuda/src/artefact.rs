//! The compiled kernels, embedded: machine code for known GPUs, PTX for others.

use crate::kernel::Kernel;

/// Compiled forms of one kernel file.
pub(crate) struct Artefact {
    /// The file's stem.
    pub(crate) module: &'static str,
    /// Machine code by compute capability.
    cubins: [(u32, &'static [u8]); 5],
    /// Text for every GPU from compute capability 8.0.
    ptx: &'static [u8],
}

/// The form of the code that a GPU gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Machine code for this compute capability: 86 is 8.6.
    Cubin(u32),
    /// PTX, translated by the driver.
    Ptx,
}

/// Lowest compute capability with what the kernels use.
pub const CAPABILITY_MIN: u32 = 80;

macro_rules! artefact {
    ($module:literal) => {
        Artefact {
            module: $module,
            cubins: [
                (80, include_bytes!(concat!("../kernels/gen/", $module, ".sm_80.cubin"))),
                (86, include_bytes!(concat!("../kernels/gen/", $module, ".sm_86.cubin"))),
                (87, include_bytes!(concat!("../kernels/gen/", $module, ".sm_87.cubin"))),
                (89, include_bytes!(concat!("../kernels/gen/", $module, ".sm_89.cubin"))),
                (90, include_bytes!(concat!("../kernels/gen/", $module, ".sm_90.cubin"))),
            ],
            ptx: include_bytes!(concat!("../kernels/gen/", $module, ".compute_80.ptx")),
        }
    };
}

/// One for each kernel file.
pub(crate) const ALL: &[Artefact] = &[
    artefact!("attend_prefill"),
    artefact!("attend_verify"),
    artefact!("compact"),
    artefact!("embed"),
    artefact!("gemv"),
    artefact!("linear"),
    artefact!("linear_float"),
    artefact!("quantise_rows"),
    artefact!("rms_norm"),
    artefact!("rope_angles"),
    artefact!("rope_append"),
    artefact!("silu_mul"),
    artefact!("top_k"),
    #[cfg(feature = "testkit")]
    artefact!("fragments"),
    #[cfg(feature = "testkit")]
    artefact!("peak"),
];

/// The form for a GPU; `None` if it is too old for the kernels.
#[must_use]
pub fn form(capability: u32) -> Option<Form> {
    match capability {
        80 | 86 | 87 | 89 | 90 => Some(Form::Cubin(capability)),
        CAPABILITY_MIN.. => Some(Form::Ptx),
        _ => None,
    }
}

impl Artefact {
    /// The code in a form that [`form`] gave, without a terminating zero.
    pub(crate) fn code(&self, form: Form) -> &'static [u8] {
        let cubin = |capability| {
            self.cubins.iter().find(|(known, _)| *known == capability).map(|(_, code)| *code)
        };
        match form {
            Form::Cubin(capability) => cubin(capability).unwrap_or(self.ptx),
            Form::Ptx => self.ptx,
        }
    }

    /// The kernels that it holds.
    pub(crate) fn kernels(&self) -> impl Iterator<Item = Kernel> {
        Kernel::ALL.iter().copied().filter(|kernel| kernel.module() == self.module)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_is_embedded_for_every_gpu() {
        let embedded: usize = ALL.iter().map(|artefact| artefact.kernels().count()).sum();
        assert_eq!(embedded, Kernel::ALL.len());
        let forms = [75, 80, 86, 87, 89, 90, 100, 120].map(form);
        use Form::{Cubin, Ptx};
        let expected = [80, 86, 87, 89, 90].map(|capability| Some(Cubin(capability)));
        assert_eq!(forms[0], None);
        assert_eq!(forms[1..6], expected);
        assert_eq!(forms[6..], [Some(Ptx), Some(Ptx)]);
        for artefact in ALL {
            assert!(artefact.code(Cubin(86)).starts_with(b"\x7fELF"));
            assert!(!artefact.code(Ptx).contains(&0x7f), "PTX is text");
        }
    }
}
