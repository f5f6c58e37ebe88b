"""Hangs what the runtime rounds on transformers' modules; nothing in transformers is replaced."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kurtail_gguf.messages.errors import SourceError
from kurtail_gguf.numerics.simulation.attention import CacheSettings, rotated, use_simulated_attention


def round_input(linear: nn.Module, rounded: Callable[[Tensor], Tensor], online: int = 0) -> RemovableHandle:
    """Let a linear see its input as the runtime's does.

    Args:
        linear: the module, of one input; the weights it is given have the transform folded in.
        rounded: what rounds, ``[..., K]`` to the same shape.
        online: size of the Hadamard blocks that the input is rotated by before it is rounded, 0 for none.

    Returns:
        What takes it off again.
    """

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (rounded(rotated(inputs[0], online)),)

    return linear.register_forward_pre_hook(hook)


def empty_model(config: Any, cache: CacheSettings | None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """transformers' model of a config without any storage, on the meta device.

    Args:
        config: transformers' own; it stays as it is.
        cache: what attention rounds; None for nothing.
        dtype: of weights and activations.

    Raises:
        SourceError: transformers makes no model of the config.
    """
    from transformers import AutoModelForCausalLM

    # torch's own knows no caps of scores
    capped = getattr(config, "attn_logit_softcapping", None)
    attention = "sdpa" if cache is None and not capped else use_simulated_attention()
    try:
        with torch.device("meta"):
            # a copy: from_config writes the attention into it, and modules made before would ask it for theirs
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention, dtype=dtype)
    except Exception as error:  # whatever it stumbles on is the config's fault
        told = " ".join(f"{type(error).__name__} {error}".split())
        raise SourceError(f"{config.name_or_path}: transformers cannot build the model from config.json: {told}") from error
    round_cache(model.model.layers, cache)
    return model


def round_cache(layers: Iterable[nn.Module], cache: CacheSettings | None) -> None:
    """Tell decoder layers, whose model has :func:`use_simulated_attention`'s, what their attention rounds."""
    for layer in layers:
        layer.self_attn.kurtail_cache = cache
