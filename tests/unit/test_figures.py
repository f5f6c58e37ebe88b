"""What a report shows of the layers: against transformers with hooks, numpy, and with what went before."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from kurtail_gguf.convert import pipeline
from kurtail_gguf.convert.settings import ConvertConfig
from kurtail_gguf.measure.figures import _Meter
from kurtail_gguf.measure.outliers import measure_outliers
from kurtail_gguf.messages.errors import ConfigError, KurtailError
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.method.fold.transforms import load_transforms
from kurtail_gguf.model.loading.checkpoint import open_checkpoint
from kurtail_gguf.numerics.formats import kt4
from kurtail_gguf.numerics.simulation.attention import CacheSettings
from kurtail_gguf.numerics.simulation.runtime import RuntimeRounding

pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra eval)")


@pytest.fixture
def config(tmp_path, text, exported, plain_embedding):
    """``config(model, **changes)``: a quick conversion with a report, its work directory kept."""

    def make(model: Path, **changes) -> ConvertConfig:
        options = {
            "rotation": "hadamard", "weights": "rtn", "calibration": (str(text),), "calibration_tokens": 1024,
            "device": "cpu", "work_dir": tmp_path / "w", "report": tmp_path / "o.html",
        }  # fmt: skip
        return ConvertConfig(str(model), tmp_path / "o.gguf", **(options | changes))

    return make


def _stored(work_dir: Path, layer: int) -> dict[str, np.ndarray]:
    """A layer's linears as the file has them, float32 by full name."""
    packed = load_file(work_dir / "quantized" / f"layer-{layer:05d}.safetensors")
    return {name: kt4.dequantize(*kt4.unpack(rows)) for name, rows in packed.items() if rows.dtype == np.uint8}


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64)))


def test_errors_of_weights_by_numpy(tiny_checkpoint, config):
    model = tiny_checkpoint("llama")
    one = config(model)
    figures = pipeline.convert(one, NullProgress()).figures
    checkpoint, rotations = open_checkpoint(model), load_transforms(one.work_dir / "transforms.safetensors")
    keys = load_file(one.work_dir / "cache.safetensors")["scales"]  # [layers, 2 heads, 32]; 4 query heads
    assert list(figures.weight_errors) == [
        f"model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in checkpoint.spec.linears
    ]
    for layer in (0, 1):
        original = {name: value.double().numpy() for name, value in checkpoint.layer(layer).items()}
        # R1 meets the readers behind their norm's gain
        for name, norm in (
            ("self_attn.q_proj", "input_layernorm"), ("self_attn.k_proj", "input_layernorm"),
            ("mlp.gate_proj", "post_attention_layernorm"), ("mlp.up_proj", "post_attention_layernorm"),
        ):  # fmt: skip
            full = f"model.layers.{layer}.{name}.weight"
            expected = (original[f"{name}.weight"] * original[f"{norm}.weight"]) @ rotations.r1
            if name == "self_attn.k_proj":
                expected /= keys[layer].reshape(-1, 1)
            elif name == "self_attn.q_proj":
                expected *= keys[layer].repeat(2, 0).reshape(-1, 1)
            assert figures.weight_errors[full] == pytest.approx(_relative(_stored(one.work_dir, layer)[full], expected), rel=1e-4)
            assert 0.02 < figures.weight_errors[full] < 0.2


@pytest.mark.parametrize("activations", [4, 8])
def test_errors_of_activations_by_transformers_with_hooks(tiny_checkpoint, config, activations):
    """The quantized model run by transformers itself, with hooks that round as docs/format.md says."""
    model = tiny_checkpoint("llama")
    one = config(model, rotation="none", kv=16, activations=activations)
    figures = pipeline.convert(one, NullProgress()).figures
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    sums = {name: np.zeros(2) for name in figures.activation_errors}

    def hook(name):
        def rounds(module, inputs):
            x = inputs[0].numpy()
            if activations == 4:
                rounded = kt4.dequantize(*kt4.quantize_reference(x.reshape(-1, x.shape[-1]))).reshape(x.shape)
            else:
                blocks = x.reshape(-1, 64)
                scale = np.abs(blocks).max(1, keepdims=True) / 127
                rounded = (np.rint(blocks / scale) * scale.astype(np.float16)).astype(np.float32).reshape(x.shape)
            sums[name] += [np.square(x - rounded, dtype=np.float64).sum(), np.square(x, dtype=np.float64).sum()]
            return (torch.from_numpy(rounded),)

        return rounds

    with torch.no_grad():
        for layer, module in enumerate(reference.model.layers):
            module.input_layernorm.weight.fill_(1)
            module.post_attention_layernorm.weight.fill_(1)
            for full, weight in _stored(one.work_dir, layer).items():
                linear = reference.get_submodule(full.removesuffix(".weight"))
                linear.weight.copy_(torch.from_numpy(weight))
                linear.register_forward_pre_hook(hook(full))
        ids = np.load(one.work_dir / "tokens.npy")[:8]
        assert ids.shape == (8, 512)
        reference(torch.from_numpy(ids.astype(np.int64)))
    expected = {name: (lost / energy) ** 0.5 for name, (lost, energy) in sums.items()}
    assert len(expected) == 14 and figures.activation_errors == pytest.approx(expected, rel=0.01)


