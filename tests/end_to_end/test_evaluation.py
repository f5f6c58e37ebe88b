"""Evaluation through the runtime, and the simulation that checks it.

Rounding to 4 bits amplifies: a change of 1e-6 in the embeddings moves the deep model's W4A4KV4
perplexity by percents over a few thousand tokens, in the simulation alone as much as between
simulation and runtime. So the bound of 1 % is asked where chance cannot decide: of one real layer with
everything rounded to 4 bits, and of all thirty with 8-bit activations and an f16 cache. The deep
W4A4KV4 model is held to 1 % plus three standard errors of the difference token by token.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kurtail_gguf.check.simulate import CrossCheck, cross_check
from kurtail_gguf.measure.perplexity import perplexity, reference, scored_losses, scored_tokens
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.runtime.gguf_info import read_gguf

HADAMARD = ("--rotation", "hadamard", "--weights", "rtn")
ONE_PERCENT = math.log(1.01)


def _assert_within_one_percent(checked: CrossCheck) -> None:
    print(checked)
    assert abs(checked.log_ratio) < ONE_PERCENT
    assert checked.simulated.value == pytest.approx(checked.runtime.value, rel=0.01)
    assert checked.simulated.stderr == pytest.approx(checked.runtime.stderr, rel=0.05)


@pytest.mark.parametrize(
    ("rotation", "activations", "kv", "chunks"),
    [
        ("hadamard", "4", "4", 8),
        ("hadamard", "4", "8", 8),
        ("hadamard", "4", "16", 8),
        ("hadamard", "8", "4", 8),
        ("diagonal", "4", "4", 8),
        # unrotated outliers make one layer chaotic already: 8 chunks know the ratio to half a percent only
        ("none", "4", "4", 32),
        ("none", "8", "16", 8),
    ],
)
def test_one_real_layer_agrees(converted, one_layer, wiki, text, rotation, activations, kv, chunks):
    learned = ("--calibration", str(text), "--calibration-tokens", "4096") if rotation == "diagonal" else ()
    path = converted(one_layer, "--rotation", rotation, "--weights", "rtn", "--kv", kv, "--activations", activations, *learned)
    _assert_within_one_percent(cross_check(path, wiki, 256, chunks))


@pytest.mark.parametrize("source", ["tiny_bpe", "tiny_spm"])
def test_tiny_models_agree(request, converted, source, text):
    path = converted(request.getfixturevalue(source), *HADAMARD, "--activations", "8", "--kv", "16")
    _assert_within_one_percent(cross_check(path, text, 128, 16))


def test_the_deep_model_agrees_where_rounding_is_fine(converted, smollm2, wiki):
    path = converted(smollm2, *HADAMARD, "--activations", "8", "--kv", "16")
    _assert_within_one_percent(cross_check(path, wiki, 512, 4))


def test_the_deep_model_agrees_within_its_noise(converted, smollm2, wiki):
    checked = cross_check(converted(smollm2, *HADAMARD), wiki, 512, 4)
    print(checked)
    assert abs(checked.log_ratio) < ONE_PERCENT + 3 * checked.log_ratio_stderr
    # the noise itself has a size: two unrelated models of this perplexity differ by several times that
    assert checked.log_ratio_stderr < 0.06


@pytest.fixture
def calm(tiny_spm, tmp_path):
    """The tiny model with a quarter of its logits: llama-perplexity's file holds no loss above about 16."""
    directory = shutil.copytree(tiny_spm, tmp_path / "calm", ignore=shutil.ignore_patterns("*.safetensors*"))
    model = AutoModelForCausalLM.from_pretrained(tiny_spm)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.25)
    model.save_pretrained(directory)
    return directory


def test_losses_read_back_are_the_programs_own(converted, calm, text):
    path = converted(calm, *HADAMARD, "--activations", "8", "--kv", "16")
    with reference(path, 400, text, 128, 8, NullProgress()) as opened:
        losses, tokens = scored_losses(opened), scored_tokens(opened)
    assert losses.shape == (8, 63) and tokens.shape == (8, 128)
    assert losses.max() < 15.5  # none cut off, so the mean is the program's
    assert math.exp(losses.mean()) == pytest.approx(opened.perplexity.value, rel=1e-3)


