"""Context shifts of every cache: rotated by R3 or not, all or part of a head in RoPE, heads of all sizes.

One layer, so that a shift is exact but for rounding: keys and values of a first layer depend on nothing but their own token
and position, and what is said after a shift is what is said of the same tokens decoded afresh.
"""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

F32, F16, Q4_0 = 0, 1, 2
#: ggml's numbers: what llama.cpp takes for -ctk.
TYPES = {"f32": F32, "f16": F16, "bf16": 30, "q8_0": 8, "q5_1": 7, "q5_0": 6, "q4_1": 3, "q4_0": Q4_0, "iq4_nl": 20}
#: Distance of logits from those of an f32 cache, of their norm: a shift rounds K once more, which makes it up to 1.7 times
#: what the type's own rounding makes it; f16 sums of the attention are the rest. Without undoing R3 it is 1.0, with the
#: scale of LongRoPE applied twice 0.6.
ROUNDED_AGAIN, SUMS = 2.0, 0.005

#: head_dim, share of it in RoPE (0.75: Phi-4-mini), R3; no R3 fits a head of 96 (Phi-3-mini)
SHAPES = [
    pytest.param(head, share, r3, id=f"{head}-{'partial' if share < 1 else 'full'}-{'r3' if r3 else 'none'}")
    for head in (64, 96, 128, 256) for share in (1.0, 0.75) for r3 in (False, True) if not (r3 and head == 96)
]  # fmt: skip


def with_r3(source: Path, out: Path, head: int) -> Path:
    """The same file with R3, which is not in the weights."""
    changed = {"kurtail.r3.kind": "hadamard", "kurtail.r3.size": head}
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(out, "phi3")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind, *inner = field.types
            writer.add_key_value(name, changed.get(name, field.contents()), kind, inner[-1] if inner else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    return out


@pytest.fixture(scope="module")
def shape(tmp_path_factory, with_tokenizer, tiny_spm, converted) -> Callable[..., Path]:
    """``shape(head, share, r3, scaling=1)``: a file of one unquantized layer; with a scaling in LongRoPE."""

    @functools.cache
    def make(head: int, share: float, r3: bool, scaling: int = 1) -> Path:
        heads = 1 if head == 256 else 2  # wider layers would make attention pick single tokens
        context = 512 // scaling
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share}
        if scaling > 1:
            factors = [1.0 + i / 8 for i in range(int(head * share) // 2)]
            rope |= {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
            rope["original_max_position_embeddings"] = context
        if r3:
            directory = tmp_path_factory.mktemp("rotated")
            return with_r3(make(head, share, False, scaling), directory / "r3.gguf", head)
        source = with_tokenizer(
            "phi3", tiny_spm, 400, num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=1,
            hidden_size=heads * head, rope_parameters=rope, original_max_position_embeddings=context,
        )  # fmt: skip
        return converted(source, "--rotation", "none", "--weights", "f32")

    return make


def logits_around_a_shift(path: Path, types: list[int]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """By cache type: logits of the tokens decoded afresh, and after a shift."""
    script = Path(__file__).with_name("shifted_logits.py")
    done = subprocess.run([sys.executable, script, path, *map(str, types)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["type"]: (np.array(line["fresh"]), np.array(line["shifted"])) for line in lines}


def assert_only_rounded(path: Path, types: list[int]) -> None:
    found = logits_around_a_shift(path, [F32, *types])
    exact = found[F32][0]
    for number, (fresh, shifted) in found.items():
        rounding, error = (np.linalg.norm(x - exact) / np.linalg.norm(exact) for x in (fresh, shifted))
        assert error < ROUNDED_AGAIN * rounding + SUMS, (number, rounding, error)


@pytest.mark.usefixtures("bindings")
@pytest.mark.parametrize(("head", "share", "r3"), SHAPES)
def test_a_shift_only_rounds(shape, head, share, r3):
    assert_only_rounded(shape(head, share, r3), list(TYPES.values()))


@pytest.mark.usefixtures("bindings")
@pytest.mark.parametrize("r3", [False, True])
def test_a_shift_leaves_the_length_of_k(shape, r3):
    """LongRoPE scales the keys, by 1.5 here; a shift that does so again makes every later answer another."""
    path = shape(64, 0.75, r3, 32)
    scale = next(f.contents() for f in gguf.GGUFReader(path).fields.values() if f.name.endswith("rope.scaling.attn_factor"))
    assert math.isclose(scale, math.sqrt(1 + math.log(32) / math.log(16)), rel_tol=1e-6)
    assert_only_rounded(path, [F16, Q4_0])


@pytest.mark.parametrize(("head", "share", "r3"), SHAPES)
def test_the_program_survives_shifts(program, shape, head, share, r3):
    for name in TYPES:
        options = ("-no-cnv", "-p", "a", "-n", "300", "--ignore-eos", "-c", "256", "--context-shift", "-t", "1", "-ctk", name)
        done = program("llama-completion", "-m", shape(head, share, r3), *options)
        assert done.status == 0, (name, done.status, done.stderr[-2000:])


@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_the_default_cache_survives_shifts(program, converted, tiny_spm, rotation):
    path = converted(tiny_spm, "--rotation", rotation, "--weights", "rtn")
    done = program(
        "llama-completion", "-m", path, "-no-cnv", "-p", "a", "-n", "300", "--ignore-eos", "-c", "256", "--context-shift"
    )  # fmt: skip
    assert done.status == 0, (done.status, done.stderr[-2000:])


@pytest.mark.parametrize(("head", "share", "r3"), [(64, 0.75, True), (96, 1.0, False), (128, 0.75, False)])
def test_a_server_survives_requests_that_shift(serving, post, shape, head, share, r3):
    options = ("-c", "256", "-np", "1", "-ctk", "q4_0", "--context-shift", "--cache-reuse", "16", "-t", "1")
    tokens = [5 + 37 * i % 390 for i in range(120)]
    with serving("llama-server", "-m", shape(head, share, r3), *options) as port:
        _, long = post(port, "/completion", {"prompt": tokens, "n_predict": 300, "ignore_eos": True})
        assert long["tokens_predicted"] == 300
        settings = {"n_predict": 1, "cache_prompt": True}
        post(port, "/completion", {"prompt": tokens, **settings})
        # 20 tokens fewer in the middle: what is behind them moves up
        _, shorter = post(port, "/completion", {"prompt": tokens[:40] + tokens[60:], **settings})
        assert shorter["tokens_evaluated"] == 100 and shorter["timings"]["cache_n"] >= 90
