"""Values and scales of a GGUF file's tensors."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.numerics.formats.targets import BLOCK_FORMATS
from kurtail_gguf.runtime import ggml
from kurtail_gguf.runtime.gguf_info import GgufInfo, TensorInfo

#: Types of codes with a scale a block.
_CODED = {block_format.type_id: block_format for block_format in BLOCK_FORMATS.values()}


class FileTensors:
    """The tensors of a file by name, read as they are asked for.

    Args:
        info: what :func:`~kurtail_gguf.runtime.gguf_info.read_gguf` says of it.
    """

    def __init__(self, info: GgufInfo) -> None:
        self._info = info
        self._data = np.memmap(info.path, dtype=np.uint8, mode="r")
        self._tensors = {tensor.name: tensor for tensor in info.tensors}
        self._online = info.online
        self._library = ggml.GgmlBase()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        """Type and shape.

        Raises:
            KurtailError: the file has no such tensor.
        """
        if name not in self._tensors:
            raise KurtailError(f"{self._info.path}: tensor {name} is missing")
        return self._tensors[name]

    def online(self, name: str) -> int:
        """Size of the Hadamard blocks that the runtime multiplies the tensor's input by, 0 for none."""
        return self._online.get(name, 0)

    def values(self, name: str, expert: int | None = None) -> npt.NDArray[np.float32]:
        """A matrix, float32 ``[out, in]``, or a vector; of one expert where all are one tensor."""
        return self.rows(name, 0, None, expert)

    def rows(self, name: str, start: int, count: int | None, expert: int | None = None) -> npt.NDArray[np.float32]:
        """``count`` rows of a matrix from ``start`` on, all that are left for None; float32 ``[rows, in]``."""
        tensor = self.info(name)
        raw = self._rows(tensor, expert)
        raw = raw[start : None if count is None else start + count]
        if tensor.type_id == ggml.F32:
            values = raw.view("<f4").astype(np.float32)
        elif coded := _CODED.get(tensor.type_id):
            values = coded.dequantize(*coded.unpack(raw))
        else:
            values = self._library.dequantize(np.ascontiguousarray(raw), tensor.type_id, tensor.shape[-1])
        return values[0] if len(tensor.shape) == 1 else values

    def scales(self, name: str, expert: int | None = None) -> npt.NDArray[np.float16] | None:
        """Block scales ``[out, in/block]``; None for types without a plain scale a block."""
        tensor = self.info(name)
        coded = _CODED.get(tensor.type_id)
        return None if coded is None else coded.unpack(self._rows(tensor, expert))[1]

    def _rows(self, tensor: TensorInfo, expert: int | None) -> npt.NDArray[np.uint8]:
        raw = np.asarray(self._data[tensor.offset : tensor.offset + tensor.bytes])
        if len(raw) != tensor.bytes:
            raise KurtailError(f"{self._info.path}: the data of tensor {tensor.name} is incomplete: the file is truncated")
        raw = raw.reshape(math.prod(tensor.shape[:-1]), -1)
        if expert is None:
            return raw
        each = len(raw) // tensor.shape[0]
        return raw[expert * each : (expert + 1) * each]
