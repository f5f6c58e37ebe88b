"""The line that tools/environment.py makes of a long build's output."""

from __future__ import annotations

import importlib
import itertools
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    module = importlib.import_module("environment")
    clock = itertools.count(0, 60)  # every look at the clock a minute later: each step is due a line
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    return module


def _print(*lines: str) -> list[str]:
    return [sys.executable, "-c", f"print({chr(10).join(lines)!r})"]


def test_a_build_shows_its_steps_and_the_time_left(environment, tmp_path, capsys):
    environment.run(_print("  [0/2] Re-checking globbed directories...", "[1/4] Building a", "[3/4] Building b"), tmp_path / "log", "build")
    assert capsys.readouterr().out.splitlines() == [
        "   build: 1/4 (25 %), 2:00 elapsed, ETA 6:00",
        "   build: 3/4 (75 %), 3:00 elapsed, ETA 1:00",
        "   build: 4:00",
    ]
    assert "[0/2] Re-checking" in (tmp_path / "log").read_text()


def test_a_build_that_fails_shows_the_end_of_its_log(environment, tmp_path):
    command = [sys.executable, "-c", "print('error: no such header'); raise SystemExit(3)"]
    with pytest.raises(environment.ToolError, match="build failed; the end of .*log:\n   error: no such header"):
        environment.run(command, tmp_path / "log", "build")
