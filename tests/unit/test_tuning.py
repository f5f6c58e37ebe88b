"""Tuning of block scales: the student is the quantized model, the teacher the checkpoint, and learning helps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.method.fold import tables
from kurtail_gguf.method.fold.transforms import Transforms
from kurtail_gguf.method.quantize.layerwise import CalibratedOn, fold_and_quantize
from kurtail_gguf.method.quantize.quantized_prefix import QuantizedPrefix
from kurtail_gguf.method.rotation.hadamard import random_orthogonal
from kurtail_gguf.method.tuning import layer_files
from kurtail_gguf.method.tuning import scales as distill_scales
from kurtail_gguf.method.tuning.student import Student, _Product, _Scaled
from kurtail_gguf.method.tuning.teacher import Teacher, run_teacher
from kurtail_gguf.model.loading.checkpoint import open_checkpoint
from kurtail_gguf.model.sites import SITES
from kurtail_gguf.numerics.formats.targets import BLOCK_FORMATS
from kurtail_gguf.numerics.simulation.attention import CacheSettings
from kurtail_gguf.numerics.simulation.runtime import RuntimeRounding

CPU = torch.device("cpu")
IDS = np.random.default_rng(0).integers(3, 320, (8, 24)).astype(np.int32)
FORMAT = BLOCK_FORMATS["kurtail"]
#: A size of its own for each site.
ONLINE = dict(zip(SITES, (64, 32, 16, 8), strict=True))
ROUNDING = RuntimeRounding(4, 64, ONLINE, CacheSettings(bits=4, rotation=0, rotate_v=False, paired=False))

pytestmark = pytest.mark.usefixtures("plain_embedding")


def _quantized(checkpoint, directory: Path) -> Path:
    spec = checkpoint.spec
    rng = np.random.default_rng(2)
    r2 = np.stack([random_orthogonal(spec.head_dim, rng) for _ in range(spec.layers * spec.kv_heads)])
    shape = (spec.layers, spec.kv_heads, spec.head_dim, spec.head_dim)
    kind, r1 = ("none", None) if spec.family.kept_in_place else ("random", random_orthogonal(spec.hidden_size, rng))
    transforms = Transforms(kind, "random", r1, r2.reshape(shape), online=ONLINE)
    target = directory / "quantized"
    return fold_and_quantize(
        checkpoint, transforms, FORMAT, CalibratedOn(IDS, ROUNDING), target, CPU, NullProgress()
    )


def _student(checkpoint, quantized: Path, recompute: bool = True, products: torch.dtype = torch.float32) -> Student:
    layers = [
        layer_files.read_layer(quantized / f"layer-{layer:05d}.safetensors", checkpoint.spec.layer_prefix(layer), FORMAT, CPU)
        for layer in range(checkpoint.spec.layers)
    ]
    return Student(checkpoint, layers, ROUNDING, CPU, IDS.shape[1], recompute, products=products)


def _tune(checkpoint, quantized: Path, target: Path, steps: int, progress=None) -> Path:
    return layer_files.tune(checkpoint, IDS, quantized, FORMAT, ROUNDING, steps, target, CPU, progress or NullProgress())


@pytest.mark.parametrize(
    "kind",
    ["llama", "llama-biases", "mistral", "qwen2", "gemma2", "gemma3", "olmo2", "phi", "cohere2", "mixtral", "qwen2-moe", "olmoe",
     "granite-moe-shared", "glm4-moe", "ernie4_5-moe", "dots1"],
)  # fmt: skip
def test_the_student_is_what_gptq_was_calibrated_on(kind, tiny_checkpoint, tmp_path):
    """The same layers, run by the prefix one linear after the other and by the student whole."""
    checkpoint = open_checkpoint(tiny_checkpoint(kind))
    quantized = _quantized(checkpoint, tmp_path)
    embed = layer_files.EmbeddingRows(quantized, checkpoint.spec)
    prefix = QuantizedPrefix(checkpoint, IDS, embed, ROUNDING, tmp_path, CPU)
    for layer in range(checkpoint.spec.layers):
        above = checkpoint.spec.layer_prefix(layer)
        weights = {
            name.removeprefix(above): torch.from_numpy(
                FORMAT.dequantize(*FORMAT.unpack(value)) if value.dtype == np.uint8 else value
            )
            for name, value in load_file(quantized / f"layer-{layer:05d}.safetensors").items()
        }
        prefix.run_layer(layer, weights, lambda names, hessian: {})
    expected = np.load(tmp_path / "prefix-hidden.npy")
    embedded = torch.from_numpy(embed(IDS.astype(np.int64)))
    found = _student(checkpoint, quantized).hidden(embedded).detach().numpy()
    # a value on the edge of two codes may fall to the other side: rare, and then visible
    assert np.median(np.abs(found - expected)) < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["llama", "granite-moe-shared"])
def test_recomputation_changes_no_gradient(kind, tiny_checkpoint, tmp_path):
    checkpoint = open_checkpoint(tiny_checkpoint(kind))
    quantized = _quantized(checkpoint, tmp_path)
    rows = torch.from_numpy(layer_files.EmbeddingRows(quantized, checkpoint.spec)(IDS[:2].astype(np.int64)))
    found = []
    for recompute in (True, False):
        student = _student(checkpoint, quantized, recompute)
        for scale in student.scales[0].values():
            scale.requires_grad_()
        student.hidden(rows.clone()).square().mean().backward()
        found.append([scale.grad for scale in student.scales[0].values()])
    assert all(torch.equal(first, second) and first.abs().max() > 0 for first, second in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ["llama", "llama-biases"])
def test_products_in_half_precision_have_almost_the_same_gradients(kind, tiny_checkpoint, tmp_path):
    checkpoint = open_checkpoint(tiny_checkpoint(kind))
    quantized = _quantized(checkpoint, tmp_path)
    rows = torch.from_numpy(layer_files.EmbeddingRows(quantized, checkpoint.spec)(IDS[:2].astype(np.int64)))
    found = []
    for products in (torch.float32, torch.bfloat16):
        student = _student(checkpoint, quantized, products=products)
        for scale in student.scales[1].values():
            scale.requires_grad_()
        student.hidden(rows.clone()).square().mean().backward()
        found.append(student.scales[1])
    for name, exact in found[0].items():
        angle = torch.nn.functional.cosine_similarity(exact.grad.flatten(), found[1][name].grad.flatten(), 0)
        print(f"{kind}, {name}: cosine {angle:.4f}")
        # inputs near the edge of two codes fall to the other side: 0.70 is the least here
        assert 0.5 < angle, name
        # all linears of this kind have a bias, and multiply in single precision
        assert (angle > 0.99999) == (kind == "llama-biases"), name


def test_what_is_kept_in_memory_changes_nothing(tiny_checkpoint, tmp_path, monkeypatch):
    checkpoint = open_checkpoint(tiny_checkpoint("qwen2"))
    quantized = _quantized(checkpoint, tmp_path)
    found = []
    for kept in layer_files.Kept:
        monkeypatch.setattr(layer_files, "what_fits", lambda *_arguments, kept=kept: kept)
        tuned = _tune(checkpoint, quantized, tmp_path / kept.name, 3)
        found.append([(tuned / path.name).read_bytes() for path in sorted(quantized.glob("layer-*"))])
    assert found[0] == found[1] == found[2] != [path.read_bytes() for path in sorted(quantized.glob("layer-*"))]


def test_codes_that_are_not_kept_are_read_whenever_the_layer_runs(tiny_checkpoint, tmp_path):
    checkpoint = open_checkpoint(tiny_checkpoint("llama"))
    path, prefix = _quantized(checkpoint, tmp_path) / "layer-00000.safetensors", checkpoint.spec.layer_prefix(0)
    kept, read = (layer_files.read_layer(path, prefix, FORMAT, CPU, keep_codes) for keep_codes in (True, False))
    name = checkpoint.spec.family.ffn_writer
    assert torch.equal(kept.codes()[name], read.codes()[name])
    assert kept.codes()[name] is kept.codes()[name]
    assert read.codes()[name] is not read.codes()[name]


def test_more_is_kept_where_there_is_more_memory(tiny_checkpoint, monkeypatch):
    checkpoint = open_checkpoint(tiny_checkpoint("llama"))
    needed = [layer_files.memory_needed(checkpoint, 64, kept) for kept in layer_files.Kept]
    assert needed == sorted(needed) and len(set(needed)) == 3
    for available, expected in (
        (2 * needed[2], layer_files.Kept.ALL),
        (2 * needed[2] - 2, layer_files.Kept.CODES),
        (needed[1], layer_files.Kept.CODES),
        (needed[1] - 1, layer_files.Kept.NOTHING),
    ):
        monkeypatch.setattr(layer_files, "memory_available", lambda _device, available=available: available)
        assert layer_files.what_fits(checkpoint, 64, CPU) == expected
    for available, short in ((needed[0], False), (needed[0] - 1, True)):
        monkeypatch.setattr(layer_files, "memory_available", lambda _device, available=available: available)
        assert bool(layer_files.memory_shortage(checkpoint, 64, CPU)) == short


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "granite", "gemma2", "phi", "cohere2", "nemotron", "granite-moe-shared"])
def test_the_teacher_is_transformers(kind, tiny_checkpoint, tmp_path):
    directory = tiny_checkpoint(kind)
    checkpoint = open_checkpoint(directory)
    run_teacher(checkpoint, IDS, tmp_path / "t.npy", CPU, NullProgress())
    teacher = Teacher(checkpoint, np.load(tmp_path / "t.npy", mmap_mode="r"), CPU)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.from_numpy(IDS[2:4].astype(np.int64))).logits, -1).flatten(0, 1)
    assert (teacher.log_probabilities(np.array([2, 3])) - expected).abs().max() < 1e-4


def test_scales_have_the_gradient_of_the_product():
    rng = np.random.default_rng(0)
    codes = torch.from_numpy(rng.integers(-8, 8, (5, 128)).astype(np.int8))
    scales = torch.from_numpy(rng.standard_normal((5, 2))).requires_grad_()
    assert torch.autograd.gradcheck(lambda value: _Scaled.apply(codes, value, torch.float64), (scales,))
    x = torch.from_numpy(rng.standard_normal((3, 128))).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, value: _Product.apply(x, codes, value, torch.float64), (x, scales))
    assert torch.equal(_Product.apply(x, codes, scales, torch.float64), x @ _Scaled.apply(codes, scales, torch.float64).T)


@pytest.mark.parametrize("kind", ["llama", "glm4-moe"])
def test_tuning_lowers_the_divergence_and_leaves_codes_alone(kind, tiny_checkpoint, tmp_path, recorder):
    checkpoint = open_checkpoint(tiny_checkpoint(kind))
    quantized = _quantized(checkpoint, tmp_path)
    tuned = _tune(checkpoint, quantized, tmp_path / "tuned", 60, recorder)
    assert recorder.stages == [["run the unquantized model", 2, 2], ["tune scales", 60, 60]]
    assert sorted(path.name for path in tuned.iterdir()) == sorted(path.name for path in quantized.iterdir())
    assert not (tmp_path / "tuning").exists()
    for layer in range(2):
        before, after = (load_file(directory / f"layer-{layer:05d}.safetensors") for directory in (quantized, tuned))
        assert before.keys() == after.keys()
        for name, value in before.items():
            if value.dtype != np.uint8:
                assert np.array_equal(value, after[name])
                continue
            (codes, scales), (new_codes, new_scales) = FORMAT.unpack(value), FORMAT.unpack(after[name])
            assert np.array_equal(codes, new_codes)
            moved = np.abs(new_scales.astype(np.float32) - scales) / np.median(np.abs(scales))
            assert 0 < moved.max() < 0.2
    assert _divergence(checkpoint, tuned, tmp_path) < 0.9 * _divergence(checkpoint, quantized, tmp_path)


def _divergence(checkpoint, directory: Path, tmp_path: Path) -> float:
    run_teacher(checkpoint, IDS, tmp_path / "t.npy", CPU, NullProgress())
    right = Teacher(checkpoint, np.load(tmp_path / "t.npy"), CPU).log_probabilities(np.arange(len(IDS)))
    rows = layer_files.EmbeddingRows(directory, checkpoint.spec)
    hidden = _student(checkpoint, directory).hidden(torch.from_numpy(rows(IDS.astype(np.int64)))).flatten(0, 1)
    gain = tables.read_ending(directory)["model.norm.weight"]
    hidden = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + checkpoint.config.rms_norm_eps) * gain
    found = torch.log_softmax(hidden @ torch.from_numpy(tables.read_head(directory)).T, -1)
    return float(torch.nn.functional.kl_div(found, right, reduction="batchmean", log_target=True).detach())


def test_an_interrupted_tuning_ends_with_the_same_scales(tiny_checkpoint, tmp_path, monkeypatch):
    checkpoint = open_checkpoint(tiny_checkpoint("qwen2"))
    quantized = _quantized(checkpoint, tmp_path)
    whole = _tune(checkpoint, quantized, tmp_path / "whole", 25)

    class Interrupted(Exception):
        pass

    step = distill_scales._step
    done = []

    def failing(*arguments):
        done.append(1)
        if len(done) == 17:
            raise Interrupted
        return step(*arguments)

    monkeypatch.setattr(distill_scales, "_step", failing)
    with pytest.raises(Interrupted):
        _tune(checkpoint, quantized, tmp_path / "parts", 25)
    assert not (tmp_path / "parts").exists()
    again = _tune(checkpoint, quantized, tmp_path / "parts", 25)
    assert len(done) == 17 + 25 - 10  # from the last state on disk
    for layer in range(2):
        name = f"layer-{layer:05d}.safetensors"
        assert (whole / name).read_bytes() == (again / name).read_bytes()


def test_a_divergence_that_is_not_finite_is_said(tiny_checkpoint, tmp_path):
    checkpoint = open_checkpoint(tiny_checkpoint("llama"))
    quantized = _quantized(checkpoint, tmp_path)
    head = np.load(quantized / tables.HEAD)
    head[0, 0] = np.inf
    np.save(quantized / tables.HEAD, head)
    with pytest.raises(KurtailError, match="the divergence is nan on sequence 0; give --tune 0"):
        _tune(checkpoint, quantized, tmp_path / "tuned", 3)
