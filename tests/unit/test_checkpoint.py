"""Reading checkpoints: what is streamed, and one line for everything that is wrong."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kurtail_gguf.messages.errors import KurtailError, SourceError, UnsupportedArchitecture
from kurtail_gguf.model.ending import Ending
from kurtail_gguf.model.families.registry import FAMILIES
from kurtail_gguf.model.loading.checkpoint import open_checkpoint
from kurtail_gguf.model.runner import LayerRunner


def _refused(directory, kind=SourceError) -> str:
    with pytest.raises(kind) as caught:
        open_checkpoint(directory)
    message = str(caught.value)
    assert "\n" not in message
    assert isinstance(caught.value, KurtailError)
    return message


def _edit_config(directory, **changes):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps(config))


def _shard(directory):
    """Split the single file into two shards with an index; returns the shards' paths."""
    single = directory / "model.safetensors"
    tensors = load_file(single)
    names = sorted(tensors)
    shards, weight_map = [], {}
    for part, chosen in enumerate((names[::2], names[1::2])):
        path = directory / f"model-0000{part + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in chosen}, path)
        weight_map |= dict.fromkeys(chosen, path.name)
        shards.append(path)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    single.unlink()
    return shards


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sharded", [False, True])
def test_layers_are_the_models_in_float32(tiny_checkpoint, tiny_model, dtype, sharded):
    directory = tiny_checkpoint("qwen2", dtype=dtype)
    if sharded:
        _shard(directory)
    checkpoint = open_checkpoint(directory)
    state = tiny_model("qwen2", dtype=dtype).state_dict()
    for layer in range(checkpoint.spec.layers):
        weights = checkpoint.layer(layer, check=True)
        prefix = f"model.layers.{layer}."
        assert {prefix + name for name in weights} == {name for name in state if name.startswith(prefix)}
        for name, tensor in weights.items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, state[prefix + name].float())
    rows = torch.cat([piece for _, piece in checkpoint.rows("model.embed_tokens.weight", chunk=77)])
    assert torch.equal(rows, state["model.embed_tokens.weight"].float())


def test_spec_reads_head_dim_before_dividing(tiny_checkpoint):
    spec = open_checkpoint(tiny_checkpoint("mistral")).spec
    assert spec.head_dim == 64 != spec.hidden_size // spec.heads
    assert spec.linear_shape("self_attn.o_proj") == (128, 256)
    assert spec.value_group == 2


def test_biases_are_found(tiny_checkpoint):
    assert len(open_checkpoint(tiny_checkpoint("llama-biases")).spec.biased) == 7
    assert len(open_checkpoint(tiny_checkpoint("qwen2")).spec.biased) == 3
    assert not open_checkpoint(tiny_checkpoint("llama")).spec.biased


def test_no_config(tmp_path):
    assert "config.json does not exist" in _refused(tmp_path)


def test_config_that_is_not_json(tiny_checkpoint):
    directory = tiny_checkpoint()
    (directory / "config.json").write_text("{")
    assert "config.json: not readable as JSON" in _refused(directory)


def test_unknown_architecture_lists_the_supported(tiny_checkpoint):
    directory = tiny_checkpoint()
    _edit_config(directory, architectures=["GPT2LMHeadModel"])
    message = _refused(directory, UnsupportedArchitecture)
    assert "GPT2LMHeadModel" in message
    assert all(name in message for name in FAMILIES)


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("qwen3", {"attention_bias": True}, "attention_bias True"),
        ("qwen3-moe", {"norm_topk_prob": False}, "norm_topk_prob False"),
        ("qwen3-moe", {"mlp_only_layers": [0]}, "mlp_only_layers [0]"),
        ("qwen3-moe", {"num_experts_per_tok": 9}, "num_experts_per_tok 9"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act gelu"),
        ("gemma2", {"hidden_activation": "silu"}, "hidden_activation silu"),
        ("gemma2", {"query_pre_attn_scalar": 32}, "query_pre_attn_scalar 32 is not supported: the runtime has 64"),
        ("gemma3", {"layer_types": ["full_attention"] * 6}, "the runtime computes full attention in one of every 6 layers"),
        ("smollm3", {"mlp_bias": True}, "mlp_bias True"),
    ],
)
def test_what_the_runtime_does_not_compute_is_refused(tiny_checkpoint, kind, changes, told):
    directory = tiny_checkpoint(kind)
    _edit_config(directory, **changes)
    assert told in _refused(directory, UnsupportedArchitecture)


