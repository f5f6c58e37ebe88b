"""Tiny valid GGUF files to start fuzzing from: one layer of width 64, a vocabulary of 8 without tokens, about 20 KB.

    PYTHONPATH=UPSTREAM/vendor/llama.cpp/gguf-py python seeds.py DIRECTORY

Written with the pinned gguf-py, whose patch names our type. ``base.gguf`` is the model that ``adapter.gguf`` fits.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np

WIDTH = 64  # one kt4 block, one head
FFN = 192  # 64 · 3: R4 in three pieces
VOCABULARY = 8
EXPERTS = 2
SHA256 = "0" * 63 + "1"

KT4 = gguf.GGMLQuantizationType(164)
Q4_0 = gguf.GGMLQuantizationType.Q4_0

ROTATED = {
    "format_version": 2, "target": "kurtail", "activation_bits": 4, "kv_bits": 4, "r1.kind": "learned", "r2.kind": "learned",
    "r3.kind": "hadamard", "r3.size": WIDTH, "r4.kind": "hadamard", "r4.size": 64, "rotations.sha256": SHA256,
}  # fmt: skip
#: layers of one key head of WIDTH
LAYERS = {"kv.k_bits": [8], "kv.v_bits": [4], "kv.k_offset": [0.5] * WIDTH}
#: inputs that differ in the size of their transform
SITES = {"blk.0.attn_q.weight": 64, "blk.0.attn_output.weight": 32, "blk.0.ffn_up.weight": 64, "blk.0.ffn_down.weight": 16}
ONLINE = {
    "format_version": 3, "online.name": list(SITES), "online.kind": ["hadamard"] * len(SITES), "online.size": list(SITES.values()),
}  # fmt: skip
PLAIN = ROTATED | {"r1.kind": "none", "r2.kind": "none", "r3.kind": "none", "r4.kind": "none"}

LAYER = {
    "attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH, WIDTH), "attn_v": (WIDTH, WIDTH), "attn_output": (WIDTH, WIDTH),
    "ffn_gate": (FFN, WIDTH), "ffn_up": (FFN, WIDTH), "ffn_down": (WIDTH, FFN),
}  # fmt: skip


class Seed:
    """A GGUF file in the making, its numbers from a generator of fixed seed."""

    def __init__(self, path: Path, arch: str) -> None:
        self.writer = gguf.GGUFWriter(path, arch)
        self.random = np.random.default_rng(0)

    def keys(self, kurtail: dict[str, int | str | list]) -> None:
        kinds = gguf.GGUFValueType
        for name, value in kurtail.items():
            if isinstance(value, list):
                kind = {int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}[type(value[0])]
                self.writer.add_key_value(f"kurtail.{name}", value, kinds.ARRAY, kind)
            else:
                self.writer.add_key_value(f"kurtail.{name}", value, kinds.UINT32 if isinstance(value, int) else kinds.STRING)

    def f32(self, name: str, *shape: int) -> None:
        self.writer.add_tensor(name, self.random.standard_normal(shape, dtype=np.float32))

    def quantized(self, name: str, kind: gguf.GGMLQuantizationType, *shape: int) -> None:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = self.random.integers(0, 256, (*shape[:-1], shape[-1] // block, size), dtype=np.uint8)
        data[..., :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        self.writer.add_tensor(name, data.reshape(*shape[:-1], -1), raw_dtype=kind)

    def close(self) -> None:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()


def model(path: Path, *, arch: str = "llama", kurtail: dict[str, int | str | list] | None = None, kind: gguf.GGMLQuantizationType | None = KT4,
          eight_bit: tuple[str, ...] = (), experts: int = 0, embedding: gguf.GGMLQuantizationType | None = None) -> None:  # fmt: skip
    """Write a model of one layer.

    Args:
        path: the file.
        arch: one of llama.cpp's architectures with Llama's tensors.
        kurtail: keys under ``kurtail.``, none for a file of llama-quantize.
        kind: type of the block linears; f32 where None.
        eight_bit: tensors that general.tensor_extra gives 8-bit activations.
        experts: FFNs of a layer; 0 for one without a router.
        embedding: type of token_embd; f32 where None.
    """
    seed = Seed(path, arch)
    w = seed.writer
    w.add_block_count(1)
    w.add_context_length(64)
    w.add_embedding_length(WIDTH)
    w.add_feed_forward_length(FFN)
    w.add_head_count(1)
    w.add_head_count_kv(1)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_dimension_count(WIDTH)
    w.add_vocab_size(VOCABULARY)
    w.add_tokenizer_model("none")
    w.add_file_type(164)
    if experts:
        w.add_expert_count(experts)
        w.add_expert_used_count(1)
    seed.keys(kurtail or {})
    if eight_bit:
        w.add_array("general.tensor_extra.name", list(eight_bit))
        w.add_array("general.tensor_extra.prec_a4", [False] * len(eight_bit))

    if embedding is None:
        seed.f32("token_embd.weight", VOCABULARY, WIDTH)
    else:
        seed.quantized("token_embd.weight", embedding, VOCABULARY, WIDTH)
    seed.f32("output_norm.weight", WIDTH)
    seed.f32("output.weight", VOCABULARY, WIDTH)
    seed.f32("blk.0.attn_norm.weight", WIDTH)
    seed.f32("blk.0.ffn_norm.weight", WIDTH)
    if arch == "qwen2":
        for name in ("attn_q", "attn_k", "attn_v"):
            seed.f32(f"blk.0.{name}.bias", WIDTH)
    if experts:
        seed.f32("blk.0.ffn_gate_inp.weight", experts, WIDTH)
    for name, shape in LAYER.items():
        many = experts and name.startswith("ffn")
        full = f"blk.0.{name}{'_exps' if many else ''}.weight"
        shape = (experts, *shape) if many else shape
        if kind is None:
            seed.f32(full, *shape)
        else:
            seed.quantized(full, kind, *shape)
    seed.close()


def adapter(path: Path) -> None:
    """Write a LoRA adapter of rank 2 for attn_q of ``base.gguf``."""
    seed = Seed(path, "llama")
    seed.writer.add_type("adapter")
    seed.writer.add_string("adapter.type", "lora")
    seed.writer.add_float32("adapter.lora.alpha", 0.0)
    seed.keys({"adapter.rotations": SHA256})
    seed.f32("blk.0.attn_q.weight.lora_a", 2, WIDTH)
    seed.f32("blk.0.attn_q.weight.lora_b", WIDTH, 2)
    seed.close()


def write(directory: Path) -> None:
    """Write every seed, ``NAME.gguf``."""
    directory.mkdir(parents=True, exist_ok=True)
    model(directory / "base.gguf", kurtail=ROTATED)
    model(directory / "layers.gguf", kurtail=ROTATED | LAYERS)
    model(directory / "online.gguf", kurtail=ROTATED | LAYERS | ONLINE)
    model(directory / "unrotated.gguf", kurtail=PLAIN | {"kv_bits": 16})
    model(directory / "mixed.gguf", kurtail=ROTATED | {"kv_bits": 8}, eight_bit=("blk.0.ffn_down.weight", "blk.0.attn_v.weight"))
    model(directory / "a8-biases.gguf", arch="qwen2", kurtail=ROTATED | {"activation_bits": 8})
    model(directory / "experts.gguf", kurtail=ROTATED, experts=EXPERTS)
    model(directory / "stock.gguf", kurtail=PLAIN | {"target": "stock", "activation_bits": 8, "kv_bits": 16}, kind=Q4_0)
    model(directory / "f32.gguf", kurtail=ROTATED | {"activation_bits": 32, "kv_bits": 16}, kind=None)
    model(directory / "no-keys.gguf", embedding=KT4)
    adapter(directory / "adapter.gguf")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
