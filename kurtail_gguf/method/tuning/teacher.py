"""The unquantized model's last hidden states, layer by layer, spilled to disk: its logits are one product away."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kurtail_gguf.files.row_file import RowFile
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.model.ending import Ending
from kurtail_gguf.model.loading.checkpoint import Checkpoint
from kurtail_gguf.model.loading.prefetch import layer_stream
from kurtail_gguf.model.runner import LayerRunner

#: Sequences in one forward pass.
BATCH = 4


class Teacher:
    """What the unquantized model says to the calibration tokens.

    Args:
        checkpoint: the model.
        hidden: what the head reads, float32 ``[sequences, length, hidden]``.
        device: where to compute.
    """

    def __init__(self, checkpoint: Checkpoint, hidden: npt.NDArray[np.float32], device: torch.device) -> None:
        self._hidden = hidden
        self._device = device
        self._head = checkpoint.tensor(checkpoint.head_name).to(device, torch.float32)
        self._ending = Ending.of(checkpoint, device)

    def log_probabilities(self, sequences: npt.NDArray[np.int64]) -> Tensor:
        """Of every token of the vocabulary at each position of some sequences, float32 ``[tokens, vocab]``."""
        hidden = torch.from_numpy(self._hidden[sequences]).to(self._device).flatten(0, 1)
        return torch.log_softmax(self._ending.logits(hidden @ self._head.T), -1)


def run_teacher(
    checkpoint: Checkpoint, ids: npt.NDArray[np.int32], path: Path, device: torch.device, progress: Progress
) -> None:
    """Write what the head reads to ``path`` (.npy, float32 ``[sequences, length, hidden]``).

    One layer's weights are in memory at a time. Everything is in single precision: quantized models are measured by it.
    """
    spec = checkpoint.spec
    sequences, length = ids.shape
    # experts one at a time: in one tensor each batch would have a copy of them all
    runner = LayerRunner(checkpoint, device, length, single=True)
    positions = runner.positions(length)
    hidden = RowFile(path, (sequences, length, spec.hidden_size))
    batches = [slice(start, start + BATCH) for start in range(0, sequences, BATCH)]
    with (
        progress.stage("run the unquantized model", spec.layers) as stage,
        torch.inference_mode(),
        layer_stream(checkpoint, range(spec.layers), device) as layers,
    ):
        for batch in batches:
            hidden[batch] = runner.embed(torch.from_numpy(ids[batch].astype(np.int64))).cpu().numpy()
        for layer in range(spec.layers):
            weights = next(layers)
            for batch in batches:
                x = torch.from_numpy(hidden[batch]).to(device)
                hidden[batch] = runner.run(layer, weights, x, positions).cpu().numpy()
            del weights  # the next layer wants their memory
            stage.advance(1, f"layer {layer}")
        ending = Ending.of(checkpoint, torch.device("cpu"))
        for batch in batches:
            hidden[batch] = ending.normed(torch.from_numpy(hidden[batch])).numpy()
    hidden.close()
