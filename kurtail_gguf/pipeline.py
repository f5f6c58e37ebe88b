"""From MODEL to a GGUF: the order of the steps, and what of an earlier run can be taken over.

Every stage leaves its result in the work directory, complete or not at all, and is skipped where the
result is already there; the layers of the last stage count one by one.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from kurtail_gguf.activation_choice import choose, measure_damage
from kurtail_gguf.calibration.capture import Capture, capture
from kurtail_gguf.calibration.generate import generate
from kurtail_gguf.calibration.texts import read_texts
from kurtail_gguf.calibration.tokens import (
    CalibrationTokens,
    calibration_name,
    load_tokenizer,
    tokenize,
)
from kurtail_gguf.config import (
    STOCK_ACTIVATION_BITS,
    STOCK_KV_BITS,
    TOOL,
    ConvertConfig,
    ConvertResult,
    Provenance,
)
from kurtail_gguf.errors import CalibrationError, KurtailError, QuantizeError, SourceError
from kurtail_gguf.export import check_vocabulary, write_gguf
from kurtail_gguf.files import file_sha256
from kurtail_gguf.fold.layer import balance_channels
from kurtail_gguf.formats.hadamard import MAX_R4, r4_size
from kurtail_gguf.layerwise import CalibratedOn, fold_and_quantize
from kurtail_gguf.formats.targets import BLOCK_FORMATS, BlockFormat
from kurtail_gguf.loading.checkpoint import Checkpoint, open_checkpoint
from kurtail_gguf.loading.source import resolve_source
from kurtail_gguf.progress import Progress
from kurtail_gguf.rotation.hadamard import random_rotation
from kurtail_gguf.rotation.learn import learn_r1, learn_r1_by_output_error, learn_r2
from kurtail_gguf.rotation.objectives import OBJECTIVES
from kurtail_gguf.rotation.spinquant import learn_spinquant
from kurtail_gguf.rotation.store import Rotations, load_rotations, save_rotations
from kurtail_gguf.simulation.attention import CacheSettings
from kurtail_gguf.simulation.rounding import ACTIVATION_BLOCK
from kurtail_gguf.simulation.runtime import RuntimeRounding
from kurtail_gguf.tuning import memory_shortage, tune
from kurtail_gguf.workdir import filling, open_work_dir

#: Tokens that rotations are learned from, at most: a few thousand of them are kept at each site.
CAPTURED_TOKENS = 8192

#: What the file says R1 and R2 were learned by, by ``--rotation``; the others learn nothing.
OBJECTIVE = {"output": "output-error", "kurtail": "kurtosis", "spinquant": "cross-entropy"}
#: Which side of it counts: R1 must leave flat tokens flat, values have none (rotation/objectives.py).
R1_OBJECTIVE, R2_OBJECTIVE = "kurtosis", "absolute-kurtosis"


def convert(config: ConvertConfig, progress: Progress) -> ConvertResult:
    """Convert a model to a 4-bit GGUF with rotations.

    Args:
        config: what to do.
        progress: told about every stage.

    Returns:
        The file written, its provenance, and seconds by stage.

    Raises:
        KurtailError: anything that is wrong with model, text, options or OUT. OUT is then untouched.
    """
    check_out(config.out)
    device = pick_device(config.device)
    texts = _text_hashes(config)
    work_dir = config.work_dir or config.out.with_name(config.out.name + ".work")
    disposable = config.work_dir is None and not work_dir.exists()
    try:
        result = _convert(config, texts, work_dir, device, progress)
    except (SourceError, CalibrationError, QuantizeError):
        # Bad input: nothing that was computed from it is worth keeping.
        if disposable:
            shutil.rmtree(work_dir, ignore_errors=True)
        raise
    if config.work_dir is None:
        shutil.rmtree(work_dir)
    return result


def _convert(
    config: ConvertConfig,
    texts: dict[str, str],
    work_dir: Path,
    device: torch.device,
    progress: Progress,
) -> ConvertResult:
    clock = _Clock()
    with clock.measure("source"):
        source = resolve_source(config.model, work_dir, progress)
        checkpoint = open_checkpoint(source)
        check_vocabulary(source)  # an unknown tokenizer is told now, not after an hour
    plan = _Plan.of(config, checkpoint)
    if config.activations == "auto":
        _check_damage_fits(checkpoint, plan, device)
    open_work_dir(work_dir, _settings(config, checkpoint, texts, device))
    tokens = None
    if config.needs_calibration:
        with clock.measure("calibration"):
            tokens = _tokens(config, checkpoint, work_dir, device, progress)
    with clock.measure("rotations"):
        rotations = _rotations(config, checkpoint, tokens, work_dir, device, progress)
    with clock.measure("quantize"):
        quantized = fold_and_quantize(
            checkpoint, rotations, plan.r4, plan.format, _calibrated_on(config, plan, checkpoint, tokens),
            work_dir / "quantized", device, progress,
        )  # fmt: skip
    rounding = _rounding(config, plan, checkpoint)
    if config.activations == "auto":
        assert tokens is not None
        with clock.measure("measure damage"):
            damages = measure_damage(
                checkpoint, tokens.ids, quantized, plan.format, rounding, work_dir / "damage.json", device, progress
            )
        chosen = choose(damages, _multiply_accumulates(checkpoint), config.activation_budget)
        rounding = replace(rounding, exceptions=dict.fromkeys(chosen, 8))
    steps = _tuning_steps(config, checkpoint, plan, device, progress)
    if steps:
        assert tokens is not None
        with clock.measure("tune"):
            quantized = tune(
                checkpoint, tokens.ids, quantized, plan.format, rounding, steps, work_dir / "tuned", device, progress
            )
    provenance = _provenance(config, checkpoint, rotations, plan, tokens, steps)
    with clock.measure("export"):
        write_gguf(source, quantized, config.out, provenance, progress, rounding.exceptions)
    return ConvertResult(config.out, provenance, clock.seconds)


def check_out(out: Path) -> None:
    """Refuse an OUT that cannot be written, before any work.

    Raises:
        KurtailError: OUT is a directory, or its parent is missing or not writable.
    """
    if out.is_dir():
        raise KurtailError(f"OUT {out} is a directory: give the name of a file")
    parent = out.absolute().parent
    if not parent.is_dir():
        raise KurtailError(f"OUT {out} cannot be written: {parent} is not a directory; create it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise KurtailError(f"OUT {out} cannot be written: no permission to write in {parent}")


def pick_device(device: str) -> torch.device:
    """``auto`` is CUDA where there is one.

    Raises:
        KurtailError: CUDA was asked for and torch sees none.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise KurtailError("--device cuda: torch sees no CUDA device; use --device cpu")
    return torch.device("cuda" if available and device != "cpu" else "cpu")


