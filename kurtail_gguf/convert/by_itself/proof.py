"""Does the runtime compute what transformers does? Shown on a short text, before the work of hours."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kurtail_gguf.messages.errors import UnsupportedArchitecture
from kurtail_gguf.convert.by_itself.routing import follow
from kurtail_gguf.model.by_itself import layer_list
from kurtail_gguf.runtime.logits import RuntimeLayers, runtime_layers

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
    found = runtime_layers(file, tokens.tolist())
    notes: list[str] = []
    with ExitStack() as stack:
        followed = stack.enter_context(follow(layers_of(model), found.experts, found.shares))
        plain, bound, ways = 0.0, 0.0, [None, _upstreams_yarn, _upstreams_steps, _upstreams_gelu, _in_double]
        for way in ways:
            if way is not None and (note := stack.enter_context(way(model))) is None:
                continue
            expected, own = _said(model, tokens)
            difference = float(np.abs(found.said - expected).max())
            if way is None:
                plain, bound = difference, BOUND * max(1.0, float(expected.std()))
            else:
                notes.extend(filter(None, [note]))
                bound *= GELU_BOUND / BOUND if way is _upstreams_gelu else 1
            if difference <= bound:
                return Proof(difference, bound, _note(notes, plain, sum(followed.values())))
    raise UnsupportedArchitecture(
        f"{type(model).__name__} cannot be converted by itself: unquantized, its log-probabilities of a short text differ by up to "
        f"{difference:.1e} between the runtime and transformers (limit {bound:.1e}), {_where(own, found)}: upstream's graph "
        "computes another model; please report it with its config.json"
    )


def _note(notes: list[str], plain: float, ties: int) -> str | None:
    told = []
    if notes:
        told.append(f"{' and '.join(notes)}: without rounding anything else its log-probabilities differ by up to {plain:.1e} from transformers'")
    if ties:
        told.append(f"of its router's choices {ties} are ties, which the runtime decides otherwise than transformers")
    return "; ".join(told) or None


def layers_of(model: nn.Module) -> nn.ModuleList:
    """A model's decoder layers."""
    return layer_list(model, model.config.get_text_config().num_hidden_layers)[1]


def _said(model: nn.Module, tokens: npt.NDArray[np.int32]) -> tuple[Floats, list[Floats]]:
    """Log-probabilities ``[n, vocabulary]``, and each layer's output ``[n, hidden]``."""
    layers = layers_of(model)
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


def _where(own: list[Floats], runtime: RuntimeLayers) -> str:
    """Where the two begin to differ, in words."""
    layers = runtime.outputs
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
def _upstreams_steps(model: nn.Module) -> Iterator[str | None]:
    """Let steps of states be as small as they come; what a user should know of it, None for a model that limits none."""
    limited = [module for module in model.modules() if tuple(getattr(module, "time_step_limit", None) or (0.0,))[0] > 0]
    before = [module.time_step_limit for module in limited]
    for module in limited:
        module.time_step_limit = (0.0, *module.time_step_limit[1:])
    try:
        yield "the runtime does not limit steps of states from below (time_step_min)" if limited else None
    finally:
        for module, limit in zip(limited, before, strict=True):
            module.time_step_limit = limit


@contextmanager
def _in_double(model: nn.Module) -> Iterator[str]:
    """Let a model compute in double precision: what sums of exponentials leave of single precision, as in layers with a state, is
    no difference between two models."""
    model.double()
    try:
        yield ""
    finally:
        model.float()


@contextmanager
def _upstreams_gelu(model: nn.Module) -> Iterator[str | None]:
    """Let a model's GELU be what upstream computes on CPUs; what a user should know of it, None for one without."""
    kinds = (module for module in model.modules() if "gelu" in type(module).__name__.lower())
    hooks = [module.register_forward_hook(_from_table) for module in kinds if not list(module.children())]
    try:
        yield "the runtime computes GELU by its tanh approximation, from a table of halves" if hooks else None
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _upstreams_yarn(model: nn.Module) -> Iterator[str | None]:
    """Let the limits of a model's YaRN be whole numbers, as upstream's are; what a user should know of it, None for one whose
    are."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = copy.deepcopy(model.config.get_text_config())
    parameters = getattr(config, "rope_parameters", None) or {}
    if parameters.get("rope_type") != "yarn" or parameters.get("truncate", True):
        yield None
        return
    config.rope_parameters = {**parameters, "truncate": True}
    tables = [module for module in model.modules() if isinstance(getattr(module, "inv_freq", None), Tensor)]
    before = [module.inv_freq.clone() for module in tables]
    for module in tables:
        module.inv_freq.copy_(ROPE_INIT_FUNCTIONS["yarn"](config, module.inv_freq.device)[0])
    try:
        yield "the runtime rounds the limits of YaRN's ramp, which config.json forbids (truncate false)"
    finally:
        for module, values in zip(tables, before, strict=True):
            module.inv_freq.copy_(values)


def _from_table(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> Tensor:
    x = inputs[0]
    found = nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
    return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, found)).to(x.dtype)
