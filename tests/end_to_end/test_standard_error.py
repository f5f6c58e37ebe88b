"""What commands write on standard error is ours: progress, notes and errors, no warning or bar of a library."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import ArceeConfig, ArceeForCausalLM

from kurtail_gguf.cli.main import commands

#: Python's warnings, what libraries' loggers put before theirs, tqdm's bars.
_FOREIGN = re.compile(r"\w*Warning: |^\[?(transformers|huggingface_hub|datasets|torch|W\d{3,}|WARNING)|deprecated|\d%\|", re.MULTILINE)
_FEW = ("--calibration-tokens", "1024", "--tune", "0")

pytestmark = pytest.mark.usefixtures("bindings")


def _assert_only_ours(done) -> None:
    assert done.status == 0, done.stderr
    assert not _FOREIGN.search(done.stderr), done.stderr


@pytest.fixture(scope="module")
def made(tiny_spm, cli: Callable, text, tmp_path_factory) -> dict[str, Path]:
    """What commands are given, by what it is called in the table below; making FILE is the first of them."""
    directory = tmp_path_factory.mktemp("given")
    stranger, adapter, rotations, file = (directory / name for name in ("stranger", "adapter", "rotations", "file.gguf"))
    ArceeForCausalLM(
        ArceeConfig(
            vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, max_position_embeddings=256, pad_token_id=None,
        )  # fmt: skip
    ).save_pretrained(stranger)
    for path in tiny_spm.glob("tokenizer*"):
        (stranger / path.name).write_bytes(path.read_bytes())
    adapter.mkdir()
    base = "base_model.model.model.layers.0.mlp.up_proj"
    pair = {f"{base}.lora_A.weight": torch.ones(2, 128), f"{base}.lora_B.weight": torch.ones(384, 2)}
    save_file(pair, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": "all-linear", "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    done = cli("convert", tiny_spm, file, "--weights", "rtn", "--calibration", text, *_FEW, "--keep-rotations", rotations)
    _assert_only_ours(done)
    return {
        "MODEL": tiny_spm, "STRANGER": stranger, "FILE": file, "TEXT": text, "ADAPTER": adapter, "ROTATIONS": rotations,
        "OUT": directory / "out.gguf",
    }  # fmt: skip


#: Arguments of every command, with capitals for what :func:`made` makes. This model's architecture converts by itself, on text
#: that it writes.
_RUNS = (
    ("compare", "MODEL", "--text", "TEXT", "--methods", "hadamard+rtn", "--context", "64", "--chunks", "4", "--kv", "4", "--calibration", "TEXT", *_FEW),
    ("eval", "FILE", "--text", "TEXT", "--context", "64", "--chunks", "4", "--reference", "MODEL"),
    ("inspect", "FILE"),
    ("dump", "FILE"),
    ("verify", "FILE", "--reference", "MODEL"),
    ("convert-lora", "ADAPTER", "OUT", "--file", "FILE", "--rotations", "ROTATIONS", "--reference", "MODEL"),
    ("install-bindings",),
    ("convert", "STRANGER", "OUT", "--weights", "rtn", *_FEW),
)


@pytest.mark.parametrize("arguments", _RUNS, ids=lambda run: run[0])
def test_no_command_shows_a_librarys_warning(cli: Callable, made, arguments, monkeypatch):
    monkeypatch.setenv("PIP_DRY_RUN", "1")  # other tests use the bindings meanwhile
    for name in ("PYTHONWARNINGS", "TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "DATASETS_VERBOSITY"):
        monkeypatch.delenv(name, raising=False)
    made["OUT"].unlink(missing_ok=True)
    done = cli(*(made.get(word, word) for word in arguments))
    _assert_only_ours(done)


def test_that_is_every_command():
    assert {run[0] for run in _RUNS} == set(commands.commands)
