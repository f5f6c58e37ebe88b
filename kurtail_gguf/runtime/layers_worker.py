"""Worker of :func:`kurtail_gguf.runtime.logits.runtime_layers`: what the layers of a file leave on the residual stream.

Request: ``path``; ``tokens``, ``[token, …]``; ``out``, where the result goes (.npz: ``said``, log-probabilities
``[tokens, vocabulary]``, and by the layers' numbers, ``output-0``, ``[tokens, hidden]``, all float32; ``experts-0``, the numbers
of all experts of a layer, those that a token is routed to first, int32 ``[tokens, experts]``; ``shares-0``, of these, float32
``[tokens, used]``).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kurtail_gguf.runtime import native, vendored

#: ``GGML_TYPE_F32`` and ``GGML_TYPE_I32``.
_F32, _I32 = 0, 26
#: What upstream's graphs call the residual stream behind a layer, its experts in order, and the shares of those that are chosen, which
#: are made in up to three steps, the last of which is kept: what we do, and their type.
_WATCHED = {b"l_out": ("output", _F32, np.float32), b"ffn_moe_argsort": ("experts", _I32, np.int32)} | {
    b"ffn_moe_weights" + step: ("shares", _F32, np.float32) for step in (b"", b"_softmax", b"_norm", b"_scaled")
}


class Watcher:
    """Copies the layers' outputs, and which experts are chosen, as they are computed."""

    def __init__(self) -> None:
        library = ctypes.CDLL(str(native.library("ggml-base")))
        self._name, self._bytes, self._get = library.ggml_get_name, library.ggml_nbytes, library.ggml_backend_tensor_get
        self._name.restype, self._name.argtypes = ctypes.c_char_p, (ctypes.c_void_p,)
        self._bytes.restype, self._bytes.argtypes = ctypes.c_size_t, (ctypes.c_void_p,)
        self._get.restype, self._get.argtypes = None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
        self.found: dict[str, np.ndarray] = {}

    def __call__(self, tensor: int, ask: bool, _data: int) -> bool:
        """llama.h's ``cb_eval``: first whether a tensor is wanted, then with its values."""
        name, _, number = (self._name(tensor) or b"").rpartition(b"-")
        kind, ggml_type, dtype = _WATCHED.get(name, ("", -1, np.float32))
        # a tensor's type is its first field
        wanted = number.isdigit() and ctypes.c_int.from_address(tensor).value == ggml_type
        if wanted and not ask:
            values = np.empty(self._bytes(tensor) // 4, dtype)
            self._get(tensor, values.ctypes.data, 0, values.nbytes)
            self.found[f"{kind}-{number.decode()}"] = values
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
