"""MMLU from local CSV files: few-shot questions with four choices, scored by log-likelihood.

Hendrycks et al. 2021, "Measuring Massive Multitask Language Understanding" (arXiv:2009.03300). The
prompt is the paper's (lm-eval's wording, which has one blank before the subject where the paper's code
had two); the answer is the likeliest of " A", " B", " C", " D". Prompts that do not fit into the model's
context lose examples from the end, as in the paper's code.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kurtail_gguf.files.texts import check_text
from kurtail_gguf.measure.llama_perplexity import EvaluationError
from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.runtime import vendored
from kurtail_gguf.runtime.activation_bits import FILE_BITS, Activations, told_activations
from kurtail_gguf.runtime.bindings import require_bindings
from kurtail_gguf.runtime.cache_types import FILE, stage_name

LETTERS = ("A", "B", "C", "D")
HEADER = ("question", "choice0", "choice1", "choice2", "choice3", "answer")
#: Answers as the paper's files have them, letters, and as copies with a header do, numbers.
_ANSWERS = {name: number for number, letter in enumerate(LETTERS) for name in (letter, str(number))}
#: Examples before each question, as in the paper.
DEFAULT_SHOTS = 5

_WORKER = "kurtail_gguf.measure.mmlu_worker"


class MmluError(KurtailError):
    """The questions are missing or not in the expected form; the message has file and line."""


@dataclass(frozen=True, slots=True)
class Question:
    """One row of a CSV file; ``answer`` is 0…3, ``where`` its file and line."""

    text: str
    choices: tuple[str, ...]
    answer: int
    where: str


@dataclass(frozen=True, slots=True)
class Subject:
    """A subject's examples and questions; the name has underscores, as in the files."""

    name: str
    examples: tuple[Question, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A share of right answers.

    Args:
        accuracy: 0…1.
        stderr: its standard error; None where a single question leaves it undefined.
        questions: how many were asked.
    """

    accuracy: float
    stderr: float | None
    questions: int


@dataclass(frozen=True, slots=True)
class MmluResult:
    """What a model scored.

    Args:
        shots: examples asked for.
        shortened: questions that had to do with fewer, for the model's context is too short.
        micro: over all questions alike.
        macro: mean of the subjects' accuracies.
        subjects: by name.
        activations: the bits in force; None where nothing was rounded.
    """

    shots: int
    shortened: int
    micro: Accuracy
    macro: Accuracy
    subjects: dict[str, Accuracy]
    activations: Activations | None = None


def read_mmlu(directory: Path, shots: int = DEFAULT_SHOTS, limit: int | None = None) -> tuple[Subject, ...]:
    """Read ``dev/SUBJECT_dev.csv`` and ``test/SUBJECT_test.csv``: question, four choices, answer.

    Both forms are read in which they are found: as the paper published them, without a header and with answers A to D, and
    with a header and answers 0 to 3.

    Args:
        directory: holds ``dev`` and ``test``.
        shots: examples to take from ``dev``; with 0 it need not be there.
        limit: only the first so many questions of a subject.

    Raises:
        MmluError: nothing there, too few examples, a bad row.
    """
    tests = sorted((directory / "test").glob("*_test.csv"))
    if not tests:
        raise MmluError(f"{directory} has no test/SUBJECT_test.csv: give the directory that contains dev and test")
    subjects = []
    for path in tests:
        name = path.name.removesuffix("_test.csv")
        examples: tuple[Question, ...] = ()
        if shots:
            dev = directory / "dev" / f"{name}_dev.csv"
            examples = tuple(_read(dev))[:shots]
            if len(examples) < shots:
                raise MmluError(f"{dev} contains {len(examples)} examples: --shots {shots} needs more")
        questions = tuple(_read(path))[:limit]
        if not questions:
            raise MmluError(f"{path} contains no question")
        subjects.append(Subject(name, examples, questions))
    return tuple(subjects)


def heading(subject: str) -> str:
    """What a prompt begins with."""
    return f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"


def block(question: Question, answered: bool) -> str:
    """A question with its choices, up to "Answer:", or with the answer and a blank line."""
    lines = [question.text, *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=True))]
    answer = f"Answer: {LETTERS[question.answer]}\n\n" if answered else "Answer:"
    return "\n".join([*lines, answer])


def prompt(subject: Subject, question: Question, shots: int) -> str:
    """The whole prompt with the first ``shots`` examples."""
    return heading(subject.name) + "".join(block(e, True) for e in subject.examples[:shots]) + block(question, False)


def score(
    model: Path,
    subjects: tuple[Subject, ...],
    progress: Progress,
    cache: str = FILE,
    activations: str | None = FILE_BITS,
) -> MmluResult:
    """Ask a GGUF file all questions, through the shipped runtime.

    Args:
        model: GGUF file.
        subjects: as :func:`read_mmlu` gives them.
        progress: one stage, a unit a question.
        cache: one of :data:`kurtail_gguf.runtime.cache_types.CACHE_TYPES`.
        activations: one of :data:`kurtail_gguf.runtime.activation_bits.ACTIVATION_CHOICES`; None is the runtime's default.

    Raises:
        EvaluationError: the runtime refuses the file; a question does not fit into its context.
        BindingsError: the bindings are not installed.
    """
    require_bindings()
    request = {
        "path": str(model.resolve()),
        "cache": cache,
        "activations": activations,
        "subjects": [
            {
                "heading": heading(subject.name),
                "examples": [block(example, answered=True) for example in subject.examples],
                "questions": [block(question, answered=False) for question in subject.questions],
                "where": [question.where for question in subject.questions],
            }
            for subject in subjects
        ],
        "continuations": [f" {letter}" for letter in LETTERS],
    }
    asked = [(subject, question) for subject in subjects for question in subject.questions]
    answers: list[int] = []
    shortened = right = 0
    in_force: Activations | None = None
    with progress.stage(stage_name("MMLU", model, cache), len(asked)) as stage:

        def on_message(message: dict[str, Any]) -> None:
            nonlocal shortened, right, in_force
            if "activations" in message:
                in_force = told_activations(message)
                return
            subject, question = asked[len(answers)]
            answers.append(likeliest(message["log_likelihoods"]))
            shortened += message["shots"] < len(subject.examples)
            right += answers[-1] == question.answer
            stage.advance(1, f"{subject.name}, {100 * right / len(answers):.1f} % right")

        try:
            vendored.run(_WORKER, request, on_message)
        except vendored.WorkerError as error:
            raise EvaluationError(f"MMLU failed on {model}: {error}") from None
    return replace(summarise(subjects, answers, shortened), activations=in_force)


def likeliest(log_likelihoods: list[float]) -> int:
    """Number of the largest; the first of equals, as numpy's argmax in lm-eval."""
    return max(range(len(log_likelihoods)), key=log_likelihoods.__getitem__)


def summarise(subjects: tuple[Subject, ...], answers: list[int], shortened: int) -> MmluResult:
    """Accuracies of answers given in the order of the questions."""
    given = iter(answers)
    by_name = {}
    right = 0
    for subject in subjects:
        count = sum(next(given) == question.answer for question in subject.questions)
        right += count
        by_name[subject.name] = accuracy(count, len(subject.questions))
    shots = max(len(subject.examples) for subject in subjects)
    return MmluResult(shots, shortened, accuracy(right, len(answers)), _mean(list(by_name.values())), by_name)


def accuracy(right: int, questions: int) -> Accuracy:
    """A share with the standard error of a mean of zeros and ones, √(p(1 − p)/(n − 1))."""
    share = right / questions
    stderr = math.sqrt(share * (1 - share) / (questions - 1)) if questions > 1 else None
    return Accuracy(share, stderr, questions)


def _mean(subjects: list[Accuracy]) -> Accuracy:
    errors = [subject.stderr for subject in subjects]
    known = [error for error in errors if error is not None]
    stderr = math.sqrt(sum(error**2 for error in known)) / len(subjects) if len(known) == len(errors) else None
    share = sum(subject.accuracy for subject in subjects) / len(subjects)
    return Accuracy(share, stderr, sum(subject.questions for subject in subjects))


def _read(path: Path) -> Iterator[Question]:
    check_text(path, MmluError, "MMLU's file")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, strict=True)
            try:
                start = 1
                for row in rows:
                    # a quoted field may hold line breaks: the row is named by its first line
                    where, start = f"{path}:{start}", rows.line_num + 1
                    if row and not (where == f"{path}:1" and _is_header(row, where)):
                        yield _question(row, where)
            except csv.Error as error:
                raise MmluError(f"{path}:{rows.line_num}: {error}") from None
    except OSError as error:
        raise MmluError(f"cannot read {path}: {error.strerror}") from None


def _is_header(row: list[str], where: str) -> bool:
    """Whether a file's first row names the columns; one that names others, or in another order, is refused."""
    names = tuple(name.strip().lower() for name in row)
    if names[0] not in HEADER and names[-1] not in HEADER:
        return False
    if (len(names), names[0], names[-1]) != (len(HEADER), HEADER[0], HEADER[-1]):
        raise MmluError(f"{where}: the header is {','.join(row)[:80]!r}, expected {','.join(HEADER)}")
    return True


def _question(row: list[str], where: str) -> Question:
    if len(row) != len(HEADER):
        raise MmluError(f"{where}: {len(row)} fields, expected {len(HEADER)} ({','.join(HEADER)})")
    text, *choices, answer = (field.strip() for field in row)
    for name, field in zip(HEADER, (text, *choices), strict=False):
        if not field:
            raise MmluError(f"{where}: {name} is empty")
    if answer.upper() not in _ANSWERS:
        raise MmluError(f"{where}: the answer is {answer!r}, expected A, B, C, D or 0, 1, 2, 3")
    return Question(text, tuple(choices), _ANSWERS[answer.upper()], where)
