"""Quality of a GGUF file: measured by the shipped runtime, cross-checked by a simulation in torch."""

from __future__ import annotations

from kurtail_gguf.evaluate.perplexity import (
    Divergence,
    EvaluationError,
    Perplexity,
    Reference,
    divergence,
    perplexity,
    reference,
)

__all__ = ["Divergence", "EvaluationError", "Perplexity", "Reference", "divergence", "perplexity", "reference"]
