"""From MODEL to a GGUF: the order of the steps, and what of an earlier run can be taken over.

Every stage leaves its result in the work directory, complete or not at all, and is skipped where the
result is already there; the layers of the last stage count one by one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError

from kurtail_gguf.convert.settings import OWN_ROTATIONS, ConvertConfig, ConvertResult
from kurtail_gguf.convert.workdir import discard, locked, open_work_dir, remove_stage
from kurtail_gguf.files.atomic import file_sha256, replacing, write_atomically
from kurtail_gguf.files.destinations import check_out
from kurtail_gguf.machine.device import pick_device
from kurtail_gguf.machine.memory import (
    CardMemory,
    card_peak,
    current_card,
    memory_available,
    memory_held,
    memory_total,
    start_card_peak,
)  # fmt: skip
from kurtail_gguf.machine.resources import peak_memory
from kurtail_gguf.measure.figures import MEASURED_TOKENS, measure_figures
from kurtail_gguf.measure.outliers import check_matplotlib
from kurtail_gguf.messages.errors import CalibrationError, KurtailError, QuantizeError, SourceError
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.method.activations.choice import choose, measure_damage
from kurtail_gguf.method.cache.plan import CachePlan, plan_cache
from kurtail_gguf.method.calibration.generate import generate
from kurtail_gguf.method.calibration.prose import prose_contexts
from kurtail_gguf.method.calibration.texts import read_texts
from kurtail_gguf.method.calibration.tokens import CalibrationTokens, as_contexts, calibration_name, load_tokenizer, tokenize
from kurtail_gguf.method.fold.tables import is_tied, table_types
from kurtail_gguf.method.fold.transforms import Transforms
from kurtail_gguf.method.quantize.layerwise import CalibratedOn, fold_and_quantize
from kurtail_gguf.method.rotation.choice import choose_transforms
from kurtail_gguf.method.tuning.layer_files import memory_shortage, tune
from kurtail_gguf.method.tuning.scales import STEP_TOKENS
from kurtail_gguf.model.loading.checkpoint import Checkpoint, open_checkpoint
from kurtail_gguf.model.loading.source import resolve_source
from kurtail_gguf.model.names import online_tensors
from kurtail_gguf.model.sites import ATTENTION, FFN, FFN_OUTPUT
from kurtail_gguf.model.spec import ModelSpec
from kurtail_gguf.numerics.formats.targets import BLOCK_FORMATS, BlockFormat
from kurtail_gguf.numerics.hadamard import MAX_R4, hadamard_size
from kurtail_gguf.numerics.simulation.attention import CacheSettings
from kurtail_gguf.numerics.simulation.rounding import CACHE_BLOCK
from kurtail_gguf.numerics.simulation.runtime import RuntimeRounding
from kurtail_gguf.runtime.export import check_vocabulary, write_gguf
from kurtail_gguf.runtime.provenance import STOCK_ACTIVATION_BITS, TOOL, Provenance

#: What the file says R1 and R2 were learned by, by ``--rotation``; the others learn nothing.
OBJECTIVE = {"diagonal": "output-error", "output": "output-error", "kurtail": "kurtosis", "spinquant": "cross-entropy"}


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
    if config.keep_rotations is not None:
        check_out(config.keep_rotations, "--keep-rotations")
    if config.report is not None:
        check_out(config.report, "--report")
        check_matplotlib("--report")
    device = pick_device(config.device)
    texts = _text_hashes(config)
    work_dir = config.work_dir or config.out.with_name(config.out.name + ".work")
    disposable = config.work_dir is None and not work_dir.exists()
    with locked(work_dir):
        if config.restart:
            discard(work_dir, source=True)
        clock = _Clock(device)
        try:
            with current_card(device):
                result = _convert(config, texts, work_dir, device, clock, progress)
        except torch.cuda.OutOfMemoryError as error:
            raise _card_full(device, clock.running, work_dir) from error
        except (SourceError, CalibrationError, QuantizeError) as error:
            if isinstance(error.__cause__, OSError) and any((work_dir / "quantized").glob("layer-*")):
                raise _read_error(error, work_dir) from error
            # Bad input: nothing that was computed from it is worth keeping.
            if disposable:
                discard(work_dir, source=True)
            raise
        except (OSError, SafetensorError) as error:
            raise _disk_error(error, work_dir) from error
        if config.work_dir is None:
            discard(work_dir, source=True)
    return result


def _disk_error(error: OSError | SafetensorError, work_dir: Path) -> KurtailError:
    """A full disk, most often. What is finished is kept."""
    reason = getattr(error, "strerror", None) or str(error)
    name = getattr(error, "filename", None)
    return KurtailError(
        f"{reason}{f': {name}' if name else ''}: the work directory {work_dir} keeps what is finished; make room (or "
        "grant access) and type the same line again"
    )


def _read_error(error: KurtailError, work_dir: Path) -> KurtailError:
    """A disk or network that failed, which is not the input's fault. What is finished is kept."""
    return SourceError(
        f"{error}; the work directory {work_dir} keeps what is finished: once the file can be read as it was, type the "
        "same line again"
    )