def test_outliers_are_those_of_what_was_captured(tiny_checkpoint, config):
    one = config(tiny_checkpoint("qwen2"))
    figures = pipeline.convert(one, NullProgress()).figures
    names = [f"layer-{layer:05d}-{site}.npy" for layer in (0, 1) for site in ("attention", "ffn")]
    sites = [np.load(one.work_dir / "capture" / name).astype(np.float32) for name in names]
    assert (figures.text, figures.layers) == ("text.txt", 2)
    assert figures.before == measure_outliers(sites)
    r1 = load_transforms(one.work_dir / "transforms.safetensors").r1
    rotated = measure_outliers([site.astype(np.float64) @ r1 for site in sites])
    assert figures.after.kurtosis == pytest.approx(rotated.kurtosis, rel=1e-4)
    assert figures.after.block_maxima == pytest.approx(rotated.block_maxima, rel=1e-4)


def test_unquantized_there_are_no_errors(tiny_checkpoint, config):
    figures = pipeline.convert(config(tiny_checkpoint(), rotation="none", weights="f32"), NullProgress()).figures
    assert figures.after is None and len(figures.before.kurtosis) == 4
    assert figures.weight_errors == figures.activation_errors == {}


def test_every_experts_linears_are_measured(tiny_checkpoint, config):
    model = tiny_checkpoint("mixtral")
    figures = pipeline.convert(config(model), NullProgress()).figures
    names = {f"model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in open_checkpoint(model).spec.linears}
    assert set(figures.weight_errors) == set(figures.activation_errors) == names
    assert all(0.02 < error < 0.3 for error in figures.activation_errors.values())


def test_what_experts_read_is_theirs(tiny_checkpoint):
    """An expert's down is rounded behind its stop, gate and up of all experts once, before them."""
    spec = open_checkpoint(tiny_checkpoint("mixtral")).spec
    cache = CacheSettings(bits=16, rotation=0, rotate_v=False, paired=False)
    eight = f"model.layers.1.{spec.ffn_writers[2]}.weight"
    meter = _Meter(spec, RuntimeRounding(4, 64, 0, cache, {eight: 8}))
    rng = torch.Generator().manual_seed(0)

    def see(error: float) -> None:
        x = torch.randn(5, 64, generator=rng)
        meter.see(x, x * (1 - error))

    meter.open(1)
    see(0.1)
    meter.stop(spec.family.attention_readers, None)
    see(0.2)
    meter.stop((spec.family.attention_writer,), None)
    see(0.3)
    names = spec.family.experts
    for expert in range(4):
        meter.stop((names.gate.format(expert), names.up.format(expert)), None)
        meter.stop((names.down.format(expert),), None)
        if expert != 1:  # no token comes to it
            see(0.4 + expert / 100)
    meter.close()
    expected = dict.fromkeys(spec.family.attention_readers, 0.1) | {spec.family.attention_writer: 0.2}
    expected |= dict.fromkeys(spec.ffn_readers, 0.3)
    expected |= {spec.ffn_writers[0]: 0.4, spec.ffn_writers[3]: 0.43}
    found = {name.removeprefix("model.layers.1.").removesuffix(".weight"): error for name, error in meter.errors.items()}
    assert found.pop(spec.ffn_writers[2]) < 0.02  # its own 8 bits, whatever the others lose
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_file_and_the_other_stages_are_the_same_without(tiny_checkpoint, config, exported, tmp_path, recorder):
    model, runs = tiny_checkpoint("llama"), []
    for name, report in (("a", None), ("b", tmp_path / "o.html")):
        recorder.stages.clear()
        result = pipeline.convert(config(model, weights="gptq", tune=2, report=report, work_dir=tmp_path / name), recorder)
        runs.append(([tuple(stage) for stage in recorder.stages], list(result.seconds)))
        assert all(done == total for _, total, done in recorder.stages)
    (stages, seconds), (more_stages, more_seconds) = runs
    assert exported[0] == exported[1]
    own = [("capture activations", 2, 2), ("measure for the report", 6, 6)]
    assert stages + own == more_stages
    more_seconds.remove("measure for the report")
    assert seconds == more_seconds
    assert not (tmp_path / "a" / "figures").exists() and not list(tmp_path.rglob("prefix-*"))


def test_a_run_that_goes_on_measures_what_is_missing(tiny_checkpoint, config, tmp_path, recorder):
    model = tiny_checkpoint("llama")
    pipeline.convert(config(model, weights="gptq", report=None), NullProgress())
    first = pipeline.convert(config(model, weights="gptq"), NullProgress())
    assert first.resumed and len(first.figures.weight_errors) == len(first.figures.activation_errors) == 14
    directory = tmp_path / "w" / "figures"
    (directory / "weights-00001.json").unlink()
    (directory / "activations.json").unlink()
    kept = json.loads((directory / "weights-00000.json").read_text())
    kept["model.layers.0.self_attn.q_proj.weight"] = 0.5
    (directory / "weights-00000.json").write_text(json.dumps(kept))
    again = pipeline.convert(config(model, weights="gptq"), recorder).figures
    changed = asdict(first.figures)
    changed["weight_errors"]["model.layers.0.self_attn.q_proj.weight"] = 0.5
    assert asdict(again) == changed
    pipeline.convert(config(model, weights="gptq"), recorder)
    assert all(done == total for _, total, done in recorder.stages)


def test_reports_that_cannot_be_written_are_refused_before_any_work(tiny_checkpoint, config, tmp_path, monkeypatch):
    model = tiny_checkpoint()
    for bad in (tmp_path, tmp_path / "none" / "o.html"):
        with pytest.raises(KurtailError, match="--report .* (is a directory|cannot be written)"):
            pipeline.convert(config(model, report=bad), NullProgress())
    with pytest.raises(ConfigError, match="is the same path as OUT"):
        config(model, report=Path(os.path.relpath(tmp_path / "o.gguf")))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(KurtailError, match=r"--report needs matplotlib: pip install 'kurtail-gguf\[eval\]'"):
        pipeline.convert(config(model), NullProgress())
    assert not (tmp_path / "w").exists()
