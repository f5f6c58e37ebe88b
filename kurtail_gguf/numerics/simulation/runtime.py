"""What the runtime rounds and rotates in a layer, as one value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from kurtail_gguf.numerics.simulation.attention import CacheSettings, rotated
from kurtail_gguf.numerics.simulation.rounding import round_to


@dataclass(frozen=True, slots=True)
class RuntimeRounding:
    """What the runtime does to a layer's activations.

    Args:
        activation_bits: of what enters the block linears, but for the exceptions.
        activation_block: values that share a scale there.
        online: sizes of the Hadamard blocks that sites are multiplied by, by their kinds (kurtail_gguf/model/sites.py).
        cache: bits of the KV cache, and R3.
        exceptions: other bits of single linears, by their weights' full names (``model.layers.0.mlp.up_proj.weight``).
        watch: told of everything that :meth:`activations` rounds, before and after; it changes nothing.
        rounded: rounds activations, as :func:`round_to` does to the bit.
    """

    activation_bits: int
    activation_block: int
    online: Mapping[str, int]
    cache: CacheSettings
    exceptions: Mapping[str, int] = field(default_factory=dict)
    watch: Callable[[Tensor, Tensor], None] | None = None
    rounded: Callable[[Tensor, int, int], Tensor] = field(default=round_to, compare=False)

    def bits_of(self, weight: str) -> int:
        """Bits of what enters the block linear of this weight."""
        return self.exceptions.get(weight, self.activation_bits)

    def online_of(self, kind: str) -> int:
        """Size of the Hadamard blocks at a site of this kind, 0 for none."""
        return self.online.get(kind, 0)

    def activations(self, x: Tensor, kind: str) -> Tensor:
        """``x`` as the block linears of a site see it that are no exceptions, in the same shape."""
        x = rotated(x, self.online_of(kind))
        rounded = self.rounded(x, self.activation_bits, self.activation_block)
        if self.watch is not None:
            self.watch(x, rounded)
        return rounded
