"""Memory of each stage of a conversion, by the arrays that are alive together at its fullest moment.

With a card there are two sums: what lies on it, which is a layer and what is computed from it, and what the host holds,
which is the next layer as it was read and what goes to files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kurtail_gguf.convert.settings import ConvertConfig
from kurtail_gguf.machine.memory import is_card
from kurtail_gguf.method.cache.plan import SEQUENCES
from kurtail_gguf.method.cache.streams import LOGIT_TOKENS
from kurtail_gguf.method.calibration.capture import MAX_SAMPLE
from kurtail_gguf.method.calibration.generate import BATCH as GENERATED_TOGETHER
from kurtail_gguf.method.calibration.generate import GENERATED_LENGTH
from kurtail_gguf.method.calibration.prose import STARTS
from kurtail_gguf.method.calibration.prose import TOKENS as PROSE_TOKENS
from kurtail_gguf.method.calibration.tokens import SEQ_LEN
from kurtail_gguf.method.quantize.gptq import PART
from kurtail_gguf.method.rotation.spinquant import BATCH, SEQUENCE
from kurtail_gguf.method.tuning.layer_files import memory_needed, what_fits
from kurtail_gguf.model.loading.checkpoint import Checkpoint
from kurtail_gguf.model.precision import forward_dtype
from kurtail_gguf.model.spec import ModelSpec
from kurtail_gguf.numerics.formats.targets import BLOCK_FORMATS

#: Python, torch, transformers and what the allocator keeps: measured with models of a few million weights a layer.
PROGRAM_BYTES = 700_000_000
#: Arrays of a part's size that GPTQ has at once.
_PART_ARRAYS = 12
#: For each value of R1 while it is learned: 16 matrices in single precision (parameter, averages, gradient, the solve and
#: what autograd keeps), or 9 in double.
_LEARNING_BYTES = max(4 * 16, 8 * 9)
#: Tokens in one forward pass of the layers.
_FORWARD = 4 * SEQ_LEN
#: Rows of a table that are folded at once.
_ROWS = 8192


@dataclass(frozen=True, slots=True)
class Sizes:
    """Values of things: a layer, its widest linear, a table, a step's stops of GPTQ as (rows, inputs).

    ``readers`` is the values of the linears that read a norm, ``attention`` those of attention's.
    """

    layer: int
    linears: int
    widest: int
    table: int
    parameters: int
    stops: tuple[tuple[int, int], ...]
    block: int
    block_bytes: int
    readers: int
    attention: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, config: ConvertConfig) -> Sizes:
        spec = checkpoint.spec
        layer = sum(math.prod(shape) for shape in spec.layer_shapes().values())
        shapes = spec.linear_shapes()
        groups = [site.readers for site in spec.sites]
        if spec.experts:  # one after the other: an expert's own linears, not all of a layer together
            names = spec.family.experts
            groups = [*groups[:2], *((names.gate.format(expert), names.up.format(expert)) for expert in range(spec.experts)), *groups[3:]]
        block = BLOCK_FORMATS[config.target].block
        return cls(
            layer=layer,
            linears=sum(math.prod(shape) for shape in shapes.values()),
            widest=max(math.prod(shape) for shape in shapes.values()),
            table=spec.vocab_size * spec.hidden_size,
            parameters=spec.layers * layer + sum(math.prod(shape) for shape in spec.top_shapes().values()),
            stops=tuple((sum(shapes[name][0] for name in group), shapes[group[0]][1]) for group in groups),
            block=block,
            block_bytes=block // 2 + 2,
            readers=max(
                sum(math.prod(shapes[name]) for name in site.readers) for site in spec.sites if site.norm
            ),
            attention=sum(math.prod(shapes[name]) for site in spec.sites[:2] for name in site.readers),
        )


def learns(config: ConvertConfig) -> bool:
    """Whether anything is learned from captured activations, layer by layer."""
    return config.rotation in ("diagonal", "output", "kurtail")


def has_r1(config: ConvertConfig) -> bool:
    """Whether the residual stream is rotated."""
    return config.rotation not in ("none", "diagonal")


def learns_r1(config: ConvertConfig) -> bool:
    """Whether R1 is learned from captured activations."""
    return has_r1(config) and learns(config)


def cache_text(spec: ModelSpec, config: ConvertConfig) -> tuple[int, int]:
    """Sequences that the cache is decided on and tokens of one; as many others it is measured on."""
    if not config.needs_calibration:
        sequences, length = STARTS, PROSE_TOKENS // 2 - STARTS + 1
    else:
        length = GENERATED_LENGTH if config.calibration == ("self",) else SEQ_LEN
        sequences = min(SEQUENCES, -(-config.calibration_tokens // length) // 2)
    return sequences, min(length, spec.window or length)


def _cache(spec: ModelSpec, config: ConvertConfig, sizes: Sizes, loaded: int) -> int:
    """What deciding on the cache takes where it is computed.

    Args:
        loaded: bytes of a layer as it was read, in single precision.
    """
    sequences, length = cache_text(spec, config)
    hidden, heads = spec.hidden_size, spec.heads * spec.head_dim
    # two residual streams of either text, what becomes of one, gradients
    streams = 4 * 8 * sequences * length * hidden
    # in double precision, and a linear of it changed, before it is single again
    folding = 12 * sizes.attention + 16 * heads * hidden
    # with what the backward pass wants, and scores should they be kept
    each = 12 * hidden + 16 * heads + 6 * spec.intermediate_size * max(1, spec.experts_used)
    running = 4 * sizes.attention + 4 * length * (each + 2 * spec.heads * length)
    if spec.experts:
        # stacked anew for each pass: gate and up once more while they become one
        running += 16 * (sizes.layer - sizes.attention) // 3
    # of teacher and student, what they are on the way, and a gradient; the head in pieces
    logits = 4 * 5 * LOGIT_TOKENS * spec.vocab_size + 6 * min(_ROWS, spec.vocab_size) * hidden
    return loaded + streams + max(folding, running, logits)


def rotation_bytes(spec: ModelSpec, config: ConvertConfig, layers: int) -> tuple[int, int]:
    """Bytes of R1, and of so many layers' R2 and channel scales, all in double precision; 0 without rotations."""
    if config.rotation == "none":
        return 0, 0
    r1 = 8 * spec.hidden_size**2 if has_r1(config) else 0
    return r1, 8 * layers * (spec.kv_heads * spec.head_dim**2 + spec.intermediate_size)


