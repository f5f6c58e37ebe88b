"""kill -9 at any moment: the same command line goes on, and ends with the file of a run that was let be."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

KILLS = 2


def _command(model, out, text):
    options = ("--calibration", text, "--calibration-tokens", 1024, "--tune", 2, "--rotation", "kurtail")
    return [str(part) for part in (sys.executable, "-P", "-m", "kurtail_gguf.cli.main", "convert", model, out, *options)]


def test_killed_at_random_moments_the_file_is_the_same(tiny_spm, text, outputs):
    start = time.monotonic()
    assert subprocess.run(_command(tiny_spm, outputs / "a.gguf", text), capture_output=True, check=False).returncode == 0
    whole = time.monotonic() - start
    seed = int.from_bytes(os.urandom(4))
    moments = random.Random(seed)
    out, killed = outputs / "b.gguf", 0
    while killed < KILLS and not out.exists():
        with subprocess.Popen(_command(tiny_spm, out, text), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                # a run spends its first seconds on importing torch
                process.wait(whole * moments.uniform(0.3, 0.95))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                killed += 1
    done = subprocess.run(_command(tiny_spm, out, text), capture_output=True, text=True, check=False)
    assert done.returncode == 0, (seed, done.stderr)
    assert killed, f"seed {seed}: no run was still there to be killed"
    assert out.read_bytes() == (outputs / "a.gguf").read_bytes(), seed
    assert sorted(path.name for path in outputs.iterdir()) == ["a.gguf", "b.gguf"], seed
