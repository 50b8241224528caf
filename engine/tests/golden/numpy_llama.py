"""A Llama decoder in plain numpy over a GGUF file: the yardstick of the golden files.

It is written for reading: no cache, no batching, one matrix product for each matrix. Weights are
dequantised by the PyPI package `gguf` and Q/K are put back into half-split (rotate_half) order.
"""

import re

import gguf
import numpy as np

Q_AND_K = re.compile(r"blk\.\d+\.attn_([qk])\.weight")


def unpermute(w, heads):
    """Rows of a GGUF llama Q or K matrix (interleaved pairs) to half-split order."""
    rows, columns = w.shape
    half = rows // heads // 2
    return w.reshape(heads, half, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def permute(w, heads):
    """The inverse of `unpermute`: what a converter to GGUF does to a llama checkpoint."""
    rows, columns = w.shape
    half = rows // heads // 2
    return w.reshape(heads, 2, half, columns).swapaxes(1, 2).reshape(rows, columns)


def metadata(reader, key):
    """One metadata value as a Python object."""
    return reader.get_field(key).contents()


def int8_blocks(x):
    """Rounds rows to int8 in blocks of 32 and back: scale amax / 127, ties to even."""
    blocks = x.reshape(-1, 32)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / x.dtype.type(127)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    q = np.clip(np.rint(blocks * inverse), -127, 127)
    return (q * scale).astype(x.dtype).reshape(x.shape)


class Llama:
    """`raw_qk` leaves Q and K as stored (the known mistake); `dtype` is that of all arithmetic."""

    def __init__(self, path, raw_qk=False, dtype=np.float32):
        reader = gguf.GGUFReader(path)
        arch = metadata(reader, "general.architecture")
        assert arch == "llama", arch
        self.layers = metadata(reader, "llama.block_count")
        self.hidden = metadata(reader, "llama.embedding_length")
        self.heads = metadata(reader, "llama.attention.head_count")
        self.kv_heads = metadata(reader, "llama.attention.head_count_kv")
        self.head_dim = metadata(reader, "llama.rope.dimension_count")
        self.eps = metadata(reader, "llama.attention.layer_norm_rms_epsilon")
        self.theta = metadata(reader, "llama.rope.freq_base")
        self.dtype = dtype
        self.quantised = set()
        self.w = {}
        for tensor in reader.tensors:
            w = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            match = Q_AND_K.fullmatch(tensor.name)
            if match and not raw_qk:
                w = unpermute(w, self.heads if match[1] == "q" else self.kv_heads)
            if tensor.tensor_type.name.startswith("Q"):
                self.quantised.add(tensor.name)
            self.w[tensor.name] = np.ascontiguousarray(w, dtype=dtype)
        if "output.weight" not in self.w:
            self.w["output.weight"] = self.w["token_embd.weight"]
            if "token_embd.weight" in self.quantised:
                self.quantised.add("output.weight")

    def linear(self, x, name, int8):
        """`x W^T`; with `int8`, x is rounded first where the weight is quantised."""
        if int8 and name in self.quantised:
            x = int8_blocks(x)
        return x @ self.w[name].T

    def norm(self, x, name):
        """RMS norm."""
        mean = np.mean(x * x, axis=-1, keepdims=True)
        return x / np.sqrt(mean + self.dtype(self.eps)) * self.w[name]

    def rope(self, x):
        """Rotates `[tokens, heads, head_dim]` by position, pairs (i, i + head_dim / 2)."""
        half = self.head_dim // 2
        inv_freq = self.theta ** (-np.arange(half) / half) / self.w.get("rope_freqs.weight", 1)
        angle = np.arange(len(x))[:, None] * inv_freq.astype(np.float32)
        cos, sin = (f(angle)[:, None, :].astype(self.dtype) for f in (np.cos, np.sin))
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def attend(self, q, k, v):
        """Causal attention; each key/value head serves `heads / kv_heads` query heads."""
        group = self.heads // self.kv_heads
        q = q.transpose(1, 0, 2)
        k = np.repeat(k, group, axis=1).transpose(1, 2, 0)
        v = np.repeat(v, group, axis=1).transpose(1, 0, 2)
        scores = q @ k / self.dtype(np.sqrt(self.head_dim))
        scores += np.triu(np.full(scores.shape[1:], -np.inf, self.dtype), 1)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out = scores / scores.sum(axis=-1, keepdims=True) @ v
        return out.transpose(1, 0, 2).reshape(-1, self.heads * self.head_dim)

    def logits(self, ids, int8=False, f16_kv=False):
        """Logits `[tokens, vocab]` of every position."""
        n = len(ids)
        x = self.w["token_embd.weight"][ids]
        for layer in range(self.layers):
            name = f"blk.{layer}.%s.weight"
            h = self.norm(x, name % "attn_norm")
            q = self.linear(h, name % "attn_q", int8).reshape(n, self.heads, self.head_dim)
            k = self.linear(h, name % "attn_k", int8).reshape(n, self.kv_heads, self.head_dim)
            v = self.linear(h, name % "attn_v", int8).reshape(n, self.kv_heads, self.head_dim)
            q, k = self.rope(q), self.rope(k)
            if f16_kv:
                k, v = (t.astype(np.float16).astype(self.dtype) for t in (k, v))
            x = x + self.linear(self.attend(q, k, v), name % "attn_output", int8)
            h = self.norm(x, name % "ffn_norm")
            gate = self.linear(h, name % "ffn_gate", int8)
            up = self.linear(h, name % "ffn_up", int8)
            h = gate / (1 + np.exp(-gate)) * up
            x = x + self.linear(h, name % "ffn_down", int8)
        return self.linear(self.norm(x, "output_norm.weight"), "output.weight", int8)


def log_softmax(logits):
    """Row-wise, in f64."""
    x = logits.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
