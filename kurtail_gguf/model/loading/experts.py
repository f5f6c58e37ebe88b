"""A mixture of experts under the names that transformers' modules have for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kurtail_gguf.model.family import ExpertNames
from kurtail_gguf.model.spec import ModelSpec

#: ``linear(name, x)``: the product of a block linear, by its name below the layer's prefix, with its input.
Linear = Callable[[str, Tensor], Tensor]
#: ``watch(expert, tokens, shares, inner)``: an expert's number, its tokens int64 ``[n]``, their shares ``[n]``, and what its down reads
#: ``[n, width]``.
Watch = Callable[[int, Tensor, Tensor, Tensor], None]


class SingleExperts(nn.Module):
    """Stands where transformers has all experts of a layer in two tensors, and multiplies by one linear after the other.

    Args:
        names: of the experts' linears.
    """

    def __init__(self, names: ExpertNames) -> None:
        super().__init__()
        self._names = names
        self._linear: Linear | None = None
        self._watch: Watch | None = None

    @contextmanager
    def lent(self, linear: Linear, watch: Watch | None) -> Iterator[None]:
        """While entered, multiply by ``linear``, which is asked for gate and up with the same input, and tell ``watch``."""
        self._linear, self._watch = linear, watch
        try:
            yield
        finally:
            self._linear = self._watch = None

    def forward(self, hidden: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
        """What experts add, float32 ``[tokens, hidden]``.

        Args:
            hidden: what they read, ``[tokens, hidden]``.
            experts: those of each token, int64 ``[tokens, used]``.
            shares: what their outputs are multiplied by, ``[tokens, used]``.
        """
        linear, watch = self._linear, self._watch
        assert linear is not None
        added = torch.zeros_like(hidden)
        for expert in experts.cpu().unique().tolist():
            tokens, places = torch.where(experts == expert)
            gate, up, down = (name.format(expert) for name in (self._names.gate, self._names.up, self._names.down))
            x = hidden[tokens]
            inner = nn.functional.silu(linear(gate, x)) * linear(up, x)
            if watch is not None:
                watch(expert, tokens, shares[tokens, places], inner)
            added = added.index_add(0, tokens, linear(down, inner) * shares[tokens, places, None])
        return added


def single_experts(spec: ModelSpec, layer: nn.Module) -> SingleExperts | None:
    """Put :class:`SingleExperts` into a module of transformers' that nobody else has; None where it has no experts."""
    names = spec.family.experts
    if names is None:
        return None
    experts = layer.get_submodule(names.block).experts = SingleExperts(names)
    return experts


def module_of(spec: ModelSpec, linear: str) -> str:
    """The linear of transformers' module that has a block linear's rows, by their names in the layer; not an expert's of many."""
    names = spec.family.experts
    if names is None or not names.module_shared or linear not in names.shared:
        return linear
    return names.module_shared[linear == names.shared[2]]


def module_weights(spec: ModelSpec, weights: dict[str, torch.Tensor], single: bool = False) -> dict[str, torch.Tensor]:
    """A layer's tensors by the names of transformers' module; the same where the family has no experts.

    Args:
        spec: sizes and roles.
        weights: by the names of ``spec.layer_shapes()``; an expert's linears are ``[out, in]`` each.
        single: the module has :class:`SingleExperts`, which have their weights elsewhere.

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
    rest[f"{names.module_router}.weight"] = weights[f"{names.router}.weight"]
    if single:
        return rest
    return rest | {
        f"{names.block}.experts.gate_up_proj": torch.cat([stacked(names.gate), stacked(names.up)], dim=1),
        f"{names.block}.experts.down_proj": stacked(names.down),
    }
