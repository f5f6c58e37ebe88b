"""``kurtail-gguf convert --plan``: what a conversion would take."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from kurtail_gguf.cli.progress import format_seconds
from kurtail_gguf.convert.settings import ConvertConfig

if TYPE_CHECKING:
    from kurtail_gguf.convert.plan import CacheSize, Plan


def show_plan(config: ConvertConfig, as_json: bool) -> None:
    """Print the plan; the status is 1 where the conversion would be refused."""
    # imports torch, as convert itself does
    from kurtail_gguf.convert.plan import plan

    found = plan(config)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        for line in _lines(found):
            click.echo(line)
    if found.refused:
        click.get_current_context().exit(1)


def _cache(cache: CacheSize) -> str:
    takes = f"{cache.token_bytes / 1e3:.3g} kB per token, {cache.context_bytes / 1e6:,.0f} MB at {cache.context:,} tokens"
    if cache.choice == "16":
        return f"KV cache: f16, {takes}"
    bits = f"{cache.bits:.4g} bits per value"
    if cache.choice == "auto":
        bits += " at most (auto, more bits where 4 harm a layer)"
    return f"KV cache: {bits}, {takes}, {cache.f16_bytes / 1e6:,.0f} MB as f16"


def _lines(plan: Plan) -> Iterator[str]:
    yield f"{plan.model}: {plan.architecture}, {plan.layers} layers, {plan.parameters / 1e9:.2f} billion weights; {plan.way}"
    for name, text in plan.rotations.items():
        yield f"  {name}: {text}"
    yield (
        f"memory{' of the host' if plan.card else ''}: at most {plan.peak_bytes / 1e9:.1f} GB, "
        f"{plan.memory_available / 1e9:.1f} GB free; by stage:"
    )
    yield from (f"  {name}: {value / 1e9:.1f} GB" for name, value in plan.memory.items())
    if plan.card:
        peak, free = plan.card_peak_bytes / 1e9, plan.card_available / 1e9
        yield f"memory of {plan.device}: at most {peak:.1f} GB in tensors, {free:.1f} GB free; by stage:"
        yield from (f"  {name}: {value / 1e9:.1f} GB" for name, value in plan.card.items())
    yield _cache(plan.cache)
    free = ", ".join(f"{free / 1e9:.1f} GB free {where}" for where, (_, free) in plan.room.items())
    yield f"disk: {sum(plan.disk.values()) / 1e9:.1f} GB until the end, {free}:"
    yield from (f"  {name}: {value / 1e9:.2f} GB" for name, value in plan.disk.items())
    where = "the CPU" if plan.device == "cpu" else plan.device
    yield (
        f"time on {where}: about {format_seconds(sum(plan.seconds.values()))}, estimated from operations and accurate to a "
        "factor of two:"
    )
    yield from (f"  {name}: {format_seconds(value)}" for name, value in plan.seconds.items())
    yield from (f"note: {text}" for text in plan.notes)
    yield from (f"would be refused: {text}" for text in plan.refused)
