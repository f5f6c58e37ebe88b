"""The pipeline up to the exporter, whose place a recorder takes: checkpoints, settings, refusals."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from kurtail_gguf.convert import job, pipeline
from kurtail_gguf.convert.settings import ConvertConfig
from kurtail_gguf.machine.device import pick_device
from kurtail_gguf.messages.errors import ConfigError, KurtailError, SourceError
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.method.fold.layer import LayerTransforms, fold_layer
from kurtail_gguf.method.fold.transforms import load_transforms
from kurtail_gguf.method.quantize.rtn import quantize_rtn
from kurtail_gguf.method.rotation import choice as rotation_choice
from kurtail_gguf.method.tuning import layer_files
from kurtail_gguf.model.loading import weight_files
from kurtail_gguf.model.loading.checkpoint import open_checkpoint
from kurtail_gguf.model.sites import FFN_OUTPUT
from kurtail_gguf.numerics.formats import kt4, q4_0
from kurtail_gguf.runtime import ggml
from kurtail_gguf.runtime.provenance import Provenance


@pytest.fixture
def exported(exported):
    yield exported
    assert not any(call.bits for call in exported)  # --activations auto has tests of its own


def _config(model: Path, out: Path, **changes) -> ConvertConfig:
    """Quick by default: the paper's rotation and rounding to nearest; GPTQ has tests of its own below."""
    options = {"rotation": "kurtail", "weights": "rtn"} | changes
    return ConvertConfig(str(model), out, calibration_tokens=1024, device="cpu", **options)


@pytest.fixture
def few_steps(monkeypatch):
    """Learning is tested elsewhere; hundreds of steps on a tiny model prove nothing here."""
    for learn in ("learn_r1", "learn_r1_by_output_error", "learn_r2", "learn_spinquant"):
        original = getattr(rotation_choice, learn)
        monkeypatch.setattr(rotation_choice, learn, lambda *a, original=original: original(*a, steps=3))


def test_artifacts_and_provenance(tiny_checkpoint, tmp_path, exported, text, few_steps, recorder):
    model = tiny_checkpoint("qwen2")
    config = _config(model, tmp_path / "o.gguf", calibration=(str(text),), seed=7)
    result = pipeline.convert(config, recorder)
    files, provenance = exported[0].files, exported[0].provenance
    assert sorted(files) == [
        "embed_tokens.npy", "final.safetensors", "layer-00000.safetensors", "layer-00001.safetensors",
        "lm_head.npy",
    ]  # fmt: skip
    assert result.out == tmp_path / "o.gguf"
    assert result.provenance == provenance
    assert list(result.seconds) == ["source", "calibration", "rotations", "cache", "quantize", "export"]
    # q, k, v and o of heads of 32, and three of the FFN
    assert (result.layers, result.weights) == (2, 2 * (128 * (128 + 64 + 64 + 128) + 3 * 128 * 192))
    assert not (tmp_path / "o.gguf.work").exists()
    assert provenance == Provenance(
        rotation="kurtail", objective="kurtosis", weights="rtn", tune_steps=0, seed=7,
        r1_kind="learned", r1_size=128, r2_kind="learned", r2_size=32,
        r3_kind="none", r3_size=0, r4_kind="hadamard", r4_size=64,
        activation_bits=4, kv_bits=4, kv_choice="auto", kv_budget=provenance.kv_budget,
        kv_k_bits=provenance.kv_k_bits, kv_v_bits=provenance.kv_v_bits, kv_measured_tokens=256,
        kv_divergence=provenance.kv_divergence, kv_perplexity=provenance.kv_perplexity,
        calibration_name="text.txt", calibration_tokens=1024,
        calibration_sha256=provenance.calibration_sha256, rotations_sha256=provenance.rotations_sha256,
    )  # fmt: skip
    assert provenance.kv_budget == pytest.approx(4.6)
    assert len(provenance.kv_k_bits) == len(provenance.kv_v_bits) == 2 and provenance.mean_kv_bits <= 4.6
    assert 0 < provenance.kv_divergence < 0.1 and 0.9 < provenance.kv_perplexity < 1.1
    assert len(provenance.rotations_sha256) == 64
    assert len(provenance.calibration_sha256) == 64
    assert all(done == total for _, total, done in recorder.stages)


