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

    linears = {*spec.ffn_readers, *spec.ffn_writers, names.router}.difference(() if names.module_shared else names.shared)
    own = {f"{name}.weight" for name in linears}
    renamed = {names.choice_bias: names.module_choice_bias} if names.module_choice_bias else {}
    rest = {renamed.get(name, name): tensor for name, tensor in weights.items() if name not in own}
    if names.module_shared:
        gate, up, down = (weights[f"{name}.weight"] for name in names.shared)
        rest |= {f"{name}.weight": tensor for name, tensor in zip(names.module_shared, (torch.cat([gate, up]), down), strict=True)}
    return rest | {
        f"{names.module_router}.weight": weights[f"{names.router}.weight"],
        f"{names.block}.experts.gate_up_proj": torch.cat([stacked(names.gate), stacked(names.up)], dim=1),
        f"{names.block}.experts.down_proj": stacked(names.down),
    }
