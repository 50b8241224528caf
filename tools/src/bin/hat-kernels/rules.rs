//! Rules on the instructions of kernels, `mix.json`: so that a kernel which lost its matrix
//! products or its wide loads, and is right and slow, is noticed where no GPU is.
//!
//! A rule names kernels (`gemv_*`), says in words what it is for, and has counts that the whole
//! kernel or its loop must have at least (`must`) or may have at most (`at_most`). A count is of a
//! kind (`LDG.128`) or of all widths (`LDG`).

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, bail};
use serde::Deserialize;

use crate::compile::Described;
use crate::mix::{Counts, family};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    /// Names, `*` for any end.
    kernels: Vec<String>,
    /// Description of the rule.
    what: String,
    #[serde(default)]
    kernel: Limits,
    #[serde(default, rename = "loop")]
    body: Limits,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Limits {
    #[serde(default)]
    must: BTreeMap<String, u32>,
    #[serde(default)]
    at_most: BTreeMap<String, u32>,
}

/// Holds the kernels of every cubin to the rules of a file.
pub(crate) fn check(path: &Path, artefacts: &Described) -> anyhow::Result<()> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let rules: Vec<Rule> =
        serde_json::from_str(&text).with_context(|| path.display().to_string())?;
    let mut broken = Vec::new();
    for rule in &rules {
        for name in &rule.kernels {
            let mut found = false;
            for (file, artefact) in artefacts {
                for usage in artefact.kernels.iter().filter(|usage| matches(name, &usage.kernel)) {
                    found = true;
                    let whose = format!("{file}: {}", usage.kernel);
                    let mut say = |place: &str, limits: &Limits, counts: &Counts| {
                        for breach in limits.breaches(counts) {
                            broken.push(format!("{whose}: {place} {breach}: {}", rule.what));
                        }
                    };
                    say("the kernel has", &rule.kernel, &usage.mix);
                    say("the loop has", &rule.body, &usage.body);
                }
            }
            if !found {
                broken.push(format!("mix.json: there is no kernel {name}"));
            }
        }
    }
    if !broken.is_empty() {
        bail!("not the instructions of cuda/kernels/mix.json:\n{}", broken.join("\n"));
    }
    Ok(())
}

fn matches(pattern: &str, name: &str) -> bool {
    pattern.strip_suffix('*').map_or(pattern == name, |begin| name.starts_with(begin))
}

impl Limits {
    fn breaches(&self, counts: &Counts) -> Vec<String> {
        let too_few = self.must.iter().filter_map(|(kind, least)| {
            let count = family(counts, kind);
            (count < *least).then(|| format!("{count} {kind}, not {least}"))
        });
        let too_many = self.at_most.iter().filter_map(|(kind, most)| {
            let count = family(counts, kind);
            (count > *most).then(|| format!("{count} {kind}, at most {most}"))
        });
        too_few.chain(too_many).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_hold_counts_of_kinds_and_of_all_widths() {
        let counts = |all: &[(&str, u32)]| -> Counts {
            all.iter().map(|(kind, count)| ((*kind).to_owned(), *count)).collect()
        };
        let limits: Limits = serde_json::from_str(
            r#"{ "must": { "HMMA": 2, "LDG": 3 }, "at_most": { "LDG.16": 0 } }"#,
        )
        .unwrap();
        let good = counts(&[("HMMA", 2), ("LDG.32", 1), ("LDG.128", 2), ("LDGSTS.16", 9)]);
        assert!(limits.breaches(&good).is_empty());
        let bad = counts(&[("HMMA", 1), ("LDG.16", 1), ("LDGSTS.128", 3)]);
        let expected = ["1 HMMA, not 2", "1 LDG, not 3", "1 LDG.16, at most 0"];
        assert_eq!(limits.breaches(&bad), expected);
        assert!(matches("gemv_*", "gemv_q8_0_1") && !matches("gemv_*", "gem"));
        assert!(matches("embed", "embed") && !matches("embed", "embed_2"));
    }
}
