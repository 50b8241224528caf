"""Makes the tiny checkpoints of `checkpoints/` and `gguf/` and what they must say. Run once;
README.md has the command, the versions and the schema of the `*.json` and `*.logits.safetensors`.

    python make_checkpoints.py
"""

import copy
import json
import re
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import jinja2
import numpy as np
import torch
import transformers
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import tiny_gguf
import tiny_tokenizers
from tiny_gguf import TYPE
from tiny_tokenizers import CHATS, TEMPLATES, TEXTS

HERE = Path(__file__).parent
SHARED = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96, "hidden_act": "silu",
          "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "use_cache": True}
LLAMA3_SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                  "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
PACKAGES = ("torch", "transformers", "tokenizers", "sentencepiece", "safetensors", "gguf", "numpy")
MADE_WITH = {package: version(package) for package in PACKAGES}

# config.json as it will stand in the directory: in the words of transformers 4, and once of 5.
FAMILIES = {
    "llama2": {
        "seed": 2, "dtype": torch.float16, "shard": "130KB",
        "config": SHARED | {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16",
            "vocab_size": 400, "num_attention_heads": 4, "num_key_value_heads": 4,
            "rope_theta": 10000.0, "rope_scaling": None, "tie_word_embeddings": False,
            "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2,
        },
        "tokenizer": {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
                      "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False},
        "special_text": "<s>[INST] Hi</s> there <s>again",
    },
    "llama3": {
        "seed": 3, "dtype": torch.bfloat16, "shard": "5GB",
        "config": SHARED | {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
            "vocab_size": 400, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "rope_theta": 10000.0, "rope_scaling": LLAMA3_SCALING,
            "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
            "bos_token_id": 395, "eos_token_id": [396, 399],
        },
        "tokenizer": {"tokenizer_class": "PreTrainedTokenizerFast",
                      "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        "special_text": "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|> there",
    },
    "mistral": {
        "seed": 4, "dtype": torch.bfloat16, "shard": "5GB",
        "config": SHARED | {
            "architectures": ["MistralForCausalLM"], "model_type": "mistral", "dtype": "bfloat16",
            "vocab_size": 397, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32,
            "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0},
            "sliding_window": 24, "tie_word_embeddings": False,
            "bos_token_id": 1, "eos_token_id": 2,
        },
        "tokenizer": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>",
                      "eos_token": "</s>", "unk_token": "<unk>"},
        "special_text": "[INST] Hi [/INST] there</s>[INST]x",
    },
    "qwen2": {
        "seed": 5, "dtype": torch.float32, "shard": "160KB",
        "config": SHARED | {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "float32",
            "vocab_size": 320, "num_attention_heads": 4, "num_key_value_heads": 1,
            "intermediate_size": 64, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": 24,
            "max_window_layers": 3, "bos_token_id": 312, "eos_token_id": 314,
        },
        "tokenizer": {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>",
                      "pad_token": "<|endoftext|>", "bos_token": None, "add_bos_token": False},
        "special_text": "<|im_start|>user\nHi<|im_end|>\n there<|endoftext|>",
    },
}


def randomise(model, seed):
    """Weights large enough that every position, rotation and bias shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    embedding = 0.2 if model.config.tie_word_embeddings else 0.5
    deviation = [("norm", 0.2), ("bias", 0.5), ("embed_tokens", embedding), ("q_proj", 0.25),
                 ("k_proj", 0.25)]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            std = next((s for part, s in deviation if part in name), 0.15)
            mean = 1.0 if "norm" in name else 0.0
            weight.copy_(mean + std * torch.randn(weight.shape, generator=generator))


def write_json(path, value, **options):
    """UTF-8, a newline at the end."""
    path.write_text(json.dumps(value, ensure_ascii=False, **options) + "\n")


def write_checkpoint(folder, family, tok):
    """A directory as it comes from a hub."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", family["config"], indent=2)
    config = transformers.AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config)
    randomise(model, family["seed"])
    model.to(family["dtype"]).save_pretrained(folder, max_shard_size=family["shard"])
    write_json(folder / "config.json", family["config"], indent=2)
    eos = family["config"]["eos_token_id"]
    write_json(folder / "generation_config.json",
               {"bos_token_id": family["config"]["bos_token_id"], "eos_token_id": eos}, indent=2)
    tok.save(str(folder / "tokenizer.json"), pretty=False)
    settings = family["tokenizer"] | {
        "clean_up_tokenization_spaces": False, "model_max_length": 256}
    template = TEMPLATES[folder.name]
    if folder.name == "mistral":
        (folder / "chat_template.jinja").write_text(template)
    else:
        settings["chat_template"] = template
    write_json(folder / "tokenizer_config.json", settings, indent=2)


