"""Which block linears get 8-bit activations: damage measured on the quantized model, chosen under a budget."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from kurtail_gguf.files.atomic import write_atomically
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.method.activations.damage import DamageMeter, measure
from kurtail_gguf.method.tuning.layer_files import open_student, open_teacher
from kurtail_gguf.model.loading.checkpoint import Checkpoint
from kurtail_gguf.numerics.formats.targets import BlockFormat
from kurtail_gguf.numerics.simulation.runtime import RuntimeRounding

#: Tokens that damage is measured on, as far as whole sequences go.
DAMAGE_TOKENS = 4096


def measure_damage(
    checkpoint: Checkpoint,
    ids: npt.NDArray[np.int32],
    quantized: Path,
    block_format: BlockFormat,
    rounding: RuntimeRounding,
    target: Path,
    device: torch.device,
    progress: Progress,
) -> dict[str, float]:
    """What 4-bit activations cost at every block linear of the quantized model (``damage.py``).

    What is left of an error at 8 bits, about 1/230 of its energy, is neglected.

    Args:
        checkpoint: the model.
        ids: calibration tokens, int32 ``[sequences, length]``; sequences are taken evenly from all of them.
        quantized: directory that ``layerwise.fold_and_quantize`` filled.
        block_format: what its linears are stored as.
        rounding: what the runtime rounds, all linears alike.
        target: JSON file of the result; taken over where it exists.
        device: where to compute.
        progress: two stages, the unquantized model's run and the measurement.

    Returns:
        Damages in nats a token by the weights' full names, in the order of the forward pass.

    Raises:
        KurtailError: a divergence that is not finite.
    """
    if target.exists():
        return json.loads(target.read_text(encoding="utf-8"))["damage"]
    count = max(1, DAMAGE_TOKENS // ids.shape[1])
    ids = ids[:: max(1, len(ids) // count)][:count]
    scratch = target.with_name("measuring")
    scratch.mkdir(exist_ok=True)
    teacher = open_teacher(checkpoint, ids, scratch / "teacher.npy", device, progress)
    meter = DamageMeter()
    student, outside = open_student(
        checkpoint, quantized, block_format, rounding, device, ids.shape[1], rounded=meter.rounded
    )
    measured, divergence = measure(student, meter, teacher, outside, ids, device, progress)
    spec = checkpoint.spec
    weights = (f"{spec.layer_prefix(layer)}{name}.weight" for layer in range(spec.layers) for name in spec.at(layer).linears)
    # an expert that no token went through has none
    damages = {weight: measured.get(weight, 0.0) for weight in weights}
    content = {"divergence": divergence, "tokens": int(ids.size), "damage": damages}
    write_atomically(target, json.dumps(content, indent=2) + "\n")
    shutil.rmtree(scratch)
    return damages


def choose(damages: Mapping[str, float], costs: Mapping[str, int], budget: float) -> tuple[str, ...]:
    """The linears whose damage is worst for what they cost.

    They are taken in the order of damage by cost, those of equal worth in the order of ``damages``. One that the
    rest of the budget does not pay for is left out and cheaper ones after it still have their turn.

    Args:
        damages: of rounding to 4 bits; where it is no damage at all nothing is gained with 8.
        costs: multiply-accumulates for a token, of all block linears.
        budget: share of their sum that may be spent.

    Returns:
        Names in the order they were taken.
    """
    allowed, spent = budget * sum(costs.values()), 0
    chosen = []
    harmed = (name for name, damage in damages.items() if damage > 0)
    for name in sorted(harmed, key=lambda name: -damages[name] / costs[name]):
        if spent + costs[name] <= allowed:
            spent += costs[name]
            chosen.append(name)
    return tuple(chosen)
