"""Finding the installed runtime, and one line where it is missing."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

from kurtail_gguf.runtime import bindings, native


class _Distribution:
    def __init__(self, root: Path) -> None:
        self.root = root

    def locate_file(self, path: str) -> Path:
        return self.root / path


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A distribution whose native files are the test's; returns their directory."""
    directory = tmp_path / "kurtail_gguf" / "_native"
    directory.mkdir(parents=True)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: _Distribution(tmp_path))
    return directory


def test_not_installed(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(native.NativeMissing, match="pip install ."):
        native.native_dir()


def test_installed_without_its_runtime(installed):
    installed.rmdir()
    with pytest.raises(native.NativeMissing, match="without its runtime.*pip install ."):
        native.native_dir()


def test_libraries_and_packages(installed):
    with pytest.raises(native.NativeMissing, match="libggml-base.*pip install ."):
        native.library("ggml-base")
    with pytest.raises(native.NativeMissing, match="'gguf'.*pip install ."):
        native.python_dir()
    with pytest.raises(native.NativeMissing, match="bindings.*pip install ."):
        native.bindings_wheel()
    (installed / "lib").mkdir()
    suffix = "dylib" if sys.platform == "darwin" else "so"
    library = installed / "lib" / f"libggml-base.{suffix}"
    library.touch()
    assert native.library("ggml-base") == library


def test_programs_beside_this_python_go_first(tmp_path, monkeypatch):
    own, other = tmp_path / "own", tmp_path / "other"
    for directory in (own, other):
        directory.mkdir()
        (directory / "llama-cli").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(own / "python"))
    monkeypatch.setenv("PATH", str(other))
    assert native.executable("llama-cli") == own / "llama-cli"
    (own / "llama-cli").unlink()
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert native.executable("llama-cli") == other / "llama-cli"
    (other / "llama-cli").unlink()
    with pytest.raises(native.NativeMissing, match="llama-cli.*pip install ."):
        native.executable("llama-cli")


def test_bindings_need_pip(installed, monkeypatch):
    (installed / "bindings").mkdir()
    (installed / "bindings" / "llama_cpp_python-1.0-py3-none-any.whl").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(bindings.BindingsError, match="ensurepip"):
        bindings.install_bindings()


def test_a_failing_pip_is_one_line(installed):
    (installed / "bindings").mkdir()
    (installed / "bindings" / "llama_cpp_python-1.0-py3-none-any.whl").write_bytes(b"no wheel")
    if missing := [name for name in bindings.REQUIREMENTS if not bindings._installed(name)]:
        pytest.skip(f"{', '.join(missing)} not installed: pip would fetch them")
    with pytest.raises(bindings.BindingsError, match="--force-reinstall.*failed"):
        bindings.install_bindings()
