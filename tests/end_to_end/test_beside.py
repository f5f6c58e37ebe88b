"""Programs and functions of upstream's that know nothing of our files: they refuse what would end in nonsense or an abort."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kurtail_gguf.runtime.gguf_info import read_gguf

HADAMARD = ("--rotation", "hadamard", "--weights", "rtn")
LOADED = Path(__file__).parent / "loaded_model.py"


@pytest.fixture(scope="module")
def file(converted, tiny_spm) -> Path:
    return converted(tiny_spm, *HADAMARD)


@pytest.fixture(scope="module")
def unrounded(converted, tiny_spm) -> Path:
    """Transforms without our type: stock llama.cpp cannot tell this from any other file."""
    return converted(tiny_spm, "--rotation", "diagonal", "--weights", "f32", "--kv", "4")


@pytest.mark.parametrize("which", ["file", "unrounded"])
@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_0", "KT4", "F16"])
def test_a_file_with_transforms_is_not_quantized_again(program, request, tmp_path, which, type_name):
    done = program("llama-quantize", "--allow-requantize", request.getfixturevalue(which), tmp_path / "o.gguf", type_name)
    assert done.status == 1
    told = [line for line in done.stderr.splitlines() if "kurtail: " in line]
    assert len(told) == 1 and "convert it with kurtail-gguf convert --target stock" in told[0], done.stderr
    assert not list(tmp_path.iterdir())


def test_a_file_is_copied_and_one_for_stock_is_quantized(program, converted, tiny_spm, file, tmp_path):
    assert program("llama-quantize", file, tmp_path / "copy.gguf", "COPY").status == 0
    assert read_gguf(tmp_path / "copy.gguf").runs_as == read_gguf(file).runs_as
    stock = converted(tiny_spm, *HADAMARD, "--target", "stock")
    assert program("llama-quantize", "--allow-requantize", stock, tmp_path / "stock.gguf", "Q8_0").status == 0
    assert read_gguf(tmp_path / "stock.gguf").runs_as == "stock q8_0"


@pytest.mark.parametrize("override", ["kurtail.activation_bits=int:8", "kurtail.r3.kind=str:none"])
def test_our_keys_are_not_overridden(program, file, override):
    options = ("-p", "x", "-n", "1", "-no-cnv")
    done = program("llama-completion", "-m", file, *options, "--override-kv", override)
    assert done.status == 1
    assert f"kurtail: --override-kv {override.partition('=')[0]} is refused" in done.stderr
    assert program("llama-completion", "-m", file, *options, "--override-kv", "general.name=str:x").status == 0


@pytest.mark.parametrize(("options", "told"), [((), "blk.0.attn_q.weight"), (("--no-tensors",), "kurtail.rotation = 'hadamard'"), (("--json",), '"KT4"')])
def test_gguf_dump_knows_our_type(cli, file, options, told):
    done = cli("dump", file, *options)
    assert done.status == 0 and told in done.stdout, (done.stdout[-2000:], done.stderr)


def test_gguf_dump_of_no_gguf_is_one_line(cli, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"words")
    assert "x.gguf is not a GGUF file" in cli("dump", tmp_path / "x.gguf").error


def _loaded(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, LOADED, *map(str, words)], capture_output=True, text=True, timeout=300)


@pytest.mark.usefixtures("bindings")
def test_a_loaded_model_is_not_saved(file, tmp_path):
    done = _loaded("save", file, tmp_path / "o.gguf")
    assert done.returncode == 0 and "nothing is written: saving a loaded kurtail or kt4 model would lose" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("bindings")
def test_a_state_on_the_device_of_a_quantized_cache_is_read_back(file):
    done = _loaded("state", file)
    assert (done.returncode, done.stdout.strip()) == (0, "same"), done.stderr[-2000:]
