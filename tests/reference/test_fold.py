"""The fold test: a folded model computes the same logits, in float64, for every architecture."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kurtail_gguf.arch.registry import FAMILIES
from kurtail_gguf.fold.layer import LayerRotations, fold_layer
from kurtail_gguf.fold.tables import fold_embedding, fold_head
from kurtail_gguf.formats.hadamard import r4_size, sylvester, walsh_hadamard_
from kurtail_gguf.loading.checkpoint import open_checkpoint
from kurtail_gguf.loading.experts import module_weights
from kurtail_gguf.rotation.hadamard import random_orthogonal

KINDS = [
    "llama", "llama2", "llama-tied", "llama-biases", "llama3", "mistral", "mixtral", "qwen2", "qwen3", "qwen3-moe", "smollm3",
    "granite", "phi3",
]  # fmt: skip
IDS = torch.tensor([[1, 5, 17, 300, 42, 42, 7, 99, 250, 3]])


def test_every_supported_architecture_has_a_case(tiny_model):
    assert {type(tiny_model(kind)).__name__ for kind in KINDS} == set(FAMILIES)


def _folded_model(kind, tiny_model, spec, rotations_of, r4):
    """The same architecture with folded weights, its own head, and R4 online before down_proj."""
    model = tiny_model(kind)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # Untie in place: the folded model has the same modules, with weights of its own.
    folded = model
    folded.config.tie_word_embeddings = False
    folded.lm_head.weight = torch.nn.Parameter(folded.lm_head.weight.detach().clone())
    out = {name: tensor.clone() for name, tensor in state.items()}
    for layer in range(spec.layers):
        prefix = spec.layer_prefix(layer)
        weights = _stored(state, spec, prefix)
        assert weights.keys() == spec.layer_shapes().keys()
        layer_folded = fold_layer(weights, spec, rotations_of(layer))
        for name, tensor in layer_folded.items():
            assert tensor.dtype == torch.float64
            assert tensor.shape == weights[name].shape == spec.layer_shapes()[name]
        out |= {prefix + name: tensor for name, tensor in module_weights(spec, layer_folded).items()}
    r1 = rotations_of(0).r1
    gain = state["model.norm.weight"]
    head = state["model.embed_tokens.weight" if spec.tied else "lm_head.weight"]
    out["lm_head.weight"] = (head * gain) if r1 is None else (head * gain) @ r1
    out["model.norm.weight"] = torch.ones_like(gain)
    if r1 is not None:
        out["model.embed_tokens.weight"] = state["model.embed_tokens.weight"] @ r1
    folded.load_state_dict(out)
    if r4 > 1:
        for layer in folded.model.layers:
            if spec.experts:
                layer.mlp.experts = _RotatedExperts(layer.mlp.experts, r4)
                continue
            layer.mlp.down_proj.register_forward_pre_hook(
                lambda _module, inputs: (walsh_hadamard_(inputs[0].clone(), r4),)
            )
    return folded


def _stored(state, spec, prefix):
    """A layer of the module's state by the names that the checkpoint has."""
    own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    names = spec.family.experts
    if names is None:
        return own
    width = spec.intermediate_size
    gate_up, down = own.pop("mlp.experts.gate_up_proj"), own.pop("mlp.experts.down_proj")
    own[f"{names.router}.weight"] = own.pop("mlp.gate.weight")
    for expert in range(spec.experts):
        own[f"{names.gate.format(expert)}.weight"] = gate_up[expert, :width]
        own[f"{names.up.format(expert)}.weight"] = gate_up[expert, width:]
        own[f"{names.down.format(expert)}.weight"] = down[expert]
    return own


