//! The tables of docs/KERNELS.md: what stands there between two markers is made of the manifest.

use std::fmt::Write as _;

use anyhow::Context as _;

use crate::compile::{Artefacts, Described};
use crate::cubin::Usage;
use crate::mix::Counts;

const BEGIN: &str = "<!-- made by hat-kernels: from here -->\n";
const END: &str = "<!-- made by hat-kernels: to here -->\n";

/// The architecture whose warps and instructions the tables show.
const SHOWN: &str = "sm_86";
/// Resources of an SM: registers, bytes of shared memory, warps, blocks.
const REGISTERS: u32 = 65_536;
const SHARED_BYTES: u64 = 100 << 10;
const WARPS: u32 = 48;
const BLOCKS: u32 = 16;

/// The page with its tables made anew.
pub(crate) fn page(
    old: &str,
    artefacts: &Artefacts,
    described: &Described,
) -> anyhow::Result<String> {
    let (before, rest) = old.split_once(BEGIN).with_context(|| format!("no line {BEGIN}"))?;
    let (_, behind) = rest.split_once(END).with_context(|| format!("no line {END}"))?;
    let tables = tables(artefacts, described)?;
    Ok(format!("{before}{BEGIN}{tables}{END}{behind}"))
}

/// A kernel on the shown architecture, and its registers on all.
struct Row<'a> {
    shown: &'a Usage,
    registers: Vec<String>,
}

fn tables(artefacts: &Artefacts, described: &Described) -> anyhow::Result<String> {
    let mut rows: Vec<Row<'_>> = Vec::new();
    for artefact in described.values().filter(|artefact| artefact.target == SHOWN) {
        rows.extend(artefact.kernels.iter().map(|shown| Row { shown, registers: Vec::new() }));
    }
    rows.sort_by(|a, b| a.shown.kernel.cmp(&b.shown.kernel));
    // The manifest is in the order of files, so of architectures.
    for usage in described.values().flat_map(|artefact| &artefact.kernels) {
        let row = rows.iter_mut().find(|row| row.shown.kernel == usage.kernel);
        let row = row.with_context(|| format!("{} is not compiled for {SHOWN}", usage.kernel))?;
        row.registers.push(usage.registers.to_string());
    }
    let mut text = sizes(artefacts, &rows)?;
    text.push_str("\n| kernel | threads | registers | shared | warps of 48 |\n");
    text.push_str("|---|---|---|---|---|\n");
    for Row { shown, registers } in &rows {
        let Usage { kernel, threads, shared_bytes, .. } = shown;
        let (registers, warps) = (registers.join(" / "), warps(shown));
        writeln!(text, "| `{kernel}` | {threads} | {registers} | {shared_bytes} | {warps} |")?;
    }
    text.push_str("\n| kernel | instructions | of the loop | what they are |\n|---|---|---|---|\n");
    for Row { shown, .. } in &rows {
        let all = |counts: &Counts| counts.get("all").copied().unwrap_or(0);
        let (kernel, total, of_loop) = (&shown.kernel, all(&shown.mix), all(&shown.body));
        let counts = if of_loop > 0 { &shown.body } else { &shown.mix };
        let kinds = counts.iter().filter(|(kind, _)| *kind != "all");
        let kinds: Vec<_> = kinds.map(|(kind, count)| format!("{kind} {count}")).collect();
        let of_loop = if of_loop > 0 { of_loop.to_string() } else { "-".to_owned() };
        writeln!(text, "| `{kernel}` | {total} | {of_loop} | {} |", kinds.join(", "))?;
    }
    text.push('\n');
    Ok(text)
}

/// Number of kernels, and their bytes.
fn sizes(artefacts: &Artefacts, rows: &[Row<'_>]) -> anyhow::Result<String> {
    let sum = |end: &str| {
        let files = artefacts.iter().filter(|(name, _)| name.ends_with(end));
        let (count, bytes) = files.fold((0, 0), |(n, sum), (_, file)| (n + 1, sum + file.len()));
        format!("{count} {} files of {:.2} MB", end.trim_matches('.'), bytes as f64 / 1e6)
    };
    let mut text = String::new();
    let (kernels, cubins, ptx) = (rows.len(), sum(".cubin"), sum(".ptx"));
    writeln!(text, "\n{kernels} kernels in {cubins} and {ptx}.")?;
    Ok(text)
}

/// Warps that an SM holds, by registers, shared memory and blocks.
fn warps(usage: &Usage) -> u32 {
    let of_block = usage.threads.div_ceil(32).max(1);
    // A warp's registers are handed out by 256, warps by 4; a block's first KB is the system's.
    let of_warp = (usage.registers * 32).next_multiple_of(256).max(1);
    let by_registers = REGISTERS / of_warp / 4 * 4 / of_block;
    let by_shared = (SHARED_BYTES / (usage.shared_bytes + 1024).next_multiple_of(128)) as u32;
    by_registers.min(by_shared).min(BLOCKS).min(WARPS / of_block) * of_block
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warps_are_limited_by_registers_shared_memory_and_blocks() {
        let usage = |threads, registers, shared_bytes| {
            let (mix, body) = (Counts::new(), Counts::new());
            let (kernel, stack_bytes) = (String::new(), 0);
            Usage { kernel, threads, registers, stack_bytes, shared_bytes, mix, body }
        };
        let cases = [
            (usage(128, 200, 34_816), 8),
            (usage(128, 124, 18_432), 16),
            (usage(256, 47, 4096), 40),
            (usage(256, 40, 4096), 48),
            (usage(32, 21, 0), 16),
            (usage(128, 32, 49_000), 8),
        ];
        for (usage, expected) in cases {
            assert_eq!(warps(&usage), expected, "{usage:?}");
        }
    }

    #[test]
    fn only_what_stands_between_the_markers_changes() {
        let old = format!("before\n{BEGIN}old\n{END}behind\n");
        let new = page(&old, &Artefacts::new(), &Described::new()).unwrap();
        assert!(new.starts_with("before\n") && new.ends_with("behind\n") && !new.contains("old"));
        assert_eq!(page(&new, &Artefacts::new(), &Described::new()).unwrap(), new);
        assert!(page("none", &Artefacts::new(), &Described::new()).is_err());
    }
}
