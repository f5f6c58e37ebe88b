"""Streaming reader of an HF directory: memory-mapped weights, one layer's tensors at a time."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from kurtail_gguf.messages.errors import SourceError
from kurtail_gguf.model.build import build_spec
from kurtail_gguf.model.families.registry import TEXT_PREFIXES, find_family
from kurtail_gguf.model.loading.untrusted import check_sizes, check_token_ids, read_json
from kurtail_gguf.model.loading.weight_files import WeightFiles, check_directory
from kurtail_gguf.model.spec import ModelSpec

#: What can be read, and bytes of a value.
_DTYPES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
#: Ends of the names of what a layer computes anew and old exports saved with its weights; nobody reads it.
_BUFFERS = (
    *(".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached"),
    *(".attention_mask", ".causal_mask", ".attention.bias", ".attention.masked_bias"),
)
#: What is told of a head that is neither saved nor said to be the embedding: transformers makes one of random numbers.
_NO_HEAD = (
    ", and config.json declares an untied head (tie_word_embeddings false or missing): set tie_word_embeddings to true if "
    "the head is the embedding, or download the shard that contains it"
)
#: Rows of an embedding checked or converted at once: 8192 x 4096 float32 is 128 MiB.
CHUNK_ROWS = 8192


def single(_name: str) -> torch.dtype:
    """Single precision, whatever the tensor's name."""
    return torch.float32


