"""What a file says in the runtime, beside what its model says and with the file's own cache."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from kurtail_gguf.messages.errors import Differs
from kurtail_gguf.messages.progress import Progress, Stage
from kurtail_gguf.method.calibration.prose import TOKENS, prose_tokens
from kurtail_gguf.method.calibration.tokens import load_tokenizer
from kurtail_gguf.method.fold.layer import LayerTransforms, fold_layer
from kurtail_gguf.model.ending import Ending
from kurtail_gguf.model.loading.checkpoint import Checkpoint
from kurtail_gguf.model.runner import LayerRunner
from kurtail_gguf.runtime.cache_types import CACHE_BITS, F16, FILE
from kurtail_gguf.runtime.logits import mean_divergence, runtime_log_probabilities
from kurtail_gguf.runtime.provenance import Provenance

#: Divergence in nats a token that single precision accounts for.
SAME = 1e-5
#: Divergence of a quantized file as a share of that from what is said at the next position.
NEARER = 0.5
#: Divergence in nats a token that a file's cache may cause beyond what an f16 cache does: twice the most of good ones (0.19, in a
#: random model of two layers with 4-bit activations). Qwen2.5-Coder-0.5B with keys in 4 bits as they come is at 1.8.
CACHE_COST = 0.4


class RuntimeChecks:
    """Checks of what a file says to a page of prose; what both need is computed once.

    Args:
        checkpoint: the model; None for one that no family describes, whose tokens are given.
        path: the file.
        provenance: what the file says of itself.
        progress: a stage for each check.
        ids: tokens of a text; None for a page of prose.
    """

    def __init__(
        self, checkpoint: Checkpoint | None, path: Path, provenance: Provenance, progress: Progress, ids: list[int] | None = None
    ) -> None:
        self._checkpoint, self._path, self._provenance, self._progress = checkpoint, path, provenance, progress
        self._given = ids

    def logits(self, transforms: list[LayerTransforms]) -> str:
        """Original to rotated within single precision, rotated to the file by what its types account for.

        The cache is exact here: :meth:`cache` is about the file's own.

        Args:
            transforms: of each layer.

        Returns:
            What was found.

        Raises:
            Differs: what is wrong.
        """
        assert self._checkpoint is not None
        with self._progress.stage("compare logits", 2 * self._checkpoint.spec.layers + 1) as stage:
            original = _said(self._checkpoint, self._ids, None, stage)
            turned = _said(self._checkpoint, self._ids, transforms, stage)
            _ = self._exact
            stage.advance(1, "the file in the runtime")
        folding = mean_divergence(original, turned)
        if not folding <= SAME:
            raise Differs(f"the rotated weights give other predictions than the original ones: divergence {folding:.3g} nats")
        return f"{len(self._ids)} tokens; divergence of rotated from original {abs(folding):.1e}, of the file {self.nearness(original)}"

    def nearness(self, original: npt.NDArray[np.float32]) -> str:
        """What the file says is what the model says, but for what its types account for.

        Args:
            original: log-probabilities of the model ``[tokens, vocabulary]``.

        Returns:
            The divergence, and how often the top token is the same.

        Raises:
            Differs: it is something else.
        """
        found = self._exact
        whole = mean_divergence(original, found)
        different = f"the file's predictions differ from the original's: divergence {whole:.3g} nats"
        if self._provenance.weights == "f32" and not whole <= SAME:
            raise Differs(f"{different}, expected at most {SAME:g}")
        elsewhere = mean_divergence(original, np.roll(found, 1, axis=0))
        if not whole <= NEARER * elsewhere:
            raise Differs(f"{different}, against {elsewhere:.3g} from its own at the next position")
        agree = float((original.argmax(-1) == found.argmax(-1)).mean())
        return f"{whole:.3g} nats; the top token is the same for {agree:.0%}"

    def cache(self) -> str:
        """The file's own cache leaves what it says nearly as an f16 cache does.

        Both are compared with an exact cache. 4-bit activations turn the least change of a key into roundings the other
        way, which in a deep model moves what is said by as much as a good 4-bit cache does. That is the model's, not the
        cache's, and f16 tells how much it is.

        Raises:
            Differs: the cache is bad.
        """
        unrounded = self._provenance.kv_bits == CACHE_BITS[F16]
        names = [FILE] if unrounded else [FILE, F16]
        with self._progress.stage("compare caches", len(names)) as stage:
            costs = {}
            for name in names:
                costs[name] = mean_divergence(self._exact, runtime_log_probabilities(self._path, [self._ids], cache=name))
                stage.advance(1, name)
        own, half = costs[FILE], costs.get(F16, costs[FILE])
        compared = f"divergence from an exact cache {own:.3g} nats" + ("" if unrounded else f", of an f16 cache {half:.3g}")
        if not own <= half + CACHE_COST:
            raise Differs(
                f"the file's own cache ({self._provenance.cache_as}) changes its predictions: {compared}, expected at most "
                f"{half + CACHE_COST:.2g}: convert the model again, or run the file with -ctk q8_0 -ctv q8_0 (or f16)"
            )
        return f"{self._provenance.cache_as}; {compared}"

    @cached_property
    def _ids(self) -> list[int]:
        if self._given is not None:
            return self._given
        checkpoint = self._checkpoint
        assert checkpoint is not None
        limit = min(TOKENS, checkpoint.spec.window or TOKENS, checkpoint.config.max_position_embeddings)
        return prose_tokens(load_tokenizer(checkpoint.directory), limit)[0].tolist()

    @cached_property
    def _exact(self) -> npt.NDArray[np.float32]:
        return runtime_log_probabilities(self._path, [self._ids], exact_cache=True)


def _said(
    checkpoint: Checkpoint, ids: list[int], transforms: list[LayerTransforms] | None, stage: Stage
) -> npt.NDArray[np.float32]:
    """Log-probabilities ``[tokens, vocabulary]`` in torch, of the model as it is or folded (online transforms left out on both sides)."""
    spec, device = checkpoint.spec, torch.device("cpu")
    r1 = None if transforms is None else transforms[0].r1  # all layers'
    runner = LayerRunner(checkpoint, device, len(ids))
    positions = runner.positions(len(ids))
    ending = Ending.of(checkpoint, device)
    with torch.inference_mode():
        hidden = runner.embed(torch.tensor(ids))[None]
        if r1 is not None:
            hidden = (hidden.double() @ r1).float()
        for layer in range(spec.layers):
            weights = checkpoint.layer(layer)
            if transforms is not None:
                folded = fold_layer(weights, spec.at(layer), replace(transforms[layer], online={}))
                weights = {name: value.float() for name, value in folded.items()}
            hidden = runner.run(layer, weights, hidden, positions)
            stage.advance(1, f"layer {layer}, {'original' if transforms is None else 'transformed'}")
        if r1 is not None:
            hidden = (hidden.double() @ r1.T).float()
        normed = ending.normed(hidden[0])
        products = torch.cat([normed @ rows.T for _, rows in checkpoint.rows(checkpoint.head_name)], -1)
        return torch.log_softmax(ending.logits(products), -1).numpy()

