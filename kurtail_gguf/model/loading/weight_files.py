"""Which files of an HF directory hold the weights, and how they are opened: safetensors, or pickles where asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from kurtail_gguf.files.kinds import BOM, begins_with, refuse_pointer
from kurtail_gguf.messages.errors import SourceError
from kurtail_gguf.model.loading.fused import Fused, Part, SplitReader, parts_of
from kurtail_gguf.model.loading.pickled import PickledFile
from kurtail_gguf.model.loading.untrusted import check_inside, read_json
from kurtail_gguf.runtime.gguf_info import UNPACKED_KEYS

#: Suffixes of the files that are read, here or by upstream's converter.
_READ = frozenset({".json", ".safetensors", ".bin", ".model", ".jinja", ".txt"})
#: Names without the suffix of the file that holds everything, by suffix of the weights.
_NAMES = {".safetensors": "model", ".bin": "pytorch_model"}
#: How the names of all tensors but the head's begin, and those of the head's.
_BASE, _HEAD = "model.", "lm_head."
#: What the index of a model's shards is called after the name that one file would have.
_INDEX = ".index.json"


def check_directory(directory: Path) -> None:
    """Refuse links that lead out of an HF directory, what is no regular file, Git LFS pointers, and JSON behind a byte order mark.

    Raises:
        SourceError: with the file, for a link also its target.
    """
    for path in sorted(directory.glob("*")):
        if path.suffix in _READ or path.name == UNPACKED_KEYS:
            check_inside(path, directory)
            refuse_pointer(path, SourceError)
            if path.suffix == ".json":
                _refuse_mark(path)


def _refuse_mark(path: Path) -> None:
    # transformers, tokenizers and upstream's converter all read these files themselves, and none of them takes it
    if begins_with(path, BOM):
        raise SourceError(
            f"{path} begins with a byte order mark, which JSON does not allow: save it as UTF-8 without one, or run sed -i "
            f"'1s/^\\xEF\\xBB\\xBF//' {path.name}"
        )


class WeightFiles:
    """The files that hold a model's tensors, opened when they are asked for; several threads may ask.

    safetensors are opened anew each time, which costs a header and leaves nothing mapped. A pickle is run once and stays
    mapped as long as this object lives: running it takes 40 ms where a header takes half a millisecond (290 tensors), and
    generation asks for every layer at every token. Its pages that were read count as the process's memory, but the system
    takes them back when it is short of it.

    Args:
        directory: the HF directory; safetensors are taken where there are both.
        allow_pickle: read ``pytorch_model.bin`` and its shards where there are no safetensors.
        prefixes: what names of tensors may begin with in the files, and what they then begin with here. Where no name begins
            with ``model.`` then, as in a model that was saved without its head, names are given with it, but for the head's,
            as transformers and upstream's converter read them.

    Attributes:
        by_tensor: tensor name -> the file that holds it, from the index or the single file.

    Raises:
        SourceError: no weights, pickles that are not allowed, an index that names what is no shard beside it, that does
            not name a tensor of its shards, or that lies beside a single file of all weights; a tensor in two shards.
    """

    def __init__(self, directory: Path, allow_pickle: bool, prefixes: Sequence[tuple[str, str]] = ()) -> None:
        self._prefixes = prefixes
        self._pickles: dict[Path, PickledFile] = {}
        self._base = ""
        self._parts: dict[str, Part] = {}
        found = _locate(directory, allow_pickle)
        if found.name.endswith(_INDEX):
            self.by_tensor = {self._renamed(name): path for name, path in _read_index(found).items()}
            self._stamps = {path: stamp(path) for path in sorted(set(self.by_tensor.values()))}
            self._check_index(found)
        else:
            self._stamps = {found: stamp(found)}
            with self.open(found) as file:
                self.by_tensor = dict.fromkeys(file.keys(), found)
        if not any(name.startswith(_BASE) for name in self.by_tensor):
            self._base = _BASE
            self.by_tensor = {self._renamed(name): path for name, path in self.by_tensor.items()}

    def _check_index(self, index: Path) -> None:
        """Refuse an index that is of other shards: what it leaves out would be left out in silence."""
        seen: dict[str, Path] = {}
        for path in self._stamps:
            with self.open(path) as file:
                names = file.keys()
            for name in names:
                if name not in self.by_tensor:
                    raise SourceError(
                        f"{path}: tensor {name} is not in {index.name}, which belongs to other shards: download both "
                        "again, or save the model again (save_pretrained)"
                    )
                if (other := seen.setdefault(name, path)) != path:
                    raise SourceError(
                        f"{path}: tensor {name} is in {other.name} too: delete the shard that does not belong to the "
                        "model, or save it again (save_pretrained)"
                    )

    def split(self, fused: Fused) -> None:
        """Give linears that files keep in one tensor one by one from now on, in their place."""
        found = {}
        for path in self._stamps:
            with self.open(path) as file:
                found |= {name: (part, path) for key in file.keys() for name, part in parts_of(key, file, fused)}
        self._parts = {name: part for name, (part, _) in found.items()}
        whole = {part.stored for part in self._parts.values()}
        self.by_tensor = {name: path for name, path in self.by_tensor.items() if name not in whole}
        self.by_tensor |= {name: path for name, (_, path) in found.items()}

    @property
    def stamps(self) -> Mapping[Path, tuple[int, int]]:
        """Size in bytes and time of change in ns of every file when it was first seen, in the order of their names."""
        return self._stamps

    def open(self, path: Path) -> Any:
        """A context with safetensors' reader of a file: ``keys``, ``get_tensor`` and ``get_slice``.

        Raises:
            SourceError: the file is truncated, of another format, cannot be mapped, or is not what it was at first.
        """
        file = self._pickled(path) if path.suffix == ".bin" else _safetensors(path)
        # looked at when it is open: whatever was put in its place before that is seen
        if stamp(path) != self._stamps[path]:
            raise SourceError(
                f"{path} was changed while it was being read: rerun the command when the checkpoint no longer changes"
            )
        file = _Renamed(file, self._renamed) if self._prefixes or self._base else file
        return SplitReader(file, self._parts) if self._parts else file

    def _renamed(self, name: str) -> str:
        for stored, ours in self._prefixes:
            if name.startswith(stored):
                name = ours + name.removeprefix(stored)
                break
        return name if name.startswith(_HEAD) else self._base + name

    def _pickled(self, path: Path) -> PickledFile:
        if path not in self._pickles:  # which only the constructor meets: threads find them there
            self._pickles[path] = PickledFile(path)
        return self._pickles[path]


class _Renamed:
    """A file's reader under other names of its tensors."""

    def __init__(self, file: Any, renamed: Callable[[str], str]) -> None:
        self._file, self._rename = file, renamed

    def __enter__(self) -> _Renamed:
        self._reader = self._file.__enter__()
        self._stored = {self._rename(name): name for name in self._reader.keys()}
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def keys(self) -> list[str]:
        return list(self._stored)

    def get_tensor(self, name: str) -> Any:
        return self._reader.get_tensor(self._stored[name])

    def get_slice(self, name: str) -> Any:
        return self._reader.get_slice(self._stored[name])


