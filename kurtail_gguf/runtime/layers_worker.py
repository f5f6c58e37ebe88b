"""Worker of :func:`kurtail_gguf.runtime.logits.runtime_layers`: what the layers of a file leave on the residual stream.

Request: ``path``; ``tokens``, ``[token, …]``; ``out``, where the result goes (.npz: ``said``, log-probabilities
``[tokens, vocabulary]``, and by the layers' numbers ``[tokens, hidden]``, all float32).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kurtail_gguf.runtime import native, vendored

#: What upstream's graphs call the residual stream behind a layer.
_OUTPUT = b"l_out-"
#: ``GGML_TYPE_F32``.
_F32 = 0


class Watcher:
    """Copies the layers' outputs as they are computed."""

    def __init__(self) -> None:
        library = ctypes.CDLL(str(native.library("ggml-base")))
        self._name, self._bytes, self._get = library.ggml_get_name, library.ggml_nbytes, library.ggml_backend_tensor_get
        self._name.restype, self._name.argtypes = ctypes.c_char_p, (ctypes.c_void_p,)
        self._bytes.restype, self._bytes.argtypes = ctypes.c_size_t, (ctypes.c_void_p,)
        self._get.restype, self._get.argtypes = None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
        self.found: dict[str, np.ndarray] = {}

    def __call__(self, tensor: int, ask: bool, _data: int) -> bool:
        """llama.h's ``cb_eval``: first whether a tensor is wanted, then with its values."""
        name = self._name(tensor) or b""
        number = name.removeprefix(_OUTPUT)
        # a tensor's type is its first field
        wanted = number != name and number.isdigit() and ctypes.c_int.from_address(tensor).value == _F32
        if wanted and not ask:
            values = np.empty(self._bytes(tensor) // 4, np.float32)
            self._get(tensor, values.ctypes.data, 0, values.nbytes)
            self.found[number.decode()] = values
        return wanted or not ask


def answer(request: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
    """Answer a request."""
    # loads the runtime, which only this process needs
    from kurtail_gguf.runtime.bindings_model import BindingsModel

    watcher, tokens = Watcher(), request["tokens"]
    model = BindingsModel(Path(request["path"]), exact_cache=True, watch=watcher)
    said = np.stack(list(model.log_probabilities(tokens))).astype(np.float32)
    layers = {name: values.reshape(len(tokens), -1) for name, values in watcher.found.items()}
    np.savez(request["out"], said=said, **layers)


if __name__ == "__main__":
    vendored.serve(answer)
