"""A checkpoint's layers one after the other, the next one being read while the last is computed with.

On a GPU a layer's time goes into reading and copying as much as into computing. So a thread reads the next layer, checks
it, and lays it into page-locked memory in the checkpoint's own type; it is copied to the GPU, and made what is computed
with there, when its turn comes. The GPU never holds two layers for this, the host one at most.

On the CPU that would cost the memory of a layer and gain nothing, as reading takes far less than computing and the system
reads ahead by itself: there layers are read when they are asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kurtail_gguf.machine.memory import card_module, is_card
from kurtail_gguf.model.loading.checkpoint import Checkpoint, single

#: Where a tensor may begin in the buffer, in bytes.
_ALIGNMENT = 64


@contextmanager
def layer_stream(
    checkpoint: Checkpoint,
    numbers: Iterable[int],
    device: torch.device,
    check: bool = False,
    dtype_of: Callable[[str], torch.dtype] = single,
    ahead: bool | None = None,
) -> Iterator[Iterator[dict[str, Tensor]]]:
    """What :meth:`Checkpoint.layer` gives for each of ``numbers``, in a ``with`` block.

    Leaving the block, in whatever way, ends the reading; layers must not be asked for behind it.

    Args:
        checkpoint: the model.
        numbers: layers in the order they are wanted, with repetitions or not.
        device, check, dtype_of: as :meth:`Checkpoint.layer`'s.
        ahead: whether the next layer is read meanwhile; None for on a GPU only.

    Raises:
        SourceError: as :meth:`Checkpoint.layer`'s, when the layer's turn comes.
    """
    if not (is_card(device) if ahead is None else ahead):
        yield (checkpoint.layer(number, device, check, dtype_of) for number in numbers)
        return
    reader = _Reader(checkpoint, device, check, dtype_of)
    try:
        yield reader.layers(iter(numbers))
    finally:
        reader.close()


class _Reader:
    """A thread and its buffer, which holds one layer as the checkpoint has it."""

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, check: bool, dtype_of: Callable[[str], torch.dtype]
    ) -> None:
        self._checkpoint, self._device, self._check, self._dtype_of = checkpoint, device, check, dtype_of
        size = max(_padded_size(checkpoint, layer) for layer in range(checkpoint.spec.layers))
        with torch.inference_mode(False):  # the thread writes to it, outside of any such mode
            # only page-locked memory is copied to a GPU without a copy on the way
            self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._stopped = threading.Event()
        self._thread = ThreadPoolExecutor(1, "read-layers")

    def layers(self, numbers: Iterator[int]) -> Iterator[dict[str, Tensor]]:
        """The layers, on the device."""
        waiting = self._start(numbers, None)
        while waiting is not None:
            stored = waiting.result()
            # not in a variable: whoever lets go of a layer wants its memory back while this waits
            ready = [{name: self._moved(name, tensor) for name, tensor in stored.items()}]
            del stored
            waiting = self._start(numbers, self._fence())
            yield ready.pop()

    def close(self) -> None:
        """End the thread; what it is reading goes no further than the tensor it is at."""
        self._stopped.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _start(self, numbers: Iterator[int], copied: Any) -> Future[dict[str, Tensor]] | None:
        number = next(numbers, None)
        return None if number is None else self._thread.submit(self._read, number, copied)

    def _read(self, layer: int, copied: Any) -> dict[str, Tensor]:
        """The layer's tensors in the buffer, which may be filled once ``copied`` has happened."""
        if copied is not None:
            copied.synchronize()
        found, start = {}, 0
        for name, tensor in self._checkpoint.stored_layer(layer, self._check):
            if self._stopped.is_set():
                raise CancelledError
            place = self._buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            found[name] = place.copy_(tensor)
            start += _padded(tensor.nbytes)
        return found

    def _moved(self, name: str, tensor: Tensor) -> Tensor:
        # a copy on the CPU too: the buffer is filled again
        return tensor.to(self._device, non_blocking=True, copy=True).to(self._dtype_of(name))

    def _fence(self) -> Any:
        """What happens when all that the device was told so far is done; None where it is done when told."""
        if not is_card(self._device):
            return None
        module = card_module(self._device)
        event = module.Event(blocking=True)
        event.record(module.current_stream(self._device))
        return event


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _padded_size(checkpoint: Checkpoint, layer: int) -> int:
    return sum(_padded(size) for size in checkpoint.stored_sizes(layer).values())
