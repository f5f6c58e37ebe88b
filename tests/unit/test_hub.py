"""Models of the Hub: what names stand for, the cache's own directories, and downloads from a server made here."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import kurtail_gguf
from kurtail_gguf.messages.errors import SourceError
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.model.loading.hub import HubModel, parse_hub_model
from kurtail_gguf.model.loading.source import resolve_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"
#: Resolves a model as the command line does, in a process of its own: the library reads its settings when it is imported.
PROGRAM = """
import sys
from pathlib import Path
from kurtail_gguf.messages.errors import SourceError
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.model.loading.source import resolve_source
class Told(NullProgress):
    def stage(self, name, total):
        print(name, total, end="; ")
        return self
    def __enter__(self):
        return self
    def __exit__(self, *error):
        pass
    def advance(self, n=1, note=""):
        print("finished", note, end="; ")
    def within(self, share, note=""):
        print(f"{share:.2f}", note, end="; ")
try:
    if "--outline" in sys.argv:
        from kurtail_gguf.model.loading.outline import outline
        Path("scratch").mkdir()
        found = outline(sys.argv[1], Path("scratch"))
        print(found.directory, found.download, found.cache.name, found.note)
        sys.exit()
    progress = Told() if "--progress" in sys.argv else NullProgress()
    print(resolve_source(sys.argv[1], Path("work"), progress, "--allow-pickle" in sys.argv))
