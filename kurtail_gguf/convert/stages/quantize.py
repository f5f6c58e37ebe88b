"""Folding and quantizing, layer by layer."""

from __future__ import annotations

from kurtail_gguf.convert.cost import FORWARD, ROWS, Cost, Estimate
from kurtail_gguf.convert.job import Job, Made
from kurtail_gguf.convert.stages.stage import Stage
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.method.quantize.gptq import PART
from kurtail_gguf.method.quantize.layerwise import CalibratedOn, fold_and_quantize
from kurtail_gguf.model.precision import forward_dtype

#: Arrays of a part's size that GPTQ has at once.
_PART_ARRAYS = 12
#: Products of all rows with the Hessian: one of the weights, two of what the sweeps begin with, and half of one, as one
#: triangle is enough, in the first pass, three refits and two sweeps.
_PRODUCTS = 6
#: Seconds a column takes whatever its length: a few dozen calls of torch in each of three passes.
_COLUMN_SECONDS = 5e-4
#: Seconds that rounding a weight to nearest takes.
_ROUNDING_SECONDS = 2e-7


class Quantize(Stage):
    """What ``--weights`` names, into what ``--target`` names."""

    name = "quantize"
    leaves = ("quantized",)

    def settings(self, job: Job) -> dict[str, object]:
        return {"target": job.config.target, "weights": job.config.weights}

    def cost(self, estimate: Estimate) -> Cost:
        found = _folding(estimate)
        seconds = _folding_seconds(estimate)
        if estimate.job.config.weights == "gptq":
            spec, tokens = estimate.spec, estimate.job.config.calibration_tokens
            width = 2 * spec.hidden_size + spec.heads * spec.head_dim + spec.intermediate_size
            found |= _gptq(estimate) | Cost(disk={"tokens between layers": 4 * tokens * width})
            seconds += _gptq_seconds(estimate, tokens)
        else:
            seconds += estimate.every * _ROUNDING_SECONDS
        return found | Cost(seconds={"fold and quantize": seconds})

    def run(self, job: Job, made: Made, progress: Progress) -> None:
        calibrated_on = None
        if job.config.weights == "gptq":
            assert made.calibration is not None
            calibrated_on = CalibratedOn(made.calibration.ids, made.rounding)
        made.quantized = fold_and_quantize(
            job.checkpoint, made.transforms, job.stored_as, calibrated_on, job.kept("quantized"), job.device, progress
        )


def _results(estimate: Estimate) -> int:
    """A layer on its way to the file."""
    return estimate.sizes.layer * (4 if estimate.job.stored_as is None else 1)


def _folding(estimate: Estimate) -> Cost:
    sizes, hidden = estimate.sizes, estimate.spec.hidden_size
    r1, _ = estimate.rotations(0)
    rows = min(ROWS, estimate.spec.vocab_size) if estimate.on_card else ROWS
    tables = estimate.moment(
        "embedding and head",
        cpu=3 * 8 * ROWS * hidden + r1,
        # without R1 the GPU has no part in it
        host=3 * (4 if r1 else 8) * ROWS * hidden + estimate.all_rotations,
        card=3 * 8 * rows * hidden + r1 if r1 else 0,
    )
    where = 12 * sizes.layer + 16 * sizes.widest + estimate.layer_rotations
    host = estimate.ahead + estimate.all_rotations + _results(estimate)
    layers = estimate.moment("fold a layer", cpu=where, host=host, card=where)
    return tables | layers | Cost(disk={"folded tables": 4 * estimate.tables * sizes.table, "quantized layers": estimate.quantized})


def _gptq(estimate: Estimate) -> Cost:
    spec, sizes = estimate.spec, estimate.sizes
    hidden, ffn = spec.hidden_size, spec.intermediate_size
    # in double precision, damped, and the factor; then parts of the rows
    of_stops = max(
        max(16 * inputs**2, 8 * inputs**2 + 4 * _PART_ARRAYS * min(PART, rows * inputs)) + 4 * rows * inputs
        for rows, inputs in sizes.stops
    )
    # codes, what they stand for and a copy on the way; tokens of a batch, read and written
    widest = max(rows * inputs for rows, inputs in sizes.stops)
    passing = 9 * widest + 4 * FORWARD * 2 * max(hidden, ffn)
    return estimate.moment(
        "quantize by GPTQ",
        cpu=max(of_stops, 8 * ffn * hidden + estimate.forward) + estimate.layer_rotations,
        host=estimate.ahead + estimate.all_rotations + _results(estimate) + passing,
        card=_gptq_on_card(estimate) + estimate.layer_rotations,
    )


def _gptq_on_card(estimate: Estimate) -> int:
    """The fullest stop: the layer's linears that are still to come, and either the Hessian or what runs between stops."""
    sizes = estimate.sizes
    forward = estimate.forward + forward_dtype(estimate.job.device).itemsize * (sizes.layer - sizes.readers)
    left, fullest = 4 * sizes.layer, 0
    for rows, inputs in sizes.stops:
        # cuSOLVER inverts in a copy: double precision twice, and single; then parts of the rows
        work = max(20 * inputs**2, 8 * inputs**2 + 4 * _PART_ARRAYS * min(PART, rows * inputs))
        fullest = max(fullest, left + max(work + 4 * rows * inputs, forward))
        left -= 4 * rows * inputs
    return fullest


def _folding_seconds(estimate: Estimate) -> float:
    """Products with R1 of all that reads or writes the residual stream, and with R2 of values and what reads them."""
    config, spec = estimate.job.config, estimate.spec
    if config.rotation == "none":
        return 0.0
    values = spec.layers * (spec.heads + spec.kv_heads) * spec.head_dim * spec.hidden_size
    operations = 2 * spec.head_dim * values
    if config.has_r1:
        operations += 2 * spec.hidden_size * (estimate.every + estimate.tables * estimate.sizes.table)
    return operations / estimate.speed.double


def _gptq_seconds(estimate: Estimate, tokens: int) -> float:
    single, double = estimate.speed.single, estimate.speed.double
    each = sum(
        2 * rows * inputs**2 * _PRODUCTS / single + 4 / 3 * inputs**3 / double
        + 2 * tokens * inputs**2 / single + inputs * _COLUMN_SECONDS
        for rows, inputs in estimate.sizes.stops
    )  # fmt: skip
    return estimate.spec.layers * each + 2 * tokens * estimate.every / single
