"""Files written whole, and their hashes."""

from __future__ import annotations

import hashlib
import os

import pytest

from kurtail_gguf.files.atomic import file_sha256, replacing, write_atomically
from kurtail_gguf.files.destinations import check_apart
from kurtail_gguf.messages.errors import CalibrationError, ConfigError, KurtailError


def test_the_hash_is_of_the_files_bytes(tmp_path):
    content = bytes(range(256)) * 3000
    (tmp_path / "x").write_bytes(content)
    assert file_sha256(tmp_path / "x") == hashlib.sha256(content).hexdigest()


def test_a_file_that_cannot_be_read_is_the_callers_kind_of_error(tmp_path):
    with pytest.raises(CalibrationError, match="cannot read calibration text .*gone: No such file"):
        file_sha256(tmp_path / "gone", "calibration text", CalibrationError)
    with pytest.raises(KurtailError, match="cannot read file .*: Is a directory") as raised:
        file_sha256(tmp_path)
    assert type(raised.value) is KurtailError


def test_a_text_is_whole_or_as_before(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_atomically(path, "η\n")
    assert path.read_bytes() == "η\n".encode() and list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "other")
    assert path.read_text(encoding="utf-8") == "η\n"


def test_a_file_of_a_similar_name_is_left_alone(tmp_path):
    (tmp_path / "out.tmp").write_text("somebody's")
    write_atomically(tmp_path / "out.rotations", "ours")
    assert (tmp_path / "out.tmp").read_text() == "somebody's"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.rotations", "out.tmp"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_no_end_leaves_a_scratch_file(tmp_path, failure):
    with pytest.raises(failure), replacing(tmp_path / "x") as scratch:
        scratch.write_text("half")
        raise failure
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_left_goes_with_the_next_writing_and_what_is_being_written_stays(tmp_path):
    names = {name: tmp_path / f".kurtail-{name}.tmp" for name in ("x-4194305", f"x-{os.getppid()}", "x.y-4194305")}
    for path in names.values():
        path.write_text("half")
    write_atomically(tmp_path / "x", "whole")
    assert [name for name, path in names.items() if not path.exists()] == ["x-4194305"]


def test_what_is_written_is_nothing_else(tmp_path):
    model, out = tmp_path / "m.gguf", tmp_path / "o.gguf"
    model.touch()
    (tmp_path / "link.gguf").symlink_to(model)
    check_apart({"OUT": out, "--report": None}, [("MODEL", model)])
    for path in (model, tmp_path / "x" / ".." / "m.gguf", tmp_path / "link.gguf"):
        with pytest.raises(ConfigError, match=r"OUT .*gguf is the same path as MODEL: give another name"):
            check_apart({"OUT": path}, [("MODEL", model)])
    with pytest.raises(ConfigError, match="--report .*o.gguf is the same path as OUT"):
        check_apart({"OUT": out, "--report": out}, [])
