"""A family of decoders as data: names of modules and the roles they play, one value a family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kurtail_gguf.model.file_form import FileForm
from kurtail_gguf.model.norms import NormForm

#: What upstream's graphs put a gate, or what is read behind a FFN without one, through: names that transformers has for it.
#: "gelu" is the approximation by tanh, "relu2" the square of ReLU.
ACTIVATIONS: Mapping[str, tuple[str, ...]] = {
    "silu": ("silu", "swish"),
    "gelu": ("gelu_pytorch_tanh", "gelu_new"),
    "relu2": ("relu2",),
}


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Names of a mixture of experts, below ``model.layers.N.``, as the checkpoint has them.

    transformers' own modules keep all experts of a layer in two tensors, whatever the checkpoint does; see
    kurtail_gguf/model/loading/experts.py.

    Args:
        block: the module of router and experts in transformers, ``mlp`` in every family so far.
        router: weight (without a bias) ``[experts, hidden]`` that reads the residual stream; it is not quantized.
        module_router: its name in transformers' module.
        gate, up, down: an expert's linears, with ``{}`` for its number.
        count, used: config keys of how many experts there are, and how many a token goes through.
        width: config key of an expert's inner width.
        scores: what the router's outputs go through, over all experts: "softmax" or "sigmoid".
        choice_bias: a tensor ``[experts]`` that is added to scores where experts are chosen, and to no share; empty for none.
        choice_bias_row: whether it is ``[1, experts]``.
        module_choice_bias: its name in transformers' module, where that is another.
        normalized: whether shares of the chosen add up to 1; a config key where that says so.
        share_factor: config key of what shares are multiplied by behind that; empty for none.
        shared: an expert's three linears, gate, up and down, that all tokens go through; empty for none.
        shared_width: its inner width by config, 0 for no such expert.
        module_shared: the two linears that transformers' module has for it, gate above up and down; empty where the names are these.
        fused: what the checkpoint keeps in one tensor, by its name there; see kurtail_gguf/model/loading/fused.py.
        shared_gate: a linear ``[1, hidden]`` without a bias, through whose sigmoid its output is multiplied; it is not quantized.
        dense: says of a config and a layer's number whether that has a FFN without experts, of ``intermediate_size``; None for
            no such layer.
        required: config key -> values that it must have, and why.
    """

    count: str
    width: str
    used: str = "num_experts_per_tok"
    router: str = "mlp.gate"
    gate: str = "mlp.experts.{}.gate_proj"
    up: str = "mlp.experts.{}.up_proj"
    down: str = "mlp.experts.{}.down_proj"
    scores: str = "softmax"
    choice_bias: str = ""
    choice_bias_row: bool = False
    module_choice_bias: str = ""
    normalized: bool | str = True
    share_factor: str = ""
    shared: tuple[str, ...] = ()
    shared_width: Callable[[Mapping[str, Any]], int] | None = None
    module_shared: tuple[str, ...] = ()
    fused: Mapping[str, tuple[str, ...]] | None = None
    shared_gate: str = ""
    dense: Callable[[Mapping[str, Any], int], bool] | None = None
    required: Mapping[str, tuple[tuple[object, ...], str]] | None = None
    block: str = "mlp"
    module_router: str = "mlp.gate"


