"""The quantized model in torch, differentiable in its block scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from kurtail_gguf.model.loading.checkpoint import Checkpoint
from kurtail_gguf.model.loading.experts import module_of
from kurtail_gguf.model.precision import narrow_inside
from kurtail_gguf.model.runner import LayerRunner
from kurtail_gguf.numerics.simulation.attention import rotated
from kurtail_gguf.numerics.simulation.hooks import round_input
from kurtail_gguf.numerics.simulation.runtime import RuntimeRounding
from kurtail_gguf.numerics.simulation.straight_through import round_through

#: ``rounded(x, weight, bits, block)``: a linear's input, rounded, with the gradient of the identity; ``weight`` is the
#: full name of its weight.
Rounded = Callable[[Tensor, str, int, int], Tensor]


@dataclass(frozen=True, eq=False, slots=True)
class QuantizedLayer:
    """One layer's tensors by name below the layer's prefix, on the device they are used on.

    Args:
        codes: answers with the linears' codes, int8 ``[out, in]``, by the linears' names; asked whenever the layer runs.
        scales: by the same names, float32 ``[out, in/block]``.
        rest: norms and biases, float32, by their own names.
    """

    codes: Callable[[], dict[str, Tensor]]
    scales: dict[str, Tensor]
    rest: dict[str, Tensor]


class Student:
    """The file's layers over transformers' own modules, rounding what the runtime rounds.

    Codes become weights only while their layer runs. With ``recompute`` what a layer computes is computed again in the
    backward pass; memory is then one layer, the scales of all with what the optimiser keeps of them, the residual
    stream at every layer, and the codes if what answers with them keeps them. Without it weights and activations of all
    layers are kept as well, and a step is a quarter faster.

    Args:
        checkpoint: the model's shapes and configuration.
        layers: what the file holds.
        rounding: what the runtime rounds.
        device: where to compute.
        length: of the longest sequence.
        recompute: trade time for memory.
        rounded: what rounds the inputs of the linears; ``rounding``'s own with straight-through gradients if None.
        products: what linears without a bias multiply in, forwards and backwards; sums and all else are in single precision.
            In bfloat16 a weight or input is off by 1/512 of itself at most, where rounding to 4 bits is by a tenth.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layers: list[QuantizedLayer],
        rounding: RuntimeRounding,
        device: torch.device,
        length: int,
        recompute: bool = True,
        rounded: Rounded | None = None,
        products: torch.dtype = torch.float32,
    ) -> None:
        self._recompute = recompute
        self._spec, self.layers = checkpoint.spec, layers
        self._rounding, self._own_rounded = rounding, rounded is not None
        self._rounded = rounded or (lambda x, _weight, bits, block: round_through(x, bits, block, rounding.rounded))
        self._runner = LayerRunner(checkpoint, device, length, rounding.cache, single=True)
        self._positions = self._runner.positions(length)
        self._products = products
        #: By layers, online transforms of what linears read, and which of these are experts'.
        self._online: list[dict[str, int]] = []
        self._of_experts: list[frozenset[str]] = []
        for number in range(checkpoint.spec.layers):
            module, spec = self._runner.module(number), checkpoint.spec.at(number)
            self._online.append({name: rounding.online_of(site.kind) for site in spec.sites for name in site.readers})
            self._of_experts.append(spec.expert_linears)
            for site in spec.sites:
                self._hang(number, module, [name for name in site.readers if name not in self._of_experts[-1]])

    def _hang(self, number: int, module: nn.Module, readers: list[str]) -> None:
        """Let the linears of a site see their input as the runtime's do."""
        if not readers:
            return
        weights = [f"{self._spec.layer_prefix(number)}{name}.weight" for name in readers]
        online, alike = self._online[number][readers[0]], len({self._rounding.bits_of(weight) for weight in weights}) == 1
        # made once for all that read it, unless each is rounded in its own way
        shared = _Once(self._rounds(number, readers[0]), online) if alike and not self._own_rounded else None
        # gate and up may be one linear of the module
        for place, name in {module_of(self._spec.at(number), name): name for name in readers}.items():
            linear = module.get_submodule(place)
            if shared is None:
                round_input(linear, self._rounds(number, name), online)
            else:
                round_input(linear, shared)
            if self._multiplied_in(number, name) != torch.float32:
                narrow_inside(linear, self._products)

    @property
    def scales(self) -> list[dict[str, Tensor]]:
        """Each layer's scales, to be learned in place."""
        return [layer.scales for layer in self.layers]

    def hidden(self, embedded: Tensor) -> Tensor:
        """The residual stream behind the last layer, ``[batch, length, hidden]``, from embeddings of that shape."""
        hidden = embedded.requires_grad_()  # so that recomputation has something to start from
        for number, layer in enumerate(self.layers):
            arguments = number, list(layer.scales), hidden, *layer.scales.values()
            hidden = recomputed(self._layer, *arguments, use_reentrant=False) if self._recompute else self._layer(*arguments)
        return hidden

    def _layer(self, layer: int, names: list[str], hidden: Tensor, *scales: Tensor) -> Tensor:
        codes = self.layers[layer].codes()
        each = dict(zip(names, scales, strict=True))
        weights = {
            f"{name}.weight": _Scaled.apply(codes[name], scale, self._multiplied_in(layer, name))
            for name, scale in each.items()
            if name not in self._of_experts[layer]
        }
        weights |= self.layers[layer].rest
        return self._runner.run(layer, weights, hidden, self._positions, self._experts(layer, codes, each))

    def _experts(self, layer: int, codes: dict[str, Tensor], scales: dict[str, Tensor]) -> Callable[[str, Tensor], Tensor]:
        """What multiplies by an expert's linears: weights of one of them at a time are there, now and going backward."""

        def linear(name: str, x: Tensor) -> Tensor:
            x = self._rounds(layer, name)(rotated(x, self._online[layer][name]))
            return _Product.apply(x, codes[name], scales[name], self._multiplied_in(layer, name))

        return linear

    def _multiplied_in(self, layer: int, name: str) -> torch.dtype:
        return torch.float32 if f"{name}.bias" in self.layers[layer].rest else self._products

    def _rounds(self, layer: int, name: str) -> Callable[[Tensor], Tensor]:
        weight = f"{self._spec.layer_prefix(layer)}{name}.weight"
        bits, block = self._rounding.bits_of(weight), self._rounding.activation_block
        return lambda x: self._rounded(x, weight, bits, block)


