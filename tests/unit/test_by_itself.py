"""Linears of models that no family describes, and how they are found again in what upstream's converter makes of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from transformers import (
    ArceeConfig,
    CohereConfig,
    DeepseekV2Config,
    GPT2Config,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
)

from kurtail_gguf.convert.by_itself.architectures import BY_ITSELF, OWN, REFUSED, way_of
from kurtail_gguf.convert.by_itself.conversion import beyond, check_share, find, without_transform
from kurtail_gguf.messages.errors import UnsupportedArchitecture
from kurtail_gguf.model.by_itself import FoundLayers, find_layers
from kurtail_gguf.runtime.export.rows import KnownRows, row_sums

_SIZES = {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip


def _found(config: PretrainedConfig, architecture: str) -> FoundLayers:
    config.architectures = [architecture]
    return find_layers(config)


def _sites(found: FoundLayers) -> list[list[str]]:
    """Of the first layer, the linears' own names."""
    return [[one.name.split(".")[-2] for one in site] for site in found.sites if ".0." in site[0].name]


def test_linears_that_read_the_same_are_one_site():
    found = _found(ArceeConfig(**_SIZES), "ArceeForCausalLM")
    assert _sites(found) == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["up_proj"], ["down_proj"]]
    assert (found.path, found.count, found.unread, found.share) == ("model.layers", 2, (), 1)
    down = found.linears[-1]
    assert (down.name, down.rows, down.columns) == ("model.layers.1.mlp.down_proj.weight", 128, 384)
    assert found.name_in_layers(down.name) == "layers.1.mlp.down_proj.weight"


