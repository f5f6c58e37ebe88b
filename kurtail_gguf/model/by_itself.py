"""What a model's layers multiply by which weights, found from transformers' own modules where no family describes them.

Multiplying what a linear reads by an orthogonal matrix, and its columns by the same, is exact for any linear of any layer.
So nothing has to be known of an architecture but its linears and what each reads: a forward pass on the meta device, of shapes
alone, tells both.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kurtail_gguf.messages.errors import UnsupportedArchitecture
from kurtail_gguf.numerics.formats.kt4 import BLOCK

#: Tokens of the traced text.
_TOKENS = 8
#: transformers' linear whose weight is ``[in, out]``.
_TRANSPOSED = "Conv1D"


@dataclass(frozen=True, slots=True)
class FoundLinear:
    """A linear of a decoder layer.

    Args:
        name: of its weight in the model, ``model.layers.0.self_attn.q_proj.weight``.
        rows, columns: values it computes and reads, of a token.
        transposed: whether the module has its weight as ``[columns, rows]``.
    """

    name: str
    rows: int
    columns: int
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class FoundLayers:
    """The decoder layers of a model as they were found.

    Args:
        path: of the list of layers, ``model.layers``.
        count: how many there are.
        sites: linears that read the same tensor, in the order they are reached.
        unread: names of weights of linears that a pass did not reach, or of a shape that has no blocks of 64; they stay as
            they are.
        share: of the layers' matrices, how many weights are in :attr:`sites`.
        parameters: weights of the whole model.
    """

    path: str
    count: int
    sites: tuple[tuple[FoundLinear, ...], ...]
    unread: tuple[str, ...]
    share: float
    parameters: int

    @property
    def linears(self) -> tuple[FoundLinear, ...]:
        return tuple(linear for site in self.sites for linear in site)

    def name_in_layers(self, name: str) -> str:
        """What a weight is called from the list of layers on: checkpoints may leave out what stands before it."""
        return below_layers(self.path, name)


def below_layers(path: str, name: str) -> str:
    """``layers.0.mlp.up_proj.weight`` of ``model.layers.0.mlp.up_proj.weight``, where ``path`` is ``model.layers``."""
    parent = path.rpartition(".")[0]
    return name.removeprefix(f"{parent}.") if parent else name


def layer_list(model: nn.Module, count: int) -> tuple[str, nn.ModuleList]:
    """The list of a model's decoder layers, with its path.

    Raises:
        UnsupportedArchitecture: no list has ``count`` modules.
    """
    lists = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    if not lists:
        raise UnsupportedArchitecture(f"{type(model).__name__}: it has no list of {count} layers")
    return max(lists, key=lambda found: sum(one.numel() for one in found[1].parameters()))


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies its only input by a matrix, and adds at most a bias."""
    return isinstance(module, nn.Linear) or type(module).__name__ == _TRANSPOSED


def find_layers(config: Any) -> FoundLayers:
    """Find the linears of a model's layers and which of them read the same.

    Args:
        config: transformers' own, of a model that writes text.

    Raises:
        UnsupportedArchitecture: transformers has no such model, makes none of the config, or computes something that shapes
            do not tell; layers without linears that can be quantized.
    """
    name = (config.architectures or [config.model_type])[0]
    model = _empty(config, name)
    path, layers = layer_list(model, config.get_text_config().num_hidden_layers)
    reached = _trace(model, layers, path, name)
    sites: dict[int, list[FoundLinear]] = {}
    for linear, read in reached.values():
        if linear.columns % BLOCK == 0:
            sites.setdefault(id(read), []).append(linear)
    if not sites:
        raise UnsupportedArchitecture(
            f"{name}: no linear of its layers reads a multiple of {BLOCK} values: their weights are of another kind"
        )
    taken = {linear.name for site in sites.values() for linear in site}
    every = {f"{path}.{own}": one for own, one in layers.named_parameters() if one.dim() > 1}
    unread = (own for own in every if own not in taken)
    share = sum(every[own].numel() for own in taken) / sum(one.numel() for one in every.values())
    return FoundLayers(path, len(layers), tuple(map(tuple, sites.values())), tuple(unread), share, sum(one.numel() for one in model.parameters()))


def _empty(config: Any, name: str) -> nn.Module:
    from transformers import AutoModelForCausalLM  # takes seconds to import

    try:
        with torch.device("meta"):
            # in bfloat16, which products of grouped experts are in; no value is computed
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16)
    except Exception as error:  # whatever it stumbles on is the config's fault
        raise UnsupportedArchitecture(f"{name}: transformers makes no model of config.json: {_line(error)}") from error
    if type(model).__name__ != name:
        raise UnsupportedArchitecture(f"{name}: transformers has {type(model).__name__} for model_type {config.model_type}")
    return model.eval()


def _trace(model: nn.Module, layers: nn.ModuleList, path: str, name: str) -> dict[str, tuple[FoundLinear, Tensor]]:
    """The linears that a pass reached, by name, each with the tensor it read first."""
    reached: dict[str, tuple[FoundLinear, Tensor]] = {}

    def note(own: str, module: nn.Module) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            transposed = type(module).__name__ == _TRANSPOSED
            rows, columns = reversed(module.weight.shape) if transposed else module.weight.shape
            reached.setdefault(own, (FoundLinear(f"{path}.{own}.weight", rows, columns, transposed), inputs[0]))

        return module.register_forward_pre_hook(hook)

    hooks = [note(own, module) for own, module in layers.named_modules() if is_linear(module)]
    try:
        _pass(model)
    except Exception as error:  # transformers' code, on a device without values
        raise UnsupportedArchitecture(f"{name}: shapes alone do not tell what its layers compute: {_line(error)}") from error
    finally:
        for one in hooks:
            one.remove()
    return reached


def _pass(model: nn.Module) -> None:
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    # with a mask of its own transformers looks at no values to make one; few models want none
    mask = torch.zeros(1, 1, _TOKENS, _TOKENS, dtype=torch.bfloat16, device="meta")
    with torch.no_grad():
        try:
            model(ids, attention_mask=mask, use_cache=False)
        except (RuntimeError, ValueError, TypeError):
            model(ids, use_cache=False)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__} {error}".split())[:200]
