"""``kurtail-gguf convert MODEL OUT.gguf``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console

from kurtail_gguf.cli.inspect import cache_layers, summary
from kurtail_gguf.cli.options import allow_pickle
from kurtail_gguf.cli.plan import show_plan
from kurtail_gguf.cli.progress import format_seconds, make_progress
from kurtail_gguf.convert.settings import (
    ACTIVATIONS,
    DEFAULT_BUDGET,
    DEFAULT_KV_BUDGET,
    DEFAULT_TUNE,
    DEVICES,
    KV_CHOICES,
    ROTATIONS,
    TARGETS,
    WEIGHTS,
    ConvertConfig,
    ConvertResult,
    not_with_stock,
)
from kurtail_gguf.machine.resources import peak_memory
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.model.loading.recipes import prefer_original
from kurtail_gguf.runtime.provenance import Provenance

_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(ConvertConfig)}


class _Bits(click.Choice):
    """A choice of numbers and perhaps words; a number's value is an int."""

    def __init__(self, offered: tuple[int | str, ...]) -> None:
        super().__init__([str(bits) for bits in offered])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        chosen = super().convert(str(value), param, ctx)
        return int(chosen) if chosen.isdigit() else chosen


_EXAMPLES = """\b
Examples:
  kurtail-gguf convert smollm2-135m out.gguf
  kurtail-gguf convert ./Llama-3.1-8B out.gguf --plan
  kurtail-gguf convert ./Llama-3.1-8B out.gguf --calibration wiki.train.raw
  kurtail-gguf convert ./Llama-3.1-8B out.gguf --activations auto --budget 0.05
  kurtail-gguf convert ./Llama-3.1-8B out.gguf --target stock
"""


@click.command("convert", epilog=_EXAMPLES)
@click.argument("model")
@click.argument("out", metavar="OUT.gguf", type=click.Path(path_type=Path))
@click.option(
    "--rotation", type=click.Choice(ROTATIONS), default=None,
    help="How activations and weights are prepared for 4 bits. diagonal: scale the channels of every input and apply a Hadamard "
    "transform of 64. output: learn R1 from the rounding error at the outputs of the linears. kurtail: learn R1 and R2 by "
    "kurtosis, as in the paper. spinquant: learn them end to end, with the whole model in memory. hadamard: random R1 and "
    "R2. none: no rotation.  [default: diagonal; output with --target stock]",
)
@click.option(
    "--weights", type=click.Choice(WEIGHTS), default=_DEFAULTS["weights"], show_default=True,
    help="How weights are quantized. gptq: GPTQ on the calibration text. rtn: rounding to nearest with searched scales. f32: "
    "not quantized, for checking.",
)
@click.option(
    "--activations", type=_Bits(ACTIVATIONS), default=_DEFAULTS["activations"], show_default=True,
    help="Bits of the activations that enter the linears of the blocks. auto: 8 for the few linears where 4 do most damage, "
    "measured on the calibration text, and 4 for the others.",
)
@click.option(
    "--budget", type=float, default=None, metavar="SHARE",
    help=f"Share of the linears' multiply-accumulates that --activations auto may run at 8 bits.  [default: {DEFAULT_BUDGET}]",
)
@click.option(
    "--kv", type=_Bits(KV_CHOICES), default=None,
    help="Bits of the KV cache. auto: 4, and 8 for the keys or values of layers where 4 do most damage, measured on the "
    "calibration text.  [default: auto; 16 with --weights f32]",
)
@click.option(
    "--kv-budget", type=float, default=None, metavar="BITS",
    help=f"Average bits per cached value that --kv auto may use; 4.5 is four bits everywhere.  [default: {DEFAULT_KV_BUDGET}]",
)
@click.option(
    "--target", type=click.Choice(TARGETS), default=_DEFAULTS["target"], show_default=True,
    help="kurtail: a file for the shipped runtime. stock: a Q4_0 file that stock llama.cpp runs, with folded rotations only; it "
    "excludes --activations and --kv.",
)
@click.option(
    "--calibration", multiple=True, default=_DEFAULTS["calibration"], metavar="FILE", show_default=True,
    help="Text to calibrate on: text, jsonl (either also as .gz) or Parquet files, directories that the datasets library reads, "
    "hf:NAME for a dataset on the Hub, or self for text that the model generates. Repeat the option for several. Rows have "
    "their text in the field text or content, or a chat in messages, which the model's chat template turns into text.",
)
@click.option(
    "--calibration-tokens", type=int, default=_DEFAULTS["calibration_tokens"], show_default=True,
    help="Tokens to calibrate on. Tuning uses 512 tokens per step, and more text where there is more.",
)
@click.option(
    "--tune", type=int, default=None, metavar="STEPS",
    help=f"Steps of 512 tokens for which the block scales are tuned end to end; 0 disables tuning.  [default: {DEFAULT_TUNE} "
    "with --rotation diagonal or output and --weights gptq; 0 for other methods, mixtures of experts and models for which "
    "tuning takes more than 16 GB of memory]",
)
@click.option("--seed", type=int, default=_DEFAULTS["seed"], show_default=True, help="Seed of all random numbers.")
@click.option(
    "--device", metavar=f"[{'|'.join(DEVICES)}|cuda:N]", default=_DEFAULTS["device"], show_default=True,
    help="Device to compute on. auto: a CUDA GPU if there is one, else the CPU.",
)
@click.option(
    "--keep-rotations", type=click.Path(path_type=Path), default=None, metavar="FILE",
    help="Save R1, R2 and everything else that is folded to this file, for convert-lora.",
)
@click.option(
    "--report", type=click.Path(path_type=Path), default=None, metavar="HTML",
    help="Measure every layer and write a self-contained HTML page with plots of kurtosis and of weight and activation errors. "
    "Every layer is folded a second time for it.",
)
@click.option(
    "--work-dir", type=click.Path(path_type=Path), default=None,
    help="Directory for finished steps.  [default: beside OUT, removed at the end]",
)
@allow_pickle
@click.option("--restart", is_flag=True, help="Start over and discard what an interrupted run left.")
@click.option(
    "--plan", "only_plan", is_flag=True,
    help="Convert nothing and download no weights: read configuration and headers, and report memory, disk, time, rotations and "
    "what would be refused.",
)
@click.option("--quiet", is_flag=True, help="Print only errors.")
@click.option("--json", "as_json", is_flag=True, help="Print the result, or the plan, as JSON on standard output.")  # fmt: skip
def convert_command(
    model: str, out: Path, calibration: tuple[str, ...], only_plan: bool, quiet: bool, as_json: bool, **options: Any
) -> None:
    """Convert MODEL to a 4-bit GGUF file.

    MODEL is a Hugging Face directory, a model on the Hugging Face Hub (hf:owner/name or its address), a GGUF file that
    transformers can read, or the name of a known model (smollm2-135m, qwen2.5-coder-0.5b, qwen2.5-coder-1.5b).
    To continue an interrupted run, rerun the same command.
    """
    # click takes seconds to start where torch is imported, so --help does without
    from kurtail_gguf.convert.pipeline import convert
    from kurtail_gguf.runtime.export import read_gguf

    _refuse_with_stock(options["target"])
    config = ConvertConfig(model=model, out=out, calibration=calibration, **options)
    if only_plan:
        show_plan(config, as_json)
        return
    result = convert(config, NullProgress() if quiet else make_progress(Console(stderr=True)))
    if config.report is not None:
        from kurtail_gguf.measure.report.page import write_report

        info = read_gguf(result.out)
        write_report(config, result, summary(info), info.runs_as, ("kurtail-gguf", *sys.argv[1:]))
    if as_json:
        click.echo(json.dumps(_as_json(result, peak_memory()), indent=2))
    if as_json or quiet:
        return
    info = read_gguf(result.out)
    size = os.path.getsize(result.out) / 1e6
    click.echo(f"wrote {result.out}: {size:.0f} MB, {info.bits_per_weight:.2f} bits per weight ({info.runs_as})")
    for line in (*_cache(result.provenance), *_cost(result, peak_memory())):
        click.echo(line)
    if result.warning is not None:
        click.echo(f"warning: {result.warning}", err=True)
    if (original := prefer_original(model)) is not None:
        click.echo(original)
    if config.report is not None:
        click.echo(f"wrote {config.report}: open it in a browser")
    click.echo(f"run it with: llama-cli -m {click.format_filename(result.out)}")


