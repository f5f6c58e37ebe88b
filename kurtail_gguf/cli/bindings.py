"""``kurtail-gguf install-bindings``."""

from __future__ import annotations

import click

from kurtail_gguf.runtime.bindings import install_bindings


@click.command("install-bindings")
def install_bindings_command() -> None:
    """Install the Python bindings, so that `import llama_cpp` runs the shipped runtime."""
    click.echo(f"installed {install_bindings()}: `from llama_cpp import Llama` runs the shipped runtime")
