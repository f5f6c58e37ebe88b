"""Options that several commands have."""

from __future__ import annotations

import click

allow_pickle = click.option(
    "--allow-pickle", is_flag=True,
    help="Read a MODEL whose weights are .bin pickles: plain tensors only, nothing in them is run.",
)  # fmt: skip
