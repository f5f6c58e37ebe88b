"""Writes GGUF files whole or not at all."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from kurtail_gguf.files.atomic import publish, scratch_beside
from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.runtime import vendored
from kurtail_gguf.runtime.gguf_info import UNPACKED_KEYS, read_gguf
from kurtail_gguf.runtime.provenance import TOOL, Provenance

_WORKER, _ADAPTER_WORKER = "kurtail_gguf.runtime.export.worker", "kurtail_gguf.runtime.export.adapter_worker"

#: Files that hold a vocabulary, one of which a tokenizer has.
_VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json", "*.tiktoken", UNPACKED_KEYS,
)  # fmt: skip

#: Types of a file that is not ours: the checkpoint's floating-point type, or 8 bits.
REFERENCE_TYPES = ("auto", "q8_0")


class ExportError(KurtailError):
    """A GGUF file could not be written."""


def no_tokenizer(directory: Path) -> str | None:
    """What is wrong with an HF directory that holds no file of a vocabulary; None where it holds one."""
    if any(next(directory.glob(name), None) for name in _VOCABULARIES):
        return None
    return (
        f"{directory} contains no tokenizer (none of {', '.join(_VOCABULARIES[:4])}): copy the tokenizer's files there "
        "from the original model"
    )


def write_gguf(
    source: Path,
    quantized: Path,
    out: Path,
    provenance: Provenance,
    progress: Progress,
    tables: Mapping[str, int],
    online: Mapping[str, int],
    eight_bit: Collection[str] = (),
    k_offset: Sequence[float] | None = None,
    context: int = 0,
    check: Callable[[Path], None] = lambda path: None,
    converter: vendored.Worker | None = None,
) -> None:
    """Write the quantized model as a GGUF file.

    The same arguments give the same bytes. ``out`` appears only when it is complete and on disk.

    Args:
        source: the HF directory: configuration, tokenizer and model card.
        quantized: directory that ``layerwise.fold_and_quantize`` filled: uint8 rows of the target's format for packed
            linears in HF's row order, float32 for the rest.
        out: the file to write; an existing one is replaced.
        provenance: the ``kurtail.*`` keys.
        progress: one stage, a unit a tensor.
        tables: types of embedding and head by the names of their files in ``quantized``; only the former where one table
            serves for both.
        online: sizes of the Hadamard blocks that inputs are multiplied by at run time, by the tensors' names in the file.
        eight_bit: HF names of packed linears whose activations have 8 bits where the others' have 4.
        k_offset: what keys are stored without (docs/format.md), in the file's order; None for nothing.
        context: tokens that the file says the model is for; 0 for what the model says.
        check: called with the finished file before it becomes ``out``; what it raises leaves no file behind.
        converter: what :func:`start_converter` gave; None for one of its own.

    Raises:
        ExportError: a full disk, no permission, a tokenizer that upstream's converter does not know.
    """
    request = {
        "task": "quantized",
        "source": str(source.resolve()),
        "quantized": str(quantized.resolve()),
        "provenance": asdict(provenance),
        "tables": dict(tables),
        "online": dict(online),
        "eight_bit": sorted(eight_bit),
        "k_offset": None if k_offset is None else list(k_offset),
        "context": context,
    }
    _export(request, out, _count_tensors(quantized), progress, check, converter)


def export_reference(source: Path, out: Path, outtype: str = "auto", converter: vendored.Worker | None = None) -> None:
    """Write a GGUF file by upstream's converter as it is.

    Args:
        source: HF directory.
        out: the file to write.
        outtype: ``auto``: bf16 or f16 where every matrix of the checkpoint is, else f32; ``q8_0``: upstream's 8 bits.
        converter: one that runs already; None starts one.
    """
    if outtype not in REFERENCE_TYPES:
        raise ExportError(f"a reference of type {outtype!r} is not supported: choose {', '.join(REFERENCE_TYPES)}")
    with _whole_or_not_at_all(out) as beside:
        request = {"task": "reference", "source": str(source.resolve()), "out": str(beside), "type": outtype}
        _run(request, f"cannot write {out}", converter=converter)


def write_by_itself(
    source: Path,
    sums: Mapping[str, npt.NDArray[np.float64]],
    columns: Mapping[str, int],
    packed: Path | None,
    out: Path,
    provenance: Provenance,
    progress: Progress,
    check: Callable[[Path], None] = lambda path: None,
    converter: vendored.Worker | None = None,
    kept: Collection[str] = (),
) -> dict[str, str]:
    """Write a model that no family describes as a GGUF file, the inputs of its linears transformed at run time.

    Args:
        source: the HF directory.
        sums: by the names of the linears' weights from the list of layers on, what their rows are known by
            (:func:`kurtail_gguf.runtime.export.rows.row_sums`), of experts one after the other.
        columns: by the same names, how many values a row has.
        packed: directory of their packed rows (:func:`kurtail_gguf.runtime.export.rows.rows_file`), of the transformed weight in
            the order of the model's rows; None for a file of float32.
        out: the file to write; an existing one is replaced.
        provenance: the ``kurtail.*`` keys.
        progress: one stage, a unit a linear.
        check: called with the finished file before it becomes ``out``; what it raises leaves no file behind.
        converter: one that runs already; None starts one.
        kept: tensors of layers that stay as upstream writes them, ``attn_q.weight``.

    Returns:
        The linears by the file's tensors. Those that are not among them stay as upstream's converter writes them: it made
        something of their values that is not known.

    Raises:
        ExportError: a full disk, no permission, a model or tokenizer that upstream's converter does not know.
    """
    with tempfile.TemporaryDirectory(prefix="kurtail-rows-") as directory:
        known = Path(directory) / "sums.npz"
        np.savez(known, **sums)
        request = {
            "task": "by itself",
            "source": str(source.resolve()),
            "sums": str(known),
            "columns": dict(columns),
            "packed": None if packed is None else str(packed.resolve()),
            "provenance": asdict(provenance),
            "kept": sorted(kept),
        }
        return _export(request, out, len(sums), progress, check, converter)


@dataclass(frozen=True, slots=True)
class Header:
    """What upstream's converter writes for an HF directory, without the model's tensors.

    Args:
        metadata: every key, as :func:`read_gguf` gives them.
        factors: values of the tensors that it adds by itself, those of RoPE's scaling, by name.
        dropped: a line for each optional field of README.md or generation_config.json that the file cannot hold.
    """

    metadata: Mapping[str, Any]
    factors: Mapping[str, Sequence[float]]
    dropped: tuple[str, ...]


def start_converter() -> vendored.Worker:
    """Upstream's converter, to be asked by :func:`read_header` and :func:`write_gguf`: its imports take seconds."""
    return vendored.Worker(_WORKER)


