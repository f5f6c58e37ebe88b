"""SmolLM3: Llama's layers, every fourth without RoPE; q and k may be permuted and rotated there as anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kurtail_gguf.model.family import Family
from kurtail_gguf.model.file_form import FileForm

#: Layers from one without RoPE to the next, which upstream's graph has as a constant.
_PERIOD = 4


def _check(config: Mapping[str, Any]) -> tuple[str, str] | None:
    layers = config["num_hidden_layers"]
    if [bool(turned) for turned in config["no_rope_layers"]][:layers] != [(layer + 1) % _PERIOD != 0 for layer in range(layers)]:
        return "no_rope_layers", f"upstream's graph has no RoPE in one of every {_PERIOD} layers, and RoPE in the others"
    return None


FAMILY = Family(
    architecture="SmolLM3ForCausalLM",
    file=FileForm("smollm3"),
    rope_pairs=True,
    turned=lambda config, layer: bool(config["no_rope_layers"][layer]),  # 0 where there is none
    check=_check,
    refused={
        "attention_bias": "upstream's graph has no biases for SmolLM3",
        "mlp_bias": "upstream's graph has no biases for SmolLM3",
        "use_sliding_window": "upstream's graph computes full attention",
    },
)