def memory_by_stage(
    checkpoint: Checkpoint, config: ConvertConfig, sizes: Sizes, tuned: int, device: torch.device
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of the host's memory and of the card's; nothing of the latter on the CPU.

    Args:
        checkpoint: the model; its headers are all that is read.
        config: of the conversion.
        sizes: of the model.
        tuned: steps of tuning.
        device: where would be computed.
    """
    if not is_card(device):
        return _on_cpu(checkpoint, config, sizes, tuned), {}
    host = {name: PROGRAM_BYTES + value for name, value in _beside_card(checkpoint, config, sizes, tuned).items()}
    return host, _on_card(checkpoint, config, sizes, tuned, device)


def _on_cpu(checkpoint: Checkpoint, config: ConvertConfig, sizes: Sizes, tuned: int) -> dict[str, int]:
    spec = checkpoint.spec
    hidden, ffn = spec.hidden_size, spec.intermediate_size
    r1, r2 = rotation_bytes(spec, config, spec.layers)
    # the checkpoint's own bytes are mapped while a layer is converted to single precision
    loading = 6 * sizes.layer
    forward = 4 * _FORWARD * (4 * ffn + 4 * hidden)
    found = {"embedding and head": 3 * 8 * _ROWS * hidden + r1}
    if config.needs_calibration and config.calibration == ("self",):
        cache = 8 * spec.layers * _together(config) * GENERATED_LENGTH * spec.kv_heads * spec.head_dim
        found["generate text"] = 4 * sizes.table + loading + cache
    if learns(config):
        found["capture activations"] = loading + 8 * ffn * hidden + forward
        if learns_r1(config):
            found["learn R1"] = _LEARNING_BYTES * hidden**2
    if config.rotation == "spinquant":
        found["learn R1 and R2"] = _spinquant(spec, sizes)
    if config.cache_bits != 16:
        found["decide on the cache"] = _cache(spec, config, sizes, loading) + r2
    found["fold a layer"] = 12 * sizes.layer + 16 * sizes.widest + r1 + r2
    if config.weights == "gptq":
        # in double precision, damped, and the factor; then parts of the rows
        of_stops = (
            max(16 * inputs**2, 8 * inputs**2 + 4 * _PART_ARRAYS * min(PART, rows * inputs)) + 4 * rows * inputs
            for rows, inputs in sizes.stops
        )
        found["quantize by GPTQ"] = max(*of_stops, 8 * ffn * hidden + forward) + r1 + r2
    if tuned:
        found["tune scales"] = memory_needed(checkpoint, sizes.block, what_fits(checkpoint, sizes.block, torch.device("cpu")))
    found["export"] = (64 << 20) * 2 + sizes.widest
    return {name: PROGRAM_BYTES + value for name, value in found.items()}


def _together(config: ConvertConfig) -> int:
    """Sequences that are generated together."""
    return min(GENERATED_TOGETHER, -(-config.calibration_tokens // GENERATED_LENGTH))


def _spinquant(spec: ModelSpec, sizes: Sizes) -> int:
    """The whole model, logits and residual streams of a step, where they are computed."""
    return 4 * sizes.parameters + 4 * BATCH * SEQUENCE * (3 * spec.vocab_size + spec.layers * spec.hidden_size)


def _on_card(
    checkpoint: Checkpoint, config: ConvertConfig, sizes: Sizes, tuned: int, device: torch.device
) -> dict[str, int]:
    spec = checkpoint.spec
    hidden, ffn = spec.hidden_size, spec.intermediate_size
    r1, r2 = rotation_bytes(spec, config, layers=1)
    multiplied = forward_dtype(device).itemsize
    # a tensor comes as it is stored and is converted there; experts are stacked anew for each forward pass
    loaded = multiplied * sizes.layer * (2 if spec.experts else 1) + 4 * sizes.widest
    forward = 4 * _FORWARD * (4 * ffn * max(1, spec.experts_used) + 8 * hidden)
    found = {"embedding and head": 3 * 8 * min(_ROWS, spec.vocab_size) * hidden + r1}
    if config.needs_calibration and config.calibration == ("self",):
        batch = _together(config)
        cache = 8 * spec.layers * batch * GENERATED_LENGTH * spec.kv_heads * spec.head_dim
        # keys and values repeated for each query head, and once more where attention scales them
        repeated = 16 * batch * GENERATED_LENGTH * spec.heads * spec.head_dim
        found["generate text"] = 4 * sizes.table + loaded + cache + repeated + 8 * batch * spec.vocab_size
    if learns(config):
        sketch = 4 * sizes.readers + 4 * MAX_SAMPLE * (hidden + 4 * ffn)
        found["capture activations"] = loaded + max(forward, sketch)
        if learns_r1(config):
            found["learn R1"] = _LEARNING_BYTES * hidden**2
    if config.rotation == "spinquant":
        found["learn R1 and R2"] = _spinquant(spec, sizes)
    if config.cache_bits != 16:
        found["decide on the cache"] = _cache(spec, config, sizes, 4 * sizes.layer + 4 * sizes.widest) + r2
    found["fold a layer"] = 12 * sizes.layer + 16 * sizes.widest + r1 + r2
    if config.weights == "gptq":
        found["quantize by GPTQ"] = _gptq_on_card(sizes, forward + multiplied * (sizes.layer - sizes.readers)) + r1 + r2
    if tuned:
        found["tune scales"] = memory_needed(checkpoint, sizes.block, what_fits(checkpoint, sizes.block, device))
    return found


def _gptq_on_card(sizes: Sizes, forward: int) -> int:
    """The fullest stop: the layer's linears that are still to come, and either the Hessian or what runs between stops."""
    left, fullest = 4 * sizes.layer, 0
    for rows, inputs in sizes.stops:
        # cuSOLVER inverts in a copy: double precision twice, and single; then parts of the rows
        work = max(20 * inputs**2, 8 * inputs**2 + 4 * _PART_ARRAYS * min(PART, rows * inputs))
        fullest = max(fullest, left + max(work + 4 * rows * inputs, forward))
        left -= 4 * rows * inputs
    return fullest


def _beside_card(checkpoint: Checkpoint, config: ConvertConfig, sizes: Sizes, tuned: int) -> dict[str, int]:
    """The host's memory, without the program's own."""
    spec = checkpoint.spec
    hidden, ffn = spec.hidden_size, spec.intermediate_size
    rotations = sum(rotation_bytes(spec, config, spec.layers))
    # the mapped file's pages, and the buffer, which page-locked memory rounds up to a power of two
    stored = max(sum(checkpoint.stored_sizes(layer).values()) for layer in range(spec.layers))
    ahead = stored + (1 << (stored - 1).bit_length())
    # torch converts what it copies from the CPU before it goes
    table = 8 * sizes.table
    found = {"embedding and head": 3 * 4 * _ROWS * hidden + rotations}
    if config.needs_calibration and config.calibration == ("self",):
        found["generate text"] = table + ahead + 3 * 8 * GENERATED_TOGETHER * spec.vocab_size
    if learns(config):
        samples = 4 * MAX_SAMPLE * (3 * hidden + spec.kv_heads * spec.head_dim)
        found["capture activations"] = ahead + 4 * _FORWARD * 2 * hidden + 2 * samples
        if learns_r1(config):
            found["learn R1"] = 3 * 8 * hidden**2
    if config.rotation == "spinquant":
        found["learn R1 and R2"] = rotations + table + 8 * sizes.widest
    if config.cache_bits != 16:
        # inputs of layers on their way to the file, the head in pieces
        sequences, length = cache_text(spec, config)
        found["decide on the cache"] = ahead + rotations + 4 * 2 * sequences * length * hidden + 6 * _ROWS * hidden
    results = sizes.layer * (4 if config.weights == "f32" else 1)
    found["fold a layer"] = ahead + rotations + results
    if config.weights == "gptq":
        # codes, what they stand for and a copy on the way; tokens of a batch, read and written
        widest = max(rows * inputs for rows, inputs in sizes.stops)
        found["quantize by GPTQ"] = ahead + rotations + results + 9 * widest + 4 * _FORWARD * 2 * max(hidden, ffn)
    if tuned:
        found["tune scales"] = table + 5 * sizes.layer
    found["export"] = (64 << 20) * 2 + sizes.widest
    return found