def _card_full(device: torch.device, stage: str, work_dir: Path) -> KurtailError:
    """A card without enough memory. What is finished is kept."""
    total, held = memory_total(device), memory_held(device)
    others = total - held - memory_available(device)
    return KurtailError(
        f"{device} ran out of memory in the stage {stage!r}: of its {total / 1e9:.1f} GB this run held {held / 1e9:.1f}, others "
        f"{others / 1e9:.1f}: end what else computes there and type the same line again (the work directory {work_dir} keeps "
        "what is finished), or give --device cpu --restart; --plan tells what is needed"
    )


def _convert(
    config: ConvertConfig,
    texts: dict[str, str],
    work_dir: Path,
    device: torch.device,
    clock: _Clock,
    progress: Progress,
) -> ConvertResult:
    with clock.measure("source"):
        source = resolve_source(config.model, work_dir, progress)
        checkpoint = open_checkpoint(source, config.allow_pickle)
        checkpoint.check_filled()
        check_vocabulary(source)  # an unknown tokenizer is told now, not after an hour
    check_family(config, checkpoint)
    block_format, rounding = BLOCK_FORMATS[config.target], runtime_rounding(config, checkpoint)
    stored_as = None if config.weights == "f32" else block_format
    _check_memory(config, checkpoint, block_format, device)
    resumed = open_work_dir(work_dir, _settings(config, checkpoint, texts, device))
    steps = _tuning_steps(config, checkpoint, block_format, work_dir, device, progress)
    tokens = calibration = None
    if config.needs_calibration:
        with clock.measure("calibration"):
            tokens = _tokens(config, steps * STEP_TOKENS, checkpoint, work_dir, device, progress)
            calibration = tokens.first(config.calibration_tokens)
    measured_on = calibration
    if config.report is not None and measured_on is None:
        with clock.measure("text for the report"):
            few = replace(config, calibration_tokens=MEASURED_TOKENS)
            measured_on = _tokens(few, 0, checkpoint, work_dir, device, progress)
    with clock.measure("rotations"):
        transforms = choose_transforms(config, checkpoint, calibration, rounding, work_dir, device, progress)
    with clock.measure("cache"):
        text = _cache_text(config, checkpoint, calibration)
        plan = plan_cache(
            checkpoint, text, config.cache_bits, config.cache_budget, transforms.r2, rounding.cache, work_dir, device, progress
        )
        transforms = replace(transforms, key_scales=plan.scales, key_offsets=plan.offsets)
        rounding = replace(rounding, cache=replace(rounding.cache, layers=plan.layers()))
    calibrated_on = None
    if config.weights == "gptq":
        assert calibration is not None
        calibrated_on = CalibratedOn(calibration.ids, rounding)
    with clock.measure("quantize"):
        quantized = fold_and_quantize(
            checkpoint, transforms, stored_as, calibrated_on, work_dir / "quantized", device, progress
        )
    if config.activations == "auto":
        assert calibration is not None
        with clock.measure("measure damage"):
            damages = measure_damage(
                checkpoint, calibration.ids, quantized, block_format, rounding, work_dir / "damage.json", device, progress
            )
        chosen = choose(damages, _multiply_accumulates(checkpoint), config.activation_budget)
        rounding = replace(rounding, exceptions=dict.fromkeys(chosen, 8))
    if steps:
        assert tokens is not None
        with clock.measure("tune"):
            quantized = tune(
                checkpoint, tokens.ids, quantized, block_format, rounding, steps, work_dir / "tuned", device, progress
            )
    figures = None
    if config.report is not None:
        assert measured_on is not None
        with clock.measure("measure for the report"):
            figures = measure_figures(
                checkpoint, measured_on, transforms, rounding, stored_as, quantized, work_dir, config.seed, device, progress
            )
    provenance = _provenance(config, checkpoint, transforms, rounding, plan, tokens, steps)
    if config.keep_rotations is not None:
        transforms.save(config.keep_rotations)
    with clock.measure("export"):
        offsets = plan.offsets_in_file(checkpoint.spec)
        tables = table_types(checkpoint.spec, is_tied(checkpoint.spec, transforms.r1), rounded=config.weights != "f32")
        online = online_tensors(checkpoint.spec, rounding.online)
        write_gguf(source, quantized, config.out, provenance, progress, tables, online, rounding.exceptions, offsets)
    weights = sum(_multiply_accumulates(checkpoint).values())
    return ConvertResult(
        config.out, provenance, clock.seconds, checkpoint.spec.layers, weights, resumed, clock.peak_bytes, figures,
        str(device), clock.card_peak, plan.warning,
    )  # fmt: skip


