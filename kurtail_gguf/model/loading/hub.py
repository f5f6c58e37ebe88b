"""Models of the Hugging Face Hub: their names, the cache that its own library keeps, and downloads into it."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kurtail_gguf.messages.errors import SourceError
from kurtail_gguf.messages.progress import Progress, Stage

_PREFIX = "hf:"
_URL = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
#: What is read beside the weights; only from the top of a repository, folders hold other formats.
_SUFFIXES = (".json", ".model", ".jinja", ".txt")
_CARD = "README.md"
#: The one file of weights and the index of their shards, the safe kind first.
_WEIGHTS = (("model.safetensors", ".safetensors"), ("pytorch_model.bin", ".bin"))


@dataclass(frozen=True, slots=True)
class HubModel:
    """A repository: ``owner/name`` and a revision, None for the main one."""

    name: str
    revision: str | None = None


def parse_hub_model(model: str) -> HubModel | None:
    """What ``hf:owner/name``, an address at huggingface.co or hf.co, or a bare ``owner/name`` stands for; None for anything else.

    A bare name whose first part is a directory here is a path that was mistyped, as is one that ends in ``.gguf``.

    Raises:
        SourceError: behind ``hf:`` or in the address there is no ``owner/name``.
    """
    address = _URL.match(model)
    told = address is not None or model.startswith(_PREFIX)
    rest = model[address.end() :] if address is not None else model.removeprefix(_PREFIX)
    rest, _, revision = rest.split("?")[0].rstrip("/").partition("/tree/") if told else (rest, "", "")
    if told and not revision:
        rest, _, revision = rest.partition("@")
    if not _NAME.fullmatch(rest):
        if told:
            raise SourceError(
                f"{model} is not the name of a model on the Hugging Face Hub: give hf:owner/name or hf:owner/name@revision"
            )
        return None
    if not told and (Path(rest).parent.is_dir() or rest.endswith(".gguf")):
        return None
    return HubModel(rest, revision or None)


def snapshot_of(directory: Path) -> Path:
    """The directory itself, or the snapshot of ``refs/main`` where it is a model's directory in the Hub's cache.

    Raises:
        SourceError: the cache holds no snapshot of main.
    """
    if (directory / "config.json").exists() or not (directory / "snapshots").is_dir():
        return directory
    main = directory / "refs" / "main"
    snapshot = directory / "snapshots" / (main.read_text(encoding="utf-8").strip() if main.is_file() else "")
    if not main.is_file() or not snapshot.is_dir():
        held = ", ".join(sorted(path.name for path in (directory / "snapshots").iterdir())) or "none"
        raise SourceError(
            f"{directory} is a model in the Hugging Face cache without a snapshot of main; it contains {held}: give the "
            "directory of one of these below snapshots, or download the model again"
        )
    return snapshot


def cached_snapshot(model: HubModel) -> Path | None:
    """The model's directory in the Hub's cache, as far as it was downloaded; None where it was not. Asks no network."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model.name, revision=model.revision, local_files_only=True))
    except Exception:  # of many kinds, and none but "not there"
        return None


def fetch_config(model: HubModel) -> Path:
    """config.json alone, in the Hub's cache.

    Raises:
        SourceError: as :func:`fetch_model`.
    """
    from huggingface_hub import HfApi, hf_hub_download

    try:
        # asked first, since a download that finds no network tries again for half a minute
        commit = HfApi().model_info(model.name, revision=model.revision).sha
        return Path(hf_hub_download(model.name, "config.json", revision=commit))
    except Exception as error:  # as below
        raise _told(model, error) from error


def fetch_model(model: HubModel, progress: Progress, allow_pickle: bool = False) -> Path:
    """The model's directory in the Hub's own cache; what is not there yet is downloaded.

    An interrupted download goes on where it was. Without a network, what was downloaded before is taken.

    Args:
        model: which.
        progress: a stage with a unit for each file that is downloaded.
        allow_pickle: take ``.bin`` files where there are no safetensors.

    Raises:
        SourceError: no network and nothing in the cache, no such model, one whose licence must be accepted, no weights of a
            kind that is read, a disk too small; the message says what to do.
    """
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(model.name, revision=model.revision, files_metadata=True)
    except Exception as error:  # httpx's, requests' and the Hub's own, by version
        if _refused(error) is None and (found := cached_snapshot(model)) is not None:
            return found
        raise _told(model, error) from error
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or () if "/" not in file.rfilename}
    commit = HubModel(model.name, info.sha)
    small = [name for name in sizes if name.endswith(_SUFFIXES) or name == _CARD]
    weights = _weights(model, sizes, allow_pickle)
    if "config.json" not in sizes:
        raise SourceError(f"{model.name} contains no config.json, so transformers cannot read it: give another repository")
    try:
        directory = _download(commit, small, sizes, None).parent
        shards = _shards(directory / weights) if weights.endswith(".json") else [weights]
        _check_room(model, shards, sizes, directory)
        with progress.stage(f"download {model.name}", len(shards)) as stage:
            _download(commit, shards, sizes, stage)
    except SourceError:
        raise
    except Exception as error:  # as above
        raise _told(model, error) from error
    return directory


