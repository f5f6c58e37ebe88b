"""The converter on a device that is not the CPU (card_device.py). Run by test_device.py in a process of its own."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from card_device import CARD, MEMORY, MODULE
from torch.nn.attention import SDPBackend, sdpa_kernel

from kurtail_gguf.convert import pipeline
from kurtail_gguf.convert import plan as planning
from kurtail_gguf.convert.plan import plan
from kurtail_gguf.convert.settings import ConvertConfig
from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.method.calibration.capture import capture
from kurtail_gguf.method.rotation import choice as rotation_choice
from kurtail_gguf.method.tuning import layer_files
from kurtail_gguf.model.loading.checkpoint import open_checkpoint
from kurtail_gguf.model.precision import forward_dtype


@pytest.fixture(autouse=True)
def same_attention():
    """Attention as plain products on both devices: which of its kernels is taken would depend on the device."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture
def on(monkeypatch, exported, plain_embedding, text):
    """``on(device, model, directory, **changes)``: what a conversion there gives the exporter, and its result."""
    for learn in ("learn_r1", "learn_r1_by_output_error", "learn_r2", "learn_spinquant"):
        original = getattr(rotation_choice, learn)
        monkeypatch.setattr(rotation_choice, learn, lambda *a, original=original: original(*a, steps=3))
    # single precision on both devices, whether or not this machine's CPU tunes in bfloat16
    monkeypatch.setattr(layer_files, "tuning_dtype", forward_dtype)

    def convert(device: torch.device, model: Path, directory: Path, **changes):
        gc.collect()
        monkeypatch.setattr(pipeline, "pick_device", lambda name: device)
        options = {"calibration": (str(text),), "tune": 2} | changes
        result = pipeline.convert(
            ConvertConfig(str(model), directory / f"{device.type}.gguf", calibration_tokens=1024, **options), NullProgress()
        )
        return exported[-1], result

    return convert


def test_mixing_devices_is_an_error():
    x = torch.ones(2, 3).to(CARD)
    assert x.device.type == "card" and torch.equal((x + x).cpu(), torch.full((2, 3), 2.0))
    for mixed in (lambda: x + torch.ones(2, 3), lambda: torch.ones(2, 3) @ x.T, lambda: torch.cat([x, torch.ones(2, 3)])):
        with pytest.raises(RuntimeError, match="one device"):
            mixed()
    with pytest.raises(RuntimeError, match="numpy"):
        x.numpy()
    with pytest.raises(RuntimeError):
        torch.zeros(2, device=CARD).index_add_(0, torch.zeros(2, dtype=torch.int64), torch.zeros(2, device=CARD))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama-tied", {}),
        ("qwen2", {"activations": "auto"}),
        ("mixtral", {"tune": 0}),
        ("qwen3", {}),
        ("mistral", {"rotation": "spinquant"}),
        ("granite", {"rotation": "kurtail", "weights": "rtn"}),
        ("phi3", {"rotation": "hadamard", "target": "stock"}),
        ("smollm3", {"rotation": "none", "weights": "f32", "tune": 0}),
    ],
)
def test_a_card_gives_the_bytes_of_the_cpu(kind, changes, tiny_checkpoint, tmp_path, on):
    model = tiny_checkpoint(kind, dtype=torch.bfloat16)
    (there, result), (here, plain) = (on(device, model, tmp_path, **changes) for device in (CARD, torch.device("cpu")))
    assert there == here
    assert (result.device, plain.device) == ("card", "cpu")
    assert set(result.card_peak) == set(result.seconds) and plain.card_peak == {} and plain.card_peak_bytes is None
    assert result.card_peak["quantize"].allocated > 0
    # nothing of a stage is left when the next one begins
    assert result.card_peak["export"].allocated == 0


def test_a_run_goes_on_and_reports_on_a_card(tiny_checkpoint, tmp_path, on):
    model = tiny_checkpoint("llama")
    options = {"rotation": "hadamard", "tune": 0, "work_dir": tmp_path / "w", "report": tmp_path / "r.html"}
    whole, first = on(CARD, model, tmp_path, **options)
    (tmp_path / "w" / "quantized" / "layer-00001.safetensors").unlink()
    again, second = on(CARD, model, tmp_path, **options)
    assert again == whole and second.resumed
    _, plain = on(torch.device("cpu"), model, tmp_path, **options | {"work_dir": tmp_path / "v"})
    assert first.figures == plain.figures


def test_without_memory_the_card_and_the_stage_are_named(tiny_checkpoint, tmp_path, on, monkeypatch):
    monkeypatch.setattr(MEMORY, "total", MEMORY.allocated + 200_000)
    with pytest.raises(KurtailError, match=r"^card ran out of memory in the stage 'rotations': of its .* GB this run held ") as told:
        on(CARD, tiny_checkpoint("llama"), tmp_path, tune=0)
    assert "--device cpu --restart" in str(told.value)
    assert (tmp_path / "card.gguf.work" / "tokens.npy").exists()


def test_bfloat16_on_a_card_is_that_of_the_cpu(tiny_checkpoint, tmp_path, recorder, monkeypatch):
    monkeypatch.setattr(MODULE, "bf16", True)
    checkpoint = open_checkpoint(tiny_checkpoint("qwen3-moe", dtype=torch.bfloat16))
    ids = np.random.default_rng(0).integers(3, 320, (5, 24)).astype(np.int32)
    found = []
    for device, dtype in ((CARD, None), (torch.device("cpu"), torch.bfloat16)):
        directory = tmp_path / device.type
        directory.mkdir()
        capture(checkpoint, ids, directory, 0, device, recorder, multiplied_in=dtype)
        found.append({path.name: path.read_bytes() for path in directory.iterdir()})
    assert found[0] == found[1] and len(found[0]) > 5


#: What of a plan falls into which stage that is measured.
_PLANNED = {
    "rotations": ("capture activations", "learn R1", "learn R1 and R2"),
    "quantize": ("embedding and head", "fold a layer", "quantize by GPTQ"),
    "tune": ("tune scales",),
}


@pytest.mark.parametrize(("kind", "changes", "bf16"), [("llama", {}, False), ("mixtral", {"tune": 0}, True)])
def test_a_plan_bounds_what_lies_on_the_card(kind, changes, bf16, save_tiny, tiny_checkpoint, tmp_path, on, monkeypatch):
    monkeypatch.setattr(MODULE, "bf16", bf16)
    model = tmp_path / "wider"
    save_tiny(kind, model, hidden_size=256, intermediate_size=768, num_hidden_layers=1, dtype=torch.bfloat16)
    for path in tiny_checkpoint(kind).glob("tokenizer*"):
        shutil.copy(path, model)
    _, result = on(CARD, model, tmp_path, **changes)
    monkeypatch.setattr(planning, "pick_device", lambda name: CARD)
    monkeypatch.setattr(planning, "_speed", lambda dtype, device: 1e9)  # a card's size of matrices is not for a CPU
    options = {"calibration": ("text.txt",), "tune": 2, "calibration_tokens": 1024} | changes
    found = plan(ConvertConfig(str(model), tmp_path / "o.gguf", **options))
    for stage, parts in _PLANNED.items():
        planned = [found.card[name] for name in parts if name in found.card]
        if planned:
            assert 0.3 * max(planned) < result.card_peak[stage].allocated < max(planned), stage
