"""The unquantized model, and beside it the same with a rounded cache, over the same tokens and layer by layer.

Nothing else is rounded, so how far the two are apart is what the cache alone costs. Going back through the layers with the
gradient of that divergence tells whose keys and values it comes from (distill/damage.py: Σ⟨g, e⟩ over the rounding errors e
is twice what an error contributes). One layer's weights are in memory at a time; inputs of all layers lie in a file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kurtail_gguf.files.row_file import RowFile
from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.method.activations.damage import DamageMeter
from kurtail_gguf.method.cache.condition import POSITIONS, Conditioned, KeyWatcher, condition, turned_positions
from kurtail_gguf.method.fold.layer import fold_attention
from kurtail_gguf.model.ending import Ending
from kurtail_gguf.model.loading.checkpoint import Checkpoint
from kurtail_gguf.model.loading.prefetch import layer_stream
from kurtail_gguf.model.runner import LayerRunner
from kurtail_gguf.numerics.simulation.attention import CacheSettings, LayerCache
from kurtail_gguf.numerics.simulation.hooks import round_cache

#: Tokens whose logits are in memory at a time.
LOGIT_TOKENS = 256


@dataclass(frozen=True, slots=True)
class CacheCost:
    """What a cache alone costs, over the tokens it was measured on.

    Args:
        divergence: mean KL(unrounded ‖ rounded cache), nats a token.
        perplexity: of the rounded cache, divided by that without rounding.
        tokens: how many predictions were compared.
    """

    divergence: float
    perplexity: float
    tokens: int


class Streams:
    """Both models on some tokens.

    Args:
        checkpoint: the model.
        ids: tokens, int32 ``[sequences, length]``.
        r2: what is folded into values, float64 ``[layers, kv_heads, head_dim, head_dim]``, or None.
        cache: what the runtime does to queries, keys and values; bits are given to :meth:`forward`.
        directory: where inputs of layers are kept.
        device: where to compute.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        ids: npt.NDArray[np.int32],
        r2: npt.NDArray[np.float64] | None,
        cache: CacheSettings,
        directory: Path,
        device: torch.device,
    ) -> None:
        self._checkpoint, self._ids, self._r2, self._device = checkpoint, ids, r2, device
        self._directory = directory
        length = ids.shape[1]
        self._plain = LayerRunner(checkpoint, device, length)
        self._rounded = LayerRunner(checkpoint, device, length, cache)
        self._cache = cache
        self._positions = self._plain.positions(length)
        self._turned = self._plain.positions(POSITIONS).turned
        self._ending = Ending.of(checkpoint, device)

    def forward(
        self, layers: Sequence[LayerCache], conditioned: Sequence[Conditioned] | None, name: str, progress: Progress
    ) -> list[Conditioned]:
        """Run both models.

        Args:
            layers: bits of each layer; offsets are those of ``conditioned``.
            conditioned: scales and offsets of each layer's keys; None finds them on these tokens.
            name: of the stage.
            progress: a unit a layer.

        Returns:
            ``conditioned`` or what was found.
        """
        spec = self._checkpoint.spec
        embedded = self._plain.embed(torch.from_numpy(self._ids.astype(np.int64)))
        inputs = RowFile(self._directory / "inputs.npy", (spec.layers, *embedded.shape))
        plain, rounded = embedded, embedded
        found = []
        with (
            progress.stage(name, spec.layers) as stage,
            torch.inference_mode(),
            layer_stream(self._checkpoint, range(spec.layers), self._device, check=True) as weights_of,
        ):
            for layer in range(spec.layers):
                weights = next(weights_of)
                module = self._plain.module(layer)
                with KeyWatcher(module, spec) as watcher:
                    plain = self._run(self._plain, layer, weights, plain)
                if conditioned is None:
                    turned = None if layer in spec.unturned else turned_positions(self._turned[layer])
                    found.append(condition(watcher.statistics(), spec, turned, self._cache))
                else:
                    found.append(conditioned[layer])
                inputs[layer : layer + 1] = rounded[None].cpu().numpy()
                self._set(layer, layers[layer], found[layer], self._cache)
                rounded = self._run(self._rounded, layer, self._folded(layer, weights, found[layer]), rounded)
                stage.advance(1, f"layer {layer}")
        inputs.close()
        self._last = plain, rounded
        return found

    def cost(self) -> CacheCost:
        """What the cache of the last :meth:`forward` costs.

        Raises:
            KurtailError: a divergence that is not finite.
        """
        return self._compare(with_gradient=False)[0]

    def damages(self, layers: Sequence[LayerCache], conditioned: Sequence[Conditioned], progress: Progress) -> dict[str, float]:
        """What rounding each layer's keys ("k3") and values ("v3") contributes to the divergence of :meth:`forward`.

        Returns:
            Nats a token; a little below 0 where an error happens to help.

        Raises:
            KurtailError: one that is not finite.
        """
        spec = self._checkpoint.spec
        meter = DamageMeter()
        measured = replace(self._cache, rounded=meter.rounded)
        _, gradient = self._compare(with_gradient=True)
        inputs = RowFile(self._directory / "inputs.npy")
        backwards = range(spec.layers - 1, -1, -1)
        with (
            progress.stage("measure the cache's damage", spec.layers) as stage,
            layer_stream(self._checkpoint, backwards, self._device) as weights_of,
        ):
            for layer in backwards:
                weights = self._folded(layer, next(weights_of), conditioned[layer])
                self._set(layer, layers[layer], conditioned[layer], measured)
                hidden = torch.from_numpy(inputs[layer : layer + 1][0]).to(self._device)
                gradients = []
                for one, above in zip(hidden, gradient, strict=True):
                    entered = one[None].requires_grad_()
                    self._rounded.run(layer, weights, entered, self._positions).backward(above[None])
                    gradients.append(entered.grad[0])
                gradient = torch.stack(gradients)
                stage.advance(1, f"layer {layer}")
        inputs.close()
        found = {f"{side}{layer}": meter.totals[f"{side}{layer}"] / 2 for layer in range(spec.layers) for side in "kv"}
        if unknown := [name for name, damage in found.items() if not math.isfinite(damage)]:
            raise KurtailError(f"measuring the cache: the damage of {unknown[0]} is not finite; give --kv 16")
        return found

    def _run(self, runner: LayerRunner, layer: int, weights: dict[str, Tensor], hidden: Tensor) -> Tensor:
        # a sequence at a time: the attention of all is the largest thing in memory
        return torch.cat([runner.run(layer, weights, one[None], self._positions) for one in hidden])

    def _set(self, layer: int, bits: LayerCache, conditioned: Conditioned, cache: CacheSettings) -> None:
        own = replace(bits, offset=conditioned.offset if conditioned.offset.any() else None)
        # the attention asks for its own alone
        everywhere = (own,) * self._checkpoint.spec.layers
        round_cache([self._rounded.module(layer)], replace(cache, layers=everywhere))

    def _folded(self, layer: int, weights: dict[str, Tensor], conditioned: Conditioned) -> dict[str, Tensor]:
        r2 = None if self._r2 is None else torch.from_numpy(self._r2[layer]).to(self._device)
        return fold_attention(weights, self._checkpoint.spec, r2, conditioned.scale.to(self._device))

    def _compare(self, with_gradient: bool) -> tuple[CacheCost, Tensor]:
        """How far the last hidden states are apart in the second half of each sequence, and the gradient of that mean
        divergence by the rounded ones."""
        plain, rounded = self._last
        ids = torch.from_numpy(self._ids.astype(np.int64))
        total, unlikely, predictions = 0.0, 0.0, 0
        gradient = torch.zeros_like(rounded) if with_gradient else rounded
        length = ids.shape[1]
        # as perplexity is measured everywhere: what has little to look back on tells little of a cache
        first = length // 2
        count = len(ids) * (length - first)
        for sequence in range(len(ids)):
            for start in range(first, length, LOGIT_TOKENS):
                part = slice(start, min(start + LOGIT_TOKENS, length))
                teacher = torch.log_softmax(self._logits(self._ending.normed(plain[sequence, part])), -1)
                # a leaf of its own: what was computed in inference mode has no gradient
                hidden = rounded[sequence, part].clone().requires_grad_(with_gradient)
                normed = self._ending.normed(hidden)
                logits = self._logits(normed.detach())
                student = torch.log_softmax(logits, -1)
                total += float((teacher.exp() * (teacher - student)).sum(dtype=torch.float64))
                following = ids[sequence, start + 1 : start + 1 + len(hidden)].to(self._device)[:, None]
                known = slice(0, len(following))
                lost = teacher[known].gather(1, following) - student[known].gather(1, following)
                unlikely += float(lost.sum(dtype=torch.float64))
                predictions += len(following)
                if with_gradient:
                    products = self._ending.back((student.exp() - teacher.exp()) / count, logits)
                    normed.backward(self._through_head(products))
                    gradient[sequence, part] = hidden.grad
        if not math.isfinite(total):
            raise KurtailError("measuring the cache: the divergence is not finite; give --kv 16")
        return CacheCost(total / count, math.exp(unlikely / predictions), count), gradient

    def _logits(self, normed: Tensor) -> Tensor:
        chunks = self._checkpoint.rows(self._checkpoint.head_name)
        return self._ending.logits(torch.cat([normed @ rows.to(normed).T for _, rows in chunks], -1))

    def _through_head(self, gradient: Tensor) -> Tensor:
        chunks = self._checkpoint.rows(self._checkpoint.head_name)
        return sum(gradient[:, start : start + len(rows)] @ rows.to(gradient) for start, rows in chunks)
