"""The text that a conversion by itself is calibrated on: read, or written by the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from kurtail_gguf.convert.settings import ConvertConfig
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.method.calibration.generate import BATCH, GENERATED_LENGTH, GREEDY_TOKENS
from kurtail_gguf.method.calibration.tokens import read_ids


def calibration_ids(
    config: ConvertConfig, source: Path, model: nn.Module, tokenizer: Any, device: torch.device, progress: Progress
) -> npt.NDArray[np.int32]:
    """Token ids int32 ``[sequences, length]``, as ``--calibration`` asks for.

    Raises:
        CalibrationError: text that cannot be read, is too short, or has tokens that the model does not know.
    """
    if config.calibration == ("self",):
        return _written(model, tokenizer, config.calibration_tokens, config.seed, device, progress)
    rows = model.get_input_embeddings().weight.shape[0]
    return read_ids(config.calibration, tokenizer, rows, source, config.calibration_tokens)


def _written(
    model: nn.Module, tokenizer: Any, n_tokens: int, seed: int, device: torch.device, progress: Progress
) -> npt.NDArray[np.int32]:
    """As :func:`kurtail_gguf.method.calibration.generate.generate`, by the whole model and transformers' cache."""
    generator = torch.Generator().manual_seed(seed)
    special, rows = frozenset(tokenizer.all_special_ids), model.get_input_embeddings().weight.shape[0]
    allowed = torch.tensor([one for one in range(min(rows, len(tokenizer))) if one not in special])
    sequences = -(-n_tokens // GENERATED_LENGTH)
    parts = []
    with progress.stage("generate text", -(-sequences // BATCH) * GENERATED_LENGTH) as stage, torch.no_grad():
        for start in range(0, sequences, BATCH):
            batch = min(BATCH, sequences - start)
            first = allowed[torch.randint(len(allowed), (batch,), generator=generator)]
            bos = [] if tokenizer.bos_token_id is None else [torch.full((batch,), tokenizer.bos_token_id)]
            tokens = [*bos, first]
            ids, past, given = torch.stack(tokens, 1), None, len(tokens)
            while len(tokens) < GENERATED_LENGTH:
                said = model(ids.to(device), past_key_values=past, use_cache=True)
                past, logits = said.past_key_values, said.logits[:, -1].cpu()
                greedy = len(tokens) < given + GREEDY_TOKENS
                weights = torch.softmax(logits.double(), -1)
                drawn = logits.argmax(-1) if greedy else torch.multinomial(weights, 1, generator=generator)[:, 0]
                tokens.append(drawn)
                ids = drawn[:, None]
                stage.advance()
            stage.advance(given)
            parts.append(torch.stack(tokens, 1))
    return torch.cat(parts).numpy().astype(np.int32)
