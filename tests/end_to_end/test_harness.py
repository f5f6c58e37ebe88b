"""lm-eval's tasks on the runtime, beside lm-eval's own transformers model on the same checkpoint.

Every kind of question that tasks ask (choices, rolling log-likelihoods, text), from task files with local
data; nothing is fetched.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest

from kurtail_gguf.measure.harness import TasksRequest, check_tasks
from kurtail_gguf.messages.errors import KurtailError

HAS_HARNESS = importlib.util.find_spec("lm_eval") is not None
pytestmark = pytest.mark.usefixtures("bindings")
needs_harness = pytest.mark.skipif(not HAS_HARNESS, reason="lm-eval is not installed (extra eval)")

TASKS = "kurtail_choices,kurtail_rolling,kurtail_text"
CHOICES = """
task: kurtail_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {directory}/choices.json, dev: {directory}/examples.json}}}}
output_type: multiple_choice
test_split: test
fewshot_split: dev
num_fewshot: 2
fewshot_config: {{sampler: first_n}}
description: "The following are multiple choice questions (with answers) about file formats.\\n\\n"
doc_to_text: "{{{{question.strip()}}}}\\nA. {{{{choices[0]}}}}\\nB. {{{{choices[1]}}}}\\nC. {{{{choices[2]}}}}\\nD. {{{{choices[3]}}}}\\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
ROLLING = """
task: kurtail_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {directory}/texts.json}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""
TEXT = """
task: kurtail_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {directory}/texts.json}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{start}}}}"
doc_to_target: "{{{{goes_on}}}}"
generation_kwargs: {{max_gen_toks: 3, until: ["\\n\\n"], do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def offline(tmp_path_factory) -> dict[str, str]:
    """An environment in which nothing is fetched and nothing of the user's is reused."""
    cache = str(tmp_path_factory.mktemp("datasets-cache"))
    return {**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": cache}


def _continuation(source: Path, start: str) -> str:
    """Three greedy tokens by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = tokenizer(start, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    whole = model.generate(**ids, max_new_tokens=3, do_sample=False)
    return tokenizer.decode(whole[0, ids["input_ids"].shape[1] :])


@pytest.fixture(scope="module")
def tasks(tiny_bpe, text, tmp_path_factory) -> Path:
    """Task files and their data; half of the texts to generate are what transformers generates."""
    directory = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"How many bytes are {i} blocks?", "choices": [str(34 * i), str(32 * i), str(i), "none"], "answer": i % 4}
        for i in range(1, 25)
    ]
    # the second is longer than the context of 1024 tokens, so that it takes several windows
    # letters and blanks only: SmolLM2's digits and signs are told apart differently by its two tokenizers
    words = " ".join(re.findall("[A-Za-z]+", text.read_text(encoding="utf-8")))
    texts = [
        {"text": words[:1500], "start": "Rows must be a multiple of", "goes_on": ""},
        {"text": words[3000:10000], "start": "The scale may be negative", "goes_on": "nothing of the kind"},
    ]
    texts[0]["goes_on"] = _continuation(tiny_bpe, texts[0]["start"])
    for name, content in (("choices", rows[4:]), ("examples", rows[:4]), ("texts", texts)):
        (directory / f"{name}.json").write_text("\n".join(map(json.dumps, content)) + "\n", encoding="utf-8")
    for name, content in (("choices", CHOICES), ("rolling", ROLLING), ("text", TEXT)):
        (directory / f"{name}.yaml").write_text(content.format(directory=directory), encoding="utf-8")
    return directory


@needs_harness
def test_the_same_as_lm_evals_own_model(cli, tiny_bpe_reference, tiny_bpe, tasks, offline, tmp_path, monkeypatch):
    import lm_eval
    from lm_eval.tasks import TaskManager

    report = tmp_path / "r.json"
    options = ("--tasks", TASKS, "--include-path", tasks, "--json", report)
    done = cli("eval", tiny_bpe_reference, *options, env=offline)
    assert done.status == 0, done.stderr
    (model,) = json.loads(report.read_text(encoding="utf-8"))["models"]
    assert model["perplexity"] is None and "mmlu" not in model
    found = model["tasks"]["results"]
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    expected = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(tiny_bpe), "dtype": "float32"}, device="cpu", batch_size=1,
        tasks=TASKS.split(","), task_manager=TaskManager(include_path=str(tasks)), log_samples=False,
    )["results"]  # fmt: skip
    choices = "kurtail_choices", "acc,none"
    assert found[choices[0]][choices[1]] == expected[choices[0]][choices[1]]
    assert found[choices[0]]["acc_stderr,none"] == pytest.approx(expected[choices[0]]["acc_stderr,none"])
    rolling = found["kurtail_rolling"]
    assert rolling["byte_perplexity,none"] == pytest.approx(expected["kurtail_rolling"]["byte_perplexity,none"], rel=2e-3)
    assert found["kurtail_text"]["exact_match,none"] == expected["kurtail_text"]["exact_match,none"] == 0.5
    assert all(name in done.stdout for name in ("kurtail_choices", "acc, none", "lm-eval"))
    assert "log-likelihoods of tiny-bpe.gguf" in done.stderr and "texts of tiny-bpe.gguf" in done.stderr


@needs_harness
def test_the_same_questions_by_our_own_mmlu(cli, tiny_bpe_reference, tasks, offline, write_mmlu, tmp_path):
    """The prompt of --mmlu is lm-eval's, so the answers are."""
    def rows(name: str) -> str:
        asked = map(json.loads, (tasks / f"{name}.json").read_text(encoding="utf-8").splitlines())
        return "".join(",".join([row["question"], *row["choices"], str(row["answer"])]) + "\n" for row in asked)

    write_mmlu(tmp_path, "file_formats", rows("examples"), rows("choices"))
    report = tmp_path / "r.json"
    ours = ("--mmlu", tmp_path, "--shots", "4")
    theirs = ("--tasks", "kurtail_choices", "--include-path", tasks, "--task-shots", "4", "--card")
    done = cli("eval", tiny_bpe_reference, *ours, *theirs, "--json", report, env=offline)
    assert done.status == 0, done.stderr
    (model,) = json.loads(report.read_text(encoding="utf-8"))["models"]
    accuracy = model["tasks"]["results"]["kurtail_choices"]
    assert model["mmlu"]["micro"]["questions"] == 20
    assert model["mmlu"]["micro"]["accuracy"] == accuracy["acc,none"]
    assert model["mmlu"]["micro"]["stderr"] == pytest.approx(accuracy["acc_stderr,none"])
    card = Path(f"{tiny_bpe_reference}.md").read_text(encoding="utf-8")
    assert f"| kurtail_choices: acc, none | {accuracy['acc,none']:.4f} ± " in card and "Tasks of lm-eval 0" in card


@needs_harness
def test_errors_are_one_line(cli, tiny_bpe_reference, tasks, offline, tmp_path):
    assert "lm-eval knows no task no_such_task" in cli("eval", tiny_bpe_reference, "--tasks", "no_such_task", env=offline).error
    for name in ("choices", "examples"):
        (tmp_path / f"{name}.yaml").write_text(CHOICES.format(directory=tmp_path / "gone"), encoding="utf-8")
    gone = cli("eval", tiny_bpe_reference, "--tasks", "kurtail_choices", "--include-path", tmp_path, env=offline).error
    assert "kurtail_choices cannot be loaded; is the data available?" in gone
    sampled = TEXT.format(directory=tasks).replace("do_sample: false", "do_sample: true")
    (tmp_path / "text.yaml").write_text(sampled, encoding="utf-8")
    refused = cli("eval", tiny_bpe_reference, "--tasks", "kurtail_text", "--include-path", tmp_path, env=offline).error
    assert "sampled text" in refused


def test_what_is_missing_is_named_before_any_work(monkeypatch, tmp_path):
    if HAS_HARNESS:
        with pytest.raises(KurtailError, match="--include-path .*gone is not a directory"):
            check_tasks(TasksRequest(("a",), tmp_path / "gone"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(KurtailError, match=r"pip install 'kurtail-gguf\[eval\]'"):
        check_tasks(TasksRequest(("a",)))
