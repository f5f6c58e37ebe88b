"""What a conversion will take, told from a configuration and the headers of files alone: no weight is read or downloaded.

Memory is the sum of the arrays that are alive together at each stage's fullest moment, disk the sum of what the stages
leave until the end. Seconds are operations over this machine's speed in two short products: an order of magnitude.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from kurtail_gguf.convert.by_itself.architectures import BY_ITSELF, OWN
from kurtail_gguf.convert.by_itself.loading import by_itself
from kurtail_gguf.convert.by_itself.plan import cache_values, outline_by_itself
from kurtail_gguf.convert.by_itself.plan import disk as disk_by_itself
from kurtail_gguf.convert.by_itself.plan import memory as memory_by_itself
from kurtail_gguf.convert.by_itself.plan import seconds as seconds_by_itself
from kurtail_gguf.convert.cost import PROGRAM_BYTES, Cost, Estimate, Speed
from kurtail_gguf.convert.job import Job, Made
from kurtail_gguf.convert.own_text import cost_of_own_text
from kurtail_gguf.convert.settings import ConvertConfig
from kurtail_gguf.convert.stages import STAGES
from kurtail_gguf.files.destinations import check_out
from kurtail_gguf.machine.device import pick_device
from kurtail_gguf.machine.memory import card_module, is_card, memory_available
from kurtail_gguf.messages.errors import SourceError
from kurtail_gguf.model.loading.checkpoint import Checkpoint, open_checkpoint
from kurtail_gguf.model.loading.outline import Outline, outline
from kurtail_gguf.model.precision import tuning_dtype
from kurtail_gguf.numerics.formats.kt4 import BLOCK

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
    must have and has free, by "beside OUT" and, where those are others, "in the work directory" and the place of a cache.
    ``way`` is how the architecture is converted: by an own entry, or by itself.
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
    way: str = OWN

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
        KurtailError: MODEL is nothing that can be converted; the message says why.
    """
    check_out(config.out)
    with tempfile.TemporaryDirectory(prefix="kurtail-plan-") as scratch:
        source = outline(config.model, Path(scratch))
        try:
            if by_itself(source.directory):
                return _plan_by_itself(config, source)
            return _plan(config, source, open_checkpoint(source.directory, config.allow_pickle))
        except SourceError as error:
            # the directory stands for the model, and is gone when the message is read
            raise type(error)(str(error).replace(scratch, config.model)) from error


def _plan(config: ConvertConfig, source: Outline, checkpoint: Checkpoint) -> Plan:
    device = pick_device(config.device)
    job = Job(config, checkpoint, device)
    estimate = Estimate(job, _speeds(device))
    notes = [*([source.note] if source.note else []), *job.checkpoint.notes, *(note for stage in STAGES for note in stage.notes(job))]
    refused, cost = [], _fetching(source, estimate)
    fetched = sum(cost.disk.values())
    for stage in STAGES:
        if stage.wanted(job):
            reasons = list(stage.refuse(job))
            refused += reasons
            cost |= Cost() if reasons else stage.cost(estimate)
    room = _room(config, cost.disk, fetched, source.cache)
    available = memory_available(torch.device("cpu"))
    refused += _lacking(room, cost.memory, available)
    on_card = memory_available(device) if cost.card else 0
    if cost.card and (most := max(cost.card.values())) > on_card:
        refused.append(f"{most / 1e9:.1f} GB of {device}'s memory are needed, {on_card / 1e9:.1f} GB are free there")
    if cost.card:
        notes.append(
            f"{device} also needs some hundred MB for the driver and cuBLAS; these figures were not checked on a GPU yet"
        )
    return Plan(
        config.model, job.spec.family.architecture, job.spec.layers, estimate.sizes.parameters, cost.memory, available,
        cost.disk, room, cost.seconds, _rotations(job), tuple(notes), tuple(refused), CacheSize.of(job.checkpoint, config),
        str(device), cost.card, on_card,
    )  # fmt: skip


def _plan_by_itself(config: ConvertConfig, source: Outline) -> Plan:
    device = pick_device(config.device)
    model, found, notes, refused = outline_by_itself(config, source.directory)
    speed = _speeds(device)
    written = _own_text_by_itself(config, model, found.parameters, speed)
    memory, disk = memory_by_itself(config, found) | written.memory, disk_by_itself(config, found) | written.disk
    seconds = seconds_by_itself(config, found, speed) | written.seconds
    room, available = _room(config, disk, 0, None), memory_available(torch.device("cpu"))
    refused = (*refused, *_lacking(room, memory, available))
    rotations = {"Hadamard of inputs": f"{BLOCK}, online at {len(found.linears)} linears that read {len(found.sites)} inputs"}
    return Plan(
        config.model, model.architectures[0], found.count, found.parameters, memory, available, disk, room,
        seconds, rotations, notes, refused, _cache_by_itself(config, model), str(device), way=BY_ITSELF,
    )  # fmt: skip


