"""transformers' experts as the runtime chose them, where its router had no clear choice.

Two experts whose scores differ by less than single precision resolves have the same share. Which of them is taken is decided by how
sums were rounded, and every token after it sees another text. So the model is asked with the runtime's choices, each with the
share that transformers gave to its own: where these were ties, nothing changes but rounding, and where they were not, the shares are
wrong, the model answers otherwise, and the proof fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kurtail_gguf.model.experts import routes


@contextmanager
def follow(layers: nn.ModuleList, chosen: Mapping[int, npt.NDArray[np.int32]]) -> Iterator[dict[int, int]]:
    """While entered, experts of a model's layers are chosen as given.

    Args:
        layers: its decoder layers.
        chosen: by a layer's number, the experts of each token in order, int32 ``[tokens, experts]``; layers without are left alone.

    Yields:
        By the layers' numbers, how many choices were others when the model was asked last.
    """
    changed: dict[int, int] = {}

    def hook(layer: int, ranked: Tensor) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = routes(module, args, kwargs)
            if given is None or len(given[0]) != len(ranked):
                return None
            x, experts, shares = given
            followed = replaced(experts, ranked[:, : experts.shape[1]].to(experts))
            changed[layer] = int((followed != experts).sum())
            return (x, followed, shares), {}

        return before

    hooks = [
        module.register_forward_pre_hook(hook(number, torch.from_numpy(chosen[number])), with_kwargs=True)
        for number, layer in enumerate(layers)
        for module in layer.modules()
        if number in chosen and any(one.dim() == 3 for one in module.parameters(recurse=False))
    ]
    try:
        yield changed
    finally:
        for one in hooks:
            one.remove()


def replaced(own: Tensor, given: Tensor) -> Tensor:
    """A token's experts ``[tokens, used]`` with those that are not among the given replaced by those that are given instead."""
    found = own.clone()
    lost = (own[:, :, None] != given[:, None, :]).all(-1)
    for token in torch.where(lost.any(-1))[0].tolist():
        found[token, lost[token]] = given[token][torch.isin(given[token], own[token], invert=True)]
    return found
