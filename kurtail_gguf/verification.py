"""Is a file what the model became? Checked from the outside, with nothing but the file and the model.

In this order, each said to be right or told what is not: metadata, vocabulary, scales and weights tensor by tensor, and
what the model says, from the original over the rotated weights to the file in the runtime.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from kurtail_gguf import ggml
from kurtail_gguf.arch.names import EMBEDDING, HEAD, file_rows, file_tensor
from kurtail_gguf.basis import find_layer_rotations, find_r1
from kurtail_gguf.calibration.prose import TOKENS, prose_tokens
from kurtail_gguf.calibration.runner import LayerRunner
from kurtail_gguf.calibration.tokens import load_tokenizer
from kurtail_gguf.config import Provenance
from kurtail_gguf.errors import KurtailError
from kurtail_gguf.evaluate.file_tensors import FileTensors
from kurtail_gguf.evaluate.logits import mean_divergence, runtime_log_probabilities, runtime_tokens
from kurtail_gguf.export import read_metadata
from kurtail_gguf.fold.layer import LayerRotations, fold_layer, fold_reader
from kurtail_gguf.gguf_info import GgufInfo, read_gguf
from kurtail_gguf.loading.checkpoint import Checkpoint, open_checkpoint
from kurtail_gguf.loading.source import resolve_source
from kurtail_gguf.progress import Progress, Stage

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

#: Relative error ‖W′ − W‖ / ‖W‖ above which a tensor is not what was folded, by its type. Tensors of the wrong basis or
#: order are at √2, one wrong head of nine at 0.47. GPTQ and tuning move weights farther than rounding does: 0.24 is the
#: most in SmolLM2-135M.
BOUNDS = {ggml.F32: 1e-4, ggml.Q8_0: 0.02, ggml.Q6_K: 0.05, ggml.Q4_0: 0.4, ggml.KT4: 0.4}
#: The same for biases and routers, which are not rounded, where the basis was found again from 4-bit tensors.
FOUND_AGAIN = 0.2
#: Divergence in nats a token that single precision accounts for.
SAME = 1e-5
#: Divergence of a quantized file as a share of that from what is said at the next position.
NEARER = 0.5
#: Below it a weight is nothing that a half-precision scale could hold.
_TINY = 1e-5


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


class _Differs(Exception):
    """What is wrong, in words."""


def verify(
    path: Path, model: str, work_dir: Path, progress: Progress, allow_pickle: bool = False
) -> Iterator[Check]:
    """Check a file against the model it was made of, one check after the other.

    Args:
        path: a file that ``convert`` wrote.
        model: as ``convert`` took it.
        work_dir: where a MODEL that is a GGUF file is unpacked to.
        progress: a stage for tensors, one for what the model says.
        allow_pickle: whether the model's weights may be ``.bin`` files.

    Raises:
        KurtailError: what keeps a check from being made: a file without our keys, a missing model, no bindings.
    """
    info = read_gguf(path)
    provenance = info.provenance
    if provenance is None:
        raise KurtailError(f"{path} has no kurtail keys: there is nothing to verify; only files of convert can be")
    source = resolve_source(model, work_dir, progress)
    checkpoint = open_checkpoint(source, allow_pickle)
    file = FileTensors(info)
    yield _checked("metadata", lambda: _metadata(info, source))
    yield _checked("tokenizer", lambda: _tokenizer(path, source))
    try:
        rotations, detail = _tensors(checkpoint, file, provenance, progress)
    except _Differs as difference:
        yield Check("tensors", False, str(difference))
        return  # what was folded is not known
    yield Check("tensors", True, detail)
    yield _checked("logits", lambda: _logits(checkpoint, path, provenance, rotations, progress))


def _checked(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, True, check())
    except _Differs as difference:
        return Check(name, False, str(difference))


def _metadata(info: GgufInfo, source: Path) -> str:
    """Hyper-parameters and vocabulary are what upstream's converter writes for the model."""
    with tempfile.TemporaryDirectory(prefix="kurtail-verify-") as directory:
        expected = read_metadata(source, Path(directory) / "header.gguf")
    prefixes = ("tokenizer.", f"{expected['general.architecture']}.", "general.architecture")
    keys = [key for key in expected if key.startswith(prefixes)]
    for key in keys:
        if key not in info.metadata:
            raise _Differs(f"key {key} is missing")
        if info.metadata[key] != expected[key]:
            raise _Differs(f"key {key} is {info.metadata[key]}, the model's is {expected[key]}")
    return f"{len(keys)} keys"


