"""Damage of rounding a linear's input, against finite differences of the divergence in transformers' own model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.method.activations.damage import DamageMeter, measure
from kurtail_gguf.method.fold import tables
from kurtail_gguf.method.fold.transforms import Transforms
from kurtail_gguf.method.quantize.layerwise import fold_and_quantize
from kurtail_gguf.method.quantize.quantized_prefix import QuantizedPrefix
from kurtail_gguf.method.tuning import layer_files
from kurtail_gguf.method.tuning.scales import divergence
from kurtail_gguf.model.loading.checkpoint import open_checkpoint
from kurtail_gguf.model.sites import ATTENTION, ATTENTION_OUTPUT, FFN, FFN_OUTPUT, SITES
from kurtail_gguf.numerics.formats.targets import BLOCK_FORMATS
from kurtail_gguf.numerics.simulation import attention
from kurtail_gguf.numerics.simulation.attention import CacheSettings, rotated, use_simulated_attention
from kurtail_gguf.numerics.simulation.rounding import round_to
from kurtail_gguf.numerics.simulation.runtime import RuntimeRounding

CPU = torch.device("cpu")
IDS = np.random.default_rng(0).integers(3, 320, (2, 24)).astype(np.int32)
FORMAT = BLOCK_FORMATS["kurtail"]
#: A size of its own for each site.
ONLINE = dict(zip(SITES, (64, 32, 16, 8), strict=True))
CACHE = CacheSettings(bits=4, rotation=0, rotate_v=False, paired=False)
ROUNDING = RuntimeRounding(4, 64, ONLINE, CACHE)
ONE_EIGHT = "model.layers.0.mlp.down_proj.weight"

pytestmark = pytest.mark.usefixtures("plain_embedding")


@pytest.fixture
def quantize(tiny_checkpoint, tmp_path):
    """``quantize(kind)``: a tiny checkpoint and the directory of its layers, rounded to nearest, with R4."""

    def make(kind: str):
        checkpoint = open_checkpoint(tiny_checkpoint(kind))
        target = tmp_path / "quantized"
        return checkpoint, fold_and_quantize(
            checkpoint, Transforms(online=ONLINE), FORMAT, None, target, CPU, NullProgress()
        )

    return make


def _measure(checkpoint, quantized: Path, rounding, tmp_path: Path, progress=None):
    teacher = layer_files.open_teacher(checkpoint, IDS, tmp_path / "t.npy", CPU, NullProgress())
    meter = DamageMeter()
    student, outside = layer_files.open_student(
        checkpoint, quantized, FORMAT, rounding, CPU, IDS.shape[1], rounded=meter.rounded
    )
    return measure(student, meter, teacher, outside, IDS, CPU, progress or NullProgress())


class _Frozen:
    """transformers' model of the quantized layers, every rounding x ↦ x + f·e with e as it was at the first pass.

    That is the network whose gradients the straight-through estimator takes, and it is smooth in the factors f.
    """

    def __init__(self, checkpoint, quantized: Path, rounding: RuntimeRounding, monkeypatch) -> None:
        self._factors: dict[str, float] = {}
        self._errors: dict[str, torch.Tensor] = {}
        self._in_attention = 0
        monkeypatch.setattr(attention, "round_through", self._attention)
        config = checkpoint.config
        config.tie_word_embeddings = False
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=use_simulated_attention()
        )
        state = {"model.embed_tokens.weight": np.load(quantized / tables.EMBEDDING)}
        state["lm_head.weight"] = np.load(next(p for p in (quantized / tables.HEAD, quantized / tables.EMBEDDING) if p.exists()))
        for path in quantized.glob("*.safetensors"):
            for name, value in load_file(path).items():
                state[name] = FORMAT.dequantize(*FORMAT.unpack(value)) if value.dtype == np.uint8 else value
        model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in state.items()})
        for layer in model.model.layers:
            layer.self_attn.kurtail_cache = rounding.cache
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.register_forward_pre_hook(self._hook(f"{name}.weight", rounding))
        self._model = model.eval()

    def log_probabilities(self, sequence: int, **factors: float) -> torch.Tensor:
        self._in_attention = 0
        self._factors = factors
        ids = torch.from_numpy(IDS[sequence : sequence + 1].astype(np.int64))
        with torch.no_grad():
            return torch.log_softmax(self._model(ids).logits[0].double(), -1)

    def as_double(self) -> None:
        self._model.double()

    def forget(self) -> None:
        self._model.float()
        self._errors.clear()

    def _hook(self, weight: str, rounding: RuntimeRounding):
        parts = (("o_proj", ATTENTION_OUTPUT), ("down_proj", FFN_OUTPUT), ("self_attn", ATTENTION), ("mlp", FFN))
        size = rounding.online[next(kind for part, kind in parts if part in weight)]

        def hook(_module, inputs):
            x = rotated(inputs[0], size)
            return (self._round(x, weight, rounding.exceptions.get(weight, 4), 64),)

        return hook

    def _attention(self, x, bits: int, block: int):
        self._in_attention += 1
        return self._round(x, f"attention {self._in_attention}", bits, block)

    def _round(self, x, name: str, bits: int, block: int):
        if name not in self._errors:
            self._errors[name] = round_to(x, bits, block) - x
        return x + self._factors.get(name, 1.0) * self._errors[name]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("exceptions", [{}, {ONE_EIGHT: 8}], ids=["all-4", "one-8"])
def test_damage_is_how_fast_the_divergence_falls_with_the_error(quantize, tmp_path, monkeypatch, kind, exceptions):
    """d KL / dε of (1 − ε) times the rounding error at one linear's input, every other error kept."""
    checkpoint, quantized = quantize(kind)
    rounding = RuntimeRounding(4, 64, ONLINE, CACHE, exceptions)
    damages, mean = _measure(checkpoint, quantized, rounding, tmp_path)
    directory = checkpoint.directory
    teacher = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    frozen = _Frozen(checkpoint, quantized, rounding, monkeypatch)
    expected = dict.fromkeys(damages, 0.0)
    base = 0.0
    for sequence in range(len(IDS)):
        with torch.no_grad():
            ids = torch.from_numpy(IDS[sequence : sequence + 1].astype(np.int64))
            right = torch.log_softmax(teacher(ids).logits[0].double(), -1)

        def loss(sequence=sequence, right=right, **factors: float) -> float:
            found = frozen.log_probabilities(sequence, **factors)
            return float(torch.nn.functional.kl_div(found, right, reduction="batchmean", log_target=True)) / len(IDS)

        frozen.forget()
        base += loss()  # in single precision, as the runtime and the student are: the errors are from here
        frozen.as_double()
        for weight in damages:
            expected[weight] += (loss(**{weight: 1 + 1e-3}) - loss(**{weight: 1 - 1e-3})) / 2e-3
    assert mean == pytest.approx(base, rel=1e-3)
    assert len(damages) == 14
    largest = max(map(abs, expected.values()))
    for weight, damage in damages.items():
        assert damage == pytest.approx(expected[weight], rel=0.01, abs=5e-4 * largest), weight
    if exceptions:
        assert abs(damages[ONE_EIGHT]) < 0.1 * abs(_measure(checkpoint, quantized, ROUNDING, tmp_path)[0][ONE_EIGHT])


