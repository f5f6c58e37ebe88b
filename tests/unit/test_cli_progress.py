"""Progress without a terminal is plain lines with percent and ETA."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from kurtail_gguf.cli import progress
from kurtail_gguf.cli.progress import BarProgress, PlainProgress, format_seconds, make_progress


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (185, "3:05"), (3723, "1:02:03")]
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_plain_lines(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "_memory", lambda: "1.2 GB")
    out = io.StringIO()
    console = Console(file=out, width=20)
    with make_progress(console).stage("learn [R1]", 10) as stage:
        for _ in range(4):
            now[0] += 6
            stage.advance(1, "loss 0.5")
    lines = out.getvalue().splitlines()
    assert lines == [
        "learn [R1] …",
        "learn [R1]: 20% (2/10), elapsed 12 s, ETA 48 s, memory 1.2 GB loss 0.5",
        "learn [R1]: 40% (4/10), elapsed 24 s, ETA 36 s, memory 1.2 GB loss 0.5",
        "learn [R1]: done in 24 s",
    ]


def test_plain_lines_within_long_units(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "_memory", lambda: "1.2 GB")
    out = io.StringIO()
    with make_progress(Console(file=out)).stage("quantize", 4) as stage:
        for share in (0, 0.25, 0.75):
            now[0] += 60
            stage.within(share, "layer 0")
        now[0] += 60
        stage.advance(1, "layer 0, kurtosis 3.0")
        now[0] += 120
        stage.within(0.5)
    assert out.getvalue().splitlines()[1:-1] == [
        "quantize: 6% (0/4), elapsed 2:00, ETA 30:00, memory 1.2 GB layer 0",
        "quantize: 18% (0/4), elapsed 3:00, ETA 13:00, memory 1.2 GB layer 0",
        "quantize: 25% (1/4), elapsed 4:00, ETA 12:00, memory 1.2 GB layer 0, kurtosis 3.0",
        "quantize: 37% (1/4), elapsed 6:00, ETA 10:00, memory 1.2 GB",
    ]


def test_a_failed_stage_is_not_called_done():
    out = io.StringIO()
    with pytest.raises(RuntimeError), PlainProgress(Console(file=out)).stage("x", 1):
        raise RuntimeError
    assert "done" not in out.getvalue()


def test_a_terminal_gets_a_bar_with_percent_and_eta():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=160)
    drawn = make_progress(console)
    assert isinstance(drawn, BarProgress)
    with drawn.stage("capture", 4) as stage:
        stage.advance(3, "layer 2")
    assert all(part in out.getvalue() for part in ("capture", "75%", "3/4", "elapsed", "ETA", "memory", " GB", "layer 2"))


def test_a_bar_has_an_eta_where_units_take_minutes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system=None, width=200)
    with make_progress(console).stage("quantize", 4) as stage:
        for share in (0.25, 0.5, 0.75):
            now[0] += 300
            stage.within(share, "layer 0, mlp.down_proj")
        now[0] += 300
        stage.advance(1, "layer 0")
    last = [line for line in out.getvalue().splitlines() if "quantize" in line][-1]
    assert all(part in last for part in ("25%", "1/4", "0:20:00", "ETA 1:00:00", "layer 0")), last


@pytest.mark.parametrize("terminal", [False, True])
def test_a_lasting_line_is_printed_as_it_is_and_is_no_stage(terminal):
    out = io.StringIO()
    drawn = make_progress(Console(file=out, force_terminal=terminal, color_system=None, width=40))
    long = "all weights of [model].o_proj are 0: the checkpoint is damaged, unless they were pruned"
    drawn.tell("before")
    with drawn.stage("fold", 1) as stage:
        drawn.tell(long)
        stage.advance()
    lines = [line.strip() for line in out.getvalue().replace("\r", "\n").splitlines()]
    assert lines[0] == "before" and "before …" not in lines
    assert any(long in line for line in lines)
    assert out.getvalue().count(long) == 1 and f"{long} …" not in lines
