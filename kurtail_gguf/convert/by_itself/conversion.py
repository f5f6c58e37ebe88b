"""From a model that no family describes to a GGUF: found, proven, quantized, written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from kurtail_gguf.convert.by_itself.loading import fingerprint, load_config, load_model, upstreams_architectures
from kurtail_gguf.convert.by_itself.proof import TOKENS, prove
from kurtail_gguf.convert.by_itself.quantize import quantize
from kurtail_gguf.convert.own_text import SCRATCH, no_own_text, write_own_text
from kurtail_gguf.convert.settings import ConvertConfig
from kurtail_gguf.convert.workdir import open_work_dir
from kurtail_gguf.files.atomic import remove
from kurtail_gguf.messages.errors import KurtailError, UnsupportedArchitecture
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.method.calibration.prose import prose_tokens
from kurtail_gguf.method.calibration.tokens import CalibrationTokens, calibration_name, kept_ids, load_tokenizer, read_ids
from kurtail_gguf.model.by_itself import FoundLayers, FoundLinear, find_layers
from kurtail_gguf.runtime.export import write_by_itself
from kurtail_gguf.runtime.export.rows import row_sums
from kurtail_gguf.runtime.gguf_info import read_gguf
from kurtail_gguf.runtime.logits import mean_divergence, runtime_log_probabilities
from kurtail_gguf.runtime.programs import check_loads
from kurtail_gguf.runtime.provenance import TOOL, UNROUNDED_BITS, UNROUNDED_KV_BITS, Provenance
from kurtail_gguf.runtime.vendored import Worker

#: Share of the layers' weights below which a file would hold most of them unquantized.
SMALLEST_SHARE = 0.5
#: What an 8-bit cache may cost for it to be taken unasked, mean KL from the same with one in half precision, nats a token.
CACHE_COST = 1e-3

#: What the runtime tells of a tensor that its graph multiplies by other means (kurtail-graph.cpp).
_WITHOUT_TRANSFORM = re.compile(r"blk\.\d+\.(\S+) has an online transform, but the graph of architecture")

Measure = Callable[[str], AbstractContextManager[None]]


def convert_by_itself(
    config: ConvertConfig, texts: dict[str, str], source: Path, work_dir: Path, device: torch.device, measure: Measure,
    converter: Worker, progress: Progress,
) -> tuple[Provenance, int, int, bool]:  # fmt: skip
    """Convert a model whose architecture no family describes.

    Args:
        config: what to do.
        texts: hashes of the calibration's files, by their names.
        source: the HF directory.
        work_dir: where steps leave their results; it is locked.
        device: what to compute on.
        measure: a context for each step, by its name.
        converter: upstream's, running.
        progress: told about every step.

    Returns:
        What the file says of itself, layers, weights of the linears, and whether results of an earlier run were taken over.

    Raises:
        KurtailError: options that are not offered, a model that cannot be converted, one that the runtime computes otherwise.
    """
    with measure("load"):
        found = find(source)
        for reason in refused_options(config):
            raise KurtailError(reason)
        model = load_model(source, config.allow_pickle, device)
        tokenizer = load_tokenizer(source)
    resumed = open_work_dir(work_dir, _settings(config, texts, source, device))
    quantized = work_dir / "quantized"
    quantized.mkdir(exist_ok=True)
    names = {linear.name: found.name_in_layers(linear.name) for linear in found.linears}
    unrounded = quantized / "unquantized.gguf"
    with measure("prove"):
        known, columns = known_rows(model, found.linears, names)
        plain = unrounded_provenance(config.seed, found.count)
        kept: set[str] = set()
        while True:
            made = write_by_itself(source, known, columns, None, unrounded, plain, progress, converter=converter, kept=kept)
            if not made:
                raise UnsupportedArchitecture(
                    f"{source}: upstream's converter makes something else of every linear that was found: none can be quantized"
                )
            tokens = short_text(tokenizer, model, unrounded)
            try:
                proof = prove(unrounded, model, tokens)
                break
            except KurtailError as error:
                tensor = without_transform(str(error))
                if tensor is None or tensor in kept:
                    raise
                kept.add(tensor)
        linears = tuple(linear for linear in found.linears if names[linear.name] in made.values())
        progress.tell(f"proven: unquantized, the runtime differs by up to {proof.difference:.1e} from transformers")
        for note in (*filter(None, [proof.note]), *notes(found, linears), *beyond(model.config.get_text_config())):
            progress.tell(f"warning: {note}")
        kv = _cache_bits(config, unrounded, tokens)
    if config.weights == "f32":
        plain = _provenance(config.seed, "f32", UNROUNDED_BITS, kv, found.count, None)
        with measure("export"):
            write_by_itself(source, known, columns, None, config.out, plain, progress, check_loads, converter, kept)
        return plain, found.count, _weights(linears), resumed
    unrounded.unlink()
    text = None
    with measure("calibration"):
        if config.weights == "gptq":
            rows = model.get_input_embeddings().weight.shape[0]

            def make() -> npt.NDArray[np.int32]:
                if config.calibration != ("self",):
                    return read_ids(config.calibration, tokenizer, rows, source, config.calibration_tokens)
                scratch = work_dir / SCRATCH
                return write_own_text(source, tokenizer, rows, config.calibration_tokens, config.seed, scratch, converter, progress)

            ids = kept_ids(work_dir / "tokens.npy", make)
            remove(work_dir / SCRATCH)
            text = CalibrationTokens(ids, calibration_name(config.calibration))
    with measure("quantize"):
        ids = None if text is None else text.ids
        quantize(model, linears, names, ids, config.activation_bits, quantized, progress)
    provenance = _provenance(config.seed, config.weights, config.activation_bits, kv, found.count, text)
    with measure("export"):
        listed = {names[linear.name]: known[names[linear.name]] for linear in linears}
        write_by_itself(source, listed, columns, quantized, config.out, provenance, progress, check_loads, converter, kept)
    return provenance, found.count, _weights(linears), resumed


def find(source: Path) -> FoundLayers:
    """The linears of an HF directory's model.

    Raises:
        UnsupportedArchitecture: there are none, they hold too little of the model, or upstream's converter does not know it.
    """
    config = load_config(source)
    (architecture,) = config.architectures
    if architecture not in upstreams_architectures():
        raise UnsupportedArchitecture(f"{source}: architecture {architecture} is unknown to upstream's converter, and to its runtime")
    found = find_layers(config)
    check_share(found, architecture)
    return found


def check_share(found: FoundLayers, architecture: str) -> None:
    """Refuse a model of which the file would hold most weights as they are.

    Raises:
        UnsupportedArchitecture: that is so.
    """
    if found.share < SMALLEST_SHARE:
        raise UnsupportedArchitecture(
            f"{architecture} cannot be converted by itself: linears hold {100 * found.share:.0f} % of its layers' weights, and "
            f"the others ({found.unread[0]}) would stay as they are"
        )


def without_transform(told: str) -> str | None:
    """The tensor of each layer that a graph of upstream's multiplies without the runtime's transforms, ``attn_q.weight``, if that is
    what the runtime told."""
    match = _WITHOUT_TRANSFORM.search(told)
    return match and match[1]


def notes(found: FoundLayers, linears: tuple[FoundLinear, ...]) -> Iterator[str]:
    """What a user should know of a model's linears: how much of the model they are."""
    if len(linears) < len(found.linears):
        left = next(linear.name for linear in found.linears if linear not in linears)
        yield f"{len(found.linears) - len(linears)} linears stay unquantized, since upstream changes or routes by them ({left})"
    if found.share < 0.99:
        yield f"{100 * (1 - found.share):.0f} % of the layers' weights stay unquantized ({found.unread[0]})"


