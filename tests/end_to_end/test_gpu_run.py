"""The steps of tools/gpu_run that need the runtime and the package, with the CPU in the GPU's place."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from types import ModuleType

import pytest

from kurtail_gguf.runtime import native

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("gpu_steps")


@pytest.fixture
def place(steps, tiny_spm, text, tmp_path: Path):
    """What the parts would be unpacked to: the installed programs, a model, a text."""
    (tmp_path / "bin").symlink_to(native.executable("llama-perplexity").parent)
    (tmp_path / "model.gguf").symlink_to(tiny_spm)
    (tmp_path / "text.txt").symlink_to(text)
    found = steps.Place(tmp_path, "CPU", tmp_path / "steps.log")
    found.deadline = time.monotonic() + 900
    return found


def test_conversions_and_logits_are_compared(steps, place) -> None:
    run = {step.name: step.run for step in steps.STEPS}
    assert run["start conversions"](place)[1] == []
    converted, wrong = run["convert"](place)
    assert wrong == [] and converted["device"] == "cpu" and converted["seconds"].keys() >= {"rotations", "quantize", "export"}
    learned, wrong = run["learned"](place)
    # both are the CPU's here, and a conversion is repeatable
    assert wrong == [] and learned["gpu"] == learned["cpu"] > 1
    assert (place.work / "learned.gguf").read_bytes() == (place.work / "learned-cpu.gguf").read_bytes()
    for name in steps.LOGITS:
        found, wrong = run[f"logits {name}"](place)
        # the base is kept in 16 bits
        assert wrong == [] and abs(found["kld"]) < 1e-3 and found["top1"] > 99
        assert found["splits"] == 1 and found["weights_mib"]["CPU_KT4"] > 0


@pytest.mark.parametrize("name", ["W4A4KV4, first layer", "W4A4KV16, first layer", "W4A8KV4, first layer", "W4A8KV16"])
def test_a_faulty_group_of_rows_is_beyond_the_limit(steps, place, name: str) -> None:
    """16 rows of one product of a layer computed as zeros, as a tile that is never written would leave them."""
    steps.start_conversions(place)
    place.finished("logits-file")
    header = importlib.import_module("gguf_header")
    bits = steps.LOGITS[name]
    good, faulty = place.work / "good.gguf", place.work / "faulty.gguf"
    steps.prepare(bits, place.work / "logits.gguf", good)
    steps.prepare(bits, place.work / "logits.gguf", faulty)
    number, values, size = steps.TYPES["kt4"]
    tensors = [tensor for key, tensor in header.read_header(faulty).tensors.items() if key.endswith(".ffn_up.weight")]
    assert len(tensors) == (bits.layers or 2)
    with faulty.open("r+b") as f:
        for shape, kind, begin in tensors:
            assert kind == number
            row = shape[0] // values * size
            f.seek(begin + 64 * row)
            f.write(bytes(16 * row))
    found, _ = steps.compare(place, good, faulty, bits.cache)
    assert steps.report.divergence_complaints(found, bits.limit), found


def test_a_conversion_that_fails_is_one_line(steps, place) -> None:
    (place.work / "model.gguf").unlink()
    with pytest.raises(steps.ToolError, match="failed with status 1: error: .*model.gguf"):
        steps.convert(place)
    steps.start_conversions(place)
    with pytest.raises(steps.ToolError, match="logits-file failed: error: "):
        steps.logits("W4A8KV16", place)


def test_speeds_and_products_of_tiny_models(steps, place, runtime) -> None:
    (place.work / "gguf-py").symlink_to(native.python_dir())
    run = {step.name: step.run for step in steps.STEPS}
    assert run["write models"](place)[1] == []
    for kind in steps.TYPES:
        found, wrong = run[f"7b {kind}"](place)
        assert wrong == [] and len(found["tokens_per_s"]) == 10 and min(found["tokens_per_s"].values()) > 0
    assert found.keys() == {"tokens_per_s"}
