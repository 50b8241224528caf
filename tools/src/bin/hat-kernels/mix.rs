//! Instruction mix of a kernel: its machine code as nvdisasm writes it, counted by kinds of
//! instructions, all of it and the loop that does the work.
//!
//! A kind is the operation, with the width in bits for what moves memory: `LDG.128` is a load of 16
//! bytes, `LDGSTS.128` a copy to shared memory (cp.async). Integer and address arithmetic is in the
//! total alone. The loop is a natural loop of the control flow: of the innermost ones with
//! matrix products (or else dot products of bytes, or else loads) the one with most of them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail, ensure};

/// Number of instructions of each kind; `all` is every instruction.
pub(crate) type Counts = BTreeMap<String, u32>;
/// For each instruction whether it is meant.
type Marks = Vec<bool>;

/// A kernel's instructions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mix {
    /// Counts of the whole kernel, routines that the compiler added included.
    pub(crate) kernel: Counts,
    /// Counts of the loop; empty if there is none with such work.
    pub(crate) body: Counts,
}

/// Kinds that are counted by their first word.
const PLAIN: [&str; 14] = [
    "BAR", "FADD", "FFMA", "FMUL", "HADD2", "HFMA2", "HMMA", "HMUL2", "I2F", "IDP", "IMMA", "LDSM",
    "MUFU", "SHFL",
];
/// Kinds that move memory, counted by width.
const MOVING: [&str; 13] = [
    "ATOM", "ATOMG", "ATOMS", "LD", "LDG", "LDGSTS", "LDL", "LDS", "RED", "ST", "STG", "STL", "STS",
];
/// Work of a loop; the first that a kernel has counts.
const WORK: [&[&str]; 3] = [&["HMMA", "IMMA"], &["IDP"], &["LDG", "LDGSTS"]];

/// One line of a listing.
#[derive(Debug)]
struct Instruction<'a> {
    operation: &'a str,
    conditional: bool,
    /// The label that it names.
    target: Option<&'a str>,
}

/// The kernels of a cubin, by name.
pub(crate) fn of_cubin(
    nvdisasm: &Path,
    folder: &Path,
    file: &str,
    cubin: &[u8],
) -> anyhow::Result<BTreeMap<String, Mix>> {
    let path = folder.join(file);
    fs::write(&path, cubin).with_context(|| path.display().to_string())?;
    let output = Command::new(nvdisasm)
        .args(["-c", "-ndf"])
        .arg(&path)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("starting {}", nvdisasm.display()))?;
    if !output.status.success() {
        bail!("{file}: nvdisasm: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let listing = String::from_utf8(output.stdout).context("nvdisasm's text")?;
    kernels(&listing).with_context(|| file.to_owned())
}

/// The kernels of a listing.
fn kernels(listing: &str) -> anyhow::Result<BTreeMap<String, Mix>> {
    let mut all = BTreeMap::new();
    for section in listing.split("\n.text.").skip(1) {
        let (name, code) = section.split_once(":\n").context("a section without a name")?;
        all.insert(name.to_owned(), mix(code).with_context(|| name.to_owned())?);
    }
    ensure!(!all.is_empty(), "a listing without kernels");
    Ok(all)
}

fn mix(code: &str) -> anyhow::Result<Mix> {
    let (mut instructions, mut labels) = (Vec::new(), BTreeMap::new());
    for line in code.lines() {
        let line = line.trim();
        if line.starts_with("//-----") {
            break; // the next section's head
        } else if let Some(label) = line.strip_suffix(':') {
            labels.insert(label, instructions.len());
        } else if let Some(instruction) = instruction(line) {
            instructions.push(instruction);
        }
    }
    ensure!(!instructions.is_empty(), "no instruction could be read");
    let forth: Vec<Vec<usize>> =
        (0..instructions.len()).map(|at| next(&instructions, &labels, at).collect()).collect();
    // Behind the last instruction that is reached a kernel is filled up.
    let live = reached(&forth, 0, instructions.len());
    let kernel = counts(&instructions, &live);
    let body = working(&instructions, &kernel, &loops(&forth, &live)).unwrap_or_default();
    Ok(Mix { kernel, body })
}

/// `/*0640*/  @!P0 LDG.E.128 R4, [R2.64] ;`
fn instruction(line: &str) -> Option<Instruction<'_>> {
    let text = line.strip_prefix("/*")?.split_once("*/")?.1.trim();
    let conditional = text.starts_with('@');
    let text = if conditional { text.split_once(' ')?.1.trim_start() } else { text };
    let operation = text.split([' ', ';']).next().filter(|word| !word.is_empty())?;
    let target = text.split_once("`(").and_then(|(_, rest)| rest.split_once(')'));
    Some(Instruction { operation, conditional, target: target.map(|(label, _)| label) })
}

