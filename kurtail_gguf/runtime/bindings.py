"""Installs llama-cpp-python's own package so that ``import llama_cpp`` runs the shipped libraries."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys

from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.runtime import native

#: What llama_cpp imports. Given to pip only where missing, so that a complete environment stays offline.
REQUIREMENTS = ("typing-extensions", "numpy", "diskcache", "jinja2")

_DISTRIBUTION = "llama-cpp-python"
#: What the version of our wheel ends with (cpp_patches/bindings_wheel.py).
_LOCAL_VERSION = "+kurtail"


class BindingsError(KurtailError):
    """The bindings could not be installed."""


def install_bindings() -> str:
    """Install the bindings into this Python's environment; one that is there is replaced.

    Returns:
        Name and version of what was installed.

    Raises:
        BindingsError: pip is missing, or failed (its last line is told).
    """
    wheel = native.bindings_wheel()
    if importlib.util.find_spec("pip") is None:
        raise BindingsError(f"pip is missing from {sys.prefix}: run `{sys.executable} -m ensurepip` first")
    if missing := [name for name in REQUIREMENTS if not _installed(name)]:
        _pip("install", *missing)
    _pip("install", "--no-deps", "--force-reinstall", str(wheel))
    name, version = wheel.name.split("-")[:2]
    return f"{name} {version}"


def require_bindings() -> None:
    """Make sure that ``import llama_cpp`` runs the shipped libraries.

    Raises:
        BindingsError: the bindings are not installed, or are another build's.
    """
    remedy = "run `kurtail-gguf install-bindings`"
    try:
        version = importlib.metadata.version(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise BindingsError(f"the llama_cpp bindings are not installed in {sys.prefix}: {remedy}") from None
    if not version.endswith(_LOCAL_VERSION):
        raise BindingsError(f"{_DISTRIBUTION} {version} in {sys.prefix} does not run our libraries: {remedy}")


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        told = errors[-1] if errors else f"status {done.returncode}"
        raise BindingsError(f"`pip {' '.join(arguments)}` failed: {told}")
