"""Figures of SmolLM2-135M-Instruct.Q4_1.gguf from a forward pass that shares nothing with the
engine. Writes `default_model.json`; README.md has the command, the schema and the figures.

    python default_model.py MODEL.gguf [--transformers]

With `--transformers` the f32 logits are also compared with transformers' own import of the file
(needs torch, transformers and accelerate).
"""

import hashlib
import json
import sys
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from numpy_llama import Llama, log_softmax, metadata

HERE = Path(__file__).parent
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
VARIANTS = {
    "f32": {},
    "f16kv": {"f16_kv": True},
    "int8": {"int8": True},
    "int8_f16kv": {"int8": True, "f16_kv": True},
}
CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n"
)
PROMPTS = {
    "france": "The capital of France is",
    "code": "def fibonacci(n):",
    "chat": CHAT,
}
STEPS = 24
CONTROL = 3


def tokenizer(reader):
    """The tokenizer that the GGUF's vocabulary, merges and `pre = smollm` describe."""
    tokens = metadata(reader, "tokenizer.ggml.tokens")
    merges = metadata(reader, "tokenizer.ggml.merges")
    types = metadata(reader, "tokenizer.ggml.token_type")
    assert metadata(reader, "tokenizer.ggml.pre") == "smollm"
    vocab = {token: i for i, token in enumerate(tokens)}
    result = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(m.split(" ")) for m in merges]))
    result.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])
    result.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types) if kind == CONTROL]
    result.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    return result


def floats(values, digits=5):
    """Rounded for the file: 1e-5 is far below every difference that the figures speak about."""
    return [round(float(v), digits) for v in values]


def nll(logits, ids):
    """`nll[i]` is the price in nats of `ids[i + 1]` after `ids[..=i]`."""
    return -log_softmax(logits)[np.arange(len(ids) - 1), ids[1:]]


def difference(logits, truth):
    """How far `logits` stand from `truth`, over all positions and the whole vocabulary."""
    delta = logits.astype(np.float64) - truth
    centred = delta - delta.mean(axis=-1, keepdims=True)
    p, q = log_softmax(truth), log_softmax(logits)
    kl = (np.exp(p) * (p - q)).sum(axis=-1)
    return {
        "max_abs": round(float(np.abs(delta).max()), 5),
        "rms": round(float(np.sqrt((delta**2).mean())), 5),
        "rms_centred": round(float(np.sqrt((centred**2).mean())), 5),
        "kl_mean": round(float(kl.mean()), 7),
        "kl_max": round(float(kl.max()), 7),
        "top1_agreement": round(float((logits.argmax(-1) == truth.argmax(-1)).mean()), 5),
    }


def two_best(row):
    """Ids of the two largest logits; ties go to the lower id."""
    return [int(i) for i in np.argsort(-row, kind="stable")[:2]]


def greedy(model, tok, name, text):
    """Greedy continuation in f32, and what each variant says at the same steps."""
    prompt = tok.encode(text, add_special_tokens=False).ids
    ids = list(prompt)
    for _ in range(STEPS):
        ids.append(two_best(model.logits(ids)[-1])[0])
    steps = [{} for _ in range(STEPS)]
    for variant, options in VARIANTS.items():
        rows = model.logits(ids[:-1], **options)[len(prompt) - 1 :]
        for step, row in zip(steps, rows):
            first, second = two_best(row)
            step[variant] = {
                "first": first,
                "second": second,
                "logit": round(float(row[first]), 5),
                "gap": round(float(row[first] - row[second]), 5),
            }
    continuation = ids[len(prompt) :]
    assert [s["f32"]["first"] for s in steps] == continuation
    print(name, repr(tok.decode(continuation)))
    return {
        "name": name,
        "text": text,
        "prompt_ids": prompt,
        "ids": continuation,
        "continuation": tok.decode(continuation, skip_special_tokens=False),
        "steps": steps,
    }


def against_transformers(path, ids, logits):
    """Largest difference from transformers' own import of the same GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        Path(path).parent, gguf_file=Path(path).name, dtype=torch.float32,
        attn_implementation="eager",
    )
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].numpy()
    return float(np.abs(theirs - logits).max())


def text_figures(models, tok, name):
    """Everything that is recorded about one text, and the f32 logits."""
    text = (HERE / f"default_model_{name}.txt").read_text().strip()
    ids = tok.encode(text, add_special_tokens=False).ids
    assert tok.decode(ids) == text
    logits = {v: models["f32"].logits(ids, **options) for v, options in VARIANTS.items()}
    logits["f32_raw_qk"] = models["raw"].logits(ids)
    exact = {v: models["f64"].logits(ids, **options) for v, options in VARIANTS.items()}
    prices = {v: nll(l, ids) for v, l in logits.items()}
    top10 = []
    for p in sorted({int(p) for p in np.linspace(0, len(ids) - 1, 10)}):
        best = np.argsort(-logits["f32"][p], kind="stable")[:10]
        top10.append({
            "position": p,
            "ids": [int(i) for i in best],
            "logits": {v: floats(l[p][best]) for v, l in logits.items()},
        })
    figures = {
        "name": name,
        "text": text,
        "token_ids": ids,
        "perplexity": {v: round(float(np.exp(p.mean())), 5) for v, p in prices.items()},
        "nll": {v: floats(p) for v, p in prices.items()},
        "top10": top10,
        "difference_from_f32": {
            v: difference(l, logits["f32"]) for v, l in logits.items() if v != "f32"
        },
        "difference_from_f64": {v: difference(logits[v], exact[v]) for v in VARIANTS},
    }
    print(name, len(ids), "tokens,", len(set(ids)), "distinct")
    for key in ("perplexity", "difference_from_f32", "difference_from_f64"):
        print(key, json.dumps(figures[key], indent=1))
    return figures, logits["f32"]


def main(path, check):
    data = Path(path).read_bytes()
    assert hashlib.sha256(data).hexdigest() == SHA256, "another model file"
    tok = tokenizer(gguf.GGUFReader(path))
    models = {
        "f32": Llama(path),
        "raw": Llama(path, raw_qk=True),
        "f64": Llama(path, dtype=np.float64),
    }
    texts = []
    for name in ("story", "expository"):
        figures, logits = text_figures(models, tok, name)
        if check:
            off = against_transformers(path, figures["token_ids"], logits)
            print(name, "largest logit difference from transformers:", off)
            assert off < 1e-3
        texts.append(figures)
    result = {
        "format": 1,
        "model": {"file": Path(path).name, "bytes": len(data), "sha256": SHA256},
        "made_with": {p: version(p) for p in ("gguf", "numpy", "tokenizers")},
        "texts": texts,
        "greedy": [greedy(models["f32"], tok, n, t) for n, t in PROMPTS.items()],
    }
    (HERE / "default_model.json").write_text(json.dumps(result, ensure_ascii=False) + "\n")


main(sys.argv[1], "--transformers" in sys.argv[2:])
