"""MODEL, whatever it is, to an HF directory: a directory, a GGUF file, a model of the Hub, or a recipe's name."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from kurtail_gguf.files.kinds import refuse_pointer
from kurtail_gguf.messages.errors import KurtailError, SourceError
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.model.families.registry import find_family
from kurtail_gguf.model.loading.hub import fetch_model, parse_hub_model, snapshot_of
from kurtail_gguf.model.loading.recipes import Recipe, fetch_recipe, find_recipe, recipe_names
from kurtail_gguf.runtime.gguf_info import UNPACKED_KEYS, GgufInfo, read_gguf, write_header

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Keys of a GGUF file below ``general.`` that upstream's exporter reads in a model card, by the same names.
_CARD_KEYS = (
    *("name", "author", "version", "organization", "description", "finetune", "basename", "size_label"),
    *("license", "license_name", "license_link", "languages", "tags"),
)
#: In a directory that was unpacked from a GGUF file: of which.
_MARKER = "converted-from"
#: Tensors that are no weights but say how RoPE is scaled: llama.cpp's form of a config's ``rope_scaling``.
_ROPE_SCALING = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def resolve_source(model: str, work_dir: Path, progress: Progress, allow_pickle: bool = False) -> Path:
    """The HF directory to convert.

    Args:
        model: an HF directory, or its root in the Hub's cache; a GGUF file that transformers can read; a recipe's name; a model
            of the Hub (:func:`kurtail_gguf.model.loading.hub.parse_hub_model`). A path that exists wins over names.
        work_dir: where a GGUF file given by the user is converted to (``work_dir/source``, reused by
            the next run); a recipe's model is converted in the user's cache instead.
        progress: told about downloads and conversions.
        allow_pickle: download ``.bin`` files of a model of the Hub that has no others.

    Raises:
        SourceError: nothing of that name, a download that failed, a disk too small, a GGUF that cannot be read, is one
            of several parts, lacks a tensor or has one that transformers drops; the message names it.
    """
    path = Path(model)
    if path.is_dir():
        return snapshot_of(path)
    if path.is_file():
        return _from_gguf(path, work_dir / "source", progress)
    recipe = find_recipe(model)
    if recipe is not None:
        gguf = fetch_recipe(recipe, progress)
        return _from_gguf(gguf, gguf.parent / "hf", progress, recipe)
    hub = parse_hub_model(model)
    if hub is not None:
        return fetch_model(hub, progress, allow_pickle)
    raise unknown_model(model)


def unknown_model(model: str) -> SourceError:
    """What is said of a MODEL that is nothing."""
    return SourceError(
        f"{model} is not a directory, a file or a known model ({', '.join(recipe_names())}); for a model on the Hugging "
        "Face Hub give hf:owner/name"
    )


def _from_gguf(gguf: Path, target: Path, progress: Progress, recipe: Recipe | None = None) -> Path:
    """Convert through transformers into ``target``, which appears only when complete.

    A recipe's title replaces the name that the file gives itself.
    """
    _check_magic(gguf)
    if unpacked_before(gguf, target, recipe):
        return target
    info = _read_header(gguf)
    target.parent.mkdir(parents=True, exist_ok=True)
    _check_room(info, target.parent)
    with progress.stage(f"read {gguf.name}", 3) as stage:
        scratch = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
        try:
            for note in _convert(info, scratch):
                stage.advance(1, note)
            (scratch / "README.md").write_text(_model_card(info, recipe), encoding="utf-8")
            (scratch / _MARKER).write_text(_stamp(gguf, recipe), encoding="utf-8")
            if target.exists():
                shutil.rmtree(target)
            os.replace(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def unpacked_before(gguf: Path, target: Path, recipe: Recipe | None) -> bool:
    """Whether ``target`` holds what this file was unpacked to, by this version and under the same title."""
    marker = target / _MARKER
    # earlier versions kept no keys
    return (target / UNPACKED_KEYS).exists() and marker.exists() and marker.read_text(encoding="utf-8") == _stamp(gguf, recipe)


def _stamp(gguf: Path, recipe: Recipe | None) -> str:
    return f"{gguf.name} {gguf.stat().st_size} {gguf.stat().st_mtime_ns} {None if recipe is None else recipe.title}"


def _check_magic(gguf: Path) -> None:
    refuse_pointer(gguf, SourceError)
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise SourceError(f"{gguf} is not a GGUF file (its first bytes are not 'GGUF')")


def check_gguf(gguf: Path) -> dict[str, Any]:
    """What config.json will say of a GGUF file, with all that can be refused before its weights are read.

    Raises:
        SourceError, UnsupportedArchitecture: as :func:`resolve_source`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    _check_magic(gguf)
    info = _read_header(gguf)
    with _quiet(), _one_line(gguf):
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    find_family(type(model).__name__)
    with _quiet(), _one_line(gguf):
        places = _places(model, info.architecture)
    parameters = [name for name in model.state_dict() if not (config.tie_word_embeddings and name == "lm_head.weight")]
    _check_complete(info, places, parameters, {"missing_keys": set(), "unexpected_keys": set()})
    return {**config.to_dict(), "architectures": [type(model).__name__], "dtype": "float32"}


