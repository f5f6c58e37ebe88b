"""cpp_patches/web_page.py with stand-ins for npm and Node: built once for the same sources, and a line where it cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "cpp_patches" / "web_page.py"
#: Writes a page and a line for each call.
NPM = """#!/bin/sh
echo "$1 $2" >> "$CALLS"
if [ "$1" = run ]; then mkdir -p "$LLAMA_UI_OUT_DIR"; cat src/page > "$LLAMA_UI_OUT_DIR/index.html"; fi
"""


@pytest.fixture
def make(tmp_path):
    """``make(**programs)``: what the script prints, once the PATH has these programs and no others."""
    source = tmp_path / "ui"
    (source / "src").mkdir(parents=True)
    (source / "src" / "page").write_text("first", encoding="utf-8")

    def run(**programs: str) -> str:
        path = tmp_path / "bin"
        path.mkdir(exist_ok=True)
        for old in path.iterdir():
            old.unlink()
        for name, text in programs.items():
            (path / name).write_text(text, encoding="utf-8")
            (path / name).chmod(0o755)
        # npm's stand-in needs these two
        for name in ("mkdir", "cat"):
            (path / name).symlink_to(f"/bin/{name}")
        environment = {"PATH": str(path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "CALLS": str(tmp_path / "calls")}
        places = ["--source", source, "--build", tmp_path / "build", "--kept", tmp_path / "why"]
        (tmp_path / "build").mkdir(exist_ok=True)
        done = subprocess.run([sys.executable, SCRIPT, *map(str, places)], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout

    return run


def node(version: str) -> str:
    return f"#!/bin/sh\necho {version}\n"


def test_the_same_sources_are_built_once(make, tmp_path):
    page = tmp_path / "ui" / "dist" / "index.html"
    (tmp_path / "build" / "web-page-of-a-killed-run" / "ui").mkdir(parents=True)
    make(npm=NPM, node=node("v20.19.2"))
    assert page.read_text(encoding="utf-8") == "first"
    assert (tmp_path / "why").read_text(encoding="utf-8") == ""
    assert make(npm=NPM, node=node("v20.19.2")) == ""
    # another checkout, on which nothing was built: out of the cache, even without npm
    page.unlink()
    (tmp_path / "ui" / ".kurtail").unlink()
    make()
    assert page.read_text(encoding="utf-8") == "first"
    calls = tmp_path / "calls"
    assert calls.read_text(encoding="utf-8").splitlines() == ["ci --ignore-scripts", "run build"]
    (tmp_path / "ui" / "src" / "page").write_text("second", encoding="utf-8")
    make(npm=NPM, node=node("v22.0.0"))
    assert page.read_text(encoding="utf-8") == "second"
    assert len(calls.read_text(encoding="utf-8").splitlines()) == 4
    assert [path.name for path in (tmp_path / "build").iterdir()] == ["web-page.log"]  # npm's modules are gone


@pytest.mark.parametrize(
    ("programs", "told"),
    [
        ({}, "npm is not on the PATH; install Node 20.19 or later with npm and rerun the build"),
        ({"npm": NPM}, "node is not on the PATH"),
        ({"npm": NPM, "node": node("v18.20.4")}, "node is 18.20; install a newer one"),
        ({"npm": "#!/bin/sh\necho 'npm error code ENOTFOUND' >&2; exit 1\n", "node": node("v22.1.0")}, "npm ci --ignore-scripts failed (npm error code ENOTFOUND)"),
        ({"npm": "#!/bin/sh\n", "node": node("v22.1.0")}, "npm run build wrote no index.html"),
    ],
)  # fmt: skip
def test_without_it_the_server_has_no_page_and_the_build_says_why(make, tmp_path, programs, told):
    said = make(**programs).splitlines()[-1]
    assert said.startswith("llama-server is built without its web page: ") and told in said
    assert (tmp_path / "why").read_text(encoding="utf-8") == said
    assert not (tmp_path / "ui" / "dist").exists()


def test_a_page_of_older_sources_is_not_embedded(make, tmp_path):
    make(npm=NPM, node=node("v20.19.2"))
    (tmp_path / "ui" / "src" / "page").write_text("second", encoding="utf-8")
    make()
    assert not (tmp_path / "ui" / "dist").exists()
    assert os.listdir(tmp_path / "cache" / "kurtail-gguf")  # that one is kept
