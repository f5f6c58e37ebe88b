"""What a GGUF file says about itself, and the ``kurtail.*`` keys in it (docs/format.md).

Reading is done by the pinned source's ``GGUFReader`` in a worker (:mod:`kurtail_gguf.runtime.vendored`), the
only reader that knows our tensor type. Tensor data is not read here; offsets are given instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kurtail_gguf.files.kinds import refuse_pointer
from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.runtime import ggml, vendored
from kurtail_gguf.runtime.provenance import STOCK_KV_BITS, Provenance

#: field of Provenance, key in the file, GGUF type (an array of it with []); the order is the order in the file
PROVENANCE_KEYS: tuple[tuple[str, str, str], ...] = (
    ("format_version", "kurtail.format_version", "uint32"),
    ("tool", "kurtail.tool", "string"),
    ("target", "kurtail.target", "string"),
    ("rotation", "kurtail.rotation", "string"),
    ("objective", "kurtail.objective", "string"),
    ("weights", "kurtail.weights", "string"),
    ("tune_steps", "kurtail.tune_steps", "uint32"),
    ("seed", "kurtail.seed", "uint64"),
    ("r1_kind", "kurtail.r1.kind", "string"),
    ("r1_size", "kurtail.r1.size", "uint32"),
    ("r2_kind", "kurtail.r2.kind", "string"),
    ("r2_size", "kurtail.r2.size", "uint32"),
    ("r3_kind", "kurtail.r3.kind", "string"),
    ("r3_size", "kurtail.r3.size", "uint32"),
    ("r4_kind", "kurtail.r4.kind", "string"),
    ("r4_size", "kurtail.r4.size", "uint32"),
    ("diagonal", "kurtail.diagonal", "string"),
    ("rotations_sha256", "kurtail.rotations.sha256", "string"),
    ("activation_bits", "kurtail.activation_bits", "uint32"),
    ("activation_choice", "kurtail.activation_choice", "string"),
    ("activation_budget", "kurtail.activation_budget", "float32"),
    ("kv_bits", "kurtail.kv_bits", "uint32"),
    ("kv_choice", "kurtail.kv.choice", "string"),
    ("kv_budget", "kurtail.kv.budget", "float32"),
    ("kv_k_bits", "kurtail.kv.k_bits", "uint32[]"),
    ("kv_v_bits", "kurtail.kv.v_bits", "uint32[]"),
    ("kv_divergence", "kurtail.kv.divergence", "float32"),
    ("kv_perplexity", "kurtail.kv.perplexity", "float32"),
    ("kv_measured_tokens", "kurtail.kv.measured_tokens", "uint32"),
    ("calibration_name", "kurtail.calibration.name", "string"),
    ("calibration_tokens", "kurtail.calibration.tokens", "uint32"),
    ("calibration_sha256", "kurtail.calibration.sha256", "string"),
)

#: Format version in which transforms are told tensor by tensor; before, R4 stood before every ffn_down.
FIRST_WITH_ONLINE = 3

#: In an HF directory that was unpacked from a GGUF file: that file's keys. The vocabulary of whatever is written from the
#: directory is copied from it.
UNPACKED_KEYS = "unpacked-from.gguf"

#: what it means that a file lacks a key: it was written before there was one
_BEFORE_THE_KEY: Mapping[str, Any] = MappingProxyType(
    {
        "target": "kurtail", "activation_choice": "fixed", "activation_budget": 0.0, "rotations_sha256": "", "diagonal": "none",
        "kv_choice": "fixed", "kv_budget": 0.0, "kv_k_bits": (), "kv_v_bits": (), "kv_divergence": None,
        "kv_perplexity": None, "kv_measured_tokens": None,
    }
)  # fmt: skip

#: what keys are stored without, float32: each layer's ``[kv_heads, head_dim]`` one after the other, in the file's order
K_OFFSET = "kurtail.kv.k_offset"

#: transforms of single tensors' inputs at run time: names, kinds (only HADAMARD) and sizes of blocks
ONLINE_NAME, ONLINE_KIND, ONLINE_SIZE = "kurtail.online.name", "kurtail.online.kind", "kurtail.online.size"
HADAMARD = "hadamard"

#: upstream's keys for activation bits of single tensors: names, and whether 4 bits are allowed
TENSOR_EXTRA_NAME = "general.tensor_extra.name"
TENSOR_EXTRA_PREC_A4 = "general.tensor_extra.prec_a4"

#: The linears of a block, kt4, or q4_0 with ``--target stock``.
_BLOCK_LINEAR = re.compile(r"blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down)(_(exps|shexp))?)\.weight")


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
        """Whether it is one of the linears of a block, all experts of a layer together."""
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
        """``general.architecture``: prefix of the hyper-parameters' keys.

        Raises:
            GgufError: the file has no such key.
        """
        if "general.architecture" not in self.metadata:
            raise GgufError(f"{self.path} does not name its architecture: key general.architecture is missing")
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
        missing = [key for field, key, _ in PROVENANCE_KEYS if field not in present | _BEFORE_THE_KEY.keys()]
        if missing:
            raise GgufError(f"{self.path} has kurtail keys but lacks {', '.join(missing)}: convert the model again")
        values = {
            field: tuple(self.metadata[key]) if kind.endswith("[]") else self.metadata[key]
            for field, key, kind in PROVENANCE_KEYS
            if field in present
        }
        return Provenance(**{**_BEFORE_THE_KEY, **values})

    @property
    def online(self) -> dict[str, int]:
        """Sizes of the Hadamard blocks that tensors' inputs are multiplied by at run time, by the tensors' names."""
        provenance = self.provenance
        if provenance is None:
            return {}
        if provenance.format_version >= FIRST_WITH_ONLINE:
            return dict(zip(self.metadata.get(ONLINE_NAME, ()), self.metadata.get(ONLINE_SIZE, ()), strict=True))
        downs = (tensor.name for tensor in self.tensors if ".ffn_down" in tensor.name and tensor.is_block_linear)
        return dict.fromkeys(downs, provenance.r4_size) if provenance.r4_kind == HADAMARD else {}

    @property
    def requantized(self) -> str | None:
        """Types of the blocks' linears where they are not what ``convert`` wrote, as after llama-quantize; None where they are."""
        provenance = self.provenance
        types = {tensor.type_id: tensor.type_name for tensor in self.tensors if tensor.is_block_linear}
        if provenance is None or provenance.weights == "f32":
            return None
        written = ggml.Q4_0 if provenance.target == "stock" else ggml.KT4
        left = types.keys() - {written}
        if written in types and left <= {ggml.F32, ggml.F16, ggml.BF16}:
            return None  # a conversion by itself leaves some as they are
        return "+".join(sorted(types.values())) if left else None

    @property
    def runtime_bits(self) -> tuple[int | None, int]:
        """Bits of activations and of the default cache; None where llama.cpp's own kernels decide."""
        provenance = self.provenance
        if provenance is not None and provenance.target != "stock":
            rounded = provenance.weights != "f32" and self.requantized is None
            return provenance.activation_bits if rounded else None, provenance.kv_bits
        from_llama_quantize = any(tensor.type_id == ggml.KT4 for tensor in self.tensors)
        return 4 if from_llama_quantize else None, STOCK_KV_BITS

    @property
    def runs_as(self) -> str:
        """The same in a word: ``W4A4KV4``, ``stock W4`` (ours, for stock llama.cpp), ``stock`` (not ours).

        ``requantized q8_0 KV4`` was ours once, and is nothing that stock llama.cpp can run.
        ``W4A4+8KV4`` has some linears with activations of 8 bits, ``KV4+8`` some layers with keys or values of 8.
        """
        activations, cache = self.runtime_bits
        provenance = self.provenance
        if provenance is not None and (types := self.requantized) is not None:
            return f"stock {types}" if provenance.target == "stock" else f"requantized {types} {provenance.cache_as}"
        if activations is None:
            return "stock" if provenance is None else provenance.runs_as
        others = "".join(f"+{bits}" for bits in sorted(set(self.activation_exceptions.values())))
        return f"W4A{activations}{others}" + (f"KV{cache}" if provenance is None else provenance.cache_as)

    @property
    def activation_exceptions(self) -> dict[str, int]:
        """Block linears whose activation bits are not the file's general ones, and theirs."""
        general, _ = self.runtime_bits
        linears = (tensor.name for tensor in self.tensors if tensor.is_block_linear and general is not None)
        return {name: bits for name in linears if (bits := self.activation_bits_of(name)) != general}

    def activation_bits_of(self, tensor: str) -> int:
        """Bits of the activations that enter a block linear, as the runtime reads them."""
        default = int(self.metadata.get("kurtail.activation_bits", 4))
        names = self.metadata.get(TENSOR_EXTRA_NAME, [])
        if tensor not in names:
            return default
        return 4 if self.metadata[TENSOR_EXTRA_PREC_A4][names.index(tensor)] else 8


