"""Models that no family describes: converted by themselves, proven, and refused where the runtime computes another model."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from kurtail_gguf.convert.pipeline import convert
from kurtail_gguf.convert.settings import ConvertConfig
from kurtail_gguf.messages.errors import UnsupportedArchitecture
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.runtime.gguf_info import UNPACKED_KEYS, read_gguf
from kurtail_gguf.runtime.logits import mean_divergence, runtime_log_probabilities

_SIZES = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 1024,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
_OLD_SIZES = {"n_embd": 128, "n_layer": 2, "n_head": 2, "n_positions": 1024, "bos_token_id": 1, "eos_token_id": 2}
_LATENT = _SIZES | {
    "num_key_value_heads": 2, "kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64,
    "first_k_dense_replace": 1, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
}  # fmt: skip
#: Architectures to their model_type, and what their config says beside the vocabulary.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ArceeForCausalLM": ("arcee", _SIZES | {"num_key_value_heads": 1}),
    "OlmoForCausalLM": ("olmo", _SIZES | {"clip_qkv": 0.5}),
    "ApertusForCausalLM": ("apertus", _SIZES | {"num_key_value_heads": 1}),
    "CohereForCausalLM": ("cohere", _SIZES | {"num_key_value_heads": 1, "logit_scale": 0.5}),
    "GemmaForCausalLM": ("gemma", _SIZES | {"num_key_value_heads": 1, "head_dim": 64}),
    "GPT2LMHeadModel": ("gpt2", _OLD_SIZES),
    "FalconForCausalLM": ("falcon", _SIZES | {"num_kv_heads": 1, "new_decoder_architecture": True}),
    "BloomForCausalLM": ("bloom", {"hidden_size": 128, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}),
    # sinks, biases, windows, YaRN; all experts of a layer in two transposed tensors, gate and up row by row
    "GptOssForCausalLM": (
        "gpt_oss",
        _SIZES | {"intermediate_size": 192, "num_key_value_heads": 1, "head_dim": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    # latent attention, an expert of all tokens, a first layer without experts
    "DeepseekV2ForCausalLM": ("deepseek_v2", _LATENT | {"q_lora_rank": 64, "topk_method": "greedy"}),
    "DeepseekV3ForCausalLM": ("deepseek_v3", _LATENT | {"q_lora_rank": 64, "n_group": 2, "topk_group": 1}),
    "Qwen3NextForCausalLM": (
        "qwen3_next",
        _SIZES
        | {
            "num_key_value_heads": 1, "head_dim": 64, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64, "layer_types": ["linear_attention", "full_attention"],
            "full_attention_interval": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
        },
    ),
    "Qwen3_5MoeForCausalLM": (
        "qwen3_5_moe_text",
        _SIZES
        | {
            "num_key_value_heads": 1, "head_dim": 64, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64, "layer_types": ["linear_attention", "full_attention"],
            "full_attention_interval": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
        },
    ),
    # a mixer, a layer of experts without gates, attention
    "NemotronHForCausalLM": (
        "nemotron_h",
        _SIZES
        | {
            "num_hidden_layers": 3, "layers_block_type": ["mamba", "moe", "attention"], "num_key_value_heads": 1, "head_dim": 64,
            "mamba_num_heads": 4, "mamba_head_dim": 64, "ssm_state_size": 64, "n_groups": 1, "n_routed_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64, "moe_latent_size": None,
        },
    ),
    "GraniteMoeHybridForCausalLM": (
        "granitemoehybrid",
        _SIZES
        | {
            "intermediate_size": 64, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2,
            "shared_intermediate_size": 128, "layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 64,
            "mamba_d_state": 64, "mamba_n_groups": 1, "mamba_expand": 2, "embedding_multiplier": 2.0, "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
        },
    ),
    # all experts read all tokens, those of others as zeros; the fourth layer without RoPE
    "Llama4ForCausalLM": (
        "llama4_text",
        _SIZES
        | {
            "intermediate_size": 128, "intermediate_size_mlp": 256, "num_key_value_heads": 1, "head_dim": 64, "num_hidden_layers": 4,
            "num_local_experts": 4, "num_experts_per_tok": 1,
        },
    ),
}
#: Keys that released checkpoints have, upstream's converter reads, and transformers no longer writes.
KEYS = {
    "GPT2LMHeadModel": {"n_ctx": 1024},
    "DeepseekV3ForCausalLM": {"scoring_func": "sigmoid"},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["mamba", "attention"]},
}
#: Those whose vocabulary upstream's converter wants of SentencePiece.
SENTENCEPIECE = frozenset({"ArceeForCausalLM", "GemmaForCausalLM"})
#: Those whose own tokenizer transformers takes whatever is there, of a vocabulary that upstream's converter must know.
OWN_TOKENIZER = frozenset({"Qwen3_5MoeForCausalLM"})
#: Share of the divergence from what is said at the next position that 4 bits of random weights may leave.
NEARER = 0.5

pytestmark = pytest.mark.usefixtures("bindings")


@pytest.fixture(scope="session")
def stranger(tiny_spm, tiny_bpe, smollm2, tmp_path_factory):
    """``stranger(architecture, **changes)``: the HF directory of a tiny random model with a real tokenizer, made once."""

    @functools.cache
    def make(architecture: str, **changes: Any) -> Path:
        tokenizer, vocabulary = (tiny_spm, 400) if architecture in SENTENCEPIECE else (tiny_bpe, 49152)
        kind, given = CASES[architecture]
        directory = tmp_path_factory.mktemp("tiny")
        config = CONFIG_MAPPING[kind](**given | changes, vocab_size=vocabulary)
        torch.manual_seed(0)  # what is added to below is drawn too, in some
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.dim() > 1:
                    parameter.copy_(noise / parameter.shape[-1] ** 0.5)
                else:
                    parameter.add_(0.1 * noise)
        model.save_pretrained(directory)
        saved = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        (directory / "config.json").write_text(json.dumps(saved | KEYS.get(architecture, {})), encoding="utf-8")
        for path in tokenizer.glob("tokenizer*"):
            shutil.copy(path, directory)
        if architecture in OWN_TOKENIZER:
            shutil.copy(smollm2 / UNPACKED_KEYS, directory)
        return directory

    return make


class _Told(NullProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def tell(self, line: str) -> None:
        self.lines.append(line)


@pytest.mark.parametrize("architecture", CASES)
def test_it_is_proven_and_in_four_bits_makes_sense(architecture, stranger, text, tmp_path):
    source, out = stranger(architecture), tmp_path / "out.gguf"
    config = ConvertConfig(str(source), out, calibration=(str(text),), calibration_tokens=1024)
    convert(config, NullProgress())
    info = read_gguf(out)
    assert info.runs_as in ("W4A4KV8", "W4A4KV16")
    tokens = [[1, *np.random.default_rng(5).integers(3, 320, 60).tolist()]]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        right = torch.log_softmax(model(torch.tensor(tokens)).logits[0], -1).numpy()
    found = runtime_log_probabilities(out, tokens)
    here, elsewhere = mean_divergence(right, found), mean_divergence(right, np.roll(found, 1, axis=0))
    print(f"{architecture} {info.runs_as} in four bits: divergence {here:.3f}, from the next position's {elsewhere:.3f}; spread {right.std():.2f}")
    assert here < NEARER * elsewhere


def test_where_the_runtime_computes_another_model_nothing_is_left(stranger, outputs):
    # upstream's graph squares ReLU, whatever the configuration says
    source = stranger("ArceeForCausalLM", hidden_act="silu")
    with pytest.raises(UnsupportedArchitecture, match=r"ArceeForCausalLM cannot be converted by itself: .* first in layer 0"):
        convert(ConvertConfig(str(source), outputs / "out.gguf"), NullProgress())
    assert list(outputs.iterdir()) == []


@pytest.mark.filterwarnings("error::FutureWarning")  # of what a library has given up
def test_with_activations_of_eight_bits_and_text_of_its_own(stranger, tmp_path):
    out = tmp_path / "out.gguf"
    convert(ConvertConfig(str(stranger("ArceeForCausalLM")), out, activations=8, calibration_tokens=1024, kv=16), NullProgress())
    info = read_gguf(out)
    assert info.runs_as == "W4A8KV16"
    assert info.provenance.calibration_name == "self"
    assert len(info.metadata["kurtail.online.name"]) == 12


def test_unquantized_what_upstream_splits_and_what_it_scales(stranger, tmp_path):
    """Bloom's rows are reordered, Olmo's q and k too: all linears are found again in the file."""
    for architecture, count in (("BloomForCausalLM", 8), ("OlmoForCausalLM", 14)):
        out = tmp_path / f"{architecture}.gguf"
        convert(ConvertConfig(str(stranger(architecture)), out, weights="f32"), NullProgress())
        info = read_gguf(out)
        assert (info.runs_as, len(info.metadata["kurtail.online.name"])) == ("f32", count)


def test_experts_in_their_own_four_bits_are_read(stranger, tmp_path):
    source, out, generator = tmp_path / "source", tmp_path / "out.gguf", np.random.default_rng(1)
    shutil.copytree(stranger("GptOssForCausalLM"), source)
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = generator.integers(0, 256, (experts, rows, columns // 32, 16), np.uint8)
        # powers of two: weights are about as large as others
        tensors[f"{name}_scales"] = generator.integers(121, 124, (experts, rows, columns // 32), np.uint8)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}), encoding="utf-8")
    convert(ConvertConfig(str(source), out, weights="f32"), NullProgress())
    names = read_gguf(out).metadata["kurtail.online.name"]
    assert len(names) == 14
    assert sum("_exps" in name for name in names) == 6


def test_where_a_router_has_no_choice_the_runtimes_is_followed(stranger, tmp_path):
    """Experts whose scores are the same, of which each takes the first that it sorts to."""
    source, out = tmp_path / "source", tmp_path / "out.gguf"
    shutil.copytree(stranger("GptOssForCausalLM"), source)
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if ".router." in name]:
        tensors[name][:] = tensors[name][:1]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    progress = _Told()
    convert(ConvertConfig(str(source), out, weights="f32"), progress)
    assert any("choices" in line and "are ties" in line for line in progress.lines), progress.lines
