"""The calibration tokens' way through layers that are quantized as they pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kurtail_gguf.method.fold.layer import LayerTransforms, fold_layer
from kurtail_gguf.method.quantize import expert_tokens
from kurtail_gguf.method.quantize.quantized_prefix import QuantizedPrefix
from kurtail_gguf.method.rotation.hadamard import random_orthogonal
from kurtail_gguf.model.loading.checkpoint import open_checkpoint
from kurtail_gguf.model.runner import LayerRunner
from kurtail_gguf.model.sites import SITES
from kurtail_gguf.numerics.simulation.attention import CacheSettings, rotated
from kurtail_gguf.numerics.simulation.rounding import round_to
from kurtail_gguf.numerics.simulation.runtime import RuntimeRounding

CPU = torch.device("cpu")
IDS = np.random.default_rng(0).integers(3, 320, (6, 20)).astype(np.int32)
HALVES = CacheSettings(bits=16, rotation=0, rotate_v=False, paired=False)
KINDS = [
    *("llama", "llama-biases", "mistral", "mixtral", "qwen2", "qwen3", "qwen3-moe", "smollm3", "granite", "phi3", "gemma2"),
    *("gemma3", "olmo2", "olmo3", "seed-oss", "exaone4", "glm4", "stablelm", "stablelm-parallel"),
    *("starcoder2", "phi", "cohere2", "ernie4_5", "hunyuan", "nemotron", "ministral3"),
    *("qwen2-moe", "olmoe", "glm4-moe", "ernie4_5-moe", "dots1", "granite-moe", "granite-moe-shared"),
]


def _prefix(checkpoint, rounding, directory) -> QuantizedPrefix:
    table = checkpoint.tensor("model.embed_tokens.weight").float().numpy()
    scale = np.float32(checkpoint.spec.embedding_scale)
    return QuantizedPrefix(checkpoint, IDS, lambda ids: table[ids] * scale, rounding, directory, CPU)


#: A size of its own for each site.
ONLINE = dict(zip(SITES, (64, 32, 16, 8), strict=True))


def _layers(checkpoint, online, scaled=True):
    """Folded layers with all but R1, so that the residual stream stays the checkpoint's own."""
    spec = checkpoint.spec
    rng = np.random.default_rng(1)
    for layer in range(spec.layers):
        diagonals = [site for site in spec.at(layer).sites if (site.norm or site.source) and site.expert is None and scaled]
        r2 = torch.from_numpy(np.stack([random_orthogonal(spec.head_dim, rng) for _ in range(spec.kv_heads)]))
        scales = {site.diagonal: torch.from_numpy(np.exp(0.3 * rng.standard_normal(site.scale_size))) for site in diagonals}
        yield layer, fold_layer(checkpoint.layer(layer), spec.at(layer), LayerTransforms(None, r2, online, scales))


@pytest.mark.parametrize("kind", KINDS)
def test_without_rounding_it_is_the_model(kind, tiny_checkpoint, tmp_path):
    """Activations of 16 bits are halves: the residual stream is transformers' own to that precision."""
    checkpoint = open_checkpoint(tiny_checkpoint(kind))
    prefix = _prefix(checkpoint, RuntimeRounding(16, 64, ONLINE, HALVES), tmp_path)
    runner = LayerRunner(checkpoint, CPU, IDS.shape[1])
    hidden = runner.embed(torch.from_numpy(IDS.astype(np.int64)))
    for layer, folded in _layers(checkpoint, ONLINE):
        prefix.run_layer(layer, folded, lambda names, hessian: {})
        hidden = runner.run(layer, checkpoint.layer(layer), hidden, runner.positions(IDS.shape[1]))
        found = np.load(tmp_path / "prefix-hidden.npy")
        assert np.abs(found - hidden.detach().numpy()).max() < 2e-3 * float(hidden.abs().max())
    prefix.close()
    assert list(tmp_path.glob("prefix-*")) == []


