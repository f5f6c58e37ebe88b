"""The 4-bit cache of models whose keys have outliers, as Qwen2.5's biases and Qwen3's gains give them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from kurtail_gguf.convert.pipeline import convert
from kurtail_gguf.convert.settings import ConvertConfig
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.method.cache import streams
from kurtail_gguf.method.cache.condition import Conditioned
from kurtail_gguf.runtime.gguf_info import K_OFFSET, read_gguf
from kurtail_gguf.runtime.logits import mean_divergence, runtime_log_probabilities

#: Families whose keys can have them, by what makes them.
BIASED = ("llama-biases", "qwen2", "seed-oss", "glm4", "stablelm", "starcoder2", "phi", "qwen2-moe", "glm4-moe")
GAINED = ("qwen3", "qwen3-moe", "gemma3", "olmo2", "olmo3", "exaone4", "hunyuan", "olmoe", "glm4-moe-norms", "dots1")
#: Upstream's converter knows the SentencePiece vocabulary of these only.
WITH_SENTENCEPIECE = ("llama-biases", "qwen2", "qwen3", "gemma3")
TOKENS = [[1, *np.random.default_rng(5).integers(3, 320, 100).tolist()]]

pytestmark = pytest.mark.usefixtures("bindings")


@pytest.fixture
def outliers(tiny_spm, tiny_bpe, with_tokenizer, tmp_path):
    """``outliers(kind)``: a tiny model whose keys are huge in the pair that RoPE turns least, in its first layer."""

    def make(kind: str) -> Path:
        made = with_tokenizer(kind, *((tiny_spm, 400) if kind in WITH_SENTENCEPIECE else (tiny_bpe, 49152)))
        model = shutil.copytree(made, tmp_path / "model")
        path = model / "model.safetensors"
        tensors = load_file(path)
        config = AutoConfig.from_pretrained(model)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        turned = int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1))
        # GLM turns neighbours, all others channels half of what is turned apart
        pair = [turned - 2, turned - 1] if kind == "glm4" else [turned // 2 - 1, turned - 1]
        attention = "model.layers.0.self_attn."
        if kind in BIASED:
            tensors[attention + "k_proj.bias"].view(2, head_dim)[:, pair] = torch.tensor([[60.0, -40.0], [30.0, 80.0]])
        else:
            (name,) = {attention + "k_norm.weight", attention + "key_layernorm.weight"} & set(tensors)
            tensors[name].view(-1, head_dim)[:, pair] = max(60.0, head_dim)  # R3 spreads it over a head
        save_file(tensors, path, {"format": "pt"})
        return model

    return make


def _converted(model: Path, out: Path, **changes) -> Path:
    # 8-bit activations: what is seen is the cache
    options = {"rotation": "hadamard", "weights": "rtn", "activations": 8} | changes
    convert(ConvertConfig(str(model), out, **options), NullProgress())
    return out


def _share(path: Path) -> float:
    """Mean divergence that the file's cache alone causes, in the runtime."""
    exact, own = (runtime_log_probabilities(path, TOKENS, exact_cache=exact) for exact in (True, False))
    return mean_divergence(exact, own)


@pytest.mark.parametrize("kind", BIASED + GAINED)
def test_outliers_of_keys_do_no_harm(kind, outliers, text, tmp_path, monkeypatch):
    model = outliers(kind)
    # R1 would not commute with all of them, and what some of them write themselves is one token again and again
    options = {"rotation": "diagonal", "calibration": (str(text),), "calibration_tokens": 1024}
    path = _converted(model, tmp_path / "out.gguf", **options)
    info = read_gguf(path)
    provenance = info.provenance
    assert provenance.mean_kv_bits <= 6  # two layers: one may have keys of 8 bits
    # a gain turns with what it multiplies: only a bias is the same for all tokens. What is there else is of BOS's key
    assert (np.abs(info.metadata.get(K_OFFSET, 0.0)).max() > 10) == (kind in BIASED)

    def unprepared(statistics, *_):
        return Conditioned(torch.ones_like(statistics.mean), torch.zeros_like(statistics.mean, dtype=torch.float32))

    monkeypatch.setattr(streams, "condition", unprepared)
    bare = _converted(model, tmp_path / "bare.gguf", kv=4, **options)
    here, without = _share(path), _share(bare)
    print(f"{kind}: the cache alone diverges by {here:.4f}, keys as they are by {without:.4f}")
    # a gain's outlier can only be shared with the queries
    times = 6 if kind in BIASED else 2.5
    assert here < without / times
    assert here < 0.08
    # the conversion had said so
    assert read_gguf(bare).provenance.kv_divergence > times / 2 * provenance.kv_divergence


