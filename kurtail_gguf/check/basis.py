"""The rotations that are folded into a file, found again from the file and the model it was made of.

Each is the orthogonal matrix that carries the model's weights nearest to the file's (Procrustes): R1 from embedding and
head, R2 from each layer's values, and the scales of FFN channels and keys row by row; diagonals behind norms are the gains that
the file has. Nothing has to have been kept; rounding to 4 bits in the file moves the result a little, so that it is for checking,
not for converting.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from kurtail_gguf.convert.settings import OWN_ROTATIONS
from kurtail_gguf.messages.errors import Differs
from kurtail_gguf.method.fold.layer import LayerTransforms, fold_layer, fold_reader
from kurtail_gguf.model.loading.checkpoint import Checkpoint
from kurtail_gguf.model.names import EMBEDDING, HEAD, file_norm, file_rows, file_tensor
from kurtail_gguf.model.rope import from_halves, in_halves
from kurtail_gguf.model.sites import FFN_OUTPUT, Site
from kurtail_gguf.model.spec import ModelSpec
from kurtail_gguf.runtime.file_tensors import FileTensors
from kurtail_gguf.runtime.provenance import Provenance


def find_r1(checkpoint: Checkpoint, file: FileTensors, provenance: Provenance) -> torch.Tensor | None:
    """R1, float64 ``[hidden, hidden]``; None where the file says that there is none."""
    if provenance.r1_kind == "none":
        return None
    spec = checkpoint.spec
    gain = spec.family.norm.gain(checkpoint.tensor(f"{spec.family.final_norm}.weight"))
    total = torch.zeros(spec.hidden_size, spec.hidden_size, dtype=torch.float64)
    for name, stored, factor in (
        (f"{spec.family.embedding}.weight", EMBEDDING, torch.ones_like(gain)),
        (checkpoint.head_name, HEAD, gain),
    ):
        for start, rows in checkpoint.rows(name):
            found = torch.from_numpy(file.rows(stored, start, len(rows))).double()
            total += fold_reader(rows, factor, None).T @ found
    return _nearest_rotation(total)


def find_layer_transforms(
    checkpoint: Checkpoint,
    file: FileTensors,
    provenance: Provenance,
    layer: int,
    weights: dict[str, torch.Tensor],
    r1: torch.Tensor | None,
    online: Mapping[str, int],
) -> LayerTransforms:
    """All that is folded into a layer.

    Args:
        checkpoint: the model.
        file: the file.
        provenance: what the file says of itself.
        layer: its number.
        weights: as :meth:`Checkpoint.layer` gives them.
        r1: what :func:`find_r1` found.
        online: what :func:`find_online` found.
    """
    spec = checkpoint.spec.at(layer)
    scales = {site.diagonal: _diagonal(file, spec, layer, site, weights) for site in spec.sites if site.norm}
    # all that is folded into the columns of what reads the residual stream
    folded = fold_layer(weights, spec, LayerTransforms(r1, None, online, scales))
    r2 = None
    if provenance.r2_kind != "none":
        linear, rows = spec.value_rows
        shape = (spec.kv_heads, spec.head_dim, -1)
        value = folded[f"{linear}.weight"][rows].reshape(shape)
        found = _stored(file, checkpoint, layer, linear)[rows].reshape(shape)
        r2 = _nearest_rotation(value @ found.mT)
    of_experts: dict[str, list[torch.Tensor]] = {}
    for site in spec.sites:
        if site.kind == FFN_OUTPUT and site.source and provenance.rotation in OWN_ROTATIONS:
            scale = _row_scale(folded, file, checkpoint, layer, *site.source) ** site.power
            if site.expert is None:
                scales[site.diagonal] = scale
            else:
                of_experts.setdefault(site.diagonal, []).append(scale)
    scales |= {name: torch.stack(each) for name, each in of_experts.items()}
    return LayerTransforms(r1, r2, online, scales, _key_scale(checkpoint, file, layer, weights, folded))


def find_online(checkpoint: Checkpoint, file: FileTensors) -> dict[str, int]:
    """Sizes of the Hadamard blocks that the runtime multiplies sites by, by their kinds."""
    spec = checkpoint.spec
    sizes = {site.kind: file.online(file_tensor(spec, 0, site.readers[0])[0]) for site in spec.at(0).sites}
    return {kind: size for kind, size in sizes.items() if size}


def _diagonal(
    file: FileTensors, spec: ModelSpec, layer: int, site: Site, weights: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The diagonal in a norm, ones where there is none: its gain, or what gain and bias were multiplied by."""
    name = f"blk.{layer}.{file_norm(spec, site.norm)}"
    found = torch.from_numpy(file.values(f"{name}.weight")).double()
    if site.keeps_gain:
        gain, bias = spec.family.norm.gain(weights[f"{site.norm}.weight"]), weights[f"{site.norm}.bias"].double()
        energy = gain.square() + bias.square()
        both = gain * found + bias * torch.from_numpy(file.values(f"{name}.bias")).double()
        # a channel that is always 0 tells nothing, and needs nothing
        found = torch.where(energy > 0, both / energy.clamp_min(1e-300), 1.0)
    if not (torch.isfinite(found) & (found > 0)).all():
        raise Differs(f"tensor {name}.weight: every value must be above 0, because a diagonal's values are")
    return found


