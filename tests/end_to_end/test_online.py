"""Online transforms of any tensor's input, format version 3: what a file says does not change by them, and a graph that
passes them by is refused.

A tensor whose rows are multiplied by Hadamard blocks, and whose input is as well, multiplies as before: so files that say
what others say are made here, without the converter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from scipy.linalg import hadamard
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.runtime import native
from kurtail_gguf.runtime.export import export_reference
from kurtail_gguf.runtime.logits import mean_divergence, runtime_log_probabilities

#: Largest difference of a log-probability in single precision, as tests of families allow it.
UNQUANTIZED = 1e-4
TOKENS = [[1, *np.random.default_rng(5).integers(3, 320, length).tolist()] for length in (60, 20)]

#: What a file without rotations, with nothing quantized, has to say of itself.
BARE = {
    "kurtail.format_version": ("UINT32", 3),
    "kurtail.activation_bits": ("UINT32", 32),
    "kurtail.kv_bits": ("UINT32", 16),
    "kurtail.r1.kind": ("STRING", "none"),
    "kurtail.r2.kind": ("STRING", "none"),
    "kurtail.r3.kind": ("STRING", "none"),
}
#: What is quantized with llama-quantize, and rounds activations and cache to 4 bits.
ROUNDED = BARE | {
    "kurtail.activation_bits": ("UINT32", 4),
    "kurtail.kv_bits": ("UINT32", 4),
    "kurtail.r3.kind": ("STRING", "hadamard"),
    "kurtail.r3.size": ("UINT32", 64),
}
#: R4 of 64 as versions 1 and 2 have it.
R4 = {"kurtail.r4.kind": ("STRING", "hadamard"), "kurtail.r4.size": ("UINT32", 64)}
DOWN = {"blk.0.ffn_down.weight": 64, "blk.1.ffn_down.weight": 64}

Keys = Mapping[str, tuple[str, object] | None]

pytestmark = pytest.mark.usefixtures("bindings")


def rewritten(source: Path, target: Path, keys: Keys, transformed: Mapping[str, int] = {}) -> Path:
    """A copy with other keys and transformed tensors (rewritten_file.py)."""
    changes = {"keys": dict(keys), "transformed": dict(transformed)}
    command = [sys.executable, str(Path(__file__).with_name("rewritten_file.py")), str(source), str(target)]
    environment = os.environ | {"PYTHONPATH": str(native.python_dir())}
    subprocess.run(command, input=json.dumps(changes), text=True, env=environment, check=True)
    return target


def listed(sizes: Mapping[str, int]) -> Keys:
    """The keys that list online transforms."""
    return {
        "kurtail.online.name": ("STRING", list(sizes)),
        "kurtail.online.kind": ("STRING", ["hadamard"] * len(sizes)),
        "kurtail.online.size": ("UINT32", list(sizes.values())),
    }


def linears(layers: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """``{"blk.0.attn_q.weight": n, …}`` from the sizes of a layer's linears."""
    return {f"blk.{layer}.{name}.weight": n for layer in range(layers) for name, n in sizes.items()}


def graph_nodes(program, path: Path) -> int:
    """Nodes of the graph that a context reserves."""
    done = program("llama-completion", "-m", path, "-no-cnv", "-p", "a", "-n", "1", "-c", "64", "-lv", "4")
    assert done.status == 0, done.stderr[-3000:]
    return int(re.search(r"graph.*nodes = (\d+)", done.stdout + done.stderr)[1])


def refusal(program, path: Path, *options: object) -> str:
    """The line that a file is refused with."""
    done = program("llama-completion", "-m", path, "-no-cnv", "-p", "a", "-n", "1", *options)
    assert 0 < done.status < 128, done.stderr[-3000:]
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "kurtail: " in line]
    assert lines, done.stderr[-3000:]
    return lines[0]


@pytest.fixture(scope="session")
def plain(tmp_path_factory, with_tokenizer, tiny_spm, tiny_bpe):
    """``plain(kind)``: a tiny model's f32 file by upstream's converter."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "plain.gguf"
            tokenizer = (tiny_bpe, 49152) if kind == "qwen3-moe" else (tiny_spm, 400)
            export_reference(with_tokenizer(kind, *tokenizer), made[kind])
        return made[kind]

    return make


def save_other(model, directory: Path, tokenizer: Path) -> Path:
    """The HF directory of a random model of an architecture that the converter does not know."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.1 * noise)
    model.save_pretrained(directory)
    for path in tokenizer.glob("tokenizer*"):
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


