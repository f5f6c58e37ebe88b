"""What surrounds the layers in a file: embedding, final norm and head, and of which types they are.

With R1 the final norm's gain is folded into the head, which then differs from the embedding and is always written. Without
it all three stay as the model has them, and a tied head stays tied: one table in the file serves for both.

Tables are streamed in row chunks: they are the largest tensors of a small model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

from kurtail_gguf.files.atomic import replacing
from kurtail_gguf.files.row_file import RowFile
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.method.fold.layer import fold_reader
from kurtail_gguf.model.loading.checkpoint import Checkpoint
from kurtail_gguf.model.spec import ModelSpec
from kurtail_gguf.runtime import ggml

#: Names of the folded tables, and of the final norm, in the directory that the exporter reads.
EMBEDDING, HEAD, FINAL = "embed_tokens.npy", "lm_head.npy", "final.safetensors"


def is_tied(spec: ModelSpec, r1: object | None) -> bool:
    """Whether the file has one table for embedding and head; ``r1`` is None without R1."""
    return spec.tied and r1 is None


def table_types(spec: ModelSpec, tied: bool, rounded: bool = True) -> dict[str, int]:
    """Types of the tables that the file has, by :data:`EMBEDDING` and :data:`HEAD`: what llama-quantize gives for Q4_0.

    Args:
        spec: sizes.
        tied: whether one table serves for both; it then has the type of a head.
        rounded: False for a file that rounds nothing.
    """
    if not rounded:
        head = embedding = ggml.F32
    else:
        head = ggml.Q6_K if spec.hidden_size % 256 == 0 else ggml.Q8_0  # q6_K has blocks of 256
        embedding = ggml.Q4_0
    return {EMBEDDING: head} if tied else {EMBEDDING: embedding, HEAD: head}


def fold_tables(checkpoint: Checkpoint, r1: torch.Tensor | None, target: Path, progress: Progress) -> None:
    """Write embedding, head and final norm into ``target``; what is there already is taken over.

    Args:
        checkpoint: the model; weights are checked for NaN as they are read.
        r1: float64 ``[hidden, hidden]`` or None.
        target: a directory; see :data:`EMBEDDING` (.npy, float32 ``[vocab, hidden]``, as :data:`HEAD`), :data:`FINAL`
            (the final norm, and the head's bias where there is one).
        progress: one stage.
    """
    spec = checkpoint.spec
    norm, form = f"{spec.family.final_norm}.weight", spec.family.norm
    ending = {name: checkpoint.tensor(name, check=True) for name in spec.ending}
    gain = form.gain(ending[norm])
    folds: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
        EMBEDDING: (f"{spec.family.embedding}.weight", lambda rows: rows if r1 is None else rows @ r1)
    }
    if not is_tied(spec, r1):
        device = torch.device("cpu") if r1 is None else r1.device
        factor = gain.to(device)
        folds[HEAD] = (checkpoint.head_name, lambda rows: rows if r1 is None else fold_reader(rows, factor, r1))
    with progress.stage("fold embedding and head", len(folds)) as stage:
        for name, (tensor, fold) in folds.items():
            if not (target / name).exists():
                _stream(checkpoint, tensor, target / name, fold, r1)
            stage.advance(1, name.removesuffix(".npy"))
    if r1 is not None:
        ending[norm] = form.weight(torch.ones_like(gain))
    with replacing(target / FINAL) as scratch:
        save_file({name: tensor.float().contiguous() for name, tensor in ending.items()}, scratch)


def read_head(directory: Path) -> npt.NDArray[np.float32]:
    """What the final norm's output is multiplied by, ``[vocab, hidden]``."""
    path = directory / HEAD
    return np.load(path if path.exists() else directory / EMBEDDING)


def read_ending(directory: Path) -> dict[str, torch.Tensor]:
    """The final norm and the head's bias, float32, by their names in the checkpoint and as it has them."""
    return load_file(directory / FINAL)


class EmbeddingRows:
    """Rows of a folded embedding as the file will have them, by the runtime's own code.

    Args:
        directory: what :func:`fold_tables` filled.
        spec: sizes, and what the runtime multiplies the rows by.
    """

    def __init__(self, directory: Path, spec: ModelSpec) -> None:
        self._scale = spec.embedding_scale
        self._rows = np.load(directory / EMBEDDING, mmap_mode="r")
        self._type = table_types(spec, tied=not (directory / HEAD).exists())[EMBEDDING]
        self._library = ggml.GgmlBase()

    def __call__(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """What token ids int64 ``[n]`` put on the residual stream, float32 ``[n, hidden]``."""
        rows = np.ascontiguousarray(self._rows[ids])
        stored = self._library.dequantize(self._library.quantize(rows, self._type), self._type, rows.shape[1])
        return stored if self._scale == 1 else stored * np.float32(self._scale)


def _stream(
    checkpoint: Checkpoint,
    name: str,
    path: Path,
    fold: Callable[[torch.Tensor], torch.Tensor],
    r1: torch.Tensor | None,
) -> None:
    device = torch.device("cpu") if r1 is None else r1.device
    shape = (checkpoint.spec.vocab_size, checkpoint.spec.hidden_size)
    with replacing(path) as scratch:
        out = RowFile(scratch, shape)
        for start, rows in checkpoint.rows(name):
            out[start : start + len(rows)] = fold(rows.to(device).double()).float().cpu().numpy()
        out.close()
