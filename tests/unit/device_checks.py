"""The converter on a device that is not the CPU (card_device.py). Run by test_device.py in a process of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from card_device import CARD, MEMORY, MODULE
from kurtail_gguf import pipeline, rotation_choice
from kurtail_gguf.config import ConvertConfig
from kurtail_gguf.progress import NullProgress


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

    def convert(device: torch.device, model: Path, directory: Path, **changes):
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
        ("qwen3", {"calibration": ("self",)}),
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
