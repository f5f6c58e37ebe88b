"""MMLU through the bindings: log-likelihoods against transformers', the command, what it says when it cannot."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kurtail_gguf.measure import mmlu
from kurtail_gguf.runtime import vendored
from kurtail_gguf.runtime.bindings import BindingsError, require_bindings

pytestmark = pytest.mark.usefixtures("bindings")
#: The last is as long as any other thing a model may be asked to go on with.
CONTINUATIONS = [*(f" {letter}" for letter in mmlu.LETTERS), " Anything else, said in several words"]


@pytest.fixture(scope="module")
def questions(tmp_path_factory, write_mmlu) -> Path:
    """Two subjects: a short one, and one whose examples do not all fit into the tiny model's 1024 tokens."""
    directory = tmp_path_factory.mktemp("mmlu")
    long = "a block of sixty-four integers and one half-precision scale " * 15
    subjects = {
        "file_formats": (
            [f"What is stored at offset {i}?,the scale,the codes,a name,nothing,{i % 4}" for i in range(5)],
            [f"How many bytes are {i} blocks?,{34 * i},{32 * i},{36 * i},{i},0" for i in range(1, 7)],
        ),
        "rotations": (
            [f"Which one is {long}?,R1,R2,R3,R4,{i % 4}" for i in range(5)],
            [f"Which rotation is number {i}?,R1,R2,R3,R4,{i % 4}" for i in range(4)],
        ),
    }
    for name, (dev, test) in subjects.items():
        write_mmlu(directory, name, "\n".join(dev) + "\n", "\n".join(test) + "\n")
    return directory


def _told(path: Path, directory: Path) -> tuple[list[dict], int, list[tuple[mmlu.Subject, mmlu.Question]]]:
    """The worker's messages, tokens computed, and the questions they belong to."""
    subjects = mmlu.read_mmlu(directory)
    request = {
        "path": str(path),
        "cache": "file",
        "activations": "file",
        "subjects": [
            {
                "heading": mmlu.heading(subject.name),
                "examples": [mmlu.block(example, True) for example in subject.examples],
                "questions": [mmlu.block(question, False) for question in subject.questions],
                "where": [question.where for question in subject.questions],
            }
            for subject in subjects
        ],
        "continuations": CONTINUATIONS,
    }
    messages: list[dict] = []
    computed = vendored.run("kurtail_gguf.measure.mmlu_worker", request, messages.append)
    # the first tells the bits of activations: none in a file that rounds nothing
    assert messages.pop(0) == {"activations": None}
    return messages, computed, [(subject, question) for subject in subjects for question in subject.questions]


def test_log_likelihoods_are_transformers_own(tiny_bpe, tiny_bpe_reference, questions):
    """The plain export against the checkpoint with its own tokenizer: few-shot prompts, answers of several tokens."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_bpe)
    model = AutoModelForCausalLM.from_pretrained(tiny_bpe, dtype=torch.float32).eval()
    messages, computed, asked = _told(tiny_bpe_reference, questions)
    assert len(messages) == len(asked) == 10
    prompts, pairs = 0, []
    shots = {subject.name: set() for subject, _ in asked}
    for message, (subject, question) in zip(messages, asked, strict=True):
        shots[subject.name].add(message["shots"])
        prompt = mmlu.prompt(subject, question, message["shots"])
        context = tokenizer(prompt)["input_ids"]
        prompts += len(context)
        for continuation, found in zip(CONTINUATIONS, message["log_likelihoods"], strict=True):
            whole = tokenizer(prompt + continuation)["input_ids"]
            assert whole[: len(context)] == context and len(whole) <= 1024
            with torch.inference_mode():
                logits = model(torch.tensor([whole])).logits[0, len(context) - 1 : -1].double().log_softmax(-1)
            expected = sum(row[token].item() for row, token in zip(logits, whole[len(context) :], strict=True))
            pairs.append((found, expected))
    # the plain file's cache is f16, and so are the sums over it
    found, expected = np.array(pairs).T
    assert np.abs(found - expected).max() < 0.06 and np.abs((found - expected).mean()) < 0.02
    assert expected.reshape(len(asked), -1)[:, : len(mmlu.LETTERS)].std() > 0.5
    # as many examples as fit, and those are computed once
    assert shots["file_formats"] == {5}
    (kept,) = shots["rotations"]
    assert 0 < kept < 5
    subject, question = asked[-1]
    assert len(tokenizer(mmlu.prompt(subject, question, kept + 1) + CONTINUATIONS[-1])["input_ids"]) > 1024
    assert computed < prompts / 2


def test_the_command(cli, converted, tiny_spm, tiny_reference, questions, tmp_path):
    """Table and JSON of two files beside a reference; no text is needed."""
    report, path = tmp_path / "r.json", converted(tiny_spm, "--rotation", "hadamard", "--weights", "rtn")
    options = ("--mmlu", questions, "--mmlu-limit", "3", "--shots", "2", "--json", report, "--card")
    done = cli("eval", path, tiny_reference, "--reference", tiny_reference, *options)
    assert done.status == 0, done.stderr
    content = json.loads(report.read_text(encoding="utf-8"))
    ours, plain = content["models"]
    assert ours["perplexity"] is None and ours["kld_mean"] is None
    assert plain["mmlu"] == content["reference"]["mmlu"]
    for model in (ours, plain):
        found = model["mmlu"]
        assert (found["shots"], found["shortened"]) == (2, 3)
        assert {name: part["questions"] for name, part in found["subjects"].items()} == {
            "file_formats": 3, "rotations": 3,
        }  # fmt: skip
        assert found["micro"]["questions"] == 6
        assert found["macro"]["accuracy"] == pytest.approx(found["micro"]["accuracy"])
        assert 0 <= found["micro"]["accuracy"] <= 1
    assert "perplexity" not in done.stdout and "KLD" not in done.stdout
    assert all(name in done.stdout for name in ("reference", "file_formats", "rotations", "macro average", "micro average"))
    for file, model in ((path, ours), (tiny_reference, plain)):
        card = Path(f"{file}.md").read_text(encoding="utf-8")
        share = f"{100 * model['mmlu']['micro']['accuracy']:.1f} ± "
        assert f"| MMLU, micro average | {share}" in card
        command = shlex.split(card.split("```")[1])
        assert command[:3] == ["kurtail-gguf", "eval", str(path)] and command[-1] == "--card"
    assert "| runs as | W4A4KV4" in Path(f"{path}.md").read_text(encoding="utf-8")


def test_errors_are_one_line(cli, tiny_reference, questions, tmp_path):
    assert "no test/SUBJECT_test.csv" in cli("eval", tiny_reference, "--mmlu", tmp_path).error
    assert "--shots 6 needs more" in cli("eval", tiny_reference, "--mmlu", questions, "--shots", "6").error
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny_reference.read_bytes()[:-4096])
    assert "broken.gguf" in cli("eval", broken, "--mmlu", questions).error


def test_without_the_bindings_the_command_to_install_them_is_named(monkeypatch):
    monkeypatch.setattr("kurtail_gguf.runtime.bindings._DISTRIBUTION", "no-such-distribution")
    with pytest.raises(BindingsError, match=rf"not installed in {sys.prefix}.*kurtail-gguf install-bindings"):
        require_bindings()
