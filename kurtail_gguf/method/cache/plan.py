"""The stage of a conversion that decides on the cache: how keys are prepared, bits of each layer, and what it costs."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save_file

from kurtail_gguf.files.atomic import replacing, write_atomically
from kurtail_gguf.messages.errors import SourceError
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.method.cache.choice import LIMIT, CacheBits, choose_bits, uniform
from kurtail_gguf.method.cache.streams import CacheCost, Streams
from kurtail_gguf.model.loading.checkpoint import Checkpoint
from kurtail_gguf.model.names import file_rows
from kurtail_gguf.model.spec import ModelSpec
from kurtail_gguf.numerics.simulation.attention import CacheSettings, LayerCache

#: Fewest tokens of a sequence: the first four are left out of statistics.
_FEWEST = 8
#: Sequences that keys are prepared on and damage is measured on, and as many others that the cost is measured on.
SEQUENCES = 4


@dataclass(frozen=True, slots=True)
class CachePlan:
    """What was decided.

    Args:
        bits: of each layer.
        scales: of keys, float64 ``[layers, kv_heads, head_dim]`` (fold/layer.py), or None.
        offsets: that keys are stored without, float32 of the same shape, or None.
        damages: nats a token that each layer's keys and values cause at 4 bits; empty where they were not asked for.
        cost: of the whole cache, on tokens that nothing was decided on; None where nothing is rounded.
    """

    bits: CacheBits
    scales: npt.NDArray[np.float64] | None = None
    offsets: npt.NDArray[np.float32] | None = None
    damages: dict[str, float] | None = None
    cost: CacheCost | None = None

    def layers(self) -> tuple[LayerCache, ...]:
        """For the simulation."""
        offsets = [None] * len(self.bits.k) if self.offsets is None else [
            torch.from_numpy(offset) if offset.any() else None for offset in self.offsets
        ]  # fmt: skip
        return tuple(LayerCache(*each) for each in zip(self.bits.k, self.bits.v, offsets, strict=True))

    def offsets_in_file(self, spec: ModelSpec) -> list[float] | None:
        """``kurtail.kv.k_offset``: layer by layer, in the order of the file's rows of k; None without offsets."""
        if self.offsets is None:
            return None
        return np.concatenate([file_rows(spec, spec.family.key, own.reshape(-1)) for own in self.offsets]).tolist()

    @property
    def warning(self) -> str | None:
        """One line on layers whose 4 bits do more damage than ``auto`` allows; None where there are none."""
        worst = [name for name, damage in (self.damages or {}).items() if damage > LIMIT and self._bits(name) == 4]
        if not worst:
            return None
        layers = ", ".join(f"{'K' if name[0] == 'k' else 'V'} of layer {name[1:]}" for name in worst)
        return (
            f"the 4-bit cache harms this model ({layers} alone cost more than {LIMIT} nats per token): --kv auto gives them 8 "
            "bits"
        )

    def _bits(self, name: str) -> int:
        return (self.bits.k if name[0] == "k" else self.bits.v)[int(name[1:])]


def plan_cache(
    checkpoint: Checkpoint,
    ids: npt.NDArray[np.int32],
    kv: int | str,
    budget: float,
    r2: npt.NDArray[np.float64] | None,
    cache: CacheSettings,
    work_dir: Path,
    device: torch.device,
    progress: Progress,
) -> CachePlan:
    """Decide, or take over what an earlier run decided.

    Args:
        checkpoint: the model.
        ids: tokens, int32 ``[sequences, length]``; the first and the last few are used.
        kv: bits everywhere, or ``auto``.
        budget: bits of a value on average that ``auto`` may spend.
        r2: what will be folded into values.
        cache: what the runtime will do to queries, keys and values.
        work_dir: where the result is kept.
        device: where to compute.
        progress: stages of measuring.

    Raises:
        SourceError: a sliding window that leaves too few tokens.
    """
    layers = checkpoint.spec.layers
    if kv == 16:
        return CachePlan(uniform(16, layers))
    path, scratch = work_dir / "cache.json", work_dir / "measuring-cache"
    if path.exists():
        # of a run that ended between the two
        shutil.rmtree(scratch, ignore_errors=True)
        return _load(path)
    learned, held = _split(ids, checkpoint.spec.window)
    if learned.shape[1] < _FEWEST:
        window = f", sliding_window is {checkpoint.spec.window}" if checkpoint.spec.window else ""
        raise SourceError(
            f"{checkpoint.directory}: {learned.shape[1]} tokens are too few to measure the cache on{window}: give --kv 16"
        )
    scratch.mkdir(exist_ok=True)
    start = uniform(4 if kv == "auto" else int(kv), layers)
    streams = Streams(checkpoint, learned, r2, cache, scratch, device)
    layer_caches = CachePlan(start).layers()
    conditioned = streams.forward(layer_caches, None, "prepare keys", progress)
    damages = {} if kv == 8 else streams.damages(layer_caches, conditioned, progress)
    bits = choose_bits(damages, layers, budget) if kv == "auto" else start
    plan = CachePlan(bits)
    held_streams = Streams(checkpoint, held, r2, cache, scratch, device)
    held_streams.forward(plan.layers(), conditioned, "measure the cache", progress)
    cost = held_streams.cost()
    offsets = np.stack([one.offset.numpy() for one in conditioned])
    plan = CachePlan(bits, np.stack([one.scale.numpy() for one in conditioned]), offsets if offsets.any() else None, damages, cost)
    _save(plan, path)
    shutil.rmtree(scratch)
    return plan


def _split(ids: npt.NDArray[np.int32], window: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Sequences to decide on and others to measure on; halves of one where there is only that."""
    if window:
        ids = ids[:, :window]
    if len(ids) == 1:
        half = ids.shape[1] // 2
        return ids[:, :half], ids[:, half : 2 * half]
    count = min(SEQUENCES, len(ids) // 2)
    return ids[:count], ids[-count:]


def _save(plan: CachePlan, path: Path) -> None:
    arrays = {"scales": plan.scales} | ({} if plan.offsets is None else {"offsets": plan.offsets})
    with replacing(path.with_suffix(".safetensors")) as scratch:
        save_file(arrays, scratch)
    told = {"bits": asdict(plan.bits), "damages": plan.damages, "cost": None if plan.cost is None else asdict(plan.cost)}
    write_atomically(path, json.dumps(told, indent=2) + "\n")


def _load(path: Path) -> CachePlan:
    told = json.loads(path.read_text(encoding="utf-8"))
    arrays = load_file(path.with_suffix(".safetensors"))
    bits = CacheBits(*(tuple(told["bits"][name]) for name in ("k", "v", "forced")))
    return CachePlan(bits, arrays["scales"], arrays.get("offsets"), told["damages"], CacheCost(**told["cost"]))