@dataclass(frozen=True, slots=True)
class _Plan:
    """The online rotations' sizes, 0 for none, and what the block linears are stored as."""

    r3: int
    r4: int
    format: BlockFormat

    @classmethod
    def of(cls, config: ConvertConfig, checkpoint: Checkpoint) -> _Plan:
        block_format = BLOCK_FORMATS[config.target]
        # Stock llama.cpp has no R4, and rotates K by itself where its cache is quantized.
        if config.rotation == "none" or config.target == "stock":
            return cls(0, 0, block_format)
        head_dim = checkpoint.spec.head_dim
        # Upstream rotates only heads that are multiples of 64, and only for a quantized cache.
        r3 = head_dim if head_dim % 64 == 0 and head_dim & (head_dim - 1) == 0 and config.kv < 16 else 0
        # Spreading an outlier over more values than share a scale only carries it into more blocks: with one Hadamard a
        # block the divergence that rounding this input causes was a third lower than with 512 (docs/quality.md). The
        # other methods have R4 as their papers do.
        limit = block_format.block if config.rotation == "output" else MAX_R4
        r4 = r4_size(checkpoint.spec.intermediate_size, limit)
        return cls(r3, r4 if r4 > 1 else 0, block_format)


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def _text_hashes(config: ConvertConfig) -> dict[str, str]:
    """Hashes of the text files: missing ones are noticed at once, edited ones on a rerun."""
    if not config.needs_calibration:
        return {}
    files = (name for name in config.calibration if name != "self" and not name.startswith("hf:"))
    return {name: file_sha256(Path(name), "calibration text", CalibrationError) for name in files}


def _settings(
    config: ConvertConfig, checkpoint: Checkpoint, texts: dict[str, str], device: torch.device
) -> dict[str, object]:
    """What the stages depend on."""
    return {
        "tool": TOOL,
        "checkpoint": checkpoint.fingerprint(),
        "target": config.target,
        "rotation": config.rotation,
        "weights": config.weights,
        "tune": config.tuning_steps,
        "kv": config.kv,
        "activations": config.activations,
        "budget": config.activation_budget or None,
        "calibration": list(config.calibration),
        "calibration_texts": texts,
        "calibration_tokens": config.calibration_tokens,
        "seed": config.seed,
        "device": device.type,
    }


