"""What stages cost: bytes of the arrays that are alive together at their fullest moments, of disk, and seconds.

With a GPU there are two sums of memory: what lies on it, which is a layer and what is computed from it, and what the host
holds, which is the next layer as it was read and what goes to files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from functools import cached_property

from kurtail_gguf.convert.job import Job
from kurtail_gguf.machine.memory import is_card
from kurtail_gguf.method.calibration.tokens import SEQ_LEN
from kurtail_gguf.method.tuning.layer_files import memory_needed, what_fits
from kurtail_gguf.model.precision import forward_dtype
from kurtail_gguf.model.spec import ModelSpec

#: Python, torch, transformers and what the allocator keeps: measured with models of a few million weights a layer.
PROGRAM_BYTES = 700_000_000
#: Tokens in one forward pass of the layers.
FORWARD = 4 * SEQ_LEN
#: Rows of a table that are folded at once.
ROWS = 8192
#: Bytes a second at which stored weights become single precision.
CONVERTED = 2e9


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes and seconds by what they are for.

    Args:
        memory: of the host, by moment.
        card: of the GPU that computes, by moment; nothing on the CPU.
        disk: what is left there until the end.
        seconds: by stage.
    """

    memory: dict[str, int] = field(default_factory=dict)
    card: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def __or__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, one.name) | getattr(other, one.name) for one in fields(Cost)))


@dataclass(frozen=True, slots=True)
class Speed:
    """Floating-point operations a second, in single and in double precision, and in what tuning multiplies in."""

    single: float
    double: float
    tuning: float


@dataclass(frozen=True, slots=True)
class Sizes:
    """Values of things: a layer, its linears, the widest of them, a table, the model, what of it a token is multiplied by; stops of
    GPTQ as (rows, inputs).

    ``readers`` is the values of the linears that read the residual stream, ``attention`` those of attention's.
    """

    layer: int
    linears: int
    widest: int
    table: int
    parameters: int
    active: int
    stops: tuple[tuple[int, int], ...]
    readers: int
    attention: int

    @classmethod
    def of(cls, spec: ModelSpec) -> Sizes:
        # a layer without experts counts as one with them: those are a few of many, and the smaller
        layer = sum(math.prod(shape) for shape in spec.layer_shapes().values())
        shapes = spec.linear_shapes()
        groups = [site.readers for site in spec.sites]
        if spec.experts:  # one after the other: an expert's own linears, not all of a layer together
            names = spec.family.experts
            pairs = ((names.gate.format(expert), names.up.format(expert)) for expert in range(spec.experts))
            groups = [*groups[:2], *((names.shared[:2],) if names.shared else ()), *pairs, *groups[3:]]
        return cls(
            layer=layer,
            linears=sum(math.prod(shape) for shape in shapes.values()),
            widest=max(math.prod(shape) for shape in shapes.values()),
            table=spec.vocab_size * spec.hidden_size,
            parameters=(parameters := spec.layers * layer + sum(math.prod(shape) for shape in spec.top_shapes().values())),
            active=parameters - 3 * spec.layers * (spec.experts - spec.experts_used) * spec.hidden_size * spec.intermediate_size,
            stops=tuple((sum(shapes[name][0] for name in group), shapes[group[0]][1]) for group in groups),
            readers=max(sum(math.prod(shapes[name]) for name in site.readers) for site in spec.residual_sites),
            attention=sum(math.prod(shapes[name]) for site in spec.sites[:2] for name in site.readers),
        )  # fmt: skip


class Estimate:
    """A job's sizes, and what the costs of several stages are made of.

    Args:
        job: what would be converted; the checkpoint's headers are all that is read.
        speed: of the device.
    """

    def __init__(self, job: Job, speed: Speed) -> None:
        self.job, self.spec, self.speed = job, job.spec, speed
        self.sizes = Sizes.of(job.spec)
        self.on_card = is_card(job.device)

    def moment(self, name: str, cpu: int, host: int, card: int = 0) -> Cost:
        """A stage's fullest moment.

        Args:
            name: of the moment.
            cpu: bytes beside the program's own where the CPU computes.
            host: the same where a GPU does.
            card: bytes on the GPU; 0 for a stage that leaves it alone.
        """
        if not self.on_card:
            return Cost(memory={name: PROGRAM_BYTES + cpu})
        return Cost(memory={name: PROGRAM_BYTES + host}, card={name: card} if card else {})

    def rotations(self, layers: int) -> tuple[int, int]:
        """Bytes of R1, and of so many layers' R2 and channel scales, all in double precision; 0 without rotations."""
        if self.job.config.rotation == "none":
            return 0, 0
        r1 = 8 * self.spec.hidden_size**2 if self.job.config.has_r1 else 0
        return r1, 8 * layers * (self.spec.kv_heads * self.spec.head_dim**2 + self.spec.intermediate_size)

    @cached_property
    def all_rotations(self) -> int:
        """R1, and every layer's R2 and scales."""
        return sum(self.rotations(self.spec.layers))

    @cached_property
    def layer_rotations(self) -> int:
        """What of them is where a layer is computed: on a GPU those of that layer."""
        return sum(self.rotations(1 if self.on_card else self.spec.layers))

    @cached_property
    def every(self) -> int:
        """Values of all block linears."""
        return self.spec.layers * self.sizes.linears

    @cached_property
    def tables(self) -> int:
        """Tables that are folded: one where embedding and head are the same and stay so."""
        return 1 if self.spec.tied and not self.job.config.has_r1 else 2

    @cached_property
    def quantized(self) -> int:
        """Bytes of all layers as the file has them."""
        sizes, block = self.sizes, self.job.block_format.block
        linears = 4 * sizes.linears if self.job.stored_as is None else sizes.linears * (block // 2 + 2) // block
        return self.spec.layers * (linears + 4 * (sizes.layer - sizes.linears))

    @cached_property
    def loading(self) -> int:
        """A layer in the CPU's memory: its stored bytes are mapped while it becomes single precision."""
        return 6 * self.sizes.layer

    @cached_property
    def loaded(self) -> int:
        """A layer on a GPU: a tensor comes as it is stored and is converted there; experts are stacked for each pass."""
        stored = forward_dtype(self.job.device).itemsize * self.sizes.layer
        return stored * (2 if self.spec.experts else 1) + 4 * self.sizes.widest

    @cached_property
    def ahead(self) -> int:
        """The next layer in a GPU's host: the file's pages, and the buffer, which page-locked memory makes a power of two."""
        stored = max(sum(self.job.checkpoint.stored_sizes(layer).values()) for layer in range(self.spec.layers))
        return stored + (1 << (stored - 1).bit_length())

    @cached_property
    def forward(self) -> int:
        """Activations of a forward pass, where it is computed."""
        hidden, ffn = self.spec.hidden_size, self.spec.intermediate_size
        if self.on_card:
            return 4 * FORWARD * (4 * ffn * max(1, self.spec.experts_used) + 8 * hidden)
        return 4 * FORWARD * (4 * ffn + 4 * hidden)

    @cached_property
    def student(self) -> int:
        """The quantized model as it is learned from, with as much of it as the device has room for."""
        block = self.job.block_format.block
        return memory_needed(self.job.checkpoint, block, what_fits(self.job.checkpoint, block, self.job.device))
