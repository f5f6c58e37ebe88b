"""Locks between processes, and that nothing imports fcntl where there is none."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from kurtail_gguf.files import locks

PACKAGE = Path(locks.__file__).parents[1]


def test_another_process_is_told_and_the_lock_ends_with_its_holder(tmp_path):
    path = tmp_path / "lock"
    code = "import sys; from kurtail_gguf.files.locks import lock; f = open(sys.argv[1], 'a'); lock(f.fileno()); print('have', flush=True); input()"
    command = [sys.executable, "-c", code, str(path)]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as other, path.open("a") as file:
        assert other.stdout.readline() == b"have\n"
        with pytest.raises(BlockingIOError):
            locks.lock(file.fileno(), wait=False)
        other.kill()
        other.wait()
        locks.lock(file.fileno(), wait=False)


def test_without_fcntl_one_byte_behind_the_file_is_locked(tmp_path, monkeypatch):
    calls = []
    windows = ModuleType("msvcrt")
    windows.LK_NBLCK = 2

    def locking(descriptor, mode, size):
        calls.append((os.lseek(descriptor, 0, os.SEEK_CUR), mode, size))
        if len(calls) < 3:
            raise PermissionError(13, "Permission denied")

    windows.locking = locking
    monkeypatch.setitem(sys.modules, "msvcrt", windows)
    monkeypatch.setitem(sys.modules, "fcntl", None)  # importing it fails
    monkeypatch.setattr(sys, "platform", "win32")
    spec = importlib.util.spec_from_file_location("locks_of_windows", locks.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with (tmp_path / "lock").open("w+", encoding="utf-8") as file:
        file.write("123")
        file.flush()
        with pytest.raises(BlockingIOError):
            module.lock(file.fileno(), wait=False)
        module.lock(file.fileno())
        assert calls == [(1 << 30, 2, 1)] * 3
        assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 3


def test_only_one_module_imports_fcntl():
    importers = [
        path.name for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import) and any(alias.name == "fcntl" for alias in node.names)
    ]  # fmt: skip
    assert importers == ["locks.py"]
