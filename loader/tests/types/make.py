"""Golden files of GGUF's block types: blocks, and the numbers that llama.cpp makes of them.

    python3 -m venv venv
    venv/bin/pip install numpy==2.4.6 gguf==0.19.0 llama-cpp-python==0.3.36
    venv/bin/python make.py

Each `NAME.bin` holds blocks, then their numbers as f32, little-endian. Half of the blocks are
random bits under scales of every kind (zero, negative, subnormal, largest), half are Gaussian
numbers quantised by llama.cpp. The numbers come from llama.cpp's own `dequantize_row_*`; the script
ends with an error unless the package `gguf` says the same, bit for bit. A second run gives the same
bytes. `mxfp4_wide.bin` has scales that no f16 holds.
"""

import ctypes
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

HERE = Path(__file__).parent
BASE = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
WEIGHTS = 1024  # of each half

# Name in ggml, number in the file, offsets of the f16 fields in a block.
TYPES = [
    ("q5_0", 6, [0]),
    ("q5_1", 7, [0, 2]),
    ("q2_K", 10, [80, 82]),
    ("q3_K", 11, [108]),
    ("q4_K", 12, [0, 2]),
    ("q5_K", 13, [0, 2]),
    ("q6_K", 14, [208]),
    ("iq4_nl", 20, [0]),
    ("iq4_xs", 23, [0]),
    ("mxfp4", 39, []),
]
SCALES = np.array([0.0, -0.0, 6e-8, -3e-5, 1e-3, -0.02, 0.7, 1.0, 300.0, 65504.0], np.float16)


def random_blocks(rng, count, block_bytes, halves):
    blocks = rng.integers(0, 256, (count, block_bytes), dtype=np.uint8)
    for offset in halves:
        some = np.where(rng.random(count) < 0.5, rng.choice(SCALES, count),
                        rng.normal(0, 0.05, count).astype(np.float16))
        blocks[:, offset : offset + 2] = some.astype(np.float16).view(np.uint8).reshape(count, 2)
    return blocks


def quantised(rng, number, block_bytes, block):
    x = rng.normal(0, 0.05, WEIGHTS).astype(np.float32)
    out = np.zeros((WEIGHTS // block, block_bytes), np.uint8)
    pointer = ctypes.POINTER(ctypes.c_float)
    BASE.ggml_quantize_chunk.restype = ctypes.c_size_t
    written = BASE.ggml_quantize_chunk(
        number, x.ctypes.data_as(pointer), out.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(0), ctypes.c_int64(1), ctypes.c_int64(WEIGHTS), None)
    assert written == out.nbytes
    return out


def numbers(name, number, blocks, block):
    count = blocks.shape[0] * block
    out = np.zeros(count, np.float32)
    dequantise = getattr(BASE, f"dequantize_row_{name}")
    dequantise.restype = None
    dequantise(blocks.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p),
               ctypes.c_int64(count))
    other = gguf.quants.dequantize(blocks.reshape(1, -1), gguf.GGMLQuantizationType(number))
    other = np.ascontiguousarray(other, np.float32).reshape(-1)
    assert np.array_equal(out, other), f"{name}: llama.cpp and the package gguf disagree"
    assert np.isfinite(out).all(), name
    return out


def write(file, name, number, blocks, block):
    blocks = np.ascontiguousarray(blocks)
    out = numbers(name, number, blocks, block)
    (HERE / f"{file}.bin").write_bytes(blocks.tobytes() + out.astype("<f4").tobytes())


def main():
    for name, number, halves in TYPES:
        rng = np.random.default_rng(number)
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)]
        blocks = random_blocks(rng, WEIGHTS // block, block_bytes, halves)
        if name == "mxfp4":
            wide = blocks.copy()
            wide[:, 0] = rng.integers(0, 253, len(blocks))
            write("mxfp4_wide", name, number, wide, block)
            blocks[:, 0] = rng.integers(104, 144, len(blocks))
        both = np.concatenate([blocks, quantised(rng, number, block_bytes, block)])
        write(name.lower(), name, number, both, block)


if __name__ == "__main__":
    main()
