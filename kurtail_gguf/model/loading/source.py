"""MODEL, whatever it is, to an HF directory: a directory, a GGUF file, a model of the Hub, or a recipe's name."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kurtail_gguf.files.kinds import refuse_pointer
from kurtail_gguf.messages.errors import SourceError
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.model.loading.from_gguf.file import SourceFile, open_source, paths_of
from kurtail_gguf.model.loading.from_gguf.unpack import config_of, unpack
from kurtail_gguf.model.loading.hub import fetch_model, parse_hub_model, snapshot_of
from kurtail_gguf.model.loading.recipes import Recipe, fetch_recipe, find_recipe, recipe_names
from kurtail_gguf.runtime.gguf_info import UNPACKED_KEYS

#: Keys of a GGUF file below ``general.`` that upstream's exporter reads in a model card, by the same names.
_CARD_KEYS = (
    *("name", "author", "version", "organization", "description", "finetune", "basename", "size_label"),
    *("license", "license_name", "license_link", "languages", "tags"),
)
#: In a directory that was unpacked from a GGUF file: of which.
_MARKER = "converted-from"


def resolve_source(model: str, work_dir: Path, progress: Progress, allow_pickle: bool = False) -> Path:
    """The HF directory to convert.

    Args:
        model: an HF directory, or its root in the Hub's cache; a GGUF file of a family that has an entry, or any part of one that
            was split; a recipe's name; a model of the Hub (:func:`kurtail_gguf.model.loading.hub.parse_hub_model`). A path that
            exists wins over names.
        work_dir: where a GGUF file given by the user is converted to (``work_dir/source``, reused by
            the next run); a recipe's model is converted in the user's cache instead.
        progress: told about downloads and conversions.
        allow_pickle: download ``.bin`` files of a model of the Hub that has no others.

    Raises:
        SourceError: nothing of that name, a download that failed, a disk too small, a GGUF that cannot be read, lacks a
            part, key or tensor, or has one that would be lost; the message names it.
        UnsupportedArchitecture: a GGUF of a family that has no entry.
    """
    path = Path(model)
    if path.is_dir():
        return snapshot_of(path)
    if path.is_file():
        return _from_gguf(path, work_dir / "source", progress)
    recipe = find_recipe(model)
    if recipe is not None:
        gguf = fetch_recipe(recipe, progress)
        return _from_gguf(gguf, gguf.parent / "hf", progress, recipe)
    hub = parse_hub_model(model)
    if hub is not None:
        return fetch_model(hub, progress, allow_pickle)
    raise unknown_model(model)


def unknown_model(model: str) -> SourceError:
    """What is said of a MODEL that is nothing."""
    return SourceError(
        f"{model} is not a directory, a file or a known model ({', '.join(recipe_names())}); for a model on the Hugging "
        "Face Hub give hf:owner/name"
    )


def _from_gguf(gguf: Path, target: Path, progress: Progress, recipe: Recipe | None = None) -> Path:
    """Unpack into ``target``, which appears only when complete.

    A recipe's title replaces the name that the file gives itself.
    """
    refuse_pointer(gguf, SourceError)
    if unpacked_before(gguf, target, recipe):
        return target
    source = open_source(gguf)
    target.parent.mkdir(parents=True, exist_ok=True)
    config, weights = config_of(source)
    _check_room(source, target.parent)
    with progress.stage(f"read {gguf.name}", int(config["num_hidden_layers"]) + 2) as stage:
        scratch = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
        try:
            unpack(source, config, weights, scratch, lambda finished: stage.advance(1, finished))
            (scratch / "README.md").write_text(_model_card(source.metadata, recipe), encoding="utf-8")
            (scratch / _MARKER).write_text(_stamp(gguf, recipe), encoding="utf-8")
            if target.exists():
                shutil.rmtree(target)
            os.replace(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def unpacked_before(gguf: Path, target: Path, recipe: Recipe | None) -> bool:
    """Whether ``target`` holds what this file was unpacked to, by this version and under the same title."""
    marker = target / _MARKER
    # earlier versions kept no keys
    return (target / UNPACKED_KEYS).exists() and marker.exists() and marker.read_text(encoding="utf-8") == _stamp(gguf, recipe)


def _stamp(gguf: Path, recipe: Recipe | None) -> str:
    told = None if recipe is None else recipe.title
    stats = [(path.name, path.stat()) for path in paths_of(gguf) if path.exists()]
    return "\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns} {told}" for name, stat in stats)


def check_gguf(gguf: Path) -> tuple[dict[str, Any], int]:
    """What config.json will say of a GGUF file, and the bytes of all its parts, with all that can be refused before its weights
    are read.

    Raises:
        SourceError, UnsupportedArchitecture: as :func:`resolve_source`.
    """
    source = open_source(gguf)
    return config_of(source)[0], source.bytes


def _check_room(source: SourceFile, directory: Path) -> None:
    """The weights are unpacked to float32, whatever their types in the file."""
    needed, free = 4 * sum(tensor.values for tensor in source.tensors.values()), shutil.disk_usage(directory).free
    if needed > free:
        raise SourceError(
            f"{source.path} takes {needed / 1e9:.1f} GB in {directory} when its weights are unpacked to float32, but "
            f"{free / 1e9:.1f} GB are free: free some space there"
        )


def _model_card(metadata: Mapping[str, Any], recipe: Recipe | None) -> str:
    """What the file says of its name, makers and licence, where upstream's exporter looks for it.

    Without a card it would name the model after the directory.
    """
    told = {key: metadata[f"general.{key}"] for key in _CARD_KEYS if f"general.{key}" in metadata}
    if recipe is not None:
        told = {"license": recipe.licence.lower()} | told | {"name": recipe.title}
    return f"---\n{yaml.safe_dump(told, sort_keys=False)}---\n"
