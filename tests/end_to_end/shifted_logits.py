"""What a file says after a context shift, and what it says of the same tokens decoded afresh: run by test_context_shift.py.

    shifted_logits.py FILE TYPE...

One line of JSON a cache type of K (its ggml number; V stays f16): the type, "fresh" and "shifted", each the logits at
the tokens that follow, one after the other.
In a process of its own, since a shift that goes wrong may end it.
"""

from __future__ import annotations

import json
import os
import sys

import llama_cpp

KEPT, REMOVED, TOKENS = 4, 21, 44  # of the tokens decoded: positions 4 to 20 are removed, those behind move up by 17
FOLLOWING = 16
F16 = 1


def logits(model, type_k: int, shift: bool) -> list[float]:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.type_k, params.type_v = 256, type_k, F16
    params.n_threads = params.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(model, params)
    assert context, "no context"
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    tokens = [5 + 37 * i % (vocabulary - 5) for i in range(TOKENS)]

    def decode(tokens: list[int]) -> None:
        data = (llama_cpp.llama_token * len(tokens))(*tokens)
        assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(data, len(tokens))) == 0

    if shift:
        decode(tokens)
        memory = llama_cpp.llama_get_memory(context)
        assert llama_cpp.llama_memory_can_shift(memory)
        assert llama_cpp.llama_memory_seq_rm(memory, 0, KEPT, REMOVED)
        llama_cpp.llama_memory_seq_add(memory, 0, REMOVED, TOKENS, KEPT - REMOVED)
    else:
        decode(tokens[:KEPT] + tokens[REMOVED:])
    found = []
    for token in range(7, 7 + FOLLOWING):
        decode([token])
        found += llama_cpp.llama_get_logits_ith(context, -1)[:vocabulary]
    llama_cpp.llama_free(context)
    return found


def main() -> None:
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(os.fsencode(sys.argv[1]), llama_cpp.llama_model_default_params())
    for number in map(int, sys.argv[2:]):
        print(json.dumps({"type": number, "fresh": logits(model, number, False), "shifted": logits(model, number, True)}))


if __name__ == "__main__":
    main()
