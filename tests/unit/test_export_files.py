"""A GGUF file appears whole or not at all."""

from __future__ import annotations

import pytest

from kurtail_gguf.runtime.export.writer import ExportError, _whole_or_not_at_all


def test_complete(tmp_path):
    out = tmp_path / "a.gguf"
    out.write_bytes(b"old")
    with _whole_or_not_at_all(out) as beside:
        assert beside.parent == tmp_path
        beside.write_bytes(b"new")
        assert out.read_bytes() == b"old"
    assert out.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_any_failure_leaves_what_was_there(tmp_path, failure):
    out = tmp_path / "a.gguf"
    out.write_bytes(b"old")
    with pytest.raises(failure), _whole_or_not_at_all(out) as beside:
        beside.write_bytes(b"half")
        raise failure
    assert out.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [out]


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "real.gguf"
    link = tmp_path / "link.gguf"
    link.symlink_to(target)
    with _whole_or_not_at_all(link) as beside:
        beside.write_bytes(b"x")
    assert link.is_symlink() and target.read_bytes() == b"x"


@pytest.mark.parametrize("name", ["missing/a.gguf", "file/a.gguf", "directory"])
def test_no_place_to_write(tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    with pytest.raises(ExportError, match="cannot write"), _whole_or_not_at_all(tmp_path / name):
        pass