def test_gptq_tells_how_far_it_is_within_a_layer(tiny_checkpoint, tmp_path, exported, text, few_steps, recorder):
    config = _config(tiny_checkpoint("qwen2"), tmp_path / "o.gguf", calibration=(str(text),), weights="gptq")
    pipeline.convert(config, recorder)
    # q, k and v; o; gate and up; down: rows times the square of the inputs
    stops = np.array([(128 + 64 + 64) * 128**2, 128 * 128**2, 2 * 192 * 128**2, 128 * 192**2])
    shares = (stops.cumsum() / stops.sum()).tolist()
    assert recorder.shares == [("fold and quantize", layer, share) for layer in (0, 1) for share in shares]


def test_spinquant_starts_from_quarot_and_says_so(tiny_checkpoint, tmp_path, exported, text, few_steps, recorder):
    model, made = tiny_checkpoint("mistral"), {}
    for rotation in ("hadamard", "spinquant"):
        config = _config(
            model, tmp_path / "o.gguf", rotation=rotation, calibration=(str(text),), work_dir=tmp_path / rotation
        )
        provenance = pipeline.convert(config, recorder).provenance
        made[rotation] = load_transforms(tmp_path / rotation / "transforms.safetensors")
    assert (provenance.rotation, provenance.objective) == ("spinquant", "cross-entropy")
    assert (provenance.r1_kind, provenance.r2_kind, provenance.r3_kind) == ("learned", "learned", "hadamard")
    assert (provenance.calibration_name, provenance.calibration_tokens) == ("text.txt", 1024)
    assert not (tmp_path / "spinquant" / "capture").exists()
    assert ["learn R1 and R2", 3, 3] in recorder.stages
    for name in ("r1", "r2"):
        start, learned = getattr(made["hadamard"], name), getattr(made["spinquant"], name)
        size = start.shape[-1]
        # QuaRot (arXiv:2404.00456): a Hadamard matrix with random signs
        assert np.allclose(np.abs(start), 1 / np.sqrt(size), rtol=1e-12)
        for rotation in (start, learned):
            assert np.abs(rotation @ rotation.swapaxes(-1, -2) - np.eye(size)).max() < 1e-11
        assert 1e-5 < np.abs(learned - start).max() < 0.5