def beyond(config: Any) -> Iterator[str]:
    """What a short text does not show, each a line."""
    window = getattr(config, "sliding_window", None) or 0
    if window > TOKENS:
        yield f"sliding_window {window} is not proven, by a text of {TOKENS} tokens: compare longer ones with `eval --reference`"
    parameters = getattr(config, "rope_parameters", None) or {}
    each = [one for one in parameters.values() if isinstance(one, dict)] or [parameters]
    kinds = {str(one.get("rope_type", "default")) for one in each} - {"default"}
    if kinds:
        yield f"RoPE scaled by {', '.join(sorted(kinds))} is not proven beyond {TOKENS} tokens: compare longer texts with `eval --reference`"


def refused_options(config: ConvertConfig) -> Iterator[str]:
    """Why options cannot be had for such a model, each a line."""
    asked = {
        f"--rotation {config.rotation}": config.rotation not in ("diagonal", "none"),
        f"--target {config.target}": config.target != "kurtail",
        "--activations auto": config.activations == "auto",
        f"--tune {config.tune}": bool(config.tune),
        "--keep-rotations": config.keep_rotations is not None,
        "--report": config.report is not None,
    }
    for option, wrong in asked.items():
        if wrong:
            yield f"{option} is not offered for a model that is converted by itself (docs/families.md): leave it out"
    if config.weights == "gptq" and config.calibration == ("self",):
        yield from no_own_text()


