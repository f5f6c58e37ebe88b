"""Rotations and scales: none, random ones, or what one of the methods learns."""

from __future__ import annotations

from collections.abc import Iterator

from kurtail_gguf.convert.cost import FORWARD, Cost, Estimate
from kurtail_gguf.convert.job import Job, Made
from kurtail_gguf.convert.stages.stage import Stage
from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.method.calibration.capture import MAX_SAMPLE, SKETCH_ROWS
from kurtail_gguf.method.rotation.choice import CAPTURED_TOKENS, choose_transforms
from kurtail_gguf.method.rotation.learn import OUTPUT_STEPS, R1_STEPS
from kurtail_gguf.method.rotation.spinquant import BATCH, SEQUENCE, STEPS, check_memory

_TRANSFORMS = "transforms.safetensors"
#: For each value of R1 while it is learned: 16 matrices in single precision (parameter, averages, gradient, the solve and
#: what autograd keeps), or 9 in double.
_LEARNING_BYTES = max(4 * 16, 8 * 9)


class Rotations(Stage):
    """What ``--rotation`` names."""

    name = "rotations"
    leaves = (_TRANSFORMS, "capture")

    def settings(self, job: Job) -> dict[str, object]:
        return {"rotation": job.config.rotation}

    def refuse(self, job: Job) -> Iterator[str]:
        spec, rotation = job.spec, job.config.rotation
        if job.config.has_r1 and (between := spec.family.kept_in_place):
            yield (
                f"--rotation {rotation} is not supported for {spec.family.architecture}: it has {between}, with which a "
                "rotated residual stream does not commute: give --rotation diagonal"
            )
            return
        if rotation != "spinquant":
            return
        scaled = (spec.embedding_scale, spec.residual_scale, spec.logit_divisor) != (1, 1, 1)
        if spec.experts or scaled or spec.family.fused_attention:
            yield f"--rotation spinquant is not supported for {spec.family.architecture}: give output, kurtail or hadamard"
        elif not job.has(_TRANSFORMS):
            try:
                check_memory(job.checkpoint, BATCH * min(SEQUENCE, job.sequence, spec.window or SEQUENCE), job.device)
            except KurtailError as error:
                yield str(error)

    def cost(self, estimate: Estimate) -> Cost:
        config, spec, sizes = estimate.job.config, estimate.spec, estimate.sizes
        hidden, speed = spec.hidden_size, estimate.speed.single
        found = Cost()
        if config.rotation != "none":
            found |= Cost(disk={"rotations": estimate.all_rotations})
        if config.learns_by_layer:
            found |= capturing(estimate)
            steps = {"output": OUTPUT_STEPS, "kurtail": R1_STEPS}.get(config.rotation, 0)
            seconds = 2 * CAPTURED_TOKENS * estimate.every / speed + steps * 24 * hidden**3 / speed
            found |= Cost(seconds={"rotations": seconds})
        if config.learns_by_layer and config.has_r1:
            learning = _LEARNING_BYTES * hidden**2
            found |= estimate.moment("learn R1", cpu=learning, host=3 * 8 * hidden**2, card=learning)
        if config.rotation == "spinquant":
            # the whole model, logits and residual streams of a step
            whole = 4 * sizes.parameters + 4 * BATCH * SEQUENCE * (3 * spec.vocab_size + spec.layers * hidden)
            host = estimate.all_rotations + 8 * sizes.table + 8 * sizes.widest
            found |= estimate.moment("learn R1 and R2", cpu=whole, host=host, card=whole)
            found |= Cost(seconds={"rotations": 8 * STEPS * BATCH * SEQUENCE * sizes.parameters / speed})
        return found

    def run(self, job: Job, made: Made, progress: Progress) -> None:
        config = job.config
        made.transforms = choose_transforms(
            config.rotation, job.checkpoint, made.calibration, made.rounding, config.seed, job.work_dir, job.device, progress
        )


def capturing(estimate: Estimate) -> Cost:
    """Activations that are captured, for learning or for the report."""
    spec, shapes = estimate.spec, estimate.spec.linear_shapes()
    hidden, ffn = spec.hidden_size, spec.intermediate_size
    readers = sum(min(SKETCH_ROWS, shapes[name][0]) for site in spec.residual_sites for name in site.readers)
    a_layer = 4 * MAX_SAMPLE * (hidden + spec.kv_heads * spec.head_dim) + 4 * readers * hidden
    a_layer += 8 * sum(site.size for site in spec.sites if site.residual or site.source)
    samples = 4 * MAX_SAMPLE * (3 * hidden + spec.kv_heads * spec.head_dim)
    sketch = 4 * estimate.sizes.readers + 4 * MAX_SAMPLE * (hidden + 4 * ffn)
    memory = estimate.moment(
        "capture activations",
        cpu=estimate.loading + 8 * ffn * hidden + estimate.forward,
        host=estimate.ahead + 4 * FORWARD * 2 * hidden + 2 * samples,
        card=estimate.loaded + max(estimate.forward, sketch),
    )
    return memory | Cost(disk={"captured activations": spec.layers * a_layer + 4 * CAPTURED_TOKENS * hidden})
