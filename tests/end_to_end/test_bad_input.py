"""Every bad input ends with one line, a status other than 0, and nothing written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kurtail_gguf.runtime.export import export_reference
from kurtail_gguf.runtime.gguf_info import read_gguf

ROOT = Path(__file__).parents[2]


@pytest.fixture
def damaged(tiny_spm, tmp_path):
    """A copy of the tiny model, for a test to damage."""
    return Path(shutil.copytree(tiny_spm, tmp_path / "model"))


@pytest.fixture
def refused(cli, outputs):
    """``refused(model, *options)``: the error line of a conversion that must fail and write nothing."""

    def convert(model: object, *options: object) -> str:
        line = cli("convert", model, outputs / "o.gguf", "--rotation", "hadamard", "--weights", "rtn", *options).error
        assert list(outputs.iterdir()) == []
        return line

    return convert


def _shards(directory):
    return sorted(directory.glob("*.safetensors"))


def test_no_such_model(refused, tmp_path):
    assert "smollm2-135m" in refused(tmp_path / "nowhere")


def test_a_directory_without_config(refused, damaged):
    (damaged / "config.json").unlink()
    assert "config.json" in refused(damaged)


def test_a_missing_shard(refused, damaged):
    shard = _shards(damaged)[1]
    shard.unlink()
    assert shard.name in refused(damaged)


def test_a_truncated_shard(refused, damaged):
    shard = _shards(damaged)[1]
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert shard.name in refused(damaged)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(refused, damaged, name, value):
    index = json.loads((damaged / "model.safetensors.index.json").read_text(encoding="utf-8"))
    shard = damaged / index["weight_map"][name]
    tensors = load_file(shard)
    tensors[name][3, 5] = value
    save_file(tensors, shard, metadata={"format": "pt"})
    assert name in refused(damaged)


def test_a_shard_that_was_never_filled(refused, damaged):
    index = json.loads((damaged / "model.safetensors.index.json").read_text(encoding="utf-8"))
    shard = damaged / index["weight_map"]["model.embed_tokens.weight"]
    content = shard.read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    shard.write_bytes(content[:header] + bytes(len(content) - header))
    line = refused(damaged)
    assert shard.name in line and "only zeros" in line


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id"])
def test_begin_and_end_of_text_outside_the_vocabulary(cli, refused, damaged, outputs, name, key):
    config = json.loads((damaged / name).read_text(encoding="utf-8"))
    (damaged / name).write_text(json.dumps(config | {key: 1 << 20}), encoding="utf-8")
    for line in (refused(damaged), cli("convert", damaged, outputs / "o.gguf", "--plan").error):
        assert f"{name}: {key} is {1 << 20}" in line


@pytest.mark.parametrize("kind", ["tiny_spm", "tiny_bpe"])
def test_a_tokenizer_class_that_nobody_knows_changes_nothing(converted, kind, tmp_path, request):
    # transformers then reads tokenizer.json as it is, and upstream takes a SentencePiece model whatever the class
    model = request.getfixturevalue(kind)
    directory = Path(shutil.copytree(model, tmp_path / model.name))
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "NoSuchTokenizer"}))
    options = ("--rotation", "none", "--weights", "rtn")
    assert converted(directory, *options).read_bytes() == converted(model, *options).read_bytes()


@pytest.fixture
def pickled(tiny_spm, tmp_path) -> Path:
    """A copy of the tiny model, of the same name, with its shards pickled."""
    directory = Path(shutil.copytree(tiny_spm, tmp_path / "pickled" / tiny_spm.name))
    for shard in _shards(directory):
        torch.save(load_file(shard), shard.with_suffix(".bin"))
        shard.unlink()
    index = directory / "model.safetensors.index.json"
    (directory / "pytorch_model.bin.index.json").write_text(index.read_text().replace(".safetensors", ".bin"))
    index.unlink()
    return directory


def test_pickled_weights_that_are_asked_for_give_the_same_bytes(cli, refused, converted, pickled, tiny_spm, text, tmp_path):
    assert "--allow-pickle" in refused(pickled)
    options, out = ("--rotation", "none", "--weights", "rtn"), tmp_path / "o.gguf"
    assert cli("convert", pickled, out, *options, "--allow-pickle").status == 0
    assert out.read_bytes() == converted(tiny_spm, *options).read_bytes()
    measure = ("eval", out, "--text", text, "--context", "64", "--chunks", "4", "--reference", pickled)
    assert "--allow-pickle" in cli(*measure).error
    done = cli(*measure, "--allow-pickle")
    assert done.status == 0, done.stderr


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_runs_nothing(cli, refused, converted, pickled, tiny_spm, text, tmp_path):
    shard, mark = sorted(pickled.glob("*.bin"))[-1], tmp_path / "ran"
    torch.save({"lm_head.weight": _Touch(mark)}, shard)
    file = converted(tiny_spm, "--rotation", "none", "--weights", "rtn")
    for told in (
        refused(pickled, "--allow-pickle"),
        cli("eval", file, "--text", text, "--context", "64", "--reference", pickled, "--allow-pickle").error,
    ):
        assert f"{shard.name} tries to call posix.mkdir" in told
    assert not mark.exists()


def test_code_beside_a_tokenizer_is_not_run(refused, damaged, tmp_path):
    # a class that upstream's converter loads with trust_remote_code
    name, mark = "HybridDNATokenizer", tmp_path / "ran"
    (damaged / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass {name}: pass\n")
    path = damaged / "tokenizer_config.json"
    settings = {"tokenizer_class": name, "auto_map": {"AutoTokenizer": [f"evil.{name}", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    (damaged / "tokenizer.model").unlink()
    (damaged / "vocab.txt").write_text("a\n")  # a tokenizer's file, or that would be missed first
    assert "code that comes with a checkpoint is not run" in refused(damaged)
    assert not mark.exists()


def test_an_architecture_that_is_not_supported(refused, damaged):
    config = json.loads((damaged / "config.json").read_text(encoding="utf-8"))
    config |= {"architectures": ["MambaForCausalLM"]}
    (damaged / "config.json").write_text(json.dumps(config), encoding="utf-8")
    line = refused(damaged)
    assert "MambaForCausalLM" in line and "LlamaForCausalLM" in line


def test_a_text_too_short_to_calibrate_on(cli, tiny_spm, outputs, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("A few words.", encoding="utf-8")
    line = cli("convert", tiny_spm, outputs / "o.gguf", "--calibration", short).error
    assert "token" in line
    assert list(outputs.iterdir()) == []


def test_a_calibration_text_that_is_not_there(cli, tiny_spm, outputs, tmp_path):
    line = cli("convert", tiny_spm, outputs / "o.gguf", "--calibration", tmp_path / "none.txt").error
    assert "none.txt" in line
    assert list(outputs.iterdir()) == []


@pytest.mark.parametrize("out", ["missing/o.gguf", "file/o.gguf", "directory"])
def test_an_out_that_cannot_be_written(cli, tiny_spm, tmp_path, out):
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert str(tmp_path / out) in cli("convert", tiny_spm, tmp_path / out, "--rotation", "none", "--weights", "rtn").error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_that_fills_up_while_writing(cli, tiny_bpe, tmp_path, outputs):
    # a limit on the size of files stands in for the full disk: the same write fails
    work = tmp_path / "work"
    assert cli("convert", tiny_bpe, outputs / "o.gguf", "--rotation", "none", "--weights", "rtn", "--work-dir", work).status == 0
    size = (outputs / "o.gguf").stat().st_size
    (outputs / "o.gguf").unlink()
    limit = size // 2

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    options = ("--rotation", "none", "--weights", "rtn", "--work-dir", work)
    line = cli("convert", tiny_bpe, outputs / "o.gguf", *options, preexec_fn=limited).error
    assert str(outputs / "o.gguf") in line and "MB" in line
    assert list(outputs.iterdir()) == []


def test_a_source_gguf_that_is_damaged(refused, converted, tiny_spm, tmp_path):
    path = tmp_path / "half.gguf"
    path.write_bytes(converted(tiny_spm, "--rotation", "none", "--weights", "rtn").read_bytes()[:5000])
    assert "half.gguf" in refused(path)


@pytest.mark.parametrize("keep", [2, 100, 3000, 0.5, 0.999])
def test_a_truncated_gguf(cli, converted, tiny_spm, text, tmp_path, keep):
    content = converted(tiny_spm, "--rotation", "none", "--weights", "rtn").read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    assert "cut.gguf" in cli("inspect", path).error
    assert "cut.gguf" in cli("eval", path, "--text", text, "--context", "64", "--chunks", "2").error


def test_a_gguf_with_a_scale_that_is_no_number(program, converted, tiny_spm, tmp_path):
    intact = converted(tiny_spm, "--rotation", "none", "--weights", "rtn")
    tensor = next(tensor for tensor in read_gguf(intact).tensors if tensor.type_name == "kt4")
    content = bytearray(intact.read_bytes())
    content[tensor.offset : tensor.offset + 2] = b"\xff\x7f"  # a half NaN
    path = tmp_path / "flipped.gguf"
    path.write_bytes(content)
    options = ("-p", "x", "-n", "1", "-no-cnv", "--check-tensors")
    assert program("llama-completion", "-m", intact, *options).status == 0
    done = program("llama-completion", "-m", path, *options)
    assert done.status not in (0, -11, -6), done.stderr
    assert tensor.name in done.stderr


def test_a_reference_with_weights_that_are_no_numbers(cli, converted, tiny_spm, damaged, text, tmp_path):
    """As a GGUF file and as a directory: told by the tensor, before a chunk is computed."""
    shard = next(path for path in _shards(damaged) if "model.layers.1.mlp.up_proj.weight" in load_file(path))
    tensors = load_file(shard)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    export_reference(damaged, tmp_path / "reference.gguf")
    file = converted(tiny_spm, "--rotation", "none", "--weights", "rtn")
    for reference in (tmp_path / "reference.gguf", damaged):
        line = cli("eval", file, "--text", text, "--context", "64", "--chunks", "8", "--reference", reference).error
        assert "tensor 'blk.1.ffn_up.weight' has invalid data" in line and "standard deviation" not in line


@pytest.mark.parametrize("option", ["--text", "--retrieval-text"])
def test_what_is_no_text_is_not_measured_on(cli, converted, tiny_spm, tmp_path, option):
    file = converted(tiny_spm, "--rotation", "none", "--weights", "rtn")
    wide = tmp_path / "wide.txt"
    wide.write_bytes("Some words. ".encode("utf-16") * 9999)
    more = ("--retrieval",) if option == "--retrieval-text" else ()
    for path, told in ((wide, "wide.txt is UTF-16: convert it with iconv"), (file, f"{file.name} is a GGUF file")):
        assert told in cli("eval", file, option, path, *more).error


def test_a_short_evaluation_text(cli, converted, tiny_spm, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("A few words.", encoding="utf-8")
    line = cli("eval", converted(tiny_spm, "--rotation", "none", "--weights", "rtn"), "--text", short).error
    assert "at least 1024 tokens" in line


def test_a_reference_of_another_vocabulary(cli, converted, tiny_spm, tiny_bpe, text):
    files = converted(tiny_spm, "--rotation", "none", "--weights", "rtn"), converted(tiny_bpe, "--rotation", "none", "--weights", "rtn")
    line = cli("eval", files[0], "--text", text, "--context", "64", "--chunks", "8", "--reference", files[1]).error
    assert "different vocabularies" in line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_conversion_says_how_to_go_on(tiny_bpe, outputs, number):
    out = outputs / "o.gguf"
    command = [sys.executable, "-m", "kurtail_gguf.cli.main", "convert", str(tiny_bpe), str(out)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # a shell starts what it puts into the background with Ctrl-C ignored, and these tests may run there
    with subprocess.Popen(command, **pipes, cwd=ROOT, preexec_fn=lambda: signal.signal(number, signal.SIG_DFL)) as process:
        assert process.stderr is not None
        assert process.stderr.readline()  # its first stage has begun
        time.sleep(0.5)
        process.send_signal(number)
        _, rest = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    assert f"continue from the last finished step, run: kurtail-gguf convert {tiny_bpe} {out}" in rest
    assert "Traceback" not in rest
    assert not out.exists() and not list(outputs.glob(".kurtail*"))


def test_weights_of_the_damaged_copies_were_fine_before(damaged):
    for shard in _shards(damaged):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(shard).values())
