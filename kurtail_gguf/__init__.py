"""Learned rotations and 4-bit GGUF files: from a checkpoint to a file that the patched llama.cpp runs.

The steps live in packages of their own (``calibration``, ``rotation``, ``fold``, ``quantize``,
``export``, ``evaluate``); :mod:`kurtail_gguf.pipeline` calls them in order.
"""

__version__ = "0.1.0"
