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
@click.option("--reference", required=True, metavar="MODEL", help="The MODEL that the file was converted from, as given to convert.")
@allow_pickle
def verify_command(file: Path, reference: str, allow_pickle: bool) -> None:
    """Check a converted file against its model.

    It compares metadata and vocabulary with what upstream's converter writes, every tensor with the model's under the file's
    rotations, the model's predictions with the file's in the runtime, and those with the predictions under the file's own
    cache types. A file that was converted by itself is compared with what upstream's converter makes of its model, tensor by
    tensor. It prints "pass", or the first difference with exit status 1.
    """
    # click takes seconds to start where torch is imported, so --help does without
    from kurtail_gguf.check.verify import verify

    with tempfile.TemporaryDirectory(prefix="kurtail-verify-") as directory:
        for check in verify(file, reference, Path(directory), make_progress(Console(stderr=True)), allow_pickle):
            click.echo(f"{check.name}: {check.detail}" if check.right else f"{check.name}: differs")
            if not check.right:
                # a bad cache is a bad setting, not another model
                different = "" if check.name == "cache" else f" does not match {reference}"
                raise KurtailError(f"{file}{different}: {check.name}: {check.detail}")
    click.echo("pass")