def test_the_offset_changes_nothing_but_rounding(outliers, tmp_path):
    """With an exact cache it may be anything."""
    path = tmp_path / "out.gguf"
    # inputs of linears stay as they are: rounded ones flip, and then more is seen than the offset
    convert(ConvertConfig(str(outliers("qwen2")), path, rotation="hadamard", weights="f32", kv="auto"), NullProgress())
    data = bytearray(path.read_bytes())
    count = len(read_gguf(path).metadata[K_OFFSET])
    # key, type array, element type, length
    at = data.index(K_OFFSET.encode()) + len(K_OFFSET) + 4 + 4 + 8
    data[at : at + 4 * count] = np.random.default_rng(0).standard_normal(count).astype("<f4").tobytes()
    (tmp_path / "other.gguf").write_bytes(data)
    one, other = (runtime_log_probabilities(file, TOKENS, exact_cache=True) for file in (path, tmp_path / "other.gguf"))
    assert 0 < np.abs(one - other).max() < 1e-3


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (np.float32("nan").tobytes(), "kurtail.kv.k_offset has NaN or infinite values in layer 0"),
        (np.float32("inf").tobytes(), "kurtail.kv.k_offset has NaN or infinite values in layer 0"),
    ],
)
def test_offsets_that_are_no_numbers_are_refused(outliers, tmp_path, program, value, told):
    path = _converted(outliers("qwen2"), tmp_path / "out.gguf")
    data = bytearray(path.read_bytes())
    at = data.index(K_OFFSET.encode()) + len(K_OFFSET) + 4 + 4 + 8
    data[at : at + 4] = value
    path.write_bytes(data)
    done = program("llama-completion", "-m", path, "-no-cnv", "-p", "a", "-n", "1")
    assert done.status != 0 and told in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("key", "at", "value", "told"),
    [
        ("kurtail.kv.k_bits", 16, 5, "kurtail.kv.k_bits is 5 in layer 0, this runtime supports 4, 8, 16"),
        ("kurtail.kv.v_bits", 4, 5, "key kurtail.kv.v_bits is an array of i32, expected u32"),
    ],
)
def test_bits_that_are_unknown_are_refused(tiny_spm, converted, tmp_path, program, key, at, value, told):
    data = bytearray(converted(tiny_spm, "--rotation", "hadamard", "--weights", "rtn").read_bytes())
    data[(start := data.index(key.encode()) + len(key) + at) : start + 4] = value.to_bytes(4, "little")
    (tmp_path / "wrong.gguf").write_bytes(data)
    done = program("llama-completion", "-m", tmp_path / "wrong.gguf", "-no-cnv", "-p", "a", "-n", "1")
    assert done.status != 0 and told in done.stdout + done.stderr


def test_each_layer_has_its_own_types_and_given_ones_win(outliers, tmp_path, program):
    """Sizes of the cache say what its layers are: 64 cells, 2 heads of 32."""
    path = _converted(outliers("qwen2"), tmp_path / "out.gguf", kv=8)
    data = bytearray(path.read_bytes())
    start = data.index(b"kurtail.kv.k_bits") + len("kurtail.kv.k_bits") + 16
    data[start : start + 4] = (4).to_bytes(4, "little")
    path.write_bytes(data)
    at = {4: 18 / 32, 8: 34 / 32, 16: 2}

    def bytes_of(*options: str) -> tuple[float, float]:
        done = program("llama-completion", "-m", path, "-no-cnv", "-p", "a", "-n", "1", "-c", "256", "-lv", "4", *options)
        line = next(line for line in (done.stdout + done.stderr).splitlines() if "cells" in line and "K (" in line)
        k, v = line.split("K (")[1].split("V (")
        return tuple(float(part.split(":")[1].split()[0]) for part in (k, v))

    cells = 256 * 64 / 2**20  # values a layer, in MiB
    assert bytes_of() == pytest.approx(((at[4] + at[8]) * cells, 2 * at[8] * cells), abs=0.006)
    assert bytes_of("-ctk", "f16") == pytest.approx((2 * at[16] * cells, 2 * at[8] * cells), abs=0.006)
    assert bytes_of("-ctv", "q4_0") == pytest.approx(((at[4] + at[8]) * cells, 2 * at[4] * cells), abs=0.006)
    assert bytes_of("-fa", "off")[1] == pytest.approx(2 * at[16] * cells, abs=0.006)
