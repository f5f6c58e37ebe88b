"""``--activations auto``: the file lists what it chose, and runtime, simulation and commands all go by it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from kurtail_gguf.check.simulate import chunk_losses
from kurtail_gguf.measure.perplexity import reference, scored_losses, scored_tokens
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.runtime.gguf_info import GgufInfo, read_gguf

BUDGET = 0.3
RTN = ("--rotation", "hadamard", "--weights", "rtn")


@pytest.fixture(scope="session", params=["dense", "experts"])
def auto(request, converted, tiny_spm, with_tokenizer, text) -> Path:
    source = tiny_spm if request.param == "dense" else with_tokenizer("mixtral", tiny_spm, 400)
    options = ("--calibration", str(text), "--calibration-tokens", "1024", "--budget", str(BUDGET))
    return converted(source, *RTN, "--activations", "auto", "--kv", "4", *options)


def test_the_file_lists_what_was_chosen(auto):
    info = read_gguf(auto)
    names = info.metadata["general.tensor_extra.name"]
    linears = {tensor.name: tensor for tensor in info.tensors if tensor.is_block_linear}
    assert names == sorted(names) and set(names) < set(linears)
    assert info.metadata["general.tensor_extra.prec_a4"] == [False] * len(names)
    assert info.metadata["kurtail.activation_bits"] == 4
    assert info.metadata["kurtail.activation_choice"] == "auto"
    assert info.metadata["kurtail.activation_budget"] == pytest.approx(BUDGET)
    # a token goes through some of the experts
    used = info.metadata.get("llama.expert_used_count", 1) / info.metadata.get("llama.expert_count", 1)
    costs = {name: tensor.values * (used if "_exps" in name else 1) for name, tensor in linears.items()}
    assert 0 < sum(costs[name] for name in names) <= BUDGET * sum(costs.values())


def test_the_runtime_says_and_does_so(auto, program, text):
    done = program("llama-completion", "-m", auto, "-no-cnv", "-p", "a", "-n", "1", "-c", "64", "-lv", "4")
    assert done.status == 0, done.stderr[-3000:]
    count = len(read_gguf(auto).metadata["general.tensor_extra.name"])
    told = rf"W4A4 \(A8 in {count} of 14 tensors\) KV4, R3 64, Hadamard (128|64) before 2 tensors"
    assert re.search(told, done.stdout + done.stderr)


def test_the_commands_say_so(cli, auto, text, tmp_path):
    names = read_gguf(auto).metadata["general.tensor_extra.name"]
    shown = cli("inspect", auto).stdout
    assert "runs as W4A4+8KV4" in shown
    found = re.search(r"activations of (\d+) of 14 linears have 8 bits, .*: ([\d.]+) % .*, budget 30 %", shown)
    assert found and int(found[1]) == len(names) and 0 < float(found[2]) <= 30
    assert all(f"activations of {name}: 8 bits" in shown for name in names)
    summary = json.loads(cli("inspect", auto, "--json").stdout)
    assert summary["tensor_activation_bits"] == dict.fromkeys(names, 8)
    report = tmp_path / "r.json"
    done = cli("eval", auto, "--text", text, "--context", "128", "--chunks", "2", "--json", report)
    assert done.status == 0 and "W4A4+8KV4" in done.stdout
    (model,) = json.loads(report.read_text(encoding="utf-8"))["models"]
    assert (model["activation_bits"], model["runs_as"]) == (4, "W4A4+8KV4")


def test_the_simulation_agrees(converted, one_layer, text, wiki):
    """Within 1 % where rounding is not chaotic, and token by token only with the bits of every tensor as listed."""
    options = ("--calibration", str(text), "--calibration-tokens", "1024", "--budget", str(BUDGET))
    path = converted(one_layer, *RTN, "--activations", "auto", *options)
    info = read_gguf(path)
    vocabulary = next(tensor.shape[0] for tensor in info.tensors if tensor.name == "token_embd.weight")
    with reference(path, vocabulary, wiki, 256, 8, NullProgress()) as opened:
        tokens, measured = scored_tokens(opened), scored_losses(opened)
    known = measured < 15.5  # the runtime's losses are known up to 16

    def differences(of: GgufInfo) -> npt.NDArray[np.float64]:
        return (chunk_losses(of, tokens, NullProgress()).numpy() - measured)[known]

    right = differences(info)
    assert abs(right.mean()) < math.log(1.01)
    for bits in (4, 8):
        wrong = differences(replace(info, metadata=_with_all_at(bits, info)))
        print(f"rms difference of a token: {_rms(right):.4f} as listed, {_rms(wrong):.4f} with all at {bits} bits")
        assert _rms(right) < 0.8 * _rms(wrong)


def _with_all_at(bits: int, info: GgufInfo) -> dict[str, object]:
    listed = [tensor.name for tensor in info.tensors if tensor.is_block_linear and bits == 8]
    changed = {"general.tensor_extra.name": listed, "general.tensor_extra.prec_a4": [False] * len(listed)}
    return {**info.metadata, **changed}


def _rms(values: npt.NDArray[np.float64]) -> float:
    return math.sqrt(np.square(values).mean())


def test_refusals(cli, tiny_spm, outputs):
    for options, told in (
        (("--activations", "auto", "--target", "stock"), "--activations cannot be combined with --target stock"),
        (("--budget", "0.2"), "--budget 0.2 has no effect with --activations 4"),
        (("--activations", "auto", "--budget", "2"), "--budget 2.0 must be between 0 and 1"),
    ):
        assert told in cli("convert", tiny_spm, outputs / "o.gguf", *options).error
    assert list(outputs.iterdir()) == []