def _read_header(gguf: Path) -> GgufInfo:
    """Keys and names of tensors, before anything is loaded, of a file that can be complete."""
    try:
        info = read_gguf(gguf)
        key = f"{info.architecture}.rope.scaling.type"
    except KurtailError as error:  # bad input: convert keeps nothing of it, as of every SourceError
        raise SourceError(str(error)) from error
    parts = info.metadata.get("split.count", 0)  # llama-gguf-split leaves a 0 in what it has merged
    if isinstance(parts, int) and parts > 1:
        raise SourceError(f"{gguf} is one of {parts} parts of a model: merge them with llama-gguf-split --merge first")
    scaling = [f"tensor {tensor.name}" for tensor in info.tensors if tensor.name in _ROPE_SCALING]
    if info.metadata.get(key, "none") != "none":
        scaling.append(f"key {key} ({info.metadata[key]})")
    if scaling:
        raise SourceError(
            f"{gguf}: {scaling[0]} scales RoPE (as Llama 3.1 does), which transformers does not read from a GGUF: convert "
            "from the Hugging Face checkpoint instead"
        )
    return info


def _check_room(info: GgufInfo, directory: Path) -> None:
    """The weights are unpacked to float32, whatever their types in the file."""
    needed, free = 4 * sum(tensor.values for tensor in info.tensors), shutil.disk_usage(directory).free
    if needed > free:
        raise SourceError(
            f"{info.path} takes {needed / 1e9:.1f} GB in {directory} when its weights are unpacked to float32, but "
            f"{free / 1e9:.1f} GB are free: free some space there"
        )


def _convert(info: GgufInfo, target: Path) -> Iterator[str]:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = info.path
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name, "trust_remote_code": False}
    with _quiet(), _one_line(gguf):
        tokenizer = AutoTokenizer.from_pretrained(**where)
        tokenizer.save_pretrained(target)
    write_header(gguf, target / UNPACKED_KEYS)
    yield "vocabulary"
    with _quiet(), _one_line(gguf):
        model, loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, output_loading_info=True)
    find_family(type(model).__name__)  # first: what is wrong is then the architecture, not some tensor that only it has
    with _quiet(), _one_line(gguf):
        places = _places(model, info.architecture)
    yield "weights"
    config = model.config
    if hasattr(config, "quantization_config"):
        # The weights were dequantized while loading; with the key left, nothing would load them again.
        del config.quantization_config
    config.architectures = [type(model).__name__]
    weights = model.state_dict()
    if config.tie_word_embeddings and (head := weights.pop("lm_head.weight", None)) is not None:
        if not torch.equal(head, model.get_input_embeddings().weight):
            weights["lm_head.weight"], config.tie_word_embeddings = head, False
    _check_complete(info, places, list(weights), loaded)
    for name, tensor in weights.items():
        if tensor.dtype != torch.float32:
            raise SourceError(f"{gguf}: transformers left tensor {name} as {tensor.dtype}, not dequantized")
    config.save_pretrained(target)
    # Not model.save_pretrained: it refuses models that were read from a GGUF.
    save_file({k: v.contiguous() for k, v in weights.items()}, target / "model.safetensors", {"format": "pt"})
    yield "saved"


def _places(model: PreTrainedModel, architecture: str) -> dict[str, str]:
    """Tensors that transformers looks for in the file, and the parameter that each fills. Others it drops."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    found = get_gguf_hf_weights_map(model, TENSOR_PROCESSORS.get(architecture, TensorProcessor)())
    # it names experts' tensors without their suffix; those of gate and up fill one parameter
    suffixes = (".weight", ".bias")
    return {name if name.endswith(suffixes) else f"{name}.weight": parameter for name, parameter in found.items()}


def _check_complete(
    info: GgufInfo, places: dict[str, str], parameters: list[str], loaded: dict[str, set[str]]
) -> None:
    """Refuse what transformers only warns of, or not even that: tensors dropped, parameters left random or zero.

    Args:
        info: the file.
        places: see :func:`_places`.
        parameters: names of those to be saved, which are without a tied head.
        loaded: what transformers says about its loading.
    """
    names = [tensor.name for tensor in info.tensors]
    if dropped := [name for name in names if name not in places] or sorted(loaded["unexpected_keys"]):
        raise SourceError(
            f"{info.path}: transformers does not use tensor {_first(dropped)} and would drop it: convert from the Hugging "
            "Face checkpoint instead"
        )
    lacking = [f"{name} ({places[name]})" for name in places if name not in names and places[name] in parameters]
    if lacking := lacking or [name for name in parameters if name in loaded["missing_keys"]]:
        raise SourceError(f"{info.path} lacks tensor {_first(lacking)}: the file is incomplete; download it again")


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _model_card(info: GgufInfo, recipe: Recipe | None) -> str:
    """What the file says of its name, makers and licence, where upstream's exporter looks for it.

    Without a card it would name the model after the directory.
    """
    metadata = info.metadata
    told = {key: metadata[f"general.{key}"] for key in _CARD_KEYS if f"general.{key}" in metadata}
    if recipe is not None:
        told = {"license": recipe.licence.lower()} | told | {"name": recipe.title}
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
