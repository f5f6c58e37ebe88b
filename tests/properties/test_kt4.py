"""Format kt4: the reference quantizer's formula, and its traps."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kurtail_gguf.numerics.formats import kt4

FINITE = st.floats(-(2.0**100), 2.0**100, width=32)


def _scalar_reference(block: np.ndarray) -> tuple[list[int], np.float16]:
    """docs/format.md, step by step, one float32 or one integer at a time."""
    f = np.float32
    m = f(0)
    for x in block:
        if abs(x) > abs(m):
            m = x
    with np.errstate(divide="ignore", over="ignore"):
        inverse = f(f(1) / f(m / f(-8)))
    if not math.isfinite(inverse):
        inverse = f(0)
    whole = [round(float(f(f(x * inverse) * f(1024)))) for x in block]  # Python's round takes ties to even
    best, best_codes, best_error = 0, [], math.inf
    for level in kt4.LEVELS:
        codes = [max(-8, min(7, math.floor(Fraction(y * level, 2**15) + Fraction(1, 2)))) for y in whole]
        step = round(Fraction(2**15, level))
        error = sum((y - step * q) ** 2 for y, q in zip(whole, codes, strict=True))
        if error < best_error:
            best, best_codes, best_error = level, codes, error
    d = f(m / f(-best / 4))
    return best_codes, np.float16(min(max(d, f(-65504)), f(65504)))


@given(hnp.arrays(np.float32, 64, elements=FINITE))
def test_reference_is_the_formula(block):
    codes, scales = kt4.quantize_reference(block)
    expected_codes, expected_scale = _scalar_reference(block)
    assert codes.tolist() == expected_codes
    assert scales[0].tobytes() == expected_scale.tobytes()
    assert codes.min() >= -8
    assert codes.max() <= 7


@pytest.mark.parametrize("distribution", ["normal", "laplace", "uniform"])
def test_the_search_finds_the_best_of_its_scales(distribution):
    """In plain float64 arithmetic: nothing of the whole numbers the search is made of."""
    rng = np.random.default_rng(3)
    x = getattr(rng, distribution)(size=(500, 64)).astype(np.float32)
    found = np.square(kt4.dequantize(*kt4.quantize_reference(x)) - x, dtype=np.float64).sum(-1)
    signed_max = np.take_along_axis(x, np.abs(x).argmax(-1)[:, None], -1).astype(np.float64)
    errors = []
    for level in kt4.LEVELS:
        scale = signed_max / (-level / 4)
        errors.append(np.square(np.clip(np.rint(x / scale), -8, 7) * scale - x).sum(-1))
    # whole numbers and the half scale are off by a thousandth of a step
    assert (found <= np.min(errors, 0) * 1.01).all()
    assert found.sum() < 0.95 * errors[0].sum()  # against "the largest value to -8"


def test_levels_are_the_headers():
    header = (Path(__file__).parents[2] / "cpp_patches" / "src" / "kt4.h").read_text(encoding="utf-8")
    levels = re.search(r"^#define KT4_LEVELS \{(.*?)\}", header, re.MULTILINE)[1]
    assert tuple(map(int, levels.split(","))) == kt4.LEVELS
    assert int(re.search(r"^#define KT4_UNIT (\d+)", header, re.MULTILINE)[1]) == kt4.UNIT
    assert all(16 <= abs(level) <= 56 for level in kt4.LEVELS)  # the limits the simulation's floats rely on


@given(hnp.arrays(np.float32, (2, 128), elements=st.floats(-1000, 1000, width=32)))
def test_error_is_at_most_that_of_the_worst_value(x):
    codes, scales = kt4.quantize_reference(x)
    error = np.abs(kt4.dequantize(codes, scales) - x).reshape(2, 2, 64)
    largest = np.abs(x).reshape(2, 2, 64).max(-1)
    steps = largest / (min(map(abs, kt4.LEVELS)) / 4)
    # Half a step where nothing is clipped; at the ends what the levels leave beyond -8 and +7. The
    # whole numbers add 2^-11 of a step of the plain scale, rounding to half 2^-11 of the value or its
    # smallest denormal times the code.
    beyond = largest * (1 - 7 / (max(map(abs, kt4.LEVELS)) / 4))
    bound = np.maximum(steps / 2, beyond) * 1.001 + largest * 2.0**-10 + 8 * 2.0**-24
    assert (error <= bound[..., None]).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_first_largest_value_decides_the_sign(sign):
    block = np.zeros(64, np.float32)
    block[[3, 9]] = 2 * sign, -2 * sign
    codes, scales = kt4.quantize_reference(block)
    assert scales[0] == np.float16(sign * 2 / -7.25)  # the level nearest to 7, for +8 does not exist
    assert codes[[3, 9]].tolist() == [-7, 7]


def test_a_tie_rounds_up():
    block = np.tile(np.arange(-8, 8, dtype=np.float32), 4)  # exact under the plain scale alone
    block[[20, 21, 22]] = 2.5, -2.5, 3.5
    codes, scales = kt4.quantize_reference(block)
    assert scales[0] == 1
    assert codes[[0, 20, 21, 22]].tolist() == [-8, 3, -2, 4]


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-40, 1e-39])
def test_zeros_and_denormals_give_zero_scale(value):
    codes, scales = kt4.quantize_reference(np.full(64, value, np.float32))
    assert scales[0] == 0
    assert np.isfinite(kt4.dequantize(codes, scales)).all()


def test_huge_values_stay_finite():
    codes, scales = kt4.quantize_reference(np.full(64, 3e38, np.float32))
    assert scales[0] == -65504
    assert (codes == codes[0]).all()
    assert codes[0] <= -7
