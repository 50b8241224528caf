//! GGUF models in several files.

use std::path::{Path, PathBuf};

use hat_loader::{GgufError, LoadError, SourceModel, TinyModel, generated};

use crate::files::gguf::{Gguf, Meta, assert_same_tensors, tiny};

/// The files of a model in `count` parts, as llama.cpp cuts them: only the first has metadata.
fn parts(whole: &Gguf, count: usize) -> Vec<Gguf> {
    let tensors = whole.tensors.len();
    let mut parts: Vec<Gguf> = (0..count)
        .map(|number| {
            let mut part = whole.clone();
            if number > 0 {
                part.metadata.clear();
            }
            let range = number * tensors / count..(number + 1) * tensors / count;
            part.tensors = whole.tensors[range].to_vec();
            part.set("split.no", Meta::U32(number as u32));
            part.set("split.count", Meta::U32(count as u32));
            part
        })
        .collect();
    parts[0].set("split.tensors.count", Meta::I32(tensors as i32));
    parts
}

fn path(directory: &Path, number: usize, count: usize) -> PathBuf {
    directory.join(format!("tiny.x-{number:05}-of-{count:05}.gguf"))
}

/// Writes the files and opens the model by one of them, numbered from 1.
fn open_by(number: usize, parts: &[Gguf]) -> (tempfile::TempDir, Result<SourceModel, LoadError>) {
    let directory = tempfile::tempdir().unwrap();
    for (index, part) in parts.iter().enumerate() {
        part.write(&path(directory.path(), index + 1, parts.len()));
    }
    let opened = SourceModel::open(&path(directory.path(), number, parts.len()));
    (directory, opened)
}

/// The error must be of part `number` and contain `text`.
fn refused(parts: &[Gguf], number: usize, text: &str) {
    let (directory, opened) = open_by(1, parts);
    match opened {
        Err(LoadError::Gguf { path: got, error }) => {
            assert_eq!(got, path(directory.path(), number, parts.len()), "{error}");
            assert!(error.to_string().contains(text), "{error}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_model_in_parts_is_the_whole_one_whichever_part_is_named() {
    let model = generated(&TinyModel { tied: true, ..tiny() });
    for count in [2, 3, 7] {
        let parts = parts(&Gguf::of(&model), count);
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
    let parts = parts(&Gguf::of(&generated(&tiny())), 4);
    for missing in 1..=4 {
        let (directory, _) = open_by(1, &parts);
        let gone = path(directory.path(), missing, 4);
        std::fs::remove_file(&gone).unwrap();
        let present = path(directory.path(), if missing == 1 { 2 } else { 1 }, 4);
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
    let good = parts(&Gguf::of(&generated(&tiny())), 3);
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
