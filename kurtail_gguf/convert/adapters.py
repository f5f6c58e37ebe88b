"""LoRA adapters made for the original checkpoint, brought into the basis of a rotated file."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kurtail_gguf.files.destinations import check_apart
from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.method.fold.lora import fold_pair
from kurtail_gguf.method.fold.transforms import Transforms, load_transforms
from kurtail_gguf.model.loading.checkpoint import Checkpoint, open_checkpoint
from kurtail_gguf.model.loading.source import resolve_source
from kurtail_gguf.model.names import file_rows, file_tensor
from kurtail_gguf.runtime.export import write_adapter
from kurtail_gguf.runtime.gguf_info import read_gguf

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(.+)\.lora_(A|B)(?:\.default)?\.weight")

#: Settings of PEFT that say what an adapter is, and the values under which it is W + scaling B A. Any other setting that is
#: not in :data:`_WITHOUT_EFFECT` may only be off.
_PLAIN: dict[str, tuple[Any, ...]] = {"peft_type": ("LORA",), "bias": ("none", None)}
#: Values of ``init_lora_weights`` that leave W as it is. By the others (PiSSA, OLoRA, CorDA, LoRA-GA) training began with a
#: part of W moved into B A, or with W quantized (LoftQ): B A is then no difference from the original weights.
_FROM_ORIGINAL = (True, False, None, "gaussian", "eva", "orthogonal")
#: Settings that are honoured here, or say how an adapter was trained or found and not what it computes.
_WITHOUT_EFFECT = frozenset(
    {
        "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights",
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
        "lora_dropout", "eva_config", "corda_config", "loftq_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying",
        "megatron_config", "megatron_core", "runtime_config",
        "task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_version",
    }
)  # fmt: skip
#: What a setting that is off has for a value.
_OFF = (None, False, [], {})


class AdapterError(KurtailError):
    """An adapter that cannot be brought into a rotated basis, or does not belong to the file."""


@dataclass(frozen=True, eq=False, slots=True)
class Adapter:
    """A PEFT adapter.

    Args:
        pairs: A ``[rank, in]`` and B ``[out, rank]``, scaling included, by layer and linear.
    """

    pairs: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]


def convert_lora(
    adapter: Path,
    out: Path,
    file: Path,
    rotations: Path,
    model: str,
    work_dir: Path,
    progress: Progress,
    allow_pickle: bool = False,
) -> int:
    """Write an adapter for a rotated file.

    Args:
        adapter: directory of PEFT's ``adapter_config.json`` and ``adapter_model.safetensors``.
        out: the GGUF adapter to write.
        file: the rotated file that it is for.
        rotations: what ``convert --keep-rotations`` wrote beside that file.
        model: what the file was made of, as ``convert`` took it: its norm gains are folded too.
        work_dir: where a MODEL that is a GGUF file is unpacked to.
        progress: one stage, a unit a linear.
        allow_pickle: whether the model's weights may be ``.bin`` files; an adapter's may not.

    Returns:
        How many linears are adapted.

    Raises:
        KurtailError: rotations of another file, an adapter that is more than W + B A or of another model, an ``out``
            that is one of the files that are read.
    """
    parts = (("ADAPTER", path) for path in (adapter, adapter / _CONFIG, adapter / _WEIGHTS))
    check_apart({"OUT": out}, [*parts, ("--file", file), ("--rotations", rotations), ("--reference", Path(model))])
    info = read_gguf(file)
    provenance = info.provenance
    if provenance is None:
        raise AdapterError(f"{file} has no kurtail keys: load the original adapter with it instead")
    if not provenance.rotations_sha256:
        raise AdapterError(f"{file} does not record what was folded into it: convert the model again")
    kept = load_transforms(rotations)
    if kept.sha256() != provenance.rotations_sha256:
        raise AdapterError(f"{rotations} does not match {file}: give the file that --keep-rotations saved with it")
    checkpoint = open_checkpoint(resolve_source(model, work_dir, progress, allow_pickle), allow_pickle)
    loaded = read_adapter(adapter, checkpoint)
    known, tensors = {tensor.name for tensor in info.tensors}, {}
    with progress.stage("rotate adapter", len(loaded.pairs)) as stage:
        for name, a, b in _folded(loaded, checkpoint, kept):
            if name not in known:
                raise AdapterError(
                    f"{file} has no tensor {name}: it was not converted from {model}; give the right --reference"
                )
            tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = a, b
            stage.advance(1, name)
    with tempfile.TemporaryDirectory(prefix="kurtail-lora-") as directory:
        path = Path(directory) / "adapter.safetensors"
        save_file(tensors, path)
        write_adapter(path, info.architecture, provenance.rotations_sha256, out)
    return len(loaded.pairs)


def _folded(
    adapter: Adapter, checkpoint: Checkpoint, transforms: Transforms
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name in the file, A and B, float32."""
    spec = checkpoint.spec
    cpu = torch.device("cpu")
    r1 = transforms.r1_on(cpu)
    for (layer, linear), (a, b) in sorted(adapter.pairs.items()):
        prefix = spec.layer_prefix(layer)
        norms = {f"{name}.weight": checkpoint.tensor(f"{prefix}{name}.weight") for name in spec.norms}
        gains = {site.norm: gain for site in spec.sites if (gain := spec.gain(site, norms)) is not None}
        a, b = fold_pair(a, b, linear, gains, spec, transforms.layer(layer, r1, cpu))
        name, _ = file_tensor(spec, layer, linear)
        rows = file_rows(spec, linear, b.float().numpy())
        yield name, np.ascontiguousarray(a.float().numpy()), np.ascontiguousarray(rows)


