"""Files written whole, and their hashes."""

from __future__ import annotations

import hashlib
import os

import pytest

from kurtail_gguf.errors import CalibrationError, KurtailError
from kurtail_gguf.files import file_sha256, write_atomically


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
