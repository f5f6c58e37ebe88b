"""Sites: the activations that a layer's linears read, and what may be done to each so that little is lost in rounding it.

What is exact at a site, whatever the architecture, is to multiply what is read by an invertible matrix and the columns of
everything that reads it by the inverse. A diagonal costs nothing where it can be moved into what produces the activation:
the gain of a norm, or the rows of a linear that the activation is a multiple of. A Hadamard transform of the blocks is
applied by the runtime, and R1 of the residual stream is folded into the norm's readers and the stream's writers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

#: The kinds of sites, in the order of the forward pass. Transforms are chosen by kind, and are a layer's own.
ATTENTION, ATTENTION_OUTPUT, FFN, FFN_OUTPUT = SITES = ("attention", "attention-output", "ffn", "ffn-output")


@dataclass(frozen=True, slots=True)
class Site:
    """What some linears of a layer read; names are below the layer's prefix.

    Args:
        kind: one of :data:`SITES`; experts have one ``ffn-output`` each.
        part: of a mixture of experts, whose ``ffn-output`` it is: "experts", "shared" for the one that all tokens go through;
            empty elsewhere.
        expert: the number of one of the former.
        readers: the block linears that read it.
        size: values of a token.
        residual: whether it is the residual stream, as it is or behind a norm.
        norm: the norm whose output it is, which reads the residual stream; empty where it is none's.
        keeps_gain: whether that norm has a bias too. Its gain then stays in it, and a diagonal multiplies both; otherwise the
            gain is folded into the readers and the diagonal takes its place.
        unrounded: what else reads the norm's output, as it is: the router of a mixture of experts.
        source: where there is no norm, a linear and those of its rows that the channels are multiples of: values in
            attention's output, up in the FFN's. None where no diagonal is offered.
        power: of those rows that the channels are multiples of: 2 where they went through ReLU², else 1.
        groups: with ``source``, heads of the source; each head's rows stand for ``repeats`` neighbouring pieces of the site.
        repeats: query heads of a KV head in attention's output, 1 elsewhere.
    """

    kind: str
    readers: tuple[str, ...]
    size: int
    residual: bool = False
    norm: str = ""
    keeps_gain: bool = False
    unrounded: tuple[str, ...] = ()
    source: tuple[str, slice] | None = None
    power: int = 1
    groups: int = 1
    repeats: int = 1
    part: str = ""
    expert: int | None = None

    @property
    def diagonal(self) -> str:
        """What its diagonal is called; experts share a name, under which they have a row each."""
        return f"{self.kind}-{self.part}" if self.part else self.kind

    def scale_in(self, scales: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Its diagonal, ``[scale_size]``, among a layer's by their names; None where there is none."""
        scale = scales.get(self.diagonal)
        return scale if scale is None or self.expert is None else scale[self.expert]

    @property
    def scale_size(self) -> int:
        """Values of a diagonal that can be folded into what produces the site."""
        return self.size // self.repeats

    def source_scale(self, scale: torch.Tensor) -> torch.Tensor:
        """What the rows of the source are multiplied by for a diagonal ``[scale_size]`` of the site."""
        return scale if self.power == 1 else scale ** (1 / self.power)

    def channels(self, scale: torch.Tensor) -> torch.Tensor:
        """A diagonal ``[scale_size]`` as the site's channels have it, ``[size]``."""
        if self.repeats == 1:
            return scale
        return scale.reshape(self.groups, 1, -1).expand(-1, self.repeats, -1).reshape(-1)

    def shared(self, values: torch.Tensor) -> torch.Tensor:
        """Squares of channels ``[size]`` summed over those that have one entry of the diagonal, ``[scale_size]``."""
        return values.reshape(self.groups, self.repeats, -1).sum(1).reshape(-1)


@dataclass(frozen=True, slots=True)
class Branch:
    """One of the two ways through a layer, attention or FFN, from the residual stream and back to it.

    Args:
        entry: what its first linears read; another branch may read the same.
        output: what its writer reads; None where experts have one each.
        post_norm: the norm behind the writer, before its output is added; empty for none.
    """

    entry: Site
    output: Site | None
    post_norm: str
