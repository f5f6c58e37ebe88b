"""Does the runtime compute what transformers does? Shown on a short text, before the work of hours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kurtail_gguf.messages.errors import UnsupportedArchitecture
from kurtail_gguf.model.by_itself import layer_list
from kurtail_gguf.runtime.logits import runtime_layers

#: Largest difference of a log-probability, in single precision on both sides, as a share of their standard deviation where that
#: is above 1: what is rounded grows with what is computed.
BOUND = 1e-4
#: The same where upstream's CPU code takes GELU from a table of halves: single precision leaves open which of two a value is.
GELU_BOUND = 2e-3
#: Share of a layer's output's standard deviation from which on it differs.
_LAYER = 1e-2
#: Tokens of the text.
TOKENS = 256

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Proof:
    """What was found.

    Args:
        difference: largest one of a log-probability.
        bound: what it may be.
        note: what a user should know of it; None for nothing.
    """

    difference: float
    bound: float
    note: str | None = None


def prove(file: Path, model: nn.Module, tokens: npt.NDArray[np.int32]) -> Proof:
    """Compare what a file of unquantized weights says through the runtime with what the model says.

    Args:
        file: GGUF of the model, nothing in it rounded.
        model: transformers' model in float32.
        tokens: int32 ``[n]``.

    Raises:
        UnsupportedArchitecture: they differ; the message names the first layer that does.
        KurtailError: the runtime cannot run the file.
    """
    found, layers = runtime_layers(file, tokens.tolist())
    expected, own = _said(model, tokens)
    difference, bound = float(np.abs(found - expected).max()), BOUND * max(1.0, float(expected.std()))
    if difference <= bound:
        return Proof(difference, bound)
    with _upstreams_gelu(model) as replaced:
        if replaced:
            plain, (expected, own) = difference, _said(model, tokens)
            difference, bound = float(np.abs(found - expected).max()), bound * GELU_BOUND / BOUND
            if difference <= bound:
                note = (
                    f"the runtime computes GELU by its tanh approximation, from a table of halves: without rounding anything else "
                    f"its log-probabilities differ by up to {plain:.1e} from transformers'"
                )
                return Proof(difference, bound, note)
    raise UnsupportedArchitecture(
        f"{type(model).__name__} cannot be converted by itself: unquantized, its log-probabilities of a short text differ by up to "
        f"{difference:.1e} between the runtime and transformers (limit {bound:.1e}), {_where(own, layers)}: upstream's graph "
        "computes another model; please report it with its config.json"
    )


def _said(model: nn.Module, tokens: npt.NDArray[np.int32]) -> tuple[Floats, list[Floats]]:
    """Log-probabilities ``[n, vocabulary]``, and each layer's output ``[n, hidden]``."""
    _, layers = layer_list(model, model.config.get_text_config().num_hidden_layers)
    outputs: list[Floats] = []

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        outputs.append(hidden.detach().cpu().float().numpy().reshape(len(tokens), -1))

    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        with torch.no_grad():
            ids = torch.from_numpy(tokens.astype(np.int64))[None].to(next(model.parameters()).device)
            logits = model(ids, use_cache=False).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
    return torch.log_softmax(logits.double(), -1).float().cpu().numpy(), outputs


def _where(own: list[Floats], layers: dict[int, Floats]) -> str:
    """Where the two begin to differ, in words."""
    if not layers:
        return "in a layer that upstream's graph does not name"
    for number, expected in enumerate(own):
        found = layers.get(number)
        if found is None:
            continue
        if found.shape != expected.shape:
            return f"first in layer {number}, whose output has {found.shape[1]} values, not {expected.shape[1]}"
        if not np.abs(found - expected).max() <= _LAYER * float(expected.std()):
            return f"first in layer {number}"
    return "first behind the last layer"


@contextmanager
def _upstreams_gelu(model: nn.Module) -> Iterator[bool]:
    """Let a model's GELU be what upstream computes on CPUs; whether it has any."""
    kinds = (module for module in model.modules() if "gelu" in type(module).__name__.lower())
    hooks = [module.register_forward_hook(_from_table) for module in kinds if not list(module.children())]
    try:
        yield bool(hooks)
    finally:
        for hook in hooks:
            hook.remove()


def _from_table(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> Tensor:
    x = inputs[0]
    found = nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
    return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, found))
