"""The quality card: everything in it, from given numbers; written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from dataclasses import asdict
from datetime import datetime, timedelta, timezone

import pytest

from kurtail_gguf.measure import card
from kurtail_gguf.measure.evaluate import MmluRequest, ModelResult, Request, TextRequest
from kurtail_gguf.measure.mmlu import Accuracy, MmluResult
from kurtail_gguf.measure.retrieval import Cell, RetrievalRequest, RetrievalResult
from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.runtime.provenance import TOOL, Provenance

PROVENANCE = Provenance(
    rotation="kurtail", objective="kurtosis", weights="gptq", tune_steps=64, seed=7, r1_kind="learned", r1_size=576, r2_kind="learned",
    r2_size=64, r3_kind="hadamard", r3_size=64, r4_kind="none", r4_size=0, activation_bits=4, kv_bits=8,
    calibration_name="c4.txt", calibration_tokens=8192, calibration_sha256="ab" * 32,
)  # fmt: skip
SUMMARY = {
    "path": "x.gguf", "architecture": "llama", "name": "Tiny | Model", "parameters": 1_500_000, "bits_per_weight": 4.9,
    "block_bits_per_weight": 4.25, "types": {"kt4": {"tensors": 14, "values": 64, "bytes": 34_000}},
    "tensor_activation_bits": {"blk.0.ffn_down.weight": 8}, "kurtail": asdict(PROVENANCE),
    "online": {"blk.0.attn_q.weight": 64, "blk.0.ffn_up.weight": 64, "blk.0.ffn_down.weight": 512},
}  # fmt: skip
MMLU = MmluResult(5, 2, Accuracy(0.25, 0.01, 40), Accuracy(0.3, 0.02, 40), {"us_history": Accuracy(0.5, None, 1)})
WHEN = datetime(2026, 11, 24, 9, 30, tzinfo=timezone(timedelta(hours=1)))


def _rows(text: str) -> dict[str, list[str]]:
    """Cells of every table row by its first cell."""
    lines = [re.split(r" (?<!\\)\| ", line[2:-2]) for line in text.splitlines() if line.startswith("| ")]
    return {first: rest for first, *rest in lines}


@pytest.fixture
def places(tmp_path):
    """A file, a text and a directory of questions."""
    (tmp_path / "x.gguf").write_bytes(b"GGUF and more")
    (tmp_path / "wiki.txt").write_bytes(b"some words")
    for kind in ("dev", "test"):
        (tmp_path / "mmlu" / kind).mkdir(parents=True)
        (tmp_path / "mmlu" / kind / f"us_history_{kind}.csv").write_bytes(kind.encode())
    return tmp_path


def test_a_card_with_everything(places):
    request = Request(TextRequest(places / "wiki.txt", 512, 16), MmluRequest(places / "mmlu", 5, None))
    command = ("kurtail-gguf", "eval", "my file.gguf", "--text", "wiki.txt")
    circumstances = card.Circumstances(request, command, "A CPU, 2 threads, Linux", WHEN)
    model = ModelResult("x.gguf", 78.31, 4.2, 0.6, 0.554, 4.9, 4, 8, "W4A4KV8", MMLU)
    reference = ModelResult("smollm2", 28.5, 1.1, None, None, 32.0, None, 16, "stock", MMLU)
    made_by = ("kurtail-gguf", "convert", "smollm2", "x.gguf", "--seed", "7")
    text = card.render(places / "x.gguf", SUMMARY, "W4A4KV8", [model], reference, circumstances, made_by)
    rows = _rows(text)
    assert text.startswith("# x.gguf\n")
    assert rows["model"] == [r"Tiny \| Model, llama, 1.5 M values"]
    assert rows["file"] == [f"13 bytes, sha256 `{hashlib.sha256(b'GGUF and more').hexdigest()}`"]
    assert rows["types"] == ["kt4 (14 tensors, 34,000 bytes)"]
    assert rows["bits per weight"] == ["4.90, 4.25 in the linears of the blocks"]
    assert rows["runs as"] == ["W4A4KV8, weights gptq, scales tuned for 64 steps"]
    assert rows["method"] == ["rotation kurtail, objective kurtosis, seed 7"]
    assert "R1 (residual stream, folded) learned 576" in rows["rotations"][0]
    assert rows["Hadamard of inputs, online"] == ["attn_q, ffn_up 64; ffn_down 512"]
    assert rows["calibration"] == [f"c4.txt, 8192 tokens, sha256 of their ids `{'ab' * 32}`"]
    assert rows["activations of blk.0.ffn_down.weight"] == ["8 bits"]
    assert rows["made by"] == ["`kurtail-gguf convert smollm2 x.gguf --seed 7`"]
    assert rows["measure"] == ["this file", "reference: smollm2"]
    assert rows["perplexity"] == ["78.3100 ± 4.2000", "28.5000 ± 1.1000"]
    assert rows["mean KL divergence from the reference, nats"] == ["0.6000", ""]
    assert rows["same top token as the reference"] == ["55.40 %", ""]
    assert rows["MMLU, micro average"] == ["25.0 ± 1.0 % of 40"] * 2
    assert rows["MMLU, us history"] == ["50.0 % of 1"] * 2
    assert rows["MMLU, questions with fewer examples because the context is too short"] == ["2", "2"]
    assert f"wiki.txt (sha256 `{hashlib.sha256(b'some words').hexdigest()}`), context 512, the first 16 chunks" in text
    assert "MMLU: mmlu (sha256" in text and "all questions, 5 examples" in text
    assert f"on 2026-11-24T09:30:00+01:00 by {TOOL} on A CPU, 2 threads, Linux." in text
    fenced = text.split("```")[1].strip()
    assert shlex.split(fenced) == list(command)


def test_a_card_of_a_stock_file_without_a_reference(places):
    request = Request(TextRequest(places / "wiki.txt", 128, None))
    stock = SUMMARY | {"kurtail": None, "name": None, "block_bits_per_weight": None, "tensor_activation_bits": {}}
    model = ModelResult("x.gguf", 36.0, 1.0, None, None, 4.9, None, 16, "stock")
    text = card.render(places / "x.gguf", stock, "stock", [model], None, card.Circumstances(request, ("a",), "m", WHEN))
    rows = _rows(text)
    assert rows["model"][0].startswith("unnamed, llama") and rows["kurtail"] == ["no keys: a stock file"]
    assert rows["measure"] == ["this file"] and rows["perplexity"] == ["36.0000 ± 1.0000"]
    assert "all chunks" in text and "MMLU" not in text and "made by" not in rows


def test_a_column_for_each_cache_type_and_a_row_for_each_length_and_depth(places):
    facts = RetrievalRequest(places / "wiki.txt", (1024,), (0.1, 0.25), 4, 3)
    request = Request(retrieval=facts, caches=("file", "f16"))

    def row(cache: str, bits: int, right: int) -> ModelResult:
        cells = (Cell(1024, 0.1, right, 4, -0.5), Cell(1024, 0.25, 4, 4, -0.25))
        found = RetrievalResult(0.5, -0.375, cells)
        return ModelResult("x.gguf", None, None, None, None, 4.9, 4, bits, f"W4A4KV{bits}", retrieval=found, cache=cache)

    circumstances = card.Circumstances(request, ("a",), "m", WHEN)
    models = [row("f16", 16, 3), row("file", 8, 2)]
    text = card.render(places / "x.gguf", SUMMARY, "W4A4KV8", models, None, circumstances)
    rows = _rows(text)
    assert rows["runs as"][0].startswith("W4A4KV8,")
    assert rows["measure"] == ["this file (cache f16)", "this file (cache file)"]
    assert rows["retrieval, 1024 tokens, depth 10 %"] == ["3 of 4, log-likelihood -0.50", "2 of 4, log-likelihood -0.50"]
    assert rows["retrieval, 1024 tokens, depth 25 %"] == ["4 of 4, log-likelihood -0.25"] * 2
    digest = hashlib.sha256(b"some words").hexdigest()
    assert f"Retrieval: wiki.txt (sha256 `{digest}`) with five-digit codes hidden in it, 4 for each length" in text
    assert "seed 3" in text and "guessing gives -11.5" in text


def test_the_digest_of_questions_is_sha256sums(places):
    lines = "".join(f"{hashlib.sha256(kind.encode()).hexdigest()}  {kind}/us_history_{kind}.csv\n" for kind in ("dev", "test"))
    assert card.mmlu_sha256(places / "mmlu") == hashlib.sha256(lines.encode()).hexdigest()


def test_a_card_is_whole_or_not_there(places, monkeypatch):
    file = places / "x.gguf"
    assert card.write_card(file, "one") == places / "x.gguf.md"
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(KurtailError, match=r"cannot write .*x.gguf.md: No space left"):
        card.write_card(file, "two")
    assert (places / "x.gguf.md").read_text(encoding="utf-8") == "one"


def test_a_card_that_cannot_be_written_is_refused(places):
    card.check_card(places / "x.gguf")
    (places / "x.gguf.md").mkdir()
    with pytest.raises(KurtailError, match="x.gguf.md cannot be written"):
        card.check_card(places / "x.gguf")


def test_the_machine_is_named():
    described = card.describe_machine()
    assert re.fullmatch(r".+, \d+ threads?, \w+", described), described