def runtime_rounding(config: ConvertConfig, checkpoint: Checkpoint) -> RuntimeRounding:
    """What the runtime will round and rotate while it runs the file that ``config`` makes."""
    stock = config.target == "stock"
    block = BLOCK_FORMATS[config.target].block
    bits = STOCK_ACTIVATION_BITS if stock else config.activation_bits
    # 4 is what auto begins with
    kv = 4 if config.cache_bits == "auto" else int(config.cache_bits)
    r3, online = 0, {}
    # Stock llama.cpp transforms nothing online, but rotates K by itself where its cache is quantized.
    if config.rotation != "none" and not stock:
        r3, online = _r3(checkpoint.spec.head_dim, kv), _online(config.rotation, checkpoint.spec, block)
    # where R2 is not folded, upstream rotates V by itself; in our files it does not
    cache = CacheSettings(bits=kv, rotation=r3, rotate_v=False, paired=checkpoint.spec.family.rope_pairs)
    return RuntimeRounding(bits, block, online, cache)


def _r3(head_dim: int, kv: int) -> int:
    """Size of R3, 0 for none: upstream rotates only heads that are multiples of 64, and only for a quantized cache."""
    return head_dim if head_dim % 64 == 0 and head_dim & (head_dim - 1) == 0 and kv < 16 else 0


def _online(rotation: str, spec: ModelSpec, block: int) -> dict[str, int]:
    """Sizes of the Hadamard blocks that sites are multiplied by at run time, by their kinds."""
    # Spreading an outlier over more values than share a scale only carries it into more blocks: with one Hadamard a
    # block the divergence that rounding FFN outputs causes was a third lower than with 512 (docs/quality.md). The
    # papers' methods have R4 as they describe it, and nothing else. R2 does for attention's output what a transform would.
    limit = block if rotation in OWN_ROTATIONS else MAX_R4
    kinds = (ATTENTION, FFN, FFN_OUTPUT) if rotation == "diagonal" else (FFN_OUTPUT,)
    sizes = {site.kind: hadamard_size(site.size, limit) for site in spec.sites if site.kind in kinds}
    return {kind: size for kind, size in sizes.items() if size > 1}


