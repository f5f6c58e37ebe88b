"""The fold test: a folded model computes the same logits, in float64, for every architecture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.method.fold.layer import LayerTransforms, fold_layer
from kurtail_gguf.method.fold.tables import fold_tables, read_ending, read_head
from kurtail_gguf.method.rotation.hadamard import random_orthogonal
from kurtail_gguf.model.families.registry import FAMILIES
from kurtail_gguf.model.loading.checkpoint import open_checkpoint
from kurtail_gguf.model.loading.experts import module_weights
from kurtail_gguf.model.rope import from_halves
from kurtail_gguf.model.sites import ATTENTION, FFN, FFN_OUTPUT, SITES
from kurtail_gguf.numerics.hadamard import hadamard_size, sylvester, walsh_hadamard_

KINDS = [
    "llama", "llama2", "llama-tied", "llama-biases", "llama3", "mistral", "mixtral", "qwen2", "qwen3", "qwen3-moe", "smollm3",
    "granite", "phi3", "gemma2", "gemma3", "olmo2", "olmo3", "seed-oss", "exaone4", "exaone4-windows", "glm4", "stablelm",
    "stablelm-parallel", "starcoder2", "phi", "cohere2", "ernie4_5", "hunyuan", "nemotron", "ministral3",
    "qwen2-moe", "olmoe", "glm4-moe", "glm4-moe-norms", "ernie4_5-moe", "dots1", "granite-moe", "granite-moe-shared",
]  # fmt: skip
#: Those whose RoPE goes through single precision in transformers.
SINGLE_ROPE = frozenset({"cohere2", "ernie4_5", "ernie4_5-moe"})
IDS = torch.tensor([[1, 5, 17, 300, 42, 42, 7, 99, 250, 3]])


def test_every_supported_architecture_has_a_case(tiny_model):
    assert {type(tiny_model(kind)).__name__ for kind in KINDS} == set(FAMILIES)


def _folded_model(kind, tiny_model, spec, transforms_of):
    """The same architecture with folded weights, its own head, and Hadamard transforms before the linears that want them."""
    model = tiny_model(kind)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # Untie in place: the folded model has the same modules, with weights of its own.
    folded = model
    folded.config.tie_word_embeddings = False
    folded.lm_head.weight = torch.nn.Parameter(folded.lm_head.weight.detach().clone())
    out = {name: tensor.clone() for name, tensor in state.items()}
    for layer in range(spec.layers):
        prefix, own = spec.layer_prefix(layer), spec.at(layer)
        weights = _stored(state, own, prefix)
        assert weights.keys() == own.layer_shapes().keys()
        layer_folded = fold_layer(weights, own, transforms_of(layer))
        for name, tensor in layer_folded.items():
            assert tensor.dtype == torch.float64
            assert tensor.shape == weights[name].shape == own.layer_shapes()[name]
        out |= {prefix + name: tensor for name, tensor in module_weights(own, layer_folded).items()}
    r1, online = transforms_of(0).r1, transforms_of(0).online
    head = state["model.embed_tokens.weight" if spec.tied else "lm_head.weight"]
    out["lm_head.weight"] = head
    if r1 is not None:
        gain = state["model.norm.weight"]
        out["lm_head.weight"] = (head * gain) @ r1
        out["model.norm.weight"] = torch.ones_like(gain)
        out["model.embed_tokens.weight"] = state["model.embed_tokens.weight"] @ r1
    folded.load_state_dict(out)
    for number, layer in enumerate(folded.model.layers):
        own = spec.at(number)
        if own.experts:
            block = layer.get_submodule(own.family.experts.block)
            block.experts = _TransformedExperts(block.experts, online.get(FFN, 1), online.get(FFN_OUTPUT, 1))
        for site in own.sites:
            routed = own.experts and site.kind in (FFN, FFN_OUTPUT)
            for name in _shared_readers(own, site) if routed else site.readers:
                layer.get_submodule(name).register_forward_pre_hook(
                    lambda _module, inputs, n=online.get(site.kind, 1): (_hadamard(inputs[0], n),)
                )
    return folded


def _shared_readers(spec, site):
    """Modules of the expert that all tokens go through that read a site of the FFN."""
    names = spec.family.experts
    if not names.module_shared:
        return set(site.readers).intersection(names.shared)
    return names.module_shared[:1] if site.kind == FFN else names.module_shared[1:]


def _hadamard(x, n):
    return walsh_hadamard_(x.clone(memory_format=torch.contiguous_format), n)


def _stored(state, spec, prefix):
    """A layer of the module's state by the names that the checkpoint has."""
    own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    names = spec.family.experts
    if names is None:
        return own
    width = spec.intermediate_size
    gate_up, down = own.pop(f"{names.block}.experts.gate_up_proj"), own.pop(f"{names.block}.experts.down_proj")
    own[f"{names.router}.weight"] = own.pop(f"{names.module_router}.weight")
    if names.module_shared:
        shared = own.pop(f"{names.module_shared[0]}.weight").chunk(2)
        for name, tensor in zip(names.shared, (*shared, own.pop(f"{names.module_shared[1]}.weight")), strict=True):
            own[f"{name}.weight"] = tensor
    if names.module_choice_bias:
        own[names.choice_bias] = own.pop(names.module_choice_bias)
    for expert in range(spec.experts):
        own[f"{names.gate.format(expert)}.weight"] = gate_up[expert, :width]
        own[f"{names.up.format(expert)}.weight"] = gate_up[expert, width:]
        own[f"{names.down.format(expert)}.weight"] = down[expert]
    return own


