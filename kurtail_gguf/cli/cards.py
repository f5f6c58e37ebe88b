"""Quality cards of what a command measured."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kurtail_gguf.cli.inspect import summary
from kurtail_gguf.runtime.gguf_info import read_gguf

if TYPE_CHECKING:
    from kurtail_gguf.measure.evaluate import ModelResult, Request


def check_cards(files: Iterable[Path]) -> None:
    """Refuse cards that cannot be written, before any work."""
    from kurtail_gguf.measure.card import check_card

    for file in files:
        check_card(file)


def write_cards(
    rows: Iterable[tuple[Path, Sequence[ModelResult], Sequence[str]]], reference: ModelResult | None, request: Request
) -> None:
    """Write a card for each file, and say so.

    Args:
        rows: file, what was measured of it (with each cache type), and the conversion's command line where it is known.
        reference: what was measured of the reference.
        request: what was measured.
    """
    from kurtail_gguf.measure.card import Circumstances, describe_machine, render, write_card

    command = ("kurtail-gguf", *sys.argv[1:])
    circumstances = Circumstances(request, command, describe_machine(), datetime.now().astimezone())
    for file, measured, made_by in rows:
        info = read_gguf(file)
        text = render(file, summary(info), info.runs_as, measured, reference, circumstances, made_by)
        click.echo(f"wrote {write_card(file, text)}")
