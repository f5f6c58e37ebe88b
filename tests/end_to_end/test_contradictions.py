"""What a checkpoint means is what its file computes: config, tensors and the runtime's constants against each other."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kurtail_gguf.check.verify import verify
from kurtail_gguf.convert.pipeline import convert
from kurtail_gguf.convert.settings import ConvertConfig
from kurtail_gguf.messages.errors import KurtailError, SourceError, UnsupportedArchitecture
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.model.families import registry
from kurtail_gguf.runtime.gguf_info import read_gguf
from kurtail_gguf.runtime.logits import runtime_log_probabilities
from kurtail_gguf.runtime.programs import check_loads

pytestmark = pytest.mark.usefixtures("bindings")

TOKENS = [[1, *np.random.default_rng(5).integers(3, 320, 60).tolist()]]
#: Largest difference of a log-probability from transformers' own, in single precision on both sides.
SAME = 1e-4


class Heard(NullProgress):
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def tell(self, line: str) -> None:
        self.lines.append(line)


def converted(model: Path, out: Path, **options: object) -> list[str]:
    """Folded and unquantized, where the options say nothing else; the lines that were told."""
    heard = Heard()
    convert(ConvertConfig(str(model), out, **{"rotation": "hadamard", "weights": "f32"} | options), heard)
    return heard.lines


def said(model: Path) -> np.ndarray:
    """transformers' log-probabilities."""
    found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.log_softmax(found(torch.tensor(TOKENS)).logits[0], -1).numpy()


def edit(directory: Path, name: str, **changes: object) -> None:
    path = directory / name
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(config | changes), encoding="utf-8")


def rewrite(directory: Path, change) -> None:
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(change(tensors) or tensors, path, {"format": "pt"})


def refused(model: Path, outputs: Path, kind: type[KurtailError] = UnsupportedArchitecture) -> str:
    """The one line that a conversion ends with; it must leave nothing behind."""
    with pytest.raises(kind) as caught:
        converted(model, outputs / "o.gguf")
    assert list(outputs.iterdir()) == []
    return str(caught.value)


@pytest.fixture
def tiny(with_tokenizer, tiny_spm):
    """``tiny(kind, **changes)``: an HF directory with a SentencePiece tokenizer of 400 tokens."""
    return lambda kind, **changes: with_tokenizer(kind, tiny_spm, changes.pop("vocab_size", 400), **changes)


def test_a_trained_head_is_not_thrown_away(tiny, tmp_path):
    model, plain, out = tiny("llama-tied"), tmp_path / "tied", tmp_path / "o.gguf"
    shutil.copytree(model, plain)
    generator = torch.Generator().manual_seed(7)
    rewrite(model, lambda tensors: tensors | {"lm_head.weight": torch.randn(400, 128, generator=generator) / 4})
    lines = converted(model, out)
    assert any("tie_word_embeddings is true, but lm_head.weight differs" in line for line in lines)
    assert np.abs(runtime_log_probabilities(out, TOKENS, exact_cache=True) - said(model)).max() < SAME
    assert all(check.right for check in verify(out, str(model), tmp_path, NullProgress()))
    # the same layers without that head: what such a file was before
    converted(plain, tmp_path / "without.gguf", rotation="diagonal")
    wrong = [check for check in verify(tmp_path / "without.gguf", str(model), tmp_path, NullProgress()) if not check.right]
    assert wrong[0].name == "tensors" and "output.weight is missing" in wrong[0].detail


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64,
    "short_factor": [1.0 + i / 64 for i in range(32)], "long_factor": [1.0 + i / 8 for i in range(32)],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, "no_rope_layers [1, 0, 1, 0] is not supported"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["sliding_attention"] * 2}, "sliding_window 64"),
        ("qwen2", {"head_dim": 64}, "head_dim 64 is not supported: upstream's graph has hidden_size / num_attention_heads, 32"),
        ("granite", {"head_dim": 128}, "head_dim 128"),
        ("llama", {"rope_parameters": YARN | {"attention_factor": 1.0}}, "by 1, the runtime by 1.139"),
        ("qwen3", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}}, "mscale"),
        ("llama", {"rope_parameters": YARN | {"truncate": False}}, "turns 32 values of a head by other frequencies"),
        ("qwen2", {"rope_parameters": YARN | {"beta_fast": 16.0, "beta_slow": 2.0}}, "by other frequencies"),
        ("mistral", {"rope_parameters": YARN | {"partial_rotary_factor": 0.5}}, "turns 32 values"),
        ("mistral", {"rope_parameters": LONG | {"factor": 8.0}}, "this rope_parameters (rope_scaling) is not supported"),
        (
            "qwen3",
            {"rope_parameters": YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
            "turns 64 values of a head by other frequencies",
        ),
    ],
    ids=str,
)
def test_what_the_runtime_does_not_compute_is_refused(tiny, outputs, kind, changes, told):
    model = tiny(kind, **{key: value for key, value in changes.items() if key == "head_dim"})
    edit(model, "config.json", **changes)
    line = refused(model, outputs)
    assert "config.json" in line or "ForCausalLM" in line
    assert told in line


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"rope_parameters": YARN}),
        ("qwen2", {"rope_parameters": YARN | {"beta_fast": 32.0, "beta_slow": 1.0}}),
        ("qwen3", {"rope_parameters": YARN | {"attention_factor": 0.1 * math.log(4) + 1}}),
        ("mistral", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0}}),
        # the runtime's shortest context is 256 tokens, for which it takes the short factors
        ("phi3", {"original_max_position_embeddings": 256, "rope_parameters": LONG | {"original_max_position_embeddings": 256}}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["full_attention"] * 2}),
        ("llama", {"sliding_window": 64}),
    ],
    ids=str,
)
def test_what_it_computes_is_what_transformers_does(tiny, tmp_path, kind, changes):
    model, out = tiny(kind), tmp_path / "o.gguf"
    edit(model, "config.json", **changes)
    converted(model, out)
    assert np.abs(runtime_log_probabilities(out, TOKENS, exact_cache=True) - said(model)).max() < SAME