def _tokens(
    config: ConvertConfig,
    checkpoint: Checkpoint,
    work_dir: Path,
    device: torch.device,
    progress: Progress,
) -> CalibrationTokens:
    name = calibration_name(config.calibration)
    path = work_dir / "tokens.npy"
    if path.exists():
        return CalibrationTokens(np.load(path), name)
    tokenizer = load_tokenizer(checkpoint.directory)
    if config.calibration == ("self",):
        special = frozenset(tokenizer.all_special_ids)
        bos = tokenizer.bos_token_id
        ids = generate(
            checkpoint, config.calibration_tokens, bos, special, config.seed, device, progress
        )
    else:
        ids = tokenize(read_texts(config.calibration), tokenizer, config.calibration_tokens)
        if ids.max() >= checkpoint.spec.vocab_size:
            raise CalibrationError(
                f"{checkpoint.directory}: the tokenizer's id {ids.max()} is outside the model's "
                f"vocabulary of {checkpoint.spec.vocab_size}"
            )
    scratch = path.with_suffix(".tmp.npy")
    np.save(scratch, ids)
    os.replace(scratch, path)
    return CalibrationTokens(ids, name)


def _rotations(
    config: ConvertConfig,
    checkpoint: Checkpoint,
    tokens: CalibrationTokens | None,
    work_dir: Path,
    device: torch.device,
    progress: Progress,
) -> Rotations:
    if config.rotation == "none":
        return Rotations()
    path = work_dir / "rotations.safetensors"
    if path.exists():
        return load_rotations(path)
    if config.rotation == "hadamard":
        rotations = random_rotations(checkpoint, config.seed)
    elif config.rotation == "spinquant":
        rotations = _spinquant(config, checkpoint, tokens, device, progress)
    else:
        samples = _capture(checkpoint, tokens, work_dir / "capture", config.seed, device, progress)
        rotations = _learn(config, checkpoint, samples, device, progress)
    save_rotations(rotations, path)
    return rotations


def _learn(
    config: ConvertConfig, checkpoint: Checkpoint, samples: Capture, device: torch.device, progress: Progress
) -> Rotations:
    """R1 and R2 from captured activations, layer by layer."""
    values = [samples.values(layer) for layer in range(samples.layers)]
    scales = None
    if config.rotation == "output":
        r1 = learn_r1_by_output_error(samples.sites(), samples.all_readers(), config.seed, device, progress)
        down = f"{checkpoint.spec.family.ffn_writer}.weight"
        scales = np.stack([
            balance_channels(
                torch.from_numpy(samples.channels(layer)),
                checkpoint.tensor(checkpoint.spec.layer_prefix(layer) + down),
            ).numpy()
            for layer in range(samples.layers)
        ])  # fmt: skip
    else:
        r1 = learn_r1(samples.sites(), OBJECTIVES[R1_OBJECTIVE], config.seed, device, progress)
    r2 = learn_r2(values, OBJECTIVES[R2_OBJECTIVE], config.seed, device, progress)
    return Rotations("learned", "learned", r1, r2, scales)


def _spinquant(
    config: ConvertConfig,
    checkpoint: Checkpoint,
    tokens: CalibrationTokens,
    device: torch.device,
    progress: Progress,
) -> Rotations:
    """From the rotations of ``--rotation hadamard``, so that the two differ by the learning alone."""
    plan, start = _Plan.of(config, checkpoint), random_rotations(checkpoint, config.seed)
    # for --target stock too, whose own blocks are of 32: what that changes has not been measured
    rounding = replace(_rounding(config, plan, checkpoint), activation_block=ACTIVATION_BLOCK)
    r1, r2 = learn_spinquant(
        checkpoint, tokens.ids, (start.r1, start.r2), rounding, config.seed, device, progress
    )
    return Rotations("learned", "learned", r1, r2)


def random_rotations(checkpoint: Checkpoint, seed: int) -> Rotations:
    """R1 and R2 at random, as ``--rotation hadamard`` folds them: no calibration is needed."""
    spec = checkpoint.spec
    rng = np.random.default_rng((seed, 0))
    r1_kind, r1 = random_rotation(spec.hidden_size, rng)
    heads = [random_rotation(spec.head_dim, rng) for _ in range(spec.layers * spec.kv_heads)]
    shape = (spec.layers, spec.kv_heads, spec.head_dim, spec.head_dim)
    r2 = np.stack([matrix for _, matrix in heads]).reshape(shape)
    return Rotations(r1_kind, heads[0][0], r1, r2)


