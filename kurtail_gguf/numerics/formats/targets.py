"""What the linears of the blocks are stored as, by ``--target``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt

from kurtail_gguf.numerics.formats import kt4, q4_0


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """A tensor type of codes −8…7 with a half scale a block.

    Args:
        type_id: ``enum ggml_type``; ``general.file_type`` of a file of such linears has the same number.
        block: values that share a scale.
        pack: int8 ``[out, in]`` and float16 ``[out, in/block]`` to the rows of the file, uint8.
        unpack: the inverse.
        dequantize: codes and scales to float32 ``[out, in]``.
    """

    type_id: int
    block: int
    pack: Callable[[npt.NDArray[np.int8], npt.NDArray[np.float16]], npt.NDArray[np.uint8]]
    unpack: Callable[[npt.NDArray[np.uint8]], tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]]
    dequantize: Callable[[npt.NDArray[np.int8], npt.NDArray[np.float16]], npt.NDArray[np.float32]]


BLOCK_FORMATS: Final[Mapping[str, BlockFormat]] = MappingProxyType(
    {
        "kurtail": BlockFormat(kt4.TYPE_ID, kt4.BLOCK, kt4.pack, kt4.unpack, kt4.dequantize),
        "stock": BlockFormat(q4_0.TYPE_ID, q4_0.BLOCK, q4_0.pack, q4_0.unpack, q4_0.dequantize),
    }
)
