"""A transformers model that computes what the runtime computes from the same GGUF file.

Weights are read from the file. Everything the runtime rounds or rotates while it runs is done by hooks
on the linears and by an attention function registered through transformers' ``AttentionInterface``
(``simulation.hooks``): nothing in transformers is replaced.

Left out is only the order of floating-point sums.
"""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.model.families.registry import find_family
from kurtail_gguf.model.family import Family
from kurtail_gguf.model.loading.from_gguf.file import SourceFile
from kurtail_gguf.model.loading.from_gguf.unpack import runtime_config
from kurtail_gguf.numerics.formats import kt4
from kurtail_gguf.numerics.simulation.attention import V_ROTATION, CacheSettings, LayerCache, use_simulated_attention
from kurtail_gguf.numerics.simulation.hooks import round_cache, round_input
from kurtail_gguf.numerics.simulation.rounding import ACTIVATION_BLOCK, CACHE_BLOCK, round_to
from kurtail_gguf.runtime import ggml
from kurtail_gguf.runtime.gguf_info import K_OFFSET, GgufInfo, TensorInfo

#: What the runtime rounds the input of the head to 8 bits in, by the head's type (q8_0 and q8_K).
_HEAD_BLOCK = {ggml.Q8_0: 32, ggml.Q6_K: 256}

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.(?P<kind>weight|bias)")


class SimulationError(KurtailError):
    """The file holds what the simulation does not know."""


def load_model(info: GgufInfo, library: ggml.GgmlBase) -> PreTrainedModel:
    """Build the model.

    Args:
        info: a kurtail file, or a stock file of float or q4_0 block linears.
        library: dequantizes upstream's types; kt4 is read by our own oracle.

    Raises:
        SimulationError: a tensor that has no counterpart in transformers' model.
        UnsupportedArchitecture: a family that cannot be converted: how its q and k lie in the file is not known.
    """
    config = runtime_config(SourceFile(info.path, (info,)))
    config.tie_word_embeddings = not any(tensor.name == "output.weight" for tensor in info.tensors)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=use_simulated_attention())
    family = find_family(type(model).__name__)
    paired = family.rope_pairs
    _load_weights(model, info, library, family)
    _simulate_linears(model, info)
    round_cache(model.model.layers, _cache_settings(info, paired))
    return model.eval()


def _cache_settings(info: GgufInfo, paired: bool) -> CacheSettings:
    provenance = info.provenance
    if provenance is None:
        return CacheSettings(bits=16, rotation=0, rotate_v=False, paired=paired)
    head_dim = int(info.hyper("attention.value_length"))
    return CacheSettings(
        bits=provenance.kv_bits,
        rotation=provenance.r3_size if provenance.r3_kind == "hadamard" else 0,
        rotate_v=provenance.r2_kind == "none" and head_dim % V_ROTATION == 0,
        paired=paired,
        layers=_layer_caches(info, paired),
    )


def _layer_caches(info: GgufInfo, paired: bool) -> tuple[LayerCache, ...]:
    provenance, heads = info.provenance, int(info.hyper("attention.head_count_kv"))
    bits = list(zip(provenance.kv_k_bits, provenance.kv_v_bits, strict=True))
    if K_OFFSET not in info.metadata:
        return tuple(LayerCache(*own) for own in bits)
    offsets = np.asarray(info.metadata[K_OFFSET], np.float32).reshape(len(bits), -1)
    if paired:
        offsets = np.stack([_pairs_to_halves(own, heads) for own in offsets])
    return tuple(
        LayerCache(*own, torch.from_numpy(offset.reshape(heads, -1)))
        for own, offset in zip(bits, offsets, strict=True)
    )


def _simulate_linears(model: PreTrainedModel, info: GgufInfo) -> None:
    online = info.online
    head = "token_embd.weight" if model.config.tie_word_embeddings else "output.weight"
    for tensor in info.tensors:
        if tensor.type_id == ggml.KT4:
            bits, block = info.activation_bits_of(tensor.name), ACTIVATION_BLOCK
        elif tensor.type_id == ggml.Q4_0 and tensor.is_block_linear:
            # upstream rounds the inputs of its q4_0 to q8_0
            bits, block = 8, CACHE_BLOCK
        elif tensor.name == head and tensor.type_id in _HEAD_BLOCK:
            bits, block = 8, _HEAD_BLOCK[tensor.type_id]
        elif tensor.name in online:
            bits = block = None
        else:
            continue
        module = "lm_head" if tensor.name == head else _hf_name(tensor).removesuffix(".weight")
        rounded = partial(round_to, bits=bits, block=block) if bits else lambda x: x
        round_input(model.get_submodule(module), rounded, online.get(tensor.name, 0))


def _load_weights(model: PreTrainedModel, info: GgufInfo, library: ggml.GgmlBase, family: Family) -> None:
    missing = set(dict(model.named_parameters()))
    data = np.memmap(info.path, dtype=np.uint8, mode="r")
    for tensor in info.tensors:
        name = _hf_name(tensor)
        if name not in missing:
            raise SimulationError(f"{tensor.name} of {info.path} does not belong to {type(model).__name__}")
        values = _read(tensor, data, library)
        if name.endswith("norm.weight"):
            values = values - np.float32(family.norm.offset)
        if family.rope_pairs and re.search(r"\.(q|k)_proj\.", name):
            heads = info.hyper("attention.head_count" if ".q_proj." in name else "attention.head_count_kv")
            values = _pairs_to_halves(values, int(heads))
        parameter = model.get_parameter(name)
        if tuple(parameter.shape) != values.shape:
            raise SimulationError(f"{tensor.name} of {info.path} is {values.shape}, not {tuple(parameter.shape)}")
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(values))
        missing.discard(name)
    if missing:
        raise SimulationError(f"{info.path} lacks {', '.join(sorted(missing))}")


def _read(tensor: TensorInfo, data: np.ndarray, library: ggml.GgmlBase) -> np.ndarray:
    raw = np.asarray(data[tensor.offset : tensor.offset + tensor.bytes])
    if tensor.type_id == ggml.F32:
        return raw.view("<f4").reshape(tensor.shape).astype(np.float32)
    packed = raw.reshape(tensor.shape[0], -1)
    if tensor.type_id == ggml.KT4:
        return kt4.dequantize(*kt4.unpack(packed))
    return library.dequantize(packed, tensor.type_id, tensor.shape[-1])


def _pairs_to_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo upstream's ``LlamaModel.permute`` on the rows of q or k."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows.shape))


def _hf_name(tensor: TensorInfo) -> str:
    match = _NAME.fullmatch(tensor.name)
    table = {} if match is None else (_TOP if match["layer"] is None else _IN_BLOCK)
    if match is None or match["part"] not in table:
        raise SimulationError(f"the simulation does not support the tensor {tensor.name}")
    prefix = "" if match["layer"] is None else f"model.layers.{match['layer']}."
    return f"{prefix}{table[match['part']]}.{match['kind']}"
