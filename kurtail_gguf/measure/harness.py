"""Tasks of EleutherAI's lm-evaluation-harness, run by it on the shipped runtime.

The harness is an optional dependency (extra ``eval``) and is only ever imported by the worker. It
builds prompts and counts; log-likelihoods and text come from the bindings.
"""

from __future__ import annotations

import importlib.util
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kurtail_gguf.measure.llama_perplexity import EvaluationError
from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.messages.progress import Progress, Stage
from kurtail_gguf.runtime import vendored
from kurtail_gguf.runtime.activation_bits import FILE_BITS, Activations, told_activations
from kurtail_gguf.runtime.bindings import require_bindings
from kurtail_gguf.runtime.cache_types import FILE, stage_name

_WORKER = "kurtail_gguf.measure.harness_worker"


class HarnessError(KurtailError):
    """lm-eval is not installed, or a task cannot be run."""


@dataclass(frozen=True, slots=True)
class TasksRequest:
    """Tasks to run.

    Args:
        names: of tasks, groups or tags, as lm-eval has them.
        include_path: a further directory of task YAMLs.
        shots: examples before each document; the task's own number if None.
        limit: only the first so many documents of a task.
    """

    names: tuple[str, ...]
    include_path: Path | None = None
    shots: int | None = None
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Metric:
    """One of a task's metrics; ``stderr`` is None where lm-eval gives none."""

    task: str
    name: str
    filter: str
    value: float
    stderr: float | None

    @property
    def text(self) -> str:
        """Value and standard error for a person."""
        return f"{self.value:.4f}" + ("" if self.stderr is None else f" ± {self.stderr:.4f}")


@dataclass(frozen=True, slots=True)
class TasksResult:
    """What lm-eval found.

    Args:
        version: of lm-eval.
        results: its own keys (``acc,none``, ``acc_stderr,none``) by task.
        activations: the bits in force; None where nothing was rounded.
    """

    version: str
    results: dict[str, dict[str, float | None]]
    activations: Activations | None = None

    def metrics(self) -> list[Metric]:
        """The same one by one, each value with its error."""
        found = []
        for task, values in self.results.items():
            for key, value in values.items():
                name, _, chosen = key.partition(",")
                if value is not None and not name.endswith("_stderr"):
                    found.append(Metric(task, name, chosen, value, values.get(f"{name}_stderr,{chosen}")))
        return found


def check_tasks(request: TasksRequest) -> None:
    """Refuse, before any work, what cannot be run.

    Raises:
        HarnessError: no lm-eval, no directory of that name.
        BindingsError: no bindings.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise HarnessError("--tasks needs lm-eval: pip install 'kurtail-gguf[eval]'")
    if request.include_path is not None and not request.include_path.is_dir():
        raise HarnessError(f"--include-path {request.include_path} is not a directory")
    require_bindings()


def run_tasks(
    model: Path, request: TasksRequest, progress: Progress, cache: str = FILE, activations: str | None = FILE_BITS
) -> TasksResult:
    """Run tasks on a GGUF file.

    Args:
        model: GGUF file.
        request: which tasks.
        progress: a stage for each kind of question the tasks ask, a unit a question.
        cache: one of :data:`kurtail_gguf.runtime.cache_types.CACHE_TYPES`.
        activations: one of :data:`kurtail_gguf.runtime.activation_bits.ACTIVATION_CHOICES`; None is the runtime's default.

    Raises:
        EvaluationError: an unknown task, data that is not at hand, a file that the runtime refuses.
    """
    check_tasks(request)
    include = None if request.include_path is None else str(request.include_path.resolve())
    in_force: Activations | None = None
    with ExitStack() as stages:
        stage: Stage | None = None

        def on_message(message: dict[str, Any]) -> None:
            nonlocal stage, in_force
            if "activations" in message:
                in_force = told_activations(message)
            elif "kind" in message:
                stages.close()
                name = stage_name(message["kind"], model, cache)
                stage = stages.enter_context(progress.stage(name, message["requests"]))
            elif stage is not None:
                stage.advance(message["done"])

        try:
            answer = vendored.run(
                _WORKER,
                {
                    "path": str(model.resolve()),
                    "cache": cache,
                    "activations": activations,
                    "tasks": list(request.names),
                    "include_path": include,
                    "shots": request.shots,
                    "limit": request.limit,
                },
                on_message,
                offline=False,
            )
        except vendored.WorkerError as error:
            raise EvaluationError(f"tasks on {model}: {error}") from None
    return TasksResult(answer["version"], answer["results"], in_force)
