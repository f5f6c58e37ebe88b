"""Which device computes."""

from __future__ import annotations

import torch

from kurtail_gguf.messages.errors import KurtailError


def pick_device(device: str) -> torch.device:
    """``auto`` is CUDA where there is one, ``cuda`` the current GPU, ``cuda:N`` the one of that number.

    Raises:
        KurtailError: CUDA was asked for and torch sees none, or none of that number.
    """
    if device == "cpu":
        return torch.device("cpu")
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return torch.device("cuda" if cards else "cpu")
    chosen = torch.device(device)
    if not cards and torch.version.cuda is None and torch.version.hip is None:
        raise KurtailError(
            f"--device {device}: this torch ({torch.__version__}) is built without CUDA: install a CUDA build "
            "(pytorch.org), or give --device cpu"
        )
    if not cards:
        raise KurtailError(
            f"--device {device}: torch sees no CUDA device: check the driver with nvidia-smi and CUDA_VISIBLE_DEVICES, or "
            "give --device cpu"
        )
    if (chosen.index or 0) >= cards:
        raise KurtailError(f"--device {device}: torch sees {cards} CUDA device{'s' if cards > 1 else ''}, counted from cuda:0")
    return chosen
