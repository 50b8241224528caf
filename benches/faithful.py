"""How faithful we are to the model's file, beside llama.cpp, as a table.

    python benches/faithful.py --bench FAITHFUL --gguf FILE --work DIR [--split HAT_SPLIT TYPE...]

`README.md` beside this file says how to get FAITHFUL and llama-cpp-python. The truth is the same
file with all matrices as f32, computed by llama.cpp over f32 keys and values. Each other row is
the file as it is: by llama.cpp, and by us with rows of each codec. All read the token ids of
`faithful.txt`; each passage begins anew. Times play no part, so a busy machine changes nothing.

With `--split` the file is requantised by llama.cpp to each TYPE (Q4_K_M, IQ4_XS, ...) first, and the
result is split by HAT_SPLIT; the truth is then the requantised file as f32.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

try:
    import llama_cpp as ll
    import numpy as np
except ImportError as error:
    sys.exit(f"faithful.py: {error}; pip install llama-cpp-python (benches/README.md has the flags)")

CODECS = ("f32", "f16", "int8", "int4")
F32 = 0  # in ggml's list of types and in llama.cpp's of file types
CONTEXT = 1024


def requantised(source, work, name, ftype, **other):
    """A copy of the file in another type, by llama.cpp."""
    path = work / f"{source.stem}.{name}.gguf"
    if not path.is_file():
        params = ll.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize = ftype, True
        for key, value in other.items():
            setattr(params, key, value)
        part = path.with_suffix(".part")
        if ll.llama_model_quantize(os.fsencode(source), os.fsencode(part), params) != 0:
            sys.exit(f"faithful.py: llama.cpp can't write {source.name} as {name}")
        part.rename(path)
    return path


def as_f32(source, work):
    """A copy of the file with its matrices as f32, without loss."""
    return requantised(source, work, "F32", F32, token_embedding_type=F32, output_tensor_type=F32)


def passages(model, text):
    """Token ids of each passage of `text`; an empty line lies between two."""
    texts = [" ".join(passage.split()) for passage in text.split("\n\n") if passage.strip()]
    return [model.tokenize(text.encode(), add_bos=False, special=False) for text in texts]


def by_llama(path, tokens, kv_type):
    """Logits `[tokens, vocab]` of all passages; the ids are made first if there are none."""
    model = ll.Llama(str(path), n_ctx=CONTEXT, logits_all=True, verbose=False, n_threads=2,
                     type_k=kv_type, type_v=kv_type)
    tokens = tokens or passages(model, Path(__file__).with_suffix(".txt").read_text())
    rows = []
    for passage in tokens:
        model.reset()
        model.eval(passage)
        rows.append(np.array(model.scores[: len(passage)], dtype=np.float32))
    return tokens, np.concatenate(rows)


def by_us(bench, codec, tokens, work, vocab, bundles=()):
    out = work / f"logits-{codec}.f32"
    lines = "".join(" ".join(map(str, passage)) + "\n" for passage in tokens)
    ran = subprocess.run([bench, codec, out, *bundles], input=lines, text=True, check=False)
    if ran.returncode != 0:
        sys.exit(f"faithful.py: {bench} ended with code {ran.returncode}")
    logits = np.fromfile(out, dtype="<f4").reshape(-1, vocab)
    out.unlink()
    return logits


def log_probabilities(logits):
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def figures(logits, truth, next_ids, keep):
    """Perplexity, KL from the truth (mean, 99 %, most), share of equal likeliest tokens."""
    kl, same, nll = [], 0, 0.0
    for at in np.flatnonzero(keep):
        p, q = (log_probabilities(rows[at : at + 1])[0] for rows in (truth, logits))
        kl.append(float((np.exp(p) * (p - q)).sum()))
        same += int(truth[at].argmax() == logits[at].argmax())
        nll -= float(q[next_ids[at]])
    count = len(kl)
    return math.exp(nll / count), np.mean(kl), np.quantile(kl, 0.99), max(kl), same / count


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bench", required=True, help="the bench `faithful`, built")
    parser.add_argument("--gguf", required=True, type=Path, help="the default model's file")
    parser.add_argument("--work", required=True, type=Path, help="a directory for copies")
    parser.add_argument("--split", nargs="+", metavar=("HAT_SPLIT", "TYPE"),
                        help="the program hat-split, and the types to requantise to")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    if args.split:
        split, *types = args.split
        print("| | perplexity | KL from the truth: mean / 99 % / most | same likeliest token |")
        print("|---|---|---|---|")
        for name in types:
            ftype = getattr(ll, f"LLAMA_FTYPE_MOSTLY_{name}")
            path = requantised(as_f32(args.gguf, args.work), args.work, name, ftype)
            compare_type(args, split, name, path)
        return
    print("| | perplexity | KL from the truth: mean / 99 % / most | same likeliest token |")
    print("|---|---|---|---|")
    tokens, truth = by_llama(as_f32(args.gguf, args.work), None, F32)
    row = rows_from(tokens, truth)
    row("truth: the file as f32, by llama.cpp", truth)
    row("llama.cpp", by_llama(args.gguf, tokens, None)[1])
    for codec in CODECS:
        logits = by_us(args.bench, codec, tokens, args.work, truth.shape[1])
        row(f"ours, {codec} rows", logits)


def compare_type(args, split, name, path):
    """Rows of one requantised file, and the types that it holds as we store them."""
    bundles = args.work / f"bundles-{name}"
    shutil.rmtree(bundles, ignore_errors=True)
    ran = subprocess.run([split, path, "--json", "--out", bundles], capture_output=True, text=True,
                         check=False)
    if ran.returncode != 0:
        sys.exit(f"faithful.py: {split} ended with code {ran.returncode}: {ran.stderr}")
    for kind in json.loads(ran.stdout)["types"]:
        exact = "exact" if kind["is_exact"] else "rounded"
        print(f"{name}: {kind['tensors']} x {kind['from']} as {kind['stored']}, {exact}",
              file=sys.stderr)
    tokens, truth = by_llama(as_f32(path, args.work), None, F32)
    row = rows_from(tokens, truth)
    row(f"{name}, truth: the file as f32, by llama.cpp", truth)
    theirs = by_llama(path, tokens, None)[1]
    row(f"{name}, llama.cpp", theirs)
    ours = by_us(args.bench, "f32", tokens, args.work, truth.shape[1], [bundles])
    row(f"{name}, ours, f32 rows", ours)
    same = float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean())
    print(f"{name}: ours and llama.cpp have the same likeliest token in {100 * same:.1f} %",
          file=sys.stderr)


def rows_from(tokens, truth):
    """Prints a line of the table for some logits."""
    next_ids = np.array([token for passage in tokens for token in [*passage[1:], 0]])
    keep = np.array([i + 1 < len(passage) for passage in tokens for i in range(len(passage))])

    def row(name, logits):
        perplexity, mean, high, most, same = figures(logits, truth, next_ids, keep)
        kl = "0" if logits is truth else f"{mean:.2g} / {high:.2g} / {most:.2g}"
        print(f"| {name} | {perplexity:.3f} | {kl} | {100 * same:.1f} % |", flush=True)

    print(f"{len(tokens)} passages, {int(keep.sum())} predicted tokens, "
          f"llama-cpp-python {ll.__version__}", file=sys.stderr)
    return row


if __name__ == "__main__":
    main()
