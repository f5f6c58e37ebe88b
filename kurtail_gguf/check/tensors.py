"""A file's tensors beside those that were folded."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from kurtail_gguf.messages.errors import Differs
from kurtail_gguf.runtime import ggml
from kurtail_gguf.runtime.file_tensors import FileTensors

#: Relative error ‖W′ − W‖ / ‖W‖ above which a tensor is not what was folded, by its type. Tensors of the wrong basis or
#: order are at √2, one wrong head of nine at 0.47. GPTQ and tuning move weights farther than rounding does: 0.24 is the
#: most in SmolLM2-135M.
BOUNDS = {ggml.F32: 1e-4, ggml.Q8_0: 0.02, ggml.Q6_K: 0.05, ggml.Q4_0: 0.4, ggml.KT4: 0.4}
#: The same for biases and routers, which are not rounded, where the basis was found again from 4-bit tensors.
FOUND_AGAIN = 0.2
#: Below it a weight is nothing that a half-precision scale could hold.
_TINY = 1e-5


def compare(
    file: FileTensors, name: str, expected: npt.NDArray, expert: int | None = None, unrounded: float = BOUNDS[ggml.F32]
) -> float:
    """Relative error of a tensor; `Differs` where it is above its type's bound, or a scale is not usable.

    ``unrounded`` is the bound of what is in single precision.
    """
    check_shape(file, name, expected.shape, expert)
    if expected.ndim == 2:
        check_scales(file, name, expected, expert)
    found = file.values(name, expert).astype(np.float64)
    return bounded(file, name, float(np.square(found - expected).sum()), float(np.square(expected).sum()), expert, unrounded)


def check_shape(file: FileTensors, name: str, shape: tuple[int, ...], expert: int | None = None) -> None:
    """`Differs` where a tensor is missing or has another shape."""
    if name not in file:
        raise Differs(f"tensor {name} is missing")
    found = file.info(name).shape
    if tuple(found if expert is None else found[1:]) != tuple(shape):
        raise Differs(f"tensor {name} is {list(found)}, expected the model's {list(shape)}")


def check_scales(file: FileTensors, name: str, expected: npt.NDArray | None, expert: int | None = None) -> None:
    """`Differs` where a block's scale is not finite, or is 0 though its weights are not; None leaves out the latter."""
    scales = file.scales(name, expert)
    if scales is None:
        return
    where = _where(name, expert)
    bad = np.argwhere(~np.isfinite(scales))
    if len(bad):
        raise Differs(f"tensor {where}: the scale of row {bad[0][0]}, block {bad[0][1]} is {scales[tuple(bad[0])]}")
    if expected is not None:
        largest = np.abs(expected).reshape(*scales.shape, -1).max(-1)
        bad = np.argwhere((scales == 0) & (largest > _TINY))
        if len(bad):
            row, block = bad[0]
            weight = largest[row, block]
            raise Differs(f"tensor {where}: the scale of row {row}, block {block} is 0, but its weights reach {weight:.3g}")


def bounded(
    file: FileTensors, name: str, error: float, total: float, expert: int | None = None, unrounded: float = BOUNDS[ggml.F32]
) -> float:
    """Relative error of a tensor from sums of squares; `Differs` where it is above the bound of the tensor's type."""
    relative = math.sqrt(error / total) if total > 0 else math.sqrt(error)
    info = file.info(name)
    bound = unrounded if info.type_id == ggml.F32 else BOUNDS.get(info.type_id)
    where = _where(name, expert)
    if bound is None:
        raise Differs(f"tensor {where} has the type {info.type_name}, which convert never writes")
    # NaN is above every bound
    if not relative <= bound:
        limit = f"expected at most {bound:g}"
        raise Differs(f"tensor {where} ({info.type_name}) has a relative error of {relative:.3g}, {limit}")
    return relative


def _where(name: str, expert: int | None) -> str:
    return name if expert is None else f"{name} (expert {expert})"
