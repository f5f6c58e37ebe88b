"""The file itself, and what it says of how it was made."""

from __future__ import annotations

import numpy as np

from kurtail_gguf.convert.cost import Cost, Estimate
from kurtail_gguf.convert.job import Job, Made
from kurtail_gguf.convert.stages.stage import Stage
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.method.fold.tables import is_tied, table_types
from kurtail_gguf.model.names import online_tensors
from kurtail_gguf.model.sites import FFN_OUTPUT
from kurtail_gguf.runtime import ggml
from kurtail_gguf.runtime.export import write_gguf
from kurtail_gguf.runtime.programs import check_loads
from kurtail_gguf.runtime.provenance import Provenance

#: What the file says R1 and R2 were learned by, by ``--rotation``; the others learn nothing.
OBJECTIVE = {"diagonal": "output-error", "output": "output-error", "kurtail": "kurtosis", "spinquant": "cross-entropy"}
#: Bytes of a table's value, by its type.
_TABLE_BYTES = {ggml.F32: 4.0, ggml.Q4_0: 18 / 32, ggml.Q6_K: 210 / 256, ggml.Q8_0: 34 / 32}
#: Seconds that writing a weight takes.
_SECONDS = 2e-8


class Export(Stage):
    """Writes OUT, whole or not at all."""

    name = "export"

    def cost(self, estimate: Estimate) -> Cost:
        job, sizes = estimate.job, estimate.sizes
        types = table_types(job.spec, tied=estimate.tables == 1, rounded=job.stored_as is not None)
        held = (64 << 20) * 2 + sizes.widest
        out = estimate.quantized + int(sum(_TABLE_BYTES[one] * sizes.table for one in types.values()))
        seconds = _SECONDS * (estimate.every + estimate.tables * sizes.table)
        return estimate.moment("export", cpu=held, host=held) | Cost(disk={"OUT": out}, seconds={"export": seconds})

    def run(self, job: Job, made: Made, progress: Progress) -> None:
        assert made.cache is not None and made.quantized is not None
        made.provenance = provenance(job, made)
        if job.config.keep_rotations is not None:
            made.transforms.save(job.config.keep_rotations)
        tied = is_tied(job.spec, made.transforms.r1)
        tables = table_types(job.spec, tied, rounded=job.stored_as is not None)
        online = online_tensors(job.spec, made.rounding.online)
        write_gguf(
            job.checkpoint.directory, made.quantized, job.config.out, made.provenance, progress, tables, online,
            made.rounding.exceptions, made.cache.offsets_in_file(job.spec), job.spec.window, check_loads, job.converter,
        )  # fmt: skip


def provenance(job: Job, made: Made) -> Provenance:
    """What the file says."""
    config, spec = job.config, job.spec
    transforms, rounding, cache, tokens = made.transforms, made.rounding, made.cache, made.tokens
    assert cache is not None
    cost = cache.cost
    return Provenance(
        target=config.target,
        rotation=config.rotation,
        objective=OBJECTIVE.get(config.rotation, "none"),
        weights=config.weights,
        tune_steps=job.tuning_steps,
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
        kv_bits=min(cache.bits.k + cache.bits.v),
        kv_choice="auto" if config.cache_bits == "auto" else "fixed",
        kv_budget=float(np.float32(config.cache_budget)),
        kv_k_bits=cache.bits.k,
        kv_v_bits=cache.bits.v,
        kv_divergence=None if cost is None else float(np.float32(cost.divergence)),
        kv_perplexity=None if cost is None else float(np.float32(cost.perplexity)),
        kv_measured_tokens=None if cost is None else cost.tokens,
        calibration_name="" if tokens is None else tokens.name,
        calibration_tokens=0 if tokens is None else int(tokens.ids.size),
        calibration_sha256="" if tokens is None else tokens.sha256,
    )