def _row_scale(
    folded: dict[str, torch.Tensor], file: FileTensors, checkpoint: Checkpoint, layer: int, linear: str, rows: slice
) -> torch.Tensor:
    """What rows of a linear were multiplied by."""
    kept, found = folded[f"{linear}.weight"][rows], _stored(file, checkpoint, layer, linear)[rows]
    energy = kept.square().sum(1)
    scale = torch.where(energy > 0, (kept * found).sum(1) / energy, 1.0)
    # a row that came out as zeros has lost its scale; the comparison of its tensor will tell
    return torch.where(scale > 0, scale, 1.0)


def _key_scale(
    checkpoint: Checkpoint, file: FileTensors, layer: int, weights: dict[str, torch.Tensor], folded: dict[str, torch.Tensor]
) -> torch.Tensor:
    """What keys were divided by, the same for both values of a RoPE pair: from the gains of their norm, or their rows."""
    spec = checkpoint.spec
    if norm := spec.family.key_norm:
        shape = (-1, spec.head_dim, 1)
        kept = spec.family.norm.gain(weights[f"{norm}.weight"]).reshape(shape)
        stored = file.values(f"blk.{layer}.{file_norm(spec, norm)}.weight")
        found = torch.from_numpy(np.ascontiguousarray(stored)).double().reshape(shape)
    else:
        linear, rows = spec.key_rows
        stored = _stored(file, checkpoint, layer, linear)[rows]
        found = torch.empty_like(stored)
        # where the file has each row of the checkpoint
        found[torch.from_numpy(file_rows(spec, linear, np.arange(len(stored))))] = stored
        shape = (spec.kv_heads, spec.head_dim, -1)
        kept, found = folded[f"{linear}.weight"][rows].reshape(shape), found.reshape(shape)
    same, energy = (_of_pairs((kept * other).sum(-1), spec) for other in (found, kept))
    # a row that came out as zeros has lost its scale; the comparison of its tensor will tell
    usable = (same > 0) & (energy > 0)
    return torch.where(usable, energy / same.where(usable, 1.0), 1.0).expand(spec.kv_heads, -1)


def _of_pairs(values: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
    """The sum over both values of each RoPE pair, at the place of both, ``[heads, head_dim]``."""
    values, pairs = in_halves(values, spec), spec.rotary_dim // 2
    both = values[:, :pairs] + values[:, pairs : 2 * pairs]
    return from_halves(torch.cat([both, both, values[:, 2 * pairs :]], -1), spec)


def _stored(file: FileTensors, checkpoint: Checkpoint, layer: int, linear: str) -> torch.Tensor:
    name, expert = file_tensor(checkpoint.spec, layer, linear)
    return torch.from_numpy(np.ascontiguousarray(file.values(name, expert))).double()


def _nearest_rotation(correlation: torch.Tensor) -> torch.Tensor:
    """The orthogonal R that makes tr(Rᵀ C) greatest, for C ``[…, n, n]``."""
    left, _, right = torch.linalg.svd(correlation)
    return left @ right
