"""A file spread over two rpc-server processes by llama.cpp's RPC backend, on this machine's loopback."""

from __future__ import annotations

import re
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from kurtail_gguf.runtime import native

OPTIONS = ("--chunks", "4", "-c", "64", "-b", "64", "-t", "1")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(port: int, server: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert server.poll() is None, f"rpc-server ended with status {server.returncode}"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("rpc-server does not listen")


@pytest.fixture
def servers() -> Iterator[list[str]]:
    """Addresses of two servers."""
    program = native.executable("rpc-server")
    ports = [_free_port(), _free_port()]
    command = [str(program), "-H", "127.0.0.1", "-t", "1", "-p"]
    processes = [
        subprocess.Popen([*command, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for port in ports
    ]
    try:
        for port, process in zip(ports, processes, strict=True):
            _wait_for(port, process)
        yield [f"127.0.0.1:{port}" for port in ports]
    finally:
        for process in processes:
            process.terminate()
            process.wait()


def _perplexity(told: str) -> float:
    found = re.search(r"Final estimate: PPL = ([\d.]+)", told)
    assert found, told
    return float(found.group(1))


def test_two_processes_share_a_file(program, converted, tiny_spm, text, servers):
    model = converted(tiny_spm, "--rotation", "hadamard", "--weights", "rtn")
    here = program("llama-perplexity", "-m", model, "-f", text, *OPTIONS)
    there = program("llama-perplexity", "-m", model, "-f", text, *OPTIONS, "--rpc", ",".join(servers), "-ngl", "99", "-v")
    assert there.status == 0, there.stderr
    told = there.stdout + there.stderr
    held = re.findall(r"RPC\S*\s+model buffer size = +([\d.]+) MiB", told)
    # the last two lines are the model itself, those before are of the look at what fits
    assert len(held) >= 2 and all(float(size) > 0 for size in held[-2:]), held or told[-3000:]
    assert _perplexity(told) == pytest.approx(_perplexity(here.stdout + here.stderr), rel=0.01)