def _settings(config: ConvertConfig, texts: dict[str, str], source: Path, device: torch.device) -> dict[str, Any]:
    return {
        "tool": TOOL, "checkpoint": fingerprint(source), "device": device.type, "by_itself": True, "weights": config.weights,
        "activations": config.activations, "kv": config.kv, "calibration": list(config.calibration), "calibration_texts": texts,
        "calibration_tokens": config.calibration_tokens, "seed": config.seed,
    }  # fmt: skip


def short_text(tokenizer: Any, model: nn.Module, file: Path) -> npt.NDArray[np.int32]:
    """Tokens int32 ``[n]`` that a model's file is proven on."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or TOKENS
    # what the file says, and the runtime goes by, may be less: BLOOM's configuration has no context
    info = read_gguf(file)
    context = min(context, info.metadata.get(f"{info.architecture}.context_length", TOKENS))
    tokens = prose_tokens(tokenizer, min(TOKENS, context))[0]
    return tokens[tokens < model.get_input_embeddings().weight.shape[0]]


def _cache_bits(config: ConvertConfig, file: Path, tokens: npt.NDArray[np.int32]) -> int:
    """What is asked for; else 8 where that costs next to nothing, as keys are not prepared for fewer."""
    if config.cache_bits != "auto":
        return int(config.cache_bits)
    try:
        right, found = (runtime_log_probabilities(file, [tokens.tolist()], cache=kind) for kind in ("f16", "q8_0"))
    except KurtailError:
        return UNROUNDED_KV_BITS  # heads of a length that q8_0 does not divide
    return 8 if mean_divergence(right, found) < CACHE_COST else UNROUNDED_KV_BITS


def _weights(linears: tuple[FoundLinear, ...]) -> int:
    return sum(linear.numel for linear in linears)


def known_rows(
    model: nn.Module, linears: tuple[FoundLinear, ...], names: dict[str, str]
) -> tuple[dict[str, npt.NDArray[np.float64]], dict[str, int]]:
    """By what linears' rows are known to the export (:func:`write_by_itself`), and how many values they have; ``names`` are those
    from the list of layers on."""
    sums = {}
    for linear in linears:
        each = [row_sums(matrix.cpu().numpy()) for matrix in linear.matrices(model.get_parameter(linear.name).detach())]
        sums[names[linear.name]] = each[0] if linear.experts is None else np.stack(each)
    return sums, {names[linear.name]: linear.columns for linear in linears}


def unrounded_provenance(seed: int, layers: int) -> Provenance:
    """What a file of unquantized weights says of itself."""
    return _provenance(seed, "f32", UNROUNDED_BITS, UNROUNDED_KV_BITS, layers, None)


def _provenance(seed: int, weights: str, activations: int, kv: int, layers: int, text: CalibrationTokens | None) -> Provenance:
    return Provenance(
        rotation="none", objective="none", weights=weights, tune_steps=0, seed=seed, r1_kind="none", r1_size=0,
        r2_kind="none", r2_size=0, r3_kind="none", r3_size=0, r4_kind="none", r4_size=0,
        activation_bits=activations, kv_bits=kv, kv_k_bits=(kv,) * layers, kv_v_bits=(kv,) * layers,
        calibration_name="" if text is None else text.name, calibration_tokens=0 if text is None else int(text.ids.size),
        calibration_sha256="" if text is None else text.sha256,
    )  # fmt: skip
