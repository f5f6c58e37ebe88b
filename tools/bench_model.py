"""Writes a GGUF of a given shape with random weights in a given type: speed does not depend on what the weights say.

Run by tools/bench in a Python where `gguf` is the pinned source's own (it knows kt4). The embedding and the head are
what llama-quantize picks for the type; ours never ties the head (docs/format.md), the others do.
"""

import json
import math
import sys

import gguf
import numpy as np

T = gguf.GGMLQuantizationType

# bytes of a block: (field, dtype, count); scales are set below
BLOCKS = {
    "kt4":  (T.KT4,  64,  [("d", "<f2", 1), ("qs", "u1", 32)]),
    "q4_0": (T.Q4_0, 32,  [("d", "<f2", 1), ("qs", "u1", 16)]),
    "q4_1": (T.Q4_1, 32,  [("d", "<f2", 1), ("m", "<f2", 1), ("qs", "u1", 16)]),
    "q8_0": (T.Q8_0, 32,  [("d", "<f2", 1), ("qs", "i1", 32)]),
    "q6_K": (T.Q6_K, 256, [("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2", 1)]),
    "f16":  (T.F16,  1,   [("d", "<f2", 1)]),
}  # fmt: skip
SPREAD = {"kt4": 4.6, "q4_0": 4.6, "q4_1": 4.6, "q8_0": 74.0, "q6_K": 18.5 * 74.0, "f16": 1.0}  # of random codes

FILE_TYPES = {"kt4": 164, "q4_0": 2, "q4_1": 3, "q8_0": 7, "f16": 1}


class RandomBytes:
    """Random bytes that repeat after 64 MiB, from another place on each time: the time of a file of 13 GB is then that of
    copying."""

    PERIOD = 1 << 26

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        pool = np.frombuffer(self._rng.bytes(self.PERIOD), np.uint8)
        self._pool = np.concatenate([pool, pool])

    def take(self, size: int) -> np.ndarray:
        """[size] of uint8."""
        out = np.empty(size, np.uint8)
        for begin in range(0, size, self.PERIOD):
            part = out[begin : begin + self.PERIOD]
            first = int(self._rng.integers(self.PERIOD))
            part[:] = self._pool[first : first + part.size]
        return out


def random_tensor(source: RandomBytes, kind: str, rows: int, columns: int) -> np.ndarray:
    """[rows, bytes of a row] of uint8: values of about the spread that keeps activations where they are."""
    _, size, fields = BLOCKS[kind]
    dtype = np.dtype([(name, code, (count,)) for name, code, count in fields])
    n = rows * columns // size
    scale = columns**-0.5 / SPREAD[kind]
    blocks = source.take(n * dtype.itemsize).view(dtype)
    if kind == "f16":
        # signs and mantissas are random; one exponent, so that values are 1 to 2 times a power of two, 1.53 in the mean square
        exponent = np.uint16(15 + round(math.log2(scale / 1.53)) << 10)
        bits = blocks.view("<u2")
        bits &= np.uint16(0x83FF)
        bits |= exponent
        return bits.view(np.uint8).reshape(rows, -1)
    blocks["d"] = scale
    if kind == "q4_1":
        blocks["m"] = -7.5 * scale
    return blocks.view(np.uint8).reshape(rows, -1)


def write(path: str, kind: str, shape: dict, seed: int = 0) -> None:
    """Write one file. shape: hidden, ffn, layers, heads, kv_heads, head_dim, vocab."""
    source = RandomBytes(seed)
    hidden, ffn, head_dim = shape["hidden"], shape["ffn"], shape["head_dim"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"random {kind}")
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_block_count(shape["layers"])
    writer.add_context_length(16384)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_vocab_size(shape["vocab"])
    writer.add_tokenizer_model("no_vocab")
    if kind == "kt4":
        add_kurtail_keys(writer, hidden, head_dim)

    def matrix(name: str, type_name: str, rows: int, columns: int) -> None:
        writer.add_tensor(name, random_tensor(source, type_name, rows, columns), raw_dtype=BLOCKS[type_name][0])

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(hidden, np.float32))

    head = kind if kind in ("q8_0", "f16") else "q6_K" if hidden % 256 == 0 else "q8_0"
    if kind == "kt4":
        matrix("token_embd.weight", "q4_0", shape["vocab"], hidden)
        matrix("output.weight", head, shape["vocab"], hidden)
    else:
        matrix("token_embd.weight", head, shape["vocab"], hidden)
    norm("output_norm.weight")
    for i in range(shape["layers"]):
        norm(f"blk.{i}.attn_norm.weight")
        norm(f"blk.{i}.ffn_norm.weight")
        matrix(f"blk.{i}.attn_q.weight", kind, shape["heads"] * head_dim, hidden)
        matrix(f"blk.{i}.attn_k.weight", kind, shape["kv_heads"] * head_dim, hidden)
        matrix(f"blk.{i}.attn_v.weight", kind, shape["kv_heads"] * head_dim, hidden)
        matrix(f"blk.{i}.attn_output.weight", kind, hidden, shape["heads"] * head_dim)
        matrix(f"blk.{i}.ffn_gate.weight", kind, ffn, hidden)
        matrix(f"blk.{i}.ffn_up.weight", kind, ffn, hidden)
        matrix(f"blk.{i}.ffn_down.weight", kind, hidden, ffn)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_kurtail_keys(writer: "gguf.GGUFWriter", hidden: int, head_dim: int) -> None:
    """What a default conversion writes: 4-bit activations and cache, R3 and R4 online."""
    writer.add_uint32("kurtail.format_version", 1)
    writer.add_string("kurtail.tool", "tools/bench")
    writer.add_string("kurtail.target", "kurtail")
    writer.add_uint32("kurtail.activation_bits", 4)
    writer.add_uint32("kurtail.kv_bits", 4)
    for name, size in ("r1", hidden), ("r2", head_dim), ("r3", head_dim), ("r4", 64):
        writer.add_string(f"kurtail.{name}.kind", "hadamard")
        writer.add_uint32(f"kurtail.{name}.size", size)


if __name__ == "__main__":
    request = json.load(sys.stdin)
    write(request["path"], request["kind"], request["shape"])