def _capture(
    checkpoint: Checkpoint,
    tokens: CalibrationTokens,
    target: Path,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> Capture:
    if not target.exists():
        with filling(target) as directory:
            sequences = -(-CAPTURED_TOKENS // tokens.ids.shape[1])
            capture(checkpoint, tokens.ids[:sequences], directory, seed, device, progress)
    return Capture(target, checkpoint.spec.layers)


def _rounding(config: ConvertConfig, plan: _Plan, checkpoint: Checkpoint) -> RuntimeRounding:
    """What the runtime will round while it runs the file."""
    stock = config.target == "stock"
    cache = CacheSettings(
        bits=STOCK_KV_BITS if stock else config.kv,
        rotation=plan.r3,
        # where R2 is not folded, upstream rotates V by itself; in our files it does not
        rotate_v=False,
        paired=checkpoint.spec.family.rope_pairs,
    )
    bits = STOCK_ACTIVATION_BITS if stock else config.activation_bits
    return RuntimeRounding(bits, plan.format.block, plan.r4, cache)


def _calibrated_on(
    config: ConvertConfig, plan: _Plan, checkpoint: Checkpoint, tokens: CalibrationTokens | None
) -> CalibratedOn | None:
    if config.weights != "gptq":
        return None
    assert tokens is not None
    return CalibratedOn(tokens.ids, _rounding(config, plan, checkpoint))


def _check_damage_fits(checkpoint: Checkpoint, plan: _Plan, device: torch.device) -> None:
    """Refuse to measure damage where the quantized model does not fit, before hours of quantizing it."""
    if shortage := memory_shortage(checkpoint, plan.format.block, device):
        raise KurtailError(f"--activations auto {shortage}: give --activations 4 or 8, or use a larger machine")


def _multiply_accumulates(checkpoint: Checkpoint) -> dict[str, int]:
    """Of every block linear for a token, by its weight's full name."""
    spec = checkpoint.spec
    return {
        f"{spec.layer_prefix(layer)}{name}.weight": math.prod(spec.linear_shape(name))
        for layer in range(spec.layers)
        for name in spec.family.linears
    }


def _tuning_steps(
    config: ConvertConfig, checkpoint: Checkpoint, plan: _Plan, device: torch.device, progress: Progress
) -> int:
    """Steps of tuning; 0 where it was not asked for by name and the model is too large for it."""
    steps = config.tuning_steps
    shortage = memory_shortage(checkpoint, plan.format.block, device) if steps else None
    if shortage is None:
        return steps
    if config.tune is not None:
        raise KurtailError(f"--tune {steps} {shortage}: give --tune 0 or use a larger machine")
    with progress.stage(f"tuning of scales left out: it {shortage}", 1) as stage:
        stage.advance()
    return 0


def _provenance(
    config: ConvertConfig,
    checkpoint: Checkpoint,
    rotations: Rotations,
    plan: _Plan,
    tokens: CalibrationTokens | None,
    tune_steps: int,
) -> Provenance:
    spec = checkpoint.spec
    stock = config.target == "stock"
    return Provenance(
        target=config.target,
        rotation=config.rotation,
        objective=OBJECTIVE.get(config.rotation, "none"),
        weights=config.weights,
        tune_steps=tune_steps,
        seed=config.seed,
        r1_kind=rotations.r1_kind,
        r1_size=0 if rotations.r1 is None else spec.hidden_size,
        r2_kind=rotations.r2_kind,
        r2_size=0 if rotations.r2 is None else spec.head_dim,
        r3_kind="hadamard" if plan.r3 else "none",
        r3_size=plan.r3,
        r4_kind="hadamard" if plan.r4 else "none",
        r4_size=plan.r4,
        activation_bits=STOCK_ACTIVATION_BITS if stock else config.activation_bits,
        activation_choice="auto" if config.activations == "auto" else "fixed",
        activation_budget=float(np.float32(config.activation_budget)),
        kv_bits=STOCK_KV_BITS if stock else config.kv,
        calibration_name="" if tokens is None else tokens.name,
        calibration_tokens=0 if tokens is None else int(tokens.ids.size),
        calibration_sha256="" if tokens is None else tokens.sha256,
    )

