"""A GGUF file to an HF directory, or to what its config.json would say."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kurtail_gguf.messages.errors import SourceError
from kurtail_gguf.model.family import Family
from kurtail_gguf.model.file_form import FileKeys
from kurtail_gguf.model.loading.checkpoint import read_spec
from kurtail_gguf.model.loading.from_gguf.config import file_config, find_file_family
from kurtail_gguf.model.loading.from_gguf.file import SourceFile
from kurtail_gguf.model.loading.from_gguf.rope import FREQUENCIES, LONG, SHORT
from kurtail_gguf.model.loading.from_gguf.weights import Weights
from kurtail_gguf.model.loading.quiet import quiet
from kurtail_gguf.runtime.gguf_info import UNPACKED_KEYS, write_header


def config_of(source: SourceFile) -> tuple[dict[str, Any], Weights]:
    """config.json of a file, and its weights, of which nothing is read yet.

    Raises:
        UnsupportedArchitecture: a family that is not read, or that cannot be converted.
        SourceError: a key or tensor that is missing or would be lost.
    """
    family, config = _described(source)
    with tempfile.TemporaryDirectory(prefix="kurtail-gguf-") as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            _, full, spec = read_spec(Path(scratch))
        except SourceError as error:
            # the directory stands for the file, and is gone when the message is read
            told = str(error).replace(str(Path(scratch) / "config.json"), str(source.path)).replace(scratch, str(source.path))
            raise type(error)(told) from error
    full.architectures, full.dtype = [family.architecture], "float32"
    saved = json.loads(full.to_json_string())
    saved.pop("_name_or_path", None)
    return saved, Weights(source, spec)


def runtime_config(source: SourceFile) -> Any:
    """transformers' config of any file whose family is known, ones that convert wrote among them: nothing but its keys is read."""
    from transformers import AutoConfig

    _, config = _described(source)
    return AutoConfig.for_model(**config)


def unpack(
    source: SourceFile, config: Mapping[str, Any], weights: Weights, target: Path, finished: Callable[[str], None]
) -> None:
    """Write config.json, tokenizer, the file's keys and the weights into an empty directory.

    Args:
        source: the file.
        config, weights: what :func:`config_of` says of it.
        target: the directory.
        finished: called with a few words after the vocabulary, each layer, and what is outside of them.

    Raises:
        SourceError: a vocabulary that transformers has no tokenizer for, or tensors that cannot be read.
    """
    write_header(source.first, target / UNPACKED_KEYS)
    _write_tokenizer(source.path, target)
    finished("vocabulary")
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights.write(target / "model.safetensors", finished)


def _described(source: SourceFile) -> tuple[Family, dict[str, Any]]:
    keys = FileKeys(source.path, source.metadata, {name: tensor.shape for name, tensor in source.tensors.items()})
    family = find_file_family(keys, str(source.metadata["general.architecture"]))
    scaling = [name for name in (FREQUENCIES, LONG, SHORT) if name in keys.shapes]
    readers = source.open() if scaling else {}
    factors = {name: readers[name].values(name).flatten().tolist() for name in scaling}
    return family, file_config(keys, family, source.metadata, factors)


def _write_tokenizer(gguf: Path, target: Path) -> None:
    """What transformers makes of the vocabulary; tokenizes texts here. What is written into files is copied from the keys."""
    from transformers import PreTrainedTokenizerFast

    with quiet():
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(target, gguf_file=UNPACKED_KEYS, local_files_only=True)
            tokenizer.save_pretrained(target)
        except Exception as error:  # transformers raises anything on a vocabulary that it does not know or that is damaged
            reason = str(error).strip().splitlines()
            raise SourceError(
                f"{gguf}: transformers cannot read the vocabulary of this GGUF ({type(error).__name__}: "
                f"{reason[0][:200] if reason else 'no reason given'}): the file is damaged or of an unsupported kind of tokenizer; "
                "convert from the Hugging Face checkpoint instead"
            ) from error