def test_layers_hold_packed_linears_unit_norms_and_biases(tiny_checkpoint, tmp_path, exported):
    model = tiny_checkpoint("qwen2")
    config = _config(model, tmp_path / "o.gguf", rotation="none", kv=16, work_dir=tmp_path / "w")
    pipeline.convert(config, NullProgress())
    assert exported[0].tables == {"embed_tokens.npy": ggml.Q8_0} and exported[0].online == {}
    spec = open_checkpoint(model).spec
    layer = load_file(tmp_path / "w" / "quantized" / "layer-00001.safetensors")
    assert set(layer) == {f"model.layers.1.{name}" for name in spec.layer_shapes()}
    original = open_checkpoint(model).layer(1)
    gain = original["input_layernorm.weight"]
    for name, tensor in layer.items():
        short = name.removeprefix("model.layers.1.")
        if "norm" in short:
            assert np.array_equal(tensor, np.ones(128, np.float32))
        elif short.endswith(".bias"):
            assert np.array_equal(tensor, original[short].numpy())
        else:
            out, columns = spec.linear_shape(short.removesuffix(".weight"))
            assert tensor.dtype == np.uint8
            assert tensor.shape == (out, columns // 64 * 34)
    weight = kt4.dequantize(*kt4.unpack(layer["model.layers.1.self_attn.q_proj.weight"]))
    expected = (original["self_attn.q_proj.weight"] * gain).numpy()
    assert np.square(weight - expected).mean() < 0.02 * np.square(expected).mean()
    final = load_file(tmp_path / "w" / "quantized" / "final.safetensors")
    assert np.array_equal(final["model.norm.weight"], open_checkpoint(model).tensor("model.norm.weight").float().numpy())
    # qwen2 is tied, and nothing is folded into its head
    assert not (tmp_path / "w" / "quantized" / "lm_head.npy").exists()


def test_for_stock_the_linears_are_q4_0_and_nothing_is_left_online(tiny_checkpoint, tmp_path, exported):
    model = tiny_checkpoint("mistral")  # heads of 64: R3 would be possible
    config = _config(model, tmp_path / "o.gguf", rotation="hadamard", target="stock", work_dir=tmp_path / "w")
    provenance = pipeline.convert(config, NullProgress()).provenance
    assert exported[0].provenance == provenance
    assert (provenance.target, provenance.activation_bits, provenance.kv_bits) == ("stock", 8, 16)
    kinds = (provenance.r1_kind, provenance.r2_kind, provenance.r3_kind, provenance.r4_kind)
    assert kinds == ("hadamard", "hadamard", "none", "none")
    checkpoint = open_checkpoint(model)
    layer = load_file(tmp_path / "w" / "quantized" / "layer-00001.safetensors")
    rotations = load_transforms(tmp_path / "w" / "transforms.safetensors")
    folding = LayerTransforms(torch.from_numpy(rotations.r1), torch.from_numpy(rotations.r2[1]))
    folded = fold_layer(checkpoint.layer(1), checkpoint.spec, folding)
    for name in checkpoint.spec.linears:
        packed = layer[f"model.layers.1.{name}.weight"]
        out, columns = checkpoint.spec.linear_shape(name)
        assert packed.dtype == np.uint8 and packed.shape == (out, columns // 32 * 18)
        expected = folded[f"{name}.weight"].numpy()
        error = np.square(q4_0.dequantize(*q4_0.unpack(packed)) - expected).mean()
        assert error < 0.01 * np.square(expected).mean()


@pytest.mark.parametrize(("target", "rounded"), [("kurtail", (4, 64)), ("stock", (8, 32))])
def test_spinquant_learns_on_what_the_target_rounds(tiny_checkpoint, tmp_path, exported, text, monkeypatch, target, rounded):
    seen = []

    def learn(checkpoint, ids, start, rounding, *_):
        seen.append((rounding.activation_bits, rounding.activation_block))
        return start

    monkeypatch.setattr(rotation_choice, "learn_spinquant", learn)
    model = tiny_checkpoint("mistral")
    config = _config(model, tmp_path / "o.gguf", rotation="spinquant", target=target, calibration=(str(text),))
    pipeline.convert(config, NullProgress())
    assert seen == [rounded]


def test_the_target_is_a_setting(tiny_checkpoint, tmp_path, exported):
    config = _config(tiny_checkpoint(), tmp_path / "o.gguf", rotation="none", work_dir=tmp_path / "w")
    pipeline.convert(config, NullProgress())
    with pytest.raises(KurtailError, match="target was kurtail, now stock"):
        pipeline.convert(dataclasses.replace(config, target="stock"), NullProgress())


@pytest.mark.parametrize(
    ("rotation", "kv", "kinds"),
    [
        ("none", 4, ("none", "none", "none", "none")),
        ("hadamard", 4, ("hadamard", "hadamard", "hadamard", "hadamard")),
        ("hadamard", 16, ("hadamard", "hadamard", "none", "hadamard")),
    ],
)
def test_without_learning_no_text_is_read(tiny_checkpoint, tmp_path, exported, rotation, kv, kinds):
    # a text that is given is read where a cache is measured, and none is generated for it
    calibration = ("gone",) if kv == 16 else ("self",)
    config = _config(tiny_checkpoint("mistral"), tmp_path / "o.gguf", rotation=rotation, kv=kv, calibration=calibration)
    provenance = pipeline.convert(config, NullProgress()).provenance
    assert (provenance.r1_kind, provenance.r2_kind, provenance.r3_kind, provenance.r4_kind) == kinds
    assert provenance.r3_size == (64 if kinds[2] == "hadamard" else 0)
    assert (provenance.objective, provenance.calibration_name, provenance.calibration_tokens) == ("none", "", 0)


def test_same_seed_same_bytes(tiny_checkpoint, tmp_path, exported, text, few_steps):
    model = tiny_checkpoint()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pipeline.convert(_config(model, tmp_path / f"{name}.gguf", seed=seed, calibration=(str(text),)), NullProgress())
    assert exported[0] == exported[1]
    assert exported[0].files != exported[2].files


def test_a_rerun_skips_what_is_finished_and_gives_the_same(tiny_checkpoint, tmp_path, exported, text, few_steps, recorder):
    config = _config(tiny_checkpoint(), tmp_path / "o.gguf", work_dir=tmp_path / "w", calibration=(str(text),))
    assert not pipeline.convert(config, NullProgress()).resumed
    (tmp_path / "w" / "quantized" / "layer-00001.safetensors").unlink()  # as if interrupted there
    assert pipeline.convert(config, recorder).resumed
    assert exported[0] == exported[1]
    assert [name for name, *_ in recorder.stages] == ["fold embedding and head", "reuse finished layers", "fold and quantize"]
    assert (tmp_path / "w" / "settings.json").exists()


def test_changed_settings_are_named(tiny_checkpoint, tmp_path, exported):
    config = _config(tiny_checkpoint(), tmp_path / "o.gguf", rotation="hadamard", work_dir=tmp_path / "w")
    pipeline.convert(config, NullProgress())
    changed = dataclasses.replace(config, seed=5)
    with pytest.raises(KurtailError, match=r"seed was 0, now 5.*--work-dir"):
        pipeline.convert(changed, NullProgress())
    json.loads((tmp_path / "w" / "settings.json").read_text())
    assert len(exported) == 1


def test_an_edited_text_is_noticed(tiny_checkpoint, tmp_path, exported, text, few_steps):
    config = _config(tiny_checkpoint(), tmp_path / "o.gguf", calibration=(str(text),), work_dir=tmp_path / "w")
    pipeline.convert(config, NullProgress())
    text.write_text("another text " * 200)
    with pytest.raises(KurtailError, match="calibration_texts was"):
        pipeline.convert(config, NullProgress())


def _refused(config, kind=KurtailError) -> str:
    with pytest.raises(kind) as caught:
        pipeline.convert(config, NullProgress())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_out_is_checked_before_any_work(tmp_path):
    gone = tmp_path / "gone"
    assert "is a directory" in _refused(_config(gone, tmp_path))
    assert "is not a directory; create it" in _refused(_config(gone, tmp_path / "no" / "o.gguf"))


def test_bad_input_leaves_nothing_behind(tiny_checkpoint, tmp_path, exported, text):
    model = tiny_checkpoint()
    before = sorted(tmp_path.iterdir())
    out = tmp_path / "o.gguf"
    text.write_text("too short")
    before = sorted(tmp_path.iterdir())
    assert "has 9 tokens" in _refused(_config(model, out, calibration=(str(text),)))
    path = model / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    assert "truncated" in _refused(_config(model, out), SourceError)
    # NaN in the last tensor: noticed only after work has begun
    path.write_bytes(data)
    text.write_text("long enough " * 200)
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file

    tensors = {name: tensor.clone() for name, tensor in load_torch(path).items()}
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, path)
    for rotation in ("none", "kurtail"):
        message = _refused(_config(model, out, rotation=rotation, calibration=(str(text),)), SourceError)
        assert "model.layers.1.mlp.up_proj.weight" in message
    assert sorted(tmp_path.iterdir()) == before
    assert not exported


@pytest.mark.parametrize("finished", [True, False])
def test_a_disk_that_fails_to_read_costs_no_finished_layer(tiny_checkpoint, tmp_path, exported, monkeypatch, finished):
    config = _config(tiny_checkpoint(), tmp_path / "o.gguf", rotation="none")
    pipeline.convert(config, NullProgress())
    work, original = tmp_path / "o.gguf.work", weight_files.safe_open

    def failing(path, **options):
        if (work / "quantized" / "layer-00000.safetensors").exists() == finished and work.exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(weight_files, "safe_open", failing)
        told = _refused(config, SourceError)
    kept = f"finished steps are kept in {work}: once the file is readable again, rerun the same command"
    assert "Input/output error" in told and (kept in told) == finished == work.exists()
    assert pipeline.convert(config, NullProgress()).resumed == finished
    assert exported[0] == exported[1]


@pytest.mark.parametrize("weights", ["rtn", "gptq"])
def test_linears_of_zeros_are_told_of(tiny_checkpoint, tmp_path, exported, text, recorder, weights):
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file

    model = tiny_checkpoint("llama")
    path = model / "model.safetensors"
    tensors = load_torch(path)
    for name in ("layers.0.self_attn.o_proj", "layers.1.mlp.up_proj", "layers.1.mlp.down_proj"):
        tensors[f"model.{name}.weight"] = torch.zeros_like(tensors[f"model.{name}.weight"])
    save_file(tensors, path)
    options = {"rotation": "hadamard", "weights": weights, "calibration": (str(text),)}
    pipeline.convert(_config(model, tmp_path / "o.gguf", **options), recorder)
    (told,) = recorder.told
    assert told.startswith("all weights of model.layers.0.self_attn.o_proj and of 2 other linears are 0")
    assert not [name for name, _, _ in recorder.stages if "are 0" in name]
    assert exported


def test_missing_text_is_noticed_before_the_model_is_opened(tmp_path):
    config = _config(tmp_path / "gone", tmp_path / "o.gguf", calibration=("no-such-text",))
    assert "no-such-text" in _refused(config)


@pytest.fixture
def cards(monkeypatch):
    """``cards(count, cuda)``: torch built with a version of CUDA, or without, on a machine with so many cards."""

    def make(count: int, cuda: str | None = "13.0") -> None:
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return make


def test_which_device_it_is(cards):
    for count, chosen in ((0, "cpu"), (2, "cuda")):
        cards(count)
        assert pick_device("auto") == torch.device(chosen)
        assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("count", "cuda", "device", "told"),
    [
        (0, None, "cuda", r"--device cuda: this torch \(.*\) is built without CUDA: install a CUDA build \(pytorch.org\), or .*"),
        (0, "13.0", "cuda:0", r"--device cuda:0: torch sees no CUDA device: check the driver with nvidia-smi .* --device cpu"),
        (1, "13.0", "cuda:1", "--device cuda:1: torch sees 1 CUDA device, counted from cuda:0"),
    ],
)
def test_a_card_that_is_not_there(cards, tmp_path, count, cuda, device, told):
    cards(count, cuda)
    config = dataclasses.replace(_config(tmp_path, tmp_path / "o.gguf"), device=device)
    assert re.fullmatch(told, _refused(config))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"rotation": "quarot"}, "kurtail, spinquant, hadamard, none"),
        ({"weights": "awq"}, "--weights 'awq' is not supported"),
        ({"activations": 5}, "4, 8"),
        ({"kv": 2}, "4, 8, 16"),
        ({"device": "tpu"}, "auto, cpu, cuda, cuda:N"),
        ({"device": "cuda:"}, "auto, cpu, cuda, cuda:N"),
        ({"target": "ollama"}, "kurtail, stock"),
        ({"target": "stock", "kv": 16}, "--kv cannot be combined with --target stock"),
        ({"target": "stock", "activations": 8}, "--target stock: stock llama.cpp decides"),
        ({"target": "stock", "activations": "auto"}, "--target stock: stock llama.cpp decides"),
        ({"activations": "auto", "budget": 0.0}, "--budget 0.0 must be between 0 and 1"),
        ({"activations": "auto", "budget": 1.0}, "--budget 1.0 must be"),
        ({"activations": "auto", "budget": float("nan")}, "--budget nan must be"),
        ({"budget": 0.1}, "--budget 0.1 has no effect with --activations 4: give --activations auto"),
        ({"activations": 8, "budget": 0.1}, "--budget 0.1 has no effect with --activations 8"),
        ({"calibration": ()}, "--calibration"),
        ({"calibration": ("self", "a.txt")}, "cannot be mixed"),
        ({"weights": "f32", "rotation": "spinquant"}, "--rotation spinquant cannot be combined with --weights f32"),
        ({"out": Path("m")}, "OUT m is the same path as MODEL: give another name"),
        ({"out": Path("x/../m")}, "OUT x/../m is the same path as MODEL"),
        ({"calibration": ("a.txt", "o")}, "OUT o is the same path as --calibration"),
        ({"report": Path("o")}, "--report o is the same path as OUT"),
        ({"keep_rotations": Path("o")}, "--keep-rotations o is the same path as OUT"),
        ({"keep_rotations": Path("m")}, "--keep-rotations m is the same path as MODEL"),
        ({"keep_rotations": Path("r"), "report": Path("r")}, "--report r is the same path as --keep-rotations"),
        ({"work_dir": Path("o")}, "--work-dir o is the same path as OUT"),
        ({"seed": -1}, "--seed -1"),
        ({"calibration_tokens": 10}, "--calibration-tokens 10"),
    ],
)
def test_options_outside_what_is_offered(changes, word):
    with pytest.raises(ConfigError, match=word):
        ConvertConfig(**({"model": "m", "out": Path("o")} | changes))


