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

from kurtail_gguf.arch.registry import FAMILIES
from kurtail_gguf.config import ConvertConfig
from kurtail_gguf.evaluate.logits import runtime_log_probabilities
from kurtail_gguf.pipeline import convert
from kurtail_gguf.progress import NullProgress

KINDS = (
    "llama-biases", "llama3", "mistral", "mixtral", "qwen2", "qwen3", "qwen3-moe", "smollm3", "granite", "phi3",
)  # fmt: skip

#: Upstream's converter knows no such vocabulary for them.
WITHOUT_SENTENCEPIECE = frozenset({"qwen3-moe"})

#: Largest difference of a log-probability from transformers' own, in single precision on both sides.
UNQUANTIZED = 1e-4
#: Weights and cache of 4 bits, activations of 8: share of the divergence from what is said at the next position. Random
#: weights leave nothing redundant; what is wrong in the file's basis makes it 1.
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


def expected(source: Path, sequences: list[list[int]]) -> np.ndarray:
    """transformers' log-probabilities, float32 ``[Σ tokens, vocabulary]``."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        rows = [torch.log_softmax(model(torch.tensor([one])).logits[0], -1) for one in sequences]
    return torch.cat(rows).numpy()


def divergence(right: np.ndarray, found: np.ndarray) -> float:
    """Mean over positions of the Kullback-Leibler divergence, in nats."""
    return float((np.exp(right) * (right - found)).sum(-1).mean())


def test_every_family_has_a_case(save_tiny, tmp_path):
    names = set()
    for kind in KINDS:
        save_tiny(kind, tmp_path / kind)
        names |= set(json.loads((tmp_path / kind / "config.json").read_text())["architectures"])
    assert names == set(FAMILIES)


@pytest.mark.parametrize("kind", KINDS)
def test_unquantized_it_says_what_transformers_says(kind, family, tokens, tmp_path):
    source, out = family(kind), tmp_path / "out.gguf"
    convert(ConvertConfig(str(source), out, rotation="hadamard", weights="f32"), NullProgress())
    right = expected(source, tokens)
    assert right.std() > 0.5  # logits that mean something
    found = runtime_log_probabilities(out, tokens, exact_cache=True)
    difference = np.abs(found - right).max()
    print(f"{kind} unquantized: largest difference {difference:.1e} of a spread of {right.std():.2f}")
    assert difference < UNQUANTIZED


@pytest.mark.parametrize("kind", KINDS)
def test_in_four_bits_it_makes_sense(kind, family, tokens, text, tmp_path):
    source, out = family(kind), tmp_path / "out.gguf"
    config = ConvertConfig(
        str(source), out, rotation="hadamard", calibration=(str(text),), calibration_tokens=2048, activations=8
    )
    convert(config, NullProgress())
    right, found = expected(source, tokens), runtime_log_probabilities(out, tokens)
    here, elsewhere = divergence(right, found), divergence(right, np.roll(found, 1, axis=0))
    print(f"{kind} in four bits: divergence {here:.3f}, from the next position's {elsewhere:.3f}")
    assert here < NEARER * elsewhere
