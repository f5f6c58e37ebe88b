"""MODEL to an HF directory, and to the outline of one: directories and GGUF files. Recipes are in test_recipes.py, models of the
Hub in test_hub.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

from kurtail_gguf.messages.errors import KurtailError, SourceError
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.model.loading import source as sources
from kurtail_gguf.model.loading.checkpoint import open_checkpoint
from kurtail_gguf.model.loading.outline import outline
from kurtail_gguf.model.loading.source import resolve_source
from kurtail_gguf.runtime import native
from kurtail_gguf.runtime.export import read_header
from kurtail_gguf.runtime.gguf_info import UNPACKED_KEYS, read_gguf


def _has_runtime() -> bool:
    try:
        return native.python_dir().is_dir()
    except KurtailError:
        return False


needs_runtime = pytest.mark.skipif(not _has_runtime(), reason="no runtime is installed, whose gguf package reads files")


def test_directory_is_taken_as_it_is(tiny_checkpoint, tmp_path):
    directory = tiny_checkpoint()
    assert resolve_source(str(directory), tmp_path / "work", NullProgress()) == directory
    assert not (tmp_path / "work").exists()


def test_unknown_name_lists_the_recipes(tmp_path):
    with pytest.raises(SourceError, match="no-such-model is not a directory.*smollm2-135m"):
        resolve_source("no-such-model", tmp_path, NullProgress())


@needs_runtime
@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"GGUF", b"GGUF\x03\x00\x00\x00" + bytes(16)])
def test_damaged_gguf_is_one_line_and_leaves_nothing(tmp_path, data):
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(SourceError) as caught:
        resolve_source(str(path), tmp_path / "work", NullProgress())
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "work").glob("*"))


def _write_gguf(path: Path, arch: str = "llama", without: str = "", more: dict | None = None, parts: int = 0, scaling: str = "") -> dict:
    """A random model of two layers without ``output.weight``; returns its tensors by name."""
    # transformers takes the width of an expert and of a head for qwen3moe's own, whatever the file says
    vocabulary, hidden, ffn, heads, kv_heads, experts = 64, 256, 768, 2, 1, 4
    head = hidden // heads
    shapes = {"token_embd.weight": (vocabulary, hidden), "output_norm.weight": (hidden,)}
    for layer in range(2):
        block = {
            "attn_norm.weight": (hidden,), "ffn_norm.weight": (hidden,), "attn_q.weight": (hidden, hidden),
            "attn_k.weight": (kv_heads * head, hidden), "attn_v.weight": (kv_heads * head, hidden),
            "attn_output.weight": (hidden, hidden),
        }  # fmt: skip
        if arch == "qwen3moe":
            block |= {
                "attn_q_norm.weight": (head,), "attn_k_norm.weight": (head,), "ffn_gate_inp.weight": (experts, hidden),
                "ffn_gate_exps.weight": (experts, ffn, hidden), "ffn_up_exps.weight": (experts, ffn, hidden),
                "ffn_down_exps.weight": (experts, hidden, ffn),
            }  # fmt: skip
        else:
            block |= {f"ffn_{part}.weight": (ffn, hidden) for part in ("gate", "up")}
            block |= {"ffn_down.weight": (hidden, ffn)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    rng = np.random.default_rng(0)
    shapes |= more or {}
    tensors = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items() if name != without}
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(2)
    writer.add_feed_forward_length(ffn)
    writer.add_rope_dimension_count(head)
    if scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
    writer.add_rope_freq_base(10000.0)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(experts if arch == "qwen3moe" else 0)
    writer.add_expert_used_count(2 if arch == "qwen3moe" else 0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "ab", *(f"<{number}>" for number in range(3, vocabulary))])
    writer.add_token_types([1] * vocabulary)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(3)
    writer.add_eos_token_id(4)
    if parts:
        writer.add_uint16("split.count", parts)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@needs_runtime
@pytest.mark.parametrize(
    ("arch", "more", "parts"),
    [("llama", {}, 1), ("llama", {"output.weight": (64, 256)}, 0), ("qwen3moe", {}, 0)],
    ids=["tied", "untied", "experts"],
)
def test_every_tensor_of_a_gguf_arrives(tmp_path, recorder, arch, more, parts):
    from safetensors.numpy import load_file

    tensors = _write_gguf(tmp_path / "model.gguf", arch, more=more, parts=parts)
    source = resolve_source(str(tmp_path / "model.gguf"), tmp_path / "work", recorder)
    found = load_file(source / "model.safetensors")
    assert ("lm_head.weight" in found) == ("output.weight" in tensors)
    assert sum(array.size for array in found.values()) == sum(array.size for array in tensors.values())
    assert np.array_equal(found["model.layers.1.self_attn.v_proj.weight"], tensors["blk.1.attn_v.weight"])
    assert recorder.stages == [["read model.gguf", 3, 3]]


@needs_runtime
@pytest.mark.parametrize(
    ("arch", "without", "message"),
    [
        ("llama", "blk.1.attn_q.weight", r"lacks tensor blk.1.attn_q.weight \(model.layers.1.self_attn.q_proj"),
        ("llama", "token_embd.weight", r"lacks tensor token_embd.weight \(model.embed_tokens.weight\): "),
        # transformers leaves zeros here and says nothing
        ("qwen3moe", "blk.0.ffn_gate_exps.weight", r"lacks tensor blk.0.ffn_gate_exps.weight \(model.layers.0.mlp"),
    ],
)
def test_a_gguf_that_lacks_a_tensor_is_refused(tmp_path, arch, without, message):
    path = tmp_path / "model.gguf"
    _write_gguf(path, arch, without)
    with pytest.raises(SourceError, match=message) as caught:
        resolve_source(str(path), tmp_path / "work", NullProgress())
    assert str(path) in str(caught.value)
    assert not list((tmp_path / "work").glob("*"))


@needs_runtime
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"blk.0.attn_q.bias": (256,)}, "does not use tensor blk.0.attn_q.bias and would drop it: convert from"),
        # a mixture of experts under the name of a llama, which transformers takes for a dense one
        (
            {"blk.0.ffn_gate_inp.weight": (4, 256), "blk.1.ffn_gate_inp.weight": (4, 256)},
            "tensor blk.0.ffn_gate_inp.weight and 1 more",
        ),
        ({"rope_freqs.weight": (64,)}, "rope_freqs.weight scales RoPE.*convert from the Hugging Face checkpoint"),
    ],
    ids=["bias", "router", "rope"],
)
def test_a_tensor_that_would_be_lost_is_refused(tmp_path, more, message):
    path = tmp_path / "model.gguf"
    _write_gguf(path, more=more)
    with pytest.raises(SourceError, match=message) as caught:
        resolve_source(str(path), tmp_path / "work", NullProgress())
    assert str(path) in str(caught.value)
    assert not list((tmp_path / "work").glob("*"))


@needs_runtime
def test_a_disk_too_small_for_the_weights_is_told_first(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    values = sum(tensor.size for tensor in _write_gguf(path).values())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda _: usage._replace(free=4 * values - 1))
    with pytest.raises(SourceError, match="model.gguf takes 0.0 GB in .*work when .* float32, but 0.0 GB are free"):
        resolve_source(str(path), tmp_path / "work", NullProgress())
    assert not list((tmp_path / "work").glob("*"))


@needs_runtime
def test_a_gguf_that_an_earlier_version_unpacked_is_unpacked_again(tmp_path, recorder):
    """The keys that its vocabulary is copied from were not kept."""
    path = tmp_path / "model.gguf"
    _write_gguf(path)
    source = resolve_source(str(path), tmp_path / "work", recorder)
    kept = read_gguf(source / UNPACKED_KEYS).metadata
    assert kept["tokenizer.ggml.tokens"][:3] == ["a", "b", "ab"] and kept["llama.context_length"] == 64
    assert resolve_source(str(path), tmp_path / "work", recorder) == source
    assert len(recorder.stages) == 1
    (source / UNPACKED_KEYS).unlink()
    resolve_source(str(path), tmp_path / "work", recorder)
    assert len(recorder.stages) == 2 and (source / UNPACKED_KEYS).exists()


@needs_runtime
def test_the_end_of_text_of_a_gguf_must_be_in_its_vocabulary(tmp_path):
    _write_gguf(tmp_path / "model.gguf")
    source = resolve_source(str(tmp_path / "model.gguf"), tmp_path / "work", NullProgress())
    read_header(source)
    writer = gguf.GGUFWriter(source / UNPACKED_KEYS, "llama")
    writer.add_token_list(["a", "b"])
    writer.add_eos_token_id(2)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    with pytest.raises(KurtailError, match="eos_token_id 2 is not in the vocabulary of 2 tokens"):
        read_header(source)


@needs_runtime
def test_a_gguf_that_git_lfs_has_not_brought_is_called_so(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    for read in (lambda: resolve_source(str(path), tmp_path / "work", NullProgress()), lambda: read_gguf(path)):
        with pytest.raises(KurtailError, match="model.gguf is a Git LFS pointer.*run git lfs pull"):
            read()


@needs_runtime
def test_a_directory_without_a_tokenizer_is_told_so(tiny_checkpoint):
    directory = tiny_checkpoint()
    for path in directory.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(KurtailError, match="contains no tokenizer .none of tokenizer.json, tokenizer.model") as caught:
        read_header(directory)
    assert "sentencepiece" not in str(caught.value)


@needs_runtime
def test_a_part_of_a_gguf_is_refused(tmp_path):
    path = tmp_path / "model-00001-of-00003.gguf"
    _write_gguf(path, parts=3)
    with pytest.raises(SourceError, match="model-00001-of-00003.gguf is one of 3 parts.*llama-gguf-split --merge"):
        resolve_source(str(path), tmp_path / "work", NullProgress())


@needs_runtime
def test_rope_that_is_scaled_by_a_key_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    _write_gguf(path, scaling="yarn")
    with pytest.raises(SourceError, match=r"key llama.rope.scaling.type \(yarn\) scales RoPE.*Hugging Face checkpoint"):
        resolve_source(str(path), tmp_path / "work", NullProgress())
    _write_gguf(path, scaling="none")
    resolve_source(str(path), tmp_path / "work", NullProgress())


@needs_runtime
@pytest.mark.parametrize(
    ("more", "tied"), [({}, True), ({"output.weight": (64, 256)}, False)], ids=["tied", "untied"]
)
def test_the_outline_of_a_gguf_is_what_it_is_unpacked_to(tmp_path, more, tied):
    path = tmp_path / "model.gguf"
    values = sum(tensor.size for tensor in _write_gguf(path, more=more).values())
    (tmp_path / "scratch").mkdir()
    found = outline(str(path), tmp_path / "scratch")
    expected = open_checkpoint(resolve_source(str(path), tmp_path / "work", NullProgress()))
    outlined = open_checkpoint(found.directory)
    assert outlined.spec == expected.spec and outlined.spec.tied == tied
    assert outlined.files.by_tensor.keys() == expected.files.by_tensor.keys()
    assert (found.unpacked, found.packed, found.download) == (4 * values, path.stat().st_size, 0)
    # holes: nothing of the weights was written
    assert sum(512 * file.stat().st_blocks for file in found.directory.iterdir()) < values


@needs_runtime
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"without": "blk.1.attn_q.weight"}, "lacks tensor blk.1.attn_q.weight"),
        ({"more": {"blk.0.attn_q.bias": (256,)}}, "does not use tensor blk.0.attn_q.bias"),
        ({"parts": 3}, "is one of 3 parts"),
        ({"scaling": "yarn"}, "scales RoPE"),
    ],
)
def test_the_outline_refuses_what_unpacking_would(tmp_path, changes, message):
    path = tmp_path / "model.gguf"
    _write_gguf(path, **changes)
    (tmp_path / "scratch").mkdir()
    with pytest.raises(SourceError, match=message):
        outline(str(path), tmp_path / "scratch")
