"""Activations as a conversion's transforms make them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from kurtail_gguf.method.fold.transforms import Transforms
from kurtail_gguf.numerics.hadamard import walsh_hadamard_


def transformed(
    sites: Sequence[npt.NDArray[np.floating]], kinds: Sequence[str], transforms: Transforms
) -> Sequence[npt.NDArray[np.float32]] | None:
    """What is rounded where the residual stream is read.

    Args:
        sites: x̂ ``[tokens, hidden]`` at the sites of ``kinds`` of each layer in turn, before the norm's gain.
        kinds: of a layer's sites.
        transforms: of the conversion.

    Returns:
        The same, float32, each computed when it is asked for; None where all is left as it is.
    """
    if transforms.r1 is None and not any(kind in {**transforms.scales, **transforms.online} for kind in kinds):
        return None

    def at(number: int) -> npt.NDArray[np.float32]:
        layer, kind = number // len(kinds), kinds[number % len(kinds)]
        x = np.array(sites[number], np.float32)
        if transforms.r1 is not None:
            x = x @ transforms.r1.astype(np.float32)
        if kind in transforms.scales:
            x = x * transforms.scales[kind][layer].astype(np.float32)
        return walsh_hadamard_(np.ascontiguousarray(x), max(1, transforms.online.get(kind, 0)))

    return _Computed(at, len(sites))


class _Computed(Sequence[npt.NDArray[np.float32]]):
    def __init__(self, compute: Callable[[int], npt.NDArray[np.float32]], length: int) -> None:
        self._compute, self._length = compute, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number):
        if not 0 <= number < self._length:
            raise IndexError(number)
        return self._compute(number)
