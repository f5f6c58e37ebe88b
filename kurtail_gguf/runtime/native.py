"""Where the programs and libraries of the shipped runtime lie.

The wheel installs them inside the package (``_native/lib``, ``_native/python``, ``_native/bindings``)
and its programs in the environment's ``bin``. The package's own ``__file__`` is no guide to them: in
a checkout it is the source tree, which shadows the installed package. The installed distribution's
record is, so that is asked.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from kurtail_gguf.messages.errors import KurtailError

DISTRIBUTION = "kurtail-gguf"
REMEDY = "install it with `pip install .` in the checkout (tools/quickstart does that)"


class NativeMissing(KurtailError):
    """A part of the shipped runtime is not installed in this Python's environment."""


def native_dir() -> Path:
    """The directory of installed native files.

    Raises:
        NativeMissing: the package is not installed, or was installed without its runtime.
    """
    try:
        found = importlib.metadata.distribution(DISTRIBUTION).locate_file("kurtail_gguf/_native")
    except importlib.metadata.PackageNotFoundError:
        raise NativeMissing(f"{DISTRIBUTION} is not installed in {sys.prefix}: {REMEDY}") from None
    directory = Path(str(found))
    if not directory.is_dir():
        raise NativeMissing(f"{DISTRIBUTION} was installed without its runtime ({directory} is missing): {REMEDY}")
    return directory


def python_dir() -> Path:
    """The directory that holds the pinned source's own ``gguf`` and ``conversion`` packages."""
    directory = native_dir() / "python"
    for package in ("gguf", "conversion"):
        if not (directory / package / "__init__.py").is_file():
            raise NativeMissing(f"the runtime's Python package {package!r} is missing from {directory}: {REMEDY}")
    return directory


def bindings_wheel() -> Path:
    """The wheel of llama-cpp-python that loads the shipped libraries."""
    directory = native_dir() / "bindings"
    wheels = sorted(directory.glob("*.whl"))
    if not wheels:
        raise NativeMissing(f"the wheel of the Python bindings is missing from {directory}: {REMEDY}")
    return wheels[-1]


def library(name: str) -> Path:
    """A shared library of the runtime.

    Args:
        name: without prefix and suffix: ``ggml-base``, ``llama``.
    """
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    path = native_dir() / "lib" / f"lib{name}{suffix}"
    if not path.is_file():
        raise NativeMissing(f"the runtime's library {path.name} is missing from {path.parent}: {REMEDY}")
    return path


def executable(name: str) -> Path:
    """A program of the runtime: ``llama-cli``, ``llama-perplexity`` and so on.

    The environment this Python runs in goes first, so that a stock llama.cpp elsewhere on ``PATH``,
    which refuses our files, is not taken by mistake.
    """
    for directory in (Path(sys.executable).parent, Path(sysconfig.get_path("scripts"))):
        path = directory / name
        if path.is_file() and os.access(path, os.X_OK):
            return path
    if (on_path := shutil.which(name)) is not None:
        return Path(on_path)
    raise NativeMissing(f"the program {name} is neither beside {sys.executable} nor on PATH: {REMEDY}")
