"""MMLU: files, prompts, answers, standard errors; the worker with a model of the test's own."""

from __future__ import annotations

import math
import statistics
import types
from pathlib import Path

import pytest

from kurtail_gguf.measure import mmlu
from kurtail_gguf.measure.mmlu import Accuracy, MmluError, Question, Subject
from kurtail_gguf.measure.mmlu_worker import ask
from kurtail_gguf.messages.errors import KurtailError

HEADER = ",".join(mmlu.HEADER) + "\n"


@pytest.fixture
def files(tmp_path, write_mmlu):
    """``files(subject, dev, test)`` writes the rows of a subject; returns the directory."""

    def write(subject: str, dev: str, test: str) -> Path:
        write_mmlu(tmp_path, subject, dev, test)
        return tmp_path

    return write


def test_the_prompt_letter_by_letter(files):
    directory = files("world_religions", '"What, then?",a,b,c,d,2\n', 'And "now"? ,w,x,y, z,0\n')
    (subject,) = mmlu.read_mmlu(directory, shots=1)
    assert mmlu.prompt(subject, subject.questions[0], 1) == (
        "The following are multiple choice questions (with answers) about world religions.\n\n"
        "What, then?\nA. a\nB. b\nC. c\nD. d\nAnswer: C\n\n"
        'And "now"?\nA. w\nB. x\nC. y\nD. z\nAnswer:'
    )
    assert "What, then?" not in mmlu.prompt(subject, subject.questions[0], 0)


def test_shots_limit_and_order(files):
    files("b", "q1,a,b,c,d,0\nq2,a,b,c,d,1\n", "".join(f"t{i},a,b,c,d,3\n" for i in range(4)))
    directory = files("a", "q1,a,b,c,d,0\nq2,a,b,c,d,1\n", "x,a,b,c,d,1\n")
    first, second = mmlu.read_mmlu(directory, shots=1, limit=3)
    assert (first.name, second.name) == ("a", "b")
    assert [question.text for question in second.examples] == ["q1"]
    assert [question.text for question in second.questions] == ["t0", "t1", "t2"]


