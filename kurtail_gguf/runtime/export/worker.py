"""Worker that writes GGUF files with the pinned source's own converter.

Hyper-parameters, vocabulary, special tokens and chat template are upstream's business: the model
class that ``conversion`` has for the architecture runs unchanged on the source directory. Only the
tensors come from elsewhere. A subclass replaces the list of tensors by the quantized ones; packed
rows go to the writer as they are, the rest (norms, biases) takes upstream's way. Of a directory
that was unpacked from a GGUF file another subclass copies the vocabulary as that file has it.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import conversion
import gguf
import numpy as np
import torch
from safetensors import safe_open

from kurtail_gguf.files.row_file import RowFile
from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.numerics.formats.targets import BLOCK_FORMATS
from kurtail_gguf.runtime import ggml, vendored
from kurtail_gguf.runtime.export.by_itself_model import by_itself_class
from kurtail_gguf.runtime.export.card import usable_card
from kurtail_gguf.runtime.export.header_worker import copy_key
from kurtail_gguf.runtime.export.hparams import has_other_words, known_to_upstream
from kurtail_gguf.runtime.export.keys import add_key, add_online, add_provenance
from kurtail_gguf.runtime.export.rows import RowsToWrite, chunks_of
from kurtail_gguf.runtime.gguf_info import K_OFFSET, UNPACKED_KEYS

#: Tables by the names of their files: what upstream's converter calls them.
_TABLES = {"embed_tokens.npy": "model.embed_tokens.weight", "lm_head.npy": "lm_head.weight"}

#: End of the name of what is added to scores where experts are chosen, and what upstream makes of that.
_CHOICE_BIAS = ("e_score_correction_bias", "e_score_correction.bias")
#: An expert's linear: what is before, the expert's number, what is after.
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")

Send = Callable[[dict[str, Any]], None]


class QuantizedFiles:
    """The directory of quantized tensors that the pipeline leaves for the export.

    Tables (.npy) are float32 ``[vocab, hidden]``; the safetensors files hold HF names: uint8 ``[out, row_bytes]`` is a packed
    linear, anything else float32.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.packed: dict[str, Path] = {}
        self.plain: dict[str, Path] = {}
        for path in (*sorted(directory.glob("layer-*.safetensors")), directory / "final.safetensors"):
            with safe_open(path, "np") as file:
                for name in file.keys():
                    kind = self.packed if file.get_slice(name).get_dtype() == "U8" else self.plain
                    kind[name] = path

    def load(self, name: str) -> np.ndarray:
        """One tensor, read from its file."""
        with safe_open(self.packed.get(name) or self.plain[name], "np") as file:
            return file.get_tensor(name)

    def expert_groups(self) -> dict[str, list[str]]:
        """Packed linears that lie in the file as one tensor, by the name of that: experts ``….experts.{N}.…`` in order
        of N without it, anything else by itself."""
        groups: dict[str, dict[int, str]] = {}
        for name in self.packed:
            match = _EXPERT.fullmatch(name)
            merged, number = (f"{match[1]}.{match[3]}", int(match[2])) if match else (name, 0)
            groups.setdefault(merged, {})[number] = name
        return {merged: [names[number] for number in sorted(names)] for merged, names in groups.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, without reading it."""
        with safe_open(self.packed.get(name) or self.plain[name], "np") as file:
            return tuple(file.get_slice(name).get_shape())


def quantized_model_class(
    base: type,
    files: QuantizedFiles,
    request: dict[str, Any],
    library: ggml.GgmlBase,
    send: Send,
) -> type:
    """A subclass of upstream's model class that writes our tensors and keys.

    Args:
        base: what ``conversion.get_model_class`` gives for the architecture.
        files: the quantized tensors.
        request: what ``export.writer.write_gguf`` asks for: fields of config.Provenance; types of tables; sizes of online
            transforms by the tensors' names; packed linears that are listed for 8-bit activations (all of them where that is
            the general rule); the key ``kurtail.kv.k_offset`` or None.
        library: quantizes the embedding and the output.
        send: reports each tensor as it is written or handed over.
    """

    provenance, eight_bit, k_offset = (request[key] for key in ("provenance", "eight_bit", "k_offset"))

    class Quantized(base):  # type: ignore[misc, valid-type]
        # upstream refuses a subclass that does not state it
        model_arch = base.model_arch

        def index_tensors(self, remote_hf_model_id: str | None = None) -> dict[str, Callable[[], torch.Tensor]]:
            # a bias that is no linear's: upstream gives it another name where it reads a checkpoint
            return {name.replace(*_CHOICE_BIAS): self._plain(name) for name in files.plain}

        def _plain(self, name: str) -> Callable[[], torch.Tensor]:
            def load() -> torch.Tensor:
                send({"tensor": name})
                return torch.from_numpy(files.load(name))

            return load

        def tensor_force_quant(self, name: str, new_name: str, bid: int | None, n_dims: int) -> Any:
            # whatever is not packed stays as it was computed
            return gguf.GGMLQuantizationType.F32

        def prepare_tensors(self) -> None:
            for file, ggml_type in request["tables"].items():
                self._add_rows(_TABLES[file], RowFile(files.directory / file), ggml_type)
            for merged, names in files.expert_groups().items():
                self._add_packed(merged, names)
            super().prepare_tensors()

        def _add_rows(self, name: str, rows: RowFile, ggml_type: int) -> None:
            count, width = rows.shape

            def chunks() -> Iterator[np.ndarray]:
                for some in chunks_of(rows):
                    yield some if ggml_type == ggml.F32 else library.quantize(some, ggml_type)

            row_bytes = 4 * width if ggml_type == ggml.F32 else library.row_bytes(ggml_type, width)
            self._add(name, (count, row_bytes), chunks, ggml_type)

        def _add_packed(self, merged: str, names: list[str]) -> None:
            def chunks() -> Iterator[np.ndarray]:
                for name in names:
                    yield self._reorder(name, files.load(name))

            shape = files.shape(names[0]) if names == [merged] else (len(names), *files.shape(names[0]))
            self._add(merged, shape, chunks, BLOCK_FORMATS[provenance["target"]].type_id)

        def _reorder(self, name: str, packed: np.ndarray) -> np.ndarray:
            # q and k of Llama: rows go from halves to pairs, as the runtime's RoPE wants them. A row's
            # codes and scales move together, so upstream's own permutation serves for the bytes.
            if getattr(self, "undo_permute", False) and name.endswith((".q_proj.weight", ".k_proj.weight")):
                heads = self.find_hparam(["n_heads", "num_attention_heads"])
                kv_heads = heads
                if name.endswith(".k_proj.weight"):
                    kv_heads = self.find_hparam(["n_kv_heads", "num_key_value_heads"], optional=True) or heads
                return self.permute(packed, heads, kv_heads)
            return packed

        def _add(
            self, name: str, shape: tuple[int, ...], chunks: Callable[[], Iterator[np.ndarray]], ggml_type: int
        ) -> None:
            rows = RowsToWrite(shape, chunks, lambda: send({"tensor": name}))
            gguf_type = gguf.GGMLQuantizationType(ggml_type)
            self.gguf_writer.add_tensor(self.map_tensor_name(name), rows, raw_dtype=gguf_type)

        def set_gguf_parameters(self) -> None:
            super().set_gguf_parameters()
            add_provenance(self.gguf_writer, provenance)
            if k_offset is not None:
                add_key(self.gguf_writer, K_OFFSET, k_offset, "float32[]")
            if provenance["target"] == "kurtail":
                add_online(self.gguf_writer, request["online"])
            groups = files.expert_groups()
            listed = groups if provenance["activation_bits"] == 8 else [name for name, own in groups.items() if own[0] in eight_bit]
            if provenance["target"] == "kurtail" and listed:
                # upstream's own keys for what a backend may not round to 4 bits
                names = sorted(self.map_tensor_name(name) for name in listed)
                self.gguf_writer.add_tensor_extra_prec_a4(names, [False] * len(names))

    return Quantized


def write_quantized(request: dict[str, Any], send: Send) -> None:
    """Write ``out`` from ``source`` (HF directory) and ``quantized`` (directory of tensors)."""
    source, out = Path(request["source"]), Path(request["out"])
    files = QuantizedFiles(Path(request["quantized"]))
    base = _model_class(source)
    if request["context"]:
        base = _shortened(base, request["context"])
    provenance = request["provenance"]
    model_class = quantized_model_class(base, files, request, ggml.GgmlBase(), send)
    # upstream numbers a file's type as its tensors' for both of ours, and for float32
    file_type = 0 if provenance["weights"] == "f32" else BLOCK_FORMATS[provenance["target"]].type_id
    _write(model_class(source, gguf.LlamaFileType(file_type), out), source, out)


def write_by_itself(request: dict[str, Any], send: Send) -> dict[str, str]:
    """Write ``out`` from ``source`` by upstream's converter, but for the linears that the request names.

    Returns:
        The linears, by their names below the layers' list, of the file's tensors that were listed.
    """
    source, out = Path(request["source"]), Path(request["out"])
    base, rounded = _model_class(source), request["packed"] is not None
    made: dict[str, str] = {}
    model_class = by_itself_class(base, request, ggml.GgmlBase(), made, send)
    model = model_class(source, gguf.LlamaFileType.ALL_F32, out)
    if rounded and (widest := _widest_matrix_type(model)) is not gguf.LlamaFileType.ALL_F32:
        model = model_class(source, widest, out)
    _write(model, source, out)
    return made


def write_reference(request: dict[str, Any], send: Send) -> None:
    """Write ``out`` from ``source`` by upstream's converter as it is, in the checkpoint's precision or in 8 bits."""
    source, out = Path(request["source"]), Path(request["out"])
    if request["type"] == "q8_0":
        _write(_model_class(source)(source, gguf.LlamaFileType.MOSTLY_Q8_0, out), source, out)
        return
    model = _model_class(source)(source, gguf.LlamaFileType.ALL_F32, out)
    widest = _widest_matrix_type(model)
    if widest is not gguf.LlamaFileType.ALL_F32:
        model = type(model)(source, widest, out)
    _write(model, source, out)


def write_metadata(request: dict[str, Any], send: Send) -> dict[str, Any]:
    """Write a file ``out`` of all keys for ``source`` and no tensors.

    Returns:
        ``factors``: values of the tensors that the converter adds by itself, by name; ``dropped``: a line for each field
        that the file cannot hold.
    """
    source, out = Path(request["source"]), Path(request["out"])
    base = _model_class(source)
    model = (_shortened(base, request["context"]) if request["context"] else base)(source, gguf.LlamaFileType.ALL_F32, out)
    # some families add keys there
    factors = {name: tensor.flatten().tolist() for name, tensor in model.generate_extra_tensors()}
    dropped: list[str] = []
    _prepare_metadata(model, source, dropped.append)
    model.gguf_writer.write_header_to_file(path=out)
    model.gguf_writer.write_kv_data_to_file()
    # a list of no tensors ends the file as the format wants it
    model.gguf_writer.write_tensors_to_file()
    model.gguf_writer.close()
    return {"factors": factors, "dropped": dropped}


def _prepare_metadata(model: Any, source: Path, dropped: Callable[[str], None] = lambda line: None) -> None:
    with usable_card(source, dropped) as card:
        model.dir_model_card = card
        model.prepare_metadata(vocab_only=False)


def _shortened(base: type, context: int) -> type:
    """A subclass of upstream's model class that writes ``context`` tokens for the model's context."""

    class Shortened(base):  # type: ignore[misc, valid-type]
        model_arch = base.model_arch

        def set_gguf_parameters(self) -> None:
            super().set_gguf_parameters()
            self.gguf_writer.add_context_length(context)

    return Shortened


def _widest_matrix_type(model: Any) -> gguf.LlamaFileType:
    # Upstream's own guess stops at the first 16-bit tensor and takes float32 to float16: not a reference.
    dtypes = {tensor.dtype for _, tensor in model.get_tensors() if tensor.dim() >= 2}
    if dtypes == {torch.bfloat16}:
        return gguf.LlamaFileType.MOSTLY_BF16
    if dtypes == {torch.float16}:
        return gguf.LlamaFileType.MOSTLY_F16
    return gguf.LlamaFileType.ALL_F32


def _model_class(source: Path) -> type:
    hparams = conversion.ModelBase.load_hparams(source, False)
    architecture = conversion.get_model_architecture(hparams, conversion.ModelType.TEXT)
    base = conversion.get_model_class(architecture)
    # Mistral 3's is a shell around one of two others; that around Mistral 4's is for no model that is converted here
    base = _without_prediction(getattr(base, "Ministral3Model", base))
    if has_other_words(architecture):
        base = _told(base, known_to_upstream(architecture, hparams))
    keys = source / UNPACKED_KEYS
    return _with_vocabulary(base, keys) if keys.is_file() else base


def _told(base: type, hparams: dict[str, Any]) -> type:
    """A subclass of upstream's model class that reads these hyper-parameters and not config.json."""

    class Told(base):  # type: ignore[misc, valid-type]
        model_arch = base.model_arch

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{"hparams": copy.deepcopy(hparams), **options})

    return Told


