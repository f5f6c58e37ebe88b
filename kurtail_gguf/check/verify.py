"""Is a file what the model became? Checked from the outside, with nothing but the file and the model.

In this order, each said to be right or told what is not: metadata, vocabulary, scales and weights tensor by tensor, what the
model says, from the original over the rotated weights to the file in the runtime, and what the file's cache makes of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kurtail_gguf.check.basis import find_layer_transforms, find_online, find_r1
from kurtail_gguf.check.by_itself import ChecksByItself
from kurtail_gguf.check.runtime_checks import RuntimeChecks
from kurtail_gguf.check.tensors import BOUNDS, FOUND_AGAIN, bounded, check_scales, check_shape, compare
from kurtail_gguf.convert.by_itself.loading import by_itself
from kurtail_gguf.messages.errors import Differs, KurtailError
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.method.calibration.tokens import load_tokenizer
from kurtail_gguf.method.fold.layer import LayerTransforms, fold_layer, fold_reader
from kurtail_gguf.method.fold.tables import is_tied
from kurtail_gguf.model.loading.checkpoint import Checkpoint, open_checkpoint
from kurtail_gguf.model.loading.source import resolve_source
from kurtail_gguf.model.names import EMBEDDING, HEAD, file_norm, file_rows, file_tensor
from kurtail_gguf.runtime import ggml
from kurtail_gguf.runtime.export import read_header
from kurtail_gguf.runtime.file_tensors import FileTensors
from kurtail_gguf.runtime.gguf_info import GgufInfo, read_gguf
from kurtail_gguf.runtime.logits import runtime_tokens
from kurtail_gguf.runtime.provenance import Provenance

#: What the two vocabularies are compared on. Blanks at the start are left out: there transformers, reading a bare
#: tokenizer.model, and SentencePiece itself disagree.
TEXTS = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "In 1969, 2 people walked on the Moon; 12 have been there since. It costs $3.50 (or 4,20 €)!",
    "def fold(weight, gain):\n    # one line\n    return weight * gain[None, :]  # another\n",
    "Two  blanks, a\ttab, and trailing ones  ",
    "naïve café, Übergröße, Москва, 東京, 한국어, שלום, مرحبا, 🙂🚀",
    "http://example.org/a?b=c&d=%20 user@example.org CamelCase snake_case ALLCAPS don't we'll",
)

@dataclass(frozen=True, slots=True)
class Check:
    """A finished check.

    Args:
        name: of what was checked.
        right: whether it is as it should be.
        detail: what was found: figures, or the first thing that differs.
    """

    name: str
    right: bool
    detail: str


def verify(
    path: Path, model: str, work_dir: Path, progress: Progress, allow_pickle: bool = False
) -> Iterator[Check]:
    """Check a file against the model it was made of, one check after the other.

    Args:
        path: a file that ``convert`` wrote.
        model: as ``convert`` took it.
        work_dir: where a MODEL that is a GGUF file is unpacked to.
        progress: a stage for tensors, one for what the model says, one for what its cache does.
        allow_pickle: whether the model's weights may be ``.bin`` files.

    Raises:
        KurtailError: what keeps a check from being made: a file without our keys, a missing model, no bindings.
    """
    info = read_gguf(path)
    provenance = info.provenance
    if provenance is None:
        raise KurtailError(f"{path} has no kurtail keys, so there is nothing to verify: give a file that convert wrote")
    source = resolve_source(model, work_dir, progress, allow_pickle)
    if by_itself(source):
        checks = ChecksByItself(info, provenance, source, work_dir, progress, allow_pickle)
        yield _checked("metadata", lambda: _metadata(info, source))
        yield _checked("tokenizer", lambda: _tokenizer(path, source))
        for name, check in (("tensors", checks.tensors), ("proof", checks.proof), ("logits", checks.logits), ("cache", checks.cache)):
            yield _checked(name, check)
        return
    checkpoint = open_checkpoint(source, allow_pickle)
    file = FileTensors(info)
    yield _checked("metadata", lambda: _metadata(info, source, checkpoint.spec.window))
    yield _checked("tokenizer", lambda: _tokenizer(path, source))
    try:
        transforms, detail = _tensors(checkpoint, file, provenance, progress)
    except Differs as difference:
        yield Check("tensors", False, str(difference))
        return  # what was folded is not known
    yield Check("tensors", True, detail)
    runtime = RuntimeChecks(checkpoint, path, provenance, progress)
    yield _checked("logits", lambda: runtime.logits(transforms))
    yield _checked("cache", runtime.cache)


def _checked(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, True, check())
    except Differs as difference:
        return Check(name, False, str(difference))


def _metadata(info: GgufInfo, source: Path, context: int = 0) -> str:
    """Hyper-parameters and vocabulary are what upstream's converter writes for the model, and types what ours wrote."""
    if info.requantized is not None:
        raise Differs(f"it was quantized again after convert wrote it: its linears are {info.requantized}")
    expected = read_header(source, context).metadata
    prefixes = ("tokenizer.", f"{expected['general.architecture']}.", "general.architecture")
    keys = [key for key in expected if key.startswith(prefixes)]
    for key in keys:
        if key not in info.metadata:
            raise Differs(f"key {key} is missing")
        if info.metadata[key] != expected[key]:
            raise Differs(f"key {key} is {info.metadata[key]}, expected the model's {expected[key]}")
    return f"{len(keys)} keys"


