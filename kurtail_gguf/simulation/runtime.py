"""What the runtime rounds and rotates in a layer, as one value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from kurtail_gguf.simulation.attention import CacheSettings
from kurtail_gguf.simulation.rounding import round_to


@dataclass(frozen=True, slots=True)
class RuntimeRounding:
    """What the runtime does to a layer's activations.

    Args:
        activation_bits: of what enters the block linears, but for the exceptions.
        activation_block: values that share a scale there.
        r4: size of R4's Hadamard blocks before down_proj, 0 for none.
        cache: bits of the KV cache, and R3.
        exceptions: other bits of single linears, by their weights' full names (``model.layers.0.mlp.up_proj.weight``).
        watch: told of everything that :meth:`activations` rounds, before and after; it changes nothing.
    """

    activation_bits: int
    activation_block: int
    r4: int
    cache: CacheSettings
    exceptions: Mapping[str, int] = field(default_factory=dict)
    watch: Callable[[Tensor, Tensor], None] | None = None

    def bits_of(self, weight: str) -> int:
        """Bits of what enters the block linear of this weight."""
        return self.exceptions.get(weight, self.activation_bits)

    def activations(self, x: Tensor) -> Tensor:
        """``x`` as a block linear that is no exception sees it, in the same shape."""
        rounded = round_to(x, self.activation_bits, self.activation_block)
        if self.watch is not None:
            self.watch(x, rounded)
        return rounded
