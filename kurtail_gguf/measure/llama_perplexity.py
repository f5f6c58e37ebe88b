"""Runs ``llama-perplexity`` and reads what it prints.

Formats are those of ``tools/perplexity/perplexity.cpp`` of the pinned source. The program ends with
status 0 whatever went wrong after loading the model, so success is a result in its output, never its
status. Results come on standard output and log lines on standard error, in the order they happen;
both are read as one stream.
"""

from __future__ import annotations

import codecs
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.messages.progress import Progress, Stage
from kurtail_gguf.runtime import native
from kurtail_gguf.runtime.programs import environment, explain

PROGRAM = "llama-perplexity"

_NUMBER = r"(-?(?:[0-9.]+(?:e[+-]?[0-9]+)?|nan|inf))"
# "perplexity: calculating perplexity over 16 chunks", "kl_divergence: computing over 16 chunks"
_CHUNKS = re.compile(r"(?:calculating perplexity|computing) over (\d+) chunks")
# "[3]23.4567," and "   3      23.4567 ±    1.2345 …"
_CHUNK_DONE = re.compile(rf"\[(\d+)\]{_NUMBER},|^ *(\d+) +{_NUMBER} ± ", re.MULTILINE)

FINAL_ESTIMATE = re.compile(rf"Final estimate: PPL = {_NUMBER} \+/- {_NUMBER}")
MEAN_PPL = re.compile(rf"Mean PPL\(Q\)\s*:\s*{_NUMBER} ±\s*{_NUMBER}")
MEAN_KLD = re.compile(rf"Mean\s+KLD:\s*{_NUMBER} ±\s*{_NUMBER}")
SAME_TOP = re.compile(rf"Same top p:\s*{_NUMBER} ±\s*{_NUMBER} %")


class EvaluationError(KurtailError):
    """A file could not be evaluated."""


def run(
    model: Path,
    arguments: Sequence[str],
    name: str,
    progress: Progress,
    on_start: Callable[[int], None] = lambda chunks: None,
) -> str:
    """Run the program on a model to its end.

    Args:
        model: GGUF file.
        arguments: what follows ``-m MODEL``.
        name: of the progress stage; its units are chunks.
        progress: where it is drawn.
        on_start: called with the number of chunks before the first is computed; raising from it
            stops the program.

    Returns:
        Everything it printed.

    Raises:
        EvaluationError: it ended with a status other than 0, or computed NaN.
    """
    # -lv 4: at its default the program leaves out what the library logs, the bits of activations among it. Weights that are no
    # numbers are told by their tensor's name before anything is computed.
    command = [str(native.executable(PROGRAM)), "-m", str(model), "-lv", "4", "--check-tensors", *arguments]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment()
    )
    try:
        output = _follow(process, model, name, progress, on_start)
        status = process.wait()
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    if status:
        raise EvaluationError(f"{PROGRAM} cannot evaluate {model}: {explain(output, status)}")
    return output


def find(pattern: re.Pattern[str], output: str, model: Path) -> tuple[float, float]:
    """A value and its standard error from the output.

    Raises:
        EvaluationError: they are not there, or not finite numbers.
    """
    found = pattern.search(output)
    if found is None:
        raise EvaluationError(f"{PROGRAM} gave no result for {model}: {explain(output, 0)}")
    value, error = float(found[1]), float(found[2])
    if not (abs(value) < float("inf") and abs(error) < float("inf")):
        raise EvaluationError(f"{PROGRAM} computed {found[1]} ± {found[2]} for {model}: the file is damaged")
    return value, error


def _follow(
    process: subprocess.Popen[bytes], model: Path, name: str, progress: Progress, on_start: Callable[[int], None]
) -> str:
    output = ""
    searched = 0
    done = 0
    stage: Stage | None = None
    with ExitStack() as stages:
        for text in _decoded(process):
            output += text
            if stage is None:
                if (started := _CHUNKS.search(output)) is None:
                    continue
                chunks = int(started[1])
                on_start(chunks)
                stage = stages.enter_context(progress.stage(name, chunks))
                searched = started.end()
            for match in _CHUNK_DONE.finditer(output, searched):
                searched = match.end()
                reached = int(match[1] or match[3])
                # numbers that look like a chunk's in the statistics at the end are none
                if reached == done + 1:
                    done = reached
                    value = match[2] or match[4]
                    if "nan" in value:  # it stays so, and the program would end with other words
                        raise EvaluationError(
                            f"{model} computes NaN in chunk {done} of the text, although its weights are finite: the file "
                            "is damaged, or values are too large for the precision that it runs in"
                        )
                    stage.advance(1, f"perplexity {value}")
    return output


def _decoded(process: subprocess.Popen[bytes]) -> Iterator[str]:
    assert process.stdout is not None
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    while data := os.read(process.stdout.fileno(), 1 << 16):
        yield decoder.decode(data)