def _own_text_by_itself(config: ConvertConfig, model: Any, parameters: int, speed: Speed) -> Cost:
    if config.weights != "gptq" or config.calibration != ("self",):
        return Cost()
    vocabulary = model.get_text_config().vocab_size
    return cost_of_own_text(parameters, parameters, vocabulary, cache_values(model), config.calibration_tokens, speed.single)


def _cache_by_itself(config: ConvertConfig, model: Any) -> CacheSize:
    values, kv = cache_values(model), config.cache_bits
    bits = 16.0 if kv in ("auto", 16) else float(kv) + 0.5
    context = min(_CONTEXT, getattr(model.get_text_config(), "max_position_embeddings", _CONTEXT) or _CONTEXT)
    token = values * bits / 8
    return CacheSize(str(kv), bits, token, context, context * token, 2 * context * values)


def _lacking(room: dict[str, tuple[int, int]], memory: dict[str, int], available: int) -> Iterator[str]:
    """Disks, and the memory, that have not what is needed, each a line."""
    for where, (needed, free) in room.items():
        if needed > free:
            yield f"{needed / 1e9:.1f} GB of disk are needed, {free / 1e9:.1f} GB are free {where}"
    if (most := max(memory.values())) > available:
        yield f"{most / 1e9:.1f} GB of memory are needed, {available / 1e9:.1f} GB are free"


def _fetching(source: Outline, estimate: Estimate) -> Cost:
    """What is downloaded and unpacked before the first stage."""
    disk = {"MODEL, downloaded": source.download, "MODEL, unpacked": source.unpacked}
    # what is read of the file, and one tensor, or an expert's, twice
    largest = 8 * max(estimate.sizes.table, estimate.sizes.widest)
    memory = {"unpack MODEL": PROGRAM_BYTES + source.packed + largest} if source.unpacked else {}
    return Cost(memory=memory, disk={name: size for name, size in disk.items() if size})


def _device(path: Path) -> int:
    return path.stat().st_dev


def _room(config: ConvertConfig, disk: dict[str, int], fetched: int, cache: Path | None) -> dict[str, tuple[int, int]]:
    """What each disk must have and has free.

    Args:
        disk: bytes of all that is kept until the end.
        fetched: those of them that are the model as it is downloaded and unpacked.
        cache: where that is done; None for the work directory.
    """
    beside = config.out.absolute().parent
    work = config.work_dir.absolute() if config.work_dir else beside
    places = [("beside OUT", beside, disk["OUT"]), ("in the work directory", work, sum(disk.values()) - disk["OUT"] - fetched)]
    places.append(("in the work directory", work, fetched) if cache is None else (f"in {cache}", cache, fetched))
    needed: dict[int, int] = {}
    named: dict[int, tuple[str, Path]] = {}
    for name, path, size in places:
        there = next(parent for parent in (path, *path.parents) if parent.exists())  # convert makes the rest
        named.setdefault(_device(there), (name, there))
        needed[_device(there)] = needed.get(_device(there), 0) + size
    return {name: (needed[device], shutil.disk_usage(there).free) for device, (name, there) in named.items() if needed[device]}


def _speeds(device: torch.device) -> Speed:
    return Speed(*(_speed(dtype, device) for dtype in (torch.float32, torch.float64, tuning_dtype(device))))


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


def _rotations(job: Job) -> dict[str, str]:
    """Size and place of each rotation, by name."""
    spec, rounding = job.spec, Made.of(job).rounding
    rotated, r1, r3 = job.config.rotation != "none", job.config.has_r1, rounding.cache.rotation
    online = {size: [kind for kind, own in rounding.online.items() if own == size] for size in rounding.online.values()}
    return {
        "R1": f"{spec.hidden_size}, folded into embedding, head and every linear of the residual stream" if r1 else "none",
        "R2": f"{spec.head_dim} for each of {spec.layers} x {spec.kv_heads} heads, folded into v and o" if rotated else "none",
        "R3": f"{r3} (Hadamard), online at queries and keys" if r3 else "none",
        "Hadamard of inputs": "; ".join(f"{size}, online at {', '.join(kinds)}" for size, kinds in online.items()) or "none",
    }
