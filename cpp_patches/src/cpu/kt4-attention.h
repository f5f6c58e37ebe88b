// FLASH_ATTN_EXT over a q4_0 cache.
#pragma once

#include "ggml.h"

#include <cstddef>

struct ggml_compute_params;

namespace ggml::cpu::kt4 {

// Whether dst is an attention that attention() computes: queries f32, keys q4_0, any values that convert to f32.
bool is_attention(const ggml_tensor * dst);

size_t attention_work_size(int n_threads, const ggml_tensor * dst);

void attention(const ggml_compute_params * params, ggml_tensor * dst);

} // namespace ggml::cpu::kt4
