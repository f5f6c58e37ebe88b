"""MODEL to an HF directory, and to the outline of one: directories and GGUF files. Recipes are in test_recipes.py, models of the
Hub in test_hub.py."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from kurtail_gguf.messages.errors import KurtailError, SourceError
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.model.families.registry import FAMILIES
from kurtail_gguf.model.loading import source as sources
from kurtail_gguf.model.loading.checkpoint import open_checkpoint
from kurtail_gguf.model.loading.from_gguf.file import SourceFile
from kurtail_gguf.model.loading.from_gguf.unpack import config_of
from kurtail_gguf.model.loading.outline import outline
from kurtail_gguf.model.loading.source import resolve_source
from kurtail_gguf.runtime import native
from kurtail_gguf.runtime.export import read_header
from kurtail_gguf.runtime.ggml import BF16, F16, F32, Q8_0, GgmlBase
from kurtail_gguf.runtime.gguf_info import UNPACKED_KEYS, GgufInfo, TensorInfo, read_gguf


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


def _write_gguf(
    path: Path, arch: str = "llama", without: str = "", more: dict | None = None, split: int = 0, keys: dict | None = None,
    types: dict[str, int] | None = None,
) -> dict:  # fmt: skip
    """A random model of two layers without ``output.weight``; returns its tensors' values by name.

    Args:
        more: tensors by name, as shapes or values.
        split: tensors of a part; 0 for one file.
        keys: further keys, by what comes behind the architecture's name: numbers and words, or None for none of that name.
        types: of tensors by ends of their names; the others are f32.
    """
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
    tensors = {
        name: one if isinstance(one, np.ndarray) else rng.standard_normal(one, np.float32)
        for name, one in shapes.items() if name != without
    }  # fmt: skip
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split)
    told = {
        "context_length": 64, "embedding_length": hidden, "block_count": 2, "feed_forward_length": ffn, "rope.dimension_count": head,
        "rope.freq_base": 10000.0, "attention.head_count": heads, "attention.head_count_kv": kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-5, "expert_count": experts if arch == "qwen3moe" else 0,
        "expert_used_count": 2 if arch == "qwen3moe" else 0, **({"expert_feed_forward_length": ffn} if arch == "qwen3moe" else {}),
    }  # fmt: skip
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for key, value in (told | (keys or {})).items():
        if value is not None:
            add[type(value)](f"{arch}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "ab", *(f"<{number}>" for number in range(3, vocabulary))])
    writer.add_token_types([1] * vocabulary)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(3)
    writer.add_eos_token_id(4)
    library = GgmlBase()
    for name, tensor in tensors.items():
        kind = next((kind for end, kind in (types or {}).items() if name.endswith(end)), F32)
        if kind == F32:
            writer.add_tensor(name, tensor)
            continue
        packed = library.quantize(tensor.reshape(-1, tensor.shape[-1]), kind)
        tensors[name] = library.dequantize(packed, kind, tensor.shape[-1]).reshape(tensor.shape)
        packed = packed.reshape(*tensor.shape[:-1], -1)
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def _as_stored(tensors: dict) -> dict:
    """Names and rows of the checkpoint that a random Llama is."""
    parts = {
        "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "token_embd": "model.embed_tokens", "output_norm": "model.norm",
        "output": "lm_head",
    }  # fmt: skip
    found = {}
    for name, tensor in tensors.items():
        *before, part, kind = name.split(".")
        if part in ("attn_q", "attn_k"):
            # pairs of RoPE, heads of 128 values
            tensor = tensor.reshape(-1, 64, 2, tensor.shape[-1]).swapaxes(1, 2).reshape(tensor.shape)
        prefix = f"model.layers.{before[1]}." if before else ""
        found[f"{prefix}{parts[part]}.{kind}"] = tensor
    return found


@needs_runtime
@pytest.mark.parametrize(
    ("more", "types"),
    [
        ({}, {}),
        ({"output.weight": (64, 256)}, {}),
        ({}, {"ffn_up.weight": F16, "attn_q.weight": BF16, "embd.weight": Q8_0, "ffn_down.weight": 12, "attn_k.weight": 3, "v.weight": 14}),
    ],
    ids=["tied", "untied", "types"],
)
def test_every_tensor_of_a_gguf_arrives(tmp_path, recorder, more, types):
    tensors = _as_stored(_write_gguf(tmp_path / "model.gguf", more=more, types=types))
    source = resolve_source(str(tmp_path / "model.gguf"), tmp_path / "work", recorder)
    found = load_file(source / "model.safetensors")
    assert found.keys() == tensors.keys() and ("lm_head.weight" in found) == bool(more)
    for name, tensor in tensors.items():
        assert np.array_equal(found[name], tensor), name
    assert recorder.stages == [["read model.gguf", 4, 4]]
    assert json.loads((source / "config.json").read_text())["rms_norm_eps"] == 1e-5


@needs_runtime
def test_experts_of_a_gguf_arrive_one_by_one(tmp_path):
    tensors = _write_gguf(tmp_path / "model.gguf", "qwen3moe", more={"output.weight": (64, 256)})
    source = resolve_source(str(tmp_path / "model.gguf"), tmp_path / "work", NullProgress())
    found = load_file(source / "model.safetensors")
    assert sum(array.size for array in found.values()) == sum(array.size for array in tensors.values())
    for expert in range(4):
        name = f"model.layers.1.mlp.experts.{expert}.down_proj.weight"
        assert np.array_equal(found[name], tensors["blk.1.ffn_down_exps.weight"][expert])


@needs_runtime
@pytest.mark.parametrize("part", [1, 3])
def test_a_split_gguf_is_read_by_any_of_its_parts(tmp_path, part):
    whole = _write_gguf(tmp_path / "model.gguf", split=8)
    parts = sorted(tmp_path.glob("model-*-of-00003.gguf"))
    assert len(parts) == 3
    source = resolve_source(str(parts[part - 1]), tmp_path / "work", NullProgress())
    found = load_file(source / "model.safetensors")
    assert all(np.array_equal(found[name], tensor) for name, tensor in _as_stored(whole).items())
    parts[1].touch()
    assert not sources.unpacked_before(parts[0], source, None)
    parts[1].rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(SourceError, match="is one of 3 parts of a model, but model-00002-of-00003.gguf is not beside it"):
        resolve_source(str(parts[part - 1]), tmp_path / "work", NullProgress())
    parts[0].rename(tmp_path / "first.gguf")
    with pytest.raises(SourceError, match="first.gguf is one of 3 parts .* its name does not say which: name them NAME-00001-of-00003"):
        resolve_source(str(tmp_path / "first.gguf"), tmp_path / "work", NullProgress())


@needs_runtime
@pytest.mark.parametrize(
    ("arch", "changes", "message"),
    [
        ("llama", {"without": "blk.1.attn_q.weight"}, r"lacks tensor blk.1.attn_q.weight \(model.layers.1.self_attn.q_proj"),
        ("llama", {"without": "token_embd.weight"}, r"lacks tensor token_embd.weight"),
        ("qwen3moe", {"without": "blk.0.ffn_gate_exps.weight"}, r"lacks tensor blk.0.ffn_gate_exps.weight \(model.layers.0.mlp"),
        ("llama", {"more": {"blk.0.attn_norm.bias": (256,)}}, "tensor blk.0.attn_norm.bias has no counterpart.*would be lost: convert from"),
        # a mixture of experts under the name of a dense model
        ("llama", {"more": {"blk.0.ffn_gate_inp.weight": (4, 256), "blk.1.ffn_gate_inp.weight": (4, 256)}}, "ffn_gate_inp.weight and 1 more"),
        ("llama", {"more": {"blk.0.attn_v.weight": (64, 256)}}, r"attn_v.weight has shape \[64, 256\].* require \[128, 256\]"),
        ("llama", {"more": {"rope_freqs.weight": (64,)}}, "factors of rope_freqs.weight are none of Llama 3's.*Hugging Face checkpoint"),
        ("llama", {"keys": {"rope.scaling.type": "su"}}, r"key llama.rope.scaling.type \('su'\) is not supported"),
        ("llama", {"keys": {"attention.clamp_kqv": 8.0}}, r"key llama.attention.clamp_kqv \(8.0\) has no counterpart .* would be lost"),
        ("llama", {"keys": {"attention.head_count_kv": None}}, "lacks key llama.attention.head_count_kv"),
        ("llama", {"keys": {"feed_forward_length": [768, 512]}}, r"feed_forward_length \(\[768, 512\]\) must be one whole number for all"),
        ("llama", {"keys": {"block_count": 1 << 30}}, "num_hidden_layers is 1073741824, expected an integer from 1 to 4096"),
        ("llama", {"keys": {"vocab_size": 65}}, r"vocab_size \(65\) is not supported"),
        ("mamba", {}, "architecture mamba is not read from a GGUF; read: cohere2, .*: download the original model"),
    ],
)  # fmt: skip
def test_a_gguf_of_which_something_would_be_lost_is_refused(tmp_path, arch, changes, message):
    path = tmp_path / "model.gguf"
    _write_gguf(path, arch, **changes)
    with pytest.raises(SourceError, match=message) as caught:
        resolve_source(str(path), tmp_path / "work", NullProgress())
    assert str(path) in str(caught.value)
    assert not list((tmp_path / "work").glob("*"))


@needs_runtime
def test_the_outline_refuses_what_unpacking_would(tmp_path):
    _write_gguf(tmp_path / "model.gguf", without="blk.1.attn_q.weight")
    (tmp_path / "scratch").mkdir()
    with pytest.raises(SourceError, match="model.gguf lacks tensor blk.1.attn_q.weight"):
        outline(str(tmp_path / "model.gguf"), tmp_path / "scratch")


@needs_runtime
@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"rope.scaling.type": "none", "rope.scaling.factor": 1.0}, {"rope_type": "default"}),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        ),
    ],
)  # fmt: skip
def test_rope_is_scaled_as_the_file_says(tmp_path, keys, expected):
    _write_gguf(tmp_path / "model.gguf", keys=keys)
    source = resolve_source(str(tmp_path / "model.gguf"), tmp_path / "work", NullProgress())
    found = json.loads((source / "config.json").read_text())["rope_parameters"]
    assert found == expected | {"rope_theta": 10000.0}


@pytest.mark.parametrize("value", [0, -1, (1 << 63) - 1, math.nan, "x", [], [1, 2], True, {"length": 9, "sha256": ""}], ids=repr)
def test_a_key_of_any_value_is_read_or_refused_in_one_line(tmp_path, value):
    shapes = {"token_embd.weight": (64, 256), "output_norm.weight": (256,), "blk.0.attn_q.weight": (256, 256)}
    tensors = tuple(TensorInfo(name, F32, "f32", shape, 4 * math.prod(shape), 0) for name, shape in shapes.items())
    told = {
        "context_length": 64, "embedding_length": 256, "block_count": 1, "feed_forward_length": 768, "attention.head_count": 2,
        "attention.head_count_kv": 1, "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e4, "rope.dimension_count": 128,
        "attention.key_length": 128, "attention.value_length": 128, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 16, "expert_count": 0, "nextn_predict_layers": 0,
    }  # fmt: skip
    usual = {"general.architecture": "llama", "tokenizer.ggml.tokens": {"length": 64}, "tokenizer.ggml.bos_token_id": 1}
    usual |= {f"llama.{key}": one for key, one in told.items()}
    path = tmp_path / "model.gguf"
    for key in usual:
        if key != "general.architecture":
            with pytest.raises(SourceError) as caught:  # the other tensors are missing, if nothing else
                config_of(SourceFile(path, (GgufInfo(path, usual | {key: value}, tensors),)))
            assert str(path) in str(caught.value), key


def test_every_family_says_how_its_files_are_told():
    """None is derived from another's without saying how they differ."""
    forms = [family.file for family in FAMILIES.values()]
    assert None not in forms and len({id(form) for form in forms}) == len(forms)
    shared = [form.name for form in forms if form.told_by is None]
    assert len(set(shared)) == len(shared)


@needs_runtime
def test_a_file_that_convert_wrote_is_no_model(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_string("kurtail.tool", "kurtail-gguf")
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    with pytest.raises(SourceError, match="model.gguf was written by kurtail-gguf.*: convert the model that it was made of"):
        resolve_source(str(tmp_path / "model.gguf"), tmp_path / "work", NullProgress())


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
