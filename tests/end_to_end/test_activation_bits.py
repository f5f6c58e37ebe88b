"""Bits of activations at run time: as if the file had been written with them, and nothing else changes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kurtail_gguf.measure.perplexity import perplexity
from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.runtime.logits import runtime_log_probabilities

VARIABLE = "KURTAIL_ACTIVATION_BITS"
RTN = ("--rotation", "hadamard", "--weights", "rtn", "--kv", "4")
#: Twice as many tokens as a batch of few columns has, and one alone: both kinds of products.
SEQUENCES = [list(range(3, 40)), [5]]
ASKED = "as --activation-bits asks; the file says 4"


@pytest.fixture(params=["dense", "experts"])
def files(request, converted, tiny_spm, with_tokenizer) -> tuple[Path, Path]:
    """The same weights, written with 4 and with 8 bits of activations."""
    source = tiny_spm if request.param == "dense" else with_tokenizer("mixtral", tiny_spm, 400)
    return converted(source, *RTN), converted(source, *RTN, "--activations", "8")


@pytest.fixture
def four(converted, tiny_spm) -> Path:
    return converted(tiny_spm, *RTN)


def loaded(program, path: Path, *options: str, name: str = "llama-completion") -> str:
    done = program(name, "-m", path, "-no-cnv", "-p", "a", "-n", "1", "-c", "64", "-lv", "4", *options)
    assert done.status == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.usefixtures("bindings")
def test_the_logits_are_those_of_a_file_written_with_these_bits(files, monkeypatch):
    own = [runtime_log_probabilities(path, SEQUENCES) for path in files]
    assert not np.array_equal(*own)
    for path, unchanged in zip(files, own, strict=True):
        for bits, expected in (("4", own[0]), ("8", own[1]), ("file", unchanged)):
            assert np.array_equal(runtime_log_probabilities(path, SEQUENCES, activations=bits), expected)
            monkeypatch.setenv(VARIABLE, bits)
            assert np.array_equal(runtime_log_probabilities(path, SEQUENCES, activations=None), expected)
            # what was asked for by name, as verify asks for the file's, wins over the environment
            assert np.array_equal(runtime_log_probabilities(path, SEQUENCES), unchanged)


def test_llama_perplexity_is_that_of_a_file_written_with_these_bits(files, text):
    written = [perplexity(path, text, 128, 2, NullProgress()) for path in files]
    asked = perplexity(files[0], text, 128, 2, NullProgress(), activations="8")
    assert (asked.value, asked.stderr) == (written[1].value, written[1].stderr) != (written[0].value, written[0].stderr)
    assert [one.activations.bits for one in (*written, asked)] == ["4", "8", "8"]
    assert (asked.activations.why, written[0].activations.why) == (ASKED, "as --activation-bits asks")


def test_the_log_says_which_bits_and_why(four, converted, tiny_spm, text, program, monkeypatch):
    eight = converted(tiny_spm, *RTN, "--activations", "8")
    options = ("--calibration", str(text), "--calibration-tokens", "1024", "--activations", "auto", "--budget", "0.3")
    mixed = converted(tiny_spm, *RTN, *options)
    log = loaded(program, four, "--activation-bits", "8")
    assert f"activations: 8 bits, {ASKED}\n" in log and "W4A8KV4" in log
    assert "activations: 4 bits, as --activation-bits asks; the file says 8\n" in loaded(program, eight, "--activation-bits", "4")
    assert re.search(
        r"activations: 8 bits, as --activation-bits asks; the file says 4 \(8 in \d of 14 tensors\)\n",
        loaded(program, mixed, "--activation-bits", "8"),
    )
    # of an option and the variable, the option; of two options, the last
    assert "activations: 4 bits, as --activation-bits asks\n" in loaded(program, four, "--activation-bits", "file")
    assert f"8 bits, {ASKED}\n" in loaded(program, four, "--activation-bits", "4", "--activation-bits", "8")
    monkeypatch.setenv(VARIABLE, "8")
    assert f"activations: 8 bits, as {VARIABLE} asks; the file says 4\n" in loaded(program, four)
    monkeypatch.delenv(VARIABLE)
    reason = re.search(r"activations: ([48]) bits, (.*)\n", loaded(program, four))
    assert reason and reason.groups() in {("4", "as the file says")} | {
        ("8", f"the default with {name}; the file says 4") for name in ("AVX512_VNNI", "AVX2", "MATMUL_INT8", "DOTPROD")
    }


def test_the_other_programs_take_it(four, program, serving, post):
    done = program("llama-bench", "-m", four, "-p", "8", "-n", "1", "-r", "1", "-v", "--activation-bits", "8")
    assert done.status == 0 and f"activations: 8 bits, {ASKED}\n" in done.stderr
    for name in ("llama-cli", "llama-server"):
        assert "--activation-bits BITS" in program(name, "--help").stdout
    # the server's own process has it: an answer at 4 bits is another
    answers = []
    for bits in ("8", "8", "4"):
        with serving("llama-server", "-m", four, "-c", "64", "-np", "1", "--activation-bits", bits) as port:
            body = {"prompt": "a b c", "n_predict": 1, "n_probs": 5, "temperature": 0}
            status, answer = post(port, "/completion", body)
            assert status == 200
            answers.append(answer["completion_probabilities"])
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(
    "name", ["llama-completion", "llama-cli", "llama-server", "llama-perplexity", "llama-bench"]
)
def test_other_values_are_refused_in_one_line(four, program, name, monkeypatch):
    done = program(name, "-m", four, "--activation-bits", "6")
    told = "--activation-bits is '6': give 4, 8 or file (the file's own)"
    assert done.status != 0
    assert [line for line in (done.stdout + done.stderr).splitlines() if told in line]
    monkeypatch.setenv(VARIABLE, "six")
    done = program(name, "-m", four, *(("-f", four) if name == "llama-perplexity" else ()))
    assert done.status != 0
    assert f"kurtail: {VARIABLE} is 'six': give 4, 8 or file" in done.stdout + done.stderr or name == "llama-bench"


@pytest.mark.usefixtures("bindings")
def test_the_bindings_refuse_them_as_well(four, monkeypatch):
    with pytest.raises(KurtailError, match="--activation-bits is '5': give 4, 8 or file"):
        runtime_log_probabilities(four, [[5]], activations="5")
    monkeypatch.setenv(VARIABLE, "16")
    with pytest.raises(KurtailError, match=f"{VARIABLE} is '16': give 4, 8 or file"):
        runtime_log_probabilities(four, [[5]], activations=None)


#: Whether two ways to ask llama-cpp-python's own class give the same logits, and others than the file's bits.
LLAMA = """
import os, sys
import numpy as np
from llama_cpp import Llama

