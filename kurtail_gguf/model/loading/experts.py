"""A mixture of experts under the names that transformers' modules have for it."""

from __future__ import annotations

import torch

from kurtail_gguf.model.spec import ModelSpec


def module_weights(spec: ModelSpec, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A layer's tensors by the names of transformers' module; the same where the family has no experts.

    Args:
        spec: sizes and roles.
        weights: by the names of ``spec.layer_shapes()``; an expert's linears are ``[out, in]`` each.

    Returns:
        The experts' linears stacked, gate above up: ``mlp.experts.gate_up_proj`` ``[experts, 2 width, hidden]`` and
        ``mlp.experts.down_proj`` ``[experts, hidden, width]``; the router as ``mlp.gate.weight``.
    """
    names = spec.family.experts
    if names is None:
        return weights

    def stacked(name: str) -> torch.Tensor:
        return torch.stack([weights[f"{name.format(expert)}.weight"] for expert in range(spec.experts)])

    own = {f"{name}.weight" for name in (*spec.ffn_readers, *spec.ffn_writers, names.router)}
    rest = {name: tensor for name, tensor in weights.items() if name not in own}
    return rest | {
        f"{names.block}.gate.weight": weights[f"{names.router}.weight"],
        f"{names.block}.experts.gate_up_proj": torch.cat([stacked(names.gate), stacked(names.up)], dim=1),
        f"{names.block}.experts.down_proj": stacked(names.down),
    }