def load(folder, **changes):
    """The checkpoint as transformers reads it: stored weights, f32 arithmetic, eager attention."""
    config = transformers.AutoConfig.from_pretrained(folder)
    for key, value in changes.items():
        setattr(config, key, value)
    return AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def logits_of(model, ids):
    """`[tokens, vocab]`."""
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


def logits_with_f16_kv(model, ids):
    """The same with K (rotated) and V rounded to f16, as a KV store of f16 does it."""
    module = __import__(type(model).__module__, fromlist=["eager_attention_forward"])
    eager = module.eager_attention_forward

    def rounded(layer, q, k, v, *rest, **options):
        return eager(layer, q, k.half().float(), v.half().float(), *rest, **options)

    module.eager_attention_forward = rounded
    try:
        return logits_of(model, ids)
    finally:
        module.eager_attention_forward = eager


def prompts(vocab, short, rng):
    """Ids of a short text, and random ids: past one KV page of 32, and of 96 tokens."""
    return {
        "short": short,
        "medium": [int(i) for i in rng.integers(3, vocab, 33)],
        "long": [int(i) for i in rng.integers(3, vocab, 96)],
    }


def expectations(forward, forward_f16_kv, cases):
    """What JSON and safetensors say about the prompts: `first` is the position of row 0."""
    listed, tensors = [], {}
    for name, ids in cases.items():
        first = 0 if name == "short" else len(ids) - 6
        logits = forward(ids)
        tensors[name] = np.ascontiguousarray(logits[first:], dtype=np.float32)
        path, gaps = list(ids), []
        for _ in range(12):
            row = forward(path)[-1]
            best = np.argsort(-row, kind="stable")[:2]
            gaps.append(round(float(row[best[0]] - row[best[1]]), 5))
            path.append(int(best[0]))
        listed.append({
            "name": name,
            "ids": ids,
            "first": first,
            "greedy": {"ids": path[len(ids):], "gaps": gaps},
            "f16_kv_max_abs": float(f"{np.abs(forward_f16_kv(ids) - logits).max():.3g}"),
        })
    return listed, tensors


def off(forward, cases):
    """Largest difference of the last 6 rows of the long prompt from another forward's."""
    return lambda other: round(
        float(np.abs(forward(cases["long"])[-6:] - other(cases["long"])[-6:]).max()), 5)


def sensitivity(folder, model, cases):
    """What a mistake would cost, as a largest logit difference."""
    far = off(lambda ids: logits_of(model, ids), cases)
    loaded = lambda **changes: (lambda m: lambda ids: logits_of(m, ids))(load(folder, **changes))
    result = {"no_rope": far(lambda ids: without_rope(model, ids))}
    if folder.name == "llama3":
        result["no_rope_scaling"] = far(
            loaded(rope_parameters={"rope_type": "default", "rope_theta": 10000.0}))
    if folder.name == "mistral":
        result["no_window"] = far(loaded(sliding_window=None))
        result["window_one_more"] = far(loaded(sliding_window=25))
        result["rope_theta_10000"] = far(
            loaded(rope_parameters={"rope_type": "default", "rope_theta": 10000.0}))
    if folder.name == "qwen2":
        for part in "qkv":
            bare = copy.deepcopy(model)
            with torch.no_grad():
                for name, weight in bare.named_parameters():
                    if name.endswith(f"{part}_proj.bias"):
                        weight.zero_()
            result[f"no_{part}_bias"] = far(lambda ids: logits_of(bare, ids))
    return result


def without_rope(model, ids):
    """Every token at position 0."""
    with torch.no_grad():
        where = torch.zeros(1, len(ids), dtype=torch.long)
        mask = torch.full((len(ids), len(ids)), -torch.inf).triu(1)[None, None]
        window = getattr(model.config, "sliding_window", None)
        if window and model.config.model_type == "mistral":
            mask += torch.full((len(ids), len(ids)), -torch.inf).tril(-window)[None, None]
        out = model(torch.tensor([ids]), position_ids=where, attention_mask=mask, use_cache=False)
    return out.logits[0].numpy()


