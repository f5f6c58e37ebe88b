"""What transformers' module of a layer's experts is called with."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn


def routes(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Tokens ``[n, in]``, the numbers of their experts, integers ``[n, used]``, and the shares of these ``[n, used]``.

    Args:
        module: any.
        args, kwargs: what it is called with.

    Returns:
        None where it is called with something else.
    """
    try:
        given = inspect.signature(module.forward).bind(*args, **kwargs).args
    except TypeError:
        return None
    if len(given) != 3 or any(not isinstance(one, Tensor) or one.dim() != 2 for one in given):
        return None
    x, experts, shares = given
    fits = experts.shape == shares.shape and len(x) == len(experts)
    return (x, experts, shares) if fits and not experts.is_floating_point() and shares.is_floating_point() else None