@dataclass(frozen=True, slots=True)
class Family:
    """Names of a decoder family's modules, below ``model.layers.N.``, and the roles they play.

    Args:
        architecture: entry of ``architectures`` in config.json.
        wrappers: other such entries, of models with images or the like whose text part it is where config.json calls that by
            this ``model_type``.
        norm: what its norms compute.
        attention_norm, ffn_norm: norms of what attention and FFN read; empty where they read the residual stream as it is.
        parallel: the FFN reads what attention reads, and both are added to the residual stream together; ``ffn_norm`` is empty.
        attention_post_norm, ffn_post_norm: norms behind the writers, before their output is added; empty for none.
        attention_readers, ffn_readers: linears that read those inputs.
        query, key, value: which of the readers are which; the same linear for all three where they are fused, its
            rows in this order.
        gated: whether the FFN multiplies ``up`` by a gate that went through the activation function. Without, ``up`` is the
            only reader and goes through it itself.
        up: the FFN reader whose output is multiplied, not put through the activation function; where a gated FFN has only
            one reader, gate and up are fused, and up's rows are the second half.
        activation, activation_key: one of :data:`ACTIVATIONS`, and the config key that names it.
        query_norm, key_norm: norms of q and k, which stay as they are; empty for none.
        wide_norms: whether those are of all heads together, not of each head.
        norms_behind_rope: whether those are behind RoPE, not before it.
        heads_first: whether those see a sequence's heads before its tokens.
        rope_pairs: whether upstream's converter reorders q and k from halves of RoPE to pairs.
        interleaved: whether the checkpoint has pairs of RoPE side by side itself, as the file has them.
        turned: says of a config and a layer's number whether the layer has RoPE; None for all.
        attention_writer, ffn_writer: linears whose output is added to the residual stream.
        always_biased: linears that have a bias whatever the config says.
        biased_by: config switch -> linears that get a bias by it.
        head_bias: whether the output head has one.
        experts: how the FFN is split into experts, None where it is not; ``ffn_readers``, ``ffn_writer`` and ``up`` are
            then not used.
        windows: whether the runtime has the sliding windows of the layers that config.json's ``layer_types`` names.
        window_of: where it has none, which layers transformers gives config.json's ``sliding_window``: "all", "layers" that
            ``layer_types`` names, or none.
        whole_heads: whether upstream's graph knows no head_dim but hidden_size over heads.
        yarn_keys: whether it reads what the file says of YaRN beside factor and context.
        rope_factors: whether upstream's graph reads factors of RoPE's frequencies (Llama 3's scaling, longrope).
        rooted_embedding: whether embeddings are multiplied by the root of ``hidden_size``.
        embedding_scale, residual_scale, logit_divisor, logit_factor: config keys of what embeddings, everything that is added
            to the residual stream, and (divided or multiplied by) logits are multiplied by; empty for none. Numbers commute
            with rotations, and the runtime applies them by itself.
        attention_cap, logit_cap: config keys of c in c tanh(x / c), which attention's scores and logits go through; empty
            for none.
        refused: config switches that change the layer in a way that cannot be converted, and why.
        check: a config key and its value's limit where upstream's graph computes something else; None where it does not.
        variants: config switch -> fields that are others where it is set.
        file_norms: names of norms in the file, between the layer's prefix and their suffix, where upstream has unusual ones.
        file: what is to be known to read a GGUF file of the family as a model; None where such files are those of another.
        embedding, final_norm, head: modules outside the layers.
    """

    architecture: str
    wrappers: Mapping[str, str] | None = None
    norm: NormForm = NormForm()
    attention_norm: str = "input_layernorm"
    ffn_norm: str = "post_attention_layernorm"
    parallel: bool = False
    attention_post_norm: str = ""
    ffn_post_norm: str = ""
    attention_readers: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    ffn_readers: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    gated: bool = True
    up: str = "mlp.up_proj"
    activation: str = "silu"
    activation_key: str = "hidden_act"
    query_norm: str = ""
    key_norm: str = ""
    wide_norms: bool = False
    norms_behind_rope: bool = False
    heads_first: bool = False
    rope_pairs: bool = False
    interleaved: bool = False
    turned: Callable[[Mapping[str, Any], int], bool] | None = None
    attention_writer: str = "self_attn.o_proj"
    ffn_writer: str = "mlp.down_proj"
    always_biased: tuple[str, ...] = ()
    biased_by: Mapping[str, tuple[str, ...]] | None = None
    head_bias: bool = False
    experts: ExpertNames | None = None
    windows: bool = False
    window_of: str = ""
    whole_heads: bool = False
    yarn_keys: bool = False
    rope_factors: bool = False
    rooted_embedding: bool = False
    embedding_scale: str = ""
    residual_scale: str = ""
    logit_divisor: str = ""
    logit_factor: str = ""
    attention_cap: str = ""
    logit_cap: str = ""
    refused: Mapping[str, str] | None = None
    check: Callable[[Mapping[str, Any]], tuple[str, str] | None] | None = None
    variants: Mapping[str, Mapping[str, Any]] | None = None
    file_norms: Mapping[str, str] | None = None
    file: FileForm | None = None
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    @property
    def fused_attention(self) -> bool:
        """Whether q, k and v are rows of one linear."""
        return self.query == self.value

    @property
    def fused_ffn(self) -> bool:
        """Whether gate and up are rows of one linear."""
        return self.gated and self.experts is None and len(self.ffn_readers) == 1

    @property
    def kept_in_place(self) -> str:
        """What stands between the residual stream and its readers or writers that R1 does not commute with; empty for nothing."""
        if self.attention_post_norm or self.ffn_post_norm:
            return "norms after attention and FFN"
        return "norms that subtract the mean" if self.norm.centred else ""

    def biased(self, config: Mapping[str, Any]) -> frozenset[str]:
        """The linears that have a bias under ``config``."""
        switched = (names for key, names in (self.biased_by or {}).items() if config.get(key))
        return frozenset(self.always_biased).union(*switched)
