"""Retrieval through the bindings: a fact's log-likelihood is transformers' own, each context goes through the model once,
and the cache type that was asked for is the one that is used."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kurtail_gguf.measure import retrieval
from kurtail_gguf.measure.retrieval import RetrievalRequest
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.runtime import vendored

pytestmark = pytest.mark.usefixtures("bindings")
HADAMARD = ("--rotation", "hadamard", "--weights", "rtn")
SMALL = ("--retrieval-lengths", "400,700", "--retrieval-needles", "2")


def test_log_likelihoods_are_transformers_own(tiny_spm, tiny_reference, text, recorder):
    request = RetrievalRequest(text, (300, 600), (0.2, 0.8), 2)
    contexts = retrieval.build(tiny_reference, text.read_text(encoding="utf-8"), request)
    result = retrieval.retrieve(tiny_reference, contexts, request, recorder)
    assert recorder.stages == [["retrieval of tiny.gguf", 1800, 1800]]
    model = AutoModelForCausalLM.from_pretrained(tiny_spm, dtype=torch.float32).eval()
    expected = []
    for context in contexts:
        for question in context.questions:
            asked = [*context.prefix, *question.suffix]
            whole = [*asked, *question.answer]
            assert context.length - 30 < len(whole) <= context.length
            with torch.inference_mode():
                rows = model(torch.tensor([whole])).logits[0, len(asked) - 1 : -1].double().log_softmax(-1)
            expected.append(sum(row[token].item() for row, token in zip(rows, question.answer, strict=True)))
    # by length, context and depth; a cell is the mean over the contexts
    expected = np.array(expected).reshape(2, 2, 2).mean(1).reshape(-1)
    found = np.array([cell.log_likelihood for cell in result.cells])
    # the plain file's cache is f16
    assert np.abs(found - expected).max() < 0.1 and expected.std() > 0.5


def test_a_context_goes_through_the_model_once(tiny_reference, text):
    request = RetrievalRequest(text, (600,), (0.1, 0.3, 0.5, 0.7, 0.9), 2)
    contexts = retrieval.build(tiny_reference, text.read_text(encoding="utf-8"), request)
    asked = {"path": str(tiny_reference), "cache": "file", "activations": "file", "contexts": [asdict(one) for one in contexts]}
    computed = vendored.run("kurtail_gguf.measure.retrieval_worker", asked)
    questions = sum(len(q.suffix) + len(q.answer) for one in contexts for q in one.questions)
    assert computed <= sum(len(one.prefix) for one in contexts) + questions


def test_the_cache_type_is_the_one_asked_for(tiny_reference, text):
    """The finer the type, the nearer to f16; the file's own is f16."""
    request = RetrievalRequest(text, (600,), (0.1, 0.5, 0.9), 2)
    contexts = retrieval.build(tiny_reference, text.read_text(encoding="utf-8"), request)

    def found(cache: str) -> np.ndarray:
        cells = retrieval.retrieve(tiny_reference, contexts, request, NullProgress(), cache).cells
        return np.array([cell.log_likelihood for cell in cells])

    file, half, eight, four = map(found, ("file", "f16", "q8_0", "q4_0"))
    assert (file == half).all()
    assert 0 < np.abs(eight - half).max() < np.abs(four - half).max() / 2


def test_the_command(cli, converted, tiny_spm, tiny_reference, text, tmp_path):
    """Perplexity and retrieval of two cache types beside a reference: table, JSON, picture and card."""
    report, picture, path = tmp_path / "r.json", tmp_path / "r.svg", converted(tiny_spm, *HADAMARD)
    options = ("--text", text, "--context", "128", "--chunks", "4", "--retrieval", *SMALL, "--cache-type", "file,f16")
    outputs = ("--json", report, "--card", "--plot", picture)
    done = cli("eval", path, "--reference", tiny_reference, *options, *outputs)
    assert done.status == 0, done.stderr
    content = json.loads(report.read_text(encoding="utf-8"))
    file, half = content["models"]
    assert (file["cache"], half["cache"]) == ("file", "f16") and "cache" not in content["reference"]
    assert (file["kv_bits"], half["kv_bits"]) == (4, 16)
    assert file["runs_as"].startswith("W4A4KV4") and half["runs_as"] == "W4A4KV16"
    # 4-bit activations leave nothing to tell which cache is better
    assert half["kld_mean"] != file["kld_mean"] and half["perplexity"] != file["perplexity"]
    for model in (file, half, content["reference"]):
        places = [(cell["length"], cell["depth"], cell["facts"]) for cell in model["retrieval"]["cells"]]
        assert places == [(length, depth, 2) for length in (400, 700) for depth in (0.1, 0.5, 0.9)]
        mean = np.mean([cell["log_likelihood"] for cell in model["retrieval"]["cells"]])
        assert model["retrieval"]["log_likelihood"] == pytest.approx(mean)
    assert len({model["retrieval"]["log_likelihood"] for model in (file, half, content["reference"])}) == 3
    shown = " ".join(done.stdout.split())
    # where a terminal of 80 columns breaks the lines
    assert f"{path.name} (cache f16)" in shown and "guessing gives -11.5" in shown
    assert "┃ file " in shown
    assert "retrieval of" in done.stderr and "(cache f16)" in done.stderr
    assert f"<!-- {path.name} (cache f16) -->" in picture.read_text(encoding="utf-8")
    card = Path(f"{path}.md").read_text(encoding="utf-8")
    assert "| measure | this file (cache file) | this file (cache f16) | reference:" in card
    assert "| retrieval, 700 tokens, depth 50 % |" in card


def test_errors_are_one_line(cli, tiny_reference, text, tmp_path):
    told = cli("eval", tiny_reference, "--retrieval", "--retrieval-text", text).error
    assert "has a context of 1024 tokens, but --retrieval-lengths asks for 8192: give lengths up to 1024" in told
    short = tmp_path / "short.txt"
    short.write_text("Too few words. " * 20, encoding="utf-8")
    told = cli("eval", tiny_reference, "--retrieval", "--retrieval-text", short, "--retrieval-lengths", "800").error
    assert "short.txt: the whole text with the facts has" in told and "asks for 800: give a longer --retrieval-text" in told
