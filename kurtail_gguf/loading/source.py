"""MODEL, whatever it is, to an HF directory: a directory, a GGUF file, or a recipe's name."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from kurtail_gguf.errors import KurtailError, SourceError
from kurtail_gguf.gguf_info import read_gguf
from kurtail_gguf.loading.recipes import fetch_recipe, find_recipe, recipe_names
from kurtail_gguf.progress import Progress

#: Keys of a GGUF file below ``general.`` that upstream's exporter reads in a model card, by the same names.
_CARD_KEYS = (
    *("name", "author", "version", "organization", "description", "finetune", "basename", "size_label"),
    *("license", "license_name", "license_link", "languages", "tags"),
)


def resolve_source(model: str, work_dir: Path, progress: Progress) -> Path:
    """The HF directory to convert.

    Args:
        model: an HF directory, a GGUF file that transformers can read, or a recipe's name. A path
            that exists wins over a recipe of the same name.
        work_dir: where a GGUF file given by the user is converted to (``work_dir/source``, reused by
            the next run); a recipe's model is converted in the user's cache instead.
        progress: told about downloads and conversions.

    Raises:
        SourceError: nothing of that name, a download that failed, a GGUF that cannot be read.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if path.is_file():
        return _from_gguf(path, work_dir / "source", progress)
    recipe = find_recipe(model)
    if recipe is not None:
        gguf = fetch_recipe(recipe, progress)
        return _from_gguf(gguf, gguf.parent / "hf", progress, recipe.title)
    raise SourceError(
        f"{model} is neither a directory, a file nor a known model ({', '.join(recipe_names())})"
    )


def _from_gguf(gguf: Path, target: Path, progress: Progress, title: str | None = None) -> Path:
    """Convert through transformers into ``target``, which appears only when complete. A title replaces the file's name."""
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise SourceError(f"{gguf} is not a GGUF file (its first bytes are not 'GGUF')")
    stamp = f"{gguf.name} {gguf.stat().st_size} {gguf.stat().st_mtime_ns} {title}"
    marker = target / "converted-from"
    if marker.exists() and marker.read_text(encoding="utf-8") == stamp:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with progress.stage(f"read {gguf.name}", 3) as stage:
        scratch = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
        try:
            for note in _convert(gguf, scratch):
                stage.advance(1, note)
            (scratch / "README.md").write_text(_model_card(gguf, title), encoding="utf-8")
            (scratch / marker.name).write_text(stamp, encoding="utf-8")
            if target.exists():
                shutil.rmtree(target)
            os.replace(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _convert(gguf: Path, target: Path) -> Iterator[str]:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name, "trust_remote_code": False}
    with _quiet(), _one_line(gguf):
        tokenizer = AutoTokenizer.from_pretrained(**where)
        tokenizer.save_pretrained(target)
    yield "vocabulary"
    with _quiet(), _one_line(gguf):
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    yield "weights"
    config = model.config
    if hasattr(config, "quantization_config"):
        # The weights were dequantized while loading; with the key left, nothing would load them again.
        del config.quantization_config
    config.architectures = [type(model).__name__]
    weights = model.state_dict()
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    for name, tensor in weights.items():
        if tensor.dtype != torch.float32:
            raise SourceError(f"{gguf}: transformers left tensor {name} as {tensor.dtype}, not dequantized")
    config.save_pretrained(target)
    # Not model.save_pretrained: it refuses models that were read from a GGUF.
    save_file({k: v.contiguous() for k, v in weights.items()}, target / "model.safetensors", {"format": "pt"})
    yield "saved"


def _model_card(gguf: Path, title: str | None) -> str:
    """What the file says of its name, makers and licence, where upstream's exporter looks for it.

    Without a card it would name the model after the directory.
    """
    try:
        metadata = read_gguf(gguf).metadata
    except KurtailError as error:  # bad input: convert keeps nothing of it, as of every SourceError
        raise SourceError(str(error)) from error
    told = {key: metadata[f"general.{key}"] for key in _CARD_KEYS if f"general.{key}" in metadata}
    if title is not None:
        told["name"] = title
    return f"---\n{yaml.safe_dump(told, sort_keys=False)}---\n"


@contextlib.contextmanager
def _one_line(gguf: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers and gguf raise anything on a bad file: it is the file's fault
        reason = str(error).strip().splitlines()
        raise SourceError(
            f"{gguf}: transformers cannot read this GGUF ({type(error).__name__}: "
            f"{reason[0][:200] if reason else 'no reason given'}): the file is truncated, damaged or of "
            "an unsupported architecture"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' own bars and warnings off the terminal, where ours are drawn.

    The GGUF reader's bar ignores transformers' switch, hence stderr is caught as well.
    """
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