def test_attention_and_ffn_side_by_side_read_the_same():
    found = _found(CohereConfig(**_SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2), "CohereForCausalLM")
    assert _sites(found) == [["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], ["o_proj"], ["down_proj"]]


def test_a_matrix_may_be_transposed():
    config = GPT2Config(vocab_size=64, n_embd=128, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    found = _found(config, "GPT2LMHeadModel")
    assert {one.transposed for one in found.linears} == {True}
    assert [(one.rows, one.columns) for one in found.linears[:4]] == [(384, 128), (128, 128), (512, 128), (128, 512)]


def test_rows_of_no_whole_blocks_stay_as_they_are():
    found = _found(ArceeConfig(**_SIZES | {"intermediate_size": 160}), "ArceeForCausalLM")
    assert _sites(found) == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["up_proj"]]
    assert found.unread == ("model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight")


def test_a_model_that_is_mostly_something_else_is_refused():
    found = replace(_found(ArceeConfig(**_SIZES), "ArceeForCausalLM"), share=0.04, unread=("model.layers.0.conv.weight",))
    with pytest.raises(UnsupportedArchitecture, match=r"linears hold 4 % of its layers' weights, and the others \(model"):
        check_share(found, "ArceeForCausalLM")


def test_experts_in_one_tensor_are_found():
    found = _found(MixtralConfig(**_SIZES, num_local_experts=8), "MixtralForCausalLM")
    assert found.share > 0.99
    gate_up, down = (one for one in found.linears if "layers.0." in one.name and one.experts)
    assert (gate_up.name, gate_up.rows, gate_up.columns, gate_up.experts) == ("model.layers.0.mlp.experts.gate_up_proj", 768, 128, 8)
    assert (down.rows, down.columns, down.transposed, down.numel) == (128, 384, False, 8 * 128 * 384)


def test_experts_may_be_transposed():
    for config, name in (
        (GptOssConfig(**_SIZES, num_local_experts=4, head_dim=64), "GptOssForCausalLM"),
        (Llama4TextConfig(**_SIZES, num_local_experts=4, intermediate_size_mlp=384, head_dim=64, pad_token_id=0), "Llama4ForCausalLM"),
    ):
        found = _found(config, name)
        experts = [(one.rows, one.columns, one.transposed, one.experts) for one in found.linears if one.experts and "layers.0." in one.name]
        assert experts == [(768, 128, True, 4), (128, 384, True, 4)]


def test_what_a_pass_stumbles_on_is_told():
    # with a mask; without one it stumbles on that, whatever else is wrong
    with pytest.raises(UnsupportedArchitecture, match=r"DeepseekV2ForCausalLM: shapes alone .* argument 'k' must be int, not NoneType"):
        _found(DeepseekV2Config(**_SIZES | {"num_key_value_heads": 2}, first_k_dense_replace=0), "DeepseekV2ForCausalLM")


def test_what_transformers_has_for_the_type_must_be_the_architecture():
    with pytest.raises(UnsupportedArchitecture, match="LlamaForCausalLM: transformers has ArceeForCausalLM for model_type arcee"):
        _found(ArceeConfig(**_SIZES), "LlamaForCausalLM")


def _known(**matrices: np.ndarray) -> KnownRows:
    sums = {f"layers.3.{name}": np.stack(list(map(row_sums, one))) if one.ndim == 3 else row_sums(one) for name, one in matrices.items()}
    return KnownRows(sums, {f"layers.3.{name}": one.shape[-1] for name, one in matrices.items()})


def test_rows_are_found_again_in_any_order_and_number():
    source = np.random.default_rng(1).standard_normal((12, 64)).astype(np.float32)
    known, order = _known(up=source), np.random.default_rng(2).permutation(12)
    for rows, expected in ((source[order], order), (source[4:8], range(4, 8))):
        (found,) = known.find(3, rows)
        assert (found.linear, found.expert) == ("layers.3.up", None)
        np.testing.assert_array_equal(found.places, expected)
    # another order of columns, other values, another matrix, another layer
    assert known.find(3, source[:, ::-1]) is None
    assert known.find(3, np.abs(source)) is None
    assert known.find(3, source[:, :32]) is None
    assert known.find(2, source) is None


def test_experts_are_found_again_where_gate_and_up_are_one():
    gate_up, down = np.random.default_rng(1).standard_normal((2, 4, 64, 64)).astype(np.float32)
    known = _known(gate_up=gate_up, down=down)
    found = known.find(3, gate_up[:, 1::2])
    assert [(one.linear, one.expert) for one in found] == [("layers.3.gate_up", number) for number in range(4)]
    np.testing.assert_array_equal(found[2].places, range(1, 64, 2))
    assert known.find(3, down)[0].linear == "layers.3.down"
    # experts in another order, or in part
    assert known.find(3, down[::-1]) is None
    assert known.find(3, down[:2]) is None
    # equal experts are each their own
    assert [one.expert for one in _known(down=down[[0, 0]]).find(3, down[[0, 0]])] == [0, 1]


def test_the_tensor_that_a_graph_multiplies_by_itself_is_told():
    line = "kurtail: blk.1.attn_q_a.weight has an online transform, but the graph of architecture deepseek2 reads it without (MUL_MAT): convert"
    assert without_transform(f"/tmp/out.gguf: {line}") == "attn_q_a.weight"
    assert without_transform("kurtail: no memory") is None


@pytest.mark.parametrize(
    ("architecture", "kind", "detail"),
    [
        ("LlamaForCausalLM", OWN, ""),
        ("Mistral3ForConditionalGeneration", OWN, "of its text: Mi"),
        ("BloomForCausalLM", BY_ITSELF, "8 linears in 2 layers"),
        ("Qwen3_5ForConditionalGeneration", BY_ITSELF, "248 linears in 32 layers"),
        ("BambaForCausalLM", REFUSED, "the proof fails: upstream's graph"),
        ("BertModel", REFUSED, "transformers has no model of that name that writes text"),
    ],
)
def test_every_architecture_has_a_way(architecture, kind, detail):
    found = way_of(architecture)
    assert (found.kind, found.detail[: len(detail)]) == (kind, detail)


def test_what_a_short_text_does_not_prove_is_told():
    config = ArceeConfig(**_SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0})
    config.sliding_window = 4096
    assert [line.split(" is not proven")[0] for line in beyond(config)] == ["sliding_window 4096", "RoPE scaled by linear"]
    assert list(beyond(ArceeConfig(**_SIZES))) == []


def test_what_upstream_does_not_know_is_refused_before_anything(tmp_path):
    OPTConfig(architectures=["OPTForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitecture, match="architecture OPTForCausalLM is unknown to upstream's converter"):
        find(tmp_path)
