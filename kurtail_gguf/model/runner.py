"""One decoder layer at a time: transformers' own modules, weights passed in for the one call."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch.func import functional_call

from kurtail_gguf.messages.errors import SourceError
from kurtail_gguf.model.loading.checkpoint import Checkpoint
from kurtail_gguf.model.loading.experts import Linear, Watch, module_weights, single_experts
from kurtail_gguf.model.precision import linear as product
from kurtail_gguf.model.precision import multiply_in
from kurtail_gguf.numerics.simulation.attention import CacheSettings
from kurtail_gguf.numerics.simulation.hooks import empty_model


@dataclass(frozen=True, eq=False, slots=True)
class Positions:
    """Where tokens stand, for the attention of every layer.

    Args:
        turned: by layer, cosines and sines of RoPE, float32 ``[1, length, rotary_dim]`` each.
        masks: by layer, see :meth:`LayerRunner.positions`; None where attention is causal and nothing else.
        numbers: int64 ``[1, length]``.
    """

    turned: list[tuple[torch.Tensor, torch.Tensor]]
    masks: list[torch.Tensor | None]
    numbers: torch.Tensor

    def arguments(self, layer: int) -> dict[str, Any]:
        """For the layer's module, or its attention alone."""
        return {"position_embeddings": self.turned[layer], "attention_mask": self.masks[layer], "position_ids": self.numbers}


class LayerRunner:
    """Runs single layers of a checkpoint without ever holding more than one layer's weights.

    The modules live on torch's meta device and stay without storage; ``functional_call`` lends them
    the tensors of the layer being run. Attention is causal by itself where it is given no mask; one is given where a
    layer's window is shorter than what it attends to.

    Args:
        checkpoint: the model.
        device: where the layers are computed.
        max_length: the longest sequence that will be run.
        cache: rounds queries, keys and values as the runtime does; None leaves them alone.
        multiplied_in: what the linears multiply in, everything else being float32 (``model/precision.py``).
        single: whether experts are multiplied one linear after the other.

    Raises:
        SourceError: a sliding window shorter than that which the runtime does not have.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        max_length: int,
        cache: CacheSettings | None = None,
        multiplied_in: torch.dtype = torch.float32,
        single: bool = False,
    ) -> None:
        window = checkpoint.spec.window
        if window and window < max_length:
            raise SourceError(
                f"{checkpoint.directory}: sliding_window {window} is below the calibration length "
                f"{max_length}"
            )
        model = empty_model(checkpoint.config, cache)
        self._checkpoint = checkpoint
        self._device = device
        self._layers = model.model.layers.eval()
        self._multiplied_in, self._single = multiplied_in, single
        self._linears = frozenset(name for kind in checkpoint.spec.kinds_of_layers for name in kind.linears)
        multiply_in(self._layers, checkpoint.spec, multiplied_in)
        # behind that: what multiplies by single experts takes care of its types itself
        each = map(checkpoint.spec.at, range(checkpoint.spec.layers))
        self._experts = list(map(single_experts, each, self._layers)) if single else []
        # Rotary frequencies are computed, not stored, so this one module must be real.
        self._rotary = type(model.model.rotary_emb)(config=model.config).to(device)
        kinds = getattr(model.config, "layer_types", None) or []
        # Gemma 3 and Olmo 3 turn layers with windows by other frequencies
        self._kinds = kinds if "layer_type" in signature(self._rotary.forward).parameters else []
        self._windows = [checkpoint.spec.window_of(layer) for layer in range(checkpoint.spec.layers)]

    def dtype_of(self, name: str) -> torch.dtype:
        """What :meth:`run` wants a layer's tensor in, by its name below the layer's prefix: biases as their linears."""
        return self._multiplied_in if name.rpartition(".")[0] in self._linears else torch.float32

    def module(self, layer: int) -> torch.nn.Module:
        """The layer's module, to hang hooks on (weights on the meta device)."""
        return self._layers[layer]

    def positions(self, length: int) -> Positions:
        """What attention has to know of the first positions."""
        numbers = torch.arange(length, device=self._device)[None]
        empty = torch.empty(0, device=self._device)
        if self._kinds:
            each = {kind: self._rotary(empty, numbers, kind) for kind in set(self._kinds)}
            turned = [each[kind] for kind in self._kinds]
        else:
            turned = [self._rotary(empty, numbers)] * len(self._windows)
        masks = {window: _mask(length, window, self._device) for window in set(self._windows)}
        return Positions(turned, [masks[window] for window in self._windows], numbers)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """What token ids int64 ``[…]`` put on the residual stream, float32 ``[…, hidden]``; only their rows are read."""
        table = self._checkpoint.tensor(f"{self._checkpoint.spec.family.embedding}.weight")
        return table[ids.cpu()].to(device=self._device, dtype=torch.float32) * self._checkpoint.spec.embedding_scale

    def run(
        self,
        layer: int,
        weights: dict[str, torch.Tensor],
        hidden: torch.Tensor,
        positions: Positions,
        linear: Linear | None = None,
        watch: Watch | None = None,
    ) -> torch.Tensor:
        """The layer's output, float32 ``[batch, length, hidden]``, for an input of the same shape.

        Args:
            layer: layer number.
            weights: as :meth:`Checkpoint.layer` gives them with :meth:`dtype_of`.
            hidden: residual stream before the layer.
            positions: as :meth:`positions` gives them for ``hidden``.
            linear: what multiplies by single experts' linears; None for their weights among ``weights``.
            watch: told of what single experts read.
        """
        experts = self._experts[layer] if self._single else None
        own = module_weights(self._checkpoint.spec.at(layer), weights, self._single)
        # lent for the pass: it holds a layer's weights
        multiplied = linear or (lambda name, x: product(x, weights[f"{name}.weight"], self._multiplied_in))
        with nullcontext() if experts is None else experts.lent(multiplied, watch):
            output = functional_call(self._layers[layer], own, (hidden,), positions.arguments(layer))
        return output[0] if isinstance(output, tuple) else output


def _mask(length: int, window: int, device: torch.device) -> torch.Tensor | None:
    """Which of the tokens before it and itself each token attends to, bool ``[1, 1, length, length]``; None for all."""
    if not window or length <= window:
        return None
    numbers = torch.arange(length, device=device)
    own = numbers[:, None]
    return ((numbers <= own) & (numbers > own - window))[None, None]
