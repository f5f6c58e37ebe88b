"""``kurtail-gguf dump FILE.gguf``."""

from __future__ import annotations

from pathlib import Path

import click

from kurtail_gguf.runtime import vendored
from kurtail_gguf.runtime.gguf_info import read_gguf


@click.command("dump", context_settings={"ignore_unknown_options": True})
@click.argument("file", metavar="FILE.gguf", type=click.Path(path_type=Path))
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def dump_command(file: Path, options: tuple[str, ...]) -> None:
    """Show every key and tensor of a GGUF file.

    This is the gguf-dump of the llama.cpp that the runtime is built from, with its options (--no-tensors, --json, --markdown
    and others). The gguf-dump that pip installs with transformers does not support the files' tensor type.
    """
    read_gguf(file)  # a missing or damaged file is one line here, and a traceback there
    click.get_current_context().exit(vendored.run_module("gguf.scripts.gguf_dump", (*options, str(file))))
