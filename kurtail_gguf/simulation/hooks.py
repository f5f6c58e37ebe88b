"""Hangs what the runtime rounds on transformers' modules; nothing in transformers is replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kurtail_gguf.simulation.attention import CacheSettings, rotated


def round_input(linear: nn.Module, rounded: Callable[[Tensor], Tensor], r4: int = 0) -> RemovableHandle:
    """Let a linear see its input as the runtime's does.

    Args:
        linear: the module, of one input; the weights it is given have R4 folded in.
        rounded: what rounds, ``[..., K]`` to the same shape.
        r4: size of the Hadamard blocks that the input is rotated by before it is rounded, 0 for none.

    Returns:
        What takes it off again.
    """

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (rounded(rotated(inputs[0], r4)),)

    return linear.register_forward_pre_hook(hook)


def round_cache(layers: Iterable[nn.Module], cache: CacheSettings) -> None:
    """Tell decoder layers, whose model has :func:`use_simulated_attention`'s, what their attention rounds."""
    for layer in layers:
        layer.self_attn.kurtail_cache = cache
