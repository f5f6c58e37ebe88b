"""``kurtail-gguf inspect FILE.gguf``."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from kurtail_gguf.runtime.gguf_info import GgufInfo, TensorInfo, online_parts, read_gguf
from kurtail_gguf.runtime.provenance import Provenance


@click.command("inspect")
@click.argument("file", metavar="FILE.gguf", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def inspect_command(file: Path, as_json: bool) -> None:
    """Show a file's types, bits and rotations.

    It prints tensor types, bits per weight, rotations and the settings of the conversion.
    """
    info = read_gguf(file)
    if as_json:
        click.echo(json.dumps(summary(info), indent=2))
    else:
        _print(info, Console())


def summary(info: GgufInfo) -> dict[str, Any]:
    """What --json prints."""
    provenance = info.provenance
    return {
        "path": str(info.path),
        "architecture": info.architecture,
        "name": info.metadata.get("general.name"),
        "parameters": sum(tensor.values for tensor in info.tensors),
        "bits_per_weight": info.bits_per_weight,
        "block_bits_per_weight": info.block_bits_per_weight,
        "types": _types(info),
        "tensor_activation_bits": info.activation_exceptions,
        "online": info.online,
        "kurtail": None if provenance is None else asdict(provenance),
    }


def _types(info: GgufInfo) -> dict[str, dict[str, int]]:
    """Tensors, values and bytes of each type, largest first."""
    by_type: dict[str, list[TensorInfo]] = defaultdict(list)
    for tensor in info.tensors:
        by_type[tensor.type_name].append(tensor)
    totals = {
        name: {
            "tensors": len(tensors),
            "values": sum(tensor.values for tensor in tensors),
            "bytes": sum(tensor.bytes for tensor in tensors),
        }
        for name, tensors in by_type.items()
    }
    return dict(sorted(totals.items(), key=lambda item: (-item[1]["bytes"], item[0])))


def _print(info: GgufInfo, console: Console) -> None:
    told = summary(info)
    table = Table(title=f"{info.path}: {info.architecture}, {told['parameters'] / 1e6:.1f} M values")
    table.add_column("type")
    for column in ("tensors", "values", "bytes", "bits/weight"):
        table.add_column(column, justify="right")
    for name, total in told["types"].items():
        bits = 8 * total["bytes"] / total["values"]
        table.add_row(name, str(total["tensors"]), f"{total['values']:,}", f"{total['bytes']:,}", f"{bits:.2f}")
    console.print(table)
    block = info.block_bits_per_weight
    of_blocks = "" if block is None else f", {block:.2f} in the linears of the blocks"
    _line(console, f"bits per weight: {info.bits_per_weight:.2f}{of_blocks}")
    provenance = info.provenance
    if provenance is None:
        _line(console, "no kurtail keys: a stock file")
        return
    _print_provenance(info, provenance, console)
    if info.requantized is not None and provenance.target != "stock":
        _line(
            console,
            f"requantized: its linears are {info.requantized}, not kt4, but its keys list online transforms; stock "
            "llama.cpp runs it without them and computes nonsense: convert the model again",
        )
    if provenance.activation_choice == "auto":
        _line(console, _chosen(info, provenance.activation_budget))
    for name, bits in told["tensor_activation_bits"].items():
        _line(console, f"activations of {name}: {bits} bits")


def _chosen(info: GgufInfo, budget: float) -> str:
    """What of the budget was spent: a linear's multiply-accumulates for a token are its weights."""
    linears = [tensor for tensor in info.tensors if tensor.is_block_linear]
    chosen = [tensor for tensor in linears if tensor.name in info.activation_exceptions]
    share = sum(tensor.values for tensor in chosen) / sum(tensor.values for tensor in linears)
    return (
        f"activations of {len(chosen)} of {len(linears)} linears have 8 bits, chosen by measured damage: "
        f"{100 * share:.1f} % of the multiply-accumulates, budget {100 * budget:.4g} %"
    )


def _print_provenance(info: GgufInfo, provenance: Provenance, console: Console) -> None:
    tuned = f", scales tuned for {provenance.tune_steps} steps" if provenance.tune_steps else ""
    _line(console, f"runs as {info.runs_as}, weights {provenance.weights}{tuned}")
    _line(console, f"rotation {provenance.rotation}, objective {provenance.objective}, seed {provenance.seed}")
    if provenance.kv_k_bits:
        _line(console, f"cache: {provenance.mean_kv_bits:.2f} bits per value, {cache_layers(provenance)}")
    if provenance.kv_divergence is not None and provenance.kv_perplexity is not None:
        _line(
            console,
            f"the cache alone: divergence {provenance.kv_divergence:.4f} nats per token, perplexity "
            f"{100 * (provenance.kv_perplexity - 1):+.1f} % (measured on {provenance.kv_measured_tokens} tokens at "
            "conversion)",
        )
    rotations = (
        ("R1, residual stream, folded", provenance.r1_kind, provenance.r1_size),
        ("R2, values of a head, folded", provenance.r2_kind, provenance.r2_size),
        ("R3, queries and keys, online", provenance.r3_kind, provenance.r3_size),
    )
    for name, kind, size in rotations:
        _line(console, f"  {name}: {kind}{f' {size}' if size else ''}")
    _line(console, f"  Hadamard of inputs, online: {online_parts(info.online)}")
    if provenance.diagonal != "none":
        _line(console, f"  diagonals, folded: {provenance.diagonal}")
    if provenance.calibration_tokens:
        _line(
            console,
            f"calibrated on {provenance.calibration_name}, {provenance.calibration_tokens} tokens, "
            f"sha256 {provenance.calibration_sha256}",
        )
    _line(console, f"written by {provenance.tool}, format {provenance.format_version}")


def cache_layers(provenance: Provenance) -> str:
    """Bits of keys and values: ``K 4, 8 in layers 3 and 8; V 4``."""
    return "; ".join(
        f"{name} {_bits_by_layer(bits)}" for name, bits in (("K", provenance.kv_k_bits), ("V", provenance.kv_v_bits))
    )


def _bits_by_layer(bits: tuple[int, ...]) -> str:
    most = max(sorted(set(bits)), key=bits.count)
    parts = [str(most)]
    for other in sorted(set(bits) - {most}):
        layers = [str(layer) for layer, own in enumerate(bits) if own == other]
        listed = layers[0] if len(layers) == 1 else f"{', '.join(layers[:-1])} and {layers[-1]}"
        parts.append(f"{other} in layer{'s' if len(layers) > 1 else ''} {listed}")
    return ", ".join(parts)


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
