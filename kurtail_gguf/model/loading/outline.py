"""A model as a directory of headers: its configuration and the shapes of its tensors, without the weights.

What has to be downloaded or unpacked before it can be converted is outlined from what is at hand: a GGUF file's header, the
config.json of a model of the Hub, what a recipe says of its model. Files of weights then have their full size and no content.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kurtail_gguf.files.safetensors_header import header
from kurtail_gguf.model.loading.checkpoint import read_spec
from kurtail_gguf.model.loading.hub import HubModel, cached_snapshot, fetch_config, parse_hub_model, snapshot_of
from kurtail_gguf.model.loading.recipes import Recipe, cached_gguf, find_recipe, recipe_cache
from kurtail_gguf.model.loading.source import check_gguf, unknown_model, unpacked_before
from kurtail_gguf.model.loading.untrusted import check_sizes, read_json

#: Bytes of a value in safetensors by what a config calls it, and safetensors' own name; float32 where a config says nothing.
_DTYPES = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}


@dataclass(frozen=True, slots=True)
class Outline:
    """A model before it is fetched or unpacked.

    Args:
        directory: an HF directory; without content in its files of weights where ``outlined``.
        outlined: whether the directory only stands for the model's own.
        download: bytes that are downloaded first.
        unpacked: bytes that a GGUF's weights take once they are float32.
        packed: bytes of that GGUF.
        cache: where both are kept; None where it is the work directory.
        note: what the figures rest on, where that is less than the model's headers.
    """

    directory: Path
    outlined: bool = False
    download: int = 0
    unpacked: int = 0
    packed: int = 0
    cache: Path | None = None
    note: str | None = None


def outline(model: str, scratch: Path) -> Outline:
    """What is known of MODEL without a download of weights; of a model of the Hub config.json is fetched, if nothing is cached.

    Args:
        model: as :func:`kurtail_gguf.model.loading.source.resolve_source` takes it.
        scratch: an empty directory to outline it in.

    Raises:
        SourceError: as that function, for all that can be seen by now.
    """
    path = Path(model)
    if path.is_dir():
        return Outline(snapshot_of(path))
    if path.is_file():
        return _of_gguf(path, scratch, None)
    if (recipe := find_recipe(model)) is not None:
        cache = recipe_cache(recipe)
        gguf = cached_gguf(recipe)
        if gguf is None:
            return _of_recipe(recipe, scratch)
        return Outline(cache / "hf") if unpacked_before(gguf, cache / "hf", recipe) else _of_gguf(gguf, scratch, cache)
    if (hub := parse_hub_model(model)) is not None:
        return _of_hub(hub, scratch)
    raise unknown_model(model)


def _of_gguf(gguf: Path, scratch: Path, cache: Path | None) -> Outline:
    config, packed = check_gguf(gguf)
    values = _write(config, scratch)
    return Outline(scratch, True, 0, 4 * values, packed, cache)


def _of_recipe(recipe: Recipe, scratch: Path) -> Outline:
    values = _write(recipe.shape.config(), scratch)
    note = f"{recipe.name} is not downloaded yet; its shapes are those that its recipe lists"
    return Outline(scratch, True, recipe.bytes, 4 * values, recipe.bytes, recipe_cache(recipe), note)


def _of_hub(hub: HubModel, scratch: Path) -> Outline:
    snapshot = cached_snapshot(hub)
    if snapshot is not None and any(snapshot.glob("*.safetensors")):
        return Outline(snapshot)
    path = fetch_config(hub)
    raw = read_json(path, remedy="")
    check_sizes(raw, path)
    _, size = _stored_as(raw)
    values = _write(raw, scratch)
    cache = next(parent for parent in path.parents if parent.name == "snapshots").parents[1]
    note = f"{hub.name} is not downloaded yet; its shapes come from its config.json, which was"
    return Outline(scratch, True, size * values, cache=cache, note=note)


def _write(config: Mapping[str, Any], directory: Path) -> int:
    """config.json, and the tensors that the architecture then has, layer by layer; returns how many values they hold.

    Raises:
        UnsupportedArchitecture: none that is converted.
        SourceError: a configuration that makes no sense.
    """
    (directory / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
    _, _, spec = read_spec(directory)
    dtype = _stored_as(config)
    shards = {"top": dict(spec.top_shapes())}
    for layer in range(spec.layers):
        shards[str(layer)] = {spec.layer_prefix(layer) + name: shape for name, shape in spec.at(layer).layer_shapes().items()}
    weight_map = {}
    for name, shapes in shards.items():
        _write_hollow(directory / f"model-{name}.safetensors", shapes, *dtype)
        weight_map |= dict.fromkeys(shapes, f"model-{name}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return sum(_values(shapes.values()) for shapes in shards.values())


def _stored_as(config: Mapping[str, Any]) -> tuple[str, int]:
    return _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), _DTYPES["float32"])


def _values(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _write_hollow(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, size: int) -> None:
    """A safetensors file of these tensors that takes no room: what comes behind its header is a hole."""
    first = header(shapes, dtype, size)
    with path.open("wb") as file:
        file.write(first)
        file.truncate(len(first) + size * _values(shapes.values()))