class _TransformedExperts(torch.nn.Module):
    """Experts that read what Hadamard matrices of two sizes have transformed, token by token; their router does not."""

    def __init__(self, experts, read, inner):
        super().__init__()
        self._experts, self._read, self._inner = experts, read, inner

    def forward(self, hidden, chosen, shares):
        rows = []
        for x, experts, weights in zip(_hadamard(hidden, self._read), chosen, shares, strict=True):
            gate, up = (self._experts.gate_up_proj[experts] @ x).chunk(2, dim=-1)
            inner = walsh_hadamard_(torch.nn.functional.silu(gate) * up, self._inner)
            rows.append(torch.einsum("eoi,ei,e->o", self._experts.down_proj[experts], inner, weights))
        return torch.stack(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_unchanged(kind, tiny_model, tiny_checkpoint):
    spec = open_checkpoint(tiny_checkpoint(kind)).spec
    rng = np.random.default_rng(3)
    r1 = torch.from_numpy(random_orthogonal(spec.hidden_size, rng))
    if spec.family.kept_in_place:
        with pytest.raises(ValueError, match="R1 cannot be folded"):
            fold_layer(_stored(tiny_model(kind).state_dict(), spec, spec.layer_prefix(0)), spec, LayerTransforms(r1))
        r1 = None
    r2 = [
        torch.from_numpy(np.stack([random_orthogonal(spec.head_dim, rng) for _ in range(spec.kv_heads)]))
        for _ in range(spec.layers)
    ]
    # another size for each site, so that none can stand for another
    limits = dict(zip(SITES, (64, 32, 16, 8), strict=True))
    online = {site.kind: hadamard_size(site.size, limits[site.kind]) for site in spec.sites}
    own = {site.kind for site in spec.sites}
    assert online == {kind: limit for kind, limit in limits.items() if kind in own}
    scales, sites = {}, [site for layer in spec.kinds_of_layers for site in layer.sites if site.norm or site.source]
    for site in sites:
        # of experts a row each
        shape = (site.scale_size,) if site.expert is None else (spec.experts, site.scale_size)
        scales.setdefault(site.diagonal, torch.from_numpy(np.exp(rng.standard_normal(shape))))
    assert {site.kind for site in sites} == own - _without_diagonal(spec)
    parts = {site.diagonal for site in sites if site.part}
    assert parts == ({"ffn-output-experts"} if spec.experts else set()) | ({"ffn-output-shared"} if spec.shared_width else set())

    # both values of a RoPE pair alike; all heads as well where keys are normed one by one
    heads = 1 if spec.family.key_norm and not spec.family.wide_norms else spec.kv_heads
    pairs, others = rng.standard_normal((heads, spec.rotary_dim // 2)), rng.standard_normal((heads, spec.head_dim - spec.rotary_dim))
    keys = torch.from_numpy(np.exp(np.concatenate([np.tile(pairs, 2), others], -1)))
    keys = from_halves(keys, spec).expand(spec.kv_heads, -1)

    def transforms(layer: int) -> LayerTransforms:
        return LayerTransforms(r1, r2[layer], online, scales, keys)

    folded = _folded_model(kind, tiny_model, spec, transforms)
    with torch.no_grad():
        expected = tiny_model(kind)(IDS).logits
        found = folded(IDS).logits
    assert expected.abs().max() > 1
    assert (found - expected).abs().max() < (1e-4 if kind in SINGLE_ROPE else 1e-10)


def _without_diagonal(spec):
    """Sites whose makers take none: what a FFN without a gate reads behind its activation, and so on."""
    family = spec.family
    found = set() if family.gated or family.activation == "relu2" else {FFN_OUTPUT}
    return found | ({ATTENTION} if not family.attention_norm else set()) | ({FFN} if not family.ffn_norm else set())


@pytest.mark.parametrize("kind", ["llama-biases", "qwen2", "phi3", "qwen3-moe", "gemma3"])
def test_gains_alone_are_folded_without_rotations(kind, tiny_model, tiny_checkpoint):
    spec = open_checkpoint(tiny_checkpoint(kind)).spec
    folded = _folded_model(kind, tiny_model, spec, lambda _: LayerTransforms())
    with torch.no_grad():
        assert (folded(IDS).logits - tiny_model(kind)(IDS).logits).abs().max() < 1e-10


def test_r3_leaves_attention_scores_unchanged():
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 5, 64))
    rotated = walsh_hadamard_(q.copy(), 64) @ walsh_hadamard_(k.copy(), 64).T
    assert np.abs(rotated - q @ k.T).max() < 1e-12


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
@pytest.mark.parametrize("rotated", [True, False])
def test_embedding_and_head_are_streamed_in_chunks(kind, rotated, tiny_checkpoint, tmp_path, monkeypatch):
    """A tied head stays tied where nothing is folded into it, and the final norm then keeps its gain."""
    checkpoint = open_checkpoint(tiny_checkpoint(kind))
    r1 = torch.from_numpy(random_orthogonal(checkpoint.spec.hidden_size, np.random.default_rng(0))) if rotated else None
    sizes = []
    rows = type(checkpoint).rows

    def small(self, name):
        for start, piece in rows(self, name, chunk=100):
            sizes.append(len(piece))
            yield start, piece

    monkeypatch.setattr(type(checkpoint), "rows", small)
    (out := tmp_path / "out").mkdir()
    fold_tables(checkpoint, r1, out, NullProgress())
    embedding = checkpoint.tensor("model.embed_tokens.weight").double()
    head, gain = checkpoint.tensor(checkpoint.head_name).double(), checkpoint.tensor("model.norm.weight")
    tables = {"embed_tokens.npy": embedding} | ({} if kind == "llama-tied" and not rotated else {"lm_head.npy": head})
    if rotated:
        tables = {"embed_tokens.npy": embedding @ r1, "lm_head.npy": (head * gain.double()) @ r1}
    assert sizes == [100, 100, 100, 20] * len(tables)
    assert {path.name for path in out.iterdir()} == {*tables, "final.safetensors"}
    for name, expected in tables.items():
        found = np.load(out / name)
        assert found.dtype == np.float32
        assert np.array_equal(found, expected.float().numpy())
    assert torch.equal(load_file(out / "final.safetensors")["model.norm.weight"], torch.ones_like(gain) if rotated else gain)
    assert np.array_equal(read_head(out), np.load(out / [*tables][-1]))
    assert read_ending(out).keys() == {"model.norm.weight"}


def test_r4_is_block_diagonal_hadamard():
    x = np.random.default_rng(0).standard_normal((3, 192))
    blocks = np.kron(np.eye(3), sylvester(64))
    assert np.abs(walsh_hadamard_(x.copy(), 64) - x @ blocks).max() < 1e-12