def test_the_default_is_gptq_with_a_diagonal_at_every_site(tiny_checkpoint, tmp_path, exported, text, few_steps, recorder):
    model = tiny_checkpoint("mistral")
    config = ConvertConfig(
        str(model), tmp_path / "o.gguf", calibration=(str(text),), calibration_tokens=1024, device="cpu",
        work_dir=tmp_path / "w",
    )  # fmt: skip
    provenance = pipeline.convert(config, recorder).provenance
    assert (provenance.rotation, provenance.objective, provenance.weights) == ("diagonal", "output-error", "gptq")
    assert (provenance.r1_kind, provenance.r4_kind, provenance.r4_size) == ("none", "hadamard", 64)
    assert provenance.diagonal == "attention,ffn,ffn-output"
    parts = ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up", "ffn_down")
    assert exported[0].online == {f"blk.{layer}.{part}.weight": 64 for layer in (0, 1) for part in parts}
    assert all(done == total for _, total, done in recorder.stages)
    assert not list((tmp_path / "w").glob("prefix-*"))
    checkpoint = open_checkpoint(model)
    transforms = load_transforms(tmp_path / "w" / "transforms.safetensors")
    assert {kind: scale.shape for kind, scale in transforms.scales.items()} == {
        "attention": (2, 128), "ffn": (2, 128), "ffn-output": (2, 192)
    }  # fmt: skip
    keys = load_file(tmp_path / "w" / "cache.safetensors")["scales"]
    folding = dataclasses.replace(transforms, key_scales=keys).layer(1, None, torch.device("cpu"))
    folded = fold_layer(checkpoint.layer(1), checkpoint.spec, folding)
    layer = load_file(tmp_path / "w" / "quantized" / "layer-00001.safetensors")
    for norm, kind in (("input_layernorm", "attention"), ("post_attention_layernorm", "ffn")):
        gain = layer[f"model.layers.1.{norm}.weight"]
        assert np.array_equal(gain, transforms.scales[kind][1].astype(np.float32)) and gain.std() > 0.01
    for name in checkpoint.spec.linears:
        found = kt4.dequantize(*kt4.unpack(layer[f"model.layers.1.{name}.weight"]))
        expected = folded[f"{name}.weight"].numpy()
        error = np.square(found - expected).mean() / np.square(expected).mean()
        nearest = kt4.dequantize(*quantize_rtn(folded[f"{name}.weight"], name))
        # GPTQ gives up accuracy of the weights for that of the outputs
        assert np.square(nearest - expected).mean() / np.square(expected).mean() < error < 0.1


