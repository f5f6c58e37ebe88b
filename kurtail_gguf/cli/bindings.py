"""``kurtail-gguf install-bindings``."""

from __future__ import annotations

import click

from kurtail_gguf.runtime.bindings import install_bindings


@click.command("install-bindings")
def install_bindings_command() -> None:
    """Install the llama_cpp Python bindings.

    Afterwards `import llama_cpp` uses the shipped runtime. It replaces any llama_cpp of this environment.
    """
    click.echo(f"installed {install_bindings()}: `from llama_cpp import Llama` runs the shipped runtime")
