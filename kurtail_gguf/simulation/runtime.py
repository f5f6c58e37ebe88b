"""What the runtime rounds and rotates in a layer, as one value."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kurtail_gguf.simulation.attention import CacheSettings
from kurtail_gguf.simulation.rounding import round_to


@dataclass(frozen=True, slots=True)
class RuntimeRounding:
    """What the runtime does to a layer's activations.

    Args:
        activation_bits: of what enters the block linears.
        activation_block: values that share a scale there.
        r4: size of R4's Hadamard blocks before down_proj, 0 for none.
        cache: bits of the KV cache, and R3.
    """

    activation_bits: int
    activation_block: int
    r4: int
    cache: CacheSettings

    def activations(self, x: Tensor) -> Tensor:
        """``x`` as a block linear sees it, in the same shape."""
        return round_to(x, self.activation_bits, self.activation_block)
