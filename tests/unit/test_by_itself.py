"""Linears of models that no family describes, and how they are found again in what upstream's converter makes of them."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import ArceeConfig, CohereConfig, GPT2Config, MixtralConfig, OPTConfig, PretrainedConfig

from kurtail_gguf.convert.by_itself.architectures import BY_ITSELF, OWN, REFUSED, way_of
from kurtail_gguf.convert.by_itself.conversion import beyond, check_share, find
from kurtail_gguf.messages.errors import UnsupportedArchitecture
from kurtail_gguf.model.by_itself import FoundLayers, find_layers
from kurtail_gguf.runtime.export.rows import name_below, rows_of

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
    found = _found(MixtralConfig(**_SIZES, num_local_experts=8), "MixtralForCausalLM")
    with pytest.raises(UnsupportedArchitecture, match=r"linears hold 4 % of its layers' weights, and the others \(model"):
        check_share(found, "MixtralForCausalLM")


def test_what_transformers_has_for_the_type_must_be_the_architecture():
    with pytest.raises(UnsupportedArchitecture, match="LlamaForCausalLM: transformers has ArceeForCausalLM for model_type arcee"):
        _found(ArceeConfig(**_SIZES), "LlamaForCausalLM")


def test_rows_are_found_again_in_any_order_and_number():
    source = np.random.default_rng(1).standard_normal((12, 64)).astype(np.float32)
    order = np.random.default_rng(2).permutation(12)
    np.testing.assert_array_equal(rows_of(source, source[order]), order)
    np.testing.assert_array_equal(rows_of(source, source[4:8]), range(4, 8))
    # another order of columns, other values, another matrix
    assert rows_of(source, source[:, ::-1]) is None
    assert rows_of(source, source * np.float32(1.5)) is None
    assert rows_of(source, source[:, :32]) is None


def test_a_checkpoints_names_may_begin_otherwise():
    names = {"h.0.mlp.up.weight": False, "h.10.mlp.up.weight": False}
    assert name_below("transformer.h.10.mlp.up.weight", names) == "h.10.mlp.up.weight"
    assert name_below("h.0.mlp.up.weight", names) == "h.0.mlp.up.weight"
    assert name_below("h.0.mlp.up.bias", names) is None


@pytest.mark.parametrize(
    ("architecture", "kind", "detail"),
    [
        ("LlamaForCausalLM", OWN, ""),
        ("Mistral3ForConditionalGeneration", OWN, "of its text: Mi"),
        ("BloomForCausalLM", BY_ITSELF, "8 linears in 2 layers"),
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