def test_the_default_gives_the_same_bytes_again(tiny_checkpoint, tmp_path, exported, text, few_steps):
    model = tiny_checkpoint("llama")
    for name in ("a", "b"):
        pipeline.convert(
            ConvertConfig(
                str(model), tmp_path / f"{name}.gguf", calibration=(str(text),), calibration_tokens=1024, device="cpu",
                tune=3,
            ),  # fmt: skip
            NullProgress(),
        )
    assert exported[0] == exported[1]
    assert exported[0].provenance.tune_steps == 3


def test_tuning_reads_more_text_than_what_comes_before_it(tiny_checkpoint, tmp_path, exported, text, few_steps):
    model = tiny_checkpoint()
    for steps in (0, 6):
        config = _config(
            model, tmp_path / "o.gguf", rotation="output", weights="gptq", calibration=(str(text),), tune=steps,
            work_dir=tmp_path / f"w{steps}",
        )  # fmt: skip
        pipeline.convert(config, NullProgress())
    assert [call.provenance.calibration_tokens for call in exported] == [1024, 6 * 512]
    untuned, before_tuning = (tmp_path / name / "quantized" / "layer-00001.safetensors" for name in ("w0", "w6"))
    assert untuned.read_bytes() == before_tuning.read_bytes()


def test_tuning_that_does_not_fit_is_refused_before_any_work_where_it_was_asked_for(
    tiny_checkpoint, tmp_path, exported, text, monkeypatch
):
    monkeypatch.setattr(layer_files, "memory_available", lambda device: 1000)
    options = {"rotation": "hadamard", "calibration": (str(text),)}
    told = _refused(_config(tiny_checkpoint(), tmp_path / "o.gguf", tune=3, **options))
    assert re.fullmatch(r"--tune 3 needs about \d+\.\d GB, 0\.0 GB are free on cpu: give --tune 0 or .*", told)
    assert not exported and not (tmp_path / "o.gguf.work").exists()
    pipeline.convert(_config(tiny_checkpoint(), tmp_path / "untuned.gguf", tune=0, **options), NullProgress())


