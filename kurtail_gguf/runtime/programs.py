"""Runs llama.cpp's programs for what they tell, whatever the user's environment asks of them."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.runtime import native
from kurtail_gguf.runtime.activation_bits import VARIABLE

# "0.00.049.263 E llama_model_load: error loading model: …", "error while handling argument …", aborts
_ERROR_LINE = re.compile(r"^(?:[\d.]+ )?E +(.+)$|^(error .+)$|^.*(GGML_ASSERT\(.+)$", re.MULTILINE)

#: Reads a prompt and writes on.
_PROGRAM = "llama-completion"
#: One token, from a context as small as there is, on the CPU and from the mapped file: nothing is copied but that token's rows.
_ONE_TOKEN = (
    *("-p", "a", "-n", "1", "-c", "64", "-b", "64", "-no-cnv", "--no-warmup", "--no-perf", "--no-repack"),
    *("-ngl", "0", "-fit", "off", "--simple-io", "-t", "1"),
)


def check_loads(path: Path) -> None:
    """Let the runtime load a file and compute a token, as it will for whoever runs it.

    Raises:
        KurtailError: it does not; with what it logged.
    """
    command = [str(native.executable(_PROGRAM)), "-m", str(path), *_ONE_TOKEN]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(), check=False
    )
    if done.returncode:
        told = explain(done.stdout.decode("utf-8", "replace"), done.returncode)
        raise KurtailError(
            f"the runtime cannot run the converted file, which was removed: {told}: MODEL uses something that upstream's "
            "graph does not support; please report it with its config.json"
        )


def explain(output: str, status: int) -> str:
    """One line on why there is no result: the first and the last error it logged, else its last line."""
    errors = [next(filter(None, match.groups())).strip() for match in _ERROR_LINE.finditer(output)]
    if errors:
        return "; ".join(dict.fromkeys((errors[0], errors[-1])))
    if status < 0:
        return f"killed by signal {-status}: out of memory, or stopped from outside"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"


def environment() -> dict[str, str]:
    """This process's, without what sets options of the programs."""
    # LLAMA_ARG_* set every option of llama.cpp's programs: a measurement must not depend on them. Our own variable is the
    # commands' to read.
    unwanted = ("LLAMA_ARG_", "LLAMA_LOG_", VARIABLE)
    return {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
