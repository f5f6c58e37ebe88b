"""Runs our workers in a Python where ``gguf`` and ``conversion`` are the pinned source's own.

PyPI's ``gguf`` bears the same version number as the pinned one and differs from it, and transformers
imports PyPI's. One process cannot hold both, hence a process of its own for whatever needs ours.

A worker is a module run with ``-m``. It takes one JSON object on standard input and answers with
JSON objects, one a line, on what was its standard output: any number of messages, then either
``{"result": …}`` or ``{"error": "one line"}``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.runtime import native

#: Lines of a worker's standard error that are kept to explain an end without an answer.
_KEPT_LINES = 20

#: Where transformers would put a checkpoint's own Python files to import them: nowhere, whatever the caller trusts.
#: Upstream's converter loads some tokenizers with trust_remote_code, and a class name in tokenizer_config.json is enough
#: to get there. The name is what the error tells.
_NO_MODULES = f"{os.devnull}/code that comes with a checkpoint is not run"

Message = dict[str, Any]


class WorkerError(KurtailError):
    """A worker reported an error, or ended without an answer."""


def run(
    module: str,
    request: Message,
    on_message: Callable[[Message], None] = lambda message: None,
    offline: bool = True,
) -> Any:
    """Run a worker to its end.

    Args:
        module: dotted name of the worker.
        request: what it is given; must survive JSON.
        on_message: called with each message before the result.
        offline: keep it from fetching anything from a hub, and from running Python that comes with a checkpoint; else
            the caller's own setting decides.

    Returns:
        The worker's result.

    Raises:
        WorkerError: with the worker's own line, or the last line it wrote before it died.
    """
    process = subprocess.Popen(
        # -P: the current directory is not searched for modules, whatever lies in it
        [sys.executable, "-P", "-m", module],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=_environment(offline), text=True, encoding="utf-8", errors="replace",
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    last_lines: deque[str] = deque(maxlen=_KEPT_LINES)
    # drained beside: a worker that logs more than a pipe holds would otherwise stop
    drain = threading.Thread(target=last_lines.extend, args=(process.stderr,), daemon=True)
    drain.start()
    try:
        try:
            json.dump(request, process.stdin)
            process.stdin.close()
        except BrokenPipeError:
            pass  # it died while starting: its last lines say why
        for line in process.stdout:
            message = json.loads(line)
            if "error" in message:
                raise WorkerError(message["error"])
            if "result" in message:
                return message["result"]
            on_message(message)
        status = process.wait()
    finally:
        process.kill()
        process.wait()
        drain.join()
        process.stdout.close()
        process.stderr.close()
    raise WorkerError(_died(module, status, list(last_lines)))


def run_module(module: str, arguments: Sequence[str]) -> int:
    """Run a program of the pinned source's own packages on this terminal; returns its status."""
    return subprocess.run([sys.executable, "-P", "-m", module, *arguments], env=_environment(), check=False).returncode


def serve(handle: Callable[[Message, Callable[[Message], None]], Any]) -> None:
    """Be a worker: read the request, answer, exit. Called by a worker module's ``__main__`` part.

    Args:
        handle: takes the request and a function that sends a message; returns the result. What it
            raises as KurtailError or OSError becomes the error line; anything else is a defect and
            ends the process with a traceback.
    """
    # libraries print on standard output; the answers must not be mixed with that
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def send(message: Message) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    request = json.load(sys.stdin)
    try:
        send({"result": handle(request, send)})
    except (KurtailError, OSError) as error:
        send({"error": " ".join(str(error).split())})


def assert_vendored(module: Any) -> None:
    """Refuse to go on with a ``gguf`` or ``conversion`` that is not the pinned source's."""
    home = native.python_dir().resolve()
    if not Path(module.__file__).resolve().is_relative_to(home):
        raise KurtailError(f"{module.__name__} was imported from {module.__file__}, not from {home}")


def _environment(offline: bool = True) -> dict[str, str]:
    search = [str(native.python_dir()), str(Path(__file__).resolve().parents[2])]
    if given := os.environ.get("PYTHONPATH"):
        search.append(given)
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(search),
        "PYTHONIOENCODING": "utf-8",
        # conversion/base.py looks for a gguf-py beside itself unless this is set
        "NO_LOCAL_GGUF": "1",
        # tokenizers are read from the source directory, never fetched
        **({"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": _NO_MODULES} if offline else {}),
        "TOKENIZERS_PARALLELISM": "false",
    }


def _died(module: str, status: int, lines: list[str]) -> str:
    name = module.rpartition(".")[2]
    if status < 0:
        return f"{name} was killed by signal {-status}: out of memory, or stopped from outside"
    told = next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")
    return f"{name} failed with status {status}: {told}"
