"""Quantizing a model's linears while a text goes through it once, each when the pass reaches it.

So every linear is fitted to what those before it, quantized already, let it read, as layer by layer elsewhere; and nothing
has to be known of what lies between them. Where the pass reaches the experts of a layer, each is quantized on the tokens that
were chosen for it before all of them answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from kurtail_gguf.files.atomic import replacing
from kurtail_gguf.messages.progress import Progress, Stage
from kurtail_gguf.method.quantize.expert_tokens import FEWEST_TOKENS
from kurtail_gguf.method.quantize.gptq import quantize_gptq
from kurtail_gguf.method.quantize.rtn import quantize_rtn
from kurtail_gguf.model.by_itself import FoundLinear
from kurtail_gguf.model.experts import routes
from kurtail_gguf.model.products import Product, Products
from kurtail_gguf.numerics.formats import kt4
from kurtail_gguf.numerics.simulation.attention import rotated
from kurtail_gguf.runtime.export.rows import rows_file
from kurtail_gguf.runtime.quick_rounding import quick_rounding

#: Tokens whose products are summed at once.
_TOKENS = 4096
#: Of all tokens, how many at most stand for all where an expert has too few of its own.
_OTHERS = 2048


class Quantizer:
    """Quantizes linears of a model, which has the rounded weights afterwards, and keeps their packed rows in files.

    Args:
        target: a directory of files (:func:`rows_file`). Those that are there are taken over.
        linears: by the model's parameters.
        names: by the linears' names in the model, what their files are called.
        bits: of activations.
        stage: told of each matrix.
    """

    def __init__(
        self, target: Path, linears: Mapping[nn.Parameter, FoundLinear], names: Mapping[str, str], bits: int, stage: Stage
    ) -> None:
        self._target, self._linears, self._names, self._bits, self._stage = target, linears, names, bits, stage
        self._done: set[Path] = set()
        self._read: Tensor | None = None
        self._rounded: Tensor | None = None
        self._hessian: Tensor | None = None
        self._importance: Tensor | None = None
        #: How many experts of layers had fewer tokens of their own than a Hessian needs.
        self.starved = 0

    def read(self, product: Product) -> Tensor:
        """What a product reads, transformed and rounded; the weights are rounded, on all of it, the first time."""
        linear, x = self._linears[product.parameter], product.read
        if self._read is not x:  # linears of one site follow each other, and are given the same tensor
            self._read, self._hessian = x, None
            self._rounded = quick_rounding()(rotated(x, kt4.BLOCK), self._bits, kt4.BLOCK)
        assert self._rounded is not None
        if linear.experts is None or product.expert is not None:
            self._quantize(product.parameter, product.expert, None)
        else:
            total = sum(map(_hessian, self._rounded)) / self._rounded.any(-1).sum().clamp(min=1)
            for expert, own in enumerate(self._rounded):
                lack = max(0, FEWEST_TOKENS - int(own.any(-1).sum()))
                self._quantize(product.parameter, expert, lambda own=own, lack=lack: _hessian(own) + lack * total)
        return self._rounded

    def experts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Quantize the experts of a layer, each on its tokens; where these are few, filled up with others.

        Called before the module is; it leaves modules alone whose arguments are not tokens, their experts and shares.
        """
        given = routes(module, args, kwargs)
        if given is None:
            return
        x, experts, shares = given
        usual = shares.square().mean()
        others = torch.arange(0, len(x), -(-len(x) // _OTHERS), device=x.device)
        for expert in range(max(self._linears[one].count for one in module.parameters(recurse=False) if one in self._linears)):
            tokens, places = torch.where(experts == expert)
            importance = shares[tokens, places].square()
            if (lack := FEWEST_TOKENS - len(tokens)) > 0:
                self.starved += 1
                tokens = torch.cat([tokens, others])
                importance = torch.cat([importance, (usual * lack / len(others)).expand(len(others))])
            self._importance = importance
            one = torch.full((len(tokens), 1), expert, device=x.device)
            module.forward(x[tokens], one, torch.ones_like(one, dtype=shares.dtype))
            self._importance = None

    def to_nearest(self, linear: FoundLinear, weight: nn.Parameter) -> None:
        """Round a linear's weights without a text, but those that are done."""
        for number, matrix in enumerate(linear.matrices(weight)):
            path = self._path(linear, None if linear.experts is None else number)
            if path not in self._done:
                self._finish(path, matrix, lambda matrix=matrix: quantize_rtn(_transformed(matrix), linear.name))

    def _quantize(self, weight: nn.Parameter, expert: int | None, hessian: Any) -> None:
        linear = self._linears[weight]
        path, matrix = self._path(linear, expert), linear.matrices(weight)[expert or 0]
        if path in self._done:
            return

        def codes() -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
            assert self._rounded is not None
            if hessian is not None:
                found = hessian()
            elif self._hessian is None:
                found = self._hessian = _hessian(self._rounded, self._importance)
            else:
                found = self._hessian
            return quantize_gptq(_transformed(matrix), found, linear.name)

        self._finish(path, matrix, codes)

    def _path(self, linear: FoundLinear, expert: int | None) -> Path:
        return rows_file(self._target, self._names[linear.name], expert)

    def _finish(self, path: Path, matrix: Tensor, codes: Any) -> None:
        """Put rounded weights where a matrix is: those of its file, or else new ones, which are kept there."""
        if not path.exists():
            with replacing(path) as scratch:
                save_file({"rows": kt4.pack(*codes())}, scratch)
        matrix.copy_(torch.from_numpy(kt4.dequantize(*kt4.unpack(load_file(path)["rows"]))))
        self._done.add(path)
        self._stage.advance(1, path.stem)


def quantize(
    model: nn.Module,
    linears: Iterable[FoundLinear],
    names: Mapping[str, str],
    ids: npt.NDArray[np.int32] | None,
    bits: int,
    target: Path,
    progress: Progress,
) -> None:
    """Quantize a model's linears.

    Args:
        model: transformers' model in float32, experts by its own loop over them; its weights are replaced.
        linears: those that are quantized; each is made of the transformed weight, in the order of the module's rows.
        names: by their names, what files of theirs are called.
        ids: text, int32 ``[sequences, length]``, which goes through the model at once; None rounds to nearest.
        bits: of activations, 4 or 8.
        target: a directory, see :class:`Quantizer`.
        progress: one stage, a unit a matrix.

    Raises:
        QuantizeError: weights or inputs that cannot be.
    """
    target.mkdir(exist_ok=True)
    weights = {model.get_parameter(linear.name): linear for linear in linears}
    with progress.stage("quantize", sum(linear.count for linear in weights.values())) as stage, torch.no_grad():
        quantizer = Quantizer(target, weights, names, bits, stage)
        if ids is not None:
            many = {weight for weight, linear in weights.items() if linear.experts is not None}
            hooks = [
                module.register_forward_pre_hook(quantizer.experts, with_kwargs=True)
                for module in model.modules()
                if many.intersection(module.parameters(recurse=False))
            ]
            try:
                device = next(model.parameters()).device
                with Products(weights, quantizer.read):
                    # the body alone: of so many tokens logits would be gigabytes
                    model.base_model(torch.from_numpy(ids.astype(np.int64)).to(device), use_cache=False)
            finally:
                for hook in hooks:
                    hook.remove()
        for weight, linear in weights.items():
            # what no token of the text reached, too
            quantizer.to_nearest(linear, weight)
        if quantizer.starved:
            progress.tell(f"{quantizer.starved} experts of layers use other tokens too: fewer than {FEWEST_TOKENS} of their own")


def _transformed(matrix: Tensor) -> Tensor:
    return rotated(matrix.double().contiguous(), kt4.BLOCK).float()


def _hessian(x: Tensor, importance: Tensor | None = None) -> Tensor:
    """Σ x xᵀ over tokens, each as often as it matters."""
    flat = x.reshape(-1, x.shape[-1])
    each = None if importance is None else importance[:, None].to(flat.dtype)
    found = torch.zeros(x.shape[-1], x.shape[-1], device=x.device)
    for start in range(0, len(flat), _TOKENS):
        part = flat[start : start + _TOKENS]
        found.addmm_(part.T, part if each is None else part * each[start : start + _TOKENS])
    return found
