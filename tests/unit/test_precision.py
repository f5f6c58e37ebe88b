"""Calibration passes whose linears multiply in bfloat16, as on a GPU, beside the same in single precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.method.calibration.capture import Capture, capture
from kurtail_gguf.method.fold.layer import LayerTransforms, fold_layer
from kurtail_gguf.method.quantize.quantized_prefix import QuantizedPrefix
from kurtail_gguf.model.loading.checkpoint import open_checkpoint
from kurtail_gguf.model.precision import forward_dtype, linear
from kurtail_gguf.model.runner import LayerRunner
from kurtail_gguf.model.sites import SITES
from kurtail_gguf.numerics.simulation.attention import CacheSettings
from kurtail_gguf.numerics.simulation.runtime import RuntimeRounding

CPU = torch.device("cpu")
IDS = np.random.default_rng(1).integers(3, 320, (6, 32)).astype(np.int32)
#: Half a unit in the last of bfloat16's 8 bits.
HALF_ULP = 2.0**-9
#: Relative error, as ‖Δ‖ / ‖·‖, of what two layers make of three roundings a product, found to be a third of this.
ONLINE = dict.fromkeys(SITES, 64)
BOUND = 6 * HALF_ULP


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_the_cpu_multiplies_in_single_precision(tiny_checkpoint):
    assert forward_dtype(CPU) == torch.float32
    runner = LayerRunner(open_checkpoint(tiny_checkpoint()), CPU, 8)
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in runner.module(0).modules())


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "phi3", "mixtral"])
def test_samples_are_those_of_single_precision_within_a_bound(tiny_checkpoint, tmp_path, kind):
    checkpoint = open_checkpoint(tiny_checkpoint(kind, dtype=torch.bfloat16))
    found: dict[torch.dtype, Capture] = {}
    for dtype in (torch.float32, torch.bfloat16):
        directory = tmp_path / str(dtype)
        directory.mkdir()
        found[dtype] = capture(checkpoint, IDS, directory, 0, CPU, NullProgress(), multiplied_in=dtype)
    single, narrow = found.values()
    # no product stands before the first norm
    assert np.array_equal(narrow.site(0, "attention"), single.site(0, "attention"))
    worst = 0.0
    for layer in range(2):
        names = [(what, layer, kind) for what in ("site", "readers") for kind in ("attention", "ffn")] + [("values", layer)]
        known = (*SITES[:3], "ffn-output-experts") if kind == "mixtral" else SITES
        names += [(what, layer, one) for what in ("channels", "columns") for one in known]
        for name, *arguments in names:
            pair = (getattr(capture, name)(*arguments) for capture in (narrow, single))
            error = _relative(*pair)
            worst = max(worst, error)
            assert error < (2 if name == "columns" else 1) * BOUND, (name, arguments)
            assert next(pair, None) is None
    assert worst > HALF_ULP / 10, "nothing was rounded"
    # what a linear reads is seen as it was before the linear rounds it
    channels = torch.from_numpy(narrow.channels(0, known[3]))
    assert channels.dtype == torch.float32 and not torch.equal(channels, channels.bfloat16().float())


@pytest.mark.parametrize("kind", ["qwen2", "mixtral"])
def test_hessians_are_those_of_single_precision_within_a_bound(tiny_checkpoint, tmp_path, kind):
    checkpoint = open_checkpoint(tiny_checkpoint(kind))
    spec = checkpoint.spec
    table = checkpoint.tensor(f"{spec.family.embedding}.weight").numpy()
    # halves: with few bits a value's last one decides over a whole step, and a bound would say nothing
    rounding = RuntimeRounding(16, 64, ONLINE, CacheSettings(bits=16, rotation=0, rotate_v=False, paired=False))
    seen = []
    for dtype in (torch.float32, torch.bfloat16):
        directory = tmp_path / str(dtype)
        directory.mkdir()
        prefix = QuantizedPrefix(checkpoint, IDS, lambda ids: table[ids], rounding, directory, CPU, dtype)
        stops = {}

        def quantize(names, hessian, stops=stops, layer=0):
            stops[len(stops), names] = hessian()
            return {}

        for layer in range(spec.layers):
            folded = fold_layer(checkpoint.layer(layer), spec, LayerTransforms(online=ONLINE))
            prefix.run_layer(layer, folded, quantize)
        stops["hidden", ()] = torch.from_numpy(prefix._hidden[:])
        prefix.close()
        seen.append((stops, prefix.kurtosis))
    (single, kurtosis), (narrow, narrow_kurtosis) = seen
    assert single.keys() == narrow.keys()
    assert narrow_kurtosis == pytest.approx(kurtosis, rel=BOUND)
    for key, expected in single.items():
        assert narrow[key].dtype == torch.float32
        # a square has twice the error
        error = _relative(narrow[key].numpy(), expected.numpy())
        assert error < 2 * BOUND, (key, error)
    assert not torch.equal(narrow["hidden", ()], single["hidden", ()])


def test_a_product_in_bfloat16_rounds_inputs_and_result_and_adds_the_bias_whole():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 64, generator=generator), torch.randn(7, 64, generator=generator)
    bias = torch.linspace(1000, 1001, 7)
    plain = linear(x, weight, torch.float32, bias)
    assert torch.equal(plain, torch.nn.functional.linear(x, weight, bias))
    found = linear(x, weight, torch.bfloat16, bias)
    exact = (x.bfloat16().double() @ weight.bfloat16().double().T).float()
    assert found.dtype == torch.float32
    # of the product's last bit, not of the bias's: that would be 4
    assert ((found - bias) - exact).abs().max() <= exact.abs().max() * 2 * HALF_ULP + 1e-4
