"""SpinQuant's loss against transformers' own and against a folded, rounded model; its learning on tiny models."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kurtail_gguf.messages.errors import KurtailError, SourceError
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.method.fold.layer import LayerTransforms, fold_layer, fold_reader
from kurtail_gguf.method.rotation import spinquant
from kurtail_gguf.method.rotation.hadamard import random_orthogonal, random_rotation
from kurtail_gguf.method.rotation.spinquant import RotatedNetwork, learn_spinquant
from kurtail_gguf.model.loading.checkpoint import open_checkpoint
from kurtail_gguf.model.sites import FFN_OUTPUT
from kurtail_gguf.numerics.simulation.attention import CacheSettings, rotated, use_simulated_attention
from kurtail_gguf.numerics.simulation.rounding import round_to
from kurtail_gguf.numerics.simulation.runtime import RuntimeRounding
from kurtail_gguf.numerics.simulation.straight_through import round_through

CPU = torch.device("cpu")
KINDS = ["llama", "llama-tied", "llama-biases", "mistral", "qwen2"]
IDS = torch.from_numpy(np.random.default_rng(0).integers(0, 320, (2, 24)))
W4A4KV4 = RuntimeRounding(4, 64, {FFN_OUTPUT: 64}, CacheSettings(bits=4, rotation=0, rotate_v=False, paired=False))


def _rotations(spec, seed: int = 3, make=random_orthogonal) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    r2 = [make(spec.head_dim, rng) for _ in range(spec.layers * spec.kv_heads)]
    shape = (spec.layers, spec.kv_heads, spec.head_dim, spec.head_dim)
    return torch.from_numpy(make(spec.hidden_size, rng)), torch.from_numpy(np.stack(r2).reshape(shape))


def _hadamard(n: int, rng: np.random.Generator) -> np.ndarray:
    return random_rotation(n, rng)[1]


def _as_stored(model):
    """The float64 model with the weights of its float32 checkpoint."""
    model.load_state_dict({name: tensor.float().double() for name, tensor in model.state_dict().items()})
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_without_rounding_it_is_transformers_loss_under_any_rotation(kind, tiny_model, tiny_checkpoint):
    checkpoint = open_checkpoint(tiny_checkpoint(kind))
    network = RotatedNetwork(checkpoint, None, CPU, torch.float64)
    model = _as_stored(tiny_model(kind))
    with torch.no_grad():
        expected = float(model(IDS, labels=IDS).loss)  # transformers takes the cross-entropy in float32
        identity = [torch.eye(matrix.shape[-1]).expand(matrix.shape) for matrix in _rotations(checkpoint.spec)]
        plain = float(network.loss(*identity, IDS))
        turned = float(network.loss(*_rotations(checkpoint.spec), IDS))
    assert plain == pytest.approx(expected, rel=1e-6)
    assert turned == pytest.approx(plain, rel=1e-12)


def test_without_rounding_nothing_is_to_be_learned(tiny_checkpoint):
    """The gradient along every rotation vanishes, in R1 and in each R2."""
    checkpoint = open_checkpoint(tiny_checkpoint("llama"))
    network = RotatedNetwork(checkpoint, None, CPU, torch.float64)
    r1, r2 = (matrix.requires_grad_() for matrix in _rotations(checkpoint.spec))
    network.loss(r1, r2, IDS).backward()
    for rotation in (r1, r2):
        w = rotation.grad @ rotation.mT
        assert (w - w.mT).abs().max() < 1e-12 < 1e-4 < w.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_with_rounding_it_is_the_loss_of_the_folded_model(kind, bits, tiny_model, tiny_checkpoint):
    """Rotations in the weights, one rounding in front of every linear, as the runtime has it."""
    checkpoint = open_checkpoint(tiny_checkpoint(kind))
    spec, prefix = checkpoint.spec, "model.layers.{}.".format
    r3 = 64 if spec.head_dim == 64 else 0
    rounding = RuntimeRounding(bits, 64, {FFN_OUTPUT: 64}, CacheSettings(bits, r3, rotate_v=False, paired=False))
    r1, r2 = _rotations(spec)
    with torch.no_grad():
        found = float(RotatedNetwork(checkpoint, rounding, CPU, torch.float64).loss(r1, r2, IDS))
        exact = float(RotatedNetwork(checkpoint, None, CPU, torch.float64).loss(r1, r2, IDS))

    model = _as_stored(tiny_model(kind))
    gain, head = model.model.norm.weight.detach().clone(), model.lm_head.weight.detach().clone()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(fold_reader(head, gain, r1))
    state = model.state_dict()
    state["model.norm.weight"] = torch.ones_like(gain)
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"] @ r1
    for layer in range(spec.layers):
        weights = {name: state[prefix(layer) + name] for name in spec.layer_shapes()}
        folded = fold_layer(weights, spec, LayerTransforms(r1, r2[layer], {FFN_OUTPUT: 64}))
        state |= {prefix(layer) + name: tensor for name, tensor in folded.items()}
    model.load_state_dict(state)
    model.set_attn_implementation(use_simulated_attention())
    for layer in model.model.layers:
        layer.self_attn.kurtail_cache = rounding.cache
        for name in spec.linears:
            down = name == spec.family.ffn_writer
            layer.get_submodule(name).register_forward_pre_hook(
                lambda _, x, down=down: (round_to(rotated(x[0], 64) if down else x[0], bits, 64).double(),)
            )
    with torch.no_grad():
        expected = float(model(IDS, labels=IDS, use_cache=False).loss)
    # in float64, sums in another order hardly ever flip a rounding; transformers' cross-entropy is float32
    assert abs(found - expected) < 1e-5 < 0.3 * abs(exact - expected)


def test_rounding_passes_gradients_through():
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for bits, block in ((4, 64), (4, 32), (8, 64), (16, 32)):
        rounded = round_through(x, bits, block)
        assert torch.equal(rounded, round_to(x, bits, block))
        assert not torch.equal(rounded, x)
        weights = torch.randn_like(x)
        (gradient,) = torch.autograd.grad((rounded * weights).sum(), x)
        assert torch.equal(gradient, weights)


def test_online_hadamard_has_its_gradient():
    x = torch.randn(2, 3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotated(x, 8), (x,))


def _learned(checkpoint, ids, seed=0, steps=20, progress=None, make=_hadamard):
    start = tuple(matrix.numpy() for matrix in _rotations(checkpoint.spec, 5, make))
    learned = learn_spinquant(checkpoint, ids, start, W4A4KV4, seed, CPU, progress or NullProgress(), steps)
    return start, learned


def test_learning_lowers_the_loss_and_keeps_rotations(tiny_checkpoint, tiny_model, recorder):
    checkpoint = open_checkpoint(tiny_checkpoint("llama-tied"))
    # text of the model's own: any other has a loss that rounding may as well lower
    torch.manual_seed(0)
    starts = torch.tensor([[1, 17], [1, 123]])
    own = tiny_model("llama-tied", dtype=torch.float32).generate(starts, do_sample=True, top_k=0, min_length=96, max_length=96)
    ids = own.numpy().astype(np.int32)
    start, learned = _learned(checkpoint, ids, steps=40, progress=recorder)

    def loss(rotations, rounding) -> float:
        with torch.no_grad():
            network = RotatedNetwork(checkpoint, rounding, CPU)
            return float(network.loss(*map(torch.from_numpy, rotations), torch.from_numpy(ids).long()))

    exact = loss(start, None)
    assert loss(learned, W4A4KV4) - exact < 0.5 * (loss(start, W4A4KV4) - exact)
    for before, after in zip(start, learned, strict=True):
        assert after.shape == before.shape
        assert after.dtype == np.float64
        assert np.abs(after @ after.swapaxes(-1, -2) - np.eye(after.shape[-1])).max() < 1e-11
        assert np.abs(after - before).max() > 1e-3
    assert recorder.stages == [["learn R1 and R2", 40, 40]]


def test_same_seed_same_bytes(tiny_checkpoint):
    checkpoint = open_checkpoint(tiny_checkpoint("qwen2"))
    ids = np.random.default_rng(1).integers(0, 320, (8, 32)).astype(np.int32)
    first, second, other = (
        [matrix.tobytes() for matrix in _learned(checkpoint, ids, seed, steps=4)[1]] for seed in (4, 4, 5)
    )
    assert first == second != other


def test_a_model_that_does_not_fit_is_told_before_it_is_loaded(tiny_checkpoint, monkeypatch):
    checkpoint = open_checkpoint(tiny_checkpoint())
    ids = np.zeros((1, 32), np.int32)
    monkeypatch.setattr(spinquant, "memory_available", lambda device: 900_000)
    with pytest.raises(KurtailError, match=r"whole model in memory.*0\.0 GB free; give --rotation kurtail"):
        _learned(checkpoint, ids)


def test_broken_weights_are_named(tiny_checkpoint):
    from safetensors.torch import load_file, save_file

    directory = tiny_checkpoint()
    tensors = {name: tensor.clone() for name, tensor in load_file(directory / "model.safetensors").items()}
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(SourceError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        _learned(open_checkpoint(directory), np.zeros((1, 32), np.int32))
