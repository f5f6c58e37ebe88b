"""Mixtures of experts that no family describes: further architectures, experts quantized already, and choices that are ties."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kurtail_gguf.convert.pipeline import convert
from kurtail_gguf.convert.settings import ConvertConfig
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.runtime.gguf_info import UNPACKED_KEYS, read_gguf

_SIZES = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 1024, "num_experts_per_tok": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
#: Architectures to their model_type, and what their config says beside the vocabulary.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "GptOssForCausalLM": ("gpt_oss", _SIZES | {"intermediate_size": 192, "head_dim": 64, "num_local_experts": 4}),
    # a state in one layer, attention in the other
    "GraniteMoeHybridForCausalLM": (
        "granitemoehybrid",
        _SIZES
        | {
            "intermediate_size": 64, "num_local_experts": 4, "shared_intermediate_size": 128, "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_n_groups": 1, "mamba_expand": 2,
            "embedding_multiplier": 2.0, "logits_scaling": 2.0, "residual_multiplier": 0.5,
        },
    ),
    # a state, experts without gates, attention, one in each layer; transformers takes shorter steps of time for as long as the shortest
    # one, upstream does not
    "NemotronHForCausalLM": (
        "nemotron_h",
        {key: value for key, value in _SIZES.items() if key != "num_hidden_layers"}
        | {
            "layers_block_type": ["mamba", "moe", "attention"], "head_dim": 64, "mamba_num_heads": 4, "mamba_head_dim": 64,
            "ssm_state_size": 64, "n_groups": 1, "time_step_min": 1e-6, "n_routed_experts": 4, "moe_intermediate_size": 64,
            "moe_shared_expert_intermediate_size": 64,
        },
    ),
    # all experts read all tokens, those of others as zeros; the fourth layer without RoPE
    "Llama4ForCausalLM": (
        "llama4_text",
        _SIZES
        | {
            "intermediate_size": 128, "intermediate_size_mlp": 256, "head_dim": 64, "num_hidden_layers": 4, "num_local_experts": 4,
            "num_experts_per_tok": 1,
        },
    ),
    "Qwen3_5MoeForCausalLM": (
        "qwen3_5_moe_text",
        _SIZES
        | {
            "head_dim": 64, "num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
            "layer_types": ["linear_attention", "full_attention"], "full_attention_interval": 2, "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
        },
    ),
}
#: Keys that released checkpoints have, upstream's converter reads, and transformers writes otherwise.
KEYS = {"GraniteMoeHybridForCausalLM": {"layer_types": ["mamba", "attention"]}}
#: Those for which transformers takes a tokenizer of its own, of a vocabulary that upstream's converter must know.
OWN_TOKENIZER = frozenset({"Qwen3_5MoeForCausalLM"})
pytestmark = pytest.mark.usefixtures("bindings")


@pytest.fixture(scope="session")
def mixture(save_random_model, tiny_bpe, smollm2, tmp_path_factory):
    """``mixture(architecture)``: the HF directory of a tiny random model with a real tokenizer, made once."""

    @functools.cache
    def make(architecture: str) -> Path:
        kind, given = CASES[architecture]
        directory = tmp_path_factory.mktemp("mixture")
        files = (*tiny_bpe.glob("tokenizer*"), *([smollm2 / UNPACKED_KEYS] if architecture in OWN_TOKENIZER else []))
        save_random_model(directory, kind, given | {"vocab_size": 49152}, KEYS.get(architecture, {}), files)
        return directory

    return make


class _Told(NullProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def tell(self, line: str) -> None:
        self.lines.append(line)


@pytest.mark.parametrize("architecture", [name for name in CASES if name != "GptOssForCausalLM"])
def test_it_is_proven_and_in_four_bits_makes_sense(architecture, mixture, assert_sense_in_four_bits, text, tmp_path):
    source, out = mixture(architecture), tmp_path / "out.gguf"
    convert(ConvertConfig(str(source), out, calibration=(str(text),), calibration_tokens=1024), NullProgress())
    assert any("_exps" in name for name in read_gguf(out).metadata["kurtail.online.name"])
    assert_sense_in_four_bits(source, out)


def _copy(source: Path, target: Path) -> tuple[Path, dict[str, np.ndarray]]:
    shutil.copytree(source, target)
    return target, load_file(target / "model.safetensors")


def test_experts_in_their_own_four_bits_are_read(mixture, tmp_path):
    source, tensors = _copy(mixture("GptOssForCausalLM"), tmp_path / "source")
    generator = np.random.default_rng(1)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = generator.integers(0, 256, (experts, rows, columns // 32, 16), np.uint8)
        # powers of two: weights are about as large as others
        tensors[f"{name}_scales"] = generator.integers(121, 124, (experts, rows, columns // 32), np.uint8)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}), encoding="utf-8")
    convert(ConvertConfig(str(source), tmp_path / "out.gguf", weights="f32"), NullProgress())
    names = read_gguf(tmp_path / "out.gguf").metadata["kurtail.online.name"]
    assert len(names) == 14
    assert sum("_exps" in name for name in names) == 6


def test_where_a_router_has_no_choice_the_runtimes_is_followed(mixture, tmp_path):
    """Experts whose scores are the same, of which each takes those that its way of sorting has first."""
    source, tensors = _copy(mixture("GptOssForCausalLM"), tmp_path / "source")
    for name in [name for name in tensors if ".router." in name]:
        tensors[name][:] = tensors[name][:1]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    progress = _Told()
    convert(ConvertConfig(str(source), tmp_path / "out.gguf", weights="f32"), progress)
    assert any("choices" in line and "are ties" in line for line in progress.lines), progress.lines
