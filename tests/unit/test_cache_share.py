"""What a cache alone costs: which runs it takes, and where it is told."""

from __future__ import annotations

import io
import json
import sys
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from kurtail_gguf.cli.main import commands
from kurtail_gguf.cli.tables import print_report
from kurtail_gguf.measure import card
from kurtail_gguf.measure import evaluate as measurement
from kurtail_gguf.measure.evaluate import MmluRequest, ModelResult, Report, Request, TextRequest, measure
from kurtail_gguf.measure.perplexity import Divergence, EvaluationError, Perplexity, reference
from kurtail_gguf.messages.errors import ConfigError
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.runtime import native
from kurtail_gguf.runtime.gguf_info import GgufInfo

CACHES = ("file", "f16", "q8_0")


@pytest.fixture
def words(tmp_path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("some words", encoding="utf-8")
    return path


@pytest.fixture
def runs(monkeypatch):
    """Runs of the runtime that measure() asks for, (kind, file, cache); files need not be there. ``g.gguf`` has an f16 cache."""
    seen: list[tuple[str, str, str]] = []

    def read(path):
        return GgufInfo(path, {"tokenizer.ggml.tokens": ["a"], "bits": 16 if path.name == "g.gguf" else 4}, ())

    def noted(path, reference, text, chunks, progress, cache, activations):
        seen.append(("divergence", path.name, cache))
        # from a file that is its own base, and from the reference
        return Divergence(Perplexity(22.0, 1.5), 0.25 if reference.name == path.name else 0.75, 0.01, 0.5)

    @contextmanager
    def opened(path, vocabulary, text, context, chunks, progress, cache="file", activations="file"):
        seen.append(("reference", path.name, cache))
        yield _Open(path.name)

    monkeypatch.setattr(measurement, "read_gguf", read)
    monkeypatch.setattr(measurement, "_reference", lambda *_: read(Path("original.gguf")))
    monkeypatch.setattr(GgufInfo, "runtime_bits", property(lambda self: (4, self.metadata["bits"])))
    monkeypatch.setattr(GgufInfo, "runs_as", property(lambda self: f"W4A4KV{self.metadata['bits']}"))
    monkeypatch.setattr(GgufInfo, "bits_per_weight", 4.25)
    monkeypatch.setattr(measurement.perplexity, "divergence", noted)
    monkeypatch.setattr(measurement.perplexity, "reference", opened)
    return seen


class _Open:
    """An open reference of a file."""

    perplexity = Perplexity(20.0, 1.0)

    def __init__(self, name: str) -> None:
        self.name = name


def test_a_file_is_its_own_reference_once_for_all_cache_types(runs, words):
    request = Request(TextRequest(words, 512, None), caches=CACHES, cache_share=True)
    report = measure((Path("a.gguf"), Path("b.gguf")), request, None, NullProgress())
    assert runs == [
        (kind, name, cache)
        for name in ("a.gguf", "b.gguf")
        for kind, cache in (("reference", "f16"), ("divergence", "file"), ("divergence", "q8_0"))
    ]
    own, half, byte = report.models[:3]
    assert (own.cache_kld, own.cache_perplexity) == (byte.cache_kld, byte.cache_perplexity) == (0.25, 1.1)
    assert (half.cache_kld, half.cache_perplexity) == (0.0, 1.0)
    # no runs more for the perplexities
    assert [(row.perplexity, row.perplexity_stderr) for row in (own, half)] == [(22.0, 1.5), (20.0, 1.0)]
    content = report.to_json()["models"][0]
    assert (content["cache_kld"], content["cache_perplexity"], content["kld_mean"]) == (0.25, 1.1, None)


def test_beside_a_reference_both_divergences_are_told_apart(runs, words):
    request = Request(TextRequest(words, 512, None), cache_share=True)
    report = measure((Path("a.gguf"),), request, "original", NullProgress())
    assert runs == [
        ("reference", "original.gguf", "file"), ("divergence", "a.gguf", "file"),
        ("reference", "a.gguf", "f16"), ("divergence", "a.gguf", "file"),
    ]  # fmt: skip
    (row,) = report.models
    assert (row.kld_mean, row.cache_kld) == (0.75, 0.25)
    assert report.reference.cache_kld is None and "cache_kld" not in report.reference.to_json()


def test_an_f16_cache_of_the_files_own_is_not_run_twice(runs, words):
    (row,) = measure((Path("g.gguf"),), Request(TextRequest(words, 512, None), cache_share=True), None, NullProgress()).models
    assert runs == [("reference", "g.gguf", "f16")]
    assert (row.cache_kld, row.cache_perplexity, row.perplexity) == (0.0, 1.0, 20.0)


def test_without_being_asked_for_nothing_is_told(runs, words, monkeypatch):
    monkeypatch.setattr(measurement.perplexity, "perplexity", lambda *_: Perplexity(20.0, 1.0))
    (row,) = measure((Path("a.gguf"),), Request(TextRequest(words, 512, None)), None, NullProgress()).models
    assert runs == [] and "cache_kld" not in row.to_json()


def test_what_cannot_be_compared_is_refused(words, tmp_path):
    with pytest.raises(ConfigError, match="--cache-share compares .*: give --text FILE"):
        Request(mmlu=MmluRequest(tmp_path, 5, None), cache_share=True)
    done = CliRunner().invoke(commands, ["eval", "m.gguf", "--cache-share"])
    assert done.exit_code == 1 and len(done.stderr.splitlines()) == 1 and "give --text FILE" in done.stderr
    with pytest.raises(EvaluationError, match="raise --chunks or --context"):
        measure((Path("m.gguf"),), Request(TextRequest(words, 64, 1), cache_share=True), None, NullProgress())


def test_the_base_is_run_with_the_cache_asked_for(tmp_path, monkeypatch, recorder):
    program = tmp_path / "llama-perplexity"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nat = sys.argv.index('-ctk')\n"
        "assert sys.argv[at : at + 4] == ['-ctk', 'f16', '-ctv', 'f16'], sys.argv\n"
        "path = sys.argv[sys.argv.index('--kl-divergence-base') + 1]\n"
        "print('0 I perplexity: calculating perplexity over 1 chunks, n_ctx=16, batch_size=16, n_seq=1', flush=True)\n"
        "open(path, 'wb').write(bytes(20 + 64 + 7 * 16))\n"
        "print('[1]20.0,\\n0 I Final estimate: PPL = 20.0000 +/- 1.00000', flush=True)\n",
        encoding="utf-8",
    )
    program.chmod(0o755)
    monkeypatch.setattr(native, "executable", lambda name: program)
    with reference(Path("m.gguf"), 4, Path("t"), 16, 1, recorder, cache="f16") as opened:
        assert opened.perplexity == Perplexity(20.0, 1.0)
    assert recorder.stages == [["reference m.gguf (cache f16)", 1, 1]]


def test_table_and_card_have_it(tmp_path, words):
    row = ModelResult("x.gguf", 22.0, 1.5, None, None, 4.25, 4, 4, "W4A4KV4", cache_kld=0.25, cache_perplexity=1.1)
    console = Console(file=io.StringIO(), width=200)
    print_report(Report(None, (row,)), console)
    for part in ("cache KLD", "0.2500", "cache ppl", "× 1.1000", "with an f16 cache"):
        assert part in console.file.getvalue()
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    summary = {
        "architecture": "llama", "name": "m", "parameters": 1, "bits_per_weight": 4.25, "block_bits_per_weight": None,
        "types": {}, "tensor_activation_bits": {}, "kurtail": None,
    }  # fmt: skip
    request = Request(TextRequest(words, 512, None), cache_share=True)
    circumstances = card.Circumstances(request, ("a",), "m", datetime(2026, 1, 1, tzinfo=timezone.utc))
    text = card.render(tmp_path / "x.gguf", summary, "W4A4KV4", [row], None, circumstances)
    assert "| mean KL divergence from the same file with an f16 cache, nats | 0.2500 |" in text
    assert "| perplexity relative to that with an f16 cache | 1.1000 |" in text
    json.dumps(row.to_json())
