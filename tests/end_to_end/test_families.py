"""Every family end to end: a tiny random model, folded and unquantized, then in four bits, against transformers.

Unquantized the file must say what transformers says, up to single precision; in four bits what it says at a position
must be nearer to that than what it says elsewhere.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kurtail_gguf.convert.pipeline import convert
from kurtail_gguf.convert.settings import ConvertConfig
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.model.families.registry import FAMILIES
from kurtail_gguf.runtime.gguf_info import read_gguf
from kurtail_gguf.runtime.logits import mean_divergence, runtime_log_probabilities

KINDS = (
    "llama2", "llama-tied", "llama-biases", "llama3", "mistral", "mixtral", "qwen2", "qwen3", "qwen3-moe", "smollm3", "granite",
    "phi3",
)  # fmt: skip

#: Upstream's converter knows no such vocabulary for them.
WITHOUT_SENTENCEPIECE = frozenset({"qwen3-moe"})

#: Largest difference of a log-probability from transformers' own, in single precision on both sides.
UNQUANTIZED = 1e-4
#: Weights, activations and cache of 4 bits: share of the divergence from what is said at the next position. Random
#: weights leave nothing redundant: 0.37 is the most of these; what is wrong in the file's basis makes it 1.
NEARER = 0.5

pytestmark = pytest.mark.usefixtures("bindings")


@pytest.fixture(scope="session")
def tokens() -> list[list[int]]:
    """Two sequences below every tiny vocabulary, longer than the original context of the scaled RoPE."""
    rng = np.random.default_rng(5)
    return [[1, *rng.integers(3, 320, length).tolist()] for length in (60, 20)]


@pytest.fixture(scope="session")
def family(tiny_spm, tiny_bpe, with_tokenizer):
    """``family(kind)``: an HF directory with a real tokenizer, made once."""

    @functools.cache
    def make(kind: str) -> Path:
        return with_tokenizer(kind, *((tiny_bpe, 49152) if kind in WITHOUT_SENTENCEPIECE else (tiny_spm, 400)))

    return make


@pytest.fixture(scope="session")
def expected(family, tokens):
    """``expected(kind)``: transformers' log-probabilities, float32 ``[Σ tokens, vocabulary]``."""

    @functools.cache
    def say(kind: str) -> np.ndarray:
        model = AutoModelForCausalLM.from_pretrained(family(kind), dtype=torch.float32).eval()
        with torch.no_grad():
            rows = [torch.log_softmax(model(torch.tensor([one])).logits[0], -1) for one in tokens]
        return torch.cat(rows).numpy()

    return say


def test_every_family_has_a_case(save_tiny, tmp_path):
    names = set()
    for kind in KINDS:
        save_tiny(kind, tmp_path / kind)
        names |= set(json.loads((tmp_path / kind / "config.json").read_text())["architectures"])
    assert names == set(FAMILIES)


@pytest.mark.parametrize("kind", KINDS)
def test_unquantized_it_says_what_transformers_says(kind, family, expected, tokens, tmp_path):
    out, right = tmp_path / "out.gguf", expected(kind)
    # scales and offsets of keys are there, and the cache is read in single precision
    convert(ConvertConfig(str(family(kind)), out, rotation="hadamard", weights="f32", kv=4), NullProgress())
    assert right.std() > 0.5  # logits that mean something
    found = runtime_log_probabilities(out, tokens, exact_cache=True)
    difference = np.abs(found - right).max()
    print(f"{kind} unquantized: largest difference {difference:.1e} of a spread of {right.std():.2f}")
    assert difference < UNQUANTIZED


@pytest.mark.parametrize("kind", KINDS)
def test_in_four_bits_it_makes_sense(kind, family, expected, tokens, text, tmp_path):
    out, right = tmp_path / "out.gguf", expected(kind)
    config = ConvertConfig(str(family(kind)), out, rotation="hadamard", calibration=(str(text),), calibration_tokens=1024)
    convert(config, NullProgress())
    assert read_gguf(out).runs_as in ("W4A4KV4", "W4A4KV4+8")
    found = runtime_log_probabilities(out, tokens)
    here, elsewhere = mean_divergence(right, found), mean_divergence(right, np.roll(found, 1, axis=0))
    print(f"{kind} in four bits: divergence {here:.3f}, from the next position's {elsewhere:.3f}")
    assert here < NEARER * elsewhere
