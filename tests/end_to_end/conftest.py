"""Fixtures of the tests that need the installed runtime: tiny models with real tokenizers, the real model, data.

The vocabulary of every file is written by upstream's converter, which identifies byte-level BPE
tokenizers by a hash and refuses unknown ones. So the tiny BPE model borrows SmolLM2's tokenizer from
the embedded model source; the tiny SentencePiece model has one that tools/tiny_tokenizer.py trains.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from kurtail_gguf.messages.errors import SourceError
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.model.loading.source import resolve_source
from kurtail_gguf.runtime import native
from kurtail_gguf.runtime.activation_bits import FILE_BITS, VARIABLE
from kurtail_gguf.runtime.bindings import BindingsError, require_bindings
from kurtail_gguf.runtime.export import export_reference
from kurtail_gguf.runtime.gguf_info import read_gguf
from kurtail_gguf.runtime.logits import mean_divergence, runtime_log_probabilities

ROOT = Path(__file__).parents[2]
#: Where the texts are that quality is measured on; KURTAIL_DATA names another directory.
DATA = Path(os.environ.get("KURTAIL_DATA") or ROOT.parent / "shared" / "data").resolve()
_TEXTS = ("wiki.test.raw", "c4.calibration.txt")

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model")


def _lacking(reason: str) -> NoReturn:
    """Skips, but fails under tools/test: that installs everything, so what is not there is broken."""
    if "KURTAIL_BUILD_DIR" in os.environ:
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session", autouse=True)
def _bits_of_the_file() -> Iterator[None]:
    """Files run with the bits of activations that they say, not with the default of this machine's instruction set; which is
    test_activation_bits.py's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, FILE_BITS)
        yield


@pytest.fixture(scope="session", autouse=True)
def runtime() -> Path:
    """The installed runtime's directory; without it these tests say so."""
    try:
        return native.native_dir()
    except native.NativeMissing as error:
        _lacking(str(error))


@dataclass(frozen=True)
class Finished:
    """A finished command."""

    status: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The one error line; fails where there is none, more than one, or a traceback."""
        assert self.status == 1, (self.status, self.stderr)
        lines = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in self.stderr, self.stderr
        assert self.stderr.splitlines()[-1] == lines[0]
        return lines[0]


def run_cli(*arguments: object, **options: object) -> Finished:
    """Run ``kurtail-gguf`` in a process of its own."""
    command = [sys.executable, "-m", "kurtail_gguf.cli.main", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=1800, **options
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def run_program(name: str, *arguments: object) -> Finished:
    """Run a program of the runtime."""
    command = [str(native.executable(name)), *map(str, arguments)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False, timeout=600
    )
    return Finished(done.returncode, done.stdout, done.stderr)


@contextlib.contextmanager
def run_server(name: str, *arguments: object) -> Iterator[int]:
    """A server of the runtime on a free loopback port, until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(native.executable(name)), *map(str, arguments), "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(600):
                assert process.poll() is None, f"{name} ended with {process.returncode}"
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            yield port
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="session")
def cli() -> Callable[..., Finished]:
    return run_cli


@pytest.fixture(scope="session")
def program() -> Callable[..., Finished]:
    return run_program


@pytest.fixture(scope="session")
def serving() -> Callable[..., contextlib.AbstractContextManager[int]]:
    """``with serving(name, *arguments) as port``: a server of the runtime."""
    return run_server


@pytest.fixture(scope="session")
def post() -> Callable[[int, str, dict], tuple[int, dict]]:
    """``post(port, path, body)``: status and answer of a server; waits until it has loaded its model."""

    def ask(port: int, path: str, body: dict) -> tuple[int, dict]:
        url = f"http://127.0.0.1:{port}{path}"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        for _ in range(300):  # it listens before the model is loaded
            try:
                with urllib.request.urlopen(request, timeout=120) as response:
                    return response.status, json.load(response)
            except urllib.error.HTTPError as error:
                if error.code != 503:
                    return error.code, json.load(error)
                time.sleep(0.2)
        raise TimeoutError("the server is still loading its model")

    return ask


