"""Fold embedding and head, streamed in row chunks: they are the largest tensors of a small model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from kurtail_gguf import ggml
from kurtail_gguf.files import replacing
from kurtail_gguf.fold.layer import fold_reader
from kurtail_gguf.loading.checkpoint import Checkpoint
from kurtail_gguf.row_file import RowFile


#: Names of the folded tables in the directory that the exporter reads.
EMBEDDING, HEAD = "embed_tokens.npy", "lm_head.npy"


class EmbeddingRows:
    """Rows of a folded embedding as the file will have them: q4_0, by the runtime's own code.

    Args:
        path: what :func:`fold_embedding` wrote.
        scale: what the runtime multiplies them by.
    """

    def __init__(self, path: Path, scale: float = 1.0) -> None:
        self._scale = scale
        self._rows = np.load(path, mmap_mode="r")
        self._library = ggml.GgmlBase()

    def __call__(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """What token ids int64 ``[n]`` put on the residual stream, float32 ``[n, hidden]``."""
        rows = np.ascontiguousarray(self._rows[ids])
        stored = self._library.dequantize(self._library.quantize(rows, ggml.Q4_0), ggml.Q4_0, rows.shape[1])
        return stored if self._scale == 1 else stored * np.float32(self._scale)


def fold_embedding(checkpoint: Checkpoint, r1: torch.Tensor | None, path: Path) -> None:
    """Write ``E R1`` to ``path`` (.npy, float32 ``[vocab, hidden]``), atomically."""
    name = f"{checkpoint.spec.family.embedding}.weight"
    _stream(checkpoint, name, path, lambda rows: rows if r1 is None else rows @ r1, r1)


def fold_head(checkpoint: Checkpoint, r1: torch.Tensor | None, path: Path) -> None:
    """Write ``W diag(g) R1`` to ``path`` (.npy, float32 ``[vocab, hidden]``), atomically.

    W is the head's weight, the embedding's where they are tied, and g the final norm's gain; folding
    it makes the two differ, so the head is always written.
    """
    gain = checkpoint.tensor(f"{checkpoint.spec.family.final_norm}.weight", check=True)
    if r1 is not None:
        gain = gain.to(r1.device)
    _stream(checkpoint, checkpoint.head_name, path, lambda rows: fold_reader(rows, gain, r1), r1)


def _stream(checkpoint: Checkpoint, name: str, path: Path, fold, r1: torch.Tensor | None) -> None:
    device = torch.device("cpu") if r1 is None else r1.device
    shape = (checkpoint.spec.vocab_size, checkpoint.spec.hidden_size)
    with replacing(path) as scratch:
        out = RowFile(scratch, shape)
        for start, rows in checkpoint.rows(name):
            out[start : start + len(rows)] = fold(rows.to(device).double()).float().cpu().numpy()
        out.close()
