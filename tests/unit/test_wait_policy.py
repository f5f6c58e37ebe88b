"""Waiting OpenMP threads sleep, in commands and in what they start, unless the user chose otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

#: A command of ours, started as the installed program starts one, that tells what it and its children see.
PROBE = """
import os, sys
from pathlib import Path
from kurtail_gguf.cli import main
from kurtail_gguf.runtime import native, vendored

home = Path(sys.argv[1])

@main.commands.command("probe")
def probe():
    from kurtail_gguf.measure import llama_perplexity
    from kurtail_gguf.machine.resources import run_measured
    from kurtail_gguf.messages.progress import NullProgress

    assert "torch" not in sys.modules  # it reads the variable when it is imported
    told = [os.environ["OMP_WAIT_POLICY"]]
    native.python_dir = lambda: home
    native.executable = lambda name: home / "program"
    told.append(vendored.run("told_worker", {}))
    told.append(llama_perplexity.run(Path("m.gguf"), [], "", NullProgress()).strip())
    run_measured([str(home / "program"), "error"], told.append)
    print(*told)

sys.argv = ["kurtail-gguf", "probe"]
main.main()
"""
WORKER = """
import os
from kurtail_gguf.runtime import vendored
vendored.serve(lambda request, send: os.environ.get("OMP_WAIT_POLICY"))
"""


@pytest.mark.parametrize(("given", "seen"), [(None, "passive"), ("active", "active")])
def test_a_command_and_its_children_wait_asleep(tmp_path, given, seen):
    (tmp_path / "told_worker.py").write_text(WORKER, encoding="utf-8")
    program = tmp_path / "program"
    program.write_text(
        f"#!{sys.executable}\nimport os, sys\n"
        "print(os.environ.get('OMP_WAIT_POLICY'), file=sys.stderr if sys.argv[1:] == ['error'] else sys.stdout)\n"
    )
    program.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    if given is not None:
        environment["OMP_WAIT_POLICY"] = given
    command = [sys.executable, "-c", PROBE, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [seen] * 4, done.stderr


def test_the_tests_do_so_too():
    # a plugin that imported torch before tests/conftest.py would be too early
    assert os.environ.get("OMP_WAIT_POLICY")