def logits(**options):
    model = Llama(sys.argv[1], n_ctx=64, verbose=False, logits_all=True, **options)
    model.eval([3, 4, 5, 6, 7])
    return np.array(model.scores[:5])

own = logits()
os.environ["KURTAIL_ACTIVATION_BITS"] = "8"
assert np.array_equal(logits(), logits(kv_overrides={"kurtail.run.activation_bits": "8"}))
assert np.array_equal(own, logits(kv_overrides={"kurtail.run.activation_bits": "file"}))
assert not np.array_equal(own, logits())
print("right")
"""


@pytest.mark.usefixtures("bindings")
def test_the_bindings_take_the_variable_and_the_key(four):
    done = subprocess.run([sys.executable, "-c", LLAMA, four], capture_output=True, text=True, check=False)
    assert done.stdout == "right\n", done.stderr


def test_files_without_such_products_are_as_they_were(tiny_reference, program, text):
    log = loaded(program, tiny_reference, "--activation-bits", "8")
    assert "activations:" not in log
    runs = [perplexity(tiny_reference, text, 128, 2, NullProgress(), activations=bits) for bits in ("8", None)]
    assert runs[0] == runs[1] and runs[0].activations is None


def test_a_file_of_llama_quantize(tiny_reference, program, tmp_path):
    path = tmp_path / "kt4.gguf"
    assert program("llama-quantize", tiny_reference, path, "KT4").status == 0
    assert f"activations: 8 bits, {ASKED}\n" in loaded(program, path, "--activation-bits", "8")
    assert "activations: 4 bits, as --activation-bits asks\n" in loaded(program, path, "--activation-bits", "file")


def test_eval_tells_the_bits_that_were_in_force(four, cli, text, tmp_path):
    report = tmp_path / "r.json"
    measured = ("--text", text, "--context", "128", "--chunks", "2", "--json", report)
    done = cli("eval", four, *measured, "--activation-bits", "8", "--reference", four, "--card")
    assert done.status == 0 and "W4A8KV4" in done.stdout and "W4A4KV4" in done.stdout
    content = json.loads(report.read_text(encoding="utf-8"))
    (row,) = content["models"]
    assert (row["activation_bits"], row["runs_as"], row["activations"]) == (8, "W4A8KV4", {"bits": "8", "why": ASKED})
    assert row["kld_mean"] > 0 and content["reference"]["runs_as"] == "W4A4KV4"
    card = Path(f"{four}.md")
    assert f"rounded to 8 bits, {ASKED}." in card.read_text(encoding="utf-8")
    card.unlink()
    assert "W4A4KV4" in cli("inspect", four).stdout


@pytest.mark.usefixtures("bindings")
def test_eval_tells_them_of_what_the_bindings_measure(four, cli, text, tmp_path):
    report = tmp_path / "r.json"
    asked = ("--retrieval-lengths", "512", "--retrieval-depths", "0.5", "--retrieval-needles", "1", "--json", report)
    done = cli("eval", four, "--retrieval", "--retrieval-text", text, *asked, "--activation-bits", "8")
    assert done.status == 0, done.stderr
    (row,) = json.loads(report.read_text(encoding="utf-8"))["models"]
    assert row["runs_as"] == "W4A8KV4" and row["retrieval"]["activations"] == {"bits": "8", "why": ASKED}
