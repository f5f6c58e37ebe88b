"""The page of ``convert --report``: what it says, that it needs nothing else, and how a browser shows it."""

from __future__ import annotations

import re
import shlex
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

from kurtail_gguf.convert.settings import ConvertConfig, ConvertResult
from kurtail_gguf.machine.memory import CardMemory
from kurtail_gguf.measure.figures import Figures
from kurtail_gguf.measure.outliers import Outliers
from kurtail_gguf.measure.report.page import render, write_report
from kurtail_gguf.measure.report.plots import by_linear
from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.runtime.provenance import Provenance

pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra eval)")

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


@pytest.fixture
def converted(tmp_path) -> tuple[ConvertConfig, ConvertResult, dict]:
    """A conversion's settings, result and what ``inspect`` says of its file."""
    out = tmp_path / "a <b> & c.gguf"
    out.write_bytes(b"GGUF")
    provenance = Provenance(
        rotation="hadamard", objective="none", weights="gptq", tune_steps=0, seed=7, r1_kind="random", r1_size=128,
        r2_kind="random", r2_size=32, r3_kind="none", r3_size=0, r4_kind="hadamard", r4_size=64, activation_bits=4, kv_bits=4,
        calibration_name="text.txt", calibration_tokens=1024, calibration_sha256="ab" * 32,
    )  # fmt: skip
    names = [f"model.layers.{layer}.{kind}.weight" for layer in range(3) for kind in KINDS]
    errors = {name: 0.05 + number / 100 for number, name in enumerate(names)}
    inputs = {name: 0.1 + int(name.split(".")[2]) / 50 + 0.02 * ("down" in name) for name in names}
    before, after = (Outliers((k, 9.0, 4.0, 5.0, 6.0, 7.0), (30.0, 9.5, 8.0, 8.5, 9.0, 9.9)) for k in (400.0, 3.0))
    figures = Figures("text.txt", 3, before, after, errors, inputs)
    config = ConvertConfig("./my model", out, rotation="hadamard", report=tmp_path / "o.html", keep_rotations=tmp_path / "r")
    peak = {"quantize": 1_230_000_000, "export": 4_560_000_000}
    result = ConvertResult(out, provenance, {"quantize": 12.34, "export": 0.5}, 3, 100, False, peak, figures)
    summary = {
        "name": "tiny", "architecture": "llama", "parameters": 1_500_000, "bits_per_weight": 4.5, "block_bits_per_weight": 4.25,
        "types": {"kt4": {"tensors": 9, "bytes": 1234, "values": 5}}, "kurtail": asdict(provenance), "tensor_activation_bits": {},
        "online": {},
    }  # fmt: skip
    return config, result, summary


@pytest.fixture
def page(converted) -> str:
    return render(*converted, "W4A4KV4", ("kurtail-gguf", "convert", "./my model", "o.gguf"))


@pytest.fixture
def tree(page):
    """The page read by the standard's algorithm, where anything amiss is an error; HTML elements without a namespace."""
    html5lib = pytest.importorskip("html5lib", reason="html5lib is not installed (extra test)")
    return html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(page)


def _text(element) -> str:
    return " ".join("".join(element.itertext()).split())


def _rows(tree, name: str) -> list[list[str]]:
    return [[_text(cell) for cell in row] for row in tree.findall(f".//table[@id='{name}']//tr")]


def test_it_says_what_was_converted_and_what_it_took(tree, converted):
    config, result, _ = converted
    told = dict(_rows(tree, "identity"))
    assert told["source"] == config.model and told["model"] == "tiny, llama, 1.5 M values"
    assert told["bits per weight"] == "4.50, 4.25 in the linears of the blocks"
    assert told["file"].startswith("4 bytes, sha256 ") and "ab" * 32 in told["calibration"]
    assert told["method"] == "rotation hadamard, objective none, seed 7" and told["runs as"] == "W4A4KV4, weights gptq"
    assert shlex.split(told["made by"]) == ["kurtail-gguf", "convert", "./my model", "o.gguf"]
    assert _rows(tree, "stages")[1:] == [["quantize", "12.3", "1.23"], ["export", "0.5", "4.56"]]
    assert _text(tree.find(".//h1")) == "a <b> & c.gguf: conversion report"
    assert "continued an earlier one" not in _text(tree)