def test_a_reference_is_the_checkpoint(cli, converted, tiny_spm, text, tmp_path):
    """eval against the HF directory; the reference's own perplexity is transformers' own."""
    report, plain = tmp_path / "r.json", tmp_path / "plain.json"
    path = converted(tiny_spm, *HADAMARD, "--activations", "8", "--kv", "16")
    options = ("--text", text, "--context", "128", "--chunks", "8")
    done = cli("eval", path, *options, "--reference", tiny_spm, "--json", report)
    assert done.status == 0, done.stderr
    assert "log-probabilities of the reference take" in done.stderr
    (model,) = json.loads(report.read_text(encoding="utf-8"))["models"]
    assert cli("eval", path, *options, "--json", plain).status == 0
    (alone,) = json.loads(plain.read_text(encoding="utf-8"))["models"]
    assert alone["kld_mean"] is None and alone["top1_agreement"] is None
    assert alone["perplexity"] == pytest.approx(model["perplexity"], rel=1e-4)
    # a random model's likeliest tokens are near ties: W4 moves many of them
    assert 0 < model["kld_mean"] < 1 and 0.2 < model["top1_agreement"] < 1
    assert (model["activation_bits"], model["kv_bits"]) == (8, 16)
    expected = _transformers_perplexity(tiny_spm, path, text, 128, 8)
    row = next(line for line in done.stdout.splitlines() if "reference" in line)
    assert float(row.split("│")[2].split("±")[0]) == pytest.approx(expected, rel=2e-3)


def _transformers_perplexity(source: Path, path: Path, text: Path, context: int, chunks: int) -> float:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with reference(path, 400, text, context, chunks, NullProgress()) as opened:
        tokens = torch.from_numpy(scored_tokens(opened).astype("int64"))
    targets = tokens[:, context // 2 + 1 :].clone()
    tokens[:, 0] = read_gguf(path).metadata["tokenizer.ggml.bos_token_id"]
    with torch.inference_mode():
        logits = model(tokens).logits[:, context // 2 : -1].double()
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item())


def test_a_file_against_itself_does_not_diverge(cli, converted, tiny_spm, text, tmp_path):
    path, report = converted(tiny_spm, *HADAMARD), tmp_path / "r.json"
    options = ("--text", text, "--context", "128", "--chunks", "4", "--reference", path, "--json", report)
    assert cli("eval", path, *options).status == 0
    (model,) = json.loads(report.read_text(encoding="utf-8"))["models"]
    assert model["kld_mean"] == pytest.approx(0, abs=1e-4)
    assert model["top1_agreement"] > 0.99
    assert set(model) == {
        "path", "perplexity", "perplexity_stderr", "kld_mean", "top1_agreement", "bits_per_weight", "activation_bits",
        "activations", "kv_bits", "runs_as",
    }  # fmt: skip
    again = perplexity(path, text, 128, 4, NullProgress())
    assert model["perplexity"] == pytest.approx(again.value, rel=1e-4)


def test_what_the_cache_alone_costs(cli, converted, tiny_spm, text, tmp_path):
    path, report = converted(tiny_spm, *HADAMARD, "--kv", "4"), tmp_path / "r.json"
    options = ("--text", text, "--context", "128", "--chunks", "4", "--cache-type", "file,f16,q4_0,q8_0", "--cache-share")
    done = cli("eval", path, *options, "--json", report)
    assert done.status == 0, done.stderr
    assert "cache KLD" in done.stdout
    own, half, four, eight = json.loads(report.read_text(encoding="utf-8"))["models"]
    assert (half["cache_kld"], half["cache_perplexity"]) == (0, 1)
    # four bits are what the file asks for
    assert own["cache_kld"] == pytest.approx(four["cache_kld"], abs=1e-6)
    # 4-bit activations turn any change into roundings the other way, so that 8 bits cost more than nothing
    assert 0 < eight["cache_kld"] < own["cache_kld"] < 2
    for row, cache in ((own, "file"), (half, "f16"), (eight, "q8_0")):
        assert row["perplexity"] == pytest.approx(perplexity(path, text, 128, 4, NullProgress(), cache).value, rel=1e-3)
        assert row["cache_perplexity"] == pytest.approx(row["perplexity"] / half["perplexity"])


def test_a_stock_file_beside_ours(cli, converted, tiny_spm, text, tmp_path, program):
    """llama-quantize's Q4_0 of the plain export: evaluated the same way, told apart in the report."""
    from kurtail_gguf.runtime.export import export_reference

    plain, stock, report = tmp_path / "plain.gguf", tmp_path / "q4_0.gguf", tmp_path / "r.json"
    export_reference(tiny_spm, plain)
    assert program("llama-quantize", plain, stock, "Q4_0").status == 0
    ours = converted(tiny_spm, *HADAMARD)
    options = ("--text", text, "--context", "128", "--chunks", "4", "--json", report)
    done = cli("eval", stock, ours, *options)
    assert done.status == 0, done.stderr
    first, second = json.loads(report.read_text(encoding="utf-8"))["models"]
    assert (first["activation_bits"], first["kv_bits"]) == (None, 16)
    assert (second["activation_bits"], second["kv_bits"]) == (4, 4)
    assert "stock" in done.stdout and "W4A4KV4" in done.stdout