except SourceError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("hf:Qwen/Qwen3-0.6B", HubModel("Qwen/Qwen3-0.6B")),
        ("hf:a/b@v1", HubModel("a/b", "v1")),
        ("https://huggingface.co/a/b", HubModel("a/b")),
        ("https://huggingface.co/a/b/", HubModel("a/b")),
        ("https://hf.co/a/b/tree/refs/pr/1", HubModel("a/b", "refs/pr/1")),
        ("huggingface.co/a/b?library=x", HubModel("a/b")),
        ("a/b", HubModel("a/b")),
        ("a/b/c", None),
        ("./a", None),
        ("/a/b", None),
        ("a/b.gguf", None),
        ("smollm2-135m", None),
        ("out/b", None),
    ],
)
def test_names(model, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()  # a path below a directory that is there was meant as one
    assert parse_hub_model(model) == expected


@pytest.mark.parametrize("model", ["hf:b", "https://huggingface.co/datasets/a/b", "https://hf.co/a/b/blob/main/c.gguf", "hf:a/b/c.gguf"])
def test_addresses_of_something_else(model):
    with pytest.raises(SourceError, match="is not the name of a model on the Hugging Face Hub: give hf:owner/name"):
        parse_hub_model(model)


def test_the_root_of_a_cached_model_is_its_main_snapshot(tmp_path):
    root = tmp_path / "models--a--b"
    for name in ("one", "two"):
        (root / "snapshots" / name).mkdir(parents=True)
        (root / "snapshots" / name / "config.json").write_text("{}")
    with pytest.raises(SourceError, match="models--a--b is .* without a snapshot of main; it contains one, two: give"):
        resolve_source(str(root), tmp_path, NullProgress())
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("two")
    assert resolve_source(str(root), tmp_path, NullProgress()) == root / "snapshots" / "two"


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as a download asks for."""

    files: dict[str, bytes]
    status = 200
    error = ""

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        headers = {}
        if self.path.startswith("/api/models/"):
            told = [{"rfilename": one, "size": len(data)} for one, data in self.files.items()]
            status, content = self.status, json.dumps({"id": "a/b", "sha": COMMIT, "siblings": told}).encode()
            headers = {"X-Error-Code": self.error} if self.error else {}
        elif name not in self.files:  # the library asks for things of its own as well
            status, content = 404, b""
        else:
            status, content = 200, self.files[name]
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub() -> Iterator[type[_Hub]]:
    """The server's class, whose ``files`` it holds; ``address`` is where it listens on this machine."""
    handler = type("Hub", (_Hub,), {"files": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def resolve(tmp_path):
    """``resolve(address, model, *options)``: what the program prints, its cache below ``tmp_path``."""

    def run(address: str, *words: str, **more: str) -> str:
        (tmp_path / "here").mkdir(exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(Path(kurtail_gguf.__file__).parents[1]), **more}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *words], cwd=tmp_path / "here", env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert "\n" not in done.stdout.rstrip("\n")
        return done.stdout.strip()

    return run


def test_a_model_is_downloaded_into_the_hubs_own_cache(hub, resolve, tmp_path):
    index = json.dumps({"weight_map": {"w": "model-1.safetensors"}}).encode()
    hub.files.update({
        "config.json": b"{}", "tokenizer.json": b"{}", "README.md": b"# b", "model.safetensors.index.json": index,
        "model-1.safetensors": b"x" * 1000, "consolidated.safetensors": b"y", "pytorch_model.bin": b"z", "photo.png": b"p",
    })  # fmt: skip
    snapshot = tmp_path / "home" / "hub" / "models--a--b" / "snapshots" / COMMIT
    assert resolve(hub.address, "hf:a/b") == str(snapshot)
    assert {path.name for path in snapshot.iterdir()} == {
        "config.json", "tokenizer.json", "README.md", "model.safetensors.index.json", "model-1.safetensors",
    }  # fmt: skip
    assert (snapshot / "model-1.safetensors").read_bytes() == b"x" * 1000
    # no server: what is there is taken
    assert resolve("http://127.0.0.1:9", f"hf:a/b@{COMMIT}") == str(snapshot)


def test_a_download_tells_how_far_it_is(hub, resolve):
    hub.files.update({"config.json": b"{}", "model.safetensors": bytes(30_000_000)})
    told = resolve(hub.address, "hf:a/b", "--progress").split("; ")
    assert told[0] == "download a/b 1" and told[-2] == "finished model.safetensors, 30 MB"
    shares = [float(one.split()[0]) for one in told[1:-2]]
    assert len(shares) > 1 and shares == sorted(shares) and shares[-1] == 1
    assert told[1].endswith("of 30 MB") and told[1].split()[1] == "model.safetensors,"


def test_what_the_hub_does_not_give_is_told_with_the_remedy(hub, resolve, tmp_path):
    hub.files.update({"config.json": b"{}", "pytorch_model.bin": b"z"})
    assert "a/b has its weights only in .bin pickles" in resolve(hub.address, "a/b")
    assert resolve(hub.address, "a/b", "--allow-pickle").endswith(COMMIT)
    del hub.files["pytorch_model.bin"]
    hub.files["b-Q4_0.gguf"] = b"GGUF"
    assert "contains GGUF files and no safetensors: prefer the original model, or run hf download a/b b-Q4_0.gguf" in resolve(hub.address, "hf:a/b")
    hub.status, hub.error = 401, "RepoNotFound"
    assert "this model does not exist, or is private: check the name, or log in" in resolve(hub.address, "hf:a/c")
    hub.status, hub.error = 403, "GatedRepo"
    assert "its licence must be accepted first" in resolve(hub.address, "hf:a/c")


@pytest.mark.parametrize("offline", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_without_a_network_one_line_says_what_to_do(resolve, offline):
    told = resolve("http://127.0.0.1:9", "a/b", **offline)
    assert told.startswith("refused: a/b is not a local directory, and cannot be downloaded from the Hugging Face Hub (")
    assert told.endswith("run hf download a/b --local-dir b where there is a network, copy the directory here and give it as MODEL")


def test_a_plan_downloads_config_json_alone(hub, resolve, tmp_path):
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 192, "vocab_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "torch_dtype": "bfloat16", "tie_word_embeddings": True,
    }  # fmt: skip
    hub.files.update({"config.json": json.dumps(config).encode(), "model.safetensors": b"not asked for"})
    values = 64 * 128 + 128 + 2 * (2 * 128 + 128 * (2 * 128 + 2 * 64) + 3 * 128 * 192)
    assert resolve(hub.address, "hf:a/b", "--outline") == (
        f"scratch {2 * values} hub a/b is not downloaded yet; its shapes come from its config.json, which was"
    )
    snapshot = tmp_path / "home" / "hub" / "models--a--b" / "snapshots" / COMMIT
    assert [path.name for path in snapshot.iterdir()] == ["config.json"]


def test_a_plan_of_a_model_that_sees_is_of_its_text(hub, resolve):
    text = {
        "model_type": "ministral3", "hidden_size": 128, "intermediate_size": 192, "vocab_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "tie_word_embeddings": False,
    }  # fmt: skip
    config = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "dtype": "bfloat16", "text_config": text}
    hub.files.update({"config.json": json.dumps(config).encode()})
    values = 2 * 64 * 128 + 128 + 2 * (2 * 128 + 128 * (2 * 128 + 2 * 64) + 3 * 128 * 192)
    assert resolve(hub.address, "hf:a/b", "--outline").startswith(f"scratch {2 * values} hub a/b is not downloaded yet")