def _without_prediction(base: type) -> type:
    """A subclass of upstream's model class that leaves out what predicts further tokens, layers behind the model's own, where
    upstream's writes it: it is not quantized, and the runtime's answers are the same without."""
    if not getattr(base, "supports_mtp_export", False):
        return base

    class Without(base):  # type: ignore[misc, valid-type]
        model_arch = base.model_arch
        no_mtp = True

    return Without


def _with_vocabulary(base: type, keys: Path) -> type:
    """A subclass of upstream's model class whose vocabulary is that of a GGUF file, key for key.

    The tokenizer that transformers makes of a GGUF has lost the scores of SentencePiece, the types of tokens and flags,
    which upstream would then write as it guesses them.
    """

    class Unpacked(base):  # type: ignore[misc, valid-type]
        model_arch = base.model_arch

        def set_vocab(self) -> None:
            reader = gguf.GGUFReader(keys)
            tokens = len(reader.fields["tokenizer.ggml.tokens"].data)
            for name in (f"tokenizer.ggml.{end}_token_id" for end in ("bos", "eos")):
                if name in reader.fields and not 0 <= (number := reader.fields[name].contents()) < tokens:
                    raise KurtailError(f"{keys}: {name} {number} is not in the vocabulary of {tokens} tokens")
            for name in reader.fields:
                if name.startswith("tokenizer."):
                    copy_key(reader, name, self.gguf_writer)

    return Unpacked


def _write(model: Any, source: Path, out: Path) -> None:
    with torch.inference_mode():
        model.prepare_tensors()
        _prepare_metadata(model, source)
    expected = sum(info.nbytes for shard in model.gguf_writer.tensors for info in shard.values())
    try:
        model.gguf_writer.write_header_to_file(path=out)
        model.gguf_writer.write_kv_data_to_file()
        model.gguf_writer.write_tensors_to_file()
        model.gguf_writer.close()
    except OSError as error:
        reason = error.strerror or str(error)
        size = math.ceil(expected / 1e6)
        raise KurtailError(f"{reason}: about {size} MB are needed there") from None


_TASKS = {
    "quantized": write_quantized,
    "by itself": write_by_itself,
    "reference": write_reference,
    "metadata": write_metadata,
}


def handle(request: dict[str, Any], send: Send) -> Any:
    """Do the task that the request names."""
    vendored.assert_vendored(gguf)
    vendored.assert_vendored(conversion)
    return _TASKS[request["task"]](request, send)


if __name__ == "__main__":
    vendored.serve(handle)