def tokenizer_golden(encode, decode, texts):
    """Ids with and without what the tokenizer adds, and the text back."""
    golden = []
    for text in texts:
        plain, full = encode(text, False), encode(text, True)
        golden.append({
            "text": text, "ids": plain, "ids_with_special": full,
            "decoded": decode(plain, False), "decoded_skip_special": decode(full, True),
        })
    return golden


def chat_golden(hf):
    """Rendered conversations; `error` where the template raises."""
    golden = []
    for messages in CHATS:
        for prompt in (True, False):
            case = {"messages": messages, "add_generation_prompt": prompt}
            try:
                case["text"] = hf.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=prompt)
                case["ids"] = hf(case["text"], add_special_tokens=False)["input_ids"]
            except jinja2.exceptions.TemplateError as error:
                case["error"] = str(error)
            golden.append(case)
    return golden


def family_golden(folder, family):
    """Everything about one directory, from the files in it."""
    model = load(folder)
    hf = PreTrainedTokenizerFast.from_pretrained(folder)
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encode = lambda text, special: hf(text, add_special_tokens=special)["input_ids"]
    decode = lambda ids, skip: hf.decode(
        ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    texts = [*TEXTS, family["special_text"]]
    for text in texts:
        for special in (False, True):
            ours = file.encode(text, add_special_tokens=special).ids
            assert encode(text, special) == ours, (folder.name, text, encode(text, special), ours)
    short = encode("The keeper saw the light.", True)
    cases = prompts(len(hf), short, np.random.default_rng(family["seed"]))
    listed, tensors = expectations(
        lambda ids: logits_of(model, ids), lambda ids: logits_with_f16_kv(model, ids), cases)
    eos = family["config"]["eos_token_id"]
    result = {
        "format": 1, "made_with": MADE_WITH, "model": f"checkpoints/{folder.name}",
        "eos_token_ids": eos if isinstance(eos, list) else [eos],
        "prompts": listed, "sensitivity": sensitivity(folder, model, cases),
        "tokenizer": tokenizer_golden(encode, decode, texts), "chat": chat_golden(hf),
    }
    write(folder.parent / folder.name, result, tensors)


def write(base, result, tensors):
    """`<base>.json` and `<base>.logits.safetensors`, and a line for the terminal."""
    write_json(Path(f"{base}.json"), result)
    save_file(tensors, f"{base}.logits.safetensors")
    spread = {n: f"std {t.std():.2f} max {np.abs(t).max():.1f}" for n, t in tensors.items()}
    print(base.name, spread, result["sensitivity"])
    for prompt in result["prompts"]:
        greedy = prompt["greedy"]
        print("  ", prompt["name"], "f16 kv", prompt["f16_kv_max_abs"], "gap", min(greedy["gaps"]),
              "ids", greedy["ids"], {k: v for k, v in prompt.items() if "int8" in k})


def as_transformers(path, config, model):
    """The same weights in transformers' own Llama: what checks the numpy forward."""
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
             "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
             "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
             "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    rope = {"rope_type": "default", "rope_theta": config["theta"]} | config.get("rope_scaling", {})
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=config["vocab"], hidden_size=config["hidden"], intermediate_size=config["ffn"],
        num_hidden_layers=config["layers"], num_attention_heads=config["heads"],
        num_key_value_heads=config["kv_heads"], head_dim=config["head_dim"], rms_norm_eps=1e-5,
        max_position_embeddings=256, rope_parameters=rope, attn_implementation="eager")).eval()
    state = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight",
             "model.norm.weight": "output_norm.weight"}
    for i in range(config["layers"]):
        for old, new in names.items():
            state[f"model.layers.{i}.{new}.weight"] = f"blk.{i}.{old}.weight"
    theirs.load_state_dict({new: torch.from_numpy(model.w[old]) for new, old in state.items()})
    return theirs


