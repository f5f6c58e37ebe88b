"""From the residual stream behind the last layer to logits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kurtail_gguf.model.loading.checkpoint import Checkpoint
from kurtail_gguf.model.spec import ModelSpec


class Ending:
    """The final norm, and what is done to the products with the head; those are up to the caller, as the head is large.

    Args:
        spec: sizes and roles.
        tensors: the final norm's and the head's bias, by the names of ``spec.top_shapes()``; others are not looked at.
        device: where to compute.
    """

    def __init__(self, spec: ModelSpec, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self._spec = spec
        self._tensors = {name: tensors[name].to(device) for name in spec.ending}
        self._bias = self._tensors.get(f"{spec.family.head}.bias")

    @classmethod
    def of(cls, checkpoint: Checkpoint, device: torch.device) -> Ending:
        """The model's own; the norm is checked for NaN."""
        spec = checkpoint.spec
        return cls(spec, {name: checkpoint.tensor(name, check=True) for name in spec.ending}, device)

    def normed(self, hidden: Tensor) -> Tensor:
        """What the head reads, float32 ``[…, hidden]``."""
        family = self._spec.family
        return family.norm.apply(hidden, self._tensors, family.final_norm, self._spec.eps)

    def logits(self, products: Tensor) -> Tensor:
        """Logits ``[…, vocab]`` of what :meth:`normed` gave times the head's rows."""
        spec = self._spec
        if self._bias is not None:
            products = products + self._bias.to(products.dtype)
        if spec.logit_divisor != 1:
            products = products / spec.logit_divisor
        return torch.tanh(products / spec.logit_cap) * spec.logit_cap if spec.logit_cap else products

    def back(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """A gradient by logits as one by the products."""
        cap = self._spec.logit_cap
        if cap:
            gradient = gradient * (1 - (logits / cap).square())
        return gradient / self._spec.logit_divisor
