"""Products with views of a parameter, experts quantized at theirs, and choices of experts that are ties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts

from kurtail_gguf.convert.by_itself.quantize import Quantizer
from kurtail_gguf.convert.by_itself.routing import follow, replaced
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.model.by_itself import FoundLinear
from kurtail_gguf.model.products import Products
from kurtail_gguf.numerics.formats import kt4
from kurtail_gguf.numerics.simulation.attention import rotated
from kurtail_gguf.numerics.simulation.rounding import round_to

_EXPERTS, _WIDTH, _TOKENS = 4, 64, 300


@pytest.mark.parametrize(
    ("multiply", "transposed", "expert"),
    [
        (lambda x, w: nn.functional.linear(x, w[2]), False, 2),
        (lambda x, w: x @ w[torch.tensor(1)].T, False, 1),
        (lambda x, w: torch.matmul(x, w[3]), True, 3),
        (lambda x, w: torch.addmm(torch.zeros(1), x, w[0]), True, 0),
        (lambda x, w: torch.bmm(x.expand(4, -1, -1), w), True, None),
    ],
)
def test_a_product_with_a_view_is_seen_and_reads_what_it_is_given(multiply, transposed, expert):
    weight, x = nn.Parameter(torch.randn(4, 64, 64)), torch.randn(5, 64)
    seen = []

    def told(product):
        seen.append((product.parameter is weight, product.transposed, product.expert))
        return 2 * product.read

    with torch.no_grad(), Products([weight], told):
        found = multiply(x, weight)
    assert seen == [(True, transposed, expert)]
    torch.testing.assert_close(found, 2 * multiply(x, weight))


def test_products_with_others_and_with_parts_are_left_alone():
    weight, x = nn.Parameter(torch.randn(64, 64)), torch.randn(5, 64)
    with torch.no_grad(), Products([weight], lambda product: pytest.fail("seen")):
        _ = x @ torch.randn(64, 64), nn.functional.linear(x, weight[:32]), torch.matmul(weight[0], x.T)


def _experts(kind: str) -> tuple[nn.Module, bool]:
    if kind == "gpt_oss":
        config = GptOssConfig(hidden_size=_WIDTH, intermediate_size=_WIDTH, num_local_experts=_EXPERTS)
        module, transposed = GptOssExperts(config), True
    else:
        config = MixtralConfig(hidden_size=_WIDTH, intermediate_size=_WIDTH, num_local_experts=_EXPERTS)
        module, transposed = MixtralExperts(config), False
    config._experts_implementation = "eager"
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / _WIDTH**0.5
    return module.requires_grad_(False), transposed


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_each_expert_is_quantized_on_its_own_tokens(kind, tmp_path):
    module, transposed = _experts(kind)
    original = {name: one.clone() for name, one in module.named_parameters()}
    weights = {
        getattr(module, name): FoundLinear(name, rows, _WIDTH, transposed, _EXPERTS)
        for name, rows in (("gate_up_proj", 2 * _WIDTH), ("down_proj", _WIDTH))
    }
    x = torch.randn(_TOKENS, _WIDTH, generator=torch.Generator().manual_seed(2))
    # expert 0 has many tokens, 1 few, 2 those that read nothing but their first half, 3 none
    experts = torch.zeros(_TOKENS, 1, dtype=torch.long)
    experts[260:280], experts[280:] = 1, 2
    shares = torch.ones(_TOKENS, 1)
    with NullProgress().stage("quantize", 8) as stage, torch.no_grad():
        quantizer = Quantizer(tmp_path, weights, {one.name: one.name for one in weights.values()}, 8, stage)
        hook = module.register_forward_pre_hook(quantizer.experts, with_kwargs=True)
        with Products(weights, quantizer.read):
            found = module(x, experts, shares)
        hook.remove()
        written = sorted(path.name for path in tmp_path.iterdir())
        assert written == sorted(f"{name}.{number}.safetensors" for name in ("gate_up_proj", "down_proj") for number in range(_EXPERTS))
        for weight, linear in weights.items():
            for number, matrix in enumerate(linear.matrices(weight)):
                before = linear.matrices(original[linear.name])[number]
                # the weight is the transformed one, in steps of its blocks' scales
                error = (matrix - rotated(before.contiguous(), kt4.BLOCK)).square().mean() / before.square().mean()
                assert 1e-4 < error < 0.02
        # what was read was rounded, and what is answered is near
        exact, _ = _experts(kind)
        expected = exact(x, experts, shares)
    assert 1e-3 < (found - expected).square().mean() / expected.square().mean() < 0.05
    # a second run takes over what is there
    with NullProgress().stage("quantize", 8) as stage, torch.no_grad():
        again, _ = _experts(kind)
        taken = {getattr(again, one.name): one for one in weights.values()}
        quantizer = Quantizer(tmp_path, taken, {one.name: one.name for one in weights.values()}, 8, stage)
        for weight, linear in taken.items():
            quantizer.to_nearest(linear, weight)
        for weight, linear in weights.items():
            torch.testing.assert_close(getattr(again, linear.name), weight)


def test_inputs_of_all_experts_at_once_are_each_ones_own(tmp_path):
    """As Llama 4 has them: the tokens of other experts are zeros."""
    weight = nn.Parameter(torch.randn(2, _WIDTH, _WIDTH), requires_grad=False)
    before, linear = weight.clone(), FoundLinear("up", _WIDTH, _WIDTH, True, 2)
    x = torch.randn(2, _TOKENS, _WIDTH)
    x[0, 100:], x[1, :100] = 0, 0
    with NullProgress().stage("quantize", 2) as stage, torch.no_grad():
        quantizer = Quantizer(tmp_path, {weight: linear}, {"up": "up"}, 8, stage)
        with Products([weight], quantizer.read):
            found = torch.bmm(x, weight)
        read = round_to(rotated(x, kt4.BLOCK), 8, kt4.BLOCK)
        torch.testing.assert_close(found, torch.einsum("etc,ecr->etr", read, weight))
        expected = torch.bmm(x, before)
    assert (found - expected).square().mean() / expected.square().mean() < 0.02
    assert len(list(tmp_path.iterdir())) == 2


def test_ties_are_decided_as_given_and_shares_stay():
    own = torch.tensor([[3, 1], [2, 0], [5, 4]])
    given = torch.tensor([[1, 3], [0, 7], [6, 7]])
    assert replaced(own, given).tolist() == [[3, 1], [7, 0], [6, 7]]


def test_a_model_follows_the_runtimes_choice():
    layer, _ = _experts("mixtral")
    x, shares = torch.randn(3, _WIDTH), torch.tensor([[0.6, 0.4]]).expand(3, 2)
    own = torch.tensor([[0, 1], [2, 3], [1, 2]])
    ranked = np.array([[0, 1, 2, 3], [2, 1, 3, 0], [2, 1, 0, 3]], np.int32)
    given = np.full((3, 2), 0.25, np.float32)
    # one token of three is more than few: transformers' own shares stay
    with follow(nn.ModuleList([layer]), {0: ranked}, {0: given}) as changed:
        found = layer(x, own, shares)
    assert changed == {0: 1}
    torch.testing.assert_close(found, layer(x, torch.tensor([[0, 1], [2, 1], [1, 2]]), shares))


def test_where_few_tokens_are_concerned_shares_are_the_runtimes_too():
    layer, _ = _experts("mixtral")
    x, shares, own = torch.randn(40, _WIDTH), torch.full((40, 2), 0.5), torch.tensor([[0, 1]]).repeat(40, 1)
    ranked, given = np.tile(np.array([[0, 1, 2, 3]], np.int32), (40, 1)), np.full((40, 2), 0.7, np.float32)
    ranked[7] = 2, 0, 1, 3
    with follow(nn.ModuleList([layer]), {0: ranked}, {0: given}) as changed:
        found = layer(x, own, shares)
    assert changed == {0: 1}
    own[7], shares[7] = torch.tensor([2, 0]), 0.7
    torch.testing.assert_close(found, layer(x, own, shares))
