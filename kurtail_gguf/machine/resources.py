"""Runs a command and measures what it took: seconds and peak memory, of everything it started.

Run as a module (``python -m kurtail_gguf.machine.resources COMMAND…``) by :func:`run_measured`, for a reason: Linux
counts the memory of whoever starts a program towards that program's peak, and whoever compares
conversions has torch in memory. This process between them is small.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

#: ru_maxrss counts bytes on macOS, KiB elsewhere.
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True, slots=True)
class Measured:
    """What a command took.

    Args:
        status: its exit status, negative for a signal.
        seconds: from start to end.
        peak_bytes: the largest resident memory of any one of its processes.
    """

    status: int
    seconds: float
    peak_bytes: int


def run_measured(command: Sequence[str], on_line: Callable[[str], None] = lambda line: None) -> Measured:
    """Run a command to its end.

    Args:
        command: program and arguments. Its standard output is thrown away.
        on_line: given every line it writes on standard error, without the line break.
    """
    read, write = os.pipe()
    runner = [sys.executable, "-P", "-m", "kurtail_gguf.machine.resources", str(write), *command]
    process = subprocess.Popen(
        runner, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, pass_fds=(write,),
        text=True, encoding="utf-8", errors="replace",
        env={**os.environ, "PYTHONPATH": _search_path()},
    )  # fmt: skip
    os.close(write)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            on_line(line.rstrip("\n"))
        with open(read, encoding="utf-8", closefd=False) as answer:
            told = answer.read()
        status = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        process.stderr.close()
        os.close(read)
    if not told:
        raise RuntimeError(f"the process that runs {command[0]} ended with status {status} and without a result")
    return Measured(**json.loads(told))


def peak_memory() -> int:
    """The largest resident memory, in bytes, of this process so far, or of one that it started and waited for."""
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * _MAXRSS_UNIT


def _search_path() -> str:
    """This package first, wherever it lies: with -P the current directory is not searched for it."""
    package = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))


def measure(command: Sequence[str]) -> Measured:
    """Run a command as a child of this process, which must not have used more memory itself."""
    start = time.monotonic()
    process = subprocess.Popen(command)
    try:
        # the usage of a child that is waited for includes the children it waited for
        _, status, usage = os.wait4(process.pid, 0)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return Measured(process.returncode, time.monotonic() - start, usage.ru_maxrss * _MAXRSS_UNIT)


def _main(answer: int, command: Sequence[str]) -> None:
    os.set_inheritable(answer, False)

    def stop(signal_number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        measured = measure(command)
    except KeyboardInterrupt:
        sys.exit(130)
    with open(answer, "w", encoding="utf-8") as file:
        json.dump(asdict(measured), file)


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2:])