def test_it_names_the_worst_linears_and_the_next_commands(tree, converted):
    config, _, _ = converted
    assert _rows(tree, "worst-weights")[:2] == [
        ["model.layers.2.mlp.down_proj.weight", "13.00 %"], ["model.layers.2.self_attn.v_proj.weight", "12.00 %"]
    ]  # fmt: skip
    assert _rows(tree, "worst-activations")[0] == ["model.layers.2.mlp.down_proj.weight", "16.00 %"]
    commands = [shlex.split(_text(pre)) for pre in tree.findall(".//pre")]
    assert commands[0] == ["llama-cli", "-m", str(config.out)]
    assert [command[:2] for command in commands[1:]] == [
        ["kurtail-gguf", name] for name in ("verify", "eval", "convert", "convert-lora")
    ]
    assert commands[1] == ["kurtail-gguf", "verify", str(config.out), "--reference", "./my model"]


def test_next_commands_are_commands(tree):
    """Each is parsed by the command line it is for."""
    from kurtail_gguf.cli.main import commands

    for pre in tree.findall(".//pre")[1:]:
        _, name, *arguments = shlex.split(_text(pre))
        command = commands.get_command(None, name)
        assert command.make_context(name, arguments).params


def test_plots_hold_a_line_for_every_curve(tree):
    svg = "{http://www.w3.org/2000/svg}"
    plots = tree.findall(f".//figure/{svg}svg")
    assert len(plots) == 3
    words = [{_text(text) for text in plot.iter(f"{svg}text")} for plot in plots]
    assert {"before", "after", "mean kurtosis of a token", "layer: inputs of attention and FFN"} <= words[0]
    assert {"q_proj", "v_proj", "down_proj", "relative error of the weights", "layer"} <= words[1]
    # q and v read the same
    assert {"q_proj, v_proj", "down_proj", "relative error of the input"} <= words[2]


def test_it_needs_nothing_else(page, tree):
    ids = [element.get("id") for element in tree.iter() if element.get("id")]
    assert len(ids) == len(set(ids)) > 100
    links = [value for element in tree.iter() for name, value in element.items() if name.rpartition("}")[2] in ("href", "src")]
    assert "data:," in links and len(links) > 10
    assert all(link == "data:," or (link[0] == "#" and link[1:] in ids) for link in links)
    assert {target.strip("\"'") for target in re.findall(r"url\(([^)]*)\)", page)} <= {f"#{one}" for one in ids}
    without = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)  # names, not places
    assert not re.search(r"https?:|//\w|@import|<script", without)


def test_what_was_not_measured_is_said(converted):
    config, result, summary = converted
    bare = replace(result.figures, after=None, weight_errors={}, activation_errors={})
    page = render(config, replace(result, figures=bare, resumed=True), summary, "f32", ("kurtail-gguf",))
    assert page.count("<svg") == 1 and "worst-" not in page
    assert all(part in page for part in ("Nothing was quantized", "No rotation was folded", "continued an earlier one"))


def test_curves_by_linear():
    errors = {f"model.layers.0.mlp.experts.{n}.{kind}.weight": n / 10 for n in (1, 2, 3) for kind in ("gate_proj", "up_proj")}
    errors |= {"model.layers.2.self_attn.o_proj.weight": 0.5}
    curves = by_linear(errors, 3)
    assert list(curves) == ["gate_proj, up_proj", "o_proj"]
    assert curves["gate_proj, up_proj"] == pytest.approx([0.2, float("nan"), float("nan")], nan_ok=True)
    assert curves["o_proj"] == pytest.approx([float("nan"), float("nan"), 0.5], nan_ok=True)