def _tokenizer(path: Path, source: Path) -> str:
    tokenizer = load_tokenizer(source)
    for text, found in zip(TEXTS, runtime_tokens(path, TEXTS), strict=True):
        expected = tokenizer.encode(text, add_special_tokens=False)
        if found != expected:
            same = [a == b for a, b in zip(found, expected, strict=False)]
            at = [*same, False].index(False)
            raise _Differs(f"{text!r}: token {at} of the file's is {found[at:at + 1]}, of the model's {expected[at:at + 1]}")
    return f"{len(TEXTS)} texts"


def _tensors(
    checkpoint: Checkpoint, file: FileTensors, provenance: Provenance, progress: Progress
) -> tuple[list[LayerRotations], str]:
    """Every tensor against the model's folded by the rotations found; returns those, by layer, and the detail."""
    spec, family = checkpoint.spec, checkpoint.spec.family
    worst = (0.0, "")
    unrounded = BOUNDS[ggml.F32] if provenance.weights == "f32" else FOUND_AGAIN
    with progress.stage("compare tensors", spec.layers + 1) as stage:
        r1 = find_r1(checkpoint, file, provenance)
        gain = checkpoint.tensor(f"{family.final_norm}.weight").double()
        for name, stored, factor in (
            (f"{family.embedding}.weight", EMBEDDING, torch.ones_like(gain)), (checkpoint.head_name, HEAD, gain),
        ):  # fmt: skip
            worst = max(worst, _compare_table(checkpoint, file, name, stored, factor, r1))
        _compare(file, "output_norm.weight", np.ones(spec.hidden_size))
        stage.advance(1, "embedding and head")
        layers = []
        for layer in range(spec.layers):
            weights = checkpoint.layer(layer, check=True)
            rotations = find_layer_rotations(checkpoint, file, provenance, layer, weights, r1)
            folded = fold_layer(weights, spec, rotations)
            for linear in (*spec.linears, *spec.unquantized_readers):
                name, expert = file_tensor(spec, layer, linear)
                rows = file_rows(spec, linear, folded[f"{linear}.weight"].numpy())
                worst = max(worst, (_compare(file, name, rows, expert, unrounded), name))
                if f"{linear}.bias" in folded:
                    bias = name.removesuffix("weight") + "bias"
                    rows = file_rows(spec, linear, folded[f"{linear}.bias"].numpy())
                    _compare(file, bias, rows, unrounded=unrounded)
            for norm, stored in ((family.query_norm, "attn_q_norm"), (family.key_norm, "attn_k_norm")):
                if norm:
                    _compare(file, f"blk.{layer}.{stored}.weight", folded[f"{norm}.weight"].numpy())
            for stored in ("attn_norm", "ffn_norm"):
                _compare(file, f"blk.{layer}.{stored}.weight", np.ones(spec.hidden_size))
            layers.append(rotations)
            stage.advance(1, f"layer {layer}")
    return layers, f"relative error at most {worst[0]:.1e} ({worst[1]})"


def _compare_table(
    checkpoint: Checkpoint, file: FileTensors, name: str, stored: str, factor: torch.Tensor, r1: torch.Tensor | None
) -> tuple[float, str]:
    """Embedding or head, a chunk of rows at a time."""
    shape = (checkpoint.spec.vocab_size, checkpoint.spec.hidden_size)
    _check_shape(file, stored, shape)
    _check_scales(file, stored, None)
    error = total = 0.0
    for start, rows in checkpoint.rows(name):
        expected = fold_reader(rows, factor, r1).numpy()
        found = file.rows(stored, start, len(rows))
        error += float(np.square(found - expected).sum())
        total += float(np.square(expected).sum())
    return _bounded(file, stored, error, total), stored


def _compare(
    file: FileTensors, name: str, expected: npt.NDArray, expert: int | None = None, unrounded: float = BOUNDS[ggml.F32]
) -> float:
    """Relative error of a tensor; `_Differs` where it is above its type's bound, or a scale is not usable.

    ``unrounded`` is the bound of what is in single precision.
    """
    _check_shape(file, name, expected.shape, expert)
    if expected.ndim == 2:
        _check_scales(file, name, expected, expert)
    found = file.values(name, expert).astype(np.float64)
    return _bounded(file, name, float(np.square(found - expected).sum()), float(np.square(expected).sum()), expert, unrounded)


def _check_shape(file: FileTensors, name: str, shape: tuple[int, ...], expert: int | None = None) -> None:
    if name not in file:
        raise _Differs(f"tensor {name} is missing")
    found = file.info(name).shape
    if tuple(found if expert is None else found[1:]) != tuple(shape):
        raise _Differs(f"tensor {name} is {list(found)}, the model's is {list(shape)}")