@pytest.fixture(scope="session")
def gemma(tmp_path_factory, tiny_spm) -> Path:
    """Norms behind attention and FFN, sliding windows: an architecture that version 2 does not run."""
    config = Gemma3TextConfig(
        vocab_size=400, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, sliding_window=32, layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=512, query_pre_attn_scalar=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    directory = save_other(Gemma3ForCausalLM(config), tmp_path_factory.mktemp("gemma"), tiny_spm)
    export_reference(directory, directory / "plain.gguf")
    return directory / "plain.gguf"


@pytest.fixture(scope="session")
def deepseek(tmp_path_factory, tiny_bpe) -> Path:
    """An architecture whose graph multiplies some weights, and stores its keys, past our hooks."""
    config = DeepseekV2Config(
        vocab_size=49152, hidden_size=128, intermediate_size=192, moe_intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=64, kv_lora_rank=32, qk_nope_head_dim=32,
        qk_rope_head_dim=32, v_head_dim=32, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
        first_k_dense_replace=2, n_group=1, topk_group=1, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    directory = save_other(DeepseekV2ForCausalLM(config), tmp_path_factory.mktemp("deepseek"), tiny_bpe)
    export_reference(directory, directory / "plain.gguf")
    return directory / "plain.gguf"


@pytest.fixture
def quantized(program):
    """``quantized(source, target)``: the block linears of a file in kt4."""

    def make(source: Path, target: Path) -> Path:
        done = program("llama-quantize", source, target, "KT4")
        assert done.status == 0, done.stderr[-3000:]
        return target

    return make


@pytest.mark.parametrize("bits", [4, 8, 32])
@pytest.mark.parametrize("version", [1, 2])
def test_r4_as_an_online_transform_gives_the_same_bits(plain, quantized, tmp_path, version, bits):
    """Files of versions 1 and 2 run as they did, and say what their equal of version 3 says."""
    keys = (BARE if bits == 32 else ROUNDED | {"kurtail.activation_bits": ("UINT32", bits)}) | R4
    before = rewritten(plain("mistral"), tmp_path / "before.gguf", keys | {"kurtail.format_version": ("UINT32", version)}, DOWN)
    if bits != 32:
        before = quantized(before, tmp_path / "quantized.gguf")
    found = runtime_log_probabilities(before, TOKENS)
    without_r4 = {"kurtail.format_version": ("UINT32", 3), "kurtail.r4.kind": None, "kurtail.r4.size": None}
    after = rewritten(before, tmp_path / "3.gguf", without_r4 | listed(DOWN))
    assert np.array_equal(runtime_log_probabilities(after, TOKENS), found)
    # it is what makes them, and in version 3 the keys of R4 mean nothing
    ignored = rewritten(before, tmp_path / "0.gguf", {"kurtail.format_version": ("UINT32", 3)})
    assert np.abs(runtime_log_probabilities(ignored, TOKENS) - found).max() > 0.1
    right = runtime_log_probabilities(plain("mistral"), TOKENS)
    assert mean_divergence(right, found) < (1e-6 if bits == 32 else 0.5 * mean_divergence(right, np.roll(found, 1, axis=0)))


SITES = {
    "mistral": {"attn_q": 64, "attn_k": 64, "attn_v": 64, "attn_output": 128, "ffn_gate": 32, "ffn_up": 32, "ffn_down": 64},
    # a size for each reader of one input
    "llama-biases": {"attn_q": 64, "attn_k": 2, "attn_v": 128, "ffn_gate": 16, "ffn_up": 64},
    "phi3": {"attn_qkv": 128, "attn_output": 64, "ffn_up": 64, "ffn_down": 64},
    "qwen3-moe": {"attn_q": 64, "ffn_gate_inp": 128, "ffn_gate_exps": 64, "ffn_up_exps": 64, "ffn_down_exps": 64},
}


@pytest.mark.parametrize("kind", SITES)
def test_any_tensor_can_have_one(plain, tmp_path, kind):
    sizes = linears(2, SITES[kind]) | ({} if kind == "llama-biases" else {"output.weight": 128})
    right = runtime_log_probabilities(plain(kind), TOKENS, exact_cache=True)
    path = rewritten(plain(kind), tmp_path / "3.gguf", BARE | listed(sizes), sizes)
    difference = np.abs(runtime_log_probabilities(path, TOKENS, exact_cache=True) - right).max()
    print(f"{kind}: largest difference {difference:.1e} of a spread of {right.std():.2f}")
    assert right.std() > 0.5 and difference < UNQUANTIZED
    # every one of them counts
    for name in SITES[kind]:
        fewer = {tensor: n for tensor, n in sizes.items() if name not in tensor.split(".")}
        wrong = rewritten(plain(kind), tmp_path / "wrong.gguf", BARE | listed(fewer), sizes)
        assert np.abs(runtime_log_probabilities(wrong, TOKENS, exact_cache=True) - right).max() > 10 * UNQUANTIZED


def test_an_architecture_that_no_list_names(gemma, tmp_path):
    sizes = linears(2, {name: 64 for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")})
    right = runtime_log_probabilities(gemma, TOKENS, exact_cache=True)
    path = rewritten(gemma, tmp_path / "3.gguf", BARE | listed(sizes), sizes)
    difference = np.abs(runtime_log_probabilities(path, TOKENS, exact_cache=True) - right).max()
    wrong = rewritten(gemma, tmp_path / "wrong.gguf", BARE, sizes)
    distance = np.abs(runtime_log_probabilities(wrong, TOKENS, exact_cache=True) - right).max()
    print(f"gemma: largest difference {difference:.1e} of a spread of {right.std():.2f}, without the transforms {distance:.1e}")
    # GELU is a table of half precision: next to an edge, single precision's last bit is worth a step
    assert difference < 20 * UNQUANTIZED < 0.01 * distance


def test_readers_of_one_input_share_its_transform(program, plain, tmp_path):
    def nodes(sizes: Mapping[str, int]) -> int:
        return graph_nodes(program, rewritten(plain("mistral"), tmp_path / "3.gguf", BARE | listed(linears(2, sizes))))

    none = graph_nodes(program, rewritten(plain("mistral"), tmp_path / "0.gguf", BARE))
    one = nodes({"attn_q": 64}) - none
    assert one > 0
    assert nodes({"attn_q": 64, "attn_k": 64, "attn_v": 64}) == none + one
    assert nodes({"attn_q": 64, "attn_k": 64, "attn_v": 32}) == none + 2 * one
    assert nodes({"attn_q": 64, "attn_k": 64, "ffn_up": 64, "ffn_gate": 64}) == none + 2 * one


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_products_of_one_input_follow_each_other(plain, quantized, tmp_path, kind):
    """So that they can be computed in one go, which tests/cpp/test-kt4-graph.cpp tests: nothing else is between them."""
    experts = "_exps" if kind == "mixtral" else ""
    sizes = linears(2, dict.fromkeys(("attn_q", "attn_k", "attn_v", f"ffn_gate{experts}", f"ffn_up{experts}"), 64))
    file = quantized(rewritten(plain(kind), tmp_path / "3.gguf", ROUNDED | listed(sizes), sizes), tmp_path / "quantized.gguf")
    script = str(Path(__file__).with_name("graph_nodes.py"))
    done = subprocess.run([sys.executable, script, str(file)], capture_output=True, text=True, check=True)
    nodes = [tuple(node) for node in json.loads(done.stdout.splitlines()[-1])]
    computed = [(operation, name) for operation, name in nodes if operation not in ("RESHAPE", "VIEW", "PERMUTE")]
    at = computed.index(("MUL_MAT", "Qcur-0"))
    assert {name for _, name in computed[at : at + 3]} == {"Qcur-0", "Kcur-0", "Vcur-0"}
    product, up = ("MUL_MAT_ID", "ffn_moe_up-0") if experts else ("MUL_MAT", "ffn_up-0")
    assert computed[computed.index((product, up)) + 1] == (product, up.replace("up", "gate"))


def write_adapter(path: Path, sizes: Mapping[str, int], mark: str | None) -> Path:
    """A LoRA adapter of rank 4, its A in the basis of inputs transformed with these sizes."""
    writer, random = gguf.GGUFWriter(path, "llama"), np.random.default_rng(3)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    if mark:
        writer.add_string("kurtail.adapter.rotations", mark)
    for name, rows, columns in (("attn_q", 256, 128), ("attn_v", 128, 128), ("attn_output", 128, 256), ("ffn_down", 128, 192)):
        for layer in range(2):
            tensor = f"blk.{layer}.{name}.weight"
            a, b = (0.2 * random.standard_normal(shape) for shape in ((4, columns), (rows, 4)))
            if n := sizes.get(tensor):
                a = (a.reshape(-1, n) @ hadamard(n) / n**0.5).reshape(a.shape)
            writer.add_tensor(f"{tensor}.lora_a", a.astype(np.float32))
            writer.add_tensor(f"{tensor}.lora_b", b.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_adapters_read_the_transformed_input(plain, tmp_path):
    sizes = linears(2, {"attn_q": 64, "attn_k": 64, "attn_v": 64, "attn_output": 128, "ffn_gate": 32, "ffn_up": 32, "ffn_down": 64})
    adapter = write_adapter(tmp_path / "lora.gguf", {}, None)
    right = runtime_log_probabilities(plain("mistral"), TOKENS, exact_cache=True, adapter=adapter)
    assert np.abs(right - runtime_log_probabilities(plain("mistral"), TOKENS, exact_cache=True)).max() > 1

    mark = {"kurtail.rotations.sha256": ("STRING", "some")}
    turned = rewritten(plain("mistral"), tmp_path / "3.gguf", BARE | mark | listed(sizes), sizes)
    fitting = write_adapter(tmp_path / "lora-3.gguf", sizes, "some")
    assert np.abs(runtime_log_probabilities(turned, TOKENS, exact_cache=True, adapter=fitting) - right).max() < UNQUANTIZED


Q = "blk.0.attn_q.weight"


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (listed({"blk.7.attn_q.weight": 64}), "kurtail.online.name lists blk.7.attn_q.weight, which is not a tensor of this file"),
        (listed({Q: 48}), f"kurtail.online.size is 48 for {Q}, needs a power of two from 2 to 8192"),
        (listed({Q: 1}), f"kurtail.online.size is 1 for {Q}, needs a power of two from 2 to 8192"),
        (listed({Q: 16384}), f"kurtail.online.size is 16384 for {Q}, needs a power of two from 2 to 8192"),
        (listed({Q: 256}), f"kurtail.online.size is 256 for {Q}, which does not divide its 128 inputs"),
        (listed({Q: 64}) | {"kurtail.online.kind": ("STRING", ["slanting"])}, f"kurtail.online.kind is 'slanting' for {Q}, this runtime supports hadamard"),
        (listed({Q: 64}) | {"kurtail.online.kind": ("STRING", ["hadamard"] * 2)}, "kurtail.online.kind has 2 values, kurtail.online.name has 1"),
        (listed({Q: 64}) | {"kurtail.online.size": ("UINT32", [64, 64])}, "key kurtail.online.size has 2 values, needs 1"),
        (listed({Q: 64}) | {"kurtail.online.size": ("UINT32", 64)}, "key kurtail.online.size has type u32, expected arr"),
        (listed({Q: 64}) | {"kurtail.online.size": None}, "key kurtail.online.size is missing"),
        (listed({Q: 64}) | {"kurtail.online.name": None}, "key kurtail.online.name is missing"),
        (
            {
                "kurtail.online.name": ("STRING", [Q, Q]),
                "kurtail.online.kind": ("STRING", ["hadamard"] * 2),
                "kurtail.online.size": ("UINT32", [64, 64]),
            },
            f"kurtail.online.name lists {Q} more than once",
        ),
        ({"kurtail.format_version": ("UINT32", 4)}, "kurtail.format_version is 4, this runtime reads up to 3"),
    ],
)
def test_what_it_cannot_do_is_refused(program, plain, tmp_path, keys, told):
    assert told in refusal(program, rewritten(plain("mistral"), tmp_path / "wrong.gguf", BARE | keys))


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"kurtail.r4.size": ("UINT32", 96)}, "kurtail.r4.size is 96, needs a power of two from 2 to 8192"),
        ({"kurtail.r4.size": ("UINT32", 128)}, "kurtail.r4.size is 128, which does not divide the 192 inputs of blk.0.ffn_down.weight"),
        ({"kurtail.r4.kind": ("STRING", "slanting")}, "kurtail.r4.kind is 'slanting', this runtime supports none, hadamard"),
        ({"kurtail.r4.kind": None}, "key kurtail.r4.kind is missing"),
    ],
)
def test_what_it_cannot_do_in_version_2_is_refused(program, plain, tmp_path, keys, told):
    version = {"kurtail.format_version": ("UINT32", 2)}
    assert told in refusal(program, rewritten(plain("mistral"), tmp_path / "wrong.gguf", BARE | version | R4 | keys))