def test_the_command_writes_it(converted, monkeypatch, tmp_path):
    from click.testing import CliRunner

    from kurtail_gguf.cli.main import commands

    config, result, summary = converted
    monkeypatch.setattr("kurtail_gguf.convert.pipeline.convert", lambda config, progress: replace(result, resumed=True))
    monkeypatch.setattr("kurtail_gguf.runtime.export.read_gguf", lambda path: SimpleNamespace(bits_per_weight=4.5, runs_as="W4A4KV4"))
    monkeypatch.setattr("kurtail_gguf.cli.convert.summary", lambda info: summary)
    done = CliRunner().invoke(commands, ["convert", "m", str(config.out), "--report", str(tmp_path / "p.html")])
    assert done.exit_code == 0, done.output
    assert f"wrote {tmp_path / 'p.html'}: open it in a browser" in done.stdout.splitlines()
    assert (tmp_path / "p.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_a_page_that_cannot_be_written_is_one_line(converted, tmp_path):
    config, result, summary = converted
    with pytest.raises(KurtailError, match=r"cannot write .*gone.*; .*\.gguf is complete"):
        write_report(replace(config, report=tmp_path / "gone" / "o.html"), result, summary, "W4A4KV4", ("kurtail-gguf",))


def test_a_browser_draws_the_plots_and_has_nothing_to_complain_of(page, shown, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    shown.tab.goto(path.as_uri())
    assert shown.tab.title() == "a <b> & c.gguf: conversion report"
    plots = shown.tab.locator("figure svg")
    assert plots.count() == 3
    # two curves in each of two panels; three linears; two inputs
    for plot, curves in zip(plots.all(), (4, 3, 2), strict=True):
        box = plot.bounding_box()
        assert box["width"] > 500 and box["height"] > 200
        drawn = plot.evaluate(
            """svg => [...svg.querySelectorAll('[id*="line2d_"] > path')].map(path => {
                const box = path.getBoundingClientRect(), style = getComputedStyle(path)
                return {width: box.width, height: box.height, clipped: style.clipPath, stroke: style.stroke}
            })"""
        )
        # grid lines and axes have no area
        curved = [line for line in drawn if line["width"] > 300 and line["height"] > 5 and "url" in line["clipped"]]
        assert len(curved) == curves, drawn
        assert all(line["stroke"].startswith("rgb") for line in curved)
    assert shown.said == []
    assert [url for url in shown.asked if not url.startswith("data:")] == [path.as_uri()]


def test_a_telephone_need_not_scroll_sideways(page, shown):
    shown.tab.set_viewport_size({"width": 390, "height": 844})
    shown.tab.set_content(page)
    assert shown.tab.evaluate("document.documentElement.scrollWidth") == 390
    # nor are the numbers of a table, or the words that begin its rows, broken over lines
    rows = shown.tab.locator("#stages tr:has(td)").all()
    assert rows and all(row.bounding_box()["height"] < 40 for row in rows)


def test_the_browsers_complaints_are_heard(shown):
    """Of a page that has some, lest the test above could not fail."""
    shown.tab.set_content("<script>console.error('one'); nothing.at.all</script>")
    assert shown.said[0] == "one" and "nothing" in shown.said[1]


def test_the_peak_on_a_card_has_a_column_of_its_own(converted):
    config, result, summary = converted
    on_card = replace(
        result, device="cuda", card_peak={"quantize": CardMemory(7_000_000_000, 7_890_000_000), "export": CardMemory(0, 0)}
    )
    pages = [render(config, one, summary, "W4A4KV4", ("kurtail-gguf",)) for one in (result, on_card)]
    assert [("peak on cuda during it, GB" in page, "7.89" in page) for page in pages] == [(False, False), (True, True)]