def test_hessians_are_of_the_inputs_that_the_quantized_linears_see(tiny_checkpoint, tmp_path):
    """At each stop Σ w x̂ x̂ᵀ of what transformers' layer, with hooks that round, feeds the linear."""
    checkpoint = open_checkpoint(tiny_checkpoint("llama"))
    family = checkpoint.spec.family
    rounding = RuntimeRounding(4, 64, ONLINE, CacheSettings(bits=4, rotation=0, rotate_v=False, paired=True))
    prefix = _prefix(checkpoint, rounding, tmp_path)
    halved, stops = {}, []

    def quantize(names, hessian):
        stops.append((names, hessian()))
        halved.update({name: folded[f"{name}.weight"].float() * 0.5 for name in names})
        return {name: halved[name] for name in names}

    layer, folded = next(_layers(checkpoint, ONLINE))
    prefix.run_layer(layer, folded, quantize)
    assert [names for names, _ in stops] == [
        family.attention_readers, (family.attention_writer,), family.ffn_readers, (family.ffn_writer,)
    ]  # fmt: skip

    seen = {}
    runner = LayerRunner(checkpoint, CPU, IDS.shape[1], rounding.cache)
    module = runner.module(layer)
    for name in checkpoint.spec.linears:

        def hook(_module, inputs, name=name, size=ONLINE[checkpoint.spec.site_of(name).kind]):
            seen[name] = round_to(rotated(inputs[0], size), 4, 64)
            return (seen[name],)

        module.get_submodule(name).register_forward_pre_hook(hook)
    residual = []
    module.get_submodule(family.ffn_norm).register_forward_pre_hook(lambda _module, inputs: residual.append(inputs[0]))
    weights = {name: value.float() for name, value in folded.items()}
    weights |= {f"{name}.weight": value for name, value in halved.items()}
    start = runner.embed(torch.from_numpy(IDS.astype(np.int64)))
    output = runner.run(layer, weights, start, runner.positions(IDS.shape[1]))
    assert np.allclose(np.load(tmp_path / "prefix-hidden.npy"), output.numpy(), atol=1e-4)
    units = [x / x.square().mean(-1, keepdim=True).sqrt() for x in (start, residual[0])]
    assert prefix.kurtosis == pytest.approx([float((x**4).mean()) for x in units], rel=1e-2)
    eps = checkpoint.spec.eps
    streams = {family.attention_writer: start, family.ffn_writer: residual[0]}
    for names, hessian in stops:
        x = seen[names[0]]
        weight = torch.ones(x.shape[:-1])
        if names[0] in streams:
            weight = 1 / (streams[names[0]].square().mean(-1) + eps)
        expected = torch.einsum("bti,bt,btj->ij", x, weight, x)
        assert (hessian - expected).abs().max() < 1e-3 * expected.abs().max()


def _expert_stops(checkpoint, directory):
    """Of the first layer: names and Hessian of every stop, and how many experts saw too few tokens."""
    prefix, stops = _prefix(checkpoint, RuntimeRounding(16, 64, {}, HALVES), directory), {}
    layer, folded = next(_layers(checkpoint, {}, scaled=False))

    def quantize(names, hessian):
        stops[names] = hessian()
        return {}

    return stops, prefix.run_layer(layer, folded, quantize)


def test_an_expert_is_quantized_on_the_tokens_that_transformers_routes_to_it(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(expert_tokens, "FEWEST_TOKENS", 1)
    checkpoint = open_checkpoint(tiny_checkpoint("qwen3-moe"))
    names = checkpoint.spec.family.experts
    seen = {}
    runner = LayerRunner(checkpoint, CPU, IDS.shape[1])
    block = runner.module(0).mlp
    block.experts.register_forward_pre_hook(lambda _module, inputs: seen.update(x=inputs[0], chosen=inputs[1]))
    start = runner.embed(torch.from_numpy(IDS.astype(np.int64)))
    runner.run(0, checkpoint.layer(0), start, runner.positions(IDS.shape[1]))
    # the folded experts read what the norm gives before its gain
    x = seen["x"] / checkpoint.layer(0)["post_attention_layernorm.weight"]

    stops, starved = _expert_stops(checkpoint, tmp_path)
    assert starved == 0
    for expert in range(checkpoint.spec.experts):
        own = x[(seen["chosen"] == expert).any(-1)]
        found = stops[names.gate.format(expert), names.up.format(expert)]
        assert (found - own.T @ own).abs().max() < 2e-3 * found.abs().max()
        assert stops[(names.down.format(expert),)].shape == (64, 64)


def test_hessians_of_few_tokens_are_filled_up_with_the_mean_of_all(tiny_checkpoint, tmp_path, monkeypatch):
    checkpoint = open_checkpoint(tiny_checkpoint("mixtral"))
    names = checkpoint.spec.family.experts

    def hessians(fewest):
        monkeypatch.setattr(expert_tokens, "FEWEST_TOKENS", fewest)
        stops, starved = _expert_stops(checkpoint, tmp_path)
        gates, downs = ([stops[key] for key in stops if key[0] in wanted] for wanted in (
            {names.gate.format(i) for i in range(4)}, {names.down.format(i) for i in range(4)},
        ))  # fmt: skip
        return gates, downs, starved

    gates, downs, starved = hessians(1)
    # every token has root mean square 1, and goes through two experts
    tokens = [float(own.trace()) / 128 for own in gates]
    assert starved == 0 and sum(tokens) == pytest.approx(2 * IDS.size, rel=1e-2)
    filled, filled_downs, starved = hessians(256)
    assert starved == 4
    everything = sum(gates) / 2
    for own, found, count in zip(gates, filled, tokens, strict=True):
        expected = own + (256 - count) / IDS.size * everything
        assert (found - expected).abs().max() < 2e-2 * expected.abs().max()
        assert float(found.trace()) / 128 == pytest.approx(256, rel=1e-2)
    # of an expert's own tokens there is as much as before
    assert all(torch.linalg.eigvalsh(found - own)[0] > -1e-3 * found.abs().max() for own, found in zip(downs, filled_downs, strict=True))