class _Once:
    """Transforms and rounds a tensor, the same one only once."""

    def __init__(self, rounds: Callable[[Tensor], Tensor], online: int) -> None:
        self._rounds, self._online = rounds, online
        self._seen: Tensor | None = None
        self._made: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._seen is not x:
            self._seen, self._made = x, self._rounds(rotated(x, self._online))
        assert self._made is not None
        return self._made


class _Scaled(torch.autograd.Function):
    """Codes times block scales; autograd by itself would keep the codes as floating-point numbers."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.blocks, ctx.summed = scales.shape, scales.dtype
        return _weight(codes, scales, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        (codes,) = ctx.saved_tensors
        return None, _of_scales(gradient, codes, ctx.blocks, ctx.summed), None


class _Product(torch.autograd.Function):
    """``x Wᵀ`` with W of codes and scales; W itself is kept no longer than either pass needs it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        narrow = x.to(dtype)
        ctx.save_for_backward(narrow, codes, scales)
        ctx.dtype = dtype
        return (narrow @ _weight(codes, scales, dtype).T).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor, None]:
        x, codes, scales = ctx.saved_tensors
        narrow = gradient.to(ctx.dtype)
        below = (narrow @ _weight(codes, scales, ctx.dtype)).to(gradient.dtype)
        return below, None, _of_scales(narrow.T @ x, codes, scales.shape, scales.dtype), None


def _weight(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return (codes.reshape(*scales.shape, -1) * scales[..., None]).reshape(codes.shape).to(dtype)


def _of_scales(gradient: Tensor, codes: Tensor, blocks: torch.Size, dtype: torch.dtype) -> Tensor:
    """The gradient by scales ``blocks`` of that by the weights, ``[out, in]``."""
    return (gradient.to(dtype) * codes).reshape(*blocks, -1).sum(-1)
