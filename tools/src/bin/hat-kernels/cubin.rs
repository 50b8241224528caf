//! Resources that a cubin states of its kernels: registers, stack, shared memory.
//!
//! A cubin is an ELF file. Section `.nv.info` is a list of attributes, each a format byte, a kind
//! byte and 16 bits that are a value or the length of what follows; the ones that matter name a
//! kernel by its symbol. Section `.nv.info.NAME` has attributes of one kernel, `.nv.shared.NAME` is
//! as large as its static shared memory.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use anyhow::{Context as _, ensure};
use object::read::elf::ElfFile64;
use object::{LittleEndian, Object as _, ObjectSection as _, ObjectSymbol as _, SymbolIndex};
use serde::Serialize;

use crate::mix::Counts;

/// Resources of one kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Usage {
    /// The name by which it is launched.
    pub(crate) kernel: String,
    /// Most threads of a block.
    pub(crate) threads: u32,
    /// Registers of a thread.
    pub(crate) registers: u32,
    /// Bytes of local memory of a thread: spilled registers and arrays that found no register.
    pub(crate) stack_bytes: u32,
    /// Bytes of static shared memory of a block.
    pub(crate) shared_bytes: u64,
    /// Its instructions by kind.
    pub(crate) mix: Counts,
    /// Counts in the loop that does the work.
    #[serde(rename = "loop", skip_serializing_if = "Counts::is_empty")]
    pub(crate) body: Counts,
}

/// Attributes of `.nv.info`.
const REGISTERS: u8 = 0x2f;
const FRAME: u8 = 0x11;
const MAX_THREADS: u8 = 0x05;
/// The format whose 16 bits are a length.
const SIZED: u8 = 4;

/// The kernels of a cubin, in order of their names.
pub(crate) fn usage(cubin: &[u8]) -> anyhow::Result<Vec<Usage>> {
    let elf = ElfFile64::<LittleEndian>::parse(cubin)?;
    let info_of = |section: &str| -> anyhow::Result<&[u8]> {
        Ok(elf.section_by_name(section).map_or(Ok(&[][..]), |found| found.data())?)
    };
    let mut all: BTreeMap<String, Usage> = BTreeMap::new();
    for (kind, value) in attributes(info_of(".nv.info")?)? {
        if kind != REGISTERS && kind != FRAME {
            continue;
        }
        let symbol = elf.symbol_by_index(SymbolIndex(number(value, 0)? as usize))?;
        let kernel = symbol.name()?;
        let usage = match all.entry(kernel.to_owned()) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => {
                let shared = elf.section_by_name(&format!(".nv.shared.{kernel}"));
                new.insert(Usage {
                    kernel: kernel.to_owned(),
                    threads: max_threads(info_of(&format!(".nv.info.{kernel}"))?)?,
                    registers: 0,
                    stack_bytes: u32::MAX,
                    shared_bytes: shared.map_or(0, |found| found.size()),
                    mix: Counts::new(),
                    body: Counts::new(),
                })
            }
        };
        match kind {
            REGISTERS => usage.registers = number(value, 4)?,
            _ => usage.stack_bytes = number(value, 4)?,
        }
    }
    // Routines that the compiler adds (division) count for the kernels that call them.
    let (routines, mut all): (Vec<_>, Vec<_>) =
        all.into_values().partition(|usage| usage.kernel.starts_with('$'));
    let routine_bytes = routines.iter().map(|usage| usage.stack_bytes).max().unwrap_or(0);
    for usage in &mut all {
        let known = usage.registers > 0 && usage.stack_bytes != u32::MAX;
        ensure!(known, "{}: registers or stack unknown", usage.kernel);
        usage.stack_bytes = usage.stack_bytes.saturating_add(routine_bytes);
    }
    ensure!(!all.is_empty(), "a cubin without kernels");
    Ok(all)
}

/// Threads of a block, the product of three numbers; 0 where nothing is said.
fn max_threads(info: &[u8]) -> anyhow::Result<u32> {
    let attributes = attributes(info)?;
    let Some((_, value)) = attributes.iter().find(|(kind, _)| *kind == MAX_THREADS) else {
        return Ok(0);
    };
    let [x, y, z] = [number(value, 0)?, number(value, 4)?, number(value, 8)?];
    x.checked_mul(y).and_then(|threads| threads.checked_mul(z)).context("threads of a block")
}

/// The attributes with a sized value: kind and value.
fn attributes(info: &[u8]) -> anyhow::Result<Vec<(u8, &[u8])>> {
    let mut all = Vec::new();
    let mut rest = info;
    while let [format, kind, low, high, tail @ ..] = rest {
        let length =
            if *format == SIZED { usize::from(u16::from_le_bytes([*low, *high])) } else { 0 };
        ensure!(length <= tail.len(), ".nv.info: an attribute of {length} bytes");
        if length > 0 {
            all.push((*kind, &tail[..length]));
        }
        rest = &tail[length..];
    }
    Ok(all)
}

/// A number of an attribute.
fn number(from: &[u8], at: usize) -> anyhow::Result<u32> {
    let found = from.get(at..).and_then(|rest| rest.first_chunk()).context("a short attribute")?;
    Ok(u32::from_le_bytes(*found))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_cubins_are_errors() {
        let gen_dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../cuda/kernels/gen");
        let good = std::fs::read(gen_dir.join("rms_norm.sm_86.cubin")).unwrap();
        let found = usage(&good).unwrap();
        assert_eq!((found[0].kernel.as_str(), found[0].threads), ("rms_norm", 256));
        assert!((8..=255).contains(&found[0].registers), "{found:?}");
        let mut refused = 0;
        for length in (0..good.len()).step_by(97) {
            // The program headers stand behind what is read; all else is missed.
            match usage(&good[..length]) {
                Ok(same) => assert_eq!(same, found, "{length} bytes"),
                Err(_) => refused += 1,
            }
        }
        assert!(refused > good.len() / 97 * 9 / 10, "{refused} cuts refused");
        for at in (0..good.len()).step_by(7) {
            let mut bad = good.clone();
            bad[at] ^= 0xff;
            let _ = usage(&bad);
        }
    }
}