def test_every_linear_counts_once_a_sequence_though_layers_are_recomputed(quantize, tmp_path, monkeypatch):
    checkpoint, quantized = quantize("llama")
    calls = []
    original = DamageMeter.rounded

    def counted(self, x, weight, bits, block):
        calls.append(weight)
        return original(self, x, weight, bits, block)

    monkeypatch.setattr(DamageMeter, "rounded", counted)
    monkeypatch.setattr(layer_files, "memory_available", lambda device: 0)
    recomputed, _ = _measure(checkpoint, quantized, ROUNDING, tmp_path)
    assert calls.count(ONE_EIGHT) == 2 * len(IDS)  # forward, and again on the way back
    calls.clear()
    monkeypatch.setattr(layer_files, "memory_available", lambda device: 1 << 40)
    kept, _ = _measure(checkpoint, quantized, ROUNDING, tmp_path)
    assert calls.count(ONE_EIGHT) == len(IDS)
    assert recomputed == pytest.approx(kept, rel=1e-5)


def test_the_meter_changes_neither_values_nor_gradients(quantize, tmp_path):
    checkpoint, quantized = quantize("mistral")
    teacher = layer_files.open_teacher(checkpoint, IDS, tmp_path / "t.npy", CPU, NullProgress())
    found = []
    for options in ({}, {"rounded": DamageMeter().rounded}):
        student, outside = layer_files.open_student(checkpoint, quantized, FORMAT, ROUNDING, CPU, IDS.shape[1], **options)
        scale = student.scales[0]["mlp.up_proj"].requires_grad_()
        loss = divergence(student, teacher, outside, IDS, np.arange(2), CPU)
        loss.backward()
        found.append((float(loss.detach()), scale.grad))
    assert found[0][0] == found[1][0]
    # without the meter gradients of a site's readers are summed before they go through its transform
    assert (found[0][1] - found[1][1]).abs().max() < 1e-5 * found[0][1].abs().max()


def test_exceptions_for_all_linears_are_the_other_general_rule(quantize, tmp_path):
    checkpoint, quantized = quantize("llama")
    names = checkpoint.spec.linears
    every = {f"model.layers.{layer}.{name}.weight": 8 for layer in range(2) for name in names}
    embedded = torch.from_numpy(layer_files.EmbeddingRows(quantized, checkpoint.spec)(IDS.astype(np.int64)))
    hidden = []
    for rounding in (RuntimeRounding(8, 64, ONLINE, CACHE), RuntimeRounding(4, 64, ONLINE, CACHE, every), ROUNDING):
        student, _ = layer_files.open_student(checkpoint, quantized, FORMAT, rounding, CPU, IDS.shape[1])
        hidden.append(student.hidden(embedded.clone()).detach())
    assert torch.equal(hidden[0], hidden[1]) and not torch.allclose(hidden[0], hidden[2], rtol=0.01)


def test_quantization_knows_no_exceptions(quantize, tmp_path):
    checkpoint, quantized = quantize("llama")
    rounding = RuntimeRounding(4, 64, ONLINE, CACHE, {ONE_EIGHT: 8})
    with pytest.raises(ValueError, match="after quantization"):
        QuantizedPrefix(checkpoint, IDS, layer_files.EmbeddingRows(quantized, checkpoint.spec), rounding, tmp_path, CPU)


def test_a_divergence_that_is_not_finite_is_said(quantize, tmp_path):
    checkpoint, quantized = quantize("llama")
    head = np.load(quantized / tables.HEAD)
    head[0, 0] = np.inf
    np.save(quantized / tables.HEAD, head)
    with pytest.raises(KurtailError, match="the divergence is nan on sequence 0; give --activations 4 or 8"):
        _measure(checkpoint, quantized, ROUNDING, tmp_path)
