"""``kurtail-gguf compare`` of a tiny model: table, JSON, files kept, the picture."""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
from pathlib import Path

import pytest

from kurtail_gguf.measure.perplexity import perplexity
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.runtime.gguf_info import read_gguf

METHODS = [f"{rotation}+rtn" for rotation in ("none", "hadamard", "kurtail")]
MEASURED = ("--context", "128", "--chunks", "4")
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


@pytest.fixture(scope="module")
def compared(cli, tiny_spm, text, tmp_path_factory):
    """One comparison for all of these tests: standard output, JSON, directory of the files."""
    directory = tmp_path_factory.mktemp("compared")
    options = ["--methods", ",".join(METHODS), "--calibration", text, "--calibration-tokens", "1024"]
    options += ["--activations", "8", "--out-dir", directory / "kept", "--json", directory / "r.json", "--card"]
    if HAS_MATPLOTLIB:
        options += ["--plot", directory / "outliers.svg"]
    done = cli("compare", tiny_spm, "--text", text, *MEASURED, *options)
    assert done.status == 0, done.stderr
    return done, json.loads((directory / "r.json").read_text(encoding="utf-8")), directory


def test_rows_hold_what_was_measured(compared, text):
    done, content, directory = compared
    assert [row["method"] for row in content["methods"]] == METHODS
    for row in content["methods"]:
        info = read_gguf(directory / "kept" / row["path"])
        assert info.provenance.rotation == row["rotation"] and info.provenance.activation_bits == 8
        again = perplexity(info.path, text, 128, 4, NullProgress())
        assert row["perplexity"] == pytest.approx(again.value, rel=1e-3)
        assert row["kld_mean"] > 0 and 0 < row["top1_agreement"] < 1
        # a Python with torch and a tiny model: no kilobytes, no gigabytes
        assert 1 < row["seconds"] < 600 and 1e8 < row["peak_memory_bytes"] < 4e9
    assert content["reference"]["bits_per_weight"] == 32 and content["reference"]["perplexity"] > 1
    lines = done.stdout.splitlines()
    assert all(any(name in line for line in lines) for name in ("reference", "peak MB", *METHODS))
    assert "W4A8KV4" in done.stdout
    assert any(line.startswith(f"{METHODS[2]}: learn R1") for line in done.stderr.splitlines())


def test_only_the_files_are_kept(compared, tiny_spm):
    _, _, directory = compared
    kept = {path.name for path in (directory / "kept").iterdir()}
    files = [f"{tiny_spm.name}.{name}.gguf" for name in METHODS]
    assert kept == {*files, *(f"{name}.md" for name in files)}


def test_cards_say_how_to_repeat_both_steps(compared, tiny_spm, text):
    done, content, directory = compared
    for row in content["methods"]:
        assert f"wrote {row['path']}.md" in done.stdout.replace("\n", "")
        card = Path(f"{row['path']}.md").read_text(encoding="utf-8")
        rows = dict(line[2:-2].split(" | ", 1) for line in card.splitlines() if line.startswith("| "))
        assert shlex.split(rows["made by"].strip("`")) == row["command"]
        ours, theirs = rows["perplexity"].split(" | ")
        assert float(ours.split()[0]) == pytest.approx(row["perplexity"], abs=1e-4)
        assert float(theirs.split()[0]) == pytest.approx(content["reference"]["perplexity"], abs=1e-4)
        assert f"rotation {row['rotation']}" in rows["method"] and rows["runs as"].startswith("W4A8KV4")
        command = shlex.split(card.split("```")[1])
        assert command[:4] == ["kurtail-gguf", "compare", str(tiny_spm), "--text"] and "--card" in command


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="matplotlib is not installed (extra eval)")
def test_the_picture(compared):
    _, content, directory = compared
    found = content["outliers"]
    assert set(found["after"]) == set(METHODS[1:]) and "calibration text" in found["text"]
    sites = 2 * found["layers"]
    for outliers in (found["before"], *found["after"].values()):
        for values in outliers.values():
            assert len(values) == sites and all(math.isfinite(value) and value >= 1 for value in values)
    learned = found["after"][METHODS[2]]["kurtosis"]
    assert sum(learned) < sum(found["before"]["kurtosis"])
    svg = (directory / "outliers.svg").read_text(encoding="utf-8")
    assert all(f"<!-- {name} -->" in svg for name in ("before", *METHODS[1:]))


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="matplotlib is not installed (extra eval)")
def test_the_picture_without_a_calibration(cli, tiny_spm, text, tmp_path):
    """Where no conversion captured activations, the measured text's are."""
    options = ("--methods", METHODS[1], "--plot", tmp_path / "o.png", "--json", tmp_path / "r.json")
    done = cli("compare", tiny_spm, "--text", text, *MEASURED, *options)
    assert done.status == 0, done.stderr
    found = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["outliers"]
    assert found["text"] == text.name and list(found["after"]) == [METHODS[1]]
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")


def test_errors_are_one_line(cli, tiny_spm, text, tmp_path):
    assert "give ROTATION or ROTATION+WEIGHTS" in cli("compare", tiny_spm, "--text", text, "--methods", "x").error
    assert "gone.txt" in cli("compare", tiny_spm, "--text", tmp_path / "gone.txt").error
    short = tmp_path / "short.txt"
    short.write_text("too short", encoding="utf-8")
    assert "--card needs --out-dir" in cli("compare", tiny_spm, "--text", text, "--card").error
    failed = cli("compare", tiny_spm, "--text", text, "--methods", METHODS[2], "--calibration", short).error
    assert f"the conversion with {METHODS[2]} failed" in failed and "tokens" in failed
    if not HAS_MATPLOTLIB:
        assert "kurtail-gguf[eval]" in cli("compare", tiny_spm, "--text", text, "--plot", tmp_path / "x.png").error
