"""verify passes what convert writes and names the first thing that is wrong with anything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from kurtail_gguf.check.verify import Check, verify
from kurtail_gguf.convert.pipeline import convert
from kurtail_gguf.convert.settings import ConvertConfig
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.runtime.export import export_reference
from kurtail_gguf.runtime.file_tensors import FileTensors
from kurtail_gguf.runtime.gguf_info import K_OFFSET, read_gguf

pytestmark = pytest.mark.usefixtures("bindings")


@pytest.fixture(scope="module")
def source(with_tokenizer, tiny_spm) -> Path:
    return with_tokenizer("llama-biases", tiny_spm, 400)


@pytest.fixture(scope="module")
def file(source, tmp_path_factory, text) -> Path:
    """Four bits by the default method, with scaled FFN channels, cut short."""
    out = tmp_path_factory.mktemp("verified") / "out.gguf"
    config = ConvertConfig(
        str(source), out, calibration=(str(text),), calibration_tokens=1024, activations=8, weights="rtn"
    )  # fmt: skip
    convert(config, NullProgress())
    return out


@pytest.fixture
def copy(file, tmp_path) -> Path:
    return Path(shutil.copy(file, tmp_path / "copy.gguf"))


def first_difference(path: Path, source: Path) -> Check:
    """The check that fails; those before it must pass."""
    for check in verify(path, str(source), path.parent, NullProgress()):
        if not check.right:
            return check
    pytest.fail("nothing differs")


def change(path: Path, name: str, changed: Callable[[np.ndarray], None]) -> None:
    """Let ``changed`` edit the packed rows of a kt4 tensor in place, uint8 ``[out, blocks, 34]``."""
    tensor = FileTensors(read_gguf(path)).info(name)
    data = np.memmap(path, np.uint8, "r+", tensor.offset, (tensor.shape[0], tensor.shape[1] // 64, 34))
    changed(data)
    data.flush()


def test_a_converted_file_passes(cli, source, file):
    done = cli("verify", file, "--reference", source)
    assert done.status == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["metadata", "tokenizer", "tensors", "logits", "cache", "pass"]


def test_a_vocabulary_that_changes_blanks_first_is_compared_on_other_texts(cli, save_tiny, tiny_spm, tmp_path):
    """transformers follows a Mistral's tokenizer.model in this, llama.cpp does not, whoever converts the file."""
    model = tmp_path / "mistral"
    save_tiny("mistral", model, vocab_size=400, bos_token_id=1, eos_token_id=2)
    for path in tiny_spm.glob("tokenizer*"):
        shutil.copy(path, model)
    assert not (model / "tokenizer.json").exists()
    convert(ConvertConfig(str(model), tmp_path / "o.gguf", rotation="hadamard", weights="rtn", activations=8), NullProgress())
    done = cli("verify", tmp_path / "o.gguf", "--reference", model)
    assert done.status == 0, done.stderr
    assert "tokenizer: 4 texts; 2 more differ because tokenizer.model changes line ends or blanks first" in done.stdout


def test_another_model_fails_and_is_told_in_one_line(cli, file, source, save_tiny, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(source, other)
    save_tiny("llama-biases", other, seed=1, vocab_size=400)
    done = cli("verify", file, "--reference", other)
    assert "tensors: tensor token_embd.weight (q4_0) has a relative error of" in done.error
    assert "pass" not in done.stdout


def halves(rows: np.ndarray) -> np.ndarray:
    return rows[..., :2].view(np.float16)


def test_a_scale_that_is_not_finite_is_found(copy, source):
    change(copy, "blk.1.ffn_down.weight", lambda rows: halves(rows).__setitem__((5, 2), np.nan))
    check = first_difference(copy, source)
    assert (check.name, check.detail) == ("tensors", "tensor blk.1.ffn_down.weight: the scale of row 5, block 2 is nan")


def test_a_scale_of_zero_is_found(copy, source):
    change(copy, "blk.0.ffn_gate.weight", lambda rows: halves(rows).__setitem__((7, 1), 0))
    assert "blk.0.ffn_gate.weight: the scale of row 7, block 1 is 0, but its weights reach" in first_difference(copy, source).detail


def test_rows_in_another_order_are_found(copy, source):
    def swap(rows: np.ndarray) -> None:
        rows[:64] = rows[:64][::-1].copy()

    change(copy, "blk.1.attn_k.weight", swap)
    assert "tensor blk.1.attn_k.weight (kt4) has a relative error of" in first_difference(copy, source).detail


def test_another_hyper_parameter_is_found(file, source, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(source, other)
    config = json.loads((other / "config.json").read_text())
    config["rms_norm_eps"] = 1e-3
    (other / "config.json").write_text(json.dumps(config))
    check = first_difference(file, other)
    assert check.name == "metadata" and "attention.layer_norm_rms_epsilon is" in check.detail


def test_a_cache_that_harms_is_told_of_with_the_remedy(cli, source, tmp_path):
    """Keys like Qwen2.5's, most of which is a constant: a file without the offset stands for those older than it."""
    model, path = tmp_path / "model", tmp_path / "out.gguf"
    shutil.copytree(source, model)
    weights = load_file(model / "model.safetensors")
    for layer in range(2):
        # the pair that RoPE turns least, of both heads
        weights[f"model.layers.{layer}.self_attn.k_proj.bias"].reshape(2, 2, -1)[:, :, -1] += 60.0
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    convert(ConvertConfig(str(model), path, rotation="hadamard", weights="rtn", activations=8, kv=4), NullProgress())
    done = cli("verify", path, "--reference", model)
    assert done.status == 0 and "cache: KV4; divergence from an exact cache" in done.stdout, done.stderr
    offsets = np.asarray(read_gguf(path).metadata[K_OFFSET], "<f4").tobytes()
    content = path.read_bytes()
    assert content.count(offsets) == 1 and any(offsets)
    path.write_bytes(content.replace(offsets, bytes(len(offsets))))
    done = cli("verify", path, "--reference", model)
    assert "the file's own cache (KV4) changes its predictions" in done.error
    assert "convert the model again, or run the file with -ctk q8_0" in done.error and "is not" not in done.error
    assert [line.split(":")[0] for line in done.stdout.splitlines()][-2:] == ["logits", "cache"]


def test_a_file_without_our_keys_is_refused(cli, source, tmp_path):
    export_reference(source, tmp_path / "plain.gguf")
    assert "has no kurtail keys" in cli("verify", tmp_path / "plain.gguf", "--reference", source).error
