"""What the converter writes: keys, types, vocabulary, bytes; checked by readers that are not ours."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from kurtail_gguf.numerics.formats import kt4
from kurtail_gguf.runtime import ggml
from kurtail_gguf.runtime.export import read_header
from kurtail_gguf.runtime.gguf_info import PROVENANCE_KEYS, read_gguf

FAST = ("--rotation", "hadamard", "--weights", "rtn")


@pytest.fixture(params=["tiny_bpe", "tiny_spm"])
def source(request):
    return request.getfixturevalue(request.param)


def test_types_and_keys(converted, source):
    info = read_gguf(converted(source, *FAST))
    types = {tensor.name: tensor.type_name for tensor in info.tensors}
    linears = [tensor for tensor in info.tensors if tensor.is_block_linear]
    assert len(linears) == 14
    assert {tensor.type_name for tensor in linears} == {"kt4"}
    assert types["token_embd.weight"] == "q4_0"
    assert types["output.weight"] == "q8_0"  # 128 is no multiple of 256
    assert {types[name] for name in types if "norm" in name} == {"f32"}
    assert info.metadata["general.file_type"] == 164
    assert all(key in info.metadata for _, key, _ in PROVENANCE_KEYS)
    assert info.provenance.r4_size == 128 and info.provenance.r3_size == 64
    assert info.online == {f"blk.{layer}.ffn_down.weight": 128 for layer in (0, 1)}
    assert info.block_bits_per_weight == 4.25


def test_a_gguf_keeps_its_name(cli, tiny_reference, tmp_path):
    """Not that of the directory it was read into on the way."""
    made = tmp_path / "made.gguf"
    assert cli("convert", tiny_reference, made, "--rotation", "none", "--weights", "f32").status == 0
    names = [read_gguf(path).metadata["general.name"] for path in (tiny_reference, made)]
    assert names[0] == names[1] and "Source" not in names


@pytest.mark.parametrize("kind", ["tiny_bpe_reference", "tiny_reference"])
def test_a_gguf_keeps_its_vocabulary(cli, request, kind, tmp_path):
    """Key for key: scores and types of tokens as well, which transformers drops."""
    source, out = request.getfixturevalue(kind), tmp_path / "out.gguf"
    assert cli("convert", source, out, "--rotation", "none", "--weights", "f32").status == 0
    before, after = (
        {key: value for key, value in read_gguf(path).metadata.items() if key.startswith("tokenizer.")}
        for path in (source, out)
    )
    assert before == after
    if kind == "tiny_reference":
        assert len(set(after["tokenizer.ggml.scores"])) > 100


def test_a_known_model_has_its_title(smollm2, tmp_path):
    metadata = read_header(smollm2).metadata
    assert metadata["general.name"] == "SmolLM2-135M-Instruct"
    assert metadata["general.organization"] == "HuggingFaceTB" and metadata["general.license"] == "apache-2.0"


def test_hyper_parameters(converted, source):
    info = read_gguf(converted(source, *FAST))
    assert info.hyper("embedding_length") == 128
    assert info.hyper("feed_forward_length") == 384
    assert info.hyper("attention.head_count") == 4
    assert info.hyper("attention.head_count_kv") == 2
    assert info.hyper("attention.key_length") == 64


def test_vocabulary_bpe(converted, tiny_bpe):
    metadata = read_gguf(converted(tiny_bpe, *FAST)).metadata
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    assert metadata["tokenizer.ggml.pre"] == "smollm"
    assert metadata["tokenizer.ggml.tokens"]["length"] == 49152
    assert "<|im_start|>" in metadata["tokenizer.chat_template"]


def test_vocabulary_sentencepiece(converted, tiny_spm):
    metadata = read_gguf(converted(tiny_spm, *FAST)).metadata
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert len(metadata["tokenizer.ggml.tokens"]) == 400
    assert metadata["tokenizer.ggml.tokens"][:3] == ["<unk>", "<s>", "</s>"]
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.chat_template"] == "{{ messages[0]['content'] }}"


def test_same_command_same_bytes(cli, converted, tiny_spm, tmp_path):
    again = tmp_path / "again.gguf"
    assert cli("convert", tiny_spm, again, *FAST).status == 0
    assert again.read_bytes() == converted(tiny_spm, *FAST).read_bytes()


def test_another_seed_is_another_file(converted, tiny_spm):
    assert converted(tiny_spm, *FAST, "--seed", "1").read_bytes() != converted(tiny_spm, *FAST).read_bytes()


def test_eight_bit_activations_are_listed_for_every_linear(converted, tiny_spm):
    info = read_gguf(converted(tiny_spm, *FAST, "--activations", "8"))
    linears = {tensor.name for tensor in info.tensors if tensor.is_block_linear}
    assert set(info.metadata["general.tensor_extra.name"]) == linears
    assert info.metadata["general.tensor_extra.prec_a4"] == [False] * 14
    assert info.metadata["kurtail.activation_bits"] == 8
    assert all(info.activation_bits_of(name) == 8 for name in linears)
    assert "general.tensor_extra.name" not in read_gguf(converted(tiny_spm, *FAST)).metadata


def test_rows_of_q_and_k_are_in_rope_pairs_and_others_in_order(cli, tiny_spm, tmp_path):
    out, work = tmp_path / "o.gguf", tmp_path / "work"
    assert cli("convert", tiny_spm, out, *FAST, "--work-dir", work).status == 0
    layer = load_file(next(work.rglob("layer-00001.safetensors")))
    info = read_gguf(out)
    data = np.fromfile(out, np.uint8)
    tensors = {tensor.name: tensor for tensor in info.tensors}

    def rows(name):
        tensor = tensors[f"blk.1.{name}.weight"]
        return data[tensor.offset : tensor.offset + tensor.bytes].reshape(tensor.shape[0], -1)

    for name, hf in (("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj")):
        original = layer[f"model.layers.1.{hf}.weight"]
        written = rows(name)
        for head in range(len(original) // 64):
            for i in range(32):
                np.testing.assert_array_equal(written[64 * head + 2 * i], original[64 * head + i])
                np.testing.assert_array_equal(written[64 * head + 2 * i + 1], original[64 * head + 32 + i])
    in_order = {"attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_down": "mlp.down_proj"}
    for name, hf in in_order.items():
        np.testing.assert_array_equal(rows(name), layer[f"model.layers.1.{hf}.weight"])


def test_embedding_and_head_are_what_was_handed_over(cli, tiny_spm, tmp_path):
    out, work = tmp_path / "o.gguf", tmp_path / "work"
    assert cli("convert", tiny_spm, out, *FAST, "--work-dir", work).status == 0
    library = ggml.GgmlBase()
    data = np.fromfile(out, np.uint8)
    for tensor in read_gguf(out).tensors:
        if tensor.name not in ("token_embd.weight", "output.weight"):
            continue
        name = "embed_tokens.npy" if tensor.name == "token_embd.weight" else "lm_head.npy"
        rows = np.load(next(work.rglob(name)))
        packed = data[tensor.offset : tensor.offset + tensor.bytes].reshape(len(rows), -1)
        np.testing.assert_array_equal(packed, library.quantize(rows, tensor.type_id))
        bound = np.abs(rows).max() / (8 if tensor.type_id == ggml.Q4_0 else 127)
        assert np.abs(library.dequantize(packed, tensor.type_id, 128) - rows).max() <= bound


def test_the_library_and_the_oracle_agree_on_kt4():
    rows = np.random.default_rng(0).standard_normal((32, 256)).astype(np.float32)
    library = ggml.GgmlBase()
    packed = library.quantize(rows, ggml.KT4)
    np.testing.assert_array_equal(packed, kt4.pack(*kt4.quantize_reference(rows)))
    np.testing.assert_array_equal(library.dequantize(packed, ggml.KT4, 256), kt4.dequantize(*kt4.unpack(packed)))


def test_inspect(cli, converted, tiny_spm):
    path = converted(tiny_spm, *FAST)
    shown = cli("inspect", path)
    assert shown.status == 0 and shown.stderr == ""
    for part in ("kt4", "4.25 in the linears", "W4A4KV4", "hadamard 64", "hadamard 128", "seed 0"):
        assert part in shown.stdout
    summary = json.loads(cli("inspect", path, "--json").stdout)
    assert summary["types"]["kt4"]["tensors"] == 14
    assert summary["kurtail"]["rotation"] == "hadamard"
    assert summary["parameters"] == sum(entry["values"] for entry in summary["types"].values())
