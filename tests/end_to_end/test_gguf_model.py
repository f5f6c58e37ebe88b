"""A GGUF file as MODEL: converted to what its checkpoint is converted to, planned, verified, resumed, and refused."""

from __future__ import annotations

import numpy as np

from kurtail_gguf.runtime.file_tensors import FileTensors
from kurtail_gguf.runtime.gguf_info import read_gguf


def test_a_gguf_is_converted_to_what_its_checkpoint_is(cli, converted, tiny_spm, tiny_reference, tmp_path):
    options, out, work = ("--rotation", "none", "--weights", "rtn"), tmp_path / "o.gguf", tmp_path / "work"
    planned = cli("convert", tiny_reference, out, *options, "--plan")
    assert planned.status == 0 and "MODEL, unpacked" in planned.stdout, planned.stderr
    assert cli("convert", tiny_reference, out, *options, "--work-dir", work).status == 0
    found, expected = read_gguf(out), read_gguf(converted(tiny_spm, *options))
    for key in found.metadata.keys() | expected.metadata.keys():
        assert key.startswith("general.") or found.metadata[key] == expected.metadata[key], key
    ours, theirs = FileTensors(found), FileTensors(expected)
    assert [tensor.name for tensor in found.tensors] == [tensor.name for tensor in expected.tensors]
    assert all(np.array_equal(ours.values(tensor.name), theirs.values(tensor.name)) for tensor in found.tensors)
    unpacked = (work / "source" / "model.safetensors").stat()
    again = cli("convert", tiny_reference, tmp_path / "again.gguf", *options, "--work-dir", work)
    assert again.status == 0, again.stderr
    assert (work / "source" / "model.safetensors").stat() == unpacked
    assert (tmp_path / "again.gguf").read_bytes() == out.read_bytes()
    checked = cli("verify", out, "--reference", tiny_reference)
    assert checked.status == 0, checked.stdout + checked.stderr


def test_a_key_that_upstreams_converter_would_write_otherwise_is_refused(cli, tiny_reference, outputs, tmp_path):
    content, key = bytearray(tiny_reference.read_bytes()), b"llama.rope.dimension_count"
    value = content.index(key) + len(key) + 4  # behind its type
    content[value : value + 4] = (32).to_bytes(4, "little")
    (tmp_path / "half.gguf").write_bytes(content)
    line = cli("convert", tmp_path / "half.gguf", outputs / "o.gguf", "--rotation", "none", "--weights", "rtn").error
    assert "key llama.rope.dimension_count of the GGUF file is 32, but upstream's converter writes 64" in line