/// The kind under which an operation is counted.
fn kind(operation: &str) -> Option<String> {
    let mut words = operation.split('.');
    let first = words.next()?;
    let plain = if first == "I2FP" { "I2F" } else { first };
    if PLAIN.contains(&plain) {
        return Some(plain.to_owned());
    }
    if !MOVING.contains(&first) {
        return None;
    }
    let width = words.find_map(|word| match word {
        "128" | "64" => Some(word),
        "U16" | "S16" => Some("16"),
        "U8" | "S8" => Some("8"),
        _ => None,
    });
    Some(format!("{first}.{}", width.unwrap_or("32")))
}

fn counts(instructions: &[Instruction<'_>], which: &Marks) -> Counts {
    let mut counts = Counts::new();
    for (instruction, _) in instructions.iter().zip(which).filter(|(_, marked)| **marked) {
        *counts.entry("all".to_owned()).or_default() += 1;
        if let Some(kind) = kind(instruction.operation) {
            *counts.entry(kind).or_default() += 1;
        }
    }
    counts
}

/// Number of instructions of a family, `LDG` or `LDG.128`.
pub(crate) fn family(counts: &Counts, name: &str) -> u32 {
    let within = |kind: &str| {
        kind.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    };
    counts.iter().filter(|(kind, _)| within(kind)).map(|(_, count)| count).sum()
}

/// Instructions that may follow each instruction.
fn next(
    instructions: &[Instruction<'_>],
    labels: &BTreeMap<&str, usize>,
    at: usize,
) -> impl Iterator<Item = usize> {
    let Instruction { operation, conditional, target } = &instructions[at];
    let first = operation.split('.').next().unwrap_or_default();
    let jumps = matches!(first, "BRA" | "JMP") || first == "CALL";
    let target = target.filter(|_| jumps).and_then(|label| labels.get(label).copied());
    let ends = matches!(first, "BRA" | "JMP" | "EXIT" | "RET");
    // BRA.CONV and BRA.DIV jump for some lanes.
    let falls = !ends || *conditional || operation.contains(".CONV") || operation.contains(".DIV");
    let after = (falls && at + 1 < instructions.len()).then_some(at + 1);
    target.filter(|target| *target < instructions.len()).into_iter().chain(after)
}

/// Blocks that are reached from `from` without touching `without`.
fn reached(edges: &[Vec<usize>], from: usize, without: usize) -> Marks {
    let (mut found, mut open) = (vec![false; edges.len()], vec![from]);
    while let Some(at) = open.pop() {
        if at != without && !found[at] {
            found[at] = true;
            open.extend(&edges[at]);
        }
    }
    found
}

/// The natural loops: by their first instruction, all that comes back to it.
fn loops(forth: &[Vec<usize>], live: &Marks) -> BTreeMap<usize, Marks> {
    let mut back = vec![Vec::new(); forth.len()];
    for (from, targets) in forth.iter().enumerate().filter(|(from, _)| live[*from]) {
        for to in targets {
            back[*to].push(from);
        }
    }
    let mut loops: BTreeMap<usize, Marks> = BTreeMap::new();
    for (from, targets) in forth.iter().enumerate().filter(|(from, _)| live[*from]) {
        for head in targets.iter().copied().filter(|head| *head <= from) {
            // A way back is one whose begin can't be reached around its end.
            if head == 0 || head == from || !reached(forth, 0, head)[from] {
                let body = loops.entry(head).or_insert_with(|| vec![false; forth.len()]);
                body[head] = true;
                for (is_in, comes_back) in body.iter_mut().zip(reached(&back, from, head)) {
                    *is_in |= comes_back;
                }
            }
        }
    }
    loops
}

/// The innermost loop with most of the kernel's work.
fn working(
    instructions: &[Instruction<'_>],
    kernel: &Counts,
    loops: &BTreeMap<usize, Marks>,
) -> Option<Counts> {
    let sum = |counts: &Counts, kinds: &[&str]| -> u32 {
        kinds.iter().map(|kind| family(counts, kind)).sum()
    };
    let kinds = WORK.into_iter().find(|kinds| sum(kernel, kinds) > 0)?;
    let counted = loops.iter().map(|(head, body)| (head, body, counts(instructions, body)));
    let busy: Vec<_> = counted.filter(|(_, _, counts)| sum(counts, kinds) > 0).collect();
    let is_innermost = |head: &usize, body: &Marks| {
        !busy.iter().any(|(other, _, _)| *other != head && body[**other])
    };
    let innermost = busy.iter().filter(|(head, body, _)| is_innermost(head, body));
    // The first of equals.
    let most = innermost.rev().max_by_key(|(_, _, counts)| sum(counts, kinds))?;
    Some(most.2.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTING: &str = "\
\t.section\t.text.a,\"ax\",@progbits
a:
.text.a:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @!P1 LDG.E.U16 R1, [R2.64] ;
.L_x_1:
        /*0020*/                   LDSM.16.M88.4 R4, [R3] ;
.L_x_2:
        /*0030*/                   LDGSTS.E.BYPASS.128 [R3], [R2.64] ;
        /*0040*/                   HMMA.16816.F32 R4, R4, R8, R4 ;
        /*0050*/                   BRA.CONV ~URZ, `(.L_x_4) ;
.L_x_5:
        /*0060*/               @P0 BRA `(.L_x_2) ;
        /*0070*/                   I2FP.F32.S32 R4, R4 ;
        /*0080*/               @P0 CALL.REL.NOINC `(.L_x_3) ;
        /*0090*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*00a0*/                   STG.E.64 [R4.64], R2 ;
        /*00b0*/                   EXIT ;
.L_x_4:
        /*00c0*/                   SHFL.BFLY PT, R7, R34, 0x10, 0x1f ;
        /*00d0*/                   BRA `(.L_x_5) ;
.L_x_6:
        /*00e0*/                   BRA `(.L_x_6);
        /*00f0*/                   NOP;
";

    fn named(counts: &Counts) -> Vec<(&str, u32)> {
        counts.iter().map(|(kind, count)| (kind.as_str(), *count)).collect()
    }

    #[test]
    fn instructions_are_counted_by_kind_and_width() {
        let found = kernels(LISTING).unwrap();
        let expected = [
            ("HMMA", 1),
            ("I2F", 1),
            ("LDG.16", 1),
            ("LDGSTS.128", 1),
            ("LDSM", 1),
            ("SHFL", 1),
            ("STG.64", 1),
            ("all", 14),
        ];
        assert_eq!(named(&found["a"].kernel), expected);
        assert_eq!(family(&found["a"].kernel, "LDG"), 1, "LDGSTS is another family");
        assert_eq!(family(&found["a"].kernel, "STG.64"), 1);
    }

    #[test]
    fn the_loop_is_the_innermost_with_what_stands_out_of_line() {
        let found = kernels(LISTING).unwrap();
        let expected = [("HMMA", 1), ("LDGSTS.128", 1), ("SHFL", 1), ("all", 6)];
        assert_eq!(named(&found["a"].body), expected);
        // A jump into the middle makes it no loop.
        let entered = LISTING.replace("S2R R0, SR_TID.X", "@P3 BRA `(.L_x_5)");
        assert!(kernels(&entered).unwrap()["a"].body.is_empty());
    }

    #[test]
    fn what_is_no_listing_is_an_error() {
        for text in ["", "nothing", "\n.text.a:\nnothing\n", "\n.text.a"] {
            assert!(kernels(text).is_err(), "{text}");
        }
    }
}