#: What a model that sees calls its text, as transformers saves it today and as it did.
PREFIXES = [("model.language_model.", "lm_head."), ("language_model.model.", "language_model.lm_head.")]


@pytest.mark.parametrize("prefixes", PREFIXES)
def test_the_text_of_a_model_that_sees(tiny_checkpoint, wrap_text, prefixes):
    directory = tiny_checkpoint("gemma3")
    plain = open_checkpoint(directory)
    expected, sizes = {name: tensor.clone() for name, tensor in plain.layer(5).items()}, plain.stored_sizes(5)
    wrap_text(directory, "Gemma3ForConditionalGeneration", "gemma3", prefixes)
    found = open_checkpoint(directory)
    assert (found.spec, found.head_name) == (plain.spec, plain.head_name)
    assert found.config.model_type == "gemma3_text"
    assert found.layer(5).keys() == expected.keys()
    assert all(torch.equal(found.layer(5)[name], tensor) for name, tensor in expected.items())
    assert found.stored_sizes(5) == sizes


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"hidden_size": 100}, "hidden_size 100"),
        ({"intermediate_size": 200}, "intermediate_size 200"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    ],
)
def test_what_cannot_be_exact_is_refused(tiny_checkpoint, changes, word):
    directory = tiny_checkpoint()
    _edit_config(directory, **changes)
    assert word in _refused(directory, SourceError)


def test_missing_shard_is_named(tiny_checkpoint):
    directory = tiny_checkpoint()
    shard = _shard(directory)[1]
    shard.unlink()
    assert f"{shard} is missing" in _refused(directory)


def test_shard_outside_the_directory(tiny_checkpoint):
    directory = tiny_checkpoint()
    _shard(directory)
    index = directory / "model.safetensors.index.json"
    for evil in ("../other.safetensors", "/etc/x.safetensors", "model.bin", 7):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": evil}}))
        assert repr(evil) in _refused(directory)


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
def test_truncated_file_is_named(tiny_checkpoint, keep):
    directory = tiny_checkpoint()
    path = directory / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    assert f"{path} is truncated" in _refused(directory)


def _rewrite(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, path)


def test_missing_tensor_is_named(tiny_checkpoint):
    directory = tiny_checkpoint()
    _rewrite(directory, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    assert "model.layers.1.mlp.up_proj.weight is missing" in _refused(directory)


def test_wrong_shape_is_named_with_both(tiny_checkpoint):
    directory = tiny_checkpoint()
    name = "model.layers.0.self_attn.k_proj.weight"
    _rewrite(directory, lambda t: t.update({name: torch.zeros(32, 128)}))
    message = _refused(directory)
    assert name in message
    assert "[32, 128]" in message
    assert "[64, 128]" in message


def test_unknown_bias_is_not_dropped_in_silence(tiny_checkpoint):
    directory = tiny_checkpoint()
    _rewrite(directory, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(128)}))
    assert "model.layers.0.self_attn.q_proj.bias is unknown" in _refused(directory)


def test_integer_weights_are_refused(tiny_checkpoint):
    directory = tiny_checkpoint()
    name = "model.layers.0.mlp.up_proj.weight"
    _rewrite(directory, lambda t: t.update({name: torch.zeros(192, 128, dtype=torch.int8)}))
    assert "is I8" in _refused(directory)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weights_are_named_when_their_layer_is_loaded(tiny_checkpoint, bad):
    directory = tiny_checkpoint()
    name = "model.layers.1.self_attn.o_proj.weight"
    _rewrite(directory, lambda t: t[name].view(-1)[7].fill_(bad))
    checkpoint = open_checkpoint(directory)
    checkpoint.layer(0, check=True)
    with pytest.raises(SourceError, match="model.layers.1.self_attn.o_proj.weight contains NaN or infinite"):
        checkpoint.layer(1, check=True)


def test_bad_embedding_is_named(tiny_checkpoint):
    directory = tiny_checkpoint()
    _rewrite(directory, lambda t: t["model.embed_tokens.weight"][300, 3].fill_(float("nan")))
    with pytest.raises(SourceError, match="model.embed_tokens.weight contains NaN"):
        list(open_checkpoint(directory).rows("model.embed_tokens.weight"))


