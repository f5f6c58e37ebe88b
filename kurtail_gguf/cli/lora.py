"""``kurtail-gguf convert-lora ADAPTER OUT.gguf``."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
from rich.console import Console

from kurtail_gguf.cli.options import allow_pickle
from kurtail_gguf.cli.progress import make_progress


@click.command("convert-lora")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT.gguf", type=click.Path(path_type=Path))
@click.option("--file", required=True, type=click.Path(path_type=Path), help="The rotated GGUF file that the adapter is for.")
@click.option(
    "--rotations", required=True, type=click.Path(path_type=Path), help="The file that convert --keep-rotations saved with it."
)
@click.option("--reference", required=True, metavar="MODEL", help="The MODEL that the file was converted from, as given to convert.")
@allow_pickle
def convert_lora_command(
    adapter: Path, out: Path, file: Path, rotations: Path, reference: str, allow_pickle: bool
) -> None:
    """Convert a LoRA adapter to the basis of a rotated file.

    ADAPTER is a PEFT directory (adapter_config.json, adapter_model.safetensors) made for the original MODEL. Example:

    \b
    kurtail-gguf convert MODEL out.gguf --keep-rotations out.rotations
    kurtail-gguf convert-lora ADAPTER lora.gguf --file out.gguf --rotations out.rotations --reference MODEL
    llama-cli -m out.gguf --lora lora.gguf
    """
    # click takes seconds to start where torch is imported, so --help does without
    from kurtail_gguf.convert.adapters import convert_lora
    from kurtail_gguf.files.destinations import check_out

    check_out(out)
    with tempfile.TemporaryDirectory(prefix="kurtail-lora-") as directory:
        progress = make_progress(Console(stderr=True))
        count = convert_lora(adapter, out, file, rotations, reference, Path(directory), progress, allow_pickle)
    click.echo(f"wrote {out}: {count} linears adapted")
    click.echo(f"run it with: llama-cli -m {click.format_filename(file)} --lora {click.format_filename(out)}")
