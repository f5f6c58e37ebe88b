"""What a conversion has to know about a model: who reads and writes the residual stream, and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kurtail_gguf.messages.errors import UnsupportedArchitecture
from kurtail_gguf.model.sites import ATTENTION, ATTENTION_OUTPUT, FFN, FFN_OUTPUT, Site

#: Values in a quantization block: every row length of a block linear is a multiple.
_BLOCK = 64
#: Names that transformers has for x·sigmoid(x), which every family's graph in the runtime computes.
_GATED_BY_SILU = ("silu", "swish")


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Names of a mixture of experts, below ``model.layers.N.``, as the checkpoint has them.

    transformers' own modules keep all experts of a layer in two tensors, whatever the checkpoint does; see
    kurtail_gguf/model/loading/experts.py.

    Args:
        block: the module of router and experts in transformers, ``mlp`` in every family so far.
        router: weight (without a bias) ``[experts, hidden]`` that reads the residual stream; it is not quantized.
        gate, up, down: an expert's linears, with ``{}`` for its number.
        count, used: config keys of how many experts there are, and how many a token goes through.
        width: config key of an expert's inner width.
        required: config key -> values that it must have, and why.
    """

    router: str
    gate: str
    up: str
    down: str
    count: str
    used: str
    width: str
    required: Mapping[str, tuple[tuple[object, ...], str]] | None = None
    block: str = "mlp"


