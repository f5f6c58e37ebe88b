"""Memory of the device that computes: how much is free before a step that needs much, and what was taken of a GPU's.

Everything here asks torch's module of the device's own name (``torch.cuda`` for a GPU), so that nothing else has to
know which kind of device it computes on.
"""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import psutil
import torch


@dataclass(frozen=True, slots=True)
class CardMemory:
    """Most bytes of a GPU's memory at once: in tensors, and with what torch held for the next ones."""

    allocated: int
    reserved: int


def is_card(device: torch.device) -> bool:
    """Whether the device has memory of its own, which tensors must be copied to."""
    return device.type != "cpu"


def card_module(device: torch.device) -> Any:
    """torch's module of a GPU: ``torch.cuda``."""
    return getattr(torch, device.type)


def current_card(device: torch.device) -> AbstractContextManager[Any]:
    """A ``with`` block in which a GPU is ready, and a numbered one the current one, which torch asks where nobody is named."""
    if not is_card(device):
        return nullcontext()
    card_module(device).init()  # its statistics cannot be asked for before
    return nullcontext() if device.index is None else card_module(device).device(device)


def memory_available(device: torch.device) -> int:
    """Bytes free on the device, as far as one process can know; what torch keeps of a GPU for itself is not among them."""
    return card_module(device).mem_get_info(device)[0] if is_card(device) else psutil.virtual_memory().available


def memory_total(device: torch.device) -> int:
    """Bytes that the device has."""
    return card_module(device).mem_get_info(device)[1] if is_card(device) else psutil.virtual_memory().total


def memory_held(device: torch.device) -> int:
    """Bytes of a GPU that torch has taken for this process."""
    return card_module(device).memory_reserved(device)


def start_card_peak(device: torch.device) -> None:
    """Let :func:`card_peak` speak of what comes now; what torch keeps without use is given back to the GPU."""
    if is_card(device):
        gc.collect()  # modules and their hooks hold each other, and what they had on the GPU
        card_module(device).empty_cache()
        card_module(device).reset_peak_memory_stats(device)


def card_peak(device: torch.device) -> CardMemory | None:
    """The most of a GPU's memory since :func:`start_card_peak`; None on the CPU."""
    if not is_card(device):
        return None
    module = card_module(device)
    return CardMemory(module.max_memory_allocated(device), module.max_memory_reserved(device))
