"""Figures and settings derived from a GGUF file's keys and tensors."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from kurtail_gguf.runtime import ggml
from kurtail_gguf.runtime.gguf_info import (
    ONLINE_KIND,
    ONLINE_NAME,
    ONLINE_SIZE,
    PROVENANCE_KEYS,
    GgufError,
    GgufInfo,
    TensorInfo,
)  # fmt: skip
from kurtail_gguf.runtime.provenance import Provenance

PROVENANCE = Provenance(
    rotation="kurtail", objective="kurtosis", weights="rtn", tune_steps=0, seed=3, r1_kind="learned", r1_size=128, r2_kind="learned",
    r2_size=64, r3_kind="hadamard", r3_size=64, r4_kind="hadamard", r4_size=128, activation_bits=4, kv_bits=4,
    calibration_name="self", calibration_tokens=1024, calibration_sha256="00",
)  # fmt: skip


def _info(metadata=(), tensors=()):
    return GgufInfo(Path("x.gguf"), {"general.architecture": "llama", **dict(metadata)}, tuple(tensors))


def _keys(provenance=PROVENANCE):
    values = asdict(provenance)
    return {key: values[field] for field, key, _ in PROVENANCE_KEYS}


def test_every_field_of_the_provenance_has_a_key_and_a_documented_type():
    assert {field for field, _, _ in PROVENANCE_KEYS} == set(asdict(PROVENANCE))
    specification = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
    documented = {line.split("|")[1].strip(" `"): line.split("|")[2].strip() for line in specification.splitlines() if line.startswith("| `kurtail.")}
    online = {ONLINE_NAME: "string[]", ONLINE_KIND: "string[]", ONLINE_SIZE: "uint32[]"}
    assert {key: kind for _, key, kind in PROVENANCE_KEYS} | online == documented


def test_provenance_survives():
    assert _info(_keys()).provenance == PROVENANCE
    assert _info().provenance is None
    incomplete = _keys()
    del incomplete["kurtail.r4.size"]
    with pytest.raises(GgufError, match="kurtail.r4.size"):
        _ = _info(incomplete).provenance


def test_a_file_older_than_the_target_is_for_our_runtime():
    older = _keys()
    del older["kurtail.target"], older["kurtail.activation_choice"], older["kurtail.activation_budget"]
    provenance = _info(older).provenance
    assert (provenance.target, provenance.activation_choice, provenance.activation_budget) == ("kurtail", "fixed", 0)


@pytest.mark.parametrize(
    ("keys", "type_id", "bits", "word"),
    [
        (_keys(replace(PROVENANCE, activation_bits=8)), ggml.KT4, (8, 4), "W4A8KV4"),
        (_keys(replace(PROVENANCE, target="stock", activation_bits=8, kv_bits=16)), ggml.Q4_0, (None, 16), "stock W4"),
        ({}, ggml.Q4_0, (None, 16), "stock"),
        # types tell more than keys, which llama-quantize copies
        (_keys(), ggml.Q8_0, (None, 4), "requantized t KV4"),
        (_keys(replace(PROVENANCE, target="stock", activation_bits=8, kv_bits=16)), ggml.Q8_0, (None, 16), "stock t"),
        (_keys(replace(PROVENANCE, weights="f32", activation_bits=32)), ggml.F32, (None, 4), "f32KV4"),
        ({}, ggml.KT4, (4, 16), "W4A4KV16"),
    ],
)
def test_what_a_file_runs_as(keys, type_id, bits, word):
    info = _info(keys, [TensorInfo("blk.0.attn_q.weight", type_id, "t", (64, 64), 64 * 34, 0)])
    assert (info.runtime_bits, info.runs_as) == (bits, word)


def test_linears_left_as_they_are_beside_others_are_no_other_types():
    quantized, left, other = (
        TensorInfo(f"blk.0.attn_{name}.weight", kind, "t", (64, 64), 64 * 34, 0)
        for name, kind in (("q", ggml.KT4), ("k", ggml.BF16), ("v", ggml.Q8_0))
    )
    assert _info(_keys(), [quantized, left]).runs_as == "W4A4KV4"
    assert _info(_keys(), [left]).requantized == "t"
    assert _info(_keys(), [quantized, left, other]).requantized is not None


def test_a_file_that_does_not_say_what_it_is():
    with pytest.raises(GgufError, match="x.gguf does not name its architecture: key general.architecture is missing"):
        GgufInfo(Path("x.gguf"), {}, ()).hyper("block_count")


def test_bits_per_weight():
    tensors = [
        TensorInfo("blk.0.attn_q.weight", ggml.KT4, "kt4", (64, 64), 64 * 34, 0),
        TensorInfo("token_embd.weight", ggml.F16, "f16", (64, 64), 64 * 128, 0),
    ]
    info = _info(tensors=tensors)
    assert info.block_bits_per_weight == 4.25
    assert info.bits_per_weight == pytest.approx((4.25 + 16) / 2)
    assert _info().block_bits_per_weight is None


def test_which_tensors_are_linears_of_a_block():
    def is_linear(name):
        return TensorInfo(name, 0, "f32", (1,), 4, 0).is_block_linear

    assert all(is_linear(f"blk.11.{part}.weight") for part in ("attn_q", "attn_output", "ffn_down", "ffn_gate"))
    assert not any(is_linear(name) for name in ("blk.0.attn_norm.weight", "output.weight", "blk.0.attn_q.bias"))


def test_activation_bits_of_a_tensor():
    extra = {
        "general.tensor_extra.name": ["blk.0.attn_q.weight", "blk.0.attn_k.weight"],
        "general.tensor_extra.prec_a4": [False, True],
    }
    info = _info({**_keys(), **extra})
    assert [info.activation_bits_of(f"blk.0.attn_{name}.weight") for name in "qkv"] == [8, 4, 4]


def test_a_file_with_some_linears_at_eight_bits():
    extra = {
        "general.tensor_extra.name": ["blk.0.attn_q.weight", "token_embd.weight"],
        "general.tensor_extra.prec_a4": [False, False],
    }
    names = ("blk.0.attn_q.weight", "blk.0.attn_k.weight", "token_embd.weight")
    tensors = [TensorInfo(name, ggml.KT4, "kt4", (64, 64), 64 * 34, 0) for name in names]
    for keys in (_keys(replace(PROVENANCE, activation_choice="auto", activation_budget=0.5)), {}):
        info = _info({**keys, **extra}, tensors)
        assert info.activation_exceptions == {"blk.0.attn_q.weight": 8}
        assert info.runs_as == ("W4A4+8KV4" if keys else "W4A4+8KV16")
        assert info.runtime_bits[0] == 4
    eight = _info({**_keys(replace(PROVENANCE, activation_bits=8)), **extra}, tensors)
    assert (eight.activation_exceptions, eight.runs_as) == ({}, "W4A8KV4")
    upstreams = [replace(tensor, type_id=ggml.Q4_0) for tensor in tensors]
    stock = _info({**_keys(replace(PROVENANCE, target="stock", activation_bits=8)), **extra}, upstreams)
    assert (stock.activation_exceptions, stock.runs_as) == ({}, "stock W4")
