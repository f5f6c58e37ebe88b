"""In which type a pass multiplies by weights: bfloat16 on a GPU that has it, in tuning on a CPU that has it too, single
precision elsewhere.

Only the products with a layer's linears are in bfloat16, inputs and weights rounded to it, sums kept in single precision
by the hardware and rounded once. What lies between them stays in single precision: the residual stream, norms and their
statistics, rotary embedding, attention with its softmax, routers, and all that is measured or quantized: samples,
kurtosis, Hessians, the search for scales, GPTQ.

Passes that are a yardstick are in single precision everywhere, and so is SpinQuant: the unquantized model's answers.
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


def tuning_dtype(device: torch.device) -> torch.dtype:
    """:func:`forward_dtype`, and bfloat16 on CPUs that multiply it several times as fast as single precision: those with
    AVX512-BF16 or AMX (Zen 4: 470 and 105 GFLOP/s a core). Without them torch imitates it, slowly."""
    if device.type != "cpu":
        return forward_dtype(device)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # newer than the oldest torch that is supported
    fast = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    return torch.bfloat16 if fast else torch.float32


def multiply_in(layers: Iterable[nn.Module], spec: ModelSpec, dtype: torch.dtype) -> None:
    """Let the linears of decoder layers take float32 inputs and give float32 outputs while their weights are ``dtype``.

    Args:
        layers: transformers' modules.
        spec: names of the experts, which are no linears there. A router is none either, and stays in single precision.
        dtype: as :func:`forward_dtype` gives it; nothing is hung on for float32.
    """
    if dtype == torch.float32:
        return
    for number, layer in enumerate(layers):
        kept = spec.at(number).unquantized_readers
        linears = [module for name, module in layer.named_modules() if isinstance(module, nn.Linear) and name not in kept]
        if spec.at(number).experts:
            linears.append(layer.get_submodule(f"{spec.family.experts.block}.experts"))
        for linear in linears:
            narrow_inside(linear, dtype)


def narrow_inside(module: nn.Module, dtype: torch.dtype) -> None:
    """Let a module whose weights are ``dtype`` take a float32 input, after the hooks that it has, and give a float32 output."""

    def narrow(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return inputs[0].to(dtype), *inputs[1:]

    def widen(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output.float()

    module.register_forward_pre_hook(narrow)
    module.register_forward_hook(widen)


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
