"""Perplexity of a kurtail file by simulation, with llama-perplexity's protocol.

A cross-check of the runtime: the same file, the same tokens, another implementation. It is slow and
holds the whole model in single precision; nothing a user runs depends on it. The tokens are the
runtime's own: transformers' tokenizers made from GGUF files split digits and blanks differently.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kurtail_gguf.check.simulated_model import load_model
from kurtail_gguf.measure.perplexity import Perplexity, reference, scored_losses, scored_tokens
from kurtail_gguf.messages.progress import NullProgress, Progress
from kurtail_gguf.runtime.ggml import GgmlBase
from kurtail_gguf.runtime.gguf_info import GgufInfo, read_gguf

#: The runtime's losses are known up to 16; above they are cut off.
_KNOWN_LOSS = 15.5


@dataclass(frozen=True, slots=True)
class CrossCheck:
    """A file's perplexity by the runtime and by simulation.

    Args:
        runtime: as ``kurtail-gguf eval`` gives it.
        simulated: of the same tokens.
        log_ratio: ln(simulated / runtime), over the tokens whose loss the runtime's file knows.
        log_ratio_stderr: its standard error, from the differences token by token.
    """

    runtime: Perplexity
    simulated: Perplexity
    log_ratio: float
    log_ratio_stderr: float


def cross_check(
    path: Path, text: Path, context: int = 512, chunks: int | None = None, progress: Progress | None = None
) -> CrossCheck:
    """Run a file in the runtime and in the simulation.

    Args:
        path: a kurtail file.
        text: UTF-8 text of at least ``2 * context`` tokens.
        context: tokens in a chunk; the second half of each is scored.
        chunks: how many from the start of the text; all if None.
        progress: a stage for the runtime and one for the simulation, a unit a chunk.

    Raises:
        EvaluationError: the runtime refuses the file, the text is too short.
    """
    progress = progress or NullProgress()
    info = read_gguf(path)
    vocabulary = next(tensor.shape[0] for tensor in info.tensors if tensor.name == "token_embd.weight")
    with reference(path, vocabulary, text, context, chunks, progress) as opened:
        tokens, measured = scored_tokens(opened), scored_losses(opened)
    simulated = chunk_losses(info, tokens, progress).numpy()
    known = measured < _KNOWN_LOSS
    difference = (simulated - measured)[known]
    return CrossCheck(
        runtime=opened.perplexity,
        simulated=_perplexity(simulated),
        log_ratio=float(difference.mean()),
        log_ratio_stderr=float(difference.std() / math.sqrt(difference.size)),
    )


def chunk_losses(info: GgufInfo, tokens: npt.NDArray[np.int32], progress: Progress) -> Tensor:
    """Negative log-likelihoods of the scored tokens.

    Args:
        info: a kurtail file.
        tokens: int32 ``[chunks, context]``.
        progress: one stage, a unit a chunk.

    Returns:
        float64 ``[chunks, context - 1 - context // 2]``.
    """
    ids = torch.from_numpy(tokens.astype(np.int64))
    model = load_model(info, GgmlBase())
    losses = []
    with torch.inference_mode(), progress.stage(f"simulation of {info.path.name}", len(ids)) as stage:
        for chunk in ids:
            losses.append(_losses(model, chunk, _bos(info)))
            stage.advance(1, f"perplexity {math.exp(torch.cat(losses).mean().item()):.4f}")
    return torch.stack(losses)


def _bos(info: GgufInfo) -> int | None:
    # llama-vocab.cpp: the key decides; without it SentencePiece vocabularies add one and BPE ones do not
    adds = info.metadata.get("tokenizer.ggml.add_bos_token", info.metadata["tokenizer.ggml.model"] == "llama")
    return int(info.metadata["tokenizer.ggml.bos_token_id"]) if adds else None


def _losses(model: PreTrainedModel, tokens: Tensor, bos: int | None) -> Tensor:
    """Losses of one chunk's scored tokens, float64 ``[context - 1 - context // 2]``."""
    first = len(tokens) // 2
    ids = tokens.clone()
    if bos is not None:
        # the runtime replaces the first token of each chunk, wherever its vocabulary asks for a BOS
        ids[0] = bos
    hidden = model.model(input_ids=ids[None], use_cache=False).last_hidden_state[0, first:-1]
    return torch.nn.functional.cross_entropy(model.lm_head(hidden).double(), tokens[first + 1 :], reduction="none")


def _perplexity(losses: npt.NDArray[np.float64]) -> Perplexity:
    value = math.exp(losses.mean())
    return Perplexity(value, value * float(losses.std()) / math.sqrt(losses.size - 1))
