"""Takes the calibration tokens through a mixture of experts, each expert on the tokens that are routed to it.

An expert's linears are quantized like any other, but few tokens reach one: where there are fewer than
:data:`FEWEST_TOKENS` its Hessians are taken over all tokens instead, as if they had been routed to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kurtail_gguf.model.precision import linear
from kurtail_gguf.model.sites import FFN_OUTPUT
from kurtail_gguf.model.spec import ModelSpec
from kurtail_gguf.numerics.simulation.runtime import RuntimeRounding

#: Below so many tokens a Hessian says more about those tokens than about the expert.
FEWEST_TOKENS = 256
#: Tokens in one product.
_CHUNK = 2048


@dataclass(frozen=True, eq=False, slots=True)
class Routes:
    """Where the router sends tokens.

    Args:
        experts: int64 ``[tokens, used]``.
        shares: what each expert's output is multiplied by, float32 ``[tokens, used]``; a token's add up to 1.
    """

    experts: Tensor
    shares: Tensor

    def to(self, expert: int) -> tuple[Tensor, Tensor]:
        """The tokens of one expert, int64 ``[n]`` in order, and its shares, float32 ``[n]``."""
        tokens, places = torch.where(self.experts == expert)
        return tokens, self.shares[tokens, places]


def route(x: Tensor, router: Tensor, used: int) -> Routes:
    """Softmax over all experts, the best ``used`` of them made to add up to 1.

    Args:
        x: what the router reads, float32 ``[tokens, hidden]``; the runtime does not round it.
        router: float32 ``[experts, hidden]``.
        used: experts a token goes through.
    """
    best = torch.softmax(x @ router.T, -1).topk(used, -1)
    return Routes(best.indices, best.values / best.values.sum(-1, keepdim=True))


class ExpertTokens:
    """The experts of one layer and what they read.

    Args:
        spec: sizes and names.
        rounding: what the runtime rounds.
        weights: the layer's tensors by name, float32; an expert's are replaced as they are quantized.
        seen: the norm's output, rounded, ``[tokens, hidden]``; anything that rows can be taken from.
        routes: of the tokens.
        importance: how much an error of the FFN's output matters at a token, float32 ``[tokens]``.
        device: where to compute.
        multiplied_in: what the experts' linears multiply in (calibration/precision.py).
    """

    def __init__(
        self,
        spec: ModelSpec,
        rounding: RuntimeRounding,
        weights: dict[str, Tensor],
        seen: Any,
        routes: Routes,
        importance: Tensor,
        device: torch.device,
        multiplied_in: torch.dtype = torch.float32,
    ) -> None:
        assert spec.family.experts is not None
        self._spec, self._names, self._rounding = spec, spec.family.experts, rounding
        self._weights, self._seen, self._routes, self._importance = weights, seen, routes, importance
        self._device, self._multiplied_in = device, multiplied_in
        self._everything: Tensor | None = None

    def quantize(self, expert: int, quantize: Callable[..., dict[str, Tensor]]) -> bool:
        """Quantize an expert's linears; whether it saw too few tokens for a Hessian of its own."""
        gate, up, down = (name.format(expert) for name in (self._names.gate, self._names.up, self._names.down))
        tokens, shares = self._routes.to(expert)
        few = len(tokens) < FEWEST_TOKENS
        self._take(quantize((gate, up), self._all_inputs if few else lambda: self._inputs(tokens)))
        if few:
            tokens = torch.arange(len(self._importance))
            importance = self._importance
        else:
            importance = self._importance[tokens] * shares.square()
        self._take(quantize((down,), lambda: self._inner_hessian(expert, tokens, importance)))
        return few

    def outputs(self, expert: int) -> Iterator[tuple[Tensor, Tensor]]:
        """What an expert adds to the residual stream: tokens int64 ``[n]`` and rows float32 ``[n, hidden]``."""
        tokens, shares = self._routes.to(expert)
        down = self._weights[f"{self._names.down.format(expert)}.weight"]
        for part, share in zip(tokens.split(_CHUNK), shares.split(_CHUNK), strict=True):
            yield part, self._linear(self._inner(expert, part), down) * share.to(self._device)[:, None]

    def _take(self, quantized: dict[str, Tensor]) -> None:
        for name, weight in quantized.items():
            self._weights[f"{name}.weight"] = weight.to(self._device)

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return linear(x, weight, self._multiplied_in)

    def _rows(self, tokens: Tensor) -> Tensor:
        return torch.from_numpy(self._seen[tokens.numpy()]).to(self._device)

    def _inner(self, expert: int, tokens: Tensor) -> Tensor:
        """What down reads, transformed and rounded, float32 ``[n, width]``."""
        x = self._rows(tokens)
        gate, up = (self._weights[f"{name.format(expert)}.weight"] for name in (self._names.gate, self._names.up))
        inner = nn.functional.silu(self._linear(x, gate)) * self._linear(x, up)
        return self._rounding.activations(inner, FFN_OUTPUT)

    def _all_inputs(self) -> Tensor:
        if self._everything is None:
            self._everything = self._inputs(torch.arange(len(self._importance)))
        return self._everything

    def _inputs(self, tokens: Tensor) -> Tensor:
        """Σ x xᵀ over tokens, float32 ``[hidden, hidden]``."""
        width = self._spec.hidden_size
        total = torch.zeros(width, width, device=self._device)
        for part in tokens.split(_CHUNK):
            x = self._rows(part)
            total += x.T @ x
        return total

    def _inner_hessian(self, expert: int, tokens: Tensor, importance: Tensor) -> Tensor:
        width = self._spec.intermediate_size
        total = torch.zeros(width, width, device=self._device)
        for part, weight in zip(tokens.split(_CHUNK), importance.split(_CHUNK), strict=True):
            x = self._inner(expert, part)
            total += x.T @ (x * weight.to(self._device)[:, None])
        return total