@dataclass(frozen=True)
class Checkpoint:
    """An HF directory opened for reading; every tensor's place, shape and dtype was checked.

    Args:
        directory: the HF directory.
        config: transformers' config object for it, of its text where it is more than that.
        spec: sizes and roles.
        files: where each tensor lies.
        notes: what a user should know of it, a line each.
    """

    directory: Path
    config: Any
    spec: ModelSpec
    files: WeightFiles
    notes: tuple[str, ...] = ()

    def tensor(self, name: str, check: bool = False) -> torch.Tensor:
        """One tensor as stored, a view of the mapped file (of any floating type up to 64 bits), not to be written to.

        Raises:
            SourceError: with ``check``, where a weight is NaN or infinite; a file that changed since it was opened first.
        """
        path = self.files.by_tensor[name]
        with self.files.open(path) as file:
            tensor = file.get_tensor(name)
        if check:
            _check_finite(tensor, name, path)
        return tensor

    def layer(
        self,
        index: int,
        device: str | torch.device = "cpu",
        check: bool = False,
        dtype_of: Callable[[str], torch.dtype] = single,
    ) -> dict[str, torch.Tensor]:
        """All tensors of a layer, by name below ``model.layers.N.``.

        Args:
            index: layer number.
            device: where to put them; on the CPU float32 tensors stay views of the mapped file. They must not be written
                to: a pickle stays mapped, and whoever reads the layer next would get what was written.
            check: refuse NaN and infinities.
            dtype_of: what a tensor of this name is wanted in.

        Returns:
            float32 tensors where ``dtype_of`` says nothing else, shapes as in ``spec.layer_shapes()``.

        Raises:
            SourceError: with ``check``, NaN or infinite weights; a file that changed since it was opened first.
        """
        stored = self.stored_layer(index, check)
        return {name: tensor.to(device, dtype_of(name)) for name, tensor in stored}

    def stored_layer(self, index: int, check: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """A layer's tensors as stored, one by one, with their names: views of the mapped file, as :meth:`tensor`'s."""
        # Opened once a file and not once a tensor: generation asks for every layer at every token.
        for path, names in self._layer_files(index).items():
            with self.files.open(path) as file:
                for name in names:
                    tensor = file.get_tensor(name)
                    if check:
                        _check_finite(tensor, name, path)
                    yield name.removeprefix(self.spec.layer_prefix(index)), tensor
                    del tensor

    def stored_sizes(self, index: int) -> dict[str, int]:
        """Bytes of a layer's tensors as stored, from the shards' headers."""
        found = {}
        for path, names in self._layer_files(index).items():
            with self.files.open(path) as file:
                for name in names:
                    info = file.get_slice(name)
                    size = _DTYPES[info.get_dtype()] * math.prod(info.get_shape())
                    found[name.removeprefix(self.spec.layer_prefix(index))] = size
        return found

    def _layer_files(self, index: int) -> dict[Path, list[str]]:
        """Full names of a layer's tensors by the file that holds them."""
        found: dict[Path, list[str]] = {}
        for name in self.spec.at(index).layer_shapes():
            full = self.spec.layer_prefix(index) + name
            found.setdefault(self.files.by_tensor[full], []).append(full)
        return found

    def rows(self, name: str, chunk: int = CHUNK_ROWS) -> Iterator[tuple[int, torch.Tensor]]:
        """A matrix in chunks of rows: ``(first row, float32 [≤ chunk, columns])``, checked for NaN."""
        path = self.files.by_tensor[name]
        with self.files.open(path) as file:
            rows = file.get_slice(name)
            total = rows.get_shape()[0]
            for start in range(0, total, chunk):
                piece = rows[start : min(start + chunk, total)]
                _check_finite(piece, name, path)
                yield start, piece.to(torch.float32)

    def check_filled(self) -> None:
        """Refuse what is no model for its zeros: a download that reserved its space and was broken off leaves them.

        Zeros that models do have pass: biases, rows of unused tokens, what was pruned, up to all linears of a layer. A
        row is read of most tensors that are looked at, and the whole of what is zeros.

        Raises:
            SourceError: embedding, final norm or head, all of a layer, or every layer's linears are zeros.
        """
        spec, by_tensor = self.spec, self.files.by_tensor
        for name in spec.top_shapes():
            if not name.endswith(".bias") and not self._filled(name):
                raise SourceError(f"{by_tensor[name]}: tensor {name} contains only zeros: download the file again")
        for layer in range(spec.layers):
            prefix, names = spec.layer_prefix(layer), tuple(spec.at(layer).layer_shapes())
            if not any(self._filled(prefix + name) for name in names):
                raise SourceError(
                    f"{by_tensor[prefix + names[0]]}: all of {prefix.removesuffix('.')} is zeros: download the file again, "
                    "or remove the layer from the model if it is meant to do nothing"
                )
        linears = (spec.layer_prefix(layer) + name for layer in range(spec.layers) for name in spec.at(layer).linears)
        if not any(self._filled(f"{name}.weight") for name in linears):
            raise SourceError(
                f"{self.directory}: the linears of all {spec.layers} layers contain only zeros: download the model again"
            )

    def _filled(self, name: str) -> bool:
        """Whether a tensor holds anything but zeros; it is read as far as the first rows that do."""
        with self.files.open(self.files.by_tensor[name]) as file:
            rows = file.get_slice(name)
            start, count = 0, 1
            while start < rows.get_shape()[0]:
                if rows[start : start + count].any():
                    return True
                start, count = start + count, min(2 * count, CHUNK_ROWS)
        return False

    @property
    def head_name(self) -> str:
        """Name of the tensor that holds the output head's weights (the embedding's where tied)."""
        family = self.spec.family
        return f"{family.embedding if self.spec.tied else family.head}.weight"

    def fingerprint(self) -> str:
        """Hex digest of config.json and of every shard's name, size and time of change.

        Cheap, and enough to notice that a checkpoint changed between two runs in one work directory.
        """
        return fingerprint(self.directory, self.files.stamps)


def fingerprint(directory: Path, stamps: Mapping[Path, tuple[int, int]]) -> str:
    """:meth:`Checkpoint.fingerprint` of weight files with these stamps, as :func:`weight_files.stamp` gives them."""
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for path, (size, changed) in stamps.items():
        digest.update(f"{path.name} {size} {changed}\n".encode())
    return digest.hexdigest()


def open_checkpoint(directory: Path, allow_pickle: bool = False) -> Checkpoint:
    """Open an HF directory and check that every tensor the architecture needs is there and fits.

    Weights themselves are read, and checked for NaN, only when a step asks for them; see also
    :meth:`Checkpoint.check_filled`.

    Args:
        directory: the HF directory.
        allow_pickle: read ``.bin`` files where there are no safetensors.

    Raises:
        UnsupportedArchitecture: the model is not one that can be converted exactly.
        SourceError: no config.json, a missing, truncated or outlying shard, a missing tensor, a wrong
            shape or dtype, begin or end of text that the vocabulary does not have, pickles that are not allowed;
            the message names file and tensor.
    """
    check_directory(directory)
    raw, config, spec = read_spec(directory)
    family = spec.family
    check_token_ids(raw, spec.vocab_size, directory / "config.json")
    generation = directory / "generation_config.json"
    check_token_ids(_generation_config(generation), spec.vocab_size, generation)
    files = WeightFiles(directory, allow_pickle, () if raw["architectures"][0] == family.architecture else TEXT_PREFIXES)
    if family.experts is not None and family.experts.fused:
        files.split(family.experts.fused)
    saved = spec.tied and f"{family.head}.weight" in files.by_tensor
    _check_tensors(replace(spec, tied=False) if saved else spec, files, directory)
    checkpoint = Checkpoint(directory, config, spec, files)
    if not saved or _same_tables(checkpoint):
        return checkpoint
    # the tensors decide, as they do for transformers and for upstream's converter
    config.tie_word_embeddings = False
    spec = build_spec(family, config.to_dict())  # not every graph of upstream's has a head of its own
    note = (
        f"{directory / 'config.json'}: tie_word_embeddings is true, but {family.head}.weight differs from the embedding: "
        "it is used as the head, as transformers does; set tie_word_embeddings to false"
    )
    return replace(checkpoint, spec=spec, notes=(note,))


def read_spec(directory: Path) -> tuple[dict[str, Any], Any, ModelSpec]:
    """What config.json says: as it is, as transformers' object for the text model, and as what is converted.

    Raises:
        UnsupportedArchitecture, SourceError: as :func:`open_checkpoint`.
    """
    raw = read_json(directory / "config.json", remedy="MODEL must be a directory that contains config.json")
    architectures = raw.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise SourceError(f"{directory / 'config.json'}: 'architectures' must name one architecture")
    text = raw.get("text_config")
    text_type = text.get("model_type") if isinstance(text, dict) else None
    family = find_family(str(architectures[0]), str(text_type))
    config = load_config(directory, raw).get_text_config()
    check_sizes(config.to_dict(), directory / "config.json")
    try:
        spec = build_spec(family, config.to_dict())
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise SourceError(f"{directory / 'config.json'}: {type(error).__name__} {error}") from error
    return raw, config, spec


def _generation_config(path: Path) -> dict[str, Any]:
    """What the file says; nothing where there is none or, as in some models, one that is no JSON: upstream goes on too."""
    try:
        return read_json(path, remedy="")
    except SourceError:
        return {}


def load_config(directory: Path, raw: Mapping[str, Any]) -> Any:
    """transformers' configuration of an HF directory; ``raw`` is its config.json.

    Raises:
        SourceError: sizes that are none, or transformers rejects it.
    """
    for part in (raw, raw.get("text_config")):
        if isinstance(part, dict):
            check_sizes(part, directory / "config.json")  # transformers makes lists as long as the layers are many
    from transformers import AutoConfig  # takes seconds to import: only once a checkpoint looks sane

    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers makes of a bad config, it is the config's fault
        raise SourceError(f"{directory / 'config.json'}: transformers rejects it: {error}") from error


def _same_tables(checkpoint: Checkpoint) -> bool:
    """Whether the head that was saved is the embedding, value by value."""
    family = checkpoint.spec.family
    pairs = zip(checkpoint.rows(f"{family.embedding}.weight"), checkpoint.rows(f"{family.head}.weight"), strict=True)
    return all(torch.equal(embedding, head) for (_, embedding), (_, head) in pairs)


def _check_tensors(spec: ModelSpec, files: WeightFiles, directory: Path) -> None:
    expected = _expected(spec, files.by_tensor, directory)
    by_file: dict[Path, list[str]] = {}
    for name in expected:
        by_file.setdefault(files.by_tensor[name], []).append(name)
    for path, names in by_file.items():
        with files.open(path) as file:
            present = set(file.keys())
            for name in names:
                if name not in present:
                    raise SourceError(
                        f"{path}: tensor {name} is missing, although the index lists it in this file: download the file "
                        "again"
                    )
                info = file.get_slice(name)
                shape, dtype = tuple(info.get_shape()), info.get_dtype()
                if shape != expected[name]:
                    raise SourceError(
                        f"{path}: tensor {name} has shape {list(shape)}, but config.json requires {list(expected[name])}"
                    )
                if dtype not in _DTYPES:
                    raise SourceError(
                        f"{path}: tensor {name} is {dtype}; only {', '.join(sorted(_DTYPES))} are supported"
                    )
    tops = tuple(f"{name}." for name in (spec.family.embedding, spec.family.final_norm, spec.family.head))
    for name, path in files.by_tensor.items():
        # a bias that the architecture does not know would be dropped in silence
        layer = _LAYER.match(name)
        known = name in expected or name.endswith(_BUFFERS) or name == f"{spec.family.head}.weight"
        if not known and (name.startswith(tops) or (layer and int(layer[1]) < spec.layers)):
            raise SourceError(f"{path}: tensor {name} is unknown to {spec.family.architecture}")


def _expected(spec: ModelSpec, files: dict[str, Path], directory: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors by name. It ends at the first that is missing: a config may name any number of layers."""
    expected: dict[str, tuple[int, ...]] = {}
    usual, dense = spec.layer_shapes(), spec.dense.layer_shapes() if spec.dense else {}
    layers = ((spec.layer_prefix(layer), dense if layer in spec.dense_layers else usual) for layer in range(spec.layers))
    for prefix, part in chain([("", spec.top_shapes())], layers):
        for name, shape in part.items():
            if prefix + name not in files:
                remedy = _NO_HEAD if name == f"{spec.family.head}.weight" else ""
                raise SourceError(f"{directory}: tensor {prefix}{name} is missing from the checkpoint{remedy}")
            expected[prefix + name] = shape
    return expected


def _check_finite(tensor: torch.Tensor, name: str, path: Path) -> None:
    # what is computed with is single precision, which holds less than float64
    if not torch.isfinite(tensor.to(torch.float32)).all():
        raise SourceError(f"{path}: tensor {name} contains NaN or infinite weights: the checkpoint is damaged")
