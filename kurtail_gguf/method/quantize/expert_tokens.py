"""Takes the calibration tokens through a mixture of experts, each expert on the tokens that are routed to it.

An expert's linears are quantized like any other, but few tokens reach some: where there are fewer than
:data:`FEWEST_TOKENS` its Hessians are filled up to so many with the mean over all tokens, as if they had been routed to it. So
what its own tokens say counts as far as there are any, and a Hessian of none is that of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
        shares: what each expert's output is multiplied by, float32 ``[tokens, used]``.
        shared: what the output of the expert that all tokens go through is multiplied by, float32 ``[tokens]``.
    """

    experts: Tensor
    shares: Tensor
    shared: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Routes]) -> Routes:
        """Those of all tokens, in the CPU's memory."""
        return cls(*(torch.cat([getattr(one, name) for one in parts]).cpu() for name in ("experts", "shares", "shared")))

    def to(self, expert: int | None) -> tuple[Tensor, Tensor]:
        """The tokens of one expert, int64 ``[n]`` in order, and its shares, float32 ``[n]``; None is the one of all tokens."""
        if expert is None:
            return torch.arange(len(self.shared)), self.shared
        tokens, places = torch.where(self.experts == expert)
        return tokens, self.shares[tokens, places]


def route(x: Tensor, spec: ModelSpec, weights: Mapping[str, Tensor]) -> Routes:
    """Where the runtime sends tokens.

    Args:
        x: what the router reads, float32 ``[tokens, hidden]``; the runtime does not round it.
        spec: how scores become shares.
        weights: the layer's, float32.
    """
    names = spec.family.experts
    assert names is not None
    scores = x @ weights[f"{names.router}.weight"].T
    scores = torch.sigmoid(scores) if names.scores == "sigmoid" else torch.softmax(scores, -1)
    chosen = scores + weights[names.choice_bias].flatten() if names.choice_bias else scores
    experts = chosen.topk(spec.experts_used, -1).indices
    shares = scores.gather(-1, experts)
    if spec.normalized:
        shares = shares / shares.sum(-1, keepdim=True)
    gate = torch.sigmoid(x @ weights[f"{names.shared_gate}.weight"][0]) if names.shared_gate else torch.ones_like(x[:, 0])
    return Routes(experts, shares * spec.share_factor, gate)


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

    @property
    def experts(self) -> tuple[int | None, ...]:
        """Their numbers, None for the one that all tokens go through."""
        return (*((None,) if self._names.shared else ()), *range(self._spec.experts))

    def quantize(self, expert: int | None, quantize: Callable[..., dict[str, Tensor]]) -> bool:
        """Quantize an expert's linears; whether it saw too few tokens for a Hessian of its own."""
        gate, up, down = self._linears(expert)
        tokens, shares = self._routes.to(expert)
        everything = torch.arange(len(self._importance))
        # how many of the mean token are lacking, as a share of all tokens
        lack = 0.0 if expert is None else max(0, FEWEST_TOKENS - len(tokens)) / len(everything)

        def inputs() -> Tensor:
            own = self._inputs(tokens)
            return own + lack * self._all_inputs() if lack else own

        def inner() -> Tensor:
            own = self._inner_hessian(expert, tokens, self._importance[tokens] * shares.square())
            if not lack:
                return own
            usual = self._routes.shares.square().mean()
            return own + lack * self._inner_hessian(expert, everything, self._importance * usual)

        self._take(quantize((gate, up), inputs))
        self._take(quantize((down,), inner))
        return lack > 0

    def outputs(self, expert: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """What an expert adds to the residual stream: tokens int64 ``[n]`` and rows float32 ``[n, hidden]``."""
        tokens, shares = self._routes.to(expert)
        down = self._weights[f"{self._linears(expert)[2]}.weight"]
        for part, share in zip(tokens.split(_CHUNK), shares.split(_CHUNK), strict=True):
            yield part, self._linear(self._inner(expert, part), down) * share.to(self._device)[:, None]

    def _linears(self, expert: int | None) -> tuple[str, ...]:
        """Gate, up and down."""
        if expert is None:
            return self._names.shared
        return tuple(name.format(expert) for name in (self._names.gate, self._names.up, self._names.down))

    def _take(self, quantized: dict[str, Tensor]) -> None:
        for name, weight in quantized.items():
            self._weights[f"{name}.weight"] = weight.to(self._device)

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return linear(x, weight, self._multiplied_in)

    def _rows(self, tokens: Tensor) -> Tensor:
        return torch.from_numpy(self._seen[tokens.numpy()]).to(self._device)

    def _inner(self, expert: int | None, tokens: Tensor) -> Tensor:
        """What down reads, transformed and rounded, float32 ``[n, width]``."""
        x = self._rows(tokens)
        gate, up = (self._weights[f"{name}.weight"] for name in self._linears(expert)[:2])
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

    def _inner_hessian(self, expert: int | None, tokens: Tensor, importance: Tensor) -> Tensor:
        width = self._spec.intermediate_size if expert is not None else self._spec.shared_width
        total = torch.zeros(width, width, device=self._device)
        for part, weight in zip(tokens.split(_CHUNK), importance.split(_CHUNK), strict=True):
            x = self._inner(expert, part)
            total += x.T @ (x * weight.to(self._device)[:, None])
        return total
