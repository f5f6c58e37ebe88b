"""The converter on a device that is not the CPU, without one at hand: see device_checks.py and card_device.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

HERE = Path(__file__).parent


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot be given a device in Python (2.10 can)",
)
def test_on_a_device_of_its_own():
    """In a process of its own: a device is registered for good, and changes what torch takes for the accelerator."""
    checks = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "device_checks.py")]
    root = HERE.parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (HERE, root)))}
    done = subprocess.run(checks, capture_output=True, text=True, cwd=root, env=environment, check=False, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