@dataclass(frozen=True, slots=True)
class Family:
    """Names of a decoder family's modules, below ``model.layers.N.``, and the roles they play.

    Args:
        architecture: entry of ``architectures`` in config.json.
        attention_norm, ffn_norm: RMSNorms; their gain is folded into the linears that read them.
        attention_readers, ffn_readers: linears whose input is that norm's output.
        query, key, value: which of the readers are which; the same linear for all three where they are fused, its
            rows in this order.
        up: the FFN reader whose output is multiplied, not put through the activation function; where there is only
            one reader, gate and up are fused, and up's rows are the second half.
        query_norm, key_norm: RMSNorms of each head of q and k before RoPE, which stay as they are; empty for none.
        rope_pairs: whether upstream's converter reorders q and k from halves of RoPE to pairs.
        attention_writer, ffn_writer: linears whose output is added to the residual stream.
        always_biased: linears that have a bias whatever the config says.
        biased_by: config switch -> linears that get a bias by it.
        experts: how the FFN is split into experts, None where it is not; ``ffn_readers``, ``ffn_writer`` and ``up`` are
            then not used.
        embedding_scale, residual_scale, logit_divisor: config keys of what embeddings, everything that is added to
            the residual stream, and (divided by) logits are multiplied by; empty for none. Numbers commute with
            rotations, and the runtime applies them by itself.
        refused: config switches that change the layer in a way that cannot be converted, and why.
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
    query_norm: str = ""
    key_norm: str = ""
    rope_pairs: bool = False
    attention_writer: str = "self_attn.o_proj"
    ffn_writer: str = "mlp.down_proj"
    always_biased: tuple[str, ...] = ()
    biased_by: Mapping[str, tuple[str, ...]] | None = None
    experts: ExpertNames | None = None
    embedding_scale: str = ""
    residual_scale: str = ""
    logit_divisor: str = ""
    refused: Mapping[str, str] | None = None
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    @property
    def fused_attention(self) -> bool:
        """Whether q, k and v are rows of one linear."""
        return self.query == self.value

    def biased(self, config: Mapping[str, Any]) -> frozenset[str]:
        """The linears that have a bias under ``config``."""
        switched = (names for key, names in (self.biased_by or {}).items() if config.get(key))
        return frozenset(self.always_biased).union(*switched)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One checkpoint's sizes, with its family.

    ``value_group`` query heads share each key/value head; ``window`` is the sliding attention window
    in tokens, 0 where attention is full; ``tied`` says that the head is the embedding; RoPE turns the first ``rotary_dim``
    values of a head, halves of which are pairs. With experts
    ``intermediate_size`` is an expert's inner width, ``experts`` how many a layer has and ``experts_used`` how many of
    them a token goes through; both are 0 without.
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
    rotary_dim: int = 0
    experts: int = 0
    experts_used: int = 0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0

    @property
    def value_group(self) -> int:
        return self.heads // self.kv_heads

    def layer_prefix(self, layer: int) -> str:
        """``model.layers.N.``"""
        return f"model.layers.{layer}."

    @property
    def ffn_readers(self) -> tuple[str, ...]:
        """Block linears whose input is the FFN norm's output, those of all experts included."""
        names = self.family.experts
        if names is None:
            return self.family.ffn_readers
        return tuple(name.format(expert) for expert in range(self.experts) for name in (names.gate, names.up))

    @property
    def ffn_writers(self) -> tuple[str, ...]:
        """Block linears that write the FFN's output; one but for experts."""
        names = self.family.experts
        if names is None:
            return (self.family.ffn_writer,)
        return tuple(names.down.format(expert) for expert in range(self.experts))

    @property
    def sites(self) -> tuple[Site, ...]:
        """What the linears of a layer read, in the order the forward pass meets it; experts one after the other."""
        family, names = self.family, self.family.experts
        attended = self.heads * self.head_dim
        first = Site(ATTENTION, family.attention_readers, self.hidden_size, norm=family.attention_norm)
        second = Site(
            ATTENTION_OUTPUT, (family.attention_writer,), attended, source=self.value_rows, groups=self.kv_heads,
            repeats=self.value_group,
        )  # fmt: skip
        third = Site(FFN, self.ffn_readers, self.hidden_size, norm=family.ffn_norm, unrounded=self.unquantized_readers)
        source = self.up_rows if names is None else None
        outputs = (Site(FFN_OUTPUT, (name,), self.intermediate_size, source=source) for name in self.ffn_writers)
        return (first, second, third, *outputs)

    @property
    def linears(self) -> tuple[str, ...]:
        """All block linears of a layer, in the order of :attr:`sites`."""
        return tuple(name for site in self.sites for name in site.readers)

    @property
    def writers(self) -> tuple[str, ...]:
        """Block linears that add to the residual stream."""
        return (self.family.attention_writer, *self.ffn_writers)

    def site(self, kind: str) -> Site:
        """The first site of a kind; of an expert, where every one has its own."""
        return next(site for site in self.sites if site.kind == kind)

    def site_of(self, linear: str) -> Site:
        """The site that a block linear reads.

        Raises:
            KeyError: it is none.
        """
        for site in self.sites:
            if linear in site.readers:
                return site
        raise KeyError(linear)

    @property
    def unquantized_readers(self) -> tuple[str, ...]:
        """What reads the FFN norm's output beside the block linears: the router of a mixture of experts."""
        return () if self.family.experts is None else (self.family.experts.router,)

    @property
    def query_rows(self) -> tuple[str, slice]:
        """The linear that computes queries, and which of its rows do."""
        return self.family.query, slice(0, self.heads * self.head_dim)

    @property
    def key_rows(self) -> tuple[str, slice]:
        """The linear that computes keys, and which of its rows do."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return self.family.key, slice(q, q + kv) if self.family.fused_attention else slice(0, kv)

    @property
    def value_rows(self) -> tuple[str, slice]:
        """The linear that computes values, and which of its rows do."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return self.family.value, slice(q + kv, q + 2 * kv) if self.family.fused_attention else slice(0, kv)

    @property
    def up_rows(self) -> tuple[str, slice]:
        """The linear whose output is multiplied in the FFN, and which of its rows; not with experts."""
        width = self.intermediate_size
        fused = len(self.family.ffn_readers) == 1
        return self.family.up, slice(width, 2 * width) if fused else slice(0, width)

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """``(out_features, in_features)`` of every block linear, in the order of :attr:`linears`."""
        family, q, kv = self.family, self.heads * self.head_dim, self.kv_heads * self.head_dim
        if family.fused_attention:
            rows = {family.query: q + 2 * kv}
        else:
            rows = {family.query: q, family.key: kv, family.value: kv}
        shapes = {name: (rows[name], self.hidden_size) for name in family.attention_readers}
        shapes[family.attention_writer] = (self.hidden_size, q)
        fused = family.experts is None and len(family.ffn_readers) == 1
        width = (2 if fused else 1) * self.intermediate_size
        shapes |= dict.fromkeys(self.ffn_readers, (width, self.hidden_size))
        return shapes | dict.fromkeys(self.ffn_writers, (self.hidden_size, self.intermediate_size))

    def linear_shape(self, name: str) -> tuple[int, int]:
        """One of :meth:`linear_shapes`; who wants many asks there, since each answer is made anew."""
        return self.linear_shapes()[name]

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of a layer, by name below :meth:`layer_prefix`."""
        family = self.family
        shapes: dict[str, tuple[int, ...]] = {
            f"{family.attention_norm}.weight": (self.hidden_size,),
            f"{family.ffn_norm}.weight": (self.hidden_size,),
        }
        shapes |= {f"{name}.weight": (self.head_dim,) for name in (family.query_norm, family.key_norm) if name}
        shapes |= {f"{name}.weight": (self.experts, self.hidden_size) for name in self.unquantized_readers}
        for name, shape in self.linear_shapes().items():
            shapes[f"{name}.weight"] = shape
            if name in self.biased:
                shapes[f"{name}.bias"] = shape[:1]
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
    for key, reason in (family.refused or {}).items():
        if config.get(key):
            raise refuse(key, config[key], reason)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    if heads % kv_heads:
        raise refuse("num_key_value_heads", kv_heads, f"it must divide num_attention_heads {heads}")
    if config.get("hidden_act", "silu") not in _GATED_BY_SILU:
        raise refuse("hidden_act", config["hidden_act"], "the runtime computes silu")
    width = "intermediate_size" if family.experts is None else family.experts.width
    rows = {
        "hidden_size": hidden,
        width: config[width],
        "num_attention_heads x head_dim": heads * head_dim,
    }
    for key, value in rows.items():
        if value % _BLOCK:
            raise refuse(key, value, f"it must be a multiple of {_BLOCK}")
    return ModelSpec(
        family=family,
        layers=config["num_hidden_layers"],
        hidden_size=hidden,
        intermediate_size=config[width],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings")),
        window=_window(config),
        biased=family.biased(config),
        rotary_dim=_rotary_dim(config, head_dim),
        embedding_scale=_number(config, family.embedding_scale),
        residual_scale=_number(config, family.residual_scale),
        logit_divisor=_number(config, family.logit_divisor),
        **_experts(family, config, refuse),
    )


def _experts(family: Family, config: Mapping[str, Any], refuse: Any) -> dict[str, Any]:
    names = family.experts
    if names is None:
        return {}
    for key, (allowed, reason) in (names.required or {}).items():
        if config.get(key) not in allowed:
            raise refuse(key, config.get(key), reason)
    count, used = config[names.count], config[names.used]
    if not 0 < used <= count:
        raise refuse(names.used, used, f"it must be from 1 to {names.count} {count}")
    return {"experts": count, "experts_used": used}


def _rotary_dim(config: Mapping[str, Any], head_dim: int) -> int:
    # transformers 5 keeps it with the other parameters of RoPE
    parameters = config.get("rope_parameters") or {}
    return int(head_dim * float(parameters.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)))


def _number(config: Mapping[str, Any], key: str) -> float:
    return float(config[key]) if key else 1.0


def _window(config: Mapping[str, Any]) -> int:
    # Qwen2 carries a window that is off unless use_sliding_window is set.
    if not config.get("use_sliding_window", True):
        return 0
    return config.get("sliding_window") or 0
