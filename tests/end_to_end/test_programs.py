"""The tools people use: completion, bindings, server, RPC, bench, quantize."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from kurtail_gguf.runtime.gguf_info import read_gguf

PROMPT = "The capital of France is"
HADAMARD = ("--rotation", "hadamard", "--weights", "rtn")


@pytest.fixture(scope="module")
def model(converted, smollm2) -> Path:
    return converted(smollm2, *HADAMARD)


def completion(program, model: Path, *options: object) -> str:
    """Eight greedy tokens from llama-completion, without the prompt."""
    done = program("llama-completion", "-m", model, "-no-cnv", "--no-display-prompt", "--temp", "0", "-n", "8", "-p", PROMPT, *options)
    assert done.status == 0, done.stderr[-2000:]
    return done.stdout.replace("[end of text]", "").strip()


def test_bindings_answer_like_the_program(program, model) -> None:
    code = (
        "import json, sys; from llama_cpp import Llama;"
        "print(json.dumps(Llama(sys.argv[1], verbose=False)(sys.argv[2], max_tokens=8, temperature=0)['choices'][0]['text']))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(model), PROMPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1]).strip()
    assert answer and answer == completion(program, model)


def test_bindings_cache_in_four_bits_without_any_argument(tiny_spm, converted) -> None:
    """llama_cpp says 'no flash attention' unless it is patched not to, and V then falls back to f16."""
    path = converted(tiny_spm, *HADAMARD)
    code = "import sys; from llama_cpp import Llama; Llama(sys.argv[1], n_ctx=64, **eval(sys.argv[2]))"
    for arguments, types in (("{}", "q4_0 q4_0"), ("{'flash_attn': False}", "q4_0 f16"), ("{'type_k': 8}", "q8_0 q4_0")):
        done = subprocess.run([sys.executable, "-c", code, str(path), arguments], capture_output=True, text=True, check=True)
        found = re.search(r"K \((\S+)\): .* V \((\S+)\):", done.stderr)
        assert found and " ".join(found.groups()) == types, done.stderr[-3000:]


def test_bindings_load_our_library(runtime) -> None:
    code = "import llama_cpp; print(llama_cpp.llama_cpp._lib._name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).parent == runtime / "lib"


def test_server_chats(serving, post, model) -> None:
    with serving("llama-server", "-m", model, "-c", "512") as port:
        body = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8, "temperature": 0}
        _, answer = post(port, "/v1/chat/completions", body)
    assert answer["choices"][0]["message"]["content"].strip()
    assert answer["usage"]["completion_tokens"] <= 8


def test_rpc_serves_the_type(program, serving, model) -> None:
    with serving("rpc-server") as port:
        remote = completion(program, model, "--rpc", f"127.0.0.1:{port}", "-ngl", "99")
    assert remote == completion(program, model)


def test_bench_names_the_type(program, model) -> None:
    done = program("llama-bench", "-m", model, "-p", "16", "-n", "4", "-r", "1", "-o", "json")
    assert done.status == 0, done.stderr
    for result in json.loads(done.stdout):
        assert "KT4" in result["model_type"] and (result["type_k"], result["type_v"]) == ("auto", "auto")
    done = program("llama-bench", "--help")
    assert re.search(r"--cache-type-k <t> +\(default: auto\)", done.stdout), done.stdout


def test_licences_are_installed_with_the_programs(runtime) -> None:
    for name in ("llama.cpp", "cpp-httplib", "jsonhpp"):
        assert "Permission is hereby granted" in (runtime / "licenses" / f"LICENSE-{name}").read_text(encoding="utf-8")


def _control_vector(path: Path, direction: np.ndarray) -> Path:
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_tensor("direction.1", direction)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    return path


def test_a_control_vector_is_taken_with_a_warning(program, model, tmp_path) -> None:
    width = read_gguf(model).metadata["llama.embedding_length"]
    path = _control_vector(tmp_path / "vector.gguf", np.zeros(width, np.float32))
    options = ("-no-cnv", "-p", "a", "-n", "2", "-c", "64")
    done = program("llama-completion", "-m", model, *options, "--control-vector", path)
    assert done.status == 0 and "this file is rotated: control vectors must be computed on it" in done.stderr
    assert "control vector" not in program("llama-completion", "-m", model, *options).stderr


def test_a_control_vector_of_the_original_fits_where_the_residual_stream_is_left(
    program, converted, tiny_spm, tiny_reference, text, tmp_path
) -> None:
    """With a diagonal at every site and no R1 the stream is the original's own."""
    ours = converted(tiny_spm, "--weights", "f32", "--calibration", str(text))
    direction = np.random.default_rng(0).normal(size=128).astype(np.float32)
    path = _control_vector(tmp_path / "vector.gguf", direction)
    found = {}
    for name, file in (("original", tiny_reference), ("ours", ours)):
        for steered in ((), ("--control-vector", path)):
            done = program("llama-perplexity", "-m", file, "-f", text, "-c", "64", "--chunks", "8", *steered)
            assert done.status == 0 and "this file is rotated" not in done.stderr, done.stderr[-2000:]
            found[name, bool(steered)] = float(re.search(r"Final estimate: PPL = (\S+)", done.stdout + done.stderr)[1])
    assert found["ours", True] == pytest.approx(found["original", True], rel=1e-3)
    assert abs(found["original", True] / found["original", False] - 1) > 0.01


def test_quantize_offers_the_type(program, tiny_reference, tmp_path) -> None:
    out = tmp_path / "kt4.gguf"
    done = program("llama-quantize", tiny_reference, out, "KT4")
    assert done.status == 0, done.stderr[-2000:]
    # no kurtail keys: 4-bit activations, no rotations, upstream's cache
    log = program("llama-completion", "-m", out, "-no-cnv", "-p", "a", "-n", "2", "-c", "64", "-lv", "4")
    assert log.status == 0
    assert re.search(r"K \(f16\)", log.stdout + log.stderr)
    assert "kurtail: " not in log.stderr


def test_llama_cli_answers(program, model) -> None:
    done = program("llama-cli", "-m", model, "--single-turn", "--temp", "0", "-n", "8", "-p", "What is the capital of France?")
    assert done.status == 0, done.stderr[-2000:]
    assert re.search(r"Generation: [\d.]+ t/s", done.stdout)
