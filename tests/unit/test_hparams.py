"""Words of config.json that upstream's converter knows."""

from __future__ import annotations

import pytest

from kurtail_gguf.runtime.export.hparams import has_other_words, known_to_upstream


@pytest.mark.parametrize("kinds", [["linear_attention", "full_attention"], ["mamba", "attention"]])
def test_layers_are_called_as_they_were(kinds):
    given = {"layer_types": kinds, "num_experts_per_tok": 2}
    named = {"layer_types": ["mamba", "attention"]}
    assert known_to_upstream("GraniteMoeHybridForCausalLM", given | {"num_local_experts": 8}) == given | named | {"num_local_experts": 8}
    # without experts, no key of any
    assert known_to_upstream("GraniteMoeHybridForCausalLM", given | {"num_local_experts": 0}) == named


def test_a_nemotron_h_without_experts_says_nothing_of_them():
    given = {"layers_block_type": ["mamba", "mlp", "attention"], "num_experts_per_tok": 2}
    found = known_to_upstream("NemotronHForCausalLM", given)
    assert (found["hybrid_override_pattern"], "num_experts_per_tok" in found) == ("M-*", False)
    assert given["num_experts_per_tok"] == 2
    found = known_to_upstream("NemotronHForCausalLM", {"layers_block_type": ["linear_attention", "moe"], "num_experts_per_tok": 2})
    assert (found["hybrid_override_pattern"], found["num_experts_per_tok"]) == ("ME", 2)


def test_how_much_of_a_head_turns_is_said_where_gpt_neox_said_it():
    assert known_to_upstream("GPTNeoXForCausalLM", {"rope_parameters": {"partial_rotary_factor": 0.25}})["rotary_pct"] == 0.25
    assert known_to_upstream("GPTNeoXForCausalLM", {"rotary_pct": 0.5})["rotary_pct"] == 0.5
    assert not has_other_words("LlamaForCausalLM")