def test_a_context_is_no_longer_than_a_window_that_nobody_computes(tiny, tmp_path):
    model, out = tiny("mistral", max_position_embeddings=2048, sliding_window=600), tmp_path / "o.gguf"
    lines = converted(model, out)
    assert any("the runtime ignores sliding_window 600" in line for line in lines)
    assert read_gguf(out).hyper("context_length") == 600
    checks = {check.name: check for check in verify(out, str(model), tmp_path, NullProgress())}
    assert checks["metadata"].right and checks["logits"].right


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"is_causal": False}, "is_causal false"),
        ({"n_layers": 1}, "reads block_count as 1, transformers as 2"),
        ({"n_ctx": 64, "max_position_embeddings": None}, ""),
    ],
    ids=str,
)
def test_what_upstream_reads_otherwise_is_refused(tiny, outputs, changes, told):
    model = tiny("llama")
    edit(model, "config.json", **changes)
    assert told in refused(model, outputs, KurtailError)


def test_a_file_that_the_runtime_cannot_load_is_not_left(tiny, outputs, monkeypatch):
    model = tiny("qwen2", head_dim=64)
    family = registry.FAMILIES["Qwen2ForCausalLM"]
    monkeypatch.setitem(registry.FAMILIES, "Qwen2ForCausalLM", replace(family, whole_heads=False))
    with pytest.raises(KurtailError, match=r"the runtime cannot run the converted file.*attn_q\.weight.*wrong shape"):
        converted(model, outputs / "o.gguf", work_dir=outputs.parent / "work")
    assert list(outputs.iterdir()) == []


def test_a_cut_file_does_not_load(tiny, tmp_path):
    out = tmp_path / "o.gguf"
    converted(tiny("llama"), out)
    check_loads(out)
    out.write_bytes(out.read_bytes()[:-1000])
    with pytest.raises(KurtailError, match="the runtime cannot run"):
        check_loads(out)


def test_optional_fields_that_the_file_cannot_hold_are_left_out(cli, tiny, tmp_path):
    model, out = tiny("llama"), tmp_path / "o.gguf"
    card = "---\nversion: 1.0\nlicense: mit\nlicense_name: [a, 1]\ntags: {a: 1}\nauthor: Somebody\n---\n# A model\n"
    (model / "README.md").write_text(card, encoding="utf-8")
    edit(model, "generation_config.json", temperature="0.6", top_k=20, top_p=1e300, repetition_penalty=None)
    done = cli("convert", model, out, "--rotation", "none", "--weights", "f32")
    assert done.status == 0, done.stderr
    warned = [line for line in " ".join(done.stderr.split()).split("warning: ") if "left out" in line]
    for name, field in (
        ("README.md", "version is 1.0"), ("README.md", "license_name is ['a', 1]"),
        ("generation_config.json", "temperature is '0.6'"), ("generation_config.json", "top_p is 1e+300"),
    ):  # fmt: skip
        assert any(f"{model / name}: {field}" in line for line in warned), (name, field, done.stderr)
    metadata = read_gguf(out).metadata
    assert metadata["general.author"] == "Somebody" and metadata["general.license"] == "mit"
    assert metadata["general.sampling.top_k"] == 20
    assert not {"general.version", "general.license.name", "general.sampling.temp", "general.sampling.top_p"} & metadata.keys()


@pytest.mark.parametrize("content", [b"---\n\xff: 1\n---\n", b"---\na: [\n---\n", b"---\n" + b"[" * 9000 + b"\n---\n"])
def test_a_card_that_cannot_be_read_is_left_out(tiny, tmp_path, content):
    model = tiny("llama")
    (model / "README.md").write_bytes(content)
    assert any("README.md: its header is not YAML" in line for line in converted(model, tmp_path / "o.gguf"))


@pytest.mark.parametrize("content", ["[1]", "7", '"a"'])
def test_a_generation_config_of_another_kind_is_left_out(tiny, tmp_path, content):
    model = tiny("llama")
    (model / "generation_config.json").write_text(content)
    assert (tmp_path / "o.gguf").exists() or converted(model, tmp_path / "o.gguf") is not None


def test_more_tokens_than_rows_are_refused(tiny, outputs):
    line = refused(tiny("llama", vocab_size=384), outputs, SourceError)
    assert "16 tokens of the tokenizer" in line and "outside the embedding of 384 rows (vocab_size)" in line


def test_a_base_model_in_double_precision_is_the_same_file(tiny, tmp_path):
    model, out = tiny("llama-tied"), tmp_path / "o.gguf"
    converted(model, out)
    other = tmp_path / "other" / model.name
    shutil.copytree(model, other)
    rewrite(other, lambda tensors: {name.removeprefix("model."): tensor.double() for name, tensor in tensors.items()})
    converted(other, tmp_path / "other.gguf")
    assert (tmp_path / "other.gguf").read_bytes() == out.read_bytes()
