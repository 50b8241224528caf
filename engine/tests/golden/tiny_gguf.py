"""Tiny GGUF files of architecture `llama`, with every tensor type that the loader knows."""

import gguf
import numpy as np

from numpy_llama import Llama, permute

TYPE = gguf.GGMLQuantizationType


def q6_k(w):
    """Rounds to Q6_K blocks (the package only reads them). One scale for 16 weights."""
    x = w.reshape(-1, 16, 16).astype(np.float32)
    peak = np.take_along_axis(x, np.abs(x).argmax(-1, keepdims=True), -1)[..., 0] / -32
    d = (np.abs(peak).max(-1, keepdims=True) / 127).astype(np.float16)
    scales = np.clip(np.rint(peak / d), -128, 127).astype(np.int8)
    step = d.astype(np.float32)[..., None] * scales[..., None].astype(np.float32)
    q = np.divide(x, step, out=np.zeros_like(x), where=step != 0)
    q = (np.clip(np.rint(q), -32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low, high = q & 15, q >> 4
    ql = np.stack([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], axis=2)
    qh = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    n = len(q)
    d = d.view(np.uint8).reshape(n, 2)
    parts = [ql.reshape(n, 128), qh.reshape(n, 64), scales.view(np.uint8), d]
    packed = np.concatenate(parts, axis=1).reshape(w.shape[0], -1)
    back = gguf.quants.dequantize(packed, TYPE.Q6_K)
    assert np.abs(back - w).max() <= np.abs(w).max() / 30
    return packed


def quantise(w, kind):
    """The bytes of `w` in type `kind`."""
    return q6_k(w) if kind == TYPE.Q6_K else gguf.quants.quantize(w.astype(np.float32), kind)


def rope_factors(scaling, theta, head_dim):
    """What a converter stores in `rope_freqs.weight` for Llama 3: divisors of the frequencies."""
    half = head_dim // 2
    wave = 2 * np.pi * theta ** (np.arange(half) / half)
    old = scaling["original_max_position_embeddings"]
    low, high, factor = (scaling[k] for k in ("low_freq_factor", "high_freq_factor", "factor"))
    smooth = np.clip((old / wave - low) / (high - low), 0, 1)
    factors = 1 / ((1 - smooth) / factor + smooth)
    assert {1.0, float(factor)} < set(np.round(factors, 6)), factors
    return factors.astype(np.float32)


def write_model(path, config, types, rng, add_tokenizer):
    """Writes one file. `types` maps a tensor's GGUF name to its type; norms are F32."""
    hidden, heads = config["hidden"], config["heads"]
    kv_heads, head_dim = config["kv_heads"], config["head_dim"]
    out = gguf.GGUFWriter(path, "llama")
    out.add_name(path.stem)
    out.add_vocab_size(config["vocab"])
    out.add_context_length(256)
    out.add_embedding_length(hidden)
    out.add_block_count(config["layers"])
    out.add_feed_forward_length(config["ffn"])
    out.add_head_count(heads)
    out.add_head_count_kv(kv_heads)
    out.add_rope_dimension_count(head_dim)
    out.add_key_length(head_dim)
    out.add_value_length(head_dim)
    out.add_rope_freq_base(config["theta"])
    out.add_layer_norm_rms_eps(1e-5)
    out.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    add_tokenizer(out)

    embedding = 0.5 if "output" in types else 0.15
    shapes = {"token_embd": (config["vocab"], hidden, embedding),
              "output": (config["vocab"], hidden, 0.15)}
    for i in range(config["layers"]):
        shapes |= {
            f"blk.{i}.attn_q": (heads * head_dim, hidden, 0.12),
            f"blk.{i}.attn_k": (kv_heads * head_dim, hidden, 0.12),
            f"blk.{i}.attn_v": (kv_heads * head_dim, hidden, 0.08),
            f"blk.{i}.attn_output": (hidden, heads * head_dim, 0.08),
            f"blk.{i}.ffn_gate": (config["ffn"], hidden, 0.08),
            f"blk.{i}.ffn_up": (config["ffn"], hidden, 0.08),
            f"blk.{i}.ffn_down": (hidden, config["ffn"], 0.08),
        }
    for name, (n, k, std) in shapes.items():
        if name == "output" and "output" not in types:
            continue
        w = rng.normal(0, std, (n, k)).astype(np.float32)
        if name.endswith(("attn_q", "attn_k")):
            w = permute(w, heads if name.endswith("q") else kv_heads)
        kind = types[name]
        out.add_tensor(f"{name}.weight", quantise(w, kind), raw_dtype=kind)
    norms = [f"blk.{i}.{n}_norm" for i in range(config["layers"]) for n in ("attn", "ffn")]
    for name in [*norms, "output_norm"]:
        out.add_tensor(f"{name}.weight", (1 + rng.normal(0, 0.2, hidden)).astype(np.float32))
    if "rope_scaling" in config:
        factors = rope_factors(config["rope_scaling"], config["theta"], head_dim)
        out.add_tensor("rope_freqs.weight", factors)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return Llama(path)


def spm_vocabulary(out, sp, template):
    """Metadata of a SentencePiece vocabulary: tokens, scores, types."""
    kinds = gguf.TokenType
    types = []
    for i in range(len(sp)):
        kind = kinds.CONTROL if sp.is_control(i) else kinds.NORMAL
        kind = kinds.BYTE if sp.is_byte(i) else kind
        types.append(kinds.UNKNOWN if sp.is_unknown(i) else kind)
    out.add_tokenizer_model("llama")
    out.add_tokenizer_pre("default")
    out.add_token_list([sp.id_to_piece(i) for i in range(len(sp))])
    out.add_token_scores([sp.get_score(i) for i in range(len(sp))])
    out.add_token_types(types)
    out.add_unk_token_id(0)
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_add_bos_token(True)
    out.add_add_eos_token(False)
    out.add_add_space_prefix(True)
    out.add_chat_template(template)


def bpe_vocabulary(out, tok, merges, pre, bos, eos, template):
    """Metadata of a byte-level BPE: tokens, types, merges and the name of the pre-tokenizer."""
    control = {i for i, t in tok.get_added_tokens_decoder().items() if t.special}
    size = tok.get_vocab_size(with_added_tokens=True)
    kinds = gguf.TokenType
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(pre)
    out.add_token_list([tok.id_to_token(i) for i in range(size)])
    out.add_token_types([kinds.CONTROL if i in control else kinds.NORMAL for i in range(size)])
    out.add_token_merges([" ".join(pair) for pair in merges])
    out.add_bos_token_id(tok.token_to_id(bos))
    out.add_eos_token_id(tok.token_to_id(eos))
    out.add_add_bos_token(True)
    out.add_chat_template(template)
