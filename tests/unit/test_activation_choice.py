"""``--activations auto``: which linears are chosen, and what becomes of the choice up to the exporter."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kurtail_gguf.convert import pipeline
from kurtail_gguf.convert.settings import ConvertConfig
from kurtail_gguf.convert.stages import tune
from kurtail_gguf.convert.stages.activations import chosen_linears
from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.method.activations import choice as activation_choice
from kurtail_gguf.method.activations.choice import choose
from kurtail_gguf.method.tuning import layer_files
from kurtail_gguf.model.loading.checkpoint import open_checkpoint
from kurtail_gguf.numerics.formats import kt4

_LINEARS = st.lists(st.tuples(st.integers(-40, 200), st.integers(1, 30)), min_size=1, max_size=9)
_BUDGETS = st.integers(1, 63).map(lambda parts: parts / 64)  # exact in binary, so that sums are too


def _named(linears) -> tuple[dict[str, float], dict[str, int]]:
    damages = {f"linear {number}": float(damage) for number, (damage, _) in enumerate(linears)}
    return damages, {f"linear {number}": cost for number, (_, cost) in enumerate(linears)}


@given(_LINEARS, _BUDGETS)
def test_within_the_budget_in_the_order_of_damage_by_cost(linears, budget):
    damages, costs = _named(linears)
    chosen = choose(damages, costs, budget)
    allowed = budget * sum(costs.values())
    assert sum(costs[name] for name in chosen) <= allowed
    assert len(set(chosen)) == len(chosen) and all(damages[name] > 0 for name in chosen)
    worth = {name: damages[name] / costs[name] for name in damages}
    assert [worth[name] for name in chosen] == sorted((worth[name] for name in chosen), reverse=True)
    for name in damages.keys() - set(chosen):
        # what was left out is harmless, or what was taken before it did not leave enough
        before = sum(costs[other] for other in chosen if worth[other] >= worth[name])
        assert damages[name] <= 0 or before + costs[name] > allowed


@given(_LINEARS, _BUDGETS)
def test_no_choice_within_the_budget_is_much_better(linears, budget):
    """Dantzig's bound: the best sum is less than the greedy one and the first linear that did not fit together."""
    damages, costs = _named(linears)
    chosen = choose(damages, costs, budget)
    allowed = budget * sum(costs.values())
    subsets = itertools.chain.from_iterable(itertools.combinations(damages, n) for n in range(len(damages) + 1))
    best = max(
        sum(damages[name] for name in subset) for subset in subsets if sum(costs[n] for n in subset) <= allowed
    )
    found = sum(damages[name] for name in chosen)
    assert found <= best
    ranked = sorted((n for n in damages if damages[n] > 0), key=lambda n: -damages[n] / costs[n])
    missed = next((damages[name] for name in ranked if name not in chosen), 0.0)
    assert best <= found + missed
    if len(set(costs.values())) == 1:
        assert found == best


def test_a_large_linear_that_does_not_fit_leaves_its_turn():
    damages = {"a": 5.0, "b": 90.0, "c": 8.0, "d": 0.0, "e": -3.0, "f": 5.0}
    costs = {"a": 10, "b": 100, "c": 10, "d": 10, "e": 10, "f": 10}
    assert choose(damages, costs, 0.2) == ("c", "a", "f")  # b is worth most, and more than 30 of 150
    assert choose(damages, costs, 0.14) == ("c", "a")  # of equals the first
    assert choose(damages, costs, 0.8) == ("b", "c", "a")
    assert choose(damages, costs, 0.05) == ()


def test_experts_of_one_tensor_are_chosen_together(tiny_checkpoint):
    """For what a token costs: the experts it goes through."""
    spec = open_checkpoint(tiny_checkpoint("qwen3-moe")).spec
    damages = {f"model.layers.{layer}.{name}.weight": 0.0 for layer in range(spec.layers) for name in spec.linears}
    damages["model.layers.1.mlp.experts.2.up_proj.weight"] = 1.0
    together = {f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in range(spec.experts)}
    shapes = spec.linear_shapes()
    once = math.prod(shapes["mlp.experts.0.up_proj"])
    alone = sum(math.prod(shape) for name, shape in shapes.items() if "experts" not in name)
    total = spec.layers * (alone + 3 * spec.experts_used * once)
    assert set(chosen_linears(spec, damages, 1.001 * spec.experts_used * once / total)) == together
    assert chosen_linears(spec, damages, 0.999 * spec.experts_used * once / total) == ()


@pytest.fixture
def exported(exported, plain_embedding, monkeypatch):
    monkeypatch.setattr(activation_choice, "DAMAGE_TOKENS", 512)
    return exported


def _config(model: Path, tmp_path: Path, text: Path, **changes) -> ConvertConfig:
    options = {"rotation": "hadamard", "weights": "rtn", "activations": "auto", "budget": 0.3} | changes
    return ConvertConfig(
        str(model), tmp_path / "o.gguf", calibration=(str(text),), calibration_tokens=1024, device="cpu",
        work_dir=tmp_path / "w", **options,
    )  # fmt: skip


