"""Products of a model's pass with its own weights, seen where torch computes them.

Whatever a module is called and however it keeps its weights, as a linear, or those of all experts of a layer in one tensor,
it multiplies by them through a handful of torch's functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

#: Functions that multiply their first argument by the second, ``[…, in, out]``.
_MATMUL = frozenset({"matmul", "__matmul__", "mm", "bmm", "_grouped_mm"})
#: Likewise the second by the third, and add the first.
_ADDMM = frozenset({"addmm", "baddbmm"})
#: As the first, with a weight ``[out, in]``.
_LINEAR = "linear"
#: Products of tokens in groups, each by another matrix.
_GROUPED = "_grouped_mm"


@dataclass(frozen=True, slots=True)
class Product:
    """A product with a weight.

    Args:
        parameter: what is multiplied by: ``[out, in]``, ``[in, out]``, or the same of all experts, ``[experts, …]``.
        transposed: whether the parameter is ``[…, in, out]``.
        expert: number of the matrix, where the parameter has several; None where all are multiplied by at once, or it is one.
        read: what is multiplied, ``[…, in]``; by all experts at once ``[experts, tokens, in]``, or the tokens of each group.
    """

    parameter: nn.Parameter
    transposed: bool
    expert: int | None
    read: Tensor


class Products(TorchFunctionMode):
    """While entered, tells of each product with one of some parameters, or with a view of one that is a whole matrix.

    Args:
        parameters: those of interest.
        told: called before a product is computed; what it returns is multiplied instead of what would have been.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], told: Callable[[Product], Tensor]) -> None:
        super().__init__()
        self._parameters = {id(one): one for one in parameters}
        self._told = told

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        at = 1 if name in _ADDMM else 0
        if (at or name in _MATMUL or name == _LINEAR) and len(args) > at + 1:
            product = self._product(args[at], args[at + 1], name == _LINEAR)
            if product is not None:
                args = (*args[:at], self._told(product), *args[at + 1 :])
                if name == _GROUPED and product.read.is_meta:
                    # the shapes that a device's kernel allows do not matter where nothing is computed
                    return product.read.new_empty(product.read.shape[0], args[1].shape[-1])
        return func(*args, **kwargs)

    def _product(self, read: Any, weight: Any, linear: bool) -> Product | None:
        if not isinstance(read, Tensor) or not isinstance(weight, Tensor) or weight.dim() < 2:
            return None
        found = self._parameters.get(id(weight if weight._base is None else weight._base))
        if found is None or weight.dim() > found.dim() or sorted(weight.shape[-2:]) != sorted(found.shape[-2:]):
            return None
        if weight.dim() == 3 and weight.shape[0] != found.shape[0]:
            return None
        columns = weight.dim() - (1 if linear else 2)
        expert = weight.storage_offset() // found.stride(0) if weight.dim() < found.dim() else None
        return Product(found, weight.stride(columns) != 1, expert, read)
