//! The list of mutants: kernels with one mistake each, in `tests/mutants.txt`.

/// A mistake.
#[derive(Debug, Default)]
pub struct Mutant {
    /// The file.
    pub file: String,
    /// Tests that may notice it; fewer take less time.
    pub tests: Vec<String>,
    /// Description of the fault.
    pub what: String,
    /// True if it is known to live; docs/KERNELS.md says why.
    pub lives: bool,
    /// Text to replace; it stands there once.
    pub from: String,
    /// Text that replaces it.
    pub to: String,
}

/// All of them, in the order of the file.
pub fn mutants() -> Vec<Mutant> {
    let mut mutants: Vec<Mutant> = Vec::new();
    for line in include_str!("../mutants.txt").lines() {
        let (kind, rest) = line.split_at(line.len().min(2));
        if kind == "= " {
            let mut fields = rest.split(" | ").map(str::to_owned);
            let mut field = || fields.next().unwrap_or_default();
            let (file, tests, what, lives) = (field(), field(), field(), field() == "lives");
            let tests = tests.split(' ').map(str::to_owned).collect();
            mutants.push(Mutant { file, tests, what, lives, ..Mutant::default() });
        } else if let Some(mutant) = mutants.last_mut() {
            let text = match kind.trim_end() {
                "-" => &mut mutant.from,
                "+" => &mut mutant.to,
                _ => continue,
            };
            if !text.is_empty() {
                text.push('\n');
            }
            text.push_str(rest);
        }
    }
    mutants
}

#[test]
fn every_mutant_has_its_place() {
    let mutants = mutants();
    assert!(mutants.len() > 50, "{} mutants", mutants.len());
    for Mutant { file, from, to, what, tests, .. } in &mutants {
        let path = format!("{}/kernels/{file}", env!("CARGO_MANIFEST_DIR"));
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.matches(from.as_str()).count(), 1, "{file}: {what}: `{from}`");
        assert!(from != to && !tests.is_empty(), "{file}: {what}");
    }
}
