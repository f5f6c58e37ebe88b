"""transformers' experts as the runtime chose them, where its router had no clear choice.

Which of two experts is taken whose scores differ by less than single precision resolves is decided by how sums were rounded, and
every token after it sees another text. So the model is asked with the runtime's choices. Where few tokens of a layer are concerned they
take the runtime's shares too, as scores may be chosen by with a bias that shares do not have; what the shares are, the others prove.
Where many are, each takes the share that transformers gave to its own choice: of true ties they are the same, and of others
the model answers otherwise, and the proof fails.
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


#: Share of a layer's tokens up to which they are few.
_FEW = 0.05


@contextmanager
def follow(
    layers: nn.ModuleList, chosen: Mapping[int, npt.NDArray[np.int32]], weighed: Mapping[int, npt.NDArray[np.float32]]
) -> Iterator[dict[int, int]]:
    """While entered, experts of a model's layers are chosen as given.

    Args:
        layers: its decoder layers.
        chosen: by a layer's number, the experts of each token in order, int32 ``[tokens, experts]``; layers without are left alone.
        weighed: likewise the shares of those that are used, float32 ``[tokens, used]``.

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
            others, given_shares = (followed != experts).any(-1), weighed.get(layer)
            if given_shares is not None and given_shares.shape == shares.shape and others.float().mean() <= _FEW:
                followed[others] = ranked[others.cpu(), : experts.shape[1]].to(followed)
                shares = torch.where(others[:, None], torch.from_numpy(given_shares).to(shares), shares)
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
