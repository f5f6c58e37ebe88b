"""tools/environment.py finds the programs that pip put into .venv, and names one that is nowhere."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    module = importlib.import_module("environment")
    monkeypatch.setattr(module, "BIN", tmp_path / "bin")
    return module


def test_a_program_of_the_virtual_environment_is_found(environment: ModuleType, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "a-ninja-of-its-own"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho with \"$1\"\ncommand -v a-ninja-of-its-own\n")
    program.chmod(0o755)
    environment.run([program.name, "an argument"], tmp_path / "log", "build")
    # cmake looks for ninja on the same PATH
    assert (tmp_path / "log").read_text().splitlines() == ["with an argument", str(program)]


def test_a_program_that_is_nowhere_is_named(environment: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(environment.ToolError, match="^configure: a-cmake-of-no-one is neither in .*/bin"):
        environment.run(["a-cmake-of-no-one", "-G", "Ninja"], tmp_path / "log", "configure")