def _not_filled(directory, chosen) -> str:
    """What is told of a checkpoint whose ``chosen`` tensors are zeros."""
    _rewrite(directory, lambda tensors: [tensor.zero_() for name, tensor in tensors.items() if chosen(name)])
    checkpoint = open_checkpoint(directory)
    with pytest.raises(SourceError) as caught:
        checkpoint.check_filled()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_a_table_of_zeros_is_refused(tiny_checkpoint, name):
    directory = tiny_checkpoint("llama")
    told = _not_filled(directory, lambda found: found == name)
    assert f"model.safetensors: tensor {name} contains only zeros: download" in told


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_layer_of_zeros_is_refused(tiny_checkpoint, kind):
    directory = tiny_checkpoint(kind)
    told = _not_filled(directory, lambda name: ".layers.1." in name)
    assert "model.safetensors: all of model.layers.1 is zeros: download" in told


@pytest.mark.parametrize("kind", ["llama-biases", "mixtral"])
def test_layers_without_a_linear_are_refused(tiny_checkpoint, kind):
    directory = tiny_checkpoint(kind)
    other = ("norm.weight", "bias", ".gate.weight")
    told = _not_filled(directory, lambda name: ".layers." in name and not name.endswith(other))
    assert "the linears of all 2 layers contain only zeros" in told


def test_zeros_that_models_have_are_not(tiny_checkpoint):
    directory = tiny_checkpoint("llama-biases")

    def zeros(tensors) -> None:
        # rows of padding, biases, and a layer whose linears were all pruned
        tensors["model.embed_tokens.weight"][:319] = 0
        tensors["lm_head.weight"][1:] = 0
        for name, tensor in tensors.items():
            if name.endswith("bias") or (".layers.1." in name and "norm" not in name):
                tensor.zero_()

    _rewrite(directory, zeros)
    checkpoint = open_checkpoint(directory)
    checkpoint.check_filled()
    assert not checkpoint.layer(1, check=True)["mlp.up_proj.weight"].any()


@pytest.mark.parametrize("sharded", [False, True])
def test_a_file_that_changes_while_it_is_read(tiny_checkpoint, sharded):
    directory = tiny_checkpoint()
    path = _shard(directory)[0] if sharded else directory / "model.safetensors"
    checkpoint = open_checkpoint(directory)
    before = checkpoint.fingerprint()
    checkpoint.layer(0)
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(SourceError, match=f"{path} was changed while it was being read"):
        checkpoint.layer(1)
    assert checkpoint.fingerprint() == before


def test_fingerprint_notices_a_changed_shard(tiny_checkpoint):
    directory = tiny_checkpoint()
    before = open_checkpoint(directory).fingerprint()
    assert open_checkpoint(directory).fingerprint() == before
    _rewrite(directory, lambda t: t["model.norm.weight"].fill_(2))
    assert open_checkpoint(directory).fingerprint() != before


def _transformers_logits(directory) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(3, 20)[None]).logits[0]


def _logits(checkpoint) -> torch.Tensor:
    """What we read from a checkpoint, as logits."""
    runner, ids = LayerRunner(checkpoint, torch.device("cpu"), 32), torch.arange(3, 20)
    ending, positions = Ending.of(checkpoint, torch.device("cpu")), runner.positions(len(ids))
    with torch.no_grad():
        hidden = runner.embed(ids)[None]
        for layer in range(checkpoint.spec.layers):
            hidden = runner.run(layer, checkpoint.layer(layer), hidden, positions)
        head = torch.cat([rows for _, rows in checkpoint.rows(checkpoint.head_name)])
        return ending.logits(ending.normed(hidden[0].float()) @ head.T)


def test_a_head_that_config_says_is_the_embedding_but_is_not_counts(tiny_checkpoint):
    directory = tiny_checkpoint("llama-tied")
    generator = torch.Generator().manual_seed(7)
    _rewrite(directory, lambda t: t.update({"lm_head.weight": torch.randn(320, 128, generator=generator) / 4}))
    checkpoint = open_checkpoint(directory)
    assert not checkpoint.spec.tied and checkpoint.head_name == "lm_head.weight"
    assert "tie_word_embeddings is true, but lm_head.weight differs" in checkpoint.notes[0]
    assert torch.allclose(_logits(checkpoint), _transformers_logits(directory), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saved_head_that_is_the_embedding_stays_tied(tiny_checkpoint, dtype):
    directory = tiny_checkpoint("llama-tied")
    _rewrite(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].to(dtype, copy=True)}))
    checkpoint = open_checkpoint(directory)
    assert checkpoint.spec.tied and not checkpoint.notes


