"""One decoder layer at a time: transformers' own modules, weights passed in for the one call."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch.func import functional_call

from kurtail_gguf.messages.errors import SourceError
from kurtail_gguf.model.loading.checkpoint import Checkpoint
from kurtail_gguf.model.loading.experts import module_weights
from kurtail_gguf.model.precision import multiply_in
from kurtail_gguf.numerics.simulation.attention import CacheSettings
from kurtail_gguf.numerics.simulation.hooks import empty_model


class LayerRunner:
    """Runs single layers of a checkpoint without ever holding more than one layer's weights.

    The modules live on torch's meta device and stay without storage; ``functional_call`` lends them
    the tensors of the layer being run. The masks are transformers' default: causal, which its SDPA
    attention does by itself when no mask is given.

    Args:
        checkpoint: the model.
        device: where the layers are computed.
        max_length: the longest sequence that will be run.
        cache: rounds queries, keys and values as the runtime does; None leaves them alone.
        multiplied_in: what the linears multiply in, everything else being float32 (``model/precision.py``).

    Raises:
        SourceError: a sliding window shorter than that, where the default mask would be wrong.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        max_length: int,
        cache: CacheSettings | None = None,
        multiplied_in: torch.dtype = torch.float32,
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
        self._multiplied_in = multiplied_in
        self._linears = frozenset(checkpoint.spec.linears)
        multiply_in(self._layers, checkpoint.spec, multiplied_in)
        # older versions of transformers call it past_key_values; newer ones warn of that name at every call
        self._cache = "cache" if "cache" in signature(self._layers[0].forward).parameters else "past_key_values"
        # Rotary frequencies are computed, not stored, so this one module must be real.
        self._rotary = type(model.model.rotary_emb)(config=model.config).to(device)

    def dtype_of(self, name: str) -> torch.dtype:
        """What :meth:`run` wants a layer's tensor in, by its name below the layer's prefix: biases as their linears."""
        return self._multiplied_in if name.rpartition(".")[0] in self._linears else torch.float32

    def module(self, layer: int) -> torch.nn.Module:
        """The layer's module, to hang hooks on (weights on the meta device)."""
        return self._layers[layer]

    def rotary(self, start: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of positions start…start+length, float32 ``[1, length, head_dim]`` each."""
        positions = torch.arange(start, start + length, device=self._device)[None]
        return self._rotary(torch.empty(0, device=self._device), positions)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """What token ids int64 ``[…]`` put on the residual stream, float32 ``[…, hidden]``; only their rows are read."""
        table = self._checkpoint.tensor(f"{self._checkpoint.spec.family.embedding}.weight")
        return table[ids.cpu()].to(device=self._device, dtype=torch.float32) * self._checkpoint.spec.embedding_scale

    def run(
        self,
        layer: int,
        weights: dict[str, torch.Tensor],
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: Any = None,
    ) -> torch.Tensor:
        """The layer's output, float32 ``[batch, length, hidden]``, for an input of the same shape.

        Args:
            layer: layer number.
            weights: as :meth:`Checkpoint.layer` gives them with :meth:`dtype_of`.
            hidden: residual stream before the layer.
            rotary: as :meth:`rotary` gives them for the positions of ``hidden``.
            cache: an object with transformers' ``update``, or None.
        """
        output = functional_call(
            self._layers[layer],
            module_weights(self._checkpoint.spec, weights),
            (hidden,),
            {"position_embeddings": rotary, "attention_mask": None} | ({} if cache is None else {self._cache: cache}),
        )
        return output[0] if isinstance(output, tuple) else output