class _Clock:
    """Seconds and memory of each stage; ``running`` is the one that began last."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.running = ""
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}
        self.card_peak: dict[str, CardMemory] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        self.running = name
        start_card_peak(self._device)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        self.peak_bytes[name] = peak_memory()
        if (peak := card_peak(self._device)) is not None:
            self.card_peak[name] = peak


def _text_hashes(config: ConvertConfig) -> dict[str, str]:
    """Hashes of the text files: missing ones are noticed at once, edited ones on a rerun."""
    if not config.needs_calibration:
        return {}
    return {name: file_sha256(Path(name), "calibration text", CalibrationError) for name in config.calibration_files}


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
        "kv": config.cache_bits,
        "kv_budget": config.cache_budget or None,
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
    tuning_tokens: int,
    checkpoint: Checkpoint,
    work_dir: Path,
    device: torch.device,
    progress: Progress,
) -> CalibrationTokens:
    """What is learned from: ``--calibration-tokens``, and more of the same for tuning, as far as there is more."""
    name = calibration_name(config.calibration)
    path = work_dir / "tokens.npy"
    if path.exists():
        return CalibrationTokens(np.load(path), name)
    tokenizer = load_tokenizer(checkpoint.directory)
    if config.calibration == ("self",):
        special = frozenset(tokenizer.all_special_ids)
        bos = tokenizer.bos_token_id
        wanted = max(config.calibration_tokens, tuning_tokens)
        ids = generate(
            checkpoint, wanted, bos, special, config.seed, device, progress
        )
    else:
        ids = tokenize(read_texts(config.calibration), tokenizer, config.calibration_tokens, tuning_tokens)
        if ids.max() >= checkpoint.spec.vocab_size:
            raise CalibrationError(
                f"{checkpoint.directory}: the tokenizer's id {ids.max()} is outside the model's "
                f"vocabulary of {checkpoint.spec.vocab_size}"
            )
    with replacing(path) as scratch, scratch.open("wb") as file:
        np.save(file, ids)
    return CalibrationTokens(ids, name)


def _cache_text(
    config: ConvertConfig, checkpoint: Checkpoint, calibration: CalibrationTokens | None
) -> npt.NDArray[np.int32]:
    """Tokens that the cache is decided on: calibration's, else prose; none, and no tokenizer, where nothing is decided."""
    if config.cache_bits == 16:
        return np.empty((0, 0), np.int32)
    tokenizer = load_tokenizer(checkpoint.directory)
    return prose_contexts(tokenizer) if calibration is None else as_contexts(calibration.ids, tokenizer)


def check_family(config: ConvertConfig, checkpoint: Checkpoint) -> None:
    """Refuse what was asked for and does not know the family's layers; by default it is left out."""
    spec = checkpoint.spec
    name = spec.family.architecture
    if config.cache_bits != 16 and spec.head_dim % CACHE_BLOCK:
        raise KurtailError(
            f"--kv {config.cache_bits} is not offered for {name} with head_dim {spec.head_dim}: 4- and 8-bit caches have blocks "
            f"of {CACHE_BLOCK} values, which must divide it; give --kv 16"
        )
    if spec.experts and config.activations == "auto":
        raise KurtailError(f"--activations auto is not offered for {name}, a mixture of experts: give 4 or 8")
    if spec.experts and config.tune:
        raise KurtailError(f"--tune {config.tune} is not offered for {name}, a mixture of experts: give --tune 0")
    scaled = (spec.embedding_scale, spec.residual_scale, spec.logit_divisor) != (1, 1, 1)
    if config.rotation == "spinquant" and (spec.experts or scaled or spec.family.fused_attention):
        raise KurtailError(f"--rotation spinquant is not offered for {name}: use output, kurtail or hadamard")


def _check_memory(
    config: ConvertConfig, checkpoint: Checkpoint, block_format: BlockFormat, device: torch.device
) -> None:
    """Refuse what was asked for and does not fit once the model is quantized, before the hours that takes."""
    shortage = memory_shortage(checkpoint, block_format.block, device)
    if shortage and config.activations == "auto":
        raise KurtailError(f"--activations auto {shortage}: give --activations 4 or 8, or use a larger machine")
    if shortage and config.tune:
        raise KurtailError(f"--tune {config.tune} {shortage}: give --tune 0 or use a larger machine")


