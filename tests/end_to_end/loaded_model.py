"""What upstream's C API does with a loaded file: run by test_beside.py, for an abort would end the tests.

    loaded_model.py save FILE OUT     llama_model_save_to_file
    loaded_model.py state FILE        a sequence's state, kept on the device and read back: "same" where logits are as before
"""

from __future__ import annotations

import ctypes
import sys

import llama_cpp as cpp
import numpy as np


def main(task: str, path: str, *out: str) -> None:
    model = cpp.llama_model_load_from_file(path.encode(), cpp.llama_model_default_params())
    if task == "save":
        cpp.llama_model_save_to_file(model, out[0].encode())
        return
    params = cpp.llama_context_default_params()
    params.n_ctx = 64
    context = cpp.llama_init_from_model(model, params)
    _decode(context, range(10, 50))
    flags, sequence = cpp.LLAMA_STATE_SEQ_FLAGS_ON_DEVICE, 0
    state = (ctypes.c_uint8 * cpp.llama_state_seq_get_size_ext(context, sequence, flags))()
    assert cpp.llama_state_seq_get_data_ext(context, state, len(state), sequence, flags)
    expected = _decode(context, [7])
    cpp.llama_memory_seq_rm(cpp.llama_get_memory(context), sequence, -1, -1)
    _decode(context, range(50, 90))  # what was there is written over
    assert cpp.llama_state_seq_set_data_ext(context, state, len(state), sequence, flags)
    print("same" if np.array_equal(_decode(context, [7]), expected) else "other")


def _decode(context: cpp.llama_context_p, tokens: object) -> np.ndarray:
    ids = list(tokens)
    array = (cpp.llama_token * len(ids))(*ids)  # the batch points into it
    batch = cpp.llama_batch_get_one(array, len(ids))
    assert cpp.llama_decode(context, batch) == 0
    size = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(cpp.llama_get_model(context)))
    return np.ctypeslib.as_array(cpp.llama_get_logits_ith(context, -1), (size,)).copy()


main(*sys.argv[1:])
