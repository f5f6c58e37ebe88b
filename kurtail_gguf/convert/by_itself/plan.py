"""What a conversion by itself will take, told before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kurtail_gguf.convert.by_itself.conversion import beyond, find, notes, refused_options
from kurtail_gguf.convert.by_itself.loading import load_config
from kurtail_gguf.convert.cost import Speed
from kurtail_gguf.convert.settings import ConvertConfig
from kurtail_gguf.model.by_itself import FoundLayers

#: Products of all rows with the Hessian in GPTQ, as in the stage of quantization.
_PRODUCTS = 6
#: Arrays of a text's tokens, each as wide as the widest linear, that a layer has at once.
_ARRAYS = 4
#: Bytes of a weight in the file, on average.
_FILE_BYTES = 0.6
#: Seconds that writing a weight of the unquantized file and running it once takes.
_PROOF_SECONDS = 5e-8


def memory(config: ConvertConfig, found: FoundLayers) -> dict[str, int]:
    """Bytes by step: the whole model in float32, and the text that goes through it at once."""
    model = 4 * found.parameters
    widest = max(max(linear.rows, linear.columns) for linear in found.linears)
    columns = max(linear.columns for linear in found.linears)
    text = 4 * _ARRAYS * config.calibration_tokens * widest if config.weights == "gptq" else 0
    return {"prove": 2 * model, "quantize": model + text + (24 * columns**2 if text else 0)}


def disk(config: ConvertConfig, found: FoundLayers) -> dict[str, int]:
    """Bytes by what they are; the unquantized file goes once it is proven."""
    return {"unquantized file": 4 * found.parameters, "OUT": int((4 if config.weights == "f32" else _FILE_BYTES) * found.parameters)}


def seconds(config: ConvertConfig, found: FoundLayers, speed: Speed) -> dict[str, float]:
    """Seconds by step."""
    taken = {"prove": _PROOF_SECONDS * found.parameters}
    if config.weights == "gptq":
        operations = sum(2 * one.numel * one.columns * _PRODUCTS for one in found.linears)
        operations += sum(2 * config.calibration_tokens * (one.rows + one.columns) * one.columns for one in found.linears)
        taken["quantize"] = operations / speed.single
    return taken


def outline_by_itself(config: ConvertConfig, directory: Path) -> tuple[Any, FoundLayers, tuple[str, ...], tuple[str, ...]]:
    """transformers' configuration of an HF directory, its linears, notes, and why the conversion would be refused.

    Raises:
        UnsupportedArchitecture: it cannot be converted by itself.
    """
    found, model = find(directory), load_config(directory)
    told = (
        "proven before anything is quantized: refused where the runtime computes another model", *notes(found, found.linears),
        *beyond(model.get_text_config()),
    )  # fmt: skip
    return model, found, told, tuple(refused_options(config))


def cache_values(config: Any) -> int:
    """Values that a token takes in the cache: 0 where the configuration has no such sizes."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", 0) or 0
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    return 2 * text.num_hidden_layers * kv_heads * head_dim


