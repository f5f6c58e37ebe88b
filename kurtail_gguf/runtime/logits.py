"""What the runtime says to given tokens, and how a vocabulary splits texts; by the bindings, in a process of their own."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.runtime import vendored
from kurtail_gguf.runtime.activation_bits import FILE_BITS
from kurtail_gguf.runtime.bindings import require_bindings
from kurtail_gguf.runtime.cache_types import FILE

_WORKER = "kurtail_gguf.runtime.logits_worker"
_LAYERS_WORKER = "kurtail_gguf.runtime.layers_worker"


def runtime_log_probabilities(
    path: Path,
    sequences: Sequence[Sequence[int]],
    exact_cache: bool = False,
    adapter: Path | None = None,
    cache: str = FILE,
    activations: str | None = FILE_BITS,
) -> npt.NDArray[np.float32]:
    """Log-probabilities of what follows each token of some sequences, each from an empty cache.

    Args:
        path: GGUF file.
        sequences: token ids, none of them empty.
        exact_cache: cache keys and values in single precision and attend in it, whatever the file asks for.
        adapter: GGUF file of a LoRA adapter to apply.
        cache: one of :data:`kurtail_gguf.runtime.cache_types.CACHE_TYPES`; of no use with ``exact_cache``.
        activations: one of :data:`kurtail_gguf.runtime.activation_bits.ACTIVATION_CHOICES`, or None.

    Returns:
        float32 ``[Σ tokens, vocabulary]``.

    Raises:
        KurtailError: no bindings, a file that the runtime refuses, logits that are not finite.
    """
    require_bindings()
    with tempfile.TemporaryDirectory(prefix="kurtail-logits-") as directory:
        out = Path(directory) / "rows.npy"
        request = {"sequences": [list(map(int, one)) for one in sequences], "texts": [], "out": str(out), "cache": cache}
        request["activations"] = activations
        _run(path, {**request, "exact_cache": exact_cache, "adapter": adapter and str(adapter.resolve())})
        return np.load(out)


@dataclass(frozen=True, slots=True)
class RuntimeLayers:
    """What a file's layers computed.

    Args:
        said: log-probabilities float32 ``[tokens, vocabulary]``.
        outputs: float32 ``[tokens, hidden]`` by the layers' numbers, as far as the architecture's graph names them.
        experts: likewise the numbers of all experts, those that a token is routed to first, int32 ``[tokens, experts]``.
        shares: of these, float32 ``[tokens, used]``.
    """

    said: npt.NDArray[np.float32]
    outputs: dict[int, npt.NDArray[np.float32]]
    experts: dict[int, npt.NDArray[np.int32]]
    shares: dict[int, npt.NDArray[np.float32]]


def runtime_layers(path: Path, tokens: Sequence[int]) -> RuntimeLayers:
    """What each layer leaves on the residual stream, and log-probabilities, keys and values cached in single precision.

    Args:
        path: GGUF file.
        tokens: token ids, at most 512.

    Raises:
        KurtailError: no bindings, a file that the runtime refuses, logits that are not finite.
    """
    require_bindings()
    with tempfile.TemporaryDirectory(prefix="kurtail-layers-") as directory:
        out = Path(directory) / "layers.npz"
        _run(path, {"tokens": list(map(int, tokens)), "out": str(out)}, _LAYERS_WORKER)
        kinds: dict[str, dict[int, npt.NDArray[Any]]] = {"output": {}, "experts": {}, "shares": {}}
        with np.load(out) as found:
            for name in found.files:
                kind, _, number = name.rpartition("-")
                if kind:
                    kinds[kind][int(number)] = found[name]
            return RuntimeLayers(found["said"], kinds["output"], kinds["experts"], kinds["shares"])


def mean_divergence(right: npt.NDArray[np.floating], found: npt.NDArray[np.floating]) -> float:
    """Mean over positions of the Kullback-Leibler divergence of ``found`` from ``right``, in nats.

    Args:
        right, found: log-probabilities ``[positions, vocabulary]``.
    """
    p = right.astype(np.float64)
    return float((np.exp(p) * (p - found)).sum(-1).mean())


def runtime_tokens(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """How the vocabulary of a GGUF file splits texts, without BOS.

    Raises:
        KurtailError: no bindings, or a file that the runtime refuses.
    """
    require_bindings()
    request = {"sequences": None, "texts": list(texts), "out": "", "exact_cache": False, "adapter": None, "cache": FILE}
    request["activations"] = FILE_BITS
    return _run(path, request)


def _run(path: Path, request: dict, worker: str = _WORKER) -> list[list[int]]:
    try:
        return vendored.run(worker, {**request, "path": str(path.resolve())})
    except vendored.WorkerError as error:
        raise KurtailError(f"{path}: {error}") from None