def _multiply_accumulates(checkpoint: Checkpoint) -> dict[str, int]:
    """Of every block linear for a token, by its weight's full name."""
    spec = checkpoint.spec
    shapes = spec.linear_shapes()
    return {
        f"{spec.layer_prefix(layer)}{name}.weight": math.prod(shape)
        for layer in range(spec.layers)
        for name, shape in shapes.items()
    }


def _tuning_steps(
    config: ConvertConfig,
    checkpoint: Checkpoint,
    block_format: BlockFormat,
    work_dir: Path,
    device: torch.device,
    progress: Progress,
) -> int:
    """Steps of tuning; 0 for experts, and where nobody asked for it by name and the model is too large for it.

    Free memory decides once: a run that goes on does what it began. What is asked for by name is done.
    """
    path = work_dir / "tuning-steps.json"
    decided = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    possible = 0 if checkpoint.spec.experts else config.tuning_steps
    steps = possible if decided is None or config.tune is not None else decided
    shortage = memory_shortage(checkpoint, block_format.block, device) if steps and config.tune is None else None
    if shortage is not None and decided:
        raise KurtailError(
            f"this run began with tuning of scales, which now {shortage}: free memory and type the same line again, or "
            "give --restart"
        )
    if shortage is not None:
        with progress.stage(f"tuning of scales left out: it {shortage}", 1) as stage:
            stage.advance()
        steps = 0
    if decided is not None and steps != decided:
        # the report was of layers that were not tuned, and of the text no more was read than without tuning
        for stage in ("figures", "tokens.npy"):
            remove_stage(work_dir / stage)
    if steps != decided:
        write_atomically(path, json.dumps(steps))
    return steps


def _provenance(
    config: ConvertConfig,
    checkpoint: Checkpoint,
    transforms: Transforms,
    rounding: RuntimeRounding,
    plan: CachePlan,
    tokens: CalibrationTokens | None,
    tune_steps: int,
) -> Provenance:
    spec, cost = checkpoint.spec, plan.cost
    return Provenance(
        target=config.target,
        rotation=config.rotation,
        objective=OBJECTIVE.get(config.rotation, "none"),
        weights=config.weights,
        tune_steps=tune_steps,
        seed=config.seed,
        r1_kind=transforms.r1_kind,
        r1_size=0 if transforms.r1 is None else spec.hidden_size,
        r2_kind=transforms.r2_kind,
        r2_size=0 if transforms.r2 is None else spec.head_dim,
        r3_kind="hadamard" if rounding.cache.rotation else "none",
        r3_size=rounding.cache.rotation,
        r4_kind="hadamard" if rounding.online_of(FFN_OUTPUT) else "none",
        r4_size=rounding.online_of(FFN_OUTPUT),
        diagonal=",".join(sorted(transforms.scales)) or "none",
        rotations_sha256=transforms.sha256(),
        activation_bits=rounding.activation_bits,
        activation_choice="auto" if config.activations == "auto" else "fixed",
        activation_budget=float(np.float32(config.activation_budget)),
        kv_bits=min(plan.bits.k + plan.bits.v),
        kv_choice="auto" if config.cache_bits == "auto" else "fixed",
        kv_budget=float(np.float32(config.cache_budget)),
        kv_k_bits=plan.bits.k,
        kv_v_bits=plan.bits.v,
        kv_divergence=None if cost is None else float(np.float32(cost.divergence)),
        kv_perplexity=None if cost is None else float(np.float32(cost.perplexity)),
        kv_measured_tokens=None if cost is None else cost.tokens,
        calibration_name="" if tokens is None else tokens.name,
        calibration_tokens=0 if tokens is None else int(tokens.ids.size),
        calibration_sha256="" if tokens is None else tokens.sha256,
    )

