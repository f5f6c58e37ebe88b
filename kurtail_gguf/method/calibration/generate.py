"""Calibration text that the model writes itself, so that nothing needs downloading.

As LLM-QAT generates its data (Liu et al. 2023, arXiv:2305.17888, section 3.1): from a random first
token, the next few tokens greedily, the rest sampled from the model's distribution.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.model.ending import Ending
from kurtail_gguf.model.loading.checkpoint import Checkpoint
from kurtail_gguf.model.loading.prefetch import layer_stream
from kurtail_gguf.model.precision import forward_dtype
from kurtail_gguf.model.runner import LayerRunner

#: Tokens in a generated sequence.
GENERATED_LENGTH = 256
#: Greedy tokens after the random one: they settle on a language and a topic.
GREEDY_TOKENS = 3
#: Most sequences generated together; their KV cache is what bounds it.
BATCH = 32


class _LayerCache:
    """Keys and values of one layer in place, in transformers' cache protocol (``update``)."""

    def __init__(self, batch: int, heads: int, length: int, head_dim: int, device: torch.device) -> None:
        self._keys = torch.empty(batch, heads, length, head_dim, device=device)
        self._values = torch.empty_like(self._keys)
        self._filled = 0

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        end = self._filled + keys.shape[2]
        self._keys[:, :, self._filled : end] = keys
        self._values[:, :, self._filled : end] = values
        self._filled = end
        return self._keys[:, :, :end], self._values[:, :, :end]


def generate(
    checkpoint: Checkpoint,
    n_tokens: int,
    bos: int | None,
    forbidden: frozenset[int],
    seed: int,
    device: torch.device,
    progress: Progress,
    length: int = GENERATED_LENGTH,
) -> npt.NDArray[np.int32]:
    """Sample token sequences from the model, streaming its layers once a token.

    Args:
        checkpoint: the model.
        n_tokens: tokens wanted, rounded up to whole sequences.
        bos: first token of every sequence; None where the model has none.
        forbidden: ids never chosen as the random first token (special tokens).
        seed: seed of the first tokens and of the sampling.
        device: where the layers are computed.
        progress: advanced once a token position.
        length: tokens in a sequence.

    Returns:
        int32 ``[ceil(n_tokens / length), length]``.
    """
    sequences = -(-n_tokens // length)
    batches = [min(BATCH, sequences - start) for start in range(0, sequences, BATCH)]
    generator = torch.Generator().manual_seed(seed)
    runner = LayerRunner(checkpoint, device, length, multiplied_in=forward_dtype(device))
    allowed = torch.tensor([i for i in range(checkpoint.spec.vocab_size) if i not in forbidden])
    parts = []
    with progress.stage("generate text", len(batches) * length) as stage, torch.inference_mode():
        for batch in batches:
            first = allowed[torch.randint(len(allowed), (batch,), generator=generator)]
            prompt = [torch.full((batch,), bos)] if bos is not None else []
            every = [*range(checkpoint.spec.layers)] * (length - 1)
            with layer_stream(checkpoint, every, device, dtype_of=runner.dtype_of) as layers:
                parts.append(_sample(checkpoint, runner, layers, [*prompt, first], length, generator, device, stage))
    return torch.cat(parts).numpy().astype(np.int32)


def _sample(checkpoint, runner, layers, prompt, length, generator, device, stage) -> torch.Tensor:
    """One batch, int64 ``[batch, length]``, that starts with the tokens of ``prompt`` (``[batch]`` each).

    ``layers`` gives the tensors of all layers once for every position but the last.
    """
    spec = checkpoint.spec
    batch = len(prompt[0])
    caches = [
        _LayerCache(batch, spec.kv_heads, length, spec.head_dim, device) for _ in range(spec.layers)
    ]
    head = checkpoint.tensor(checkpoint.head_name).to(device=device, dtype=torch.float32)
    ending = Ending.of(checkpoint, device)
    tokens = list(prompt)
    for position in range(length - 1):
        hidden = runner.embed(tokens[position])[:, None]
        positions = runner.positions(position, 1)
        for layer, cache in enumerate(caches):
            hidden = runner.run(layer, next(layers), hidden, positions, cache)
        stage.advance()
        if position + 1 < len(tokens):
            continue
        logits = ending.logits(ending.normed(hidden[:, 0]) @ head.T)
        greedy = position + 1 < len(prompt) + GREEDY_TOKENS
        tokens.append(logits.argmax(-1).cpu() if greedy else _draw(logits, generator))
    stage.advance()
    return torch.stack(tokens, dim=1)


def _draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Sample at temperature 1, int64 ``[batch]``, on the CPU: the same draw on every device."""
    probabilities = torch.softmax(logits.cpu().double(), dim=-1)
    # Inverse transform with one number a sequence: multinomial would draw one for each word.
    points = torch.rand(len(probabilities), 1, dtype=torch.float64, generator=generator)
    drawn = torch.searchsorted(probabilities.cumsum(-1), points)[:, 0]
    return drawn.clamp_max(probabilities.shape[-1] - 1)