def test_a_saved_head_of_another_shape_is_refused(tiny_checkpoint):
    directory = tiny_checkpoint("llama-tied")
    _rewrite(directory, lambda t: t.update({"lm_head.weight": torch.ones(300, 128)}))
    assert "lm_head.weight has shape [300, 128], but config.json requires [320, 128]" in _refused(directory)


def test_a_missing_head_is_told_with_the_switch(tiny_checkpoint):
    directory = tiny_checkpoint("llama")
    _rewrite(directory, lambda t: t.pop("lm_head.weight"))
    assert "lm_head.weight is missing" in _refused(directory) and "set tie_word_embeddings to true" in _refused(directory)


def test_a_bias_of_the_head_is_not_dropped_in_silence(tiny_checkpoint):
    directory = tiny_checkpoint("llama")
    _rewrite(directory, lambda t: t.update({"lm_head.bias": torch.ones(320)}))
    assert "lm_head.bias is unknown" in _refused(directory)


def test_a_single_file_beside_an_index_of_shards_is_refused(tiny_checkpoint):
    directory = tiny_checkpoint()
    single = (directory / "model.safetensors").read_bytes()
    _shard(directory)
    (directory / "model.safetensors").write_bytes(single)
    told = _refused(directory)
    assert "contains model.safetensors and the shards of model.safetensors.index.json" in told and "delete the one" in told


def test_an_index_of_the_single_file_is_read(tiny_checkpoint):
    directory = tiny_checkpoint()
    names = load_file(directory / "model.safetensors")
    weight_map = dict.fromkeys(names, "model.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    open_checkpoint(directory)


def test_an_index_that_leaves_a_tensor_out_is_refused(tiny_checkpoint):
    # of a head, nothing else would notice
    directory = tiny_checkpoint("llama")
    _shard(directory)
    _edit_config(directory, tie_word_embeddings=True)
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(content))
    assert "tensor lm_head.weight is not in model.safetensors.index.json" in _refused(directory)


def test_a_tensor_in_two_shards_is_refused(tiny_checkpoint):
    directory = tiny_checkpoint("llama")
    first, second = _shard(directory)
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: 2 * tensor}, second)
    assert f"tensor {name} is in {first.name} too" in _refused(directory)


@pytest.mark.parametrize(
    "name",
    ["self_attn.rotary_emb.inv_freq", "self_attn.attention_mask", "attention_mask", "attention.bias", "attention.masked_bias"],
)
def test_buffers_of_old_exports_are_no_matter(tiny_checkpoint, name):
    directory = tiny_checkpoint("llama")
    before = _logits(open_checkpoint(directory))
    _rewrite(directory, lambda t: t.update({f"model.layers.0.{name}": torch.ones(8)}))
    assert torch.equal(_logits(open_checkpoint(directory)), before)


def test_double_precision_is_read(tiny_checkpoint):
    directory = tiny_checkpoint("llama")
    before = _logits(open_checkpoint(directory))
    _rewrite(directory, lambda t: t.update({key: value.double() for key, value in t.items()}))
    checkpoint = open_checkpoint(directory)
    assert checkpoint.tensor("model.norm.weight").dtype == torch.float64
    assert torch.equal(_logits(checkpoint), before)
    _rewrite(directory, lambda t: t["model.layers.0.mlp.up_proj.weight"].view(-1)[3].fill_(1e300))
    with pytest.raises(SourceError, match=r"layers\.0\.mlp\.up_proj\.weight contains NaN or infinite"):
        open_checkpoint(directory).layer(0, check=True)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_a_base_model_is_read_as_transformers_reads_it(tiny_checkpoint, kind, sharded):
    directory = tiny_checkpoint(kind)
    before = _logits(open_checkpoint(directory))

    def shorten(tensors) -> None:
        shortened = {name.removeprefix("model."): value for name, value in tensors.items()}
        tensors.clear()
        tensors.update(shortened)

    _rewrite(directory, shorten)
    if sharded:
        _shard(directory)
    assert torch.equal(_logits(open_checkpoint(directory)), before)
    assert torch.allclose(_transformers_logits(directory), before, atol=1e-4)
