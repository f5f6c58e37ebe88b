"""Worker of :mod:`kurtail_gguf.measure.harness`: lm-eval on the runtime.

Request: ``path``, ``cache``, ``activations``, ``tasks``, ``include_path``, ``shots``, ``limit``. Messages: the ``activations`` in force, then as
:class:`kurtail_gguf.measure.harness_model.RuntimeLM` sends them. Result: ``version``, ``results``.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from kurtail_gguf.measure.harness_model import RuntimeLM
from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.runtime import vendored
from kurtail_gguf.runtime.bindings_model import load_asked


def run(request: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Answer a request."""
    manager = TaskManager(include_path=request["include_path"])
    unknown = [name for name in request["tasks"] if name not in manager.all_tasks]
    if unknown:
        raise KurtailError(f"lm-eval knows no task {', '.join(unknown)}: `lm-eval ls tasks` lists them")
    try:
        # loaded to see that the data is there, and again by lm-eval, from its cache
        manager.load(request["tasks"])
    except Exception as error:  # whatever a task's own code, datasets and the network raise
        raise KurtailError(
            f"{', '.join(request['tasks'])} cannot be loaded; is the data available? {type(error).__name__}: {error}"
        ) from error
    model = RuntimeLM(load_asked(request, send), send)
    answer = lm_eval.simple_evaluate(
        model=model,
        tasks=request["tasks"],
        num_fewshot=request["shots"],
        limit=request["limit"],
        task_manager=manager,
        log_samples=False,
    )
    results = {task: _numbers(values) for task, values in answer["results"].items()}
    return {"version": importlib.metadata.version("lm_eval"), "results": results}


def _numbers(values: dict[str, Any]) -> dict[str, float | None]:
    """Metrics (their keys are ``NAME,FILTER``) as JSON knows them; lm-eval's "N/A" is None."""
    metrics = {key: value for key, value in values.items() if "," in key}
    return {key: _number(value) for key, value in metrics.items()}


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


if __name__ == "__main__":
    vendored.serve(run)