def read_adapter(directory: Path, checkpoint: Checkpoint) -> Adapter:
    """Read a PEFT directory and check it against the model it is for.

    Raises:
        AdapterError: a file that is missing or damaged, a setting or tensor that is more than W + B A, a shape or
            linear that the model does not have.
    """
    config = _read_config(directory / _CONFIG)
    for key, value in config.items():
        if key not in _WITHOUT_EFFECT and value not in _PLAIN.get(key, _OFF):
            raise AdapterError(
                f"{directory / _CONFIG}: {key} {value!r} is not supported, only plain LoRA of linears is: merge the "
                "adapter into the model and convert that"
            )
    if (value := config.get("init_lora_weights")) not in _FROM_ORIGINAL:
        raise AdapterError(
            f"{directory / _CONFIG}: init_lora_weights {value!r} changed the base weights before training, so the adapter "
            "does not fit the model: save it as the difference (PEFT's save_pretrained with "
            "path_initial_model_for_weight_conversion), or merge it into the model and convert that"
        )
    path = directory / _WEIGHTS
    if not path.is_file():
        raise AdapterError(f"{path} is missing: ADAPTER must be a PEFT directory with safetensors weights")
    halves: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():
                match = _NAME.fullmatch(name)
                if match is None:
                    raise AdapterError(
                        f"{path}: tensor {name} is not A or B of a layer's linear and cannot be rotated: train the adapter "
                        "without it"
                    )
                halves.setdefault((int(match[1]), match[2]), {})[match[3]] = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is truncated or not safetensors ({error}): copy it again") from None
    if not halves:
        raise AdapterError(f"{path} contains no tensors")
    return Adapter({key: _pair(path, key, pair, config, checkpoint) for key, pair in halves.items()})


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{path} is missing: ADAPTER must be a PEFT directory") from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} is not readable as JSON: {error}") from None
    if not isinstance(config, dict) or "peft_type" not in config:
        raise AdapterError(f"{path} is not a PEFT configuration: peft_type is missing")
    return config


def _pair(
    path: Path, key: tuple[int, str], pair: dict[str, torch.Tensor], config: dict[str, Any], checkpoint: Checkpoint
) -> tuple[torch.Tensor, torch.Tensor]:
    layer, linear = key
    spec = checkpoint.spec
    where = f"{path}: layer {layer}, {linear}"
    dense = tuple(name for site in (spec.sites[:2] if spec.experts else spec.sites) for name in site.readers)
    if not 0 <= layer < spec.layers or linear not in dense:
        known = ", ".join(dense)
        raise AdapterError(f"{where} cannot be adapted: {checkpoint.directory} has {spec.layers} layers of {known}")
    if pair.keys() != {"A", "B"}:
        raise AdapterError(f"{where} lacks lora_{'B' if 'A' in pair else 'A'}")
    a, b = pair["A"].double(), pair["B"].double()
    rows, columns = spec.linear_shape(linear)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != columns or b.shape[0] != rows or a.shape[0] != b.shape[1]:
        raise AdapterError(f"{where} is {list(b.shape)} times {list(a.shape)}, expected the model's [{rows}, {columns}]")
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise AdapterError(f"{where} contains NaN or infinite weights")
    return a, b * _scaling(path, f"model.layers.{layer}.{linear}", a.shape[0], config)


def _scaling(path: Path, module: str, rank: int, config: dict[str, Any]) -> float:
    """PEFT's factor before B A, which it computes from the rank that the configuration says."""
    told = _by_pattern(config.get("rank_pattern") or {}, module, config.get("r", rank))
    if told != rank:
        raise AdapterError(
            f"{path}: {module} has rank {rank}, but {_CONFIG} has {told!r} (r, rank_pattern): they belong to two adapters; "
            "save it again"
        )
    alpha = _by_pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise AdapterError(f"{path.with_name(_CONFIG)}: lora_alpha {alpha!r} is not a number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: dict[str, Any], module: str, default: Any) -> Any:
    # PEFT matches a key as a whole name or as the end of one after a dot
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default