def test_tuning_by_default_that_does_not_fit_is_refused_too(tiny_checkpoint, tmp_path, exported, text, monkeypatch, recorder):
    """What comes out may not depend on what else runs on the machine."""
    monkeypatch.setattr(layer_files, "memory_available", lambda device: 1000)
    config = _config(
        tiny_checkpoint(), tmp_path / "o.gguf", rotation="output", weights="gptq", calibration=(str(text),)
    )
    assert config.tuning_steps > 0
    told = _refused(config)
    assert re.fullmatch(r"tuning of scales needs about \d+\.\d GB, 0\.0 GB are free on cpu: give --tune 0 or .*", told)
    assert not exported and not recorder.stages and not (tmp_path / "o.gguf.work").exists()


def test_a_model_too_large_for_tuning_by_default_is_tuned_only_where_asked(
    tiny_checkpoint, tmp_path, exported, text, few_steps, monkeypatch, recorder
):
    monkeypatch.setattr(job, "DEFAULT_TUNING_BYTES", 1000)
    config = _config(
        tiny_checkpoint(), tmp_path / "o.gguf", rotation="output", weights="gptq", calibration=(str(text),)
    )
    for free in (1000, 1 << 40):
        monkeypatch.setattr(layer_files, "memory_available", lambda device, free=free: free)
        provenance = pipeline.convert(config, recorder).provenance
        assert (provenance.tune_steps, provenance.calibration_tokens) == (0, 1024)
    assert exported[0] == exported[1]
    assert len(recorder.told) == 2
    assert re.fullmatch(r"scales are not tuned: .* about \d+\.\d GB for it; give --tune 96 to tune them", recorder.told[0])
    assert pipeline.convert(dataclasses.replace(config, tune=2), recorder).provenance.tune_steps == 2
    assert len(recorder.told) == 2


