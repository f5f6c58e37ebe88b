"""Models that no family describes: converted by themselves, proven, and refused where the runtime computes another model."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from kurtail_gguf.check.verify import verify
from kurtail_gguf.convert.pipeline import convert
from kurtail_gguf.convert.settings import ConvertConfig
from kurtail_gguf.messages.errors import UnsupportedArchitecture
from kurtail_gguf.messages.progress import NullProgress, Progress, Stage
from kurtail_gguf.runtime.gguf_info import read_gguf

_SIZES = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 1024,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
_OLD_SIZES = {"n_embd": 128, "n_layer": 2, "n_head": 2, "n_positions": 1024, "bos_token_id": 1, "eos_token_id": 2}
_LATENT = _SIZES | {
    "num_key_value_heads": 2, "kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64,
    "first_k_dense_replace": 1, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
}  # fmt: skip
_ONE_HEAD = _SIZES | {"num_key_value_heads": 1, "head_dim": 64}
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
    # a state beside attention in every layer, and factors on everything
    "FalconH1ForCausalLM": (
        "falcon_h1",
        _ONE_HEAD
        | {
            "mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 64, "mamba_rms_norm": False,
            "attention_in_multiplier": 0.9, "attention_out_multiplier": 0.8, "ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.7,
            "key_multiplier": 0.6, "lm_head_multiplier": 0.5, "embedding_multiplier": 2.5, "mlp_multipliers": [0.9, 1.3],
            "ssm_multipliers": [0.9, 0.8, 1.1, 1.2, 0.7],
        },
    ),
    # two heads of values for each of keys: upstream reorders what comes out of them
    "Qwen3_5ForCausalLM": (
        "qwen3_5_text",
        _ONE_HEAD
        | {
            "linear_key_head_dim": 64, "linear_value_head_dim": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "Lfm2ForCausalLM": (
        "lfm2",
        _ONE_HEAD | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    # windows, heads of two sizes, an embedding of each layer
    "Gemma4ForCausalLM": (
        "gemma4_text",
        _ONE_HEAD
        | {
            "global_head_dim": 128, "sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 64, "vocab_size_per_layer_input": 400, "final_logit_softcapping": 30.0,
        },
    ),
    "GraniteMoeHybridForCausalLM": (
        "granitemoehybrid",
        _ONE_HEAD
        | {
            "layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 384, "mamba_n_heads": 4,
            "mamba_d_head": 64, "mamba_d_state": 64, "embedding_multiplier": 3.0, "residual_multiplier": 0.4,
            "attention_multiplier": 0.2, "logits_scaling": 2.0,
        },
    ),
    "Mamba2ForCausalLM": (
        "mamba2",
        {
            "hidden_size": 128, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 64, "state_size": 64, "n_groups": 1,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
        },
    ),
    # each layer is one of the three kinds
    "NemotronHForCausalLM": (
        "nemotron_h",
        {key: value for key, value in _ONE_HEAD.items() if key != "num_hidden_layers"}
        | {
            "layers_block_type": ["mamba", "mlp", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 64, "ssm_state_size": 64,
            # its steps of time have a shortest one in transformers
            "n_groups": 1,
        },
    ),
}
#: Keys that released checkpoints have, upstream's converter reads, and transformers no longer writes.
KEYS = {
    "GPT2LMHeadModel": {"n_ctx": 1024},
    "DeepseekV3ForCausalLM": {"scoring_func": "sigmoid"},
}
#: Those whose vocabulary upstream's converter wants of SentencePiece.
SENTENCEPIECE = frozenset({"ArceeForCausalLM", "GemmaForCausalLM", "Gemma4ForCausalLM"})
#: Of these, those that it reads from tokenizer.json alone.
AS_JSON = frozenset({"Gemma4ForCausalLM"})
pytestmark = pytest.mark.usefixtures("bindings")


@pytest.fixture(scope="session")
def stranger(save_random_model, tiny_spm, tiny_bpe, tmp_path_factory):
    """``stranger(architecture, **changes)``: the HF directory of a tiny random model with a real tokenizer, made once."""

    @functools.cache
    def make(architecture: str, **changes: Any) -> Path:
        tokenizer, vocabulary = (tiny_spm, 400) if architecture in SENTENCEPIECE else (tiny_bpe, 49152)
        kind, given = CASES[architecture]
        directory = tmp_path_factory.mktemp("tiny")
        given = given | changes | {"vocab_size": vocabulary}
        save_random_model(directory, kind, given, KEYS.get(architecture, {}), tokenizer.glob("tokenizer*"))
        if architecture in AS_JSON:
            AutoTokenizer.from_pretrained(directory).save_pretrained(directory)
        return directory

    return make


@pytest.mark.parametrize("architecture", CASES)
def test_it_is_proven_and_in_four_bits_makes_sense(architecture, stranger, assert_sense_in_four_bits, text, tmp_path):
    source, out = stranger(architecture), tmp_path / "out.gguf"
    config = ConvertConfig(str(source), out, calibration=(str(text),), calibration_tokens=1024)
    convert(config, NullProgress())
    assert_sense_in_four_bits(source, out)


class _Killed(NullProgress):
    """Ends the run once three matrices are quantized."""

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Stage]:
        class Counted:
            done = 0

            def advance(self, n: int = 1, note: str = "") -> None:
                self.done += n
                if name == "quantize" and self.done == 3:
                    raise KeyboardInterrupt

            def within(self, share: float, note: str = "") -> None:
                pass

        yield Counted()


def test_a_run_that_was_ended_goes_on_and_verify_finds_what_is_changed_afterwards(stranger, outputs, text, tmp_path):
    source = stranger("Lfm2ForCausalLM")

    def made(name: str, progress: Progress) -> Path:
        out = outputs / name
        convert(ConvertConfig(str(source), out, calibration=(str(text),), calibration_tokens=1024), progress)
        return out

    whole = made("a.gguf", NullProgress())
    with pytest.raises(KeyboardInterrupt):
        made("b.gguf", _Killed())
    resumed = made("b.gguf", NullProgress())
    assert resumed.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in outputs.iterdir()) == ["a.gguf", "b.gguf"]

    checks = list(verify(whole, str(source), tmp_path, NullProgress()))
    assert [check.name for check in checks] == ["metadata", "tokenizer", "tensors", "proof", "logits", "cache"]
    assert all(check.right for check in checks), checks
    assert "relative error at most" in checks[2].detail and "(blk." in checks[2].detail
    for name, what in (("blk.1.attn_output.weight", "(kt4) has a relative error of 1."), ("blk.0.ffn_norm.weight", "expected at most 0")):
        tensor = next(one for one in read_gguf(resumed).tensors if one.name == name)
        rows = np.memmap(resumed, np.uint8, "r+", tensor.offset, (tensor.shape[0], tensor.bytes // tensor.shape[0]))
        before = rows.copy()
        rows[:] = rows[::-1].copy()
        rows.flush()
        check = next(one for one in verify(resumed, str(source), tmp_path, NullProgress()) if not one.right)
        assert check.name == "tensors" and name in check.detail and what in check.detail
        rows[:] = before


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
