"""Upstream's own conversion of a model that no family describes, with the inputs of its linears transformed at run time.

Which of the file's tensors is which linear of the model is seen from the values: a checkpoint may keep experts one by one or all
in one tensor, upstream may rename a weight, cut it into several, join several and reorder rows, and what multiplies an input is
transformed all the same, as it is where rows are multiplied by a factor or whole blocks of columns change places. A tensor with
other values, or with single columns in another order, stays as upstream writes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from conversion.base import LazyTorchTensor
from safetensors import safe_open
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from kurtail_gguf.numerics.formats.kt4 import BLOCK, TYPE_ID
from kurtail_gguf.numerics.hadamard import walsh_hadamard_
from kurtail_gguf.runtime import ggml
from kurtail_gguf.runtime.export.keys import add_online, add_provenance
from kurtail_gguf.runtime.export.rows import KnownRows, Rows, RowsToWrite, chunks_of, rows_file

#: What upstream computes in single precision, or looks rows up in.
_KEPT = (".ffn_gate_inp.", ".ffn_gate_inp_shexp.")
#: A tensor of a layer: the layer's number, and what it is.
_OF_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
#: Experts' matrices; other tensors of three dimensions are multiplied without a transform (those of latent attention).
_EXPERTS = "_exps.weight"
_TABLES = ("token_embd.weight", "output.weight")

Floats = npt.NDArray[np.float32]
Send = Callable[[dict[str, Any]], None]


def by_itself_class(
    base: type, request: Mapping[str, Any], library: ggml.GgmlBase, made: dict[str, str], send: Send
) -> type:
    """A subclass of upstream's model class that transforms what linears read, and has their weights quantized or in float32.

    Args:
        base: what ``conversion.get_model_class`` gives for the architecture.
        request: fields of the ``provenance``; ``sums``, an .npz of the linears' rows, and ``columns``, how many values these have
            (:class:`KnownRows`); ``kept``, tensors of layers that stay as they are, ``attn_q.weight``; ``packed``, a
            directory of the linears' rows, or None for float32.
        library: quantizes the embedding and the output.
        made: filled with the linears by the file's tensors.
        send: reports each tensor as it is written.
    """
    provenance, packed, kept = request["provenance"], request["packed"], request["kept"]
    with np.load(request["sums"]) as sums:
        known = KnownRows({name: sums[name] for name in sums.files}, request["columns"])

    class ByItself(base):  # type: ignore[misc, valid-type]
        # upstream refuses a subclass that does not state it
        model_arch = base.model_arch

        def modify_tensors(self, data_torch: torch.Tensor, name: str, bid: int | None) -> Iterable[tuple[str, torch.Tensor]]:
            for new_name, tensor in super().modify_tensors(data_torch, name, bid):
                if (rows := self._rows(new_name, tensor)) is not None:
                    made[new_name] = rows[0].linear
                    self._add_linear(new_name, tensor, rows)
                elif packed is not None and new_name in _TABLES and (kind := _table_type(tensor.shape[1])) is not None:
                    self._add_table(new_name, tensor, kind)
                else:
                    yield new_name, tensor

        def repack_mxfp4(self, new_name: str, blocks: torch.Tensor, scales: torch.Tensor) -> None:
            # gpt-oss's: upstream hands blocks on as they are
            tensor = convert_moe_packed_tensors(*map(LazyTorchTensor.to_eager, (blocks, scales))).transpose(-1, -2).float()
            if (rows := self._rows(new_name, tensor)) is not None:
                made[new_name] = rows[0].linear
                self._add_linear(new_name, tensor, rows)
            else:
                self.gguf_writer.add_tensor(new_name, tensor.contiguous().numpy())

        def _rows(self, new_name: str, tensor: torch.Tensor) -> list[Rows] | None:
            match = _OF_LAYER.fullmatch(new_name)
            if match is None or match[2] in kept or any(one in new_name for one in _KEPT):
                return None
            if tensor.dim() != (3 if new_name.endswith(_EXPERTS) else 2):
                return None
            return known.find(int(match[1]), _array(tensor))

        def _add_linear(self, new_name: str, tensor: torch.Tensor, rows: list[Rows]) -> None:
            shape, columns = tuple(tensor.shape), tensor.shape[-1]

            def floats() -> Iterator[Floats]:
                return map(_transformed, _chunks(tensor.reshape(-1, columns)))

            def bytes_of_rows() -> Iterator[npt.NDArray[np.uint8]]:
                return (_load(Path(packed), one) for one in rows)

            if packed is None:
                self._add(new_name, (*shape[:-1], 4 * columns), ggml.F32, floats)
            else:
                self._add(new_name, (*shape[:-1], library.row_bytes(TYPE_ID, columns)), TYPE_ID, bytes_of_rows)

        def _add_table(self, new_name: str, tensor: torch.Tensor, kind: int) -> None:
            row_bytes = library.row_bytes(kind, tensor.shape[1])
            self._add(new_name, (tensor.shape[0], row_bytes), kind, lambda: (library.quantize(rows, kind) for rows in _chunks(tensor)))

        def _add(self, name: str, shape: tuple[int, ...], kind: int, chunks: Callable[[], Iterator[Any]]) -> None:
            rows = RowsToWrite(shape, chunks, lambda: send({"tensor": name}))
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


def _array(tensor: torch.Tensor) -> Floats:
    return LazyTorchTensor.to_eager(tensor).float().numpy()


def _chunks(tensor: torch.Tensor) -> Iterator[Floats]:
    return chunks_of(_array(tensor))


def _transformed(rows: Floats) -> Floats:
    return walsh_hadamard_(np.array(rows, np.float64, order="C"), BLOCK).astype(np.float32)


def _table_type(width: int) -> int | None:
    """What a table's rows are quantized to: as a head of theirs would be; None where blocks do not divide them."""
    return ggml.Q6_K if width % 256 == 0 else ggml.Q8_0 if width % 32 == 0 else None


def _load(directory: Path, rows: Rows) -> npt.NDArray[np.uint8]:
    with safe_open(rows_file(directory, rows.linear, rows.expert), "np") as file:
        return rows.of(file.get_tensor("rows"))