def test_free_memory_changes_no_bytes(tiny_checkpoint, tmp_path, exported, text, few_steps, monkeypatch):
    model = tiny_checkpoint("llama")
    checkpoint = open_checkpoint(model)
    needed = [layer_files.memory_needed(checkpoint, 64, kept) for kept in (layer_files.Kept.NOTHING, layer_files.Kept.ALL)]
    for free in (needed[0], 2 * needed[1]):
        monkeypatch.setattr(layer_files, "memory_available", lambda device, free=free: free)
        config = _config(
            model, tmp_path / "o.gguf", rotation="diagonal", weights="gptq", calibration=(str(text),), tune=2, activations="auto"
        )
        pipeline.convert(config, NullProgress())
    first, second = (dataclasses.replace(call, bits={}) for call in exported)
    assert first == second and exported[0].bits == exported[1].bits != {}
    exported.clear()  # the bits were looked at


@pytest.mark.parametrize("lost", [(0, 1), (1,)])
@pytest.mark.parametrize(
    ("kind", "rotation"), [("qwen2", "hadamard"), ("gemma2", "diagonal"), ("olmo2", "diagonal"), ("phi", "diagonal")]
)
def test_gptq_goes_on_from_the_last_finished_layer(tiny_checkpoint, tmp_path, exported, text, recorder, kind, rotation, lost):
    config = _config(
        tiny_checkpoint(kind), tmp_path / "o.gguf", rotation=rotation, weights="gptq", calibration=(str(text),),
        work_dir=tmp_path / "w",
    )  # fmt: skip
    pipeline.convert(config, NullProgress())
    for layer in lost:
        (tmp_path / "w" / "quantized" / f"layer-{layer:05d}.safetensors").unlink()
    pipeline.convert(config, recorder)
    assert exported[0] == exported[1]


def test_hadamard_with_gptq_reads_text_but_learns_nothing(tiny_checkpoint, tmp_path, exported, text):
    config = _config(
        tiny_checkpoint(), tmp_path / "o.gguf", rotation="hadamard", weights="gptq", calibration=(str(text),)
    )
    provenance = pipeline.convert(config, NullProgress()).provenance
    assert (provenance.r1_kind, provenance.objective) == ("hadamard", "none")
    assert (provenance.calibration_name, provenance.calibration_tokens) == ("text.txt", 1024)


def test_unquantized_layers_are_the_folded_ones(tiny_checkpoint, tmp_path, exported, recorder):
    model = tiny_checkpoint("mixtral")
    config = _config(model, tmp_path / "o.gguf", rotation="hadamard", weights="f32", work_dir=tmp_path / "w")
    provenance = pipeline.convert(config, recorder).provenance
    assert (provenance.weights, provenance.activation_bits, provenance.kv_bits) == ("f32", 32, 16)
    assert (provenance.r3_kind, provenance.r4_size, provenance.runs_as) == ("none", 64, "f32")
    checkpoint, rotations = open_checkpoint(model), load_transforms(tmp_path / "w" / "transforms.safetensors")
    r1, r2 = (torch.from_numpy(value) for value in (rotations.r1, rotations.r2[1]))
    folded = fold_layer(checkpoint.layer(1), checkpoint.spec, LayerTransforms(r1, r2, {FFN_OUTPUT: 64}))
    found = load_file(tmp_path / "w" / "quantized" / "layer-00001.safetensors")
    assert found.keys() == {f"model.layers.1.{name}" for name in checkpoint.spec.layer_shapes()}
    for name, value in folded.items():
        assert np.array_equal(found[f"model.layers.1.{name}"], value.float().numpy())


