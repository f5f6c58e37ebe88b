"""Which files of an HF directory hold the weights, and how they are opened: safetensors, or pickles where asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from kurtail_gguf.errors import SourceError
from kurtail_gguf.loading.pickled import PickledFile
from kurtail_gguf.loading.untrusted import check_inside, read_json

#: Suffixes of the files that are read, here or by upstream's converter.
_READ = frozenset({".json", ".safetensors", ".bin", ".model", ".jinja", ".txt"})
#: Names without the suffix of the file that holds everything, by suffix of the weights.
_NAMES = {".safetensors": "model", ".bin": "pytorch_model"}


def check_directory(directory: Path) -> None:
    """Refuse links that lead out of an HF directory, and what is no regular file.

    Raises:
        SourceError: with the link and its target.
    """
    for path in sorted(directory.glob("*")):
        if path.suffix in _READ:
            check_inside(path, directory)


def locate_tensors(directory: Path, allow_pickle: bool) -> dict[str, Path]:
    """Tensor name -> file, from the index or the single file; safetensors are taken where there are both.

    Args:
        directory: the HF directory.
        allow_pickle: read ``pytorch_model.bin`` and its shards where there are no safetensors.

    Raises:
        SourceError: no weights, pickles that are not allowed, an index that names what is no shard beside it.
    """
    for suffix, name in _NAMES.items():
        single, index = directory / f"{name}{suffix}", directory / f"{name}{suffix}.index.json"
        if not (single.exists() or index.exists()):
            continue
        if suffix == ".bin" and not allow_pickle:
            break
        if index.exists():
            weight_map = read_json(index, remedy="").get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise SourceError(f"{index}: no 'weight_map'")
            return {tensor: _shard(directory, shard, index, suffix) for tensor, shard in weight_map.items()}
        with open_weights(single) as file:
            return dict.fromkeys(file.keys(), single)
    if not allow_pickle and any(directory.glob("*.bin")):
        raise SourceError(
            f"{directory} holds .bin pickles, which can run code when read: convert them to safetensors (save_pretrained "
            "does), or give --allow-pickle to read their tensors and nothing else"
        )
    wanted = " nor ".join(f"{name}{suffix}" for suffix, name in _NAMES.items() if allow_pickle or suffix != ".bin")
    raise SourceError(f"{directory} holds neither {wanted} nor an index of its shards")


def check_weights(directory: Path, allow_pickle: bool) -> None:
    """What can be said of any architecture's HF directory, for upstream's converter takes every link, shard and pickle.

    Raises:
        SourceError: as :func:`check_directory`, :func:`locate_tensors` and :func:`open_weights` do.
    """
    check_directory(directory)
    for path in sorted(set(locate_tensors(directory, allow_pickle).values())):
        with open_weights(path):
            pass


def open_weights(path: Path) -> Any:
    """A context with safetensors' reader of a file: ``keys``, ``get_tensor`` and ``get_slice``.

    Raises:
        SourceError: the file is truncated, of another format, or cannot be mapped.
    """
    if path.suffix == ".bin":
        return PickledFile(path)
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise SourceError(
            f"{path} is truncated or not safetensors ({error}): download the file again"
        ) from error
    except RuntimeError as error:  # torch maps the file, and the system may refuse one larger than its memory
        raise SourceError(f"{path} cannot be mapped ({error}): split it into shards of a few GB") from error


def _shard(directory: Path, shard: object, index: Path, suffix: str) -> Path:
    if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(suffix):
        raise SourceError(f"{index}: shard {shard!r} is not the name of a {suffix} file beside it")
    path = directory / shard
    if not path.exists():
        raise SourceError(f"{path} is missing: {index.name} names it; download the shard again")
    return path
