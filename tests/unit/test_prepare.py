"""cpp_patches/prepare.py on a small stand-in for the pinned archive."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "cpp_patches" / "prepare.py"

PATCH = """\
--- a/vendor/llama.cpp/src/one.c
+++ b/vendor/llama.cpp/src/one.c
@@ -1,3 +1,4 @@
 first
+ours
 second
 third
"""


@pytest.fixture
def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script with its own pin and patches in ``tmp_path/cpp_patches``; the archive is ``tmp_path/small-1.tar.gz``."""
    tree = tmp_path / "small-1"
    (tree / "vendor/llama.cpp/src").mkdir(parents=True)
    (tree / "vendor/llama.cpp/CMakeLists.txt").write_text("project(x)\n")
    (tree / "vendor/llama.cpp/src/one.c").write_text("first\nsecond\nthird\n")
    (tree / "vendor/llama.cpp/src/two.c").write_text("untouched\n")
    archive = tmp_path / "small-1.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tree, arcname="small-1")

    spec = importlib.util.spec_from_file_location("prepare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    home = tmp_path / "cpp_patches"
    (home / "patches").mkdir(parents=True)
    (home / "patches" / "0001-ours.patch").write_text(PATCH)
    pin = {"package": "small", "version": "1", "archive": archive.name, "llama_cpp": "vendor/llama.cpp",
           "sha256": hashlib.sha256(archive.read_bytes()).hexdigest()}  # fmt: skip
    (home / "pin.json").write_text(json.dumps(pin))
    monkeypatch.setattr(module, "HERE", home)
    return module


def patched(prepare: ModuleType, tmp_path: Path, source: Path | None = None) -> list[str]:
    return prepare.prepare(tmp_path / "out", source or tmp_path / "small-1.tar.gz", prepare.patch_files())


def test_applies_once_and_then_changes_nothing(prepare: ModuleType, tmp_path: Path) -> None:
    one = tmp_path / "out/vendor/llama.cpp/src/one.c"
    assert patched(prepare, tmp_path) == ["vendor/llama.cpp/src/one.c"]
    assert one.read_text() == "first\nours\nsecond\nthird\n"
    before = one.stat().st_mtime_ns
    assert patched(prepare, tmp_path) == []
    assert one.stat().st_mtime_ns == before


def test_a_removed_patch_is_undone(prepare: ModuleType, tmp_path: Path) -> None:
    patched(prepare, tmp_path)
    (prepare.HERE / "patches" / "0001-ours.patch").unlink()
    assert patched(prepare, tmp_path) == ["vendor/llama.cpp/src/one.c"]
    assert (tmp_path / "out/vendor/llama.cpp/src/one.c").read_text() == "first\nsecond\nthird\n"


def test_a_directory_is_accepted(prepare: ModuleType, tmp_path: Path) -> None:
    patched(prepare, tmp_path, tmp_path / "small-1")
    assert "ours" in (tmp_path / "out/vendor/llama.cpp/src/one.c").read_text()
    assert (tmp_path / "out/vendor/llama.cpp/src/two.c").read_text() == "untouched\n"


def test_a_moved_call_site_names_patch_file_and_remedy(prepare: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "small-1/vendor/llama.cpp/src/one.c").write_text("something else\n")
    with pytest.raises(prepare.PrepareError, match=r"0001-ours\.patch .*one\.c.*Moving the pin"):
        patched(prepare, tmp_path, tmp_path / "small-1")


def test_another_archive_is_refused(prepare: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "small-1.tar.gz").write_bytes(b"not that one")
    with pytest.raises(prepare.PrepareError, match="sha256 is .* the pin is"):
        patched(prepare, tmp_path)


def test_a_directory_of_something_else_is_refused(prepare: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(prepare.PrepareError, match="neither small-1.tar.gz nor its unpacked directory"):
        patched(prepare, tmp_path, tmp_path / "empty")