class _RotatedExperts(torch.nn.Module):
    """Experts whose down_proj reads what R4 has rotated, token by token."""

    def __init__(self, experts, r4):
        super().__init__()
        self._experts, self._r4 = experts, r4

    def forward(self, hidden, chosen, shares):
        rows = []
        for x, experts, weights in zip(hidden, chosen, shares, strict=True):
            gate, up = (self._experts.gate_up_proj[experts] @ x).chunk(2, dim=-1)
            inner = walsh_hadamard_(torch.nn.functional.silu(gate) * up, self._r4)
            rows.append(torch.einsum("eoi,ei,e->o", self._experts.down_proj[experts], inner, weights))
        return torch.stack(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_unchanged(kind, tiny_model, tiny_checkpoint):
    spec = open_checkpoint(tiny_checkpoint(kind)).spec
    rng = np.random.default_rng(3)
    r1 = torch.from_numpy(random_orthogonal(spec.hidden_size, rng))
    r2 = [
        torch.from_numpy(np.stack([random_orthogonal(spec.head_dim, rng) for _ in range(spec.kv_heads)]))
        for _ in range(spec.layers)
    ]
    r4 = r4_size(spec.intermediate_size)
    assert r4 == 64

    # of a mixture of experts channels are not scaled
    scale = None if spec.experts else torch.from_numpy(np.exp(rng.standard_normal(spec.intermediate_size)))

    # both values of a RoPE pair alike; all heads as well where keys are normed
    pairs = rng.standard_normal((1 if spec.family.key_norm else spec.kv_heads, spec.head_dim // 2))
    keys = torch.from_numpy(np.exp(np.tile(pairs, 2))).expand(spec.kv_heads, -1)
    assert spec.rotary_dim == spec.head_dim

    def rotations(layer: int) -> LayerRotations:
        return LayerRotations(r1, r2[layer], r4, scale, keys)

    folded = _folded_model(kind, tiny_model, spec, rotations, r4)
    with torch.no_grad():
        expected = tiny_model(kind)(IDS).logits
        found = folded(IDS).logits
    assert expected.abs().max() > 1
    assert (found - expected).abs().max() < 1e-10


@pytest.mark.parametrize("kind", ["llama-biases", "qwen2", "phi3", "qwen3-moe"])
def test_gains_alone_are_folded_without_rotations(kind, tiny_model, tiny_checkpoint):
    spec = open_checkpoint(tiny_checkpoint(kind)).spec
    folded = _folded_model(kind, tiny_model, spec, lambda _: LayerRotations(None, None, 0), 0)
    with torch.no_grad():
        assert (folded(IDS).logits - tiny_model(kind)(IDS).logits).abs().max() < 1e-10


def test_r3_leaves_attention_scores_unchanged():
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 5, 64))
    rotated = walsh_hadamard_(q.copy(), 64) @ walsh_hadamard_(k.copy(), 64).T
    assert np.abs(rotated - q @ k.T).max() < 1e-12


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_embedding_and_head_are_streamed_in_chunks(kind, tiny_checkpoint, tmp_path, monkeypatch):
    checkpoint = open_checkpoint(tiny_checkpoint(kind))
    r1 = torch.from_numpy(random_orthogonal(checkpoint.spec.hidden_size, np.random.default_rng(0)))
    sizes = []
    rows = type(checkpoint).rows

    def small(self, name):
        for start, piece in rows(self, name, chunk=100):
            sizes.append(len(piece))
            yield start, piece

    monkeypatch.setattr(type(checkpoint), "rows", small)
    fold_embedding(checkpoint, r1, tmp_path / "e.npy")
    fold_head(checkpoint, r1, tmp_path / "h.npy")
    assert sizes == [100, 100, 100, 20] * 2
    embedding = checkpoint.tensor("model.embed_tokens.weight").double()
    head = checkpoint.tensor(checkpoint.head_name).double() * checkpoint.tensor("model.norm.weight").double()
    for path, expected in (("e.npy", embedding @ r1), ("h.npy", head @ r1)):
        found = np.load(tmp_path / path)
        assert found.dtype == np.float32
        assert np.array_equal(found, expected.float().numpy())


def test_r4_is_block_diagonal_hadamard():
    x = np.random.default_rng(0).standard_normal((3, 192))
    blocks = np.kron(np.eye(3), sylvester(64))
    assert np.abs(walsh_hadamard_(x.copy(), 64) - x @ blocks).max() < 1e-12
