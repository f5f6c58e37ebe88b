"""``kurtail-gguf verify OUT.gguf --reference MODEL``."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
from rich.console import Console

from kurtail_gguf.cli.options import allow_pickle
from kurtail_gguf.cli.progress import make_progress
from kurtail_gguf.messages.errors import KurtailError


@click.command("verify")
@click.argument("file", metavar="OUT.gguf", type=click.Path(path_type=Path))
@click.option("--reference", required=True, metavar="MODEL", help="What the file was made of, as convert took it.")
@allow_pickle
def verify_command(file: Path, reference: str, allow_pickle: bool) -> None:
    """Check a converted file against the model it was made of.

    Metadata and vocabulary are compared with what upstream's converter writes, every tensor with the model's under the
    rotations that the file holds (found again from both), what the model says with what the file says in the runtime,
    and that with what it says with the cache it asks for. Ends with "pass", or with the first thing that differs and status 1.
    """
    # click takes seconds to start where torch is imported, so --help does without
    from kurtail_gguf.check.verify import verify

    with tempfile.TemporaryDirectory(prefix="kurtail-verify-") as directory:
        for check in verify(file, reference, Path(directory), make_progress(Console(stderr=True)), allow_pickle):
            click.echo(f"{check.name}: {check.detail}" if check.right else f"{check.name}: differs")
            if not check.right:
                # a bad cache makes no other model of it
                different = "" if check.name == "cache" else f" is not {reference}"
                raise KurtailError(f"{file}{different}: {check.name}: {check.detail}")
    click.echo("pass")