def _tokenizer(path: Path, source: Path) -> str:
    tokenizer = load_tokenizer(source)
    left_out = 0
    for text, found in zip(TEXTS, runtime_tokens(path, TEXTS), strict=True):
        expected = tokenizer.encode(text, add_special_tokens=False)
        if found != expected and _is_normalized(text, source):
            left_out += 1
        elif found != expected:
            same = [a == b for a, b in zip(found, expected, strict=False)]
            at = [*same, False].index(False)
            raise Differs(f"{text!r}: token {at} is {found[at:at + 1]}, expected the model's {expected[at:at + 1]}")
    if not left_out:
        return f"{len(TEXTS)} texts"
    return (
        f"{len(TEXTS) - left_out} texts; {left_out} more differ because tokenizer.model changes line ends or blanks first, "
        "which llama.cpp never does"
    )


def _is_normalized(text: str, source: Path) -> bool:
    """Whether a SentencePiece model that is the model's only tokenizer changes a text before it is split.

    llama.cpp's vocabulary has no such rules, so tokens then differ for upstream's own files as well.
    """
    path = source / "tokenizer.model"
    if (source / "tokenizer.json").exists() or not path.exists():
        return False
    from sentencepiece import SentencePieceProcessor

    normalized = SentencePieceProcessor(model_file=str(path)).normalize(text)
    return normalized.replace("\u2581", " ").removeprefix(" ") != text


def _tensors(
    checkpoint: Checkpoint, file: FileTensors, provenance: Provenance, progress: Progress
) -> tuple[list[LayerTransforms], str]:
    """Every tensor against the model's folded by the rotations found; returns those, by layer, and the detail."""
    spec, family = checkpoint.spec, checkpoint.spec.family
    worst = (0.0, "")
    unrounded = BOUNDS[ggml.F32] if provenance.weights == "f32" else FOUND_AGAIN
    with progress.stage("compare tensors", spec.layers + 1) as stage:
        r1, online = find_r1(checkpoint, file, provenance), find_online(checkpoint, file)
        gain = family.norm.gain(checkpoint.tensor(f"{family.final_norm}.weight"))
        none = torch.ones_like(gain)
        worst = max(worst, _compare_table(checkpoint, file, f"{family.embedding}.weight", EMBEDDING, none, r1))
        if not is_tied(spec, r1):
            worst = max(worst, _compare_table(checkpoint, file, checkpoint.head_name, HEAD, none if r1 is None else gain, r1))
        elif HEAD in file:
            raise Differs(f"tensor {HEAD} exists, but the model's head is its embedding")
        compare(file, "output_norm.weight", (gain if r1 is None else none).numpy())
        for bias, name in ((f"{family.final_norm}.bias", "output_norm.bias"), (f"{family.head}.bias", "output.bias")):
            if bias in spec.ending:
                compare(file, name, checkpoint.tensor(bias).double().numpy())
        stage.advance(1, "embedding and head")
        layers = []
        for layer in range(spec.layers):
            weights, own = checkpoint.layer(layer, check=True), spec.at(layer)
            transforms = find_layer_transforms(checkpoint, file, provenance, layer, weights, r1, online)
            folded = fold_layer(weights, own, transforms)
            # keys first: what they were divided by is found from them, and queries are multiplied by it
            for linear in dict.fromkeys((family.key, *own.linears, *own.unquantized_readers)):
                name, expert = file_tensor(spec, layer, linear)
                rows = file_rows(own, linear, folded[f"{linear}.weight"].numpy())
                worst = max(worst, (compare(file, name, rows, expert, unrounded), name))
                if f"{linear}.bias" in folded:
                    bias = name.removesuffix("weight") + "bias"
                    rows = file_rows(spec, linear, folded[f"{linear}.bias"].numpy())
                    compare(file, bias, rows, unrounded=unrounded)
            for norm in (family.query_norm, family.key_norm, *spec.norms):
                if norm:
                    stored = f"blk.{layer}.{file_norm(spec, norm)}"
                    compare(file, f"{stored}.weight", family.norm.gain(folded[f"{norm}.weight"]).numpy())
                    if f"{norm}.bias" in folded:
                        compare(file, f"{stored}.bias", folded[f"{norm}.bias"].numpy())
            if own.family.experts is not None and (bias := own.family.experts.choice_bias):
                compare(file, f"blk.{layer}.exp_probs_b.bias", folded[bias].numpy())
            layers.append(transforms)
            stage.advance(1, f"layer {layer}")
    return layers, f"relative error at most {worst[0]:.1e} ({worst[1]})"


def _compare_table(
    checkpoint: Checkpoint, file: FileTensors, name: str, stored: str, factor: torch.Tensor, r1: torch.Tensor | None
) -> tuple[float, str]:
    """Embedding or head, a chunk of rows at a time."""
    shape = (checkpoint.spec.vocab_size, checkpoint.spec.hidden_size)
    check_shape(file, stored, shape)
    check_scales(file, stored, None)
    error = total = 0.0
    for start, rows in checkpoint.rows(name):
        expected = fold_reader(rows, factor, r1).numpy()
        found = file.rows(stored, start, len(rows))
        error += float(np.square(found - expected).sum())
        total += float(np.square(expected).sum())
    return bounded(file, stored, error, total), stored
