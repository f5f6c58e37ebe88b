"""What of a file's cache is told: its cost beside an f16 cache's, by fixed log-probabilities."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kurtail_gguf.check import runtime_checks as verification_runtime
from kurtail_gguf.check.runtime_checks import CACHE_COST, Differs, RuntimeChecks
from kurtail_gguf.runtime.provenance import Provenance


@pytest.fixture
def checks(monkeypatch, recorder):
    """``checks(provenance, costs)``: checks of a file whose caches diverge by ``costs``; and what was run."""

    def make(provenance, costs):
        runs = []

        def said(path, sequences, exact_cache=False, adapter=None, cache="file"):
            runs.append("exact" if exact_cache else cache)
            # KL((1/2, 1/2) || (p, 1 - p)) = -ln(4 p (1 - p)) / 2
            p = (1 + np.sqrt(1 - np.exp(-2 * costs[cache]))) / 2 if not exact_cache else 0.5
            return np.log(np.array([[p, 1 - p]] * 3))

        monkeypatch.setattr(verification_runtime, "runtime_log_probabilities", said)
        # no model is needed for this check but for its tokens
        found = RuntimeChecks(None, Path("m.gguf"), provenance, recorder)
        found.__dict__["_ids"] = [1, 2, 3]
        return found, runs

    return make


PROVENANCE = Provenance(
    rotation="hadamard", objective="none", weights="rtn", tune_steps=0, seed=0, r1_kind="random", r1_size=128, r2_kind="random",
    r2_size=64, r3_kind="hadamard", r3_size=64, r4_kind="none", r4_size=0, activation_bits=4, kv_bits=4, calibration_name="",
    calibration_tokens=0, calibration_sha256="",
)  # fmt: skip
FOUR = replace(PROVENANCE, kv_bits=4, kv_k_bits=(4, 8), kv_v_bits=(4, 4))


def test_a_cache_is_held_against_f16(checks, recorder):
    # in a deep model of 4-bit activations an f16 cache moves what is said as well
    found, runs = checks(FOUR, {"file": 0.2, "f16": 0.18})
    assert found.cache() == "KV4+8; divergence from an exact cache 0.2 nats, of an f16 cache 0.18"
    assert runs == ["exact", "file", "f16"]
    assert recorder.stages == [["compare caches", 2, 2]]


@pytest.mark.parametrize("floor", [0.0, 0.18])
def test_a_bad_cache_differs_with_the_remedy(checks, floor):
    found, _ = checks(FOUR, {"file": floor + 0.9 * CACHE_COST, "f16": floor})
    found.cache()
    found, _ = checks(FOUR, {"file": floor + 1.1 * CACHE_COST, "f16": floor})
    with pytest.raises(Differs, match=r"own cache \(KV4\+8\) changes its predictions: .*convert the model again, or run the file with -ctk q8_0"):
        found.cache()


def test_an_f16_cache_is_not_compared_with_itself(checks):
    found, runs = checks(replace(PROVENANCE, kv_bits=16), {"file": 0.4})
    assert found.cache() == "KV16; divergence from an exact cache 0.4 nats" and runs == ["exact", "file"]
