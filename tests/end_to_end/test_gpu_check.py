"""tools/gpu_check's step that converts a checkpoint on the card and on the CPU, with the CPU in the card's place."""

from __future__ import annotations

import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

from kurtail_gguf import native
from kurtail_gguf.calibration.texts import read_texts
from kurtail_gguf.calibration.tokens import load_tokenizer, tokenize

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    loader = SourceFileLoader("gpu_check", str(TOOLS / "gpu_check"))
    spec = spec_from_loader("gpu_check", loader)
    assert spec is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)  # dataclasses look their module up
    loader.exec_module(module)
    return module


def test_a_checkpoint_is_converted_twice_and_measured(gpu_check, tiny_spm, text, tmp_path) -> None:
    place = gpu_check.Place(native.executable("llama-perplexity").parent, "CPU", tmp_path)
    found = gpu_check.measure_learning(place, gpu_check.converter(), str(tiny_spm), text, tmp_path / "learned")
    card, cpu = found["card"], found["cpu"]
    # both are the CPU's here, and a conversion is repeatable
    files = [Path(one["out"]).read_bytes() for one in (card, cpu)]
    assert files[0] == files[1] and card["out"] != cpu["out"]
    assert card["perplexity"] == cpu["perplexity"] > 1
    assert card["seconds"].keys() == cpu["seconds"].keys() >= {"rotations", "quantize", "export"}
    assert card["device"] == cpu["device"] == "cpu" and not card["resumed"]
    assert card["kurtail"]["tune_steps"] == gpu_check.LEARNED_STEPS


def test_the_default_text_is_enough_to_learn_from(gpu_check, smollm2, tmp_path) -> None:
    text = gpu_check.default_text(tmp_path)
    gpu_check.check_text(text, learn=True)
    ids = tokenize(read_texts((str(text),)), load_tokenizer(smollm2), gpu_check.LEARNED_TOKENS)
    assert ids.size == gpu_check.LEARNED_TOKENS


def test_a_file_agrees_with_itself(gpu_check, converted, tiny_spm, text, tmp_path) -> None:
    place = gpu_check.Place(native.executable("llama-perplexity").parent, "CPU", tmp_path)
    logits = gpu_check.check_logits(place, converted(tiny_spm, "--rotation", "hadamard", "--weights", "rtn"), text)
    # the base is kept in 16 bits
    assert logits["kld"] == pytest.approx(0, abs=1e-3) and logits["loss"] == pytest.approx(0, abs=1e-3)
    assert logits["top1"] > 99


def test_a_model_that_cannot_be_learned_is_one_line(gpu_check, text, tmp_path) -> None:
    place = gpu_check.Place(tmp_path, "CPU", tmp_path)
    with pytest.raises(gpu_check.ToolError, match="convert --device cpu failed"):
        gpu_check.measure_learning(place, gpu_check.converter(), str(tmp_path / "nothing"), text, tmp_path / "learned")