@pytest.fixture(scope="session")
def wiki() -> Path:
    """WikiText-2's test split; beside it lies what to calibrate on."""
    if missing := [name for name in _TEXTS if not (DATA / name).is_file()]:
        pytest.skip(f"{DATA} has no {' and no '.join(missing)}: name their directory in KURTAIL_DATA")
    return DATA / _TEXTS[0]


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """Some thousands of tokens of any vocabulary, without \\r and specials: older documents of the project, which stay as
    they are, so that nothing measured changes with the documentation."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    sources = sorted((ROOT / "tests" / "text").glob("*.txt"))
    path.write_text("\n".join(source.read_text(encoding="utf-8") for source in sources), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct as an HF directory. Skips where it cannot be downloaded, for nothing else."""
    return _known_model("smollm2-135m", tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="session")
def qwen(tmp_path_factory) -> Path:
    """Qwen2.5-Coder-0.5B-Instruct likewise: biases, several types of tensors, a vocabulary of 151,936."""
    return _known_model("qwen2.5-coder-0.5b", tmp_path_factory.mktemp("qwen"))


def _known_model(name: str, work_dir: Path) -> Path:
    try:
        return resolve_source(name, work_dir, NullProgress())
    except SourceError as error:
        if not str(error).startswith("pip cannot download"):
            raise
        pytest.skip(f"{name} cannot be downloaded: {error}")


def save_tiny_llama(directory: Path, vocabulary: int, layers: int = 2, **tokens: int) -> Path:
    """A random Llama (hidden 128, FFN 384 = 128·3, heads 4 of 64 over 2 KV heads) whose logits mean something.

    Weights are larger than an initialisation's, so that attention and FFN move the logits visibly.
    """
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=384, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=1024,
        tie_word_embeddings=False, **tokens,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.3 if "norm" in name else 2.0 if "embed" in name or "lm_head" in name else 1.0
            parameter.copy_(1 + scale * noise if "norm" in name else scale * noise / parameter.shape[-1] ** 0.5)
    model.save_pretrained(directory, max_shard_size="300KB")
    return directory


@pytest.fixture(scope="session")
def tiny_bpe(tmp_path_factory, smollm2) -> Path:
    """The tiny Llama with SmolLM2's byte-level BPE, in several shards."""
    directory = save_tiny_llama(
        tmp_path_factory.mktemp("tiny-bpe"), 49152, bos_token_id=1, eos_token_id=2, pad_token_id=2
    )
    for name in _TOKENIZER_FILES:
        if (smollm2 / name).is_file():
            shutil.copy(smollm2 / name, directory)
    return directory


@pytest.fixture(scope="session")
def tiny_spm(tmp_path_factory) -> Path:
    """The tiny Llama with a SentencePiece model, in several shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        tools = importlib.import_module("tiny_tokenizer")
    directory = save_tiny_llama(tmp_path_factory.mktemp("tiny-spm"), tools.VOCABULARY, bos_token_id=1, eos_token_id=2)
    tools.write_tokenizer(directory, chat_template="{{ messages[0]['content'] }}")
    return directory


@pytest.fixture(scope="session")
def one_layer(tmp_path_factory, smollm2) -> Path:
    """SmolLM2's embedding, first layer and head: real activations, too shallow for rounding to turn chaotic.

    The head is scaled by a quarter: what the first layer leaves in the residual stream was not made for
    it, and extreme logits would drown a comparison in noise.
    """
    directory = tmp_path_factory.mktemp("one-layer")
    for path in smollm2.iterdir():
        if path.suffix in (".json", ".jinja") and not path.name.endswith(".index.json"):
            shutil.copy(path, directory)
    config = json.loads((smollm2 / "config.json").read_text(encoding="utf-8"))
    changes = {"num_hidden_layers": 1, "tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    tensors = {}
    for shard in sorted(smollm2.glob("*.safetensors")):
        tensors |= load_file(shard)
    kept = {name: value for name, value in tensors.items() if ".layers." not in name or ".layers.0." in name}
    kept["lm_head.weight"] = kept["model.embed_tokens.weight"] / 4
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="session")
def converted(tmp_path_factory) -> Callable[..., Path]:
    """``converted(source, *options)``: the GGUF of a conversion, made once for each set of options."""
    made: dict[tuple[str, ...], Path] = {}
    directory = tmp_path_factory.mktemp("converted")

    def make(source: Path | str, *options: str) -> Path:
        key = (str(source), *options)
        if key not in made:
            out = directory / f"{len(made)}.gguf"
            done = run_cli("convert", source, out, *options)
            assert done.status == 0, done.stderr
            assert f"llama-cli -m {out}" in done.stdout
            made[key] = out
        return made[key]

    return make


@pytest.fixture
def outputs(tmp_path) -> Path:
    """An empty directory for OUT; after a failed command it must still be empty."""
    directory = tmp_path / "outputs"
    directory.mkdir()
    return directory


def assert_nothing_written(directory: Path) -> None:
    """Nothing lies in the directory, hidden files included."""
    assert os.listdir(directory) == []


@pytest.fixture(scope="session")
def with_tokenizer(tmp_path_factory, save_tiny) -> Callable[..., Path]:
    """``with_tokenizer(kind, tokenizer, vocabulary, **changes)``: a tiny model's HF directory with the tokenizer of another;
    ``changes`` are of its config."""

    def make(kind: str, tokenizer: Path, vocabulary: int, **changes: object) -> Path:
        # not named after the kind: the runtime expects special tokens in the vocabulary of what is called phi3
        directory = tmp_path_factory.mktemp("tiny")
        save_tiny(kind, directory, vocab_size=vocabulary, **changes)
        for path in tokenizer.glob("tokenizer*"):
            shutil.copy(path, directory)
            if kind.startswith("glm4") and path.suffix == ".json":
                # upstream's converter looks for these tokens
                said = path.read_text(encoding="utf-8")
                for ours, theirs in (("<repo_name>", "<|user|>"), ("<file_sep>", "[gMASK]"), ("<filename>", "<|observation|>")):
                    said = said.replace(ours, theirs)
                (directory / path.name).write_text(said, encoding="utf-8")
        return directory

    return make


@pytest.fixture(scope="session")
def tiny_reference(tmp_path_factory, tiny_spm) -> Path:
    """The tiny SentencePiece model as upstream's converter writes it, in f32."""
    path = tmp_path_factory.mktemp("reference") / "tiny.gguf"
    export_reference(tiny_spm, path)
    return path


