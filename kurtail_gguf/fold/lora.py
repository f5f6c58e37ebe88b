"""A LoRA pair into the rotated basis, in float64.

W + B A is folded as W is, L (W + B A) P, and so B becomes L B and A becomes A P (fold/layer.py says what L and P are).
"""

from __future__ import annotations

import torch

from kurtail_gguf.arch.spec import ModelSpec
from kurtail_gguf.fold.layer import LayerRotations, fold_reader, query_scale, rotate_heads, rotate_values
from kurtail_gguf.formats.hadamard import walsh_hadamard_


def fold_pair(
    a: torch.Tensor, b: torch.Tensor, linear: str, gains: dict[str, torch.Tensor], spec: ModelSpec, rotations: LayerRotations
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of one block linear.

    Args:
        a: ``[rank, in]``.
        b: ``[out, rank]``.
        linear: the linear's name below the layer's prefix.
        gains: weights of the layer's norms, by the norms' names.
        spec: sizes and roles; not a mixture of experts where the linear is of the FFN.
        rotations: what was folded into the layer.

    Returns:
        A and B, float64, same shapes.
    """
    a, b, family, r1 = a.double(), b.double().clone(), spec.family, rotations.r1
    if linear in (family.attention_writer, family.ffn_writer):
        if linear == family.attention_writer:
            a = a if rotations.r2 is None else rotate_heads(a, spec, rotations.r2)
        else:
            a = a if rotations.ffn_scale is None else a / rotations.ffn_scale
            a = walsh_hadamard_(a.clone(), rotations.r4) if rotations.r4 > 1 else a
        return a, b if r1 is None else r1.T @ b
    norm = family.attention_norm if linear in family.attention_readers else family.ffn_norm
    a = fold_reader(a, gains[norm], r1)
    value, rows = spec.value_rows
    if linear == value and rotations.r2 is not None:
        b[rows] = rotate_values(b[rows], spec, rotations.r2)
    if rotations.key_scale is not None and not family.key_norm:
        factors = ((spec.key_rows, 1 / rotations.key_scale.flatten()), (spec.query_rows, query_scale(rotations.key_scale, spec)))
        for (name, rows), factor in factors:
            if linear == name:
                b[rows] = b[rows] * factor[:, None]
    if linear == family.up and rotations.ffn_scale is not None:
        _, rows = spec.up_rows
        b[rows] = b[rows] * rotations.ffn_scale[:, None]
    return a, b
