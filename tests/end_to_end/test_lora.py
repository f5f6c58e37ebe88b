"""An adapter in the rotated basis does to a rotated file what the original does to the model; others are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kurtail_gguf.convert.adapters import convert_lora
from kurtail_gguf.convert.pipeline import convert
from kurtail_gguf.convert.settings import ConvertConfig
from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.runtime.export import export_reference
from kurtail_gguf.runtime.logits import mean_divergence, runtime_log_probabilities

pytestmark = pytest.mark.usefixtures("bindings")

TOKENS = [[1, *np.random.default_rng(5).integers(3, 320, 40).tolist()]]
RANK, ALPHA = 4, 6


@pytest.fixture(scope="module")
def source(with_tokenizer, tiny_spm) -> Path:
    return with_tokenizer("mistral", tiny_spm, 400)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, source) -> Path:
    """A PEFT directory that adapts every linear of both layers."""
    directory = tmp_path_factory.mktemp("peft")
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            base = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{base}.lora_A.weight"] = 0.2 * torch.randn(RANK, weight.shape[1], generator=generator)
            tensors[f"{base}.lora_B.weight"] = 0.2 * torch.randn(weight.shape[0], RANK, generator=generator)
    assert len(tensors) == 2 * 2 * 7
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear", "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def exact(tmp_path_factory, cli, source, adapter) -> tuple[Path, Path, Path]:
    """An unquantized file, its rotations, and the adapter for it, as a user makes them."""
    directory = tmp_path_factory.mktemp("exact")
    file, rotations, out = directory / "out.gguf", directory / "rotations", directory / "lora.gguf"
    done = cli("convert", source, file, "--rotation", "hadamard", "--weights", "f32", "--keep-rotations", rotations)
    assert done.status == 0, done.stderr
    done = cli("convert-lora", adapter, out, "--file", file, "--rotations", rotations, "--reference", source)
    assert done.status == 0, done.stderr
    assert "14 linears adapted" in done.stdout
    return file, rotations, out


@pytest.fixture(scope="module")
def rounded(tmp_path_factory, source) -> tuple[Path, Path]:
    """A file of four bits and its rotations, which are others."""
    directory = tmp_path_factory.mktemp("rounded")
    config = ConvertConfig(
        str(source), directory / "out.gguf", rotation="hadamard", weights="rtn", activations=8, seed=1,
        keep_rotations=directory / "rotations",
    )  # fmt: skip
    convert(config, NullProgress())
    return config.out, directory / "rotations"


def said(source: Path, adapter: Path | None) -> np.ndarray:
    """transformers' log-probabilities, with the adapter merged as PEFT does."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        if adapter is not None:
            pairs = load_file(adapter / "adapter_model.safetensors")
            for name in [name for name in pairs if ".lora_A." in name]:
                module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                b = pairs[name.replace(".lora_A.", ".lora_B.")]
                model.get_submodule(module).weight += ALPHA / RANK * b @ pairs[name]
        return torch.log_softmax(model(torch.tensor(TOKENS)).logits[0], -1).numpy()


def test_it_does_to_the_file_what_it_does_to_the_model(source, adapter, exact):
    file, _, lora = exact
    right, without = said(source, adapter), said(source, None)
    assert np.abs(right - without).max() > 1
    assert np.abs(runtime_log_probabilities(file, TOKENS, exact_cache=True, adapter=lora) - right).max() < 1e-4
    assert np.abs(runtime_log_probabilities(file, TOKENS, exact_cache=True) - without).max() < 1e-4


def test_in_four_bits_it_leads_to_the_adapted_model(source, adapter, rounded, tmp_path):
    (file, rotations), lora = rounded, tmp_path / "lora.gguf"
    assert convert_lora(adapter, lora, file, rotations, str(source), tmp_path, NullProgress()) == 14
    right, without = said(source, adapter), said(source, None)
    found = runtime_log_probabilities(file, TOKENS, adapter=lora)
    assert mean_divergence(right, found) < 0.5 * mean_divergence(without, found)


def test_an_adapter_without_the_mark_is_refused_on_a_rotated_file(exact, tmp_path):
    file, _, lora = exact
    data = lora.read_bytes()
    unmarked = tmp_path / "unmarked.gguf"
    unmarked.write_bytes(data.replace(b"kurtail.adapter.rotations", b"another.adapter.rotations"))
    with pytest.raises(KurtailError, match="made for the original checkpoint, but this file is rotated.*convert-lora"):
        runtime_log_probabilities(file, TOKENS, adapter=unmarked)


def test_an_adapter_for_other_rotations_is_refused(rounded, exact):
    with pytest.raises(KurtailError, match="made for a file with other rotations"):
        runtime_log_probabilities(rounded[0], TOKENS, adapter=exact[2])


def test_a_rotated_adapter_is_refused_on_the_original(source, exact, tmp_path):
    export_reference(source, tmp_path / "original.gguf")
    with pytest.raises(KurtailError, match="but this model is not rotated"):
        runtime_log_probabilities(tmp_path / "original.gguf", TOKENS, adapter=exact[2])


def test_rotations_of_another_file_are_refused(cli, source, adapter, rounded, exact, outputs):
    done = cli(
        "convert-lora", adapter, outputs / "lora.gguf", "--file", rounded[0], "--rotations", exact[1], "--reference", source
    )  # fmt: skip
    assert "does not match" in done.error
    assert list(outputs.iterdir()) == []
