"""``--target stock``: what is in the file, that rotations are folded rightly, and what the commands say of it.

That stock llama.cpp runs such a file, with the same logits, is in test_stock.py.
"""

from __future__ import annotations

import json
import math

from kurtail_gguf.check.simulate import cross_check
from kurtail_gguf.runtime.gguf_info import PROVENANCE_KEYS, read_gguf

STOCK = ("--rotation", "hadamard", "--weights", "rtn", "--target", "stock")


def test_only_upstreams_types_and_the_file_type_of_q4_0(converted, tiny_spm):
    info = read_gguf(converted(tiny_spm, *STOCK))
    types = {tensor.name: tensor.type_name for tensor in info.tensors}
    assert {tensor.type_name for tensor in info.tensors if tensor.is_block_linear} == {"q4_0"}
    assert info.block_bits_per_weight == 4.5
    assert (types["token_embd.weight"], types["output.weight"]) == ("q4_0", "q8_0")
    assert {types[name] for name in types if "norm" in name} == {"f32"}
    assert info.metadata["general.file_type"] == 2
    assert info.metadata["general.quantization_version"] == 2
    assert "general.tensor_extra.name" not in info.metadata
    # of a cache that nobody rounds nothing is measured
    measured = {"kv_divergence", "kv_perplexity", "kv_measured_tokens"}
    assert {field for field, key, _ in PROVENANCE_KEYS if key not in info.metadata} == measured
    assert info.metadata["kurtail.target"] == "stock"
    assert (info.metadata["kurtail.r3.kind"], info.metadata["kurtail.r4.kind"]) == ("none", "none")


def test_a_kurtail_file_says_so(converted, tiny_spm):
    assert read_gguf(converted(tiny_spm, "--rotation", "hadamard", "--weights", "rtn")).metadata["kurtail.target"] == "kurtail"


def test_rotated_weights_are_as_close_to_the_checkpoint_as_llama_quantizes(
    cli, program, converted, tiny_spm, tiny_reference, text, tmp_path
):
    """A rotation folded wrongly is another model: its divergence is that of noise, not of rounding."""
    plain = tmp_path / "plain.gguf"
    done = program("llama-quantize", tiny_reference, plain, "Q4_0")
    assert done.status == 0, done.stderr[-2000:]
    report = tmp_path / "r.json"
    files = converted(tiny_spm, *STOCK), converted(tiny_spm, "--rotation", "none", "--weights", "rtn", "--target", "stock"), plain
    done = cli(
        "eval", *files, "--text", text, "--context", "128", "--chunks", "8", "--reference", tiny_spm, "--json", report
    )
    assert done.status == 0, done.stderr
    print(done.stdout)
    rotated, unrotated, quantized = json.loads(report.read_text(encoding="utf-8"))["models"]
    for result in (rotated, unrotated):
        assert result["kld_mean"] < 1.25 * quantized["kld_mean"], (result, quantized)
        assert (result["runs_as"], result["activation_bits"], result["kv_bits"]) == ("stock W4", None, 16)
        assert "stock W4" in done.stdout
    assert quantized["runs_as"] == "stock"


def test_the_simulation_agrees(converted, tiny_spm, text):
    checked = cross_check(converted(tiny_spm, *STOCK), text, 128, 16)
    print(checked)
    assert abs(checked.log_ratio) < math.log(1.01)


def test_inspect(cli, converted, tiny_spm):
    path = converted(tiny_spm, *STOCK)
    shown = cli("inspect", path)
    assert shown.status == 0
    for part in ("q4_0", "4.50 in the linears", "runs as stock W4, weights rtn", "Hadamard of inputs, online: none"):
        assert part in shown.stdout
    assert "kt4" not in shown.stdout and "activations of" not in shown.stdout
    assert json.loads(cli("inspect", path, "--json").stdout)["kurtail"]["target"] == "stock"


def test_options_that_stock_llama_cpp_cannot_honour(cli, tiny_spm, outputs):
    refused = cli("convert", tiny_spm, outputs / "o.gguf", "--target", "stock", "--kv", "4")
    assert "--kv cannot be combined with --target stock" in refused.error
    assert list(outputs.iterdir()) == []
