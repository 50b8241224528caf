//! Resources that a cubin states of its kernels: registers, stack, shared memory.
//!
//! A cubin is an ELF file. Section `.nv.info` is a list of attributes, each a format byte, a kind
//! byte and 16 bits that are a value or the length of what follows; the ones that matter name a
//! kernel by its symbol. Section `.nv.info.NAME` has attributes of one kernel, `.nv.shared.NAME` is
//! as large as its static shared memory.

use anyhow::{Context as _, bail, ensure};
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

/// Section header fields that are used here.
struct Section<'a> {
    name: &'a str,
    /// Empty for a section without content in the file.
    bytes: &'a [u8],
    size: u64,
}

/// The kernels of a cubin, in order of their names.
pub(crate) fn usage(cubin: &[u8]) -> anyhow::Result<Vec<Usage>> {
    let sections = sections(cubin)?;
    let find = |name: &str| sections.iter().find(|section| section.name == name);
    let names = find(".strtab").context("a cubin without .strtab")?.bytes;
    let symbols = find(".symtab").context("a cubin without .symtab")?.bytes;
    let symbol = |index: u32| -> anyhow::Result<String> {
        let at = (index as usize).checked_mul(24).context("symbol index")?;
        Ok(string(names, number(symbols, at, 4)? as usize)?.to_owned())
    };
    let mut all: Vec<Usage> = Vec::new();
    let info = find(".nv.info").context("a cubin without .nv.info")?.bytes;
    for (kind, value) in attributes(info)? {
        if kind != REGISTERS && kind != FRAME {
            continue;
        }
        let kernel = symbol(number(value, 0, 4)? as u32)?;
        let number = number(value, 4, 4)? as u32;
        let at = match all.iter().position(|usage| usage.kernel == kernel) {
            Some(at) => at,
            None => {
                let shared = find(&format!(".nv.shared.{kernel}")).map_or(0, |found| found.size);
                let info = find(&format!(".nv.info.{kernel}")).map_or(&[][..], |found| found.bytes);
                let (mix, body) = (Counts::new(), Counts::new());
                all.push(Usage {
                    threads: max_threads(info)?,
                    kernel,
                    registers: 0,
                    stack_bytes: u32::MAX,
                    shared_bytes: shared,
                    mix,
                    body,
                });
                all.len() - 1
            }
        };
        match kind {
            REGISTERS => all[at].registers = number,
            _ => all[at].stack_bytes = number,
        }
    }
    // Routines that the compiler adds (division) count for the kernels that call them.
    let (mut all, routines): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|usage| !usage.kernel.starts_with('$'));
    let routine_bytes = routines.iter().map(|usage| usage.stack_bytes).max().unwrap_or(0);
    for usage in &mut all {
        let known = usage.registers > 0 && usage.stack_bytes != u32::MAX;
        ensure!(known, "{}: registers or stack unknown", usage.kernel);
        usage.stack_bytes = usage.stack_bytes.saturating_add(routine_bytes);
    }
    ensure!(!all.is_empty(), "a cubin without kernels");
    all.sort_by(|a, b| a.kernel.cmp(&b.kernel));
    Ok(all)
}

/// Threads of a block, the product of three numbers; 0 where nothing is said.
fn max_threads(info: &[u8]) -> anyhow::Result<u32> {
    let attributes = attributes(info)?;
    let Some((_, value)) = attributes.iter().find(|(kind, _)| *kind == MAX_THREADS) else {
        return Ok(0);
    };
    let mut product = 1u64;
    for at in [0, 4, 8] {
        product = product.saturating_mul(number(value, at, 4)?);
    }
    Ok(u32::try_from(product)?)
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

fn sections(elf: &[u8]) -> anyhow::Result<Vec<Section<'_>>> {
    if elf.get(..6) != Some(&[0x7f, b'E', b'L', b'F', 2, 1]) {
        bail!("no little-endian 64-bit ELF file");
    }
    let table = number(elf, 0x28, 8)? as usize;
    let (size, count) = (number(elf, 0x3a, 2)? as usize, number(elf, 0x3c, 2)? as usize);
    let names_index = number(elf, 0x3e, 2)? as usize;
    ensure!(size >= 64 && table <= elf.len() && names_index < count, "section table");
    let header = |index: usize| table + index * size;
    let content = |at: usize| -> anyhow::Result<&[u8]> {
        const NO_BITS: u64 = 8;
        if number(elf, at + 4, 4)? == NO_BITS {
            return Ok(&[]);
        }
        let (from, length) = (number(elf, at + 24, 8)? as usize, number(elf, at + 32, 8)? as usize);
        elf.get(from..).and_then(|rest| rest.get(..length)).context("a section beyond the file")
    };
    let names = content(header(names_index))?;
    (0..count)
        .map(|index| {
            let at = header(index);
            let name = string(names, number(elf, at, 4)? as usize)?;
            Ok(Section { name, bytes: content(at)?, size: number(elf, at + 32, 8)? })
        })
        .collect()
}

/// A little-endian number of `bytes` bytes.
fn number(from: &[u8], at: usize, bytes: usize) -> anyhow::Result<u64> {
    let found = from.get(at..).and_then(|rest| rest.get(..bytes)).context("a truncated cubin")?;
    Ok(found.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

/// A zero-terminated string.
fn string(from: &[u8], at: usize) -> anyhow::Result<&str> {
    let rest = from.get(at..).context("a name beyond its table")?;
    let end = rest.iter().position(|byte| *byte == 0).context("a name without an end")?;
    Ok(std::str::from_utf8(&rest[..end])?)
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
