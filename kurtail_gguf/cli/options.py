"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from kurtail_gguf.runtime.activation_bits import ACTIVATION_CHOICES, VARIABLE

allow_pickle = click.option(
    "--allow-pickle", is_flag=True,
    help="Read a MODEL whose weights are .bin pickles: plain tensors only, nothing in them is run.",
)  # fmt: skip

activation_bits = click.option(
    "--activation-bits", type=click.Choice(ACTIVATION_CHOICES), default=None, envvar=VARIABLE, show_envvar=True,
    help="Bits that the runtime rounds inputs of 4-bit products to; file: what the file says. The runtime's default if not "
    "given.",
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
                raise click.BadParameter(f"{part!r} is not one of its values.", context, parameter) from None
        return tuple(dict.fromkeys(found))

    return callback
