"""The file runs as it says, without flags; flags still win; what the runtime cannot do is refused with a reason."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

HADAMARD = ("--rotation", "hadamard", "--weights", "rtn")  # needs no calibration: quick


@pytest.fixture
def tiny(converted, tiny_spm) -> Path:
    return converted(tiny_spm, *HADAMARD)


def load_log(program, path: Path, *options: str) -> str:
    """What llama-completion says while it loads a file and writes two tokens."""
    done = program("llama-completion", "-m", path, "-no-cnv", "-p", "a", "-n", "2", "-c", "64", "-lv", "4", *options)
    assert done.status == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def cache_types(log: str) -> tuple[str, str]:
    """Types of K and V that llama.cpp reports."""
    found = re.search(r"K \((\S+)\): .* V \((\S+)\):", log)
    assert found, log[-3000:]
    return found[1], found[2]


def with_value(path: Path, target: Path, key: str, value: int | str) -> Path:
    """A copy whose key has another value of the same size: uint32, or a string of the same length."""
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack("<Q", len(key)) + key.encode()) + 8 + len(key)
    kind = struct.unpack_from("<I", data, at)[0]
    if isinstance(value, int):
        assert kind == 4
        struct.pack_into("<I", data, at + 4, value)
    else:
        assert kind == 8 and struct.unpack_from("<Q", data, at + 4)[0] == len(value)
        data[at + 12 : at + 12 + len(value)] = value.encode()
    target.write_bytes(data)
    return target


@pytest.mark.parametrize(
    ("options", "summary"),
    [
        (("--kv", "4"), "W4A4KV4, R3 64, Hadamard 128 before 2 tensors"),
        (("--activations", "8", "--kv", "8"), "W4A8KV8, R3 64, Hadamard 128 before 2 tensors"),
        (("--kv", "16"), "W4A4KV16, no R3, Hadamard 128 before 2 tensors"),
    ],
)
def test_says_what_it_will_run(converted, tiny_spm, program, options, summary) -> None:
    log = load_log(program, converted(tiny_spm, *HADAMARD, *options))
    assert summary in log
    bits = {"8": "q8_0", "16": "f16"}.get(options[-1] if options else "", "q4_0")
    assert cache_types(log) == (bits, bits)


def test_no_rotation_asked_for_is_none_online(converted, tiny_spm, program) -> None:
    log = load_log(program, converted(tiny_spm, "--rotation", "none", "--weights", "rtn", "--kv", "4"))
    assert "W4A4KV4, no R3, no online transforms" in log
    assert "attn_rot_k = 0" in log and "attn_rot_v = 0" in log


def test_k_is_rotated_online_and_v_in_the_weights(tiny, program) -> None:
    log = load_log(program, tiny)
    assert "attn_rot_k = 1" in log and "attn_rot_v = 0" in log


def test_given_cache_types_win(tiny, program) -> None:
    assert cache_types(load_log(program, tiny, "-ctk", "f16", "-ctv", "f16")) == ("f16", "f16")
    assert cache_types(load_log(program, tiny, "-ctk", "q8_0")) == ("q8_0", "q4_0")


def test_flash_attention_switched_off_wins(tiny, program) -> None:
    log = load_log(program, tiny, "-fa", "off")
    assert cache_types(log) == ("q4_0", "f16")
    assert "V is cached as f16" in log


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("kurtail.format_version", 4, "kurtail.format_version is 4, this runtime reads up to 3"),
        ("kurtail.kv_bits", 3, "kurtail.kv_bits is 3, this runtime supports 4, 8, 16"),
        ("kurtail.activation_bits", 6, "kurtail.activation_bits is 6, this runtime supports 4, 8"),
        ("kurtail.activation_bits", 32, "is kt4, whose inputs are rounded to 4 or 8 bits"),
        ("kurtail.r3.size", 128, "kurtail.r3.size is 128, head_dim is 64"),
        ("kurtail.target", "slanted", "kurtail.target is 'slanted', this runtime supports kurtail, stock"),
        ("kurtail.r1.kind", "slanting", "kurtail.r1.kind is 'slanting', this runtime supports none, hadamard, random, learned"),
    ],
)
def test_what_it_cannot_do_is_refused(tiny, program, tmp_path, key, value, told) -> None:
    wrong = with_value(tiny, tmp_path / "wrong.gguf", key, value)
    done = program("llama-completion", "-m", wrong, "-no-cnv", "-p", "a", "-n", "1")
    assert done.status != 0
    assert told in done.stdout + done.stderr


def test_a_key_of_another_type_is_refused(tiny, program, tmp_path) -> None:
    data = bytearray(tiny.read_bytes())
    at = data.index(b"kurtail.kv_bits") + len("kurtail.kv_bits")
    struct.pack_into("<I", data, at, 6)  # float32 has the same size
    (tmp_path / "wrong.gguf").write_bytes(data)
    done = program("llama-completion", "-m", tmp_path / "wrong.gguf", "-no-cnv", "-p", "a", "-n", "1")
    assert done.status != 0
    assert "key kurtail.kv_bits has type f32, expected u32" in done.stdout + done.stderr


@pytest.mark.parametrize("share", [0.01, 0.2, 0.9])
def test_a_truncated_file_is_refused(tiny, program, tmp_path, share) -> None:
    data = tiny.read_bytes()
    (tmp_path / "short.gguf").write_bytes(data[: int(len(data) * share)])
    done = program("llama-completion", "-m", tmp_path / "short.gguf", "-no-cnv", "-p", "a", "-n", "1")
    assert 0 < done.status < 128  # an error, not a crash
    assert "error loading model" in done.stdout + done.stderr


@pytest.mark.parametrize("bit", range(0, 8, 3))
@pytest.mark.parametrize(
    ("before", "offset"),
    [
        pytest.param(b"GGUF", 1, id="magic"),
        pytest.param(b"GGUF", 9, id="number of tensors"),
        pytest.param(b"GGUF", 17, id="number of keys"),
        pytest.param(b"general.architecture", 8, id="a key of upstream's"),
        pytest.param(b"kurtail.r3.size", -8, id="length of a key of ours"),
        pytest.param(b"kurtail.r3.size", 15, id="type of its value"),
        pytest.param(b"kurtail.r3.size", 19, id="its value"),
    ],
)
def test_a_flipped_bit_in_the_header_never_crashes(tiny, program, tmp_path, before, offset, bit) -> None:
    """One a file: a reader stops at the first that it refuses."""
    data = bytearray(tiny.read_bytes())
    data[data.index(before) + offset] ^= 1 << bit
    (tmp_path / "flipped.gguf").write_bytes(data)
    done = program("llama-completion", "-m", tmp_path / "flipped.gguf", "-no-cnv", "-p", "a", "-n", "1")
    assert 0 <= done.status < 128, done.stderr[-3000:]  # a flip may do no harm


def test_threads_only_change_rounding(tiny, program, text) -> None:
    """Partial sums come in another order, nothing else."""
    found = []
    for threads in ("1", "3"):
        done = program("llama-perplexity", "-m", tiny, "-f", text, "-c", "128", "--chunks", "2", "-t", threads)
        found.append(float(re.search(r"PPL = ([\d.]+)", done.stdout + done.stderr)[1]))
    assert found[0] == pytest.approx(found[1], rel=1e-3)