def _cache(provenance: Provenance) -> Iterator[str]:
    """What the cache takes and what it alone costs."""
    if provenance.kv_divergence is not None and provenance.kv_perplexity is not None:
        yield (
            f"cache: {provenance.mean_kv_bits:.2f} bits per value ({cache_layers(provenance)}); alone it costs a "
            f"divergence of {provenance.kv_divergence:.4f} nats per token and changes perplexity by "
            f"{100 * (provenance.kv_perplexity - 1):+.1f} % ({provenance.kv_measured_tokens} tokens of text that it was "
            "not fitted to)"
        )


def _cost(result: ConvertResult, peak_bytes: int) -> Iterator[str]:
    """Where the time went; by layer and weight only where all of it went into this run."""
    stages = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in result.seconds.items() if seconds >= 0.5)
    spent = format_seconds(sum(result.seconds.values()))
    yield f"took {spent} ({stages or 'no stage half a second'}); peak memory {_peak(result, peak_bytes)}"
    if not result.resumed:
        # a conversion by itself has no rotations, and without weights to quantize not that either
        seconds = sum(result.seconds.get(stage, 0.0) for stage in ("rotations", "quantize"))
        yield (
            f"rotations and {result.provenance.weights} together: {seconds / result.layers:.2f} s per layer, "
            f"{seconds / result.weights * 1e6:.2f} s per million weights"
        )


def _peak(result: ConvertResult, peak_bytes: int) -> str:
    """The most memory of the process, and of the card where there was one, with what torch held of it for the next tensors."""
    card = result.card_peak_bytes
    return f"{peak_bytes / 1e9:.1f} GB" + ("" if card is None else f", {card[1] / 1e9:.1f} GB on {result.device}")


def _as_json(result: ConvertResult, peak_bytes: int) -> dict[str, Any]:
    return {
        "out": str(result.out),
        "bytes": os.path.getsize(result.out),
        "seconds": result.seconds,
        "peak_bytes": peak_bytes,
        "device": result.device,
        **_card_json(result),
        "resumed": result.resumed,
        "kurtail": asdict(result.provenance),
    }


def _card_json(result: ConvertResult) -> dict[str, Any]:
    if (card := result.card_peak_bytes) is None:
        return {}
    stages = {name: asdict(peak) for name, peak in result.card_peak.items()}
    return {"card_peak_bytes": {"allocated": card[0], "reserved": card[1], "stages": stages}}


def _refuse_with_stock(target: str) -> None:
    """Refuse what was typed, even where it is the default: the file would not be what was asked for."""
    context = click.get_current_context()
    for name in ("activations", "kv", "kv_budget"):
        if target == "stock" and context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise not_with_stock("--" + name.replace("_", "-"))