def online_parts(online: Mapping[str, int]) -> str:
    """:attr:`GgufInfo.online` in words, sizes of blocks by what reads the input: ``attn_q, attn_k 64; ffn_down 512``."""
    by_size: dict[int, dict[str, None]] = {}
    for name, size in online.items():
        by_size.setdefault(size, {})[name.split(".")[2]] = None
    return "; ".join(f"{', '.join(parts)} {size}" for size, parts in by_size.items()) or "none"


def read_gguf(path: Path) -> GgufInfo:
    """Read a GGUF file's keys and the list of its tensors.

    Raises:
        GgufError: one line: no such file, not a GGUF, truncated, an unknown type.
    """
    if not path.is_file():
        raise GgufError(f"{path} {'is a directory' if path.is_dir() else 'does not exist'}: give a GGUF file")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise GgufError(f"cannot read {path}: {error.strerror}") from None
    refuse_pointer(path, GgufError)
    if magic != b"GGUF":
        raise GgufError(f"{path} is not a GGUF file: it starts with {magic!r}")
    try:
        answer = vendored.run("kurtail_gguf.runtime.export.read_worker", {"path": str(path.resolve())})
    except vendored.WorkerError as error:
        raise GgufError(f"{path} {error}") from None
    tensors = tuple(TensorInfo(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in answer["tensors"])
    return GgufInfo(path=path, metadata=answer["metadata"], tensors=tensors)


def write_header(path: Path, out: Path) -> None:
    """Copy a GGUF file's keys, without its tensors, to a new file.

    transformers makes a tokenizer of such a file, and upstream's converter copies the vocabulary of it.
    """
    vendored.run("kurtail_gguf.runtime.export.header_worker", {"path": str(path.resolve()), "out": str(out.resolve())})


def _bits(tensors: tuple[TensorInfo, ...]) -> float:
    values = sum(tensor.values for tensor in tensors)
    return 8.0 * sum(tensor.bytes for tensor in tensors) / values if values else 0.0