def check_weights(directory: Path, allow_pickle: bool) -> None:
    """What can be said of any architecture's HF directory, for upstream's converter takes every link, shard and pickle.

    Raises:
        SourceError: as :func:`check_directory` and :class:`WeightFiles` do.
    """
    check_directory(directory)
    files = WeightFiles(directory, allow_pickle)
    for path in files.stamps:
        with files.open(path):
            pass


def _locate(directory: Path, allow_pickle: bool) -> Path:
    """The one file of weights, or the index of their shards."""
    for suffix, name in _NAMES.items():
        single = directory / f"{name}{suffix}"
        index = directory / f"{single.name}{_INDEX}"
        if not (single.exists() or index.exists()):
            continue
        if suffix == ".bin" and not allow_pickle:
            break
        if single.exists() and index.exists() and set(_read_index(index).values()) != {single}:
            # transformers reads the one, upstream's converter the other
            raise SourceError(
                f"{directory} contains {single.name} and the shards of {index.name}, one of them older: delete the one "
                "that does not belong to the model"
            )
        return index if index.exists() else single
    if not allow_pickle and any(directory.glob("*.bin")):
        raise SourceError(
            f"{directory} contains .bin pickles, which can run code when read: convert them to safetensors "
            "(save_pretrained does), or give --allow-pickle to read their tensors and nothing else"
        )
    wanted = " nor ".join(f"{name}{suffix}" for suffix, name in _NAMES.items() if allow_pickle or suffix != ".bin")
    raise SourceError(f"{directory} contains neither {wanted} nor an index of its shards")


def _read_index(index: Path) -> dict[str, Path]:
    weight_map = read_json(index, remedy="").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{index} has no 'weight_map': download it again")
    return {tensor: _shard(shard, index) for tensor, shard in weight_map.items()}


def _shard(shard: object, index: Path) -> Path:
    suffix = Path(index.name.removesuffix(_INDEX)).suffix
    if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(suffix):
        raise SourceError(f"{index}: shard {shard!r} is not the name of a {suffix} file beside it")
    path = index.parent / shard
    if not path.exists():
        raise SourceError(f"{path} is missing, but {index.name} lists it; download the shard again")
    return path


def _safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise SourceError(
            f"{path} is truncated or not safetensors ({error}): download the file again"
        ) from error
    except RuntimeError as error:  # torch maps the file, and the system may refuse one larger than its memory
        raise SourceError(f"{path} cannot be mapped ({error}): split it into shards of a few GB") from error


def stamp(path: Path) -> tuple[int, int]:
    """Size and time of change, by which a file is known again."""
    try:
        stat = path.stat()
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror}): download the file again") from error
    return stat.st_size, stat.st_mtime_ns
