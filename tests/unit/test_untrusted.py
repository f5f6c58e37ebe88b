"""Checkpoints from anywhere: whatever they say ends in a checkpoint or in one line."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kurtail_gguf.messages.errors import SourceError
from kurtail_gguf.model.loading.checkpoint import open_checkpoint
from kurtail_gguf.model.loading.untrusted import REALS, SIZES, check_sizes, read_json
from kurtail_gguf.model.runner import LayerRunner


def _refused(directory: Path) -> str:
    with pytest.raises(SourceError) as caught:
        open_checkpoint(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", [-1, 0, 1 << 40, 2.5, "64", True, [64], {"a": 1}, 10**30])
def test_sizes_that_are_none(tiny_checkpoint, key, value):
    directory = tiny_checkpoint("mistral")
    _edit_config(directory, **{key: value})
    assert f"config.json: {key} is " in _refused(directory)


@pytest.mark.parametrize("key", REALS)
@pytest.mark.parametrize("value", [-1.0, 0, float("inf"), float("nan"), "1e-5", 1e300, True])
def test_reals_that_are_none(tmp_path, key, value):
    with pytest.raises(SourceError, match=f"{key} is "):
        check_sizes({key: value}, tmp_path / "config.json")


@pytest.mark.parametrize("table", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_theta", float("nan")), ("rope_theta", True), ("factor", -1), ("factor", "8"), ("rope_type", ["yarn"]), ("type", 1),
        ("low_freq_factor", {}), ("short_factor", [1.0, 0.0]), ("long_factor", [1.0, [2.0]]),
    ],
)  # fmt: skip
def test_rope_scaling_that_is_none(tmp_path, table, key, value):
    with pytest.raises(SourceError, match=rf"{table}\.{key} is "):
        check_sizes({table: {"rope_type": "llama3", key: value}}, tmp_path / "config.json")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id"])
@pytest.mark.parametrize("value", [320, -1, [2, 320], 1 << 40, "2", 2.0, True, {"id": 2}])
def test_begin_and_end_of_text_outside_the_vocabulary(tiny_checkpoint, name, key, value):
    directory = tiny_checkpoint("llama")
    path = directory / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    told = _refused(directory)
    assert name in told and key in told
    if name == "generation_config.json":  # transformers refuses some in config.json by itself
        assert "expected a token id from 0 to 319" in told


@pytest.mark.parametrize("value", [None, 0, 319, [1, 319], []])
def test_begin_and_end_of_text_within_it(tiny_checkpoint, value):
    directory = tiny_checkpoint("llama")
    for name in ("config.json", "generation_config.json"):
        (directory / name).write_text(json.dumps(json.loads((directory / name).read_text()) | {"eos_token_id": value}))
    open_checkpoint(directory)


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_a_generation_config_that_says_nothing_is_no_matter(tiny_checkpoint, content):
    directory = tiny_checkpoint("llama")
    path = directory / "generation_config.json"
    path.unlink() if content is None else path.write_text(content)
    open_checkpoint(directory)


def test_more_layers_than_memory_are_told_by_the_first_that_is_missing(tiny_checkpoint):
    directory = tiny_checkpoint("mixtral")
    _edit_config(directory, num_hidden_layers=4096)
    assert "tensor model.layers.2." in _refused(directory)
    _edit_config(directory, num_hidden_layers=2, num_local_experts=4096)
    assert "experts.4.w1.weight is missing" in _refused(directory)


@pytest.mark.parametrize(
    ("kind", "change"),
    [("smollm3", {"no_rope_layers": [1, 1, 1, 0], "layer_types": ["full_attention"]}), ("llama3", {"rope_parameters": {"rope_type": "none such", "rope_theta": 1e4}})],
)
def test_what_transformers_makes_no_model_of(tiny_checkpoint, kind, change):
    directory = tiny_checkpoint(kind)
    _edit_config(directory, **change)
    with pytest.raises(SourceError, match=r"config\.json") as caught:
        LayerRunner(open_checkpoint(directory), torch.device("cpu"), 16)
    assert "\n" not in str(caught.value)


def test_what_models_have_passes(tmp_path):
    tables = (
        {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1.0},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": None, "beta_fast": 32, "truncate": False},
        {"type": "longrope", "short_factor": [1.0, 1.1], "long_factor": [1, 64.5]},
        None,
    )
    for table in tables:
        check_sizes({"rope_parameters": table, "rope_scaling": table}, tmp_path)
    check_sizes({"head_dim": None, "sliding_window": None, "rms_norm_eps": 1e-6, "rope_theta": 1000000}, tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_links_that_leave_the_directory(tiny_checkpoint, tmp_path, name):
    directory = tiny_checkpoint("llama")
    outside = tmp_path / "outside"
    shutil.move(directory / name, outside)
    (directory / name).symlink_to(outside)
    told = _refused(directory)
    assert name in told and f"a link to {outside}" in told


def test_links_within_and_those_of_the_hub_cache(tiny_checkpoint, tmp_path):
    directory = tiny_checkpoint("llama")
    (directory / "real").mkdir()
    shutil.move(directory / "model.safetensors", directory / "real" / "weights")
    (directory / "model.safetensors").symlink_to("real/weights")
    open_checkpoint(directory)
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    shutil.move(directory, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(os.path.relpath(path.resolve(), snapshot))
    open_checkpoint(snapshot)


def test_what_is_no_file(tiny_checkpoint):
    directory = tiny_checkpoint("llama")
    (directory / "generation_config.json").unlink(missing_ok=True)
    os.mkfifo(directory / "generation_config.json")
    assert "not a regular file" in _refused(directory)


def test_code_beside_the_weights_is_not_run(tiny_checkpoint):
    directory = tiny_checkpoint("llama")
    (directory / "evil.py").write_text(f"open({str(directory / 'ran')!r}, 'w')\nclass C: pass\n")
    _edit_config(directory, auto_map={"AutoConfig": "evil.C"})
    open_checkpoint(directory)
    assert not (directory / "ran").exists()


@pytest.mark.parametrize("content", ["[" * 100_000, "{", "\udcff", "7", '{"a": NaN'])
def test_json_that_is_none(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(SourceError, match=r"x\.json"):
        read_json(path, "")


@pytest.mark.parametrize(
    "header",
    [
        {"length": 1 << 62},
        {"length": 1 << 31},
        {"dtype": "F8_E4M3"},
        {"dtype": "X"},
        {"shape": [-1, 128]},
        {"shape": [1 << 62, 1 << 62]},
        {"shape": [128.5]},
        {"data_offsets": [0, 1 << 60]},
        {"data_offsets": [-8, 8]},
        {"data_offsets": [100, 0]},
    ],
    ids=str,
)
def test_headers_that_lie(tiny_checkpoint, header):
    directory = tiny_checkpoint("llama")
    path = directory / "model.safetensors"
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    tensors = json.loads(content[8 : 8 + size])
    length = header.pop("length", None)
    tensors["model.norm.weight"] |= header
    encoded = json.dumps(tensors).encode()
    path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + content[8 + size :])
    assert "model.safetensors" in _refused(directory)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, request) -> Path:
    """One checkpoint for all examples."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("whole")
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_value_in_the_config_is_a_checkpoint_or_one_line(whole, tmp_path_factory, data):
    directory = Path(shutil.copytree(whole, tmp_path_factory.mktemp("config") / "m"))
    config = json.loads((directory / "config.json").read_text())
    key = data.draw(st.sampled_from(sorted(config)))
    (directory / "config.json").write_text(json.dumps(config | {key: data.draw(_JSON)}))
    _opens_or_refuses(directory)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 1200), st.binary(min_size=1, max_size=9), st.booleans())
