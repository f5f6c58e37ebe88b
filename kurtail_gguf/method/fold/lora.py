"""A LoRA pair into the rotated basis, in float64.

W + B A is folded as W is, L (W + B A) P, and so B becomes L B and A becomes A P (fold/layer.py says what L and P are).
"""

from __future__ import annotations

import torch

from kurtail_gguf.method.fold.layer import LayerTransforms, fold_reader, query_scale, rotate_heads, rotate_values
from kurtail_gguf.model.sites import ATTENTION_OUTPUT, Site
from kurtail_gguf.model.spec import ModelSpec
from kurtail_gguf.numerics.simulation.attention import rotated


def fold_pair(
    a: torch.Tensor, b: torch.Tensor, linear: str, gains: dict[str, torch.Tensor], spec: ModelSpec, transforms: LayerTransforms
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of one block linear.

    Args:
        a: ``[rank, in]``.
        b: ``[out, rank]``.
        linear: the linear's name below the layer's prefix.
        gains: what is folded of the layer's norms (``ModelSpec.gain``), by the norms' names; without those that keep theirs.
        spec: sizes and roles; not a mixture of experts where the linear is of the FFN.
        transforms: what was folded into the layer.

    Returns:
        A and B, float64, same shapes.
    """
    site = spec.site_of(linear)
    return _inputs(a.double(), site, gains, spec, transforms), _outputs(b.double().clone(), linear, spec, transforms)


def _inputs(
    a: torch.Tensor, site: Site, gains: dict[str, torch.Tensor], spec: ModelSpec, transforms: LayerTransforms
) -> torch.Tensor:
    if site.norm in gains:
        a = fold_reader(a, gains[site.norm], transforms.r1)
    elif site.kind == ATTENTION_OUTPUT and transforms.r2 is not None:
        a = rotate_heads(a, spec, transforms.r2)
    if (scale := site.scale_in(transforms.scales)) is not None:
        a = a / site.channels(scale)
    return rotated(a, transforms.online.get(site.kind, 0))


def _outputs(b: torch.Tensor, linear: str, spec: ModelSpec, transforms: LayerTransforms) -> torch.Tensor:
    if linear in spec.writers:
        return b if transforms.r1 is None else transforms.r1.T @ b
    value, rows = spec.value_rows
    if linear == value and transforms.r2 is not None:
        b[rows] = rotate_values(b[rows], spec, transforms.r2)
    factors = []
    if transforms.key_scale is not None and not spec.family.key_norm:
        factors += [(spec.key_rows, 1 / transforms.key_scale.flatten()), (spec.query_rows, query_scale(transforms.key_scale, spec))]
    factors += [
        (site.source, site.source_scale(scale))
        for site in spec.sites if site.source and (scale := site.scale_in(transforms.scales)) is not None
    ]  # fmt: skip
    for (name, rows), factor in factors:
        if linear == name:
            b[rows] = b[rows] * factor[:, None]
    return b
