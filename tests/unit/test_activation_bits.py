"""Bits of activations: what the runtime is asked for, what it reports, and where that is told."""

from __future__ import annotations

import io
import stat
import sys
from datetime import datetime, timezone
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from kurtail_gguf.cli.main import commands
from kurtail_gguf.cli.tables import print_report
from kurtail_gguf.measure import card, harness, mmlu, retrieval
from kurtail_gguf.measure import compare as comparison
from kurtail_gguf.measure import evaluate as measurement
from kurtail_gguf.measure.evaluate import Request, TextRequest, measure
from kurtail_gguf.measure.perplexity import Divergence, Perplexity, Reference, divergence, perplexity, reference
from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.runtime import native
from kurtail_gguf.runtime.activation_bits import Activations, reported_activations
from kurtail_gguf.runtime.gguf_info import GgufInfo

LOG = (
    "0.00.268.897 I kurtail_load_activation_bits: activations: 8 bits, as --activation-bits asks; the file says 4\n"
    "0.04.576.304 I perplexity: calculating perplexity over 1 chunks, n_ctx=512, batch_size=2048, n_seq=4\n"
    "[1]12.5619,\n0.16.611.438 I Final estimate: PPL = 20.0001 +/- 3.13028\n"
)
ASKED = Activations("8", "as --activation-bits asks; the file says 4")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("load: activations: 4 bits, as the file says", Activations("4", "as the file says")),
        (
            "load: activations: 4 bits (8 in 3 of 14 tensors), as the file says\n",
            Activations("4+8", "as the file says"),
        ),
        (
            "activations: 8 bits, the default with AVX2; the file says 4 (8 in 3 of 14 tensors)\nmore",
            Activations("8", "the default with AVX2; the file says 4 (8 in 3 of 14 tensors)"),
        ),
        # loaded twice: what ran is the last
        ("activations: 4 bits, a\nactivations: 8 bits, b\n", Activations("8", "b")),
        ("written for stock llama.cpp, runs as it does there", None),
    ],
)
def test_what_the_runtime_reports_is_understood(line, found):
    assert reported_activations(line) == found


