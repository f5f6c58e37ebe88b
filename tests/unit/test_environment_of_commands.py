"""Libraries find warnings switched off, in commands and in what they start, unless the user asked for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_PROBE = """
import subprocess, sys, warnings
from kurtail_gguf.cli import main

@main.commands.command("probe")
def probe():
    warnings.warn("ours to mend", FutureWarning)
    subprocess.run([sys.executable, "-c", "import warnings; warnings.warn('a child', FutureWarning)"], check=True)

sys.argv = ["kurtail-gguf", "probe"]
main.main()
"""


@pytest.mark.parametrize(("given", "shown"), [(None, 0), ("default", 2)])
def test_warnings_are_shown_to_who_asks(given, shown):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    if given is not None:
        environment["PYTHONWARNINGS"] = given
    done = subprocess.run([sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.count("FutureWarning") == shown, done.stderr
