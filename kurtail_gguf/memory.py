"""How much memory is free, asked before a step that needs much of it."""

from __future__ import annotations

import psutil
import torch


def memory_available(device: torch.device) -> int:
    """Bytes free on the device, as far as one process can know."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
