"""What quickstart and test share: the virtual environment, the install, long commands with an ETA. Standard library only."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BIN = VENV / "bin"
PYTHON = BIN / "python"

# what an installed package depends on; anything else may change without a new install
SOURCES = ("pyproject.toml", "CMakeLists.txt", "README.md", "cpp_patches", "kurtail_gguf", "models")
TORCH = "torch==2.13.0"  # a first install takes this one; an environment that has torch>=2.4 keeps it


class ToolError(Exception):
    """One line for the person who typed the command."""


def say(message: str) -> None:
    """A step, told apart from the output of the programs run."""
    print(f"\033[1m== {message}\033[0m" if sys.stdout.isatty() else f"== {message}", flush=True)


def duration(seconds: float) -> str:
    """1:02:03 or 4:05."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def run(command: list, log: Path, what: str) -> None:
    """Run a long command, its output in `log`, its ninja steps ([n/N]) as a line with percent and ETA.

    Raises:
        ToolError: when there is no such program, or it fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    start = last = time.monotonic()
    tty = sys.stdout.isatty()
    with log.open("w") as f, _start([str(c) for c in command], what) as process:
        assert process.stdout is not None
        for line in process.stdout:
            f.write(line)
            step = re.match(r"\s*\[(\d+)/(\d+)\] ", line)
            now = time.monotonic()
            # ninja's [0/N] (it looks at globs, or runs CMake again) says nothing about the time left
            if step and int(step[1]) and now - last >= (1 if tty else 30):
                last = now
                done, total = int(step[1]), int(step[2])
                eta = (now - start) / done * (total - done)
                text = f"   {what}: {done}/{total} ({100 * done // total} %), {duration(now - start)} elapsed, ETA {duration(eta)}"
                print(f"\r{text}\033[K" if tty else text, end="" if tty else "\n", flush=True)
    if tty:
        print("\r\033[K", end="")
    if process.returncode != 0:
        tail = "".join(f"   {x}\n" for x in log.read_text(errors="replace").splitlines()[-25:])
        shown = log.relative_to(ROOT) if log.is_relative_to(ROOT) else log  # a build may lie anywhere
        raise ToolError(f"{what} failed; the end of {shown}:\n{tail}")
    print(f"   {what}: {duration(time.monotonic() - start)}", flush=True)


def _start(command: list[str], what: str) -> subprocess.Popen:
    # set_up puts cmake and ninja into .venv where the machine has none
    path = f"{BIN}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                                cwd=ROOT, env={**os.environ, "PATH": path})
    except FileNotFoundError:
        raise ToolError(f"{what}: {command[0]} is neither in {BIN} nor on the PATH: install it") from None


def fingerprint(names: tuple[str, ...], settings: object) -> str:
    """Digest of the contents of files and directories below the checkout, and of the settings they are built with."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name in names:
        path = ROOT / name
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        for file in files:
            digest.update(str(file.relative_to(ROOT)).encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def pip(*arguments: str, log: str, what: str) -> None:
    """pip in the environment."""
    run([PYTHON, "-m", "pip", "install", *arguments], ROOT / "build" / log, what)


def has(module: str) -> bool:
    """Whether the environment can import a module."""
    return subprocess.run([PYTHON, "-c", f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"]).returncode == 0


def build_dir() -> Path:
    """Where scikit-build-core compiles (pyproject.toml: build-dir)."""
    candidates = sorted((ROOT / "build").glob("cp*/CMakeCache.txt"), key=lambda p: p.stat().st_mtime)
    if not candidates:
        raise ToolError("nothing is built yet: run tools/quickstart")
    return candidates[-1].parent


def page_lacking(build: Path) -> str:
    """Why llama-server was built without its web page, one line; empty where it has one."""
    told = build / "web-page.txt"
    return told.read_text(encoding="utf-8") if told.is_file() else ""


def set_up(tests: bool) -> None:
    """Create .venv and install the package, the runtime and the bindings into it, whatever of that is missing."""
    if sys.version_info < (3, 11):
        raise ToolError(f"Python 3.11 or later is required, this is {sys.version.split()[0]}")
    if not PYTHON.exists():
        say("creating .venv")
        result = subprocess.run([sys.executable, "-m", "venv", VENV], capture_output=True, text=True)
        if result.returncode != 0:
            raise ToolError("cannot create .venv (Debian: apt-get install python3-venv): " + (result.stdout + result.stderr).strip().splitlines()[-1])

    if not has("torch"):
        say("installing torch")
        pip(TORCH, log="pip-torch.log", what="torch")
    if not has("scikit_build_core"):
        tools = [name for name in ("cmake", "ninja") if shutil.which(name) is None]
        pip("scikit-build-core>=0.10", *tools, log="pip-build.log", what="build tools")

    # tests once wanted stay wanted: a later quickstart must not throw their build away
    stamp = VENV / ".kurtail-installed.json"
    installed = json.loads(stamp.read_text()) if stamp.exists() else {}
    tests = tests or installed.get("tests", False)
    settings = {"tests": tests, "fingerprint": fingerprint(SOURCES + (("tests/cpp",) if tests else ()), tests)}
    if installed == settings:
        return

    say("installing kurtail-gguf; the first time this compiles llama.cpp (10 to 20 minutes on 2 cores)")
    options = ["--no-build-isolation", "--verbose"]
    if tests:
        options += ["-Ccmake.define.KURTAIL_TESTS=ON", "-Cbuild.targets=kurtail_runtime;kurtail_bindings;kurtail_tests"]
    pip(*options, ".[test]" if tests else ".", log="pip-install.log", what="package and runtime")
    if lacking := page_lacking(build_dir()):
        say(lacking)
    say("installing the llama_cpp bindings")
    run([BIN / "kurtail-gguf", "install-bindings"], ROOT / "build" / "bindings.log", "bindings")
    stamp.write_text(json.dumps(settings))
