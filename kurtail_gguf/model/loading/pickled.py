"""Pickled checkpoints (``.bin``), read only where they are asked for: plain tensors of a mapped zip, or one line.

A pickle is a program. ``torch.load(weights_only=True)`` runs it in an interpreter of torch's own that knows tensors and
a few plain types and no other name, so that nothing of the file's choosing is called.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any, Self

import torch

from kurtail_gguf.messages.errors import SourceError

#: Bytes of everything in the file that is no tensor's data, at most: the pickle of 10,000 tensors has 2 MB.
MAX_PICKLE = 64 << 20
#: safetensors' names of dtypes.
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
#: How torch's message names what a pickle wanted to call.
_CALLED = re.compile(r"GLOBAL ([\w.]+)")


class PickledFile:
    """A file that ``torch.save`` wrote, with the part of safetensors' reader that checkpoints are read by.

    Its pickle is run once, here. Leaving a ``with`` block closes nothing: the file stays mapped as long as the object
    lives, and several threads may read it.

    Args:
        path: a zip as torch writes since 1.6; tensors stay views of the mapped file.

    Raises:
        SourceError: truncated, of the older format, anything but tensors by name, or a pickle that calls something.
    """

    def __init__(self, path: Path) -> None:
        _check_zip(path)
        try:
            # the tensors outlive a caller's inference mode, and those made in it are of no use for gradients
            with torch.inference_mode(False):
                content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # a pickle may make its interpreter raise anything
            raise _not_read(path, error) from None
        if not isinstance(content, dict):
            raise SourceError(f"{path} contains a {type(content).__name__}, expected tensors by name")
        self._tensors = {name: _plain(path, name, value) for name, value in content.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self._tensors)

    def get_tensor(self, name: str) -> torch.Tensor:
        """A tensor as stored; a view of the mapped file but where its rows do not lie one after the other."""
        # each caller has an object of its own: requires_grad_ on one says nothing of the others
        return self._tensors[name].detach().contiguous()

    def get_slice(self, name: str) -> _Slice:
        """What tells shape and dtype, and gives rows."""
        return _Slice(self._tensors[name])


class _Slice:
    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return _DTYPES.get(self._tensor.dtype, str(self._tensor.dtype))

    def __getitem__(self, rows: slice | tuple[slice, ...]) -> torch.Tensor:
        return self._tensor[rows]


def _check_zip(path: Path) -> None:
    """Nothing is packed, so that nothing can grow: only then is memory bounded by the file's size."""
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise SourceError(
            f"{path} is truncated or in the format before torch 1.6 ({error}): download the file again, or get the model "
            "as safetensors"
        ) from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise SourceError(f"{path} is a compressed zip, which torch.save does not write")
    others = sum(entry.file_size for entry in entries if "/data/" not in entry.filename)
    if others > MAX_PICKLE:
        raise SourceError(f"{path}: {others} bytes beside the tensors' data exceed the limit of {MAX_PICKLE}")


def _plain(path: Path, name: Any, value: Any) -> torch.Tensor:
    if not isinstance(name, str) or type(value) not in (torch.Tensor, torch.nn.Parameter):
        raise SourceError(f"{path}: {_shown(name)} is a {type(value).__name__}, expected a tensor")
    tensor = value.detach()
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise SourceError(f"{path}: tensor {_shown(name)} is sparse, quantized or without data, and cannot be read")
    # strides of 0 make a tensor of any size from one number
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise SourceError(f"{path}: tensor {_shown(name)} is larger than its data")
    return tensor


def _not_read(path: Path, error: Exception) -> SourceError:
    told = str(error)
    if called := _CALLED.search(told):
        return SourceError(
            f"{path} tries to call {called[1]}, which no weights need, and was not run: do not trust it; get the model as "
            "safetensors"
        )
    lines = told.strip().splitlines()
    return SourceError(
        f"{path} cannot be read as tensors ({type(error).__name__}: {lines[0][:200] if lines else 'no reason given'}): "
        "download the file again, or get the model as safetensors"
    )


def _shown(name: object) -> str:
    text = name if isinstance(name, str) and name.isprintable() else repr(name)
    return text if len(text) <= 100 else f"{text[:99]}…"
