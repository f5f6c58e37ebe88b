"""Texts, tokens, generated text and captured activations."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from kurtail_gguf.messages.errors import CalibrationError, SourceError
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.method.calibration.capture import capture, choose_tokens
from kurtail_gguf.method.calibration.prose import PROSE, TOKENS, prose_contexts
from kurtail_gguf.method.calibration.texts import read_texts
from kurtail_gguf.method.calibration.tokens import (
    CalibrationTokens,
    as_contexts,
    calibration_name,
    cut_sequences,
    load_tokenizer,
    tokenize,
)  # fmt: skip
from kurtail_gguf.model.loading.checkpoint import open_checkpoint
from kurtail_gguf.model.runner import LayerRunner
from kurtail_gguf.numerics.simulation.attention import CacheSettings

CPU = torch.device("cpu")


def test_text_and_jsonl(tmp_path):
    (tmp_path / "a.txt").write_text("eins\nzwei", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "drei"}\n\n{"text": "vier", "id": 1}\n', encoding="utf-8")
    found = read_texts((str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")))
    assert list(found) == ["eins\nzwei", "drei", "vier"]


def test_contexts_begin_with_bos_where_the_tokenizer_puts_it_there(tiny_checkpoint):
    tokenizer = load_tokenizer(tiny_checkpoint("llama"))
    ids = tokenize(["one two three four " * 100], tokenizer, 64)[:, :64]
    assert (ids[:, 0] == tokenizer.bos_token_id).all()
    assert np.array_equal(as_contexts(ids, tokenizer), ids[:, 1:])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    assert as_contexts(ids, tokenizer) is ids
    tokenizer.bos_token = None
    assert as_contexts(ids, tokenizer) is ids


@pytest.mark.parametrize("bos", [False, True])
def test_prose_is_read_in_contexts_that_begin_differently(bos, tiny_checkpoint):
    tokenizer = load_tokenizer(tiny_checkpoint("llama"))
    if bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    text = tokenizer.encode(PROSE, add_special_tokens=False)[: TOKENS - 1]
    found = prose_contexts(tokenizer).tolist()
    assert len(found) == 8
    assert all((row[0] == tokenizer.bos_token_id) == bos for row in found)
    rows = [row[bos:] for row in found]
    assert rows[:4] == [text[start : start + 124] for start in range(4)]
    assert rows[4:] == [text[127 + start : 127 + start + 124] for start in range(4)]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_jsonl_line_ends_at_a_line_feed_only(tmp_path, end):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in ("a\u2028b", "c\u2029d\u0085e")]
    path.write_bytes(b"".join(line.encode() + end for line in lines))
    assert list(read_texts((str(path),))) == ["a\u2028b", "c\u2029d\u0085e"]
    path.write_bytes(path.read_bytes() + b"[]" + end)
    with pytest.raises(CalibrationError, match="a.jsonl:3: not a JSON object"):
        list(read_texts((str(path),)))


def test_names_carry_no_directories():
    assert calibration_name(("self",)) == "self"
    assert calibration_name(("/a/b/c4.txt", "hf:allenai/c4:en")) == "c4.txt,hf:allenai/c4:en"
    assert calibration_name(("/a/b/",)) == "b"


@pytest.mark.parametrize("bos", [None, 1])
def test_sequences_are_the_joined_documents(bos):
    documents = [np.arange(i * 100, i * 100 + 7, dtype=np.int32) for i in range(100)]
    ids = cut_sequences(documents, 60, bos, seq_len=16)
    assert ids.shape == (4, 16)
    assert ids.dtype == np.int32
    body = ids if bos is None else ids[:, 1:]
    assert np.array_equal(body.ravel(), np.concatenate(documents)[: body.size])
    assert bos is None or (ids[:, 0] == bos).all()


@pytest.mark.parametrize(("at_most", "sequences"), [(0, 2), (40, 2), (96, 3), (1000, 6)])
def test_more_than_is_needed_is_taken_where_there_is_more(at_most, sequences):
    documents = [np.arange(200, dtype=np.int32)]
    ids = cut_sequences(documents, 64, None, seq_len=32, at_most=at_most)
    assert np.array_equal(ids.ravel(), np.arange(32 * sequences))


def test_the_first_tokens_are_whole_sequences():
    tokens = CalibrationTokens(np.arange(96, dtype=np.int32).reshape(3, 32), "a.txt")
    assert np.array_equal(tokens.first(33).ids, tokens.ids[:2])
    assert (tokens.first(1000).ids.shape, tokens.first(1).name) == ((3, 32), "a.txt")


def test_only_as_many_documents_are_taken_as_needed():
    taken = []

    def documents():
        for i in range(1000):
            taken.append(i)
            yield np.zeros(10, np.int32)

    cut_sequences(documents(), 64, None, seq_len=32)
    assert len(taken) == 7


def test_short_text_says_both_counts_and_the_remedy():
    with pytest.raises(CalibrationError, match="has 10 tokens, but 1022 are needed.*--calibration-tokens"):
        cut_sequences([np.zeros(10, np.int32)], 1024, 1)


def test_tokenize_uses_the_checkpoints_tokenizer(tiny_checkpoint):
    tokenizer = load_tokenizer(tiny_checkpoint())
    ids = tokenize(iter(["hello " * 400]), tokenizer, 1024)
    assert ids.shape == (2, 512)
    assert (ids[:, 0] == 1).all()
    assert tokenizer.decode(ids[0, 1:13]) == "hello hello "


@pytest.mark.parametrize("fast", [True, False])
def test_a_text_longer_than_the_context_is_no_warning(tiny_checkpoint, tmp_path, monkeypatch, fast):
    from transformers import ByT5Tokenizer, tokenization_utils_base

    if fast:
        directory = tiny_checkpoint()
    else:
        directory = tmp_path / "bytes"
        ByT5Tokenizer(bos_token="<s>").save_pretrained(directory)
    settings = directory / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 64}))
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.is_fast, tokenizer.model_max_length) == (fast, 64)
    told = []
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", told.append)
    tokenize(iter(["hello " * 400]), tokenizer, 1024)
    assert told == []


def test_missing_tokenizer_names_the_directory(tiny_checkpoint):
    directory = tiny_checkpoint()
    for path in directory.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(SourceError, match=r"contains no tokenizer \(none of tokenizer.json, tokenizer.model"):
        load_tokenizer(directory)


def test_hash_is_of_little_endian_int32():
    ids = np.array([[1, 2, 258]], np.int32)
    data = bytes([1, 0, 0, 0, 2, 0, 0, 0, 2, 1, 0, 0])
    assert CalibrationTokens(ids, "x").sha256 == hashlib.sha256(data).hexdigest()


@pytest.fixture
def ids():
    return np.random.default_rng(0).integers(3, 250, (6, 24)).astype(np.int32)


@pytest.mark.parametrize("kind", ["llama", "llama-biases", "mistral", "qwen2"])
def test_captured_activations_are_the_models(tiny_checkpoint, tiny_model, tmp_path, ids, kind, recorder):
    checkpoint = open_checkpoint(tiny_checkpoint(kind))
    seen = capture(checkpoint, ids, tmp_path, 0, CPU, recorder)
    model = tiny_model(kind, dtype=torch.float32)
    inputs = {}
    for layer, module in enumerate(model.model.layers):
        for site, norm in (("attention", module.input_layernorm), ("ffn", module.post_attention_layernorm)):
            norm.register_forward_pre_hook(
                lambda _m, args, key=(layer, site): inputs.__setitem__(key, args[0])
            )
        module.self_attn.v_proj.register_forward_hook(
            lambda _m, _a, out, key=(layer, "value"): inputs.__setitem__(key, out)
        )
        for site, writer in (("attention-output", module.self_attn.o_proj), ("ffn-output", module.mlp.down_proj)):
            writer.register_forward_pre_hook(lambda _m, args, key=(layer, site): inputs.__setitem__(key, args[0]))
    with torch.no_grad():
        model(torch.from_numpy(ids.astype(np.int64)))
    for layer in range(2):
        for site in ("attention", "ffn"):
            x = inputs[layer, site].reshape(ids.size, -1)
            expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps)
            found = torch.from_numpy(seen.site(layer, site).astype(np.float32))
            assert (found - expected).abs().max() < 0.01  # stored as halves
            assert torch.allclose(found.square().mean(-1), torch.ones(ids.size), atol=1e-2)
            assert np.abs(seen.channels(layer, site) / expected.square().mean(0).sqrt().numpy() - 1).max() < 1e-4
        for site, norm, name in (
            ("attention-output", "attention", "self_attn.o_proj"), ("ffn-output", "ffn", "mlp.down_proj")
        ):  # fmt: skip
            # what a writer adds counts by the residual stream's size there
            importance = 1 / (inputs[layer, norm].square().mean(-1, keepdim=True) + model.config.rms_norm_eps)
            expected = (inputs[layer, site].square() * importance).flatten(0, 1).mean(0).sqrt()
            assert np.abs(seen.channels(layer, site) / expected.numpy() - 1).max() < 1e-4
            columns = model.model.layers[layer].get_submodule(name).weight.norm(dim=0)
            assert np.abs(seen.columns(layer, site) / columns.detach().numpy() - 1).max() < 1e-5
        values = inputs[layer, "value"].reshape(ids.size, 2, -1)
        assert np.abs(seen.values(layer) - values.numpy()).max() < 1e-4
    assert recorder.stages == [["capture activations", 2, 2]]
    assert not (tmp_path / "hidden.npy").exists()


@pytest.mark.parametrize("kind", ["gemma2", "olmo2", "phi"])
def test_what_is_captured_where_norms_are_others(tiny_checkpoint, tiny_model, tmp_path, ids, kind):
    """Behind a gain of 1 + weight and before a norm; without a norm; behind one with a bias, which attention and FFN share."""
    checkpoint = open_checkpoint(tiny_checkpoint(kind))
    seen = capture(checkpoint, ids, tmp_path, 0, CPU, NullProgress())
    model, eps = tiny_model(kind, dtype=torch.float32), checkpoint.spec.eps
    layer, inputs, outputs = model.model.layers[1], {}, {}
    for name, module in layer.named_modules():

        def hook(_module, arguments, output, name=name):
            inputs[name], outputs[name] = arguments[0] if arguments else None, output

        module.register_forward_hook(hook)
    with torch.no_grad():
        model(torch.from_numpy(ids.astype(np.int64)))

    def unit(x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    def channels(x):
        return x.flatten(0, 1).square().mean(0).sqrt().numpy()

    first = "self_attn.q_proj"
    x = inputs[first] if kind == "phi" else unit(inputs["input_layernorm" if kind == "gemma2" else first])
    assert np.abs(seen.channels(1, "attention") / channels(x) - 1).max() < 1e-4
    assert seen.kinds == (("attention",) if kind == "phi" else ("attention", "ffn"))
    writer, stream = {
        "gemma2": ("mlp.down_proj", inputs["pre_feedforward_layernorm"] if kind == "gemma2" else None),
        "olmo2": ("mlp.down_proj", inputs.get("mlp.gate_proj")),
        "phi": ("self_attn.dense", inputs.get("input_layernorm")),
    }[kind]
    x = inputs[writer] * torch.rsqrt(stream.square().mean(-1, keepdim=True) + eps)
    if kind != "phi":
        # an error there counts relative to what is normed
        x = x * torch.rsqrt(outputs[writer].square().mean(-1, keepdim=True) + eps)
    site = "attention-output" if kind == "phi" else "ffn-output"
    assert np.abs(seen.channels(1, site) / channels(x) - 1).max() < 1e-4
    assert (tmp_path / "layer-00001-ffn-output-channels.npy").exists() == (kind != "phi")


def test_samples_are_bounded_and_hold_every_first_token(tiny_checkpoint, tmp_path, ids):
    checkpoint = open_checkpoint(tiny_checkpoint())
    (tmp_path / "all").mkdir()
    (tmp_path / "some").mkdir()
    whole = capture(checkpoint, ids, tmp_path / "all", 0, CPU, NullProgress())
    part = capture(checkpoint, ids, tmp_path / "some", 0, CPU, NullProgress(), max_sample=32)
    chosen = choose_tokens(6, 24, 32, (0, 1, 1))
    assert set(range(0, 144, 24)) <= set(chosen.tolist())
    assert np.array_equal(part.site(1, "ffn"), whole.site(1, "ffn")[chosen])
    assert part.values(0).shape == (32, 2, 32)


@pytest.mark.parametrize("seed", [2**62, 2**63 - 1])
def test_every_seed_of_the_command_line_can_be_captured_with(tiny_checkpoint, tmp_path, ids, seed):
    seen = capture(open_checkpoint(tiny_checkpoint()), ids, tmp_path, seed, CPU, NullProgress())
    assert np.isfinite(seen.readers(1, "ffn")).all()


def test_nan_weights_are_named_while_capturing(tiny_checkpoint, tmp_path, ids):
    from safetensors.torch import load_file, save_file

    directory = tiny_checkpoint()
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(tensors, path)
    with pytest.raises(SourceError, match="model.layers.1.mlp.down_proj.weight contains NaN"):
        capture(open_checkpoint(directory), ids, tmp_path, 0, CPU, NullProgress())


def test_a_window_shorter_than_the_sequences_is_refused(tiny_checkpoint, tmp_path, ids):
    directory = tiny_checkpoint("mistral")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"sliding_window": 16}))
    with pytest.raises(SourceError, match="sliding_window 16 is below the calibration length 24"):
        capture(open_checkpoint(directory), ids, tmp_path, 0, CPU, NullProgress())


def test_runners_of_one_checkpoint_keep_their_own_attention(tiny_checkpoint):
    checkpoint = open_checkpoint(tiny_checkpoint("llama"))
    weights = checkpoint.layer(0, CPU)
    hidden = torch.randn(1, 24, 128, generator=torch.Generator().manual_seed(0))
    rounding = LayerRunner(checkpoint, CPU, 24, CacheSettings(bits=4, rotation=0, rotate_v=False, paired=False))
    positions = rounding.positions(24)
    rounded = rounding.run(0, weights, hidden, positions)
    exact = LayerRunner(checkpoint, CPU, 24).run(0, weights, hidden, positions)
    assert torch.equal(rounding.run(0, weights, hidden, positions), rounded)
    assert not torch.allclose(exact, rounded, atol=1e-3)