def test_without_shots_no_examples_are_read(files, tmp_path):
    directory = files("a", "", "x,a,b,c,d,1\n")
    (tmp_path / "dev" / "a_dev.csv").unlink()
    assert mmlu.read_mmlu(directory, shots=0)[0].examples == ()


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("q,a,b,c,d\n", r"a_test.csv:2: 5 fields, expected 6"),
        ("q,a,b,c,d,0\nq,a,b,c,d,4\n", r"a_test.csv:3: the answer is '4', expected A, B, C, D or 0, 1, 2, 3"),
        ("q,a,b,c,d,E\n", r"a_test.csv:2: the answer is 'E'"),
        ("q,a, ,c,d,1\n", r"a_test.csv:2: choice1 is empty"),
        ('"a\nlong\nquestion",a,b,c,d,0\nq,a,b,c,d,\n', r"a_test.csv:5: the answer is ''"),
        ('"never closed,a,b,c,d,0\n', r"a_test.csv:2: unexpected end of data"),
        ("", "a_test.csv contains no question"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(files, rows, told):
    with pytest.raises(MmluError, match=told) as raised:
        mmlu.read_mmlu(files("a", "q,a,b,c,d,0\n", rows), shots=1)
    assert "\n" not in str(raised.value)


def test_bad_files(files, tmp_path):
    with pytest.raises(MmluError, match="no test/SUBJECT_test.csv"):
        mmlu.read_mmlu(tmp_path, shots=1)
    directory = files("a", "q,a,b,c,d,0\n", "q,a,b,c,d,0\n")
    with pytest.raises(MmluError, match="a_dev.csv contains 1 examples: --shots 5"):
        mmlu.read_mmlu(directory)
    path = tmp_path / "test" / "a_test.csv"
    for content, told in (
        (b"answer,question,a,b,c,d\n", "a_test.csv:1: the header is"),
        (b"question,a,b,answer\n", "a_test.csv:1: the header is"),
        ("q,a,b,c,d,0\n".encode("utf-16"), "a_test.csv is UTF-16: convert it with iconv"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a_test.csv is a Git LFS pointer.*git lfs pull"),
        (b"", "a_test.csv is empty"),
        (HEADER.encode() + b"\xff,a,b,c,d,0\n", "is not UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(MmluError, match=told):
            mmlu.read_mmlu(directory, shots=1)
    path.write_bytes(b"\xef\xbb\xbf" + HEADER.encode() + b"q,a,b,c,d,0\r\n")  # as spreadsheets write it
    assert mmlu.read_mmlu(directory, shots=1)[0].questions[0].answer == 0
    (tmp_path / "dev" / "a_dev.csv").unlink()
    with pytest.raises(MmluError, match=r"a_dev.csv does not exist"):
        mmlu.read_mmlu(directory, shots=1)


def test_the_published_files_are_read_as_they_are(tmp_path):
    """No header, letters for answers; a question may be a number or begin with the word."""
    for part, rows in (("dev", "Question 1?,a,b,c,d,B\n"), ("test", '4,1,2,3,4,D\n"What, then?",w,x,y,z,A\n')):
        (tmp_path / part).mkdir()
        (tmp_path / part / f"a_{part}.csv").write_text(rows, encoding="utf-8")
    (subject,) = mmlu.read_mmlu(tmp_path, shots=1)
    assert [(one.text, one.answer, one.where.rpartition(":")[2]) for one in (*subject.examples, *subject.questions)] == [
        ("Question 1?", 1, "1"), ("4", 3, "1"), ("What, then?", 0, "2"),
    ]  # fmt: skip


def test_the_first_of_equals_is_the_answer():
    assert mmlu.likeliest([-3.0, -1.0, -1.0, -2.0]) == 1


def _subject(name: str, answers: list[int]) -> Subject:
    return Subject(name, (), tuple(Question("q", ("a", "b", "c", "d"), answer, "f:1") for answer in answers))


def test_accuracies_and_standard_errors():
    subjects = (_subject("x", [0, 1, 2, 3]), _subject("y", [0, 0]))
    result = mmlu.summarise(subjects, [0, 1, 2, 0, 0, 1], shortened=0)
    right = [[1, 1, 1, 0], [1, 0]]
    every = [one for answers in right for one in answers]
    # the standard error of a mean is the sample's standard deviation over the root of its size
    errors = [statistics.stdev(answers) / math.sqrt(len(answers)) for answers in right]
    assert result.subjects["x"] == Accuracy(0.75, pytest.approx(errors[0]), 4)
    assert result.subjects["y"] == Accuracy(0.5, pytest.approx(errors[1]), 2)
    assert result.micro == Accuracy(
        pytest.approx(statistics.mean(every)), pytest.approx(statistics.stdev(every) / math.sqrt(6)), 6
    )
    assert result.macro == Accuracy(0.625, pytest.approx(math.hypot(*errors) / 2), 6)


def test_one_question_has_no_standard_error():
    result = mmlu.summarise((_subject("x", [2]), _subject("y", [0, 0])), [2, 0, 1], shortened=1)
    assert result.subjects["x"] == Accuracy(1.0, None, 1)
    assert result.macro.stderr is None and result.micro.stderr is not None
    assert result.shortened == 1


class _WordModel:
    """A token a word; always finds the continuation that the context's last word but one names likeliest."""

    limit = 20

    def __init__(self) -> None:
        self.reserved = 0
        self.computed = 0
        self.words: dict[str, int] = {}

    def _tokens(self, text: str) -> list[int]:
        return [self.words.setdefault(word, len(self.words)) for word in text.split()]

    def split(self, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
        return self._tokens(prompt), self._tokens(continuation)

    def reserve(self, tokens: int) -> None:
        self.reserved = tokens

    def score(self, context, continuations):
        assert len(context) + max(map(len, continuations)) <= self.reserved <= self.limit
        return [types.SimpleNamespace(log_likelihood=-float(tokens[0] != context[-2])) for tokens in continuations]


def _request(questions: list[str]) -> dict:
    return {
        "path": "model.gguf",
        "subjects": [
            {
                "heading": "about this ",  # 2 words
                "examples": ["one two three A ", "four five six B "],  # 4 each
                "questions": questions,
                "where": [f"f.csv:{i + 2}" for i in range(len(questions))],
            }
        ],
        "continuations": [" A", " B", " C", " D"],
    }


def test_examples_are_dropped_from_the_end_until_the_prompt_fits():
    # 2 + 2·4 + words + 1 for the answer ≤ 20
    questions = [" ".join(["w"] * words + ["C", "Answer:"]) for words in (3, 7, 8, 11, 15)]
    told = []
    ask(_WordModel(), _request(questions), told.append)
    assert [message["shots"] for message in told] == [2, 2, 1, 1, 0]
    assert all(mmlu.likeliest(message["log_likelihoods"]) == 2 for message in told)


def test_a_question_that_never_fits_is_named_before_anything_is_asked():
    told = []
    with pytest.raises(KurtailError, match=r"f.csv:3: the question takes 21 tokens .* context has 20"):
        ask(_WordModel(), _request(["C Answer:", " ".join(["w"] * 16 + ["C", "Answer:"])]), told.append)
    assert told == []
