"""PEFT directories: what is read, what is refused and how that is told."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from kurtail_gguf.convert.adapters import AdapterError, convert_lora, read_adapter
from kurtail_gguf.messages.errors import ConfigError
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.model.loading.checkpoint import open_checkpoint

PREFIX = "base_model.model.model.layers"


@pytest.fixture
def adapter(tmp_path, tiny_checkpoint):
    """``adapter(kind="llama", tensors=None, **config)``: a checkpoint and a PEFT directory for it."""

    def make(kind="llama", tensors=None, **config):
        directory = tmp_path / "adapter"
        directory.mkdir()
        checkpoint = open_checkpoint(tiny_checkpoint(kind))
        if tensors is None:
            tensors = pair(1, "self_attn.q_proj", checkpoint)
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
        (directory / "adapter_config.json").write_text(json.dumps(settings | config), encoding="utf-8")
        save_file(tensors, directory / "adapter_model.safetensors")
        return directory, checkpoint

    return make


def pair(layer, linear, checkpoint=None, shape=(128, 128), rank=4):
    rows, columns = checkpoint.spec.linear_shape(linear) if checkpoint else shape
    return {
        f"{PREFIX}.{layer}.{linear}.lora_A.weight": torch.full((rank, columns), 2.0),
        f"{PREFIX}.{layer}.{linear}.lora_B.weight": torch.full((rows, rank), 3.0),
    }


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4.0),
        ({"lora_alpha": 6}, 1.5),
        ({"alpha_pattern": {"q_proj": 12}}, 3.0),
        ({"r": 8, "rank_pattern": {"q_proj": 4}}, 2.0),
        ({"r": 8, "rank_pattern": {"layers.1.self_attn.q_proj": 4}, "use_rslora": True}, 4.0),
        ({"init_lora_weights": "gaussian", "lora_dropout": 0.1, "megatron_core": "megatron.core", "loftq_config": {}}, 2.0),
        ({"init_lora_weights": "eva", "eva_config": {"rho": 2.0}, "qalora_group_size": 16, "lora_ga_config": None}, 2.0),
        ({"init_lora_weights": False, "use_dora": False, "layer_replication": None, "modules_to_save": None}, 2.0),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 12}}, 2.0),
    ],
)
def test_scaling_is_in_b(adapter, config, scaling):
    loaded = read_adapter(*adapter(**config))
    ((key, (a, b)),) = loaded.pairs.items()
    assert key == (1, "self_attn.q_proj")
    assert torch.equal(a, torch.full((4, 128), 2.0, dtype=torch.float64))
    assert torch.equal(b, torch.full((128, 4), 3.0 * scaling, dtype=torch.float64))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"use_dora": True}, "use_dora True is not supported, only plain LoRA"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"lora_bias": True}, "lora_bias True is not supported"),
        ({"use_qalora": True, "qalora_group_size": 16}, "use_qalora True is not supported"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
        ({"a_setting_of_tomorrow": 1}, "a_setting_of_tomorrow 1 is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changed the base weights.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "corda", "corda_config": {}}, "corda"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "loftq"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga"),
        ({"r": 8}, r"has rank 4, but adapter_config.json has 8 \(r, rank_pattern\)"),
        ({"rank_pattern": {"q_proj": 2}}, "json has 2"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_alpha": "x"}, "lora_alpha 'x' is not a number"),
        ({"lora_alpha": math.inf}, "lora_alpha inf is not a number"),
    ],
)
def test_what_is_more_than_lora_is_refused(adapter, config, told):
    with pytest.raises(AdapterError, match=told):
        read_adapter(*adapter(**config))


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({}, "contains no tensors"),
        (pair(2, "self_attn.q_proj"), "layer 2, self_attn.q_proj cannot be adapted"),
        (pair(0, "self_attn.qkv_proj"), "cannot be adapted: .* has 2 layers of self_attn.q_proj"),
        (pair(0, "self_attn.q_proj", shape=(64, 128)), r"is \[64, 4\] times \[4, 128\], expected the model's \[128, 128\]"),
        (dict(list(pair(0, "self_attn.q_proj").items())[:1]), "lacks lora_B"),
        ({"base_model.model.lm_head.lora_A.weight": torch.ones(2, 2)}, "lm_head.lora_A.weight is not A or B"),
        ({name: value / 0 for name, value in pair(0, "self_attn.q_proj").items()}, "NaN or infinite"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(adapter, tensors, told):
    with pytest.raises(AdapterError, match=told):
        read_adapter(*adapter(tensors=tensors))


def test_experts_are_refused(adapter):
    directory, checkpoint = adapter("mixtral", pair(0, "block_sparse_moe.experts.0.w1", shape=(192, 128)))
    with pytest.raises(AdapterError, match="cannot be adapted"):
        read_adapter(directory, checkpoint)


def test_missing_and_damaged_files_are_told(adapter, tmp_path):
    directory, checkpoint = adapter()
    (directory / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(AdapterError, match="truncated or not safetensors"):
        read_adapter(directory, checkpoint)
    (directory / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="adapter_model.safetensors is missing"):
        read_adapter(directory, checkpoint)
    (directory / "adapter_config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(AdapterError, match="not a PEFT configuration"):
        read_adapter(directory, checkpoint)
    with pytest.raises(AdapterError, match="adapter_config.json is missing"):
        read_adapter(tmp_path, checkpoint)


@pytest.mark.parametrize(
    ("out", "what"),
    [
        ("o.gguf", "--file"),
        ("link.gguf", "--file"),
        ("o.rotations", "--rotations"),
        ("m.gguf", "--reference"),
        ("peft/adapter_model.safetensors", "ADAPTER"),
    ],
)
def test_nothing_that_is_read_is_written_over(tmp_path, out, what):
    (tmp_path / "peft").mkdir()
    for name in ("o.gguf", "o.rotations", "m.gguf", "peft/adapter_model.safetensors"):
        (tmp_path / name).write_text("kept")
    (tmp_path / "link.gguf").symlink_to(tmp_path / "o.gguf")
    read = (tmp_path / "o.gguf", tmp_path / "o.rotations", str(tmp_path / "m.gguf"))
    with pytest.raises(ConfigError, match=f"OUT .*{out} is the same path as {what}: give another name"):
        convert_lora(tmp_path / "peft", tmp_path / out, *read, tmp_path, NullProgress())
    assert (tmp_path / out).read_text() == "kept"
