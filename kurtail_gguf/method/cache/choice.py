"""How many bits each layer's keys and values get, by the divergence that they cause at four."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kurtail_gguf.runtime.provenance import cached_value_bits

#: Divergence in nats a token that one layer's keys, or values, may cause at 4 bits. What causes more gets 8 whatever the
#: budget says, and 16 where that is still too much.
LIMIT = 0.02
#: What is left of a rounding error's energy with 8 bits instead of 4: steps are (7.5 / 127)² as large.
EIGHT_BITS_LEAVE = (7.5 / 127) ** 2
#: Total divergence that no more bits are spent on.
GOOD_ENOUGH = 0.005


@dataclass(frozen=True, slots=True)
class CacheBits:
    """Bits of each layer's keys and values.

    Args:
        k, v: 4, 8 or 16 a layer.
        forced: names ("k3") of what had to have more than 4, whatever the budget.
    """

    k: tuple[int, ...]
    v: tuple[int, ...]
    forced: tuple[str, ...] = ()

    @property
    def mean(self) -> float:
        """Bits of a value on average, the scales of blocks of 32 included."""
        costs = [cached_value_bits(bits) for bits in (*self.k, *self.v)]
        return sum(costs) / len(costs)


def uniform(bits: int, layers: int) -> CacheBits:
    """The same bits everywhere."""
    return CacheBits((bits,) * layers, (bits,) * layers)


def choose_bits(damages: Mapping[str, float], layers: int, budget: float) -> CacheBits:
    """Four bits, and more where the damage is.

    Args:
        damages: nats a token that rounding to 4 bits causes, by "k0", "v0", "k1" and so on; below 0 is none.
        layers: how many there are.
        budget: bits of a value on average that may be spent, scales included: 4.5 is four bits everywhere.

    Returns:
        Everything that damages more than :data:`LIMIT` has at least 8 bits; of the rest the worst have 8 for as long as the
        budget lasts and more than :data:`GOOD_ENOUGH` is left in all.
    """
    bits = {f"{side}{layer}": 4 for layer in range(layers) for side in "kv"}
    forced = [name for name in bits if damages[name] > LIMIT]
    for name in forced:
        bits[name] = 8 if damages[name] * EIGHT_BITS_LEAVE <= LIMIT else 16
    left = sum(max(0.0, damages[name]) for name, chosen in bits.items() if chosen == 4)
    spent = sum(cached_value_bits(chosen) for chosen in bits.values())
    for name in sorted((name for name in bits if bits[name] == 4), key=lambda name: -damages[name]):
        step = cached_value_bits(8) - cached_value_bits(4)
        if left <= GOOD_ENOUGH or damages[name] <= 0 or spent + step > budget * len(bits) + 1e-9:
            break
        bits[name] = 8
        spent += step
        left -= damages[name]
    return CacheBits(
        tuple(bits[f"k{layer}"] for layer in range(layers)), tuple(bits[f"v{layer}"] for layer in range(layers)), tuple(forced)
    )
