"""What a file says of how it was made: the ``kurtail.*`` keys as a frozen dataclass, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from kurtail_gguf import __version__

FORMAT_VERSION = 3
TOOL = f"kurtail-gguf {__version__}"

#: What stock llama.cpp does by itself with q4_0 linears: their inputs are rounded to q8_0, the cache is f16.
STOCK_ACTIVATION_BITS = 8
STOCK_KV_BITS = 16

#: What a file of unquantized weights says of its activations and cache: nothing is rounded but keys and values to halves.
UNROUNDED_BITS = 32
UNROUNDED_KV_BITS = 16


def cached_value_bits(bits: int) -> float:
    """What a cached value takes: 32 values of 4 or 8 bits share a half-precision scale (q4_0, q8_0); 16 is f16."""
    return float(bits) if bits == 16 else bits + 0.5


@dataclass(frozen=True, slots=True)
class Provenance:
    """The ``kurtail.*`` keys of docs/format.md; a field ``r1_kind`` is the key ``kurtail.r1.kind``.

    Kinds are ``none``, ``hadamard``, ``random`` (orthogonal) or ``learned``; a size is 0 where the
    kind is ``none``; the hash of what was folded is empty in a file older than its key. Without calibration the name and
    hash are empty and the tokens 0. Budgets and what was measured are in single precision, as the file has them.
    ``kv_bits`` are the fewest of any layer; ``kv_k_bits`` and ``kv_v_bits`` have a value a layer and are empty in files of
    format 1. ``kv_divergence`` (nats a token) and ``kv_perplexity`` (a ratio) are what the cache alone costs, None where
    that was not measured.
    """

    rotation: str
    objective: str
    weights: str
    tune_steps: int
    seed: int
    r1_kind: str
    r1_size: int
    r2_kind: str
    r2_size: int
    r3_kind: str
    r3_size: int
    r4_kind: str
    r4_size: int
    activation_bits: int
    kv_bits: int
    calibration_name: str
    calibration_tokens: int
    calibration_sha256: str
    target: str = "kurtail"
    activation_choice: str = "fixed"
    activation_budget: float = 0.0
    diagonal: str = "none"
    rotations_sha256: str = ""
    kv_choice: str = "fixed"
    kv_budget: float = 0.0
    kv_k_bits: tuple[int, ...] = ()
    kv_v_bits: tuple[int, ...] = ()
    kv_divergence: float | None = None
    kv_perplexity: float | None = None
    kv_measured_tokens: int | None = None
    format_version: int = FORMAT_VERSION
    tool: str = TOOL

    @property
    def runs_as(self) -> str:
        """Bits of weights, activations and cache; those of the weights where the rest is stock llama.cpp's affair."""
        if self.weights == "f32":
            return "f32" if self.kv_bits == UNROUNDED_KV_BITS else f"f32{self.cache_as}"
        return "stock W4" if self.target == "stock" else f"W4A{self.activation_bits}{self.cache_as}"

    @property
    def cache_as(self) -> str:
        """Bits of the cache: ``KV4``, or ``KV4+8`` where some layers' keys or values have others than the fewest."""
        others = sorted({*self.kv_k_bits, *self.kv_v_bits} - {self.kv_bits})
        return f"KV{self.kv_bits}" + "".join(f"+{bits}" for bits in others)

    @property
    def mean_kv_bits(self) -> float:
        """Bits of a cached value on average, with the half-precision scale that 32 values of 4 or 8 bits share."""
        bits = (*self.kv_k_bits, *self.kv_v_bits) or (self.kv_bits,)
        return sum(map(cached_value_bits, bits)) / len(bits)
