"""A model of models/ that is quantized in several types: what is unpacked and converted is what its GGUF holds.

The file is read here by the gguf package from PyPI, whose dequantization is numpy's and not transformers'.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors import safe_open

from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.model.loading.recipes import fetch_recipe, find_recipe
from kurtail_gguf.runtime.file_tensors import FileTensors
from kurtail_gguf.runtime.gguf_info import GgufInfo, read_gguf

ROOT = Path(__file__).parents[2]
NAME = "qwen2.5-coder-0.5b"
FAST = ("--rotation", "hadamard", "--weights", "rtn")

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip

#: What tokenizers stumble over: digits, blanks, line breaks, contractions, code, scripts without blanks, joined and
#: flagged emoji, marks composed and apart, invisible characters, and text that looks like special tokens.
TEXTS = (
    "1234567 3.14159 0x1F 1e-9 ١٢٣ ½ ² 12.345,67",
    "   leading and   inner \t\t tabs \n\n\n newlines \r\n Windows\r\n\r\n end   ",
    "I'VE we'Ll DON'T 'S x's ''s",
    "for (int i=0;i<n;++i) {\n\t\tx[i] += y[i]*2;\n}\n#endif",
    "def f(a, *b, **c):\n    return {k: v for k, v in c.items()}  # ünï",
    "你好，世界。東京は晴れ。한국어 띄어쓰기 ไทย हिन्दी عربي עִבְרִית",
    "👩‍👩‍👧‍👦 🇩🇪 👍🏽 ☃️ 🤷🏿‍♀️",
    "é vs e\u0301, \u00c5 \u212b \u1e9b\u0323, \ufb01",
    "\u00a0no break\u2003em\u200bzero\ufeffmark",
    "<|im_start|>user\nhi<|im_end|>\n<tool_call>{}</tool_call><|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>",
    " [PAD151700] <|endoftext|> <|im_start |>",
    "a" * 200 + " " * 70 + "\n" * 9,
)


@pytest.fixture(scope="module")
def original(qwen) -> Path:
    """The GGUF of the recipe, as it was joined."""
    return fetch_recipe(find_recipe(NAME), NullProgress())


@pytest.fixture(scope="module")
def file(converted, qwen) -> Path:
    """The name and not the directory is given: what a user types."""
    return converted(NAME, *FAST)


def _hf_name(name: str) -> str:
    first, *rest = name.split(".")
    if first == "blk":
        layer, part, kind = rest
        return f"model.layers.{layer}.{_LAYER[part]}.{kind}"
    return f"{_TOP[first]}.{rest[0]}"


def test_every_type_of_tensor_is_unpacked_exactly(qwen, original):
    """All biases and norms, and of each other type every tensor of two layers, with embedding and head."""
    reader = gguf.GGUFReader(original)
    seen = set()
    with safe_open(qwen / "model.safetensors", "np") as unpacked:
        assert set(unpacked.keys()) == {_hf_name(tensor.name) for tensor in reader.tensors}
        for tensor in reader.tensors:
            kind = tensor.tensor_type.name
            if kind != "F32" and tensor.name.startswith("blk.") and not tensor.name.startswith(("blk.0.", "blk.11.")):
                continue
            expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            found = unpacked.get_tensor(_hf_name(tensor.name))
            assert np.array_equal(found, expected.reshape(found.shape)), tensor.name
            seen.add(kind)
    assert seen == {"F32", "Q4_K", "Q5_0", "Q6_K", "Q8_0"}


def test_the_recipe_tells_the_shape(qwen):
    shape = tomllib.loads((ROOT / "models" / f"{NAME}.toml").read_text(encoding="utf-8"))["shape"]
    config = json.loads((qwen / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == [shape["architecture"]]
    assert shape["head_dim"] == config["hidden_size"] // config["num_attention_heads"]
    names = {
        "layers": "num_hidden_layers", "attention_heads": "num_attention_heads", "vocabulary": "vocab_size",
        "context": "max_position_embeddings", "tied": "tie_word_embeddings",
        "key_value_heads": "num_key_value_heads", "hidden_size": "hidden_size", "intermediate_size": "intermediate_size",
    }  # fmt: skip
    assert {key: config[name] for key, name in names.items()} == {key: shape[key] for key in names}


def test_a_conversion_keeps_keys_vocabulary_and_biases(original, file):
    before, after = read_gguf(original), read_gguf(file)
    prefixes = "tokenizer.", "qwen2."
    assert _keys(before, prefixes).items() <= _keys(after, prefixes).items()
    assert _keys(before, prefixes[:1]) == _keys(after, prefixes[:1])
    assert after.metadata["general.name"] == find_recipe(NAME).title and after.metadata["general.license"] == "apache-2.0"
    old, new = FileTensors(before), FileTensors(after)
    biases = [tensor.name for tensor in before.tensors if tensor.name.endswith(".bias")]
    assert len(biases) == 3 * 24
    for name in biases:
        if ".attn_v." in name:  # turned by R2, head by head
            heads = [tensors.values(name).reshape(2, 64) for tensors in (old, new)]
            assert np.allclose(*(np.linalg.norm(head, axis=1) for head in heads), rtol=1e-4)
    for layer in range(24):  # RoPE pairs of k are divided by what those of q are multiplied by
        (k, scaled_k), (q, scaled_q) = (
            [tensors.values(f"blk.{layer}.attn_{which}.bias").astype(np.float64).reshape(2, -1, 2, 32) for tensors in (old, new)]
            for which in "kq"
        )
        scale = np.linalg.norm(k, axis=2, keepdims=True) / np.linalg.norm(scaled_k, axis=2, keepdims=True)
        assert np.allclose(scaled_k * scale, k, rtol=1e-4, atol=1e-6), layer
        assert np.allclose(scaled_q / scale, q, rtol=1e-3, atol=1e-6), layer


def test_its_cache_does_no_harm(file):
    """With keys as they are 4 bits take the perplexity of this model from 32 to 143."""
    provenance = read_gguf(file).provenance
    assert provenance.kv_choice == "auto" and provenance.mean_kv_bits <= 4.6
    assert provenance.kv_divergence < 0.1 and provenance.kv_perplexity < 1.1


def test_texts_split_as_before(original, file):
    found = [_tokens(path) for path in (original, file)]
    for text, expected, ours in zip(TEXTS, *found, strict=True):
        assert expected and ours == expected, text
    specials = found[0][9]
    assert {151644, 151645, 151657, 151658, 151659, 151660, 151661} <= set(specials)


def test_it_can_be_verified_by_name(cli, file, bindings):
    done = cli("verify", file, "--reference", NAME)
    assert done.status == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "pass"


def _keys(info: GgufInfo, prefixes: tuple[str, ...]) -> dict[str, object]:
    return {key: value for key, value in info.metadata.items() if key.startswith(prefixes)}


def _tokens(path: Path) -> list[list[int]]:
    """By llama.cpp, special tokens recognised as in a chat."""
    code = (
        "import json, sys; from llama_cpp import Llama; model = Llama(sys.argv[1], vocab_only=True, verbose=False);"
        "print(json.dumps([model.tokenize(t.encode(), add_bos=False, special=True) for t in json.load(sys.stdin)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], input=json.dumps(TEXTS), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
