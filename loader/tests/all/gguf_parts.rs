//! GGUF models in several files.

use hat_loader::{GgufError, LoadError, SourceModel, TinyModel, generated};

use crate::files::gguf::{Gguf, Meta, assert_same_tensors, part_path, tiny, write_parts};

/// Writes the files and opens the model by one of them, numbered from 1.
fn open_by(number: usize, parts: &[Gguf]) -> (tempfile::TempDir, Result<SourceModel, LoadError>) {
    let directory = tempfile::tempdir().unwrap();
    write_parts(directory.path(), parts);
    let opened = SourceModel::open(&part_path(directory.path(), number, parts.len()));
    (directory, opened)
}

/// The error must be of part `number` and contain `text`.
fn refused(parts: &[Gguf], number: usize, text: &str) {
    let (directory, opened) = open_by(1, parts);
    match opened {
        Err(LoadError::Gguf { path: got, error }) => {
            assert_eq!(got, part_path(directory.path(), number, parts.len()), "{error}");
            assert!(error.to_string().contains(text), "{error}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_model_in_parts_is_the_whole_one_whichever_part_is_named() {
    let model = generated(&TinyModel { tied: true, ..tiny() });
    for count in [2, 3, 7] {
        let parts = Gguf::of(&model).parts(count);
        for number in 1..=count {
            let (directory, opened) = open_by(number, &parts);
            let opened = opened.unwrap();
            assert_same_tensors(&opened, &model);
            assert_eq!(opened.config(), model.config());
            assert_eq!(opened.name(), "tiny.x");
            drop(directory);
        }
    }
}

#[test]
fn a_missing_part_is_named() {
    let parts = Gguf::of(&generated(&tiny())).parts(4);
    for missing in 1..=4 {
        let (directory, _) = open_by(1, &parts);
        let gone = part_path(directory.path(), missing, 4);
        std::fs::remove_file(&gone).unwrap();
        let present = part_path(directory.path(), if missing == 1 { 2 } else { 1 }, 4);
        match SourceModel::open(&present) {
            Err(LoadError::Gguf { path, error: GgufError::MissingPart { number, count } }) => {
                assert_eq!((path, number, count), (gone, missing as u64, 4));
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn parts_that_contradict_each_other_are_refused() {
    let good = Gguf::of(&generated(&tiny())).parts(3);
    let with = |number: usize, change: &dyn Fn(&mut Gguf)| {
        let mut parts = good.clone();
        change(&mut parts[number - 1]);
        parts
    };
    refused(&with(2, &|part| part.set("split.no", Meta::U32(2))), 2, "split.no: 2, but");
    refused(&with(3, &|part| part.set("split.count", Meta::U32(4))), 3, "split.count: 4, but");
    refused(&with(3, &|part| part.remove("split.count")), 3, "split.count: 1, but");
    refused(&with(1, &|part| part.set("split.count", Meta::U32(2))), 1, "its name does not end");
    let fewer = with(1, &|part| part.set("split.tensors.count", Meta::I32(5)));
    refused(&fewer, 1, "split.tensors.count: 5, but the files hold");
    let doubled = good[0].tensors[0].clone();
    let twice = with(2, &|part| part.tensors.push(doubled.clone()));
    refused(&twice, 2, &format!("tensor {} occurs twice", doubled.name));
    refused(&with(2, &|part| part.magic = *b"GGML"), 2, "not a GGUF file");
    refused(&with(1, &|part| part.remove("general.architecture")), 1, "missing");
    refused(&with(2, &|part| part.tensors[0].kind = 19), 2, "IQ1_S");
}
