"""Which block linears get 8-bit activations, where ``--activations auto`` asks for a choice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from kurtail_gguf.convert.cost import Cost, Estimate
from kurtail_gguf.convert.job import Job, Made
from kurtail_gguf.convert.stages.stage import Stage
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.method.activations.choice import DAMAGE_TOKENS, choose, measure_damage
from kurtail_gguf.method.tuning.layer_files import memory_shortage
from kurtail_gguf.model.names import file_tensor
from kurtail_gguf.model.spec import ModelSpec

_DAMAGE = "damage.json"


class Activations(Stage):
    """Damage of 4-bit activations, measured on the quantized model, and the linears that a budget pays 8 bits for."""

    name = "measure damage"
    leaves = (_DAMAGE, "measuring")

    def wanted(self, job: Job) -> bool:
        return job.config.activations == "auto"

    def settings(self, job: Job) -> dict[str, object]:
        return {"activations": job.config.activations, "budget": job.config.activation_budget or None}

    def refuse(self, job: Job) -> Iterator[str]:
        if not job.has(_DAMAGE) and (shortage := memory_shortage(job.checkpoint, job.block_format.block, job.device)):
            yield f"--activations auto {shortage}: give --activations 4 or 8, or use a larger machine"

    def cost(self, estimate: Estimate) -> Cost:
        spec, sizes, name = estimate.spec, estimate.sizes, "measure damage"
        tokens = min(DAMAGE_TOKENS, estimate.job.config.calibration_tokens)
        memory = estimate.moment(name, cpu=estimate.student, host=8 * sizes.table + 5 * sizes.layer, card=estimate.student)
        # the unquantized model once; the other forward, once more for what is not kept, and back
        seconds = 10 * tokens * sizes.active / estimate.speed.single
        return memory | Cost(disk={"the unquantized model's answers, for damage": 4 * tokens * spec.hidden_size}, seconds={name: seconds})

    def run(self, job: Job, made: Made, progress: Progress) -> None:
        assert made.calibration is not None and made.quantized is not None
        damages = measure_damage(
            job.checkpoint, made.calibration.ids, made.quantized, job.block_format, made.rounding, job.kept(_DAMAGE),
            job.device, progress,
        )  # fmt: skip
        exceptions = chosen_linears(job.spec, damages, job.config.activation_budget)
        made.rounding = replace(made.rounding, exceptions=dict.fromkeys(exceptions, 8))


def chosen_linears(spec: ModelSpec, damages: Mapping[str, float], budget: float) -> tuple[str, ...]:
    """The linears that get 8 bits, by their weights' full names: those of a layer's experts that are one tensor of the file
    together, since a tensor has one number of bits.

    Args:
        spec: sizes and roles.
        damages: of rounding to 4 bits, by full names.
        budget: share of a token's multiply-accumulates that may be spent.
    """
    members: dict[str, list[str]] = {}
    costs: dict[str, int] = {}
    for layer in range(spec.layers):
        for name, shape in spec.at(layer).linear_shapes().items():
            tensor, expert = file_tensor(spec, layer, name)
            members.setdefault(tensor, []).append(f"{spec.layer_prefix(layer)}{name}.weight")
            costs[tensor] = math.prod(shape) * (1 if expert is None else spec.experts_used)
    together = {tensor: sum(damages[name] for name in names) for tensor, names in members.items()}
    return tuple(name for tensor in choose(together, costs, budget) for name in members[tensor])
