// Small tensors of ours that the graph reads beside the model's weights, each on the device where it is needed.
#pragma once

#include "ggml-cpp.h"

#include <cstdint>
#include <vector>

class kurtail_constants {
  public:
    // A matrix f32 [cols, rows] in a buffer of that type, filled with values (row by row). With no_alloc, where a model
    // is only planned, it has no memory. Throws std::runtime_error where there is not enough.
    ggml_tensor * make(ggml_backend_buffer_type_t buft, int64_t cols, int64_t rows, const std::vector<float> & values,
                       const char * name, bool no_alloc);

  private:
    std::vector<ggml_context_ptr>        contexts;
    std::vector<ggml_backend_buffer_ptr> buffers;
};
