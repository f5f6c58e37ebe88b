"""How much memory is free, by device."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import torch

from kurtail_gguf.machine.memory import memory_available


def test_the_cpu_has_what_the_machine_has_left(monkeypatch):
    assert 0 < memory_available(torch.device("cpu")) < psutil.virtual_memory().total
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=123))
    assert memory_available(torch.device("cpu")) == 123


def test_a_gpu_is_asked_itself(monkeypatch):
    asked = []

    def info(device):
        asked.append(device)
        return 45, 100

    monkeypatch.setattr(torch.cuda, "mem_get_info", info)
    assert memory_available(torch.device("cuda", 1)) == 45
    assert asked == [torch.device("cuda", 1)]
