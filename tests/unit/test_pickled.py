"""Pickled checkpoints: refused unless asked for, then read like safetensors; what they would run is never run."""

from __future__ import annotations

import json
import os
import pickle
import re
import threading
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kurtail_gguf.convert import pipeline
from kurtail_gguf.convert.pipeline import convert
from kurtail_gguf.convert.plan import plan
from kurtail_gguf.convert.settings import ConvertConfig
from kurtail_gguf.messages.errors import SourceError
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.method.rotation import choice as rotation_choice
from kurtail_gguf.model.loading.checkpoint import Checkpoint, open_checkpoint
from kurtail_gguf.model.loading.pickled import MAX_PICKLE, PickledFile
from kurtail_gguf.model.loading.prefetch import layer_stream
from kurtail_gguf.model.loading.weight_files import WeightFiles

NORM = "model.norm.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def pickled(tiny_checkpoint) -> Callable[..., Path]:
    """``pickled(kind="llama", shards=1, **changes)``: a tiny checkpoint with pickled weights, ``changes`` among them."""

    def make(kind: str = "llama", shards: int = 1, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        directory = tiny_checkpoint(kind, dtype=dtype)
        tensors = load_file(directory / "model.safetensors") | changes
        (directory / "model.safetensors").unlink()
        names = [f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin" for number in range(shards)]
        if shards == 1:
            torch.save(tensors, directory / "pytorch_model.bin")
            return directory
        weight_map = {tensor: names[number % shards] for number, tensor in enumerate(sorted(tensors))}
        for name in names:
            torch.save({tensor: tensors[tensor] for tensor in tensors if weight_map[tensor] == name}, directory / name)
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return directory

    return make


def _open(directory: Path) -> Checkpoint:
    return open_checkpoint(directory, allow_pickle=True)


def _refused(directory: Path) -> str:
    with pytest.raises(SourceError) as caught:
        _open(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("shards", [1, 2])
def test_they_are_refused_unless_asked_for(pickled, shards):
    with pytest.raises(SourceError, match=r"contains \.bin pickles, which can run code.*safetensors.*--allow-pickle"):
        open_checkpoint(pickled(shards=shards))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shards", [1, 3])
def test_asked_for_they_are_what_safetensors_are(pickled, tiny_model, shards, dtype):
    checkpoint = _open(pickled("qwen2", shards, dtype))
    state = tiny_model("qwen2", dtype=dtype).state_dict()
    for layer in range(checkpoint.spec.layers):
        for name, tensor in checkpoint.layer(layer, check=True).items():
            assert torch.equal(tensor, state[f"model.layers.{layer}.{name}"].float()), name
    rows = torch.cat([piece for _, piece in checkpoint.rows("model.embed_tokens.weight", chunk=77)])
    assert torch.equal(rows, state["model.embed_tokens.weight"].float())
    assert torch.equal(checkpoint.tensor(NORM), state[NORM])


def test_the_conversion_is_the_safetensors_twins(tiny_checkpoint, pickled, exported, plain_embedding, text, tmp_path):
    def run(directory: Path, name: str, allow_pickle: bool) -> None:
        config = ConvertConfig(
            str(directory), tmp_path / f"{name}.gguf", rotation="kurtail", calibration=(str(text),), calibration_tokens=1024,
            allow_pickle=allow_pickle,
        )  # fmt: skip
        convert(config, NullProgress())

    run(tiny_checkpoint("llama"), "safetensors", allow_pickle=False)
    run(pickled("llama", 2), "pickled", allow_pickle=True)
    assert exported[0].files == exported[1].files


def test_a_conversion_runs_each_pickle_once(pickled, exported, plain_embedding, monkeypatch, text, tmp_path):
    directory, read, load = pickled("llama", 2), [], torch.load

    def counted(path, *arguments, **options):
        read.append(path)
        return load(path, *arguments, **options)

    monkeypatch.setattr(torch, "load", counted)
    config = ConvertConfig(
        str(directory), tmp_path / "o.gguf", rotation="kurtail", weights="rtn", calibration=(str(text),), calibration_tokens=1024,
        allow_pickle=True,
    )  # fmt: skip
    convert(config, NullProgress())
    assert exported and sorted(read) == sorted(directory.glob("*.bin"))


@pytest.mark.parametrize("rotation", ["output", "spinquant"])
def test_no_step_writes_to_the_mapped_weights(pickled, exported, plain_embedding, monkeypatch, text, tmp_path, rotation):
    directory, opened = pickled(), []

    def kept(*arguments: Any) -> Checkpoint:
        opened.append(open_checkpoint(*arguments))
        return opened[0]

    monkeypatch.setattr(pipeline, "open_checkpoint", kept)
    for learn in ("learn_r1_by_output_error", "learn_spinquant"):
        original = getattr(rotation_choice, learn)
        monkeypatch.setattr(rotation_choice, learn, lambda *a, original=original: original(*a, steps=3))
    config = ConvertConfig(
        str(directory), tmp_path / "o.gguf", rotation=rotation, tune=2, calibration=(str(text),), calibration_tokens=1024,
        allow_pickle=True,
    )  # fmt: skip
    convert(config, NullProgress())
    assert exported
    for name, stored in torch.load(directory / "pytorch_model.bin").items():
        assert torch.equal(opened[0].tensor(name), stored), name


def test_what_is_first_read_in_inference_mode_has_gradients(pickled):
    path = pickled() / "pytorch_model.bin"
    with torch.inference_mode():
        weight = PickledFile(path).get_tensor(DOWN)
    ones = torch.ones(192, requires_grad=True)
    (weight @ ones).sum().backward()
    torch.testing.assert_close(ones.grad, weight.sum(0))


def test_requires_grad_stays_with_the_caller_who_set_it(pickled):
    checkpoint = _open(pickled())
    checkpoint.tensor(DOWN).requires_grad_()
    assert not checkpoint.tensor(DOWN).requires_grad


def test_what_is_read_ahead_is_the_file_that_is_open(pickled):
    checkpoint = _open(pickled(shards=2))
    with layer_stream(checkpoint, [1, 0, 1], torch.device("cpu"), ahead=True) as layers:
        for number, weights in zip((1, 0, 1), layers, strict=True):
            # both threads have the file at once
            for name, tensor in checkpoint.layer(number).items():
                assert torch.equal(weights[name], tensor), name


def test_threads_that_ask_for_one_file_share_it(pickled, monkeypatch):
    load, together, read = torch.load, threading.Barrier(4), []

    def counted(*arguments, **options):
        read.append(arguments)
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", counted)
    files = WeightFiles(pickled(shards=2), allow_pickle=True)
    path = next(iter(files.stamps))

    def ask(_: int) -> PickledFile:
        together.wait(10)
        return files.open(path)

    with ThreadPoolExecutor(4) as threads:
        assert len({id(file) for file in threads.map(ask, range(4))}) == 1
    assert len(read) == 2  # each shard's pickle is run once


def test_safetensors_are_taken_where_there_are_both(tiny_checkpoint):
    directory = tiny_checkpoint("llama")
    (directory / "pytorch_model.bin").write_bytes(b"never opened")
    assert {path.suffix for path in _open(directory).files.by_tensor.values()} == {".safetensors"}
    open_checkpoint(directory)


def test_the_plan_reads_them_too(pickled, tmp_path):
    config = ConvertConfig(str(pickled()), tmp_path / "o.gguf", allow_pickle=True)
    assert plan(config).layers == 2


class _Runs:
    """Pickled, it is a call of ``function``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


@pytest.mark.parametrize("name", [NORM, "model.layers.0.self_attn.rotary_emb.inv_freq"])
@pytest.mark.parametrize(
    ("function", "source"),
    [(os.system, "touch {}"), (eval, "open({!r}, 'w')"), (exec, "open({!r}, 'w')"), (os.mkdir, "{}")],
)
def test_what_a_pickle_would_run_is_not_run(pickled, tmp_path, name, function, source):
    mark = tmp_path / "ran"
    evil = _Runs(function, source.format(str(mark)))
    pickle.loads(pickle.dumps(evil))  # it would work
    assert mark.exists()
    mark.rmdir() if mark.is_dir() else mark.unlink()
    directory = pickled(**{name: evil})
    assert re.search(rf"tries to call (\w+\.)?{function.__name__}, .* was not run", _refused(directory))
    assert not mark.exists()


def test_a_bare_pickle_is_not_even_unpickled(pickled, tmp_path):
    directory = pickled()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(_Runs(os.mkdir, str(tmp_path / "ran"))))
    assert "format before torch 1.6" in _refused(directory)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("tensor", "told"),
    [
        (torch.zeros(128, dtype=torch.int32), "is torch.int32; only"),
        (torch.zeros(64), r"has shape \[64\], but config.json requires \[128\]"),
        (torch.zeros(1).expand(128), "is larger than its data"),
        (torch.zeros(128, device="meta"), "without data"),
        (torch.eye(128).to_sparse(), "sparse"),
        ([1.0] * 128, "is a list, expected a tensor"),
        (_Runs(bytearray, 1 << 62), "MemoryError|OverflowError"),
    ],
    ids=["dtype", "shape", "stride", "meta", "sparse", "list", "memory"],
)
def test_what_is_no_plain_tensor_is_refused(pickled, tensor, told):
    assert re.search(rf"pytorch_model\.bin.*({told})", _refused(pickled(**{NORM: tensor})))


@pytest.mark.parametrize("content", [[torch.ones(2)], {"state_dict": {NORM: torch.ones(2)}}, {7: torch.ones(2)}, None])
def test_what_is_not_tensors_by_name_is_refused(pickled, content):
    directory = pickled()
    torch.save(content, directory / "pytorch_model.bin")
    assert "expected tensors by name" in _refused(directory) or "expected a tensor" in _refused(directory)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers(pickled, bad):
    weight = torch.zeros(128, 192)
    weight[7, 3] = bad
    checkpoint = _open(pickled(**{DOWN: weight}))
    checkpoint.layer(0, check=True)
    with pytest.raises(SourceError, match=f"{DOWN} contains NaN or infinite"):
        checkpoint.layer(1, check=True)


def test_a_transposed_tensor_is_its_values(pickled):
    weight = torch.arange(192.0 * 128).reshape(192, 128).T
    assert torch.equal(_open(pickled(**{DOWN: weight})).tensor(DOWN), weight)


@pytest.mark.parametrize("keep", [0, 5, 1000, 0.5, 0.9, -1])
def test_truncated(pickled, keep):
    path = pickled() / "pytorch_model.bin"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    assert f"{path} is truncated" in _refused(path.parent)


@pytest.mark.parametrize("replaced", [True, False], ids=["replaced", "written to"])
def test_another_file_in_its_place_is_not_mixed_with_it(pickled, replaced):
    directory = pickled()
    checkpoint, path = _open(directory), directory / "pytorch_model.bin"
    before = checkpoint.fingerprint()
    checkpoint.layer(0)
    content = path.read_bytes()
    if replaced:
        path.rename(directory / "away")
    path.write_bytes(content + bytes(1))
    for read in (lambda: checkpoint.layer(1), lambda: checkpoint.tensor(NORM), lambda: next(checkpoint.rows(DOWN))):
        with pytest.raises(SourceError, match=f"{path} was changed while it was being read"):
            read()
    assert checkpoint.fingerprint() == before
    path.unlink()
    with pytest.raises(SourceError, match=f"{path} cannot be read"):
        checkpoint.layer(0)


def test_missing_shards_and_tensors(pickled):
    directory = pickled(shards=2)
    _, second = sorted(directory.glob("*.bin"))
    second.rename(directory / "away")
    assert f"{second} is missing" in _refused(directory)
    torch.save({}, second)
    assert "is missing, although the index lists it in this file" in _refused(directory)


@pytest.mark.parametrize("evil", ["../other.bin", "/etc/x.bin", "model.safetensors", "sub/x.bin", 7])
def test_an_index_that_names_what_is_no_shard(pickled, evil):
    directory = pickled(shards=2)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {NORM: evil}}))
    assert f"shard {evil!r} is not the name of a .bin file beside it" in _refused(directory)


def test_a_link_that_leaves_the_directory(pickled, tmp_path):
    directory = pickled()
    (directory / "pytorch_model.bin").rename(tmp_path / "outside")
    (directory / "pytorch_model.bin").symlink_to(tmp_path / "outside")
    assert "outside the model's directory" in _refused(directory)


def _rezip(path: Path, edit: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Write the zip anew with its pickle edited."""
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in entries.items():
            file.writestr(name, edit(content) if name.endswith("/data.pkl") else content)


@pytest.mark.parametrize(
    ("edit", "compression", "told"),
    [
        (lambda data: data.replace(b"K\x80\x85", b"J\xff\xff\xff\x00\x85"), zipfile.ZIP_STORED, "cannot be read as tensors"),
        (lambda data: data.replace(b"K\x00K\x80\x85", b"J\xff\xff\xff\xffK\x80\x85"), zipfile.ZIP_STORED, "cannot be read as"),
        (lambda data: data + bytes(MAX_PICKLE), zipfile.ZIP_STORED, "beside the tensors' data exceed"),
        (lambda data: data, zipfile.ZIP_DEFLATED, "is a compressed zip"),
    ],
    ids=["size", "offset", "pickle", "compressed"],
)
def test_a_zip_that_lies(tmp_path, edit, compression, told):
    path = tmp_path / "x.bin"
    torch.save({NORM: torch.ones(128)}, path)
    assert PickledFile(path).keys() == [NORM]
    before = path.read_bytes()
    _rezip(path, edit, compression)
    assert path.read_bytes() != before
    with pytest.raises(SourceError, match=told):
        PickledFile(path)
