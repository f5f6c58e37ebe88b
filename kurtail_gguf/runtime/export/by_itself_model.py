"""Upstream's own conversion of a model that no family describes, with the inputs of its linears transformed at run time.

Which of the file's tensors is which linear of the checkpoint is seen from the values: upstream may rename a weight, cut it into
several and reorder its rows, and what multiplies an input is transformed all the same. A tensor with other values, or with its
columns in another order, stays as upstream writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from conversion.base import LazyTorchTensor
from safetensors import safe_open

from kurtail_gguf.numerics.formats.kt4 import BLOCK, TYPE_ID
from kurtail_gguf.numerics.hadamard import walsh_hadamard_
from kurtail_gguf.runtime import ggml
from kurtail_gguf.runtime.export.keys import add_online, add_provenance
from kurtail_gguf.runtime.export.rows import RowsToWrite, chunks_of, name_below, rows_of

#: What upstream computes in single precision, or looks rows up in.
_KEPT = (".ffn_gate_inp.", ".ffn_gate_inp_shexp.")
_TABLES = ("token_embd.weight", "output.weight")

Floats = npt.NDArray[np.float32]
Send = Callable[[dict[str, Any]], None]


def by_itself_class(
    base: type, request: Mapping[str, Any], library: ggml.GgmlBase, made: dict[str, str], send: Send
) -> type:
    """A subclass of upstream's model class that transforms what linears read, and has their weights quantized or in float32.

    Args:
        base: what ``conversion.get_model_class`` gives for the architecture.
        request: fields of the provenance; ``linears``, by their names below the layers' list, whether the checkpoint has the
            weight as ``[in, out]``; ``packed``, a directory of their rows, or None for float32.
        library: quantizes the embedding and the output.
        made: filled with the linears by the file's tensors.
        send: reports each tensor as it is written.
    """
    linears, provenance, packed = request["linears"], request["provenance"], request["packed"]

    class ByItself(base):  # type: ignore[misc, valid-type]
        # upstream refuses a subclass that does not state it
        model_arch = base.model_arch

        def modify_tensors(self, data_torch: torch.Tensor, name: str, bid: int | None) -> Iterable[tuple[str, torch.Tensor]]:
            linear = name_below(name, linears)
            for new_name, tensor in super().modify_tensors(data_torch, name, bid):
                listed = linear is not None and tensor.dim() == 2 and not any(kept in new_name for kept in _KEPT)
                if listed and (rows := _rows(data_torch.T if linears[linear] else data_torch, tensor)) is not None:
                    made[new_name] = linear
                    self._add_linear(new_name, linear, tensor, rows)
                elif packed is not None and new_name in _TABLES and (kind := _table_type(tensor.shape[1])) is not None:
                    self._add_table(new_name, tensor, kind)
                else:
                    yield new_name, tensor

        def _add_linear(self, new_name: str, linear: str, tensor: torch.Tensor, rows: npt.NDArray[np.int64]) -> None:
            count, columns = tensor.shape
            if packed is None:
                self._add(new_name, count, ggml.F32, lambda: map(_transformed, _chunks(tensor)), 4 * columns)
                return
            data = _load(Path(packed), linear)
            self._add(new_name, count, TYPE_ID, lambda: iter([data()[rows]]), library.row_bytes(TYPE_ID, columns))

        def _add_table(self, new_name: str, tensor: torch.Tensor, kind: int) -> None:
            row_bytes = library.row_bytes(kind, tensor.shape[1])
            self._add(new_name, tensor.shape[0], kind, lambda: (library.quantize(rows, kind) for rows in _chunks(tensor)), row_bytes)

        def _add(self, name: str, count: int, kind: int, chunks: Callable[[], Iterator[Any]], row_bytes: int) -> None:
            rows = RowsToWrite((count, row_bytes), chunks, lambda: send({"tensor": name}))
            self.gguf_writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType(kind))

        def prepare_tensors(self) -> None:
            super().prepare_tensors()
            if packed is not None:
                self.ftype = gguf.LlamaFileType(TYPE_ID)

        def set_gguf_parameters(self) -> None:
            super().set_gguf_parameters()
            add_provenance(self.gguf_writer, provenance)
            add_online(self.gguf_writer, dict.fromkeys(made, BLOCK))
            if provenance["activation_bits"] == 8:
                self.gguf_writer.add_tensor_extra_prec_a4(sorted(made), [False] * len(made))

    return ByItself


def _rows(source: torch.Tensor, found: torch.Tensor) -> npt.NDArray[np.int64] | None:
    return rows_of(_array(source), _array(found))


def _array(tensor: torch.Tensor) -> Floats:
    return LazyTorchTensor.to_eager(tensor).float().numpy()


def _chunks(tensor: torch.Tensor) -> Iterator[Floats]:
    return chunks_of(_array(tensor))


def _transformed(rows: Floats) -> Floats:
    return walsh_hadamard_(np.array(rows, np.float64, order="C"), BLOCK).astype(np.float32)


def _table_type(width: int) -> int | None:
    """What a table's rows are quantized to: as a head of theirs would be; None where blocks do not divide them."""
    return ggml.Q6_K if width % 256 == 0 else ggml.Q8_0 if width % 32 == 0 else None


def _load(directory: Path, linear: str) -> Callable[[], npt.NDArray[np.uint8]]:
    def load() -> npt.NDArray[np.uint8]:
        with safe_open(directory / f"{linear}.safetensors", "np") as file:
            return file.get_tensor("rows")

    return load
