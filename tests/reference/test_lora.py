"""Folding W + B A is the same as folding W and the pair by themselves, for every linear of every dense family."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kurtail_gguf.method.fold.layer import LayerTransforms, fold_layer
from kurtail_gguf.method.fold.lora import fold_pair
from kurtail_gguf.method.rotation.hadamard import random_orthogonal
from kurtail_gguf.model.loading.checkpoint import open_checkpoint
from kurtail_gguf.model.sites import SITES


@pytest.mark.parametrize("kind", ["llama-biases", "llama3", "mistral", "qwen3", "phi3", "gemma2", "olmo2", "stablelm", "phi", "nemotron"])
@pytest.mark.parametrize("rotated", [True, False])
def test_the_pair_is_folded_as_the_weight_is(kind, rotated, tiny_checkpoint):
    checkpoint = open_checkpoint(tiny_checkpoint(kind))
    spec = checkpoint.spec
    weights = {name: tensor.double() for name, tensor in checkpoint.layer(0).items()}
    transforms = LayerTransforms()
    if rotated:
        rng = np.random.default_rng(2)
        r2 = np.stack([random_orthogonal(spec.head_dim, rng) for _ in range(spec.kv_heads)])
        scales = {
            site.kind: torch.from_numpy(np.exp(rng.standard_normal(site.scale_size)))
            for site in spec.sites if site.norm or site.source
        }  # fmt: skip
        online = dict(zip(SITES, (64, 32, 16, 8), strict=True))
        r1 = None if spec.family.kept_in_place else torch.from_numpy(random_orthogonal(spec.hidden_size, rng))
        keys = torch.from_numpy(np.exp(rng.standard_normal((spec.kv_heads, spec.head_dim))))
        transforms = LayerTransforms(r1, torch.from_numpy(r2), online, scales, keys)
    gains = {site.norm: gain for site in spec.sites if (gain := spec.gain(site, weights)) is not None}
    plain = fold_layer(weights, spec, transforms)
    generator = torch.Generator().manual_seed(0)
    for linear in spec.linears:
        rows, columns = spec.linear_shape(linear)
        a = torch.randn(3, columns, generator=generator, dtype=torch.float64)
        b = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
        adapted = fold_layer(weights | {f"{linear}.weight": weights[f"{linear}.weight"] + b @ a}, spec, transforms)
        folded_a, folded_b = fold_pair(a, b, linear, gains, spec, transforms)
        assert folded_a.shape == a.shape and folded_b.shape == b.shape
        difference = adapted[f"{linear}.weight"] - plain[f"{linear}.weight"]
        assert difference.abs().max() > 0.1
        assert (difference - folded_b @ folded_a).abs().max() < 1e-10