def test_the_choice_reaches_file_and_provenance_and_is_taken_over(tiny_checkpoint, tmp_path, exported, text, recorder):
    model = tiny_checkpoint("llama")
    config = _config(model, tmp_path, text)
    result = pipeline.convert(config, recorder)
    assert [name for name, *_ in recorder.stages] == [
        "prepare keys", "measure the cache's damage", "measure the cache", "fold embedding and head", "fold and quantize",
        "run the unquantized model", "measure damage",
    ]  # fmt: skip
    assert all(done == total for _, total, done in recorder.stages)
    provenance, chosen = exported[0].provenance, tuple(exported[0].bits)
    assert (provenance.activation_bits, provenance.activation_choice) == (4, "auto")
    assert provenance.activation_budget == pytest.approx(0.3) == float(np.float32(0.3))
    assert provenance.calibration_tokens == 1024  # hadamard and rtn read no text by themselves
    assert "measure damage" in result.seconds
    stored = json.loads((tmp_path / "w" / "damage.json").read_text())
    spec = open_checkpoint(model).spec
    costs = {f"model.layers.{i}.{name}.weight": math.prod(spec.linear_shape(name)) for i in range(2) for name in spec.linears}
    assert list(stored["damage"]) == list(costs)
    assert stored["tokens"] == 512 and stored["divergence"] > 0
    assert chosen == choose(stored["damage"], costs, 0.3)
    assert set(exported[0].bits.values()) == {8}
    assert 0 < sum(costs[name] for name in chosen) <= 0.3 * sum(costs.values())
    assert not (tmp_path / "w" / "measuring").exists()

    recorder.stages.clear()
    pipeline.convert(config, recorder)
    assert [name for name, *_ in recorder.stages] == ["fold embedding and head", "reuse finished layers"]
    assert exported[1] == exported[0]
    with pytest.raises(KurtailError, match=r"budget was 0.3, now 0.5"):
        pipeline.convert(dataclasses.replace(config, budget=0.5), NullProgress())
    with pytest.raises(KurtailError, match=r"activations was auto, now 4"):
        pipeline.convert(dataclasses.replace(config, activations=4, budget=None), NullProgress())


def test_an_interrupted_measurement_leaves_no_choice(tiny_checkpoint, tmp_path, exported, text, monkeypatch):
    class Interrupted(Exception):
        pass

    config = _config(tiny_checkpoint("llama"), tmp_path, text)

    def failing(*arguments):
        raise Interrupted

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(activation_choice, "measure", failing)
        pipeline.convert(config, NullProgress())
    assert not (tmp_path / "w" / "damage.json").exists() and not exported
    pipeline.convert(config, NullProgress())
    again = dataclasses.replace(config, work_dir=tmp_path / "other")
    pipeline.convert(again, NullProgress())
    assert exported[0] == exported[1]


def test_tuning_runs_with_the_chosen_bits_and_leaves_codes_alone(tiny_checkpoint, tmp_path, exported, text, monkeypatch):
    seen = []
    original = tune.tune

    def watched(checkpoint, ids, quantized, block_format, rounding, *rest):
        seen.append(rounding)
        return original(checkpoint, ids, quantized, block_format, rounding, *rest)

    monkeypatch.setattr(tune, "tune", watched)
    pipeline.convert(_config(tiny_checkpoint("llama"), tmp_path, text, tune=2), NullProgress())
    (rounding,) = seen
    provenance, chosen = exported[0].provenance, tuple(exported[0].bits)
    assert rounding.activation_bits == 4 and dict(rounding.exceptions) == dict.fromkeys(chosen, 8)
    assert provenance.tune_steps == 2
    from safetensors.numpy import load_file

    for layer in range(2):
        name = f"layer-{layer:05d}.safetensors"
        before, after = (load_file(tmp_path / "w" / part / name) for part in ("quantized", "tuned"))
        for weight in (weight for weight, value in before.items() if value.dtype == np.uint8):
            assert np.array_equal(kt4.unpack(before[weight])[0], kt4.unpack(after[weight])[0])


def test_gptq_rounds_all_alike_while_it_calibrates(tiny_checkpoint, tmp_path, exported, text):
    """The weights of auto are those of 4: nothing is quantized again for the choice."""
    from safetensors.numpy import load_file

    model, made = tiny_checkpoint("llama"), {}
    for activations, budget in (("auto", 0.3), (4, None)):
        config = _config(
            model, tmp_path, text, weights="gptq", activations=activations, budget=budget
        )
        config = dataclasses.replace(config, work_dir=tmp_path / f"w{activations}")
        pipeline.convert(config, NullProgress())
        made[activations] = load_file(config.work_dir / "quantized" / "layer-00001.safetensors")
    assert all(np.array_equal(value, made[4][name]) for name, value in made["auto"].items())
    assert [len(call.bits) > 0 for call in exported] == [True, False]
    assert [call.provenance.activation_choice for call in exported] == ["auto", "fixed"]


def test_a_model_that_does_not_fit_is_refused_before_any_work(tiny_checkpoint, tmp_path, exported, text, monkeypatch, recorder):
    monkeypatch.setattr(layer_files, "memory_available", lambda device: 1000)
    with pytest.raises(KurtailError, match=r"--activations auto needs about .* GB, 0.0 GB are free on cpu: give"):
        pipeline.convert(_config(tiny_checkpoint("llama"), tmp_path, text), recorder)
    assert not recorder.stages and not (tmp_path / "w").exists()