def test_any_bytes_in_a_header_are_a_checkpoint_or_one_line(whole, tmp_path_factory, at, junk, cut):
    directory = Path(shutil.copytree(whole, tmp_path_factory.mktemp("header") / "m"))
    path = directory / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:at] + junk + (b"" if cut else content[at + len(junk) :]))
    _opens_or_refuses(directory)


def _opens_or_refuses(directory: Path) -> None:
    try:
        checkpoint = open_checkpoint(directory)
    except SourceError as error:
        assert "\n" not in str(error)
    else:
        weights = checkpoint.layer(0)
        assert {name: tuple(value.shape) for name, value in weights.items()} == checkpoint.spec.layer_shapes()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer.model", "generation_config.json"])
def test_a_git_lfs_pointer_is_called_one(tiny_checkpoint, name):
    directory = tiny_checkpoint()
    (directory / name).write_bytes(POINTER)
    assert f"{name} is a Git LFS pointer, not the file itself: run git lfs pull in its directory" in _refused(directory)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_json_behind_a_byte_order_mark_is_told_with_the_remedy(tiny_checkpoint, name):
    directory = tiny_checkpoint()
    (directory / name).write_bytes(b"\xef\xbb\xbf" + (directory / name).read_bytes())
    told = _refused(directory)
    assert f"{name} begins with a byte order mark" in told
    subprocess.run(told.partition("or run ")[2], shell=True, cwd=directory, check=True)
    open_checkpoint(directory)
