"""What a model's layers multiply by which weights, found from transformers' own modules where no family describes them.

Multiplying what a linear reads by an orthogonal matrix, and its columns by the same, is exact for any linear of any layer.
So nothing has to be known of an architecture but its linears and what each reads: a forward pass on the meta device, of shapes
alone, tells both. Of a mixture of experts it does so without choosing any: transformers multiplies tokens in groups by the
experts' weights, which it keeps in one tensor a layer.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kurtail_gguf.messages.errors import UnsupportedArchitecture
from kurtail_gguf.model.products import Product, Products
from kurtail_gguf.numerics.formats.kt4 import BLOCK

#: Tokens of the traced text.
_TOKENS = 8


@dataclass(frozen=True, slots=True)
class FoundLinear:
    """A linear of a decoder layer, or those of all of its experts.

    Args:
        name: of its weight in the model, ``model.layers.0.self_attn.q_proj.weight``.
        rows, columns: values it computes and reads, of a token.
        transposed: whether the module has its weight as ``[…, columns, rows]``.
        experts: how many matrices the weight has, ``[experts, rows, columns]``; None where it is one.
    """

    name: str
    rows: int
    columns: int
    transposed: bool = False
    experts: int | None = None

    @property
    def count(self) -> int:
        """Matrices."""
        return self.experts or 1

    @property
    def numel(self) -> int:
        """Weights."""
        return self.count * self.rows * self.columns

    def matrices(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Views of the weight: each matrix ``[rows, columns]``."""
        each = (weight,) if self.experts is None else tuple(weight)
        return tuple(one.T for one in each) if self.transposed else each


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


def text_architecture(name: str) -> str:
    """What transformers calls the text of an architecture that reads more than text, where it is a model of its own."""
    return re.sub("ForConditionalGeneration$", "ForCausalLM", name)


def _empty(config: Any, name: str) -> nn.Module:
    from transformers import AutoModelForCausalLM  # takes seconds to import

    try:
        with torch.device("meta"):
            # in bfloat16, which products of grouped experts are in; no value is computed
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16)
    except Exception as error:  # whatever it stumbles on is the config's fault
        raise UnsupportedArchitecture(f"{name}: transformers makes no model of config.json: {_line(error)}") from error
    if type(model).__name__ not in (name, text_architecture(name)):
        raise UnsupportedArchitecture(f"{name}: transformers has {type(model).__name__} for model_type {config.model_type}")
    return model.eval()


def _trace(model: nn.Module, layers: nn.ModuleList, path: str, name: str) -> dict[str, tuple[FoundLinear, Tensor]]:
    """The linears that a pass reached, by name, each with the tensor it read first."""
    names = {one: f"{path}.{own}" for own, one in layers.named_parameters() if one.dim() in (2, 3)}
    reached: dict[str, tuple[FoundLinear, Tensor]] = {}

    def note(product: Product) -> Tensor:
        weight, own = product.parameter, names[product.parameter]
        rows, columns = reversed(weight.shape[-2:]) if product.transposed else weight.shape[-2:]
        experts = weight.shape[0] if weight.dim() == 3 else None
        reached.setdefault(own, (FoundLinear(own, rows, columns, product.transposed, experts), product.read))
        return product.read

    try:
        with Products(names, note):
            _pass(model)
    except Exception as error:  # transformers' code, on a device without values
        raise UnsupportedArchitecture(f"{name}: shapes alone do not tell what its layers compute: {_line(error)}") from error
    return reached


def _pass(model: nn.Module) -> None:
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    # with a mask of its own transformers looks at no values to make one; few models want none
    mask = torch.zeros(1, 1, _TOKENS, _TOKENS, dtype=torch.bfloat16, device="meta")
    with torch.no_grad():
        try:
            model(ids, attention_mask=mask, use_cache=False)
        except (RuntimeError, ValueError, TypeError) as error:
            try:
                model(ids, use_cache=False)
            except RuntimeError:
                # it looks for a mask's values, which says nothing; what it did with a mask does
                raise error from None


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__} {error}".split())[:200]
