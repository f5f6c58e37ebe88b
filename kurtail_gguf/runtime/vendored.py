"""Runs our workers in a Python where ``gguf`` and ``conversion`` are the pinned source's own.

PyPI's ``gguf`` bears the same version number as the pinned one and differs from it, and transformers
imports PyPI's. One process cannot hold both, hence a process of its own for whatever needs ours.

A worker is a module run with ``-m``. It takes JSON objects, one a line, on standard input and answers each with
JSON objects, one a line, on what was its standard output: any number of messages, then either
``{"result": …}`` or ``{"error": "one line"}``.
"""

from __future__ import annotations

import contextlib
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


class Worker:
    """A worker's process, started at once and asked any number of times; a context that ends it.

    Starting one can take seconds of imports, which then pass beside other work, and once for all requests.

    Args:
        module: dotted name of the worker.
        offline: keep it from fetching anything from a hub, and from running Python that comes with a checkpoint; else
            the caller's own setting decides.
    """

    def __init__(self, module: str, offline: bool = True) -> None:
        self._module, self._offline, self._asked = module, offline, False
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            # -P: the current directory is not searched for modules, whatever lies in it
            [sys.executable, "-P", "-m", self._module],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=_environment(self._offline), text=True, encoding="utf-8", errors="replace",
        )  # fmt: skip
        self._last_lines: deque[str] = deque(maxlen=_KEPT_LINES)
        # drained beside: a worker that logs more than a pipe holds would otherwise stop
        self._drain = threading.Thread(target=self._last_lines.extend, args=(self._process.stderr,), daemon=True)
        self._drain.start()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_error: object) -> None:
        process = self._process
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.kill()
        process.wait()
        self._drain.join()
        process.stdout.close()
        process.stderr.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()

    def ask(self, request: Message, on_message: Callable[[Message], None] = lambda message: None) -> Any:
        """Give it a request, and wait for the result.

        Args:
            request: what it is given; must survive JSON.
            on_message: called with each message before the result.

        Returns:
            The worker's result.

        Raises:
            WorkerError: with the worker's own line, or the last line it wrote before it died.
        """
        if self._asked and self._process.poll() is not None:
            self.__exit__()
            self._start()  # the system ended it while it waited
        self._asked = True
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it died while starting: its last lines say why
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        for line in process.stdout:
            message = json.loads(line)
            if "error" in message:
                raise WorkerError(message["error"])
            if "result" in message:
                return message["result"]
            on_message(message)
        status = process.wait()
        self._drain.join()
        raise WorkerError(_died(self._module, status, list(self._last_lines)))


def run(
    module: str,
    request: Message,
    on_message: Callable[[Message], None] = lambda message: None,
    offline: bool = True,
) -> Any:
    """Run a worker for one request; arguments, result and errors as :class:`Worker`'s."""
    with Worker(module, offline) as worker:
        return worker.ask(request, on_message)


def run_module(module: str, arguments: Sequence[str]) -> int:
    """Run a program of the pinned source's own packages on this terminal; returns its status."""
    return subprocess.run([sys.executable, "-P", "-m", module, *arguments], env=_environment(), check=False).returncode


def serve(handle: Callable[[Message, Callable[[Message], None]], Any]) -> None:
    """Be a worker: read requests and answer them until there are no more. Called by a worker module's ``__main__`` part.

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

    for line in sys.stdin:
        try:
            send({"result": handle(json.loads(line), send)})
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
