"""Where a checkpoint's linears lie in a GGUF file, and in what order their rows do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kurtail_gguf.model.family import Family
from kurtail_gguf.model.spec import ModelSpec

EMBEDDING, HEAD = "token_embd.weight", "output.weight"


def file_tensor(spec: ModelSpec, layer: int, linear: str) -> tuple[str, int | None]:
    """The tensor of a block linear.

    Args:
        spec: sizes and roles.
        layer: its number.
        linear: name below the layer's prefix; a router counts as well.

    Returns:
        Name in the file (``blk.0.attn_q.weight``), and the expert's number where all experts of a layer are one tensor.
    """
    part, expert = file_part(spec.at(layer).family, linear)
    return f"blk.{layer}.{part}.weight", expert


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of the checkpoint lies in the file.

    Args:
        tensor: name there.
        expert: which part of it, where all experts of a layer are one tensor.
        linear: the linear whose weight or bias it is, so that its rows may be in another order; empty for none.
        gain: whether the file has a norm's gain, not the checkpoint's weight.
    """

    tensor: str
    expert: int | None = None
    linear: str = ""
    gain: bool = False


def layer_places(spec: ModelSpec, layer: int) -> dict[str, Place]:
    """All tensors of a layer, by name below the layer's prefix."""
    own = spec.at(layer)
    family, experts = own.family, own.family.experts
    norms = {*own.norms, family.query_norm, family.key_norm}
    places = {}
    for name in own.layer_shapes():
        module, _, kind = name.rpartition(".")
        if experts is not None and name == experts.choice_bias:
            places[name] = Place(f"blk.{layer}.exp_probs_b.bias")
        elif module in norms:
            places[name] = Place(f"blk.{layer}.{file_norm(own, module)}.{kind}", gain=kind == "weight")
        else:
            part, expert = file_part(family, module)
            places[name] = Place(f"blk.{layer}.{part}.{kind}", expert, linear=module)
    return places


def top_places(spec: ModelSpec) -> dict[str, Place]:
    """All tensors outside the layers, by full name."""
    family = spec.family
    parts = {family.embedding: EMBEDDING, family.final_norm: "output_norm.weight", family.head: HEAD}
    places = {}
    for name in spec.top_shapes():
        module, _, kind = name.rpartition(".")
        gain = module == family.final_norm and kind == "weight"
        places[name] = Place(parts[module].removesuffix("weight") + kind, gain=gain)
    return places


def file_norm(spec: ModelSpec, norm: str) -> str:
    """A norm's name in the file, between the layer's prefix and its suffix (``attn_norm``)."""
    family = spec.family
    usual = {
        family.attention_norm: "attn_norm", family.attention_post_norm: "post_attention_norm", family.ffn_norm: "ffn_norm",
        family.ffn_post_norm: "post_ffw_norm", family.query_norm: "attn_q_norm", family.key_norm: "attn_k_norm",
    }  # fmt: skip
    return (family.file_norms or {}).get(norm) or usual[norm]


def file_rows(spec: ModelSpec, linear: str, rows: npt.NDArray) -> npt.NDArray:
    """Rows of a linear ``[out, …]`` in the order of the file: q and k from halves of RoPE to pairs where they are so."""
    family = spec.family
    heads = {family.query: spec.heads, family.key: spec.kv_heads}.get(linear)
    if heads is None or not family.rope_pairs:
        return rows
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def checkpoint_rows(spec: ModelSpec, linear: str, rows: npt.NDArray) -> npt.NDArray:
    """The inverse of :func:`file_rows`."""
    family = spec.family
    heads = {family.query: spec.heads, family.key: spec.kv_heads}.get(linear)
    if heads is None or not family.rope_pairs:
        return rows
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows.shape))


def online_tensors(spec: ModelSpec, online: Mapping[str, int]) -> dict[str, int]:
    """Sizes of the Hadamard blocks that inputs are multiplied by, by the names of the file's tensors that read them.

    Args:
        spec: sizes and roles.
        online: the sizes by kinds of sites.
    """
    return {
        file_tensor(spec, layer, linear)[0]: online[site.kind]
        for layer in range(spec.layers) for site in spec.at(layer).sites if site.kind in online for linear in site.readers
    }  # fmt: skip


def file_part(family: Family, linear: str) -> tuple[str, int | None]:
    """A linear's name in the file, between the layer's prefix and its suffix, and the expert's number as :func:`file_tensor`'s."""
    names = family.experts
    if linear == family.attention_writer:
        return "attn_output", None
    if linear in family.attention_readers:
        if family.fused_attention:
            return "attn_qkv", None
        return {family.query: "attn_q", family.key: "attn_k", family.value: "attn_v"}[linear], None
    if names is None:
        if linear == family.ffn_writer:
            return "ffn_down", None
        # gate and up in one are what the runtime calls up
        return ("ffn_up" if linear == family.up else "ffn_gate"), None
    if linear == names.router:
        return "ffn_gate_inp", None
    if linear == names.shared_gate:
        return "ffn_gate_inp_shexp", None
    if linear in names.shared:
        return ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")[names.shared.index(linear)], None
    for part, pattern in (("gate", names.gate), ("up", names.up), ("down", names.down)):
        before, after = pattern.split("{}")
        number = linear.removeprefix(before).removesuffix(after)
        if pattern.format(number) == linear and number.isdigit():
            return f"ffn_{part}_exps", int(number)
    raise KeyError(linear)