def _check_scales(file: FileTensors, name: str, expected: npt.NDArray | None, expert: int | None = None) -> None:
    scales = file.scales(name, expert)
    if scales is None:
        return
    where = _where(name, expert)
    bad = np.argwhere(~np.isfinite(scales))
    if len(bad):
        raise _Differs(f"tensor {where}: the scale of row {bad[0][0]}, block {bad[0][1]} is {scales[tuple(bad[0])]}")
    if expected is not None:
        largest = np.abs(expected).reshape(*scales.shape, -1).max(-1)
        bad = np.argwhere((scales == 0) & (largest > _TINY))
        if len(bad):
            row, block = bad[0]
            weight = largest[row, block]
            raise _Differs(f"tensor {where}: the scale of row {row}, block {block} is 0, its weights reach {weight:.3g}")


def _bounded(
    file: FileTensors, name: str, error: float, total: float, expert: int | None = None, unrounded: float = BOUNDS[ggml.F32]
) -> float:
    relative = math.sqrt(error / total) if total > 0 else math.sqrt(error)
    info = file.info(name)
    bound = unrounded if info.type_id == ggml.F32 else BOUNDS.get(info.type_id)
    where = _where(name, expert)
    if bound is None:
        raise _Differs(f"tensor {where} has the type {info.type_name}, which convert does not write")
    # NaN is above every bound
    if not relative <= bound:
        limit = f"at most {bound:g} is expected"
        raise _Differs(f"tensor {where} ({info.type_name}) is off by {relative:.3g} of its size, {limit}")
    return relative


def _where(name: str, expert: int | None) -> str:
    return name if expert is None else f"{name} (expert {expert})"


def _logits(
    checkpoint: Checkpoint, path: Path, provenance: Provenance, rotations: list[LayerRotations], progress: Progress
) -> str:
    """Original to rotated within single precision, rotated to the file by what its types account for."""
    spec = checkpoint.spec
    tokenizer = load_tokenizer(checkpoint.directory)
    ids = prose_tokens(tokenizer, min(TOKENS, spec.window or TOKENS, checkpoint.config.max_position_embeddings))[0].tolist()
    with progress.stage("compare logits", 2 * spec.layers + 1) as stage:
        original = _said(checkpoint, ids, None, stage)
        turned = _said(checkpoint, ids, rotations, stage)
        unquantized = provenance.weights == "f32"
        found = runtime_log_probabilities(path, [ids], exact_cache=unquantized)
        stage.advance(1, "the file in the runtime")
    folding, whole = mean_divergence(original, turned), mean_divergence(original, found)
    if not folding <= SAME:
        raise _Differs(f"the rotated weights say something else than the original ones: divergence {folding:.3g} nats")
    different = f"the file says something else than the original: divergence {whole:.3g} nats"
    if unquantized and not whole <= SAME:
        raise _Differs(f"{different}, at most {SAME:g} is expected")
    elsewhere = mean_divergence(original, np.roll(found, 1, axis=0))
    if not whole <= NEARER * elsewhere:
        raise _Differs(f"{different}, {elsewhere:.3g} from what it says at the next position")
    agree = float((original.argmax(-1) == found.argmax(-1)).mean())
    return (
        f"{len(ids)} tokens; divergence original to rotated {abs(folding):.1e}, to the file {whole:.3g} nats; "
        f"the likeliest token is the same for {agree:.0%}"
    )


def _said(
    checkpoint: Checkpoint, ids: list[int], rotations: list[LayerRotations] | None, stage: Stage
) -> npt.NDArray[np.float32]:
    """Log-probabilities ``[tokens, vocabulary]`` in torch, of the model as it is or folded (R4 left out on both sides)."""
    spec, device = checkpoint.spec, torch.device("cpu")
    r1 = None if rotations is None else rotations[0].r1  # all layers'
    runner = LayerRunner(checkpoint, device, len(ids))
    rotary = runner.rotary(0, len(ids))
    gain = checkpoint.tensor(f"{spec.family.final_norm}.weight").double()
    with torch.inference_mode():
        hidden = runner.embed(torch.tensor(ids))[None]
        if r1 is not None:
            hidden = (hidden.double() @ r1).float()
        for layer in range(spec.layers):
            weights = checkpoint.layer(layer)
            if rotations is not None:
                one = rotations[layer]
                folded = fold_layer(weights, spec, LayerRotations(one.r1, one.r2, 0, one.ffn_scale, one.key_scale))
                weights = {name: value.float() for name, value in folded.items()}
            hidden = runner.run(layer, weights, hidden, rotary)
            stage.advance(1, f"layer {layer}, {'original' if rotations is None else 'rotated'}")
        hidden = hidden[0] * torch.rsqrt(hidden[0].square().mean(-1, keepdim=True) + checkpoint.config.rms_norm_eps)
        logits = [
            hidden @ fold_reader(rows, gain, r1).float().T / spec.logit_divisor
            for _, rows in checkpoint.rows(checkpoint.head_name)
        ]
        return torch.log_softmax(torch.cat(logits, -1), -1).numpy()

