"""The nodes of the graph that computes one token: run by test_online.py.

    graph_nodes.py FILE

JSON: a list of [operation, name], in the order in which they are computed.
"""

from __future__ import annotations

import ctypes
import json
import sys

import llama_cpp

_ggml = ctypes.CDLL("libggml-base.so") if sys.platform == "linux" else ctypes.CDLL("libggml-base.dylib")
for _function in (_ggml.ggml_op_desc, _ggml.ggml_get_name):
    _function.restype, _function.argtypes = ctypes.c_char_p, (ctypes.c_void_p,)


def main(path: str) -> None:
    found: list[tuple[str, str]] = []

    @llama_cpp.ggml_backend_sched_eval_callback
    def note(tensor: int, ask: bool, _: object) -> bool:
        if ask:
            found.append((_ggml.ggml_op_desc(tensor).decode(), _ggml.ggml_get_name(tensor).decode()))
        return not ask  # nothing is asked for, so all is computed at once

    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.cb_eval = 64, note
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_get_one((llama_cpp.llama_token * 1)(1), 1)
    assert llama_cpp.llama_decode(context, batch) == 0
    print(json.dumps(found))


main(sys.argv[1])