def test_for_stock_spinquant_learns_by_its_roundings(tiny_checkpoint, tmp_path, exported, text, few_steps):
    options = {"rotation": "spinquant", "weights": "f32", "target": "stock", "calibration": (str(text),)}
    provenance = pipeline.convert(_config(tiny_checkpoint(), tmp_path / "o.gguf", **options), NullProgress()).provenance
    assert (provenance.r1_kind, provenance.activation_bits, provenance.runs_as) == ("learned", 8, "f32")


@pytest.mark.parametrize("changes", [{"activations": 8}, {"tune": 3}])
def test_nothing_is_rounded_with_unquantized_weights(changes, tmp_path):
    with pytest.raises(ConfigError, match="cannot be combined with --weights f32"):
        _config(tmp_path, tmp_path / "o.gguf", weights="f32", **changes)


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("mixtral", {"rotation": "spinquant"}, "--rotation spinquant is not supported for MixtralForCausalLM"),
        ("granite", {"rotation": "spinquant"}, "--rotation spinquant is not supported for GraniteForCausalLM"),
        ("phi3", {"rotation": "spinquant"}, "--rotation spinquant is not supported for Phi3ForCausalLM"),
        ("gemma2", {"rotation": "output"}, "it has norms after attention and FFN, .*: give --rotation diagonal"),
        ("cohere2", {"rotation": "hadamard"}, "it has norms that subtract the mean, .*: give --rotation diagonal"),
    ],
)
def test_what_does_not_know_a_family_is_refused(tiny_checkpoint, tmp_path, exported, kind, changes, told):
    with pytest.raises(KurtailError, match=told):
        pipeline.convert(_config(tiny_checkpoint(kind), tmp_path / "o.gguf", **changes), NullProgress())
    assert exported == []


def test_rotations_are_kept_where_asked_for(tiny_checkpoint, tmp_path, exported):
    kept = tmp_path / "kept"
    config = _config(tiny_checkpoint("qwen3"), tmp_path / "o.gguf", rotation="hadamard", keep_rotations=kept)
    provenance = pipeline.convert(config, NullProgress()).provenance
    transforms = load_transforms(kept)
    assert transforms.sha256() == provenance.rotations_sha256
    assert dataclasses.replace(transforms, online={}).sha256() != provenance.rotations_sha256


@pytest.mark.parametrize("kind", ["granite", "phi3", "smollm3", "mixtral", "gemma2", "exaone4", "stablelm-parallel", "starcoder2"])
def test_the_default_goes_through_for_other_families(kind, tiny_checkpoint, tmp_path, exported, text, few_steps, plain_embedding):
    """Learned rotations, GPTQ and tuning."""
    config = ConvertConfig(
        str(tiny_checkpoint(kind)), tmp_path / "o.gguf", calibration=(str(text),), calibration_tokens=1024, device="cpu",
        tune=2,
    )  # fmt: skip
    provenance = pipeline.convert(config, NullProgress()).provenance
    assert provenance.tune_steps == 2
    assert (provenance.rotation, provenance.weights) == ("diagonal", "gptq")


def test_heads_that_no_cache_type_divides_are_refused_before_any_work(save_tiny, tmp_path, exported):
    model, out = tmp_path / "m", tmp_path / "o.gguf"
    save_tiny("llama", model, head_dim=40, num_attention_heads=8)
    for kv in ("auto", 8):
        with pytest.raises(KurtailError, match=f"--kv {kv} is not supported .* head_dim 40: .* give --kv 16"):
            pipeline.convert(_config(model, out, rotation="hadamard", kv=kv), NullProgress())
    assert not out.exists() and exported == []
    pipeline.convert(_config(model, out, rotation="hadamard", kv=16), NullProgress())
    assert len(exported) == 1


@pytest.mark.parametrize(("target", "rotation"), [("kurtail", "diagonal"), ("stock", "output")])
def test_the_default_rotation_is_the_targets(target, rotation):
    assert ConvertConfig("m", Path("o"), target=target).rotation == rotation