def read_header(source: Path, context: int = 0, converter: vendored.Worker | None = None) -> Header:
    """Write what :func:`write_gguf` writes beside the tensors, and read it again.

    Meant to be asked before the work of hours, whose end would find out else what cannot be written.

    Args:
        source: HF directory.
        context: as :func:`write_gguf`'s.
        converter: likewise.

    Raises:
        ExportError: a model or tokenizer that upstream's converter does not know or cannot write.
    """
    with tempfile.TemporaryDirectory(prefix="kurtail-header-") as directory:
        scratch = Path(directory) / "header.gguf"
        request = {"task": "metadata", "source": str(source.resolve()), "out": str(scratch), "context": context}
        answer = _run(request, f"the vocabulary or configuration of {source} cannot be written", converter=converter)
        return Header(read_gguf(scratch).metadata, answer["factors"], tuple(answer["dropped"]))


def write_adapter(tensors: Path, architecture: str, rotations: str, out: Path) -> None:
    """Write a LoRA adapter as a GGUF file.

    Args:
        tensors: safetensors of float32 matrices, named as in the file (``blk.0.attn_q.weight.lora_a``).
        architecture: ``general.architecture`` of the model's file.
        rotations: ``kurtail.rotations.sha256`` of the model's file.
        out: the file to write; an existing one is replaced.
    """
    request = {"tensors": str(tensors.resolve()), "architecture": architecture, "rotations": rotations, "tool": TOOL}
    with _whole_or_not_at_all(out) as beside:
        with vendored.Worker(_ADAPTER_WORKER) as worker:
            _run({**request, "out": str(beside)}, f"cannot write {out}", converter=worker)


def _export(
    request: dict[str, Any],
    out: Path,
    units: int,
    progress: Progress,
    check: Callable[[Path], None],
    converter: vendored.Worker | None,
) -> Any:
    """Have a file written: a stage of so many units, one for each tensor that the worker tells of. The worker's answer."""
    with progress.stage("export", units) as stage, _whole_or_not_at_all(out) as beside:

        def on_message(message: dict[str, Any]) -> None:
            stage.advance(1, message["tensor"])

        answer = _run({**request, "out": str(beside)}, f"cannot write {out}", on_message, converter)
        check(beside)
    return answer


def _run(
    request: dict[str, Any],
    what: str,
    on_message: Callable[[dict[str, Any]], None] = lambda message: None,
    converter: vendored.Worker | None = None,
) -> Any:
    try:
        with contextlib.nullcontext(converter) if converter is not None else start_converter() as worker:
            return worker.ask(request, on_message)
    except vendored.WorkerError as error:
        # upstream and transformers then blame packages that are installed
        lacking = None if "source" not in request else no_tokenizer(Path(request["source"]))
        raise ExportError(f"{what}: {lacking or error}") from None


@contextlib.contextmanager
def _whole_or_not_at_all(out: Path) -> Iterator[Path]:
    """A path beside ``out`` that replaces it on success and is removed on any failure."""
    # resolved: where OUT is a link, what it points at is replaced, not the link
    target = out.resolve()
    if target.is_dir():
        raise ExportError(f"cannot write {out}: it is a directory")
    beside = scratch_beside(target)
    try:
        beside.touch()
    except OSError as error:
        raise ExportError(f"cannot write {out}: {error.strerror}: choose another OUT") from None
    try:
        yield beside
        try:
            publish(beside, target)
        except OSError as error:
            raise ExportError(f"cannot write {out}: {error.strerror}") from None
    finally:
        beside.unlink(missing_ok=True)


def _count_tensors(quantized: Path) -> int:
    count = len(list(quantized.glob("*.npy")))  # embedding and head
    for path in quantized.glob("*.safetensors"):
        try:
            with safe_open(path, "np") as file:
                count += len(file.keys())
        except (SafetensorError, OSError) as error:
            raise ExportError(f"{path} is damaged ({error}): remove the work directory and convert again") from None
    return count
