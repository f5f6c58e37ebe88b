"""Retrieval: what is refused, what is asked of the runtime, cells and means, the picture, cache types in a report."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import types
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from kurtail_gguf.cli.main import commands
from kurtail_gguf.cli.tables import print_report, retrieval_panels
from kurtail_gguf.measure import evaluate as measurement
from kurtail_gguf.measure import retrieval
from kurtail_gguf.measure.evaluate import ModelResult, Report, Request, TextRequest, measure
from kurtail_gguf.measure.haystack import Context, Question
from kurtail_gguf.measure.perplexity import Divergence, Perplexity
from kurtail_gguf.measure.retrieval import GUESS, Cell, RetrievalRequest, RetrievalResult, summarise
from kurtail_gguf.measure.retrieval_plot import draw_retrieval, retrieval_figure
from kurtail_gguf.measure.retrieval_worker import ask
from kurtail_gguf.messages.errors import ConfigError, KurtailError
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.runtime.gguf_info import GgufInfo

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed (extra eval)"
)


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("Some words. " * 50, encoding="utf-8")
    return path


@pytest.fixture
def bindings(monkeypatch) -> None:
    """As if they were installed."""
    monkeypatch.setattr(retrieval, "require_bindings", lambda: None)


def _request(text: Path, **changes) -> RetrievalRequest:
    return RetrievalRequest(text, **{"lengths": (100, 200), "depths": (0.1, 0.9), "needles": 2, **changes})


def _info(path: str, limit: int = 200, **metadata) -> GgufInfo:
    keys = {"general.architecture": "llama", "llama.context_length": limit, **metadata}
    return GgufInfo(path=Path(path), metadata=keys, tensors=())


def test_cells_are_of_a_length_and_a_depth():
    found = [
        [(-1.0, True), (-2.0, True)], [(-3.0, False), (-4.0, True)],  # 100 tokens
        [(-5.0, False), (-6.0, False)], [(-7.0, True), (-8.0, False)],  # 200
    ]  # fmt: skip
    result = summarise(_request(Path("t")), found)
    assert result.cells == (
        Cell(100, 0.1, 1, 2, -2.0), Cell(100, 0.9, 2, 2, -3.0), Cell(200, 0.1, 1, 2, -6.0), Cell(200, 0.9, 0, 2, -7.0),
    )  # fmt: skip
    assert (result.accuracy, result.log_likelihood) == (0.5, -4.5)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lengths": ()}, "--retrieval-lengths must be positive"),
        ({"lengths": (0, 512)}, "--retrieval-lengths must be positive"),
        ({"depths": (0.5, 1.5)}, "--retrieval-depths must be between 0"),
        ({"depths": (float("nan"),)}, "--retrieval-depths must be between 0"),
        ({"depths": tuple(i / 100 for i in range(41))}, "41 values of --retrieval-depths: at most 40"),
    ],
)
def test_values_outside_what_is_possible(changes, told):
    with pytest.raises(ConfigError, match=told):
        _request(Path("t"), **changes)


@pytest.mark.usefixtures("bindings")
def test_texts_that_cannot_be_used_are_refused(tmp_path, words):
    assert retrieval.check_retrieval(_request(words)).startswith("Some words.")
    for name, content, told in (
        ("blank.txt", b" \n", r"blank.txt is empty: --retrieval needs a text"),
        ("latin.txt", b"na\xefve words", r"latin.txt is not UTF-8: .* at byte 2"),
        ("gone.txt", None, r"gone.txt does not exist"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(KurtailError, match=told):
            retrieval.check_retrieval(_request(tmp_path / name))


@pytest.mark.usefixtures("bindings")
def test_contexts_longer_than_the_models_are_refused_before_any_work(monkeypatch, words):
    monkeypatch.setattr(measurement, "read_gguf", lambda path: _info(str(path), 150))
    monkeypatch.setattr(retrieval.vendored, "run", lambda *_: pytest.fail("a worker was started"))
    monkeypatch.setattr(measurement.perplexity, "perplexity", lambda *_: pytest.fail("something was measured"))
    request = Request(TextRequest(words, 64, 1), retrieval=_request(words))
    told = r"m.gguf has a context of 150 tokens, but --retrieval-lengths asks for 200: give lengths up to 150"
    with pytest.raises(KurtailError, match=told):
        measure((Path("m.gguf"),), request, None, NullProgress())
    retrieval.check_lengths(_info("m.gguf", 200), _request(words))


@pytest.mark.usefixtures("bindings")
def test_a_text_that_is_too_short_is_named_before_anything_is_measured(monkeypatch, words):
    def run(worker, request):
        raise retrieval.vendored.WorkerError("the whole text with the facts has 180 tokens")

    monkeypatch.setattr(measurement, "read_gguf", lambda path: _info(str(path)))
    monkeypatch.setattr(retrieval.vendored, "run", run)
    monkeypatch.setattr(measurement.perplexity, "perplexity", lambda *_: pytest.fail("something was measured"))
    request = Request(TextRequest(words, 64, 1), retrieval=_request(words))
    with pytest.raises(KurtailError, match=r"no retrieval test of m.gguf with .*words.txt: the whole text .* 180 tokens"):
        measure((Path("m.gguf"),), request, None, NullProgress())


class _Model:
    """Counts what is computed: tokens behind the beginning that a prompt shares with the last one."""

    def __init__(self) -> None:
        self.reserved = self.computed = 0
        self.cached: list[int] = []

    def reserve(self, tokens: int) -> None:
        assert not self.computed, "a larger context would begin with an empty cache"
        self.reserved = tokens

    def score(self, context, continuations):
        ((*answer,),) = continuations
        assert len(context) + len(answer) <= self.reserved
        self.computed += len(context) - len(os.path.commonprefix([list(context), self.cached]))
        self.cached = list(context)
        return [types.SimpleNamespace(log_likelihood=-float(answer[0]), greedy=answer[0] == 1)]


def test_a_context_is_computed_once_for_all_its_questions():
    contexts = [
        {"prefix": list(range(n, n + 500)), "questions": [{"suffix": [9, i], "answer": [i, 7]} for i in (1, 2, 3)]}
        for n in (1000, 5000)
    ]
    model, told = _Model(), []
    assert ask(model, {"contexts": contexts}, told.append) == model.computed <= 2 * (500 + 3 * 2)
    assert told == [{"facts": [[-1.0, True], [-2.0, False], [-3.0, False]]}] * 2
    assert model.reserved == 504


def test_what_the_worker_is_given_and_how_progress_counts(monkeypatch, words, recorder):
    contexts = [Context(length, [1, 2], [Question([3], [4]), Question([5], [6])]) for length in (100, 100, 200, 200)]
    seen = []

    def run(worker, request, on_message):
        seen.append((worker, request))
        for i in range(4):
            on_message({"facts": [[-1.0, True], [-2.0 - i, False]]})

    monkeypatch.setattr(retrieval.vendored, "run", run)
    result = retrieval.retrieve(Path("m.gguf"), contexts, _request(words), recorder, "q8_0")
    ((worker, request),) = seen
    assert worker.endswith("retrieval_worker")
    assert (request["cache"], Path(request["path"])) == ("q8_0", Path("m.gguf").resolve())
    assert request["contexts"][2] == {
        "length": 200, "prefix": [1, 2], "questions": [{"suffix": [3], "answer": [4]}, {"suffix": [5], "answer": [6]}],
    }  # fmt: skip
    assert recorder.stages == [["retrieval of m.gguf (cache q8_0)", 600, 600]]
    assert [(cell.length, cell.right, cell.log_likelihood) for cell in result.cells] == [
        (100, 2, -1.0), (100, 0, -2.5), (200, 2, -1.0), (200, 0, -4.5),
    ]  # fmt: skip


def _result(log_likelihood: float, lengths=(1024, 8192), depths=(0.1, 0.5, 0.9)) -> RetrievalResult:
    cells = tuple(Cell(length, depth, 3, 4, log_likelihood) for length in lengths for depth in depths)
    return RetrievalResult(0.75, log_likelihood, cells)


def _row(path: str, cache: str | None, log_likelihood: float) -> ModelResult:
    return ModelResult(path, None, None, None, None, 4.9, 4, 4, "W4A4KV4", retrieval=_result(log_likelihood), cache=cache)


def test_a_row_and_a_column_for_each_cache_type():
    report = Report(None, (_row("a/m.gguf", "f16", -0.25), _row("a/m.gguf", "q4_0", -14.5)))
    console = Console(file=io.StringIO(), width=160)
    print_report(report, console)
    _, overview, cells = console.file.getvalue().split("┏")
    assert "a/m.gguf (cache f16)" in overview
    head = next(line for line in cells.splitlines() if line.startswith("┃"))
    names = [cell.strip() for cell in head.strip("┃").split("┃")]
    assert names == ["context", "depth", "m.gguf (cache f16)", "m.gguf (cache q4_0)"]
    row = next(line for line in cells.splitlines() if "8192" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["8192", "10 %", "3/4 (-0.25)", "3/4 (-14.50)"]
    row = next(line for line in cells.splitlines() if "all" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["all", "", "75.0 % (-0.25)", "75.0 % (-14.50)"]
    assert "guessing gives -11.5" in cells
    assert list(retrieval_panels(report)) == ["m.gguf (cache f16)", "m.gguf (cache q4_0)"]


def test_the_json_has_the_cache_and_every_cell():
    content = json.loads(json.dumps(Report(None, (_row("m.gguf", "f16", -0.25),)).to_json()))
    (model,) = content["models"]
    assert (model["path"], model["cache"], model["retrieval"]["accuracy"]) == ("m.gguf", "f16", 0.75)
    assert model["retrieval"]["cells"][-1] == {"length": 8192, "depth": 0.9, "right": 3, "facts": 4, "log_likelihood": -0.25}
    assert "mmlu" not in model


@needs_matplotlib
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_picture_has_a_panel_for_each_and_no_text_over_another(count):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    names = ["reference", "a-rather-long-name-of-a-7B-model.gguf (cache q8_0)", "m.gguf (cache q4_0)", "n.gguf"][-count:]
    figure = retrieval_figure({name: _result(-3.0 * i, (1024, 2048, 4096, 8192)) for i, name in enumerate(names)})
    FigureCanvasAgg(figure).draw()
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == count + 1
    boxes = [label.get_window_extent() for label in (figure._suptitle, figure._supxlabel, figure._supylabel)]
    for axes in shown:
        labels = [axes.title, axes.yaxis.label, *axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels()]
        boxes += [label.get_window_extent() for label in labels if label.get_text() and label.get_visible()]
    for i, one in enumerate(boxes):
        assert figure.bbox.x0 <= one.x0 and one.x1 <= figure.bbox.x1
        assert not any(one.overlaps(other) for other in boxes[i + 1 :])


@needs_matplotlib
def test_the_pictures_cells_are_where_they_belong(tmp_path):
    cells = tuple(
        Cell(length, depth, right, 9, -float(right)) for right, (length, depth) in enumerate(
            (length, depth) for length in (1024, 8192) for depth in (0.1, 0.5, 0.9)
        )
    )  # fmt: skip
    figure = retrieval_figure({"m.gguf": RetrievalResult(0.5, -2.5, cells)})
    axes = figure.axes[0]
    assert axes.images[0].get_array().tolist() == [[0.0, -3.0], [-1.0, -4.0], [-2.0, -5.0]]
    assert axes.images[0].get_clim() == (GUESS, 0)
    at = {text.get_position(): text.get_text() for text in axes.texts}
    assert (at[0, 2], at[1, 0]) == ("2/9", "3/9")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["10 %", "50 %", "90 %"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1024", "8192"]
    draw_retrieval(tmp_path / "r.svg", {"m.gguf": RetrievalResult(0.5, -2.5, cells)})
    assert b"<!-- m.gguf -->" in (tmp_path / "r.svg").read_bytes()


@pytest.fixture
def files(monkeypatch):
    """Files that need not be there: what measure() asks of each is noted, with the cache type, and bits that were asked for."""
    seen = []

    def noted(what, result):
        def measured(path, *arguments):
            *_, cache, bits = arguments
            seen.append((what, path.name, cache) if bits in (None, "file") else (what, path.name, cache, bits))
            return result

        return measured

    words = {"kurtail.kv_bits": 4, "tokenizer.ggml.tokens": ["a"]}
    monkeypatch.setattr(measurement, "read_gguf", lambda path: _info(str(path), **words))
    monkeypatch.setattr(measurement, "_reference", lambda *_: _info("reference.gguf", **words))
    monkeypatch.setattr(GgufInfo, "runtime_bits", (4, 4))
    monkeypatch.setattr(GgufInfo, "runs_as", "W4A4+8KV4")
    monkeypatch.setattr(measurement.perplexity, "perplexity", noted("perplexity", Perplexity(20.0, 1.0)))
    divergence = Divergence(Perplexity(20.0, 1.0), 0.1, 0.01, 0.9)
    monkeypatch.setattr(measurement.perplexity, "divergence", noted("divergence", divergence))
    monkeypatch.setattr(measurement.perplexity, "reference", _OpenReference)
    monkeypatch.setattr(retrieval, "build", lambda path, text, request: path)
    monkeypatch.setattr(retrieval, "retrieve", noted("retrieval", _result(-1.0)))
    return seen


class _OpenReference:
    """An open reference of no file."""

    perplexity = Perplexity(10.0, 1.0)

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> _OpenReference:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.usefixtures("bindings")
def test_every_measurement_is_taken_with_every_cache_type(files, words):
    request = Request(TextRequest(words, 64, None), retrieval=_request(words), caches=("file", "f16", "q8_0"))
    report = measure((Path("a.gguf"), Path("b.gguf")), request, None, NullProgress())
    asked = [(name, cache) for name in ("a.gguf", "b.gguf") for cache in ("file", "f16", "q8_0")]
    assert files == [("perplexity", *one) for one in asked] + [("retrieval", *one) for one in asked]
    assert [(row.path, row.cache, row.kv_bits, row.runs_as) for row in report.models[:3]] == [
        ("a.gguf", "file", 4, "W4A4+8KV4"), ("a.gguf", "f16", 16, "W4A4+8KV16"), ("a.gguf", "q8_0", 8, "W4A4+8KV8"),
    ]  # fmt: skip
    assert len({row.name for row in report.models}) == 6


@pytest.mark.usefixtures("bindings")
def test_the_reference_keeps_its_own_cache(files, words):
    request = Request(TextRequest(words, 64, None), retrieval=_request(words), caches=("q4_0",))
    report = measure((Path("a.gguf"),), request, "reference.gguf", NullProgress())
    assert files == [
        ("divergence", "a.gguf", "q4_0"), ("retrieval", "reference.gguf", "file"), ("retrieval", "a.gguf", "q4_0"),
    ]  # fmt: skip
    assert report.reference.cache is None and report.models[0].cache == "q4_0"


@pytest.mark.usefixtures("bindings")
def test_without_a_choice_nothing_says_cache(files, words):
    report = measure((Path("a.gguf"),), Request(retrieval=_request(words)), None, NullProgress())
    assert files == [("retrieval", "a.gguf", "file")]
    assert "cache" not in report.to_json()["models"][0] and report.models[0].name == "a.gguf"


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(commands, ["eval", *map(str, arguments)])


@pytest.fixture
def requests(monkeypatch):
    """What the command asks measure() for."""
    seen = []

    def fake(files, request, *_):
        seen.append(request)
        raise KurtailError("stop here")

    monkeypatch.setattr(measurement, "measure", fake)
    return seen


def test_options_reach_the_request(run, requests, words):
    run("m.gguf", "--retrieval", "--text", words)
    run(
        "m.gguf", "--retrieval", "--retrieval-text", words, "--retrieval-lengths", "512, 1024", "--retrieval-depths", "0,1",
        "--retrieval-needles", "2", "--retrieval-seed", "7", "--cache-type", "file,f16", "--cache-type", "q4_0,f16",
    )  # fmt: skip
    first, second = requests
    assert first == Request(TextRequest(words, 512, None), retrieval=RetrievalRequest(words))
    assert second == Request(
        retrieval=RetrievalRequest(words, (512, 1024), (0.0, 1.0), 2, 7), caches=("file", "f16", "q4_0")
    )


@pytest.mark.parametrize(
    ("typed", "status", "told"),
    [
        (("--cache-type", "f16,q5_1"), 2, "'q5_1' is not a valid value"),
        (("--retrieval-lengths", "512,many"), 2, "'many' is not a valid value"),
        (("--retrieval-depths", ""), 2, "'' is not a valid value"),
        (("--retrieval-depths", "50"), 1, "--retrieval-depths must be between 0"),
        (("--plot", "x.gif"), 1, "must end with .png or .svg"),
    ],
)
def test_options_that_are_refused(run, requests, words, typed, status, told):
    done = run("m.gguf", "--retrieval", "--retrieval-text", words, *typed)
    assert (done.exit_code, requests) == (status, [])
    assert told in done.stderr


def test_options_that_need_others(run, requests, words):
    assert "give --retrieval-text or --text" in run("m.gguf", "--retrieval").stderr
    assert "--plot draws the results of --retrieval" in run("m.gguf", "--text", words, "--plot", "x.svg").stderr
    assert requests == []


def test_the_runtimes_programs_are_told_the_type():
    from kurtail_gguf.runtime.cache_types import CACHE_TYPES, cache_arguments

    assert [cache_arguments(cache) for cache in CACHE_TYPES] == [
        [], *(["-ctk", cache, "-ctv", cache] for cache in ("f16", "q8_0", "q4_0")),
    ]  # fmt: skip