def test_version_2_has_its_architectures(program, gemma, tmp_path):
    version = {"kurtail.format_version": ("UINT32", 2), "kurtail.r4.kind": ("STRING", "none")}
    line = refusal(program, rewritten(gemma, tmp_path / "wrong.gguf", BARE | version))
    assert "architecture gemma3 has kurtail keys" in line


@pytest.mark.parametrize(
    ("kind", "name", "operation"),
    [
        ("mistral", "token_embd.weight", "GET_ROWS"),
        ("qwen2", "token_embd.weight", "GET_ROWS"),  # which is the head as well
        ("mistral", "blk.1.attn_norm.weight", "MUL"),
        ("qwen2", "blk.1.attn_q.bias", "ADD"),
    ],
)
def test_a_tensor_that_something_else_reads_is_refused(program, plain, tmp_path, kind, name, operation):
    line = refusal(program, rewritten(plain(kind), tmp_path / "wrong.gguf", BARE | listed({name: 64})))
    assert f"{name} has an online transform, but the graph of architecture" in line
    assert f"reads it without ({operation}): convert again without a transform for it" in line


def test_a_product_past_the_hooks_is_refused(program, deepseek, tmp_path):
    """Upstream's graph multiplies attn_q_a by itself, and attn_output through the hooks."""
    hooked = linears(2, {"attn_output": 64, "ffn_up": 64})
    right = runtime_log_probabilities(deepseek, TOKENS, exact_cache=True)
    path = rewritten(deepseek, tmp_path / "3.gguf", BARE | listed(hooked), hooked)
    assert np.abs(runtime_log_probabilities(path, TOKENS, exact_cache=True) - right).max() < UNQUANTIZED
    line = refusal(program, rewritten(deepseek, tmp_path / "wrong.gguf", BARE | listed(hooked | {"blk.1.attn_q_a.weight": 64})))
    assert "blk.1.attn_q_a.weight has an online transform, but the graph of architecture deepseek2 reads it without (MUL_MAT)" in line
    with pytest.raises(KurtailError):
        runtime_log_probabilities(tmp_path / "wrong.gguf", TOKENS)


def test_keys_past_the_hooks_are_refused(program, deepseek, tmp_path):
    cached = 32 + 32  # latent values of a token and its rotary part, one head for all
    offset = {"kurtail.kv.k_offset": ("FLOAT32", [0.5] * (2 * cached))}
    line = refusal(program, rewritten(deepseek, tmp_path / "offset.gguf", BARE | offset))
    assert "deepseek2 stores the keys of layer 0 with the offset that kurtail.kv.k_offset subtracts from them" in line

    quantized = {"kurtail.kv_bits": ("UINT32", 4), "kurtail.r3.kind": ("STRING", "hadamard"), "kurtail.r3.size": ("UINT32", cached)}
    path = rewritten(deepseek, tmp_path / "r3.gguf", BARE | quantized)
    assert "deepseek2 stores the keys of layer 0 without R3, which kurtail.r3.kind requires: give -ctk f16" in refusal(program, path)
    done = program("llama-completion", "-m", path, "-no-cnv", "-p", "a", "-n", "1", "-ctk", "f16", "-ctv", "f16")
    assert done.status == 0, done.stderr[-2000:]
