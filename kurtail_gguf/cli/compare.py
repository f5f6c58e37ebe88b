"""``kurtail-gguf compare MODEL --text FILE``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from kurtail_gguf.cli.cards import write_cards
from kurtail_gguf.cli.convert import convert_command
from kurtail_gguf.cli.options import activation_bits as activation_bits_option
from kurtail_gguf.cli.output import check_writable, write_json
from kurtail_gguf.cli.progress import make_progress
from kurtail_gguf.messages.errors import ConfigError

#: Options of convert that are the same for all methods.
_PASSED = (
    "activations", "budget", "kv", "kv_budget", "target", "calibration", "calibration_tokens", "tune", "seed", "device",
    "allow_pickle",
)  # fmt: skip


@click.command("compare")
@click.argument("model")
@click.option("--text", required=True, type=click.Path(path_type=Path), help="UTF-8 text to measure on.")
@click.option(
    "--methods", default=None, metavar="NAME,…",
    help="Methods to compare: ROTATION or ROTATION+WEIGHTS, with the values that convert accepts.  [default: every rotation "
    "except none]",
)
@click.option(
    "--context", type=click.IntRange(min=16), default=512, show_default=True,
    help="Tokens per chunk of the text; the second half of each chunk is scored.",
)
@activation_bits_option
@click.option("--chunks", type=click.IntRange(min=1), default=None, help="Measure only the first N chunks.  [default: all]")
@click.option(
    "--out-dir", type=click.Path(path_type=Path), default=None,
    help="Keep the converted files in this directory.  [default: remove them at the end]",
)
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), default=None, help="Write the results to this file.",
)
@click.option(
    "--plot", type=click.Path(path_type=Path), default=None, metavar="PNG|SVG",
    help="Draw kurtosis and block maxima of the activations by layer, before and after rotation.",
)
@click.option("--card", is_flag=True, help="Write a model card FILE.gguf.md beside each file that --out-dir keeps.")
def compare_command(
    model: str, text: Path, methods: str | None, context: int, chunks: int | None, activation_bits: str | None,
    out_dir: Path | None,
    json_path: Path | None, plot: Path | None, card: bool, **options: Any,
) -> None:  # fmt: skip
    """Compare conversion methods side by side.

    Converts MODEL with each method and measures the files. The reference is MODEL itself, unquantized. Seconds and peak memory are those of the conversions, each of which runs in
    its own process.
    """
    if card and out_dir is None:
        raise ConfigError("--card needs --out-dir: model cards are written beside the files, which are removed without it")
    for path, option in ((json_path, "--json"), (plot, "--plot")):
        if path is not None:
            check_writable(path, option)
    # click takes seconds to start where torch is imported, so --help does without
    from kurtail_gguf.cli.tables import print_comparison
    from kurtail_gguf.measure.compare import CompareConfig, compare, parse_methods
    from kurtail_gguf.measure.evaluate import Request, TextRequest

    request = TextRequest(text, context, chunks)
    config = CompareConfig(model, parse_methods(methods), options, request, out_dir, plot, activation_bits)
    comparison = compare(config, make_progress(Console(stderr=True)))
    print_comparison(comparison, Console())
    if json_path is not None:
        write_json(json_path, comparison.to_json())
    if card:
        rows = ((Path(row.measured.path), (row.measured,), row.command) for row in comparison.methods)
        write_cards(rows, comparison.reference, Request(text=request, activations=activation_bits))


compare_command.params += [parameter for parameter in convert_command.params if parameter.name in _PASSED]
