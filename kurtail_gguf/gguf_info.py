"""What a GGUF file says about itself, and the ``kurtail.*`` keys in it (docs/format.md).

Reading is done by the pinned source's ``GGUFReader`` in a worker (:mod:`kurtail_gguf.vendored`), the
only reader that knows our tensor type. Tensor data is not read here; offsets are given instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kurtail_gguf import vendored
from kurtail_gguf.config import Provenance
from kurtail_gguf.errors import KurtailError

#: field of Provenance, key in the file, GGUF type; the order is the order in the file
PROVENANCE_KEYS: tuple[tuple[str, str, str], ...] = (
    ("format_version", "kurtail.format_version", "uint32"),
    ("tool", "kurtail.tool", "string"),
    ("rotation", "kurtail.rotation", "string"),
    ("objective", "kurtail.objective", "string"),
    ("weights", "kurtail.weights", "string"),
    ("seed", "kurtail.seed", "uint64"),
    ("r1_kind", "kurtail.r1.kind", "string"),
    ("r1_size", "kurtail.r1.size", "uint32"),
    ("r2_kind", "kurtail.r2.kind", "string"),
    ("r2_size", "kurtail.r2.size", "uint32"),
    ("r3_kind", "kurtail.r3.kind", "string"),
    ("r3_size", "kurtail.r3.size", "uint32"),
    ("r4_kind", "kurtail.r4.kind", "string"),
    ("r4_size", "kurtail.r4.size", "uint32"),
    ("activation_bits", "kurtail.activation_bits", "uint32"),
    ("kv_bits", "kurtail.kv_bits", "uint32"),
    ("calibration_name", "kurtail.calibration.name", "string"),
    ("calibration_tokens", "kurtail.calibration.tokens", "uint32"),
    ("calibration_sha256", "kurtail.calibration.sha256", "string"),
)

#: upstream's keys for activation bits of single tensors: names, and whether 4 bits are allowed
TENSOR_EXTRA_NAME = "general.tensor_extra.name"
TENSOR_EXTRA_PREC_A4 = "general.tensor_extra.prec_a4"

#: The linears of a block, the only tensors of type kt4 that the converter writes.
_BLOCK_LINEAR = re.compile(r"blk\.\d+\.(attn_(q|k|v|output)|ffn_(gate|up|down))\.weight")


class GgufError(KurtailError):
    """A file is not a GGUF, is damaged, or holds what this version does not know."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of a GGUF file.

    Args:
        name: as in the file (``blk.0.attn_q.weight``).
        type_id: ``enum ggml_type``.
        type_name: lower case, as llama.cpp prints it (``kt4``, ``q4_0``).
        shape: outermost dimension first (the reverse of ggml's order): ``[out, in]`` of a linear.
        bytes: size of its data.
        offset: of its data from the start of the file.
    """

    name: str
    type_id: int
    type_name: str
    shape: tuple[int, ...]
    bytes: int
    offset: int

    @property
    def values(self) -> int:
        """How many numbers it holds."""
        count = 1
        for length in self.shape:
            count *= length
        return count

    @property
    def is_block_linear(self) -> bool:
        """Whether it is one of the seven linears of a block."""
        return _BLOCK_LINEAR.fullmatch(self.name) is not None


@dataclass(frozen=True, slots=True)
class GgufInfo:
    """A GGUF file without its tensor data.

    Args:
        path: the file.
        metadata: every key; an array longer than a few thousand elements (a vocabulary) is given as
            ``{"length": …, "sha256": …}``.
        tensors: in the order of the file.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]

    @property
    def architecture(self) -> str:
        """``general.architecture``: prefix of the hyper-parameters' keys."""
        return str(self.metadata["general.architecture"])

    def hyper(self, key: str) -> Any:
        """A hyper-parameter by the part of its key after the architecture; KeyError where absent."""
        return self.metadata[f"{self.architecture}.{key}"]

    @property
    def bits_per_weight(self) -> float:
        """Bits of tensor data for each number, over all tensors."""
        return _bits(self.tensors)

    @property
    def block_bits_per_weight(self) -> float | None:
        """The same over the linears of the blocks; None where the file has none under these names."""
        linears = tuple(tensor for tensor in self.tensors if tensor.is_block_linear)
        return _bits(linears) if linears else None

    @property
    def provenance(self) -> Provenance | None:
        """The ``kurtail.*`` keys, or None where the file has none.

        Raises:
            GgufError: some are there and others are missing.
        """
        present = {field for field, key, _ in PROVENANCE_KEYS if key in self.metadata}
        if not present:
            return None
        missing = [key for field, key, _ in PROVENANCE_KEYS if field not in present]
        if missing:
            raise GgufError(f"{self.path} has kurtail keys but lacks {', '.join(missing)}: convert the model again")
        return Provenance(**{field: self.metadata[key] for field, key, _ in PROVENANCE_KEYS})

    def activation_bits_of(self, tensor: str) -> int:
        """Bits of the activations that enter a block linear, as the runtime reads them."""
        default = int(self.metadata.get("kurtail.activation_bits", 4))
        names = self.metadata.get(TENSOR_EXTRA_NAME, [])
        if tensor not in names:
            return default
        return 4 if self.metadata[TENSOR_EXTRA_PREC_A4][names.index(tensor)] else 8


def read_gguf(path: Path) -> GgufInfo:
    """Read a GGUF file's keys and the list of its tensors.

    Raises:
        GgufError: one line: no such file, not a GGUF, truncated, an unknown type.
    """
    if not path.is_file():
        raise GgufError(f"{path} is {'a directory' if path.is_dir() else 'not there'}: give a GGUF file")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise GgufError(f"cannot read {path}: {error.strerror}") from None
    if magic != b"GGUF":
        raise GgufError(f"{path} is no GGUF file: it starts with {magic!r}")
    try:
        answer = vendored.run("kurtail_gguf.export.read_worker", {"path": str(path.resolve())})
    except vendored.WorkerError as error:
        raise GgufError(f"{path} {error}") from None
    tensors = tuple(TensorInfo(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in answer["tensors"])
    return GgufInfo(path=path, metadata=answer["metadata"], tensors=tensors)


def write_header(path: Path, out: Path) -> None:
    """Copy a GGUF file's keys, without its tensors, to a new file.

    transformers reads the configuration from such a file, but not from one with tensors of
    our type: PyPI's ``gguf`` does not know it.
    """
    vendored.run("kurtail_gguf.export.header_worker", {"path": str(path.resolve()), "out": str(out.resolve())})


def _bits(tensors: tuple[TensorInfo, ...]) -> float:
    values = sum(tensor.values for tensor in tensors)
    return 8.0 * sum(tensor.bytes for tensor in tensors) / values if values else 0.0
