"""In which type a calibration pass multiplies by weights: bfloat16 on a GPU that has it, single precision elsewhere.

Only the products with a layer's linears are in bfloat16, inputs and weights rounded to it, sums kept in single precision
by the hardware and rounded once. What lies between them stays in single precision: the residual stream, norms and their
statistics, rotary embedding, attention with its softmax, routers, and all that is measured or quantized: samples,
kurtosis, Hessians, the search for scales, GPTQ.

Passes that are a yardstick, or that gradients go through, are in single precision everywhere: the unquantized model's
answers, tuning, SpinQuant.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kurtail_gguf.machine.memory import card_module, is_card
from kurtail_gguf.model.spec import ModelSpec


def forward_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the GPU multiplies it by itself (from Ampere on), else float32."""
    if is_card(device) and card_module(device).is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def multiply_in(layers: Iterable[nn.Module], spec: ModelSpec, dtype: torch.dtype) -> None:
    """Let the linears of decoder layers take float32 inputs and give float32 outputs while their weights are ``dtype``.

    Args:
        layers: transformers' modules.
        spec: names of the experts, which are no linears there. A router is none either, and stays in single precision.
        dtype: as :func:`forward_dtype` gives it; nothing is hung on for float32.
    """
    if dtype == torch.float32:
        return

    def narrow(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return inputs[0].to(dtype), *inputs[1:]

    def widen(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output.float()

    for number, layer in enumerate(layers):
        kept = spec.at(number).unquantized_readers
        linears = [module for name, module in layer.named_modules() if isinstance(module, nn.Linear) and name not in kept]
        if spec.at(number).experts:
            linears.append(layer.get_submodule(f"{spec.family.experts.block}.experts"))
        for linear in linears:
            linear.register_forward_pre_hook(narrow)
            linear.register_forward_hook(widen)


def linear(x: Tensor, weight: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """``x Wᵀ + b`` multiplied in ``dtype``, float32 ``[…, out]``.

    Args:
        x: float32 ``[…, in]``.
        weight: any float type, ``[out, in]``.
        dtype: as :func:`forward_dtype` gives it.
        bias: ``[out]`` or None; added in single precision.
    """
    if dtype == torch.float32:
        return nn.functional.linear(x, weight.float(), None if bias is None else bias.float())
    product = nn.functional.linear(x.to(dtype), weight.to(dtype)).float()
    return product if bias is None else product + bias.float()
