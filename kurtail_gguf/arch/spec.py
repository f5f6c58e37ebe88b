"""What a conversion has to know about a model: who reads and writes the residual stream, and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kurtail_gguf.errors import UnsupportedArchitecture

#: Values in a quantization block: every row length of a block linear is a multiple.
_BLOCK = 64


@dataclass(frozen=True, slots=True)
class Family:
    """Names of a decoder family's modules, below ``model.layers.N.``, and the roles they play.

    Args:
        architecture: entry of ``architectures`` in config.json.
        attention_norm, ffn_norm: RMSNorms; their gain is folded into the linears that read them.
        attention_readers, ffn_readers: linears whose input is that norm's output.
        query, key, value: which of the readers are which.
        up: the FFN reader whose output is multiplied, not put through the activation function.
        rope_pairs: whether upstream's converter reorders q and k from halves of RoPE to pairs.
        attention_writer, ffn_writer: linears whose output is added to the residual stream.
        always_biased: linears that have a bias whatever the config says.
        biased_by: config switch -> linears that get a bias by it.
        embedding, final_norm, head: modules outside the layers.
    """

    architecture: str
    attention_norm: str = "input_layernorm"
    ffn_norm: str = "post_attention_layernorm"
    attention_readers: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    ffn_readers: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    up: str = "mlp.up_proj"
    rope_pairs: bool = False
    attention_writer: str = "self_attn.o_proj"
    ffn_writer: str = "mlp.down_proj"
    always_biased: tuple[str, ...] = ()
    biased_by: Mapping[str, tuple[str, ...]] | None = None
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    @property
    def linears(self) -> tuple[str, ...]:
        """All block linears of a layer, in the order the forward pass meets them."""
        return (*self.attention_readers, self.attention_writer, *self.ffn_readers, self.ffn_writer)

    def biased(self, config: Mapping[str, Any]) -> frozenset[str]:
        """The linears that have a bias under ``config``."""
        switched = (names for key, names in (self.biased_by or {}).items() if config.get(key))
        return frozenset(self.always_biased).union(*switched)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One checkpoint's sizes, with its family.

    ``value_group`` query heads share each key/value head; ``window`` is the sliding attention window
    in tokens, 0 where attention is full; ``tied`` says that the head is the embedding.
    """

    family: Family
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    window: int
    biased: frozenset[str]

    @property
    def value_group(self) -> int:
        return self.heads // self.kv_heads

    def layer_prefix(self, layer: int) -> str:
        """``model.layers.N.``"""
        return f"model.layers.{layer}."

    def linear_shape(self, name: str) -> tuple[int, int]:
        """``(out_features, in_features)`` of a block linear."""
        family, q, kv = self.family, self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = {family.query: (q, self.hidden_size), family.attention_writer: (self.hidden_size, q)}
        shapes |= {name: (kv, self.hidden_size) for name in (family.key, family.value)}
        shapes |= {name: (self.intermediate_size, self.hidden_size) for name in family.ffn_readers}
        shapes[family.ffn_writer] = (self.hidden_size, self.intermediate_size)
        return shapes[name]

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of a layer, by name below :meth:`layer_prefix`."""
        family = self.family
        shapes: dict[str, tuple[int, ...]] = {
            f"{family.attention_norm}.weight": (self.hidden_size,),
            f"{family.ffn_norm}.weight": (self.hidden_size,),
        }
        for name in family.linears:
            shapes[f"{name}.weight"] = self.linear_shape(name)
            if name in self.biased:
                shapes[f"{name}.bias"] = self.linear_shape(name)[:1]
        return shapes

    def top_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor outside the layers, by full name; no head where it is tied."""
        family, table = self.family, (self.vocab_size, self.hidden_size)
        shapes: dict[str, tuple[int, ...]] = {
            f"{family.embedding}.weight": table,
            f"{family.final_norm}.weight": (self.hidden_size,),
        }
        if not self.tied:
            shapes[f"{family.head}.weight"] = table
        return shapes


def build_spec(family: Family, config: Mapping[str, Any]) -> ModelSpec:
    """Sizes from a complete config (``AutoConfig…to_dict()``, so that defaults are filled in).

    Raises:
        UnsupportedArchitecture: a feature that cannot be converted exactly, or a row length that is no
            multiple of 64; the message names key, value and limit.
    """
    name = family.architecture

    def refuse(key: str, value: object, limit: str) -> UnsupportedArchitecture:
        return UnsupportedArchitecture(f"{name}: {key} {value} cannot be converted: {limit}")

    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise refuse("quantization_config", method, "start from the unquantized checkpoint")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    if heads % kv_heads:
        raise refuse("num_key_value_heads", kv_heads, f"it must divide num_attention_heads {heads}")
    rows = {
        "hidden_size": hidden,
        "intermediate_size": config["intermediate_size"],
        "num_attention_heads x head_dim": heads * head_dim,
    }
    for key, value in rows.items():
        if value % _BLOCK:
            raise refuse(key, value, f"it must be a multiple of {_BLOCK}")
    return ModelSpec(
        family=family,
        layers=config["num_hidden_layers"],
        hidden_size=hidden,
        intermediate_size=config["intermediate_size"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings")),
        window=_window(config),
        biased=family.biased(config),
    )


def _window(config: Mapping[str, Any]) -> int:
    # Qwen2 carries a window that is off unless use_sliding_window is set.
    if not config.get("use_sliding_window", True):
        return 0
    return config.get("sliding_window") or 0