def gguf_golden(path, config, model, source, texts, references):
    """Logits by numpy, checked against transformers; tokens are those of the family `source`."""
    rng = np.random.default_rng(config["seed"])
    cases = prompts(config["vocab"], references["short"], rng)
    theirs = as_transformers(path, config, model)
    distance = max(
        np.abs(logits_of(theirs, ids) - model.logits(ids)).max() for ids in cases.values())
    print(path.name, "largest logit difference from transformers:", distance)
    assert distance < 1e-3
    listed, tensors = expectations(model.logits, lambda ids: model.logits(ids, f16_kv=True), cases)
    for prompt in listed:
        ids = prompt["ids"]
        delta = model.logits(ids, int8=True, f16_kv=True) - model.logits(ids)
        prompt["int8_max_abs"] = float(f"{np.abs(delta).max():.3g}")
        prompt["int8_rms"] = float(f"{np.sqrt((delta ** 2).mean()):.3g}")
    raw = type(model)(path, raw_qk=True)
    far = off(model.logits, cases)
    wrong = {"raw_qk": far(raw.logits)}
    if "rope_scaling" in config:
        bare = type(model)(path)
        del bare.w["rope_freqs.weight"]
        wrong["no_rope_freqs"] = far(bare.logits)
    result = {
        "format": 1, "made_with": MADE_WITH, "model": f"gguf/{path.name}",
        "eos_token_ids": references["eos"], "prompts": listed, "sensitivity": wrong,
        "tokenizer": texts, "chat": source["chat"],
    }
    write(path.with_suffix(""), result, tensors)


def make_gguf(sp, llama3):
    """The two GGUF files: a SentencePiece vocabulary with its own head, a BPE one tied."""
    folder = HERE / "gguf"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    base = {"hidden": 256, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn": 96, "vocab": 400}
    layers = [
        {"attn_q": TYPE.Q4_0, "attn_k": TYPE.F16, "attn_v": TYPE.BF16, "attn_output": TYPE.Q8_0,
         "ffn_gate": TYPE.Q4_1, "ffn_up": TYPE.Q6_K, "ffn_down": TYPE.Q4_0},
        {"attn_q": TYPE.Q4_1, "attn_k": TYPE.Q8_0, "attn_v": TYPE.Q6_K, "attn_output": TYPE.Q4_0,
         "ffn_gate": TYPE.Q6_K, "ffn_up": TYPE.Q4_0, "ffn_down": TYPE.Q4_1},
    ]
    of_layers = lambda chosen: {
        f"blk.{i}.{n}": t for i, l in enumerate(chosen) for n, t in l.items()}

    config = base | {"layers": 2, "theta": 10000.0, "seed": 6}
    types = of_layers(layers) | {"token_embd": TYPE.Q6_K, "output": TYPE.Q8_0}
    path = folder / "llama_spm.gguf"
    model = tiny_gguf.write_model(path, config, types, np.random.default_rng(6), lambda out: (
        tiny_gguf.spm_vocabulary(out, sp, TEMPLATES["llama2"])))
    source = json.loads((HERE / "checkpoints/llama2.json").read_text())
    gguf_golden(path, config, model, source, source["tokenizer"],
                {"short": source["prompts"][0]["ids"], "eos": [2]})

    config = base | {"layers": 1, "theta": 10000.0, "seed": 7, "rope_scaling": LLAMA3_SCALING}
    types = of_layers(layers[1:]) | {"token_embd": TYPE.Q8_0, "blk.0.attn_k": TYPE.F32}
    path = folder / "llama_bpe.gguf"
    merges = json.loads(llama3.to_str())["model"]["merges"]
    model = tiny_gguf.write_model(path, config, types, np.random.default_rng(7), lambda out: (
        tiny_gguf.bpe_vocabulary(out, llama3, merges, "llama-bpe", "<|begin_of_text|>",
                                 "<|eot_id|>", TEMPLATES["llama3"])))
    source = json.loads((HERE / "checkpoints/llama3.json").read_text())
    gguf_golden(path, config, model, source, source["tokenizer"],
                {"short": source["prompts"][0]["ids"], "eos": [399]})


def main():
    sp = tiny_tokenizers.sentencepiece_bpe(400)
    made = {
        "llama2": tiny_tokenizers.llama2(sp),
        "llama3": tiny_tokenizers.llama3(400),
        "mistral": tiny_tokenizers.mistral(tiny_tokenizers.sentencepiece_bpe(395)),
        "qwen2": tiny_tokenizers.qwen2(315),
    }
    for text in TEXTS:
        assert made["llama2"].encode(text, add_special_tokens=False).ids == sp.encode(text), text
    for name, family in FAMILIES.items():
        folder = HERE / "checkpoints" / name
        write_checkpoint(folder, family, made[name])
        family_golden(folder, family)
    make_gguf(sp, made["llama3"])


main()
