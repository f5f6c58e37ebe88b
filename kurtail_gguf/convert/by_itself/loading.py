"""transformers' model of a directory, whole and in single precision."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kurtail_gguf.messages.errors import SourceError
from kurtail_gguf.model.families.registry import has_entry
from kurtail_gguf.model.loading import checkpoint
from kurtail_gguf.model.loading.quiet import quiet
from kurtail_gguf.model.loading.untrusted import read_json
from kurtail_gguf.model.loading.weight_files import stamp
from kurtail_gguf.runtime import native

#: The name in upstream's converter of its table of architectures that write text.
_TABLE = "TEXT_MODEL_MAP"


def by_itself(directory: Path) -> bool:
    """Whether an HF directory's architecture is one that no family describes."""
    raw = read_json(directory / "config.json", remedy="MODEL must be a directory that contains config.json")
    architectures, text = raw.get("architectures"), raw.get("text_config")
    if not isinstance(architectures, list) or len(architectures) != 1:
        return False
    return not has_entry(str(architectures[0]), str(text.get("model_type")) if isinstance(text, dict) else "")


def load_config(directory: Path) -> Any:
    """transformers' configuration of an HF directory.

    Raises:
        SourceError: transformers refuses it, or it quantizes already.
    """
    path = directory / "config.json"
    raw = read_json(path, remedy="MODEL must be a directory that contains config.json")
    if raw.get("quantization_config") and not _is_mxfp4(raw):
        raise SourceError(f"{path}: quantization_config cannot be converted: start from the unquantized checkpoint")
    return checkpoint.load_config(directory, raw)


def _is_mxfp4(raw: Mapping[str, Any]) -> bool:
    """Whether a configuration is of 4-bit experts as gpt-oss has them: they are there in no other precision."""
    quantized = raw.get("quantization_config")
    return isinstance(quantized, dict) and quantized.get("quant_method") == "mxfp4"


def load_model(directory: Path, allow_pickle: bool, device: torch.device) -> nn.Module:
    """The model with its weights in float32.

    Raises:
        SourceError: a tensor is missing, or holds NaN or infinite weights.
    """
    from transformers import AutoModelForCausalLM, Mxfp4Config

    quantized = _is_mxfp4(read_json(directory / "config.json", remedy="MODEL must be a directory that contains config.json"))
    try:
        with quiet():
            model, told = AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True,
                use_safetensors=None if allow_pickle else True, **({"quantization_config": Mxfp4Config(dequantize=True)} if quantized else {}),
            )  # fmt: skip
    except Exception as error:  # whatever transformers makes of a damaged checkpoint
        raise SourceError(f"{directory}: transformers cannot load it: {error}") from error
    for kind in ("missing_keys", "mismatched_keys"):
        if found := sorted(map(str, told.get(kind, ()))):
            raise SourceError(f"{directory}: tensor {found[0]} is missing or has another shape ({len(found)} in all)")
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise SourceError(f"{directory}: tensor {name} contains NaN or infinite weights: the checkpoint is damaged")
    # the experts' own loop: each multiplies its tokens by itself (model/products.py)
    model.set_experts_implementation("eager")
    return model.requires_grad_(False).eval().float().to(device)


def fingerprint(directory: Path) -> str:
    """As a checkpoint's, of all weight files that are there."""
    files = sorted((*directory.glob("*.safetensors"), *directory.glob("*.bin")))
    return checkpoint.fingerprint(directory, {path: stamp(path) for path in files})


def upstreams_architectures() -> tuple[str, ...]:
    """The architectures that the pinned upstream's converter has for text."""
    tree = ast.parse((native.python_dir() / "conversion" / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == _TABLE:
            return tuple(ast.literal_eval(node.value))
    raise RuntimeError(f"upstream's converter has no {_TABLE}")
