"""Quantizing a model's linears while a text goes through it once, each when the pass reaches it.

So every linear is fitted to what those before it, quantized already, let it read, as layer by layer elsewhere; and nothing
has to be known of what lies between them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from kurtail_gguf.files.atomic import replacing
from kurtail_gguf.messages.progress import Progress, Stage
from kurtail_gguf.method.quantize.gptq import quantize_gptq
from kurtail_gguf.method.quantize.rtn import quantize_rtn
from kurtail_gguf.model.by_itself import FoundLinear
from kurtail_gguf.numerics.formats import kt4
from kurtail_gguf.numerics.simulation.attention import rotated
from kurtail_gguf.numerics.simulation.rounding import round_to

#: Tokens whose products are summed at once.
_TOKENS = 4096


class Quantizer:
    """Quantizes linears of a model, which has the rounded weights afterwards, and keeps their packed rows in files.

    Args:
        target: a directory; ``NAME.safetensors`` with uint8 ``rows`` for each. Those that are there are taken over.
        names: by the linears' names in the model, what their files are called.
        bits: of activations.
        stage: told of each linear.
    """

    def __init__(self, target: Path, names: dict[str, str], bits: int, stage: Stage) -> None:
        self._target, self._names, self._bits, self._stage = target, names, bits, stage
        self._done: set[str] = set()
        self._read: Tensor | None = None
        self._rounded: Tensor | None = None
        self._hessian: Tensor | None = None

    def to_nearest(self, linear: FoundLinear, module: nn.Module) -> None:
        """Round a linear's weights without a text."""
        self._keep(linear, module, *quantize_rtn(_transformed(linear, module), linear.name))
        self._stage.advance(1, linear.name)

    def before(self, linear: FoundLinear, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What a linear reads, transformed and rounded; its weights are rounded, on all of it, the first time."""
        x = inputs[0]
        if self._read is not x:  # linears of one site follow each other, and are given the same tensor
            self._read, self._hessian = x, None
            self._rounded = round_to(rotated(x, kt4.BLOCK), self._bits, kt4.BLOCK)
        assert self._rounded is not None
        if linear.name not in self._done:
            self._done.add(linear.name)
            if (path := self._path(linear)).exists():
                self._put(linear, module, *kt4.unpack(load_file(path)["rows"]))
            else:
                if self._hessian is None:
                    self._hessian = _hessian(self._rounded)
                self._keep(linear, module, *quantize_gptq(_transformed(linear, module), self._hessian, linear.name))
            self._stage.advance(1, linear.name)
        return (self._rounded, *inputs[1:])

    def _path(self, linear: FoundLinear) -> Path:
        return self._target / f"{self._names[linear.name]}.safetensors"

    def _keep(self, linear: FoundLinear, module: nn.Module, codes: npt.NDArray[np.int8], scales: npt.NDArray[np.float16]) -> None:
        with replacing(self._path(linear)) as scratch:
            save_file({"rows": kt4.pack(codes, scales)}, scratch)
        self._put(linear, module, codes, scales)

    @staticmethod
    def _put(linear: FoundLinear, module: nn.Module, codes: npt.NDArray[np.int8], scales: npt.NDArray[np.float16]) -> None:
        weight = torch.from_numpy(kt4.dequantize(codes, scales)).to(module.weight.device)
        module.weight.data = weight.T.contiguous() if linear.transposed else weight


def quantize(
    model: nn.Module,
    linears: Iterable[FoundLinear],
    names: dict[str, str],
    ids: npt.NDArray[np.int32] | None,
    bits: int,
    target: Path,
    progress: Progress,
) -> None:
    """Quantize a model's linears.

    Args:
        model: transformers' model in float32; its weights are replaced.
        linears: those that are quantized; each is made of the transformed weight, in the order of the module's rows.
        names: by their names, what files of theirs are called.
        ids: text, int32 ``[sequences, length]``, which goes through the model at once; None rounds to nearest.
        bits: of activations, 4 or 8.
        target: a directory, see :class:`Quantizer`.
        progress: one stage, a unit a linear.

    Raises:
        QuantizeError: weights or inputs that cannot be.
    """
    target.mkdir(exist_ok=True)
    modules = {linear: model.get_submodule(linear.name.removesuffix(".weight")) for linear in linears}
    with progress.stage("quantize", len(modules)) as stage, torch.no_grad():
        quantizer = Quantizer(target, names, bits, stage)
        if ids is not None:
            hooks = [
                module.register_forward_pre_hook(lambda own, inputs, linear=linear: quantizer.before(linear, own, inputs))
                for linear, module in modules.items()
            ]
            try:
                device = next(model.parameters()).device
                # the body alone: of so many tokens logits would be gigabytes
                model.base_model(torch.from_numpy(ids.astype(np.int64)).to(device), use_cache=False)
            finally:
                for hook in hooks:
                    hook.remove()
        for linear, module in modules.items():
            # what no token of the text reached, too
            if not (target / f"{names[linear.name]}.safetensors").exists():
                quantizer.to_nearest(linear, module)


def _transformed(linear: FoundLinear, module: nn.Module) -> Tensor:
    weight = module.weight.T if linear.transposed else module.weight
    return rotated(weight.double().contiguous(), kt4.BLOCK).float()


def _hessian(x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    found = torch.zeros(x.shape[-1], x.shape[-1], device=x.device)
    for part in flat.split(_TOKENS):
        found.addmm_(part.T, part)
    return found
