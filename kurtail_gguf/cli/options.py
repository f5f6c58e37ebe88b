"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from kurtail_gguf.runtime.activation_bits import ACTIVATION_CHOICES, VARIABLE

allow_pickle = click.option(
    "--allow-pickle", is_flag=True,
    help="Read a MODEL whose weights are .bin pickles: only plain tensors are read, no code is run.",
)  # fmt: skip

activation_bits = click.option(
    "--activation-bits", type=click.Choice(ACTIVATION_CHOICES), default=None, envvar=VARIABLE, show_envvar=True,
    help="Bits to which the runtime rounds the inputs of 4-bit products. file: the bits of the file.  [default: the runtime's "
    "choice for this machine]",
)  # fmt: skip


def comma_list(convert: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, str | tuple[str, ...]], tuple]:
    """A callback for ``NAME,…``: the values that ``convert`` makes of its parts, each once; the option may be repeated."""

    def callback(context: click.Context, parameter: click.Parameter, value: str | tuple[str, ...]) -> tuple:
        given = (value,) if isinstance(value, str) else value
        found = []
        for part in (part.strip() for one in given for part in one.split(",")):
            try:
                found.append(convert(part))
            except ValueError:
                raise click.BadParameter(f"{part!r} is not a valid value.", context, parameter) from None
        return tuple(dict.fromkeys(found))

    return callback