def _weights(model: HubModel, sizes: dict[str, int], allow_pickle: bool) -> str:
    """The file that holds all weights, or the index of their shards."""
    for single, suffix in _WEIGHTS:
        found = next((name for name in (f"{single}.index.json", single) if name in sizes), None)
        if found is not None and suffix == ".bin" and not allow_pickle:
            raise SourceError(
                f"{model.name} has its weights only in .bin pickles, which can run code when read: give --allow-pickle to "
                "read their tensors and nothing else"
            )
        if found is not None:
            return found
    packed = [name for name in sizes if name.endswith(".gguf")]
    if packed:
        raise SourceError(
            f"{model.name} contains GGUF files and no safetensors: prefer the original model, or run hf download "
            f"{model.name} {packed[0]} --local-dir . and give that file"
        )
    raise SourceError(f"{model.name} contains neither model.safetensors nor an index of its shards: give another repository")


def _shards(index: Path) -> list[str]:
    """Names in an index; what they may be is checked when it is opened, and here only that they are beside it."""
    weight_map = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {})
    return sorted({name for name in map(str, weight_map.values()) if "/" not in name})


def _check_room(model: HubModel, names: list[str], sizes: dict[str, int], directory: Path) -> None:
    needed = sum(sizes.get(name, 0) for name in names if not (directory / name).exists())
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise SourceError(
            f"{model.name} needs {needed / 1e9:.1f} GB in {directory.parents[2]}, but {free / 1e9:.1f} GB are free: free "
            "some space there or set HF_HOME to a directory on a larger disk"
        )


def _download(model: HubModel, names: list[str], sizes: dict[str, int], stage: Stage | None) -> Path:
    """Have these files in the cache; returns the last one's path."""
    from huggingface_hub import hf_hub_download

    path = Path()
    for name in names:
        bar = _bar(stage, sizes.get(name, 0), name)
        path = Path(hf_hub_download(model.name, name, revision=model.revision, tqdm_class=bar))
        if stage is not None:
            stage.advance(1, f"{name}, {sizes.get(name, 0) / 1e6:,.0f} MB")
    return path


def _bar(stage: Stage | None, size: int, name: str) -> type:
    """A bar for huggingface_hub that draws nothing and tells the stage of a file's bytes instead."""
    from huggingface_hub.utils import tqdm

    class Told(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})
            self._done = options.get("initial") or 0

        def update(self, n: float | None = 1) -> None:
            self._done += n or 0
            if stage is not None and size:
                stage.within(min(self._done / size, 1.0), f"{name}, {self._done / 1e6:,.0f} of {size / 1e6:,.0f} MB")

    return Told


def _refused(error: Exception) -> str | None:
    """What the Hub said of a model it was asked for; None where it said nothing."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "its licence must be accepted first: accept it on its page at huggingface.co, then log in with hf auth login"
    if isinstance(error, errors.RevisionNotFoundError):
        return "this revision does not exist"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "this model does not exist, or is private: check the name, or log in with hf auth login"
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return "it contains no config.json, so transformers cannot read it"
    return None


def _told(model: HubModel, error: Exception) -> SourceError:
    at = f"{model.name}@{model.revision}" if model.revision else model.name
    if (refused := _refused(error)) is not None:
        return SourceError(f"{at} cannot be downloaded from the Hugging Face Hub: {refused}")
    folder = model.name.partition("/")[2]
    return SourceError(
        f"{model.name} is not a local directory, and cannot be downloaded from the Hugging Face Hub "
        f"({type(error).__name__}): run hf download {model.name} --local-dir {folder} where there is a network, copy the "
        "directory here and give it as MODEL"
    )