@pytest.fixture(scope="session")
def tiny_bpe_reference(tmp_path_factory, tiny_bpe) -> Path:
    """The same of the tiny model with SmolLM2's tokenizer."""
    path = tmp_path_factory.mktemp("reference") / "tiny-bpe.gguf"
    export_reference(tiny_bpe, path)
    return path


@pytest.fixture(scope="session")
def bindings() -> None:
    """The llama_cpp package that runs the shipped libraries; without it these tests say so."""
    try:
        require_bindings()
    except BindingsError as error:
        _lacking(str(error))


#: Share of the divergence from what is said at the next position that 4 bits of random weights may leave.
_NEARER = 0.5


def _save_random_model(directory: Path, kind: str, given: dict[str, Any], keys: dict[str, Any], files: Iterable[Path]) -> None:
    """An HF directory.

    Args:
        directory: an empty one.
        kind: model_type.
        given: what its config says.
        keys: what is written into config.json beside what transformers writes.
        files: of a tokenizer, copied.
    """
    torch.manual_seed(1)  # what is added to below
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**given), dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.1 * noise)
    model.save_pretrained(directory)
    saved = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    (directory / "config.json").write_text(json.dumps(saved | keys), encoding="utf-8")
    for path in files:
        shutil.copy(path, directory)


def _assert_sense_in_four_bits(source: Path, file: Path) -> None:
    """What a file says is nearer to what its model says than to that at the next position."""
    info = read_gguf(file)
    assert info.runs_as in ("W4A4KV8", "W4A4KV16")
    tokens = [[1, *np.random.default_rng(5).integers(3, 320, 60).tolist()]]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        right = torch.log_softmax(model(torch.tensor(tokens)).logits[0], -1).numpy()
    found = runtime_log_probabilities(file, tokens)
    here, elsewhere = mean_divergence(right, found), mean_divergence(right, np.roll(found, 1, axis=0))
    print(f"{info.architecture} {info.runs_as} in four bits: divergence {here:.3f}, from the next position's {elsewhere:.3f}; spread {right.std():.2f}")
    assert here < _NEARER * elsewhere


@pytest.fixture(scope="session")
def save_random_model() -> Callable[..., None]:
    """:func:`_save_random_model`."""
    return _save_random_model


@pytest.fixture(scope="session")
def assert_sense_in_four_bits() -> Callable[[Path, Path], None]:
    """:func:`_assert_sense_in_four_bits`."""
    return _assert_sense_in_four_bits
