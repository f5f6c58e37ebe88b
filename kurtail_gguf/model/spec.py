"""What a conversion has to know about a model: who reads and writes the residual stream, and sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kurtail_gguf.model.family import Family
from kurtail_gguf.model.sites import ATTENTION, ATTENTION_OUTPUT, FFN, FFN_OUTPUT, Branch, Site


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One checkpoint's sizes, with its family.

    ``value_group`` query heads share each key/value head; ``windows`` are the layers' sliding attention windows in tokens, 0
    where attention is full, and empty where it is in all; ``window`` is one that config.json has and the runtime does not, 0
    for none; ``tied`` says that the head is the embedding; RoPE turns the first ``rotary_dim`` values of a head, except in the
    layers ``unturned``; ``eps`` is the norms'. With experts
    ``intermediate_size`` is an expert's inner width, ``experts`` how many a layer has and ``experts_used`` how many of
    them a token goes through; both are 0 without. ``shared_width`` is the inner width of the expert that all tokens go through,
    0 for none. Shares of a token's experts add up to 1 if they are ``normalized``, and are multiplied by ``share_factor``.
    ``dense`` is what the layers ``dense_layers`` are, which have no experts.
    Caps are 0 where there is none.
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
    eps: float
    rotary_dim: int = 0
    windows: tuple[int, ...] = ()
    unturned: frozenset[int] = frozenset()
    experts: int = 0
    experts_used: int = 0
    shared_width: int = 0
    normalized: bool = True
    share_factor: float = 1.0
    dense: ModelSpec | None = None
    dense_layers: frozenset[int] = frozenset()
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    attention_cap: float = 0.0
    logit_cap: float = 0.0

    @property
    def value_group(self) -> int:
        return self.heads // self.kv_heads

    def at(self, layer: int) -> ModelSpec:
        """What a layer is made of: this, or :attr:`dense`."""
        return self.dense if self.dense is not None and layer in self.dense_layers else self

    @property
    def kinds_of_layers(self) -> tuple[ModelSpec, ...]:
        """One for each kind of layers that there is."""
        with_experts = len(self.dense_layers) < self.layers
        return (*((self,) if with_experts else ()), *((self.dense,) if self.dense is not None else ()))

    def layer_prefix(self, layer: int) -> str:
        """``model.layers.N.``"""
        return f"model.layers.{layer}."

    def window_of(self, layer: int) -> int:
        """How many tokens, itself included, a token of a layer attends to; 0 for all before it."""
        return self.windows[layer] if self.windows else 0

    @property
    def norms(self) -> tuple[str, ...]:
        """All norms of a layer that are as wide as the residual stream."""
        family = self.family
        names = (family.attention_norm, family.attention_post_norm, family.ffn_norm, family.ffn_post_norm)
        return tuple(name for name in names if name)

    def head_norm_size(self, name: str) -> int:
        """Values of the gain of q's or k's norm: a head's, or those of all heads together."""
        heads = {self.family.query_norm: self.heads, self.family.key_norm: self.kv_heads}[name]
        return self.head_dim * (heads if self.family.wide_norms else 1)

    def gain(self, site: Site, weights: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """What is folded from a site's norm into its readers, float64 ``[size]``; None for nothing."""
        if not site.norm or site.keeps_gain:
            return None
        return self.family.norm.gain(weights[f"{site.norm}.weight"])

    @property
    def ffn_readers(self) -> tuple[str, ...]:
        """Block linears whose input is the FFN norm's output, those of all experts included."""
        names = self.family.experts
        if names is None:
            return self.family.ffn_readers
        return (*names.shared[:2], *(name.format(expert) for expert in range(self.experts) for name in (names.gate, names.up)))

    @property
    def ffn_writers(self) -> tuple[str, ...]:
        """Block linears that write the FFN's output; one but for experts, of which the one that all tokens go through is first."""
        names = self.family.experts
        if names is None:
            return (self.family.ffn_writer,)
        return (*names.shared[2:], *(names.down.format(expert) for expert in range(self.experts)))

    @property
    def sites(self) -> tuple[Site, ...]:
        """What the linears of a layer read, in the order the forward pass meets it; experts one after the other."""
        family = self.family
        attended = self.heads * self.head_dim
        readers = family.attention_readers + (self.ffn_readers if family.parallel else ())
        first = Site(ATTENTION, readers, self.hidden_size, residual=True, **self._behind(family.attention_norm))
        second = Site(
            ATTENTION_OUTPUT, (family.attention_writer,), attended, source=self.value_rows, groups=self.kv_heads,
            repeats=self.value_group,
        )  # fmt: skip
        if family.parallel:
            return (first, second, *self._ffn_outputs())
        third = Site(
            FFN, self.ffn_readers, self.hidden_size, residual=True, unrounded=self.unquantized_readers,
            **self._behind(family.ffn_norm),
        )  # fmt: skip
        return (first, second, third, *self._ffn_outputs())

    def _ffn_outputs(self) -> Iterator[Site]:
        family, names = self.family, self.family.experts
        if names is None:
            squared = not family.gated and family.activation == "relu2"
            source = self.up_rows if family.gated or squared else None
            yield Site(FFN_OUTPUT, (family.ffn_writer,), self.intermediate_size, source=source, power=2 if squared else 1)
            return
        if names.shared:
            _, up, down = names.shared
            yield Site(FFN_OUTPUT, (down,), self.shared_width, source=(up, slice(0, self.shared_width)), part="shared")
        for expert in range(self.experts):
            source = names.up.format(expert), slice(0, self.intermediate_size)
            down = names.down.format(expert)
            yield Site(FFN_OUTPUT, (down,), self.intermediate_size, source=source, part="experts", expert=expert)

    def _inner_width(self, linear: str) -> int:
        """Of the FFN, or the expert, that a linear is part of."""
        names = self.family.experts
        return self.shared_width if names is not None and linear in names.shared else self.intermediate_size

    def _behind(self, norm: str) -> dict[str, Any]:
        """Of a site that is read from the residual stream, through a norm where there is one."""
        return {"norm": norm, "keeps_gain": bool(norm) and self.family.norm.biased}

    @property
    def residual_sites(self) -> tuple[Site, ...]:
        """Those that are read from the residual stream: one for attention and one for the FFN, or one for both."""
        return tuple(site for site in self.sites if site.residual)

    @property
    def branches(self) -> tuple[Branch, ...]:
        """Attention and the FFN; of a mixture of experts without its output's sites, which are the experts' own."""
        family = self.family
        entries = self.residual_sites
        outputs = self.site(ATTENTION_OUTPUT), None if family.experts else self.site(FFN_OUTPUT)
        posts = family.attention_post_norm, family.ffn_post_norm
        return tuple(map(Branch, (entries[0], entries[-1]), outputs, posts))

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

    @property
    def expert_linears(self) -> frozenset[str]:
        """Block linears of the experts that tokens are routed to."""
        names = self.family.experts
        return frozenset() if names is None else frozenset((*self.ffn_readers, *self.ffn_writers)).difference(names.shared)

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
        """What reads the FFN norm's output beside the block linears: the router of a mixture of experts, a gate of all its tokens."""
        names = self.family.experts
        return () if names is None else tuple(name for name in (names.router, names.shared_gate) if name)

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
        return self.family.up, slice(width, 2 * width) if self.family.fused_ffn else slice(0, width)

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """``(out_features, in_features)`` of every block linear, in the order of :attr:`linears`."""
        family, q, kv = self.family, self.heads * self.head_dim, self.kv_heads * self.head_dim
        if family.fused_attention:
            rows = {family.query: q + 2 * kv}
        else:
            rows = {family.query: q, family.key: kv, family.value: kv}
        shapes = {name: (rows[name], self.hidden_size) for name in family.attention_readers}
        shapes[family.attention_writer] = (self.hidden_size, q)
        fused = 2 if family.fused_ffn else 1
        shapes |= {name: (fused * self._inner_width(name), self.hidden_size) for name in self.ffn_readers}
        return shapes | {name: (self.hidden_size, self._inner_width(name)) for name in self.ffn_writers}

    def linear_shape(self, name: str) -> tuple[int, int]:
        """One of :meth:`linear_shapes`; who wants many asks there, since each answer is made anew."""
        return self.linear_shapes()[name]

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of a layer, by name below :meth:`layer_prefix`."""
        family = self.family
        kinds = ("weight", "bias") if family.norm.biased else ("weight",)
        shapes: dict[str, tuple[int, ...]] = {f"{name}.{kind}": (self.hidden_size,) for name in self.norms for kind in kinds}
        shapes |= {f"{name}.weight": (self.head_norm_size(name),) for name in (family.query_norm, family.key_norm) if name}
        names = family.experts
        rows = () if names is None else (self.experts, 1)
        shapes |= {f"{name}.weight": (n, self.hidden_size) for name, n in zip(self.unquantized_readers, rows, strict=False)}
        if names is not None and names.choice_bias:
            shapes[names.choice_bias] = (1, self.experts) if names.choice_bias_row else (self.experts,)
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
        if family.norm.biased:
            shapes[f"{family.final_norm}.bias"] = (self.hidden_size,)
        if not self.tied:
            shapes[f"{family.head}.weight"] = table
        if family.head_bias:
            shapes[f"{family.head}.bias"] = table[:1]
        return shapes

    @property
    def ending(self) -> tuple[str, ...]:
        """Full names of the tensors between the last layer and the logits, but for the head's rows: the final norm, biases."""
        ours = (f"{self.family.final_norm}.", f"{self.family.head}.bias")
        return tuple(name for name in self.top_shapes() if name.startswith(ours))
