"""4-bit activations on the CPU, rounded by the runtime's own kernel: a tenth of the time that the same takes in torch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.numerics.formats import kt4
from kurtail_gguf.numerics.simulation.rounding import round_to
from kurtail_gguf.runtime import ggml, native

#: Values below which a second thread is not worth its start.
_SHARED = 1 << 16
#: Blocks at a time.
_PIECE = 512


class QuickRounding:
    """:func:`~kurtail_gguf.numerics.simulation.rounding.round_to`, bit for bit.

    Blocks of 64 in 4 bits on the CPU go through ``libggml-cpu``'s conversion to ``kt4`` and ``libggml-base``'s back;
    everything else is torch's.

    Raises:
        KurtailError: the libraries cannot be opened.
    """

    def __init__(self) -> None:
        base = ctypes.CDLL(str(native.library("ggml-base")))
        library = ctypes.CDLL(str(native.library("ggml-cpu")))
        library.ggml_cpu_init()
        traits = library.ggml_get_type_traits_cpu
        traits.restype, traits.argtypes = ctypes.POINTER(ctypes.c_void_p), (ctypes.c_int,)
        row = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        # from_float is the first field of struct ggml_type_traits_cpu (ggml-cpu.h)
        self._quantize = row(traits(ggml.KT4)[0])
        self._restore = base.dequantize_row_kt4
        self._restore.restype, self._restore.argtypes = None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        self._pool = ThreadPoolExecutor(thread_name_prefix="round")

    def __call__(self, x: Tensor, bits: int, block: int) -> Tensor:
        """As ``round_to``."""
        if bits != 4 or block != kt4.BLOCK or x.device.type != "cpu" or not x.numel():
            return round_to(x, bits, block)
        x = x.detach().float().contiguous()
        rounded = torch.empty_like(x)
        blocks = x.numel() // kt4.BLOCK
        threads = torch.get_num_threads() if x.numel() >= _SHARED else 1
        share = -(-blocks // threads)
        parts = [(first, min(share, blocks - first)) for first in range(0, blocks, share)]
        others = [self._pool.submit(self._round, x, rounded, *part) for part in parts[1:]]
        self._round(x, rounded, *parts[0])
        for other in others:
            other.result()
        return rounded

    def _round(self, x: Tensor, rounded: Tensor, first: int, count: int) -> None:
        packed = torch.empty(min(count, _PIECE) * kt4.TYPE_SIZE, dtype=torch.uint8)
        # a piece at a time: its codes stay in the cache
        for piece in range(first, first + count, _PIECE):
            start, values = 4 * piece * kt4.BLOCK, min(_PIECE, first + count - piece) * kt4.BLOCK
            self._quantize(x.data_ptr() + start, packed.data_ptr(), values)
            self._restore(packed.data_ptr(), rounded.data_ptr() + start, values)


@cache
def quick_rounding() -> Callable[[Tensor, int, int], Tensor]:
    """The rounding of the installed runtime; torch's where its libraries are elsewhere, or one for each instruction set."""
    try:
        return QuickRounding()
    except (KurtailError, OSError, AttributeError):
        return round_to
