"""What a conversion will take, told from config.json and the shards' headers alone: no weight is read.

Memory is the sum of the arrays that are alive together at each stage's fullest moment, disk the sum of what the stages
leave until the end. Seconds are operations over this machine's speed in two short products: an order of magnitude.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from kurtail_gguf.convert.pipeline import check_family, runtime_rounding
from kurtail_gguf.convert.plan_memory import Sizes, cache_text, has_r1, learns, memory_by_stage, rotation_bytes
from kurtail_gguf.convert.settings import ConvertConfig
from kurtail_gguf.files.destinations import check_out
from kurtail_gguf.machine.device import pick_device
from kurtail_gguf.machine.memory import card_module, is_card, memory_available
from kurtail_gguf.messages.errors import KurtailError, SourceError
from kurtail_gguf.method.cache.streams import LOGIT_TOKENS
from kurtail_gguf.method.calibration.capture import MAX_SAMPLE, SKETCH_ROWS
from kurtail_gguf.method.calibration.generate import BATCH as GENERATED_TOGETHER
from kurtail_gguf.method.calibration.generate import GENERATED_LENGTH
from kurtail_gguf.method.calibration.tokens import SEQ_LEN
from kurtail_gguf.method.rotation.choice import CAPTURED_TOKENS
from kurtail_gguf.method.rotation.learn import OUTPUT_STEPS, R1_STEPS
from kurtail_gguf.method.rotation.spinquant import BATCH, SEQUENCE, STEPS, check_memory
from kurtail_gguf.method.tuning.layer_files import memory_shortage
from kurtail_gguf.method.tuning.scales import STEP_TOKENS
from kurtail_gguf.model.loading.checkpoint import Checkpoint, open_checkpoint

#: Products of all rows with the Hessian: one of the weights, two of what the sweeps begin with, and half of one, as one
#: triangle is enough, in the first pass, three refits and two sweeps.
_GPTQ_PRODUCTS = 6
#: Seconds a column takes whatever its length: a few dozen calls of torch in each of three passes.
_COLUMN_SECONDS = 5e-4
#: Tokens that the KV cache's size is told for.
_CONTEXT = 8192


@dataclass(frozen=True, slots=True)
class CacheSize:
    """What the file's KV cache will take.

    Args:
        choice: ``auto``, or bits that hold for all layers.
        bits: of a value with its share of a scale; with ``auto`` the most that is spent where 4 bits harm no layer.
        token_bytes: of a token, keys and values of all layers, with so many bits.
        context: tokens that the next two are for: 8192, or all that the model has.
        context_bytes: of so many tokens.
        f16_bytes: the same in half precision.
    """

    choice: str
    bits: float
    token_bytes: float
    context: int
    context_bytes: float
    f16_bytes: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, config: ConvertConfig) -> CacheSize:
        spec, kv = checkpoint.spec, config.cache_bits
        bits = config.cache_budget if kv == "auto" else kv if kv == 16 else kv + 0.5
        values = 2 * spec.layers * spec.kv_heads * spec.head_dim
        context = min(_CONTEXT, checkpoint.config.max_position_embeddings)
        token = values * bits / 8
        return cls(str(kv), bits, token, context, context * token, 2 * context * values)


@dataclass(frozen=True, slots=True)
class Plan:
    """What ``convert --plan`` prints. Bytes and seconds by stage; ``refused`` is why it would not start or not end.

    ``memory`` is the host's; ``card`` is what lies on ``device``, nothing where that is the CPU. ``room`` is what each disk
    must have and has free, by "beside OUT" and, where that is another one, "in the work directory".
    """

    model: str
    architecture: str
    layers: int
    parameters: int
    memory: dict[str, int]
    memory_available: int
    disk: dict[str, int]
    room: dict[str, tuple[int, int]]
    seconds: dict[str, float]
    rotations: dict[str, str]
    notes: tuple[str, ...]
    refused: tuple[str, ...]
    cache: CacheSize
    device: str = "cpu"
    card: dict[str, int] = field(default_factory=dict)
    card_available: int = 0

    @property
    def peak_bytes(self) -> int:
        return max(self.memory.values())

    @property
    def card_peak_bytes(self) -> int:
        """0 on the CPU."""
        return max(self.card.values(), default=0)

    def to_json(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        peaks = {"peak_bytes": self.peak_bytes, "card_peak_bytes": self.card_peak_bytes}
        return asdict(self) | peaks | {"disk_bytes": sum(self.disk.values())}


def plan(config: ConvertConfig) -> Plan:
    """The plan of a conversion.

    Raises:
        KurtailError: MODEL is no HF directory, or one that cannot be converted; the message says why.
    """
    check_out(config.out)
    directory = Path(config.model)
    if not directory.is_dir():
        raise SourceError(
            f"--plan reads an HF directory's config.json and headers, and {config.model} is none: a GGUF file or known "
            "model is only laid out like one by converting it"
        )
    checkpoint = open_checkpoint(directory, config.allow_pickle)
    device = pick_device(config.device)
    sizes = Sizes.of(checkpoint, config)
    notes, refused = [], []
    _tell(refused, lambda: check_family(config, checkpoint))
    steps = 0 if checkpoint.spec.experts else config.tuning_steps
    shortage = memory_shortage(checkpoint, sizes.block, device) if steps else None
    tuned = steps if shortage is None else 0
    if shortage is not None:
        (refused if config.tune else notes).append(f"tuning of scales {shortage}: {'give --tune 0' if config.tune else 'left out'}")
    if config.activations == "auto" and (short := memory_shortage(checkpoint, sizes.block, device)):
        refused.append(f"--activations auto {short}: give 4 or 8")
    if config.rotation == "spinquant":
        _tell(refused, lambda: check_memory(checkpoint, BATCH * SEQUENCE, device))
    memory, card = memory_by_stage(checkpoint, config, sizes, tuned, device)
    disk = _disk(checkpoint, config, sizes, tuned)
    window = checkpoint.spec.window
    length = GENERATED_LENGTH if config.calibration == ("self",) else SEQ_LEN
    if config.needs_calibration and window and window < length:
        refused.append(f"sliding_window {window} is below the calibration length {length}")
    room = _room(config, disk)
    refused += [
        f"{needed / 1e9:.1f} GB of disk are needed, {free / 1e9:.1f} GB are free {where}"
        for where, (needed, free) in room.items() if needed > free
    ]  # fmt: skip
    available = memory_available(torch.device("cpu"))
    if max(memory.values()) > available:
        refused.append(f"{max(memory.values()) / 1e9:.1f} GB of memory are needed, {available / 1e9:.1f} GB are free")
    on_card = memory_available(device) if card else 0
    if card and max(card.values()) > on_card:
        refused.append(f"{max(card.values()) / 1e9:.1f} GB of {device}'s memory are needed, {on_card / 1e9:.1f} GB are free there")
    if card:
        notes.append(f"{device} also holds what the driver and cuBLAS take, some hundred MB; figures are of no run on a card yet")
    spec = checkpoint.spec
    return Plan(
        config.model, spec.family.architecture, spec.layers, sizes.parameters, memory, available, disk, room,
        _seconds(checkpoint, config, sizes, tuned, device), _rotations(checkpoint, config), tuple(notes), tuple(refused),
        CacheSize.of(checkpoint, config), str(device), card, on_card,
    )  # fmt: skip


def _tell(refused: list[str], check: Callable[[], None]) -> None:
    try:
        check()
    except KurtailError as error:
        refused.append(str(error))


def _device(path: Path) -> int:
    return path.stat().st_dev


def _room(config: ConvertConfig, disk: dict[str, int]) -> dict[str, tuple[int, int]]:
    beside = config.out.absolute().parent
    work = config.work_dir.absolute() if config.work_dir else beside
    work = next(path for path in (work, *work.parents) if path.exists())  # convert makes it
    needed = sum(disk.values())
    if _device(work) == _device(beside):
        return {"beside OUT": (needed, shutil.disk_usage(beside).free)}
    return {
        "beside OUT": (disk["OUT"], shutil.disk_usage(beside).free),
        "in the work directory": (needed - disk["OUT"], shutil.disk_usage(work).free),
    }


def _disk(checkpoint: Checkpoint, config: ConvertConfig, sizes: Sizes, tuned: int) -> dict[str, int]:
    spec = checkpoint.spec
    hidden, layers = spec.hidden_size, spec.layers
    unrounded = config.weights == "f32"
    linears = 4 * sizes.linears if unrounded else sizes.linears * sizes.block_bytes // sizes.block
    quantized = layers * (linears + 4 * (sizes.layer - sizes.linears))
    tables = 8 if unrounded else 18 / 32 + (210 / 256 if hidden % 256 == 0 else 34 / 32)
    found = {"OUT": quantized + int(sizes.table * tables), "folded tables": 8 * sizes.table, "quantized layers": quantized}
    if config.rotation != "none":
        found["rotations"] = sum(rotation_bytes(spec, config, layers))
    if learns(config):
        shapes = spec.linear_shapes()
        readers = sum(min(SKETCH_ROWS, shapes[name][0]) for site in spec.sites if site.norm for name in site.readers)
        a_layer = 4 * MAX_SAMPLE * (hidden + spec.kv_heads * spec.head_dim) + 4 * readers * hidden
        a_layer += 8 * sum(site.size for site in spec.sites if site.norm or site.source)
        found["captured activations"] = layers * a_layer + 4 * CAPTURED_TOKENS * hidden
    if config.cache_bits != 16:
        sequences, length = cache_text(spec, config)
        found["inputs of layers, while the cache is measured"] = 4 * layers * sequences * length * hidden
    if config.weights == "gptq":
        width = 2 * hidden + spec.heads * spec.head_dim + spec.intermediate_size
        found["tokens between layers"] = 4 * config.calibration_tokens * width
    if tuned:
        found["tuned layers"] = quantized + 12 * layers * sizes.linears // sizes.block
        found["the unquantized model's answers"] = 4 * max(config.calibration_tokens, tuned * STEP_TOKENS) * hidden
    return found


def _seconds(
    checkpoint: Checkpoint, config: ConvertConfig, sizes: Sizes, tuned: int, device: torch.device
) -> dict[str, float]:
    spec = checkpoint.spec
    single, double = _speed(torch.float32, device), _speed(torch.float64, device)
    tokens, hidden, every = config.calibration_tokens, spec.hidden_size, spec.layers * sizes.linears
    found = {}
    if config.needs_calibration and config.calibration == ("self",):
        wanted = max(tokens, tuned * STEP_TOKENS)
        passes = -(-wanted // (GENERATED_TOGETHER * GENERATED_LENGTH)) * GENERATED_LENGTH
        # a layer's weights are converted anew at every token: memory's pace, about 2 GB a second
        found["generate text"] = passes * spec.layers * sizes.layer * 6 / 2e9 + 2 * wanted * sizes.parameters / single
    if learns(config):
        steps = {"output": OUTPUT_STEPS, "kurtail": R1_STEPS}.get(config.rotation, 0)
        found["rotations"] = 2 * CAPTURED_TOKENS * every / single + steps * 24 * hidden**3 / single
    if config.rotation == "spinquant":
        found["rotations"] = 8 * STEPS * BATCH * SEQUENCE * sizes.parameters / single
    if config.cache_bits != 16:
        text = math.prod(cache_text(spec, config))
        # two models on two texts, and forward and back through one of them; a head for each, and back once
        passes, heads = (4, 4) if config.cache_bits == 8 else (6, 7)
        found["decide on the cache"] = 2 * text * (passes * every + heads * sizes.table) / single
        # the head is read and made single precision for so many tokens at a time
        found["decide on the cache"] += -(-text // LOGIT_TOKENS) * heads * sizes.table * 6 / 2e9
    fold = 0.0 if config.rotation == "none" else 2 * hidden * (every + 2 * sizes.table) / double
    if config.weights == "gptq":
        each = sum(
            2 * rows * inputs**2 * _GPTQ_PRODUCTS / single + 4 / 3 * inputs**3 / double
            + 2 * tokens * inputs**2 / single + inputs * _COLUMN_SECONDS
            for rows, inputs in sizes.stops
        )  # fmt: skip
        found["fold and quantize"] = fold + spec.layers * each + 2 * tokens * every / single
    else:
        found["fold and quantize"] = fold + every * 2e-7
    if tuned:
        # forward twice, backward, and the unquantized model once
        found["tune scales"] = (8 * tuned + 2 * tuned) * STEP_TOKENS * sizes.parameters / single * 2
    found["export"] = 2e-8 * (every + 2 * sizes.table)
    return found


def _speed(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second in a product of two matrices, undisturbed by other programs."""
    size = 4096 if is_card(device) else 768
    a = torch.ones(size, size, dtype=dtype, device=device)
    best = math.inf
    for _ in range(20):
        start = time.perf_counter()
        a @ a
        if is_card(device):
            card_module(device).synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _rotations(checkpoint: Checkpoint, config: ConvertConfig) -> dict[str, str]:
    """Size and place of each rotation, by name."""
    spec, rounding = checkpoint.spec, runtime_rounding(config, checkpoint)
    rotated, r1, r3 = config.rotation != "none", has_r1(config), rounding.cache.rotation
    online = {size: [kind for kind, own in rounding.online.items() if own == size] for size in rounding.online.values()}
    return {
        "R1": f"{spec.hidden_size}, folded into embedding, head and every linear of the residual stream" if r1 else "none",
        "R2": f"{spec.head_dim} for each of {spec.layers} x {spec.kv_heads} heads, folded into v and o" if rotated else "none",
        "R3": f"{r3} (Hadamard), online at queries and keys" if r3 else "none",
        "Hadamard of inputs": "; ".join(f"{size}, online at {', '.join(kinds)}" for size, kinds in online.items()) or "none",
    }
