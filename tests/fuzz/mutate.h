// Mutations that keep a GGUF file a GGUF file: a random byte seldom gets past the parser, a changed value does.
#pragma once

#include <cstddef>
#include <cstdint>

// Changes `size` bytes of `data` in place, deterministic in `seed`: keys (value, type, name, presence), tensors (name,
// type, shape, offset) or the data behind them. Returns the new size, at most `max_size`; 0 where data is no GGUF file
// or the result would not fit.
size_t mutate_gguf(uint8_t * data, size_t size, size_t max_size, unsigned seed);