def test_what_a_file_runs_as_has_the_bits_in_force():
    assert ASKED.applied("W4A4KV4") == "W4A8KV4" and ASKED.applied("W4A4+8KV4+8") == "W4A8KV4+8"
    assert Activations("4+8", "").applied("W4A8KV4") == "W4A4+8KV4" and Activations("4+8", "").general == 4
    assert ASKED.applied("stock W4") == "stock W4"


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A llama-perplexity that notes its arguments and what of ours is in its environment."""
    path = tmp_path / "llama-perplexity"
    path.write_text(
        f"#!{sys.executable}\nimport os, sys\n"
        f"open({str(tmp_path / 'seen')!r}, 'w').write(' '.join(sys.argv[1:]) + ' ' + os.environ.get('KURTAIL_ACTIVATION_BITS', '-'))\n"
        "if '--kl-divergence' in sys.argv:\n"
        "    print('I kl_divergence: computing over 1 chunks')\n"
        "    print('Mean PPL(Q) : 22.2 ± 3.2\\nMean    KLD: 0.03 ± 0.01\\nSame top p: 89.8 ± 1.3 %')\n"
        "elif '--kl-divergence-base' in sys.argv:\n"
        "    open(sys.argv[sys.argv.index('--kl-divergence-base') + 1], 'wb').write(bytes(20 + 64 + 7 * 16))\n"
        f"sys.stdout.write({LOG!r})\n",
        encoding="utf-8",
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(native, "executable", lambda name: path)
    monkeypatch.setenv("KURTAIL_ACTIVATION_BITS", "4")
    return lambda: (tmp_path / "seen").read_text()


@pytest.mark.parametrize(
    ("choice", "given"), [({}, "--activation-bits file"), ({"activations": "8"}, "--activation-bits 8"), ({"activations": None}, "")]
)
def test_a_choice_reaches_the_program_and_the_environment_does_not(program, recorder, choice, given):
    model, text = Path("m.gguf"), Path("t.txt")
    runs = [lambda: perplexity(model, text, 512, 1, recorder, **choice)]
    opened = Reference(Path("base"), Perplexity(21.0, 3.0), 512)
    runs.append(lambda: divergence(model, opened, text, 1, recorder, **choice).perplexity)

    def base() -> Perplexity:
        with reference(model, 4, text, 16, 1, recorder, **choice) as opened:
            return opened.perplexity

    runs.append(base)
    for run in runs:
        assert run().activations == ASKED
        words = program()
        assert words.endswith(" -") and words.count("--activation-bits") == bool(given) and given in words, words


@pytest.fixture
def files(monkeypatch):
    """Files that need not be there, whose measurements report the bits they were asked for; None is 8 by default."""
    asked = []

    def noted(path, *arguments):
        asked.append((path.name, arguments[-1]))
        bits = {"file": "4", None: "8"}.get(arguments[-1], arguments[-1])
        return Perplexity(20.0, 1.0, Activations(bits, "as told"))

    class Opened:
        def __init__(self, path, *_):
            self.perplexity = noted(path, "file")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(measurement, "read_gguf", lambda path: GgufInfo(path, {"tokenizer.ggml.tokens": ["a"]}, ()))
    monkeypatch.setattr(measurement, "_reference", lambda *_: measurement.read_gguf(Path("original.gguf")))
    monkeypatch.setattr(GgufInfo, "runtime_bits", (4, 4))
    monkeypatch.setattr(GgufInfo, "runs_as", "W4A4KV4")
    monkeypatch.setattr(measurement.perplexity, "perplexity", noted)
    monkeypatch.setattr(measurement.perplexity, "divergence", lambda *a: Divergence(noted(*a), 0.1, 0.01, 0.5))
    monkeypatch.setattr(measurement.perplexity, "reference", Opened)
    return asked


@pytest.fixture
def text(tmp_path) -> TextRequest:
    path = tmp_path / "words.txt"
    path.write_text("some words", encoding="utf-8")
    return TextRequest(path, 512, None)


@pytest.mark.parametrize(("choice", "bits"), [(None, 8), ("8", 8), ("file", 4), ("4", 4)])
def test_results_name_the_bits_that_were_in_force(files, text, choice, bits):
    report = measure((Path("a.gguf"),), Request(text, activations=choice), None, NullProgress())
    (row,) = report.models
    assert files == [("a.gguf", choice)]
    assert (row.activation_bits, row.runs_as) == (bits, f"W4A{bits}KV4")
    assert report.to_json()["models"][0]["activations"] == {"bits": str(bits), "why": "as told"}
    console = Console(file=io.StringIO(), width=200)
    print_report(report, console)
    assert f"W4A{bits}KV4" in console.file.getvalue()


def test_a_reference_is_run_as_its_file_says(files, text):
    report = measure((Path("a.gguf"),), Request(text, activations="8"), "original", NullProgress())
    assert files == [("original.gguf", "file"), ("a.gguf", "8")]
    assert (report.reference.runs_as, report.models[0].runs_as) == ("W4A4KV4", "W4A8KV4")


def test_a_card_names_them(files, text, tmp_path):
    request = Request(text, activations="8")
    (row,) = measure((Path("a.gguf"),), request, None, NullProgress()).models
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    summary = {
        "architecture": "llama", "name": "m", "parameters": 1, "bits_per_weight": 4.25, "block_bits_per_weight": None,
        "types": {}, "tensor_activation_bits": {}, "kurtail": None,
    }  # fmt: skip
    circumstances = card.Circumstances(request, ("a",), "m", datetime(2026, 1, 1, tzinfo=timezone.utc))
    told = card.render(tmp_path / "a.gguf", summary, "W4A4KV4", [row], None, circumstances)
    assert "Inputs of the 4-bit products were rounded to 8 bits, as told." in told


@pytest.mark.parametrize("module", [mmlu, retrieval, harness])
def test_workers_are_asked_and_their_answer_is_kept(module, monkeypatch, recorder):
    seen = []

    def run(worker, request, on_message, **_):
        seen.append(request["activations"])
        on_message({"activations": {"bits": "8", "why": "as told"}})
        if module is mmlu:
            on_message({"log_likelihoods": [0.0, -1.0, -1.0, -1.0], "shots": 0})
        if module is retrieval:
            on_message({"facts": [[-0.5, True]]})
        return {"version": "0", "results": {}}

    monkeypatch.setattr(module.vendored, "run", run)
    monkeypatch.setattr(module, "require_bindings", lambda: None)
    path = Path("m.gguf")
    if module is mmlu:
        question = mmlu.Question("q", ("a", "b", "c", "d"), 0, "f:1")
        result = mmlu.score(path, (mmlu.Subject("s", (), (question,)),), recorder, "f16", "8")
    elif module is retrieval:
        request = retrieval.RetrievalRequest(path, (100,), (0.5,), 1)
        result = retrieval.retrieve(path, [retrieval.Context(100, [1], [])], request, recorder, "f16", "8")
    else:
        monkeypatch.setattr(harness, "check_tasks", lambda request: None)
        result = harness.run_tasks(path, harness.TasksRequest(("t",), None, None, None), recorder, "f16", "8")
    assert seen == ["8"] and result.activations == Activations("8", "as told")


def test_the_option_reaches_measurements_and_comparisons(monkeypatch, text):
    seen = []

    def stop(value):
        seen.append(value)
        raise KurtailError("stop here")

    monkeypatch.setattr(measurement, "measure", lambda files, request, *_: stop(request.activations))
    monkeypatch.setattr(comparison, "compare", lambda config, *_: stop(config.activation_bits))
    for choice in ([], ["--activation-bits", "8"]):
        CliRunner().invoke(commands, ["eval", "m.gguf", "--text", str(text.path), *choice])
        CliRunner().invoke(commands, ["compare", "m", "--text", str(text.path), *choice])
    assert seen == [None, None, "8", "8"]
    for variable, choice in (("4", []), ("4", ["--activation-bits", "file"])):
        environment = {"KURTAIL_ACTIVATION_BITS": variable}
        CliRunner().invoke(commands, ["eval", "m.gguf", "--text", str(text.path), *choice], env=environment)
    assert seen[4:] == ["4", "file"]
    done = CliRunner().invoke(commands, ["eval", "m.gguf", "--text", str(text.path), "--activation-bits", "6"])
    assert done.exit_code == 2 and "'6' is not one of '4', '8', 'file'" in done.stderr
