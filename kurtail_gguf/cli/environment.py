"""What libraries read when they are imported, which only commands do; what commands start inherits it."""

from __future__ import annotations

import os
import sys
import warnings

#: Variables that a user has not set, to what libraries are to find in them.
_DEFAULTS = {
    # Threads that wait go to sleep: those of torch and of the runtime would spin and take cores from whatever shares the machine.
    "OMP_WAIT_POLICY": "passive",
    # What a library warns of concerns the code that calls it; a user can do nothing about it. Errors stay.
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def prepare_environment() -> None:
    """Set what the user left open; ``python -W`` and PYTHONWARNINGS still show Python's warnings."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
