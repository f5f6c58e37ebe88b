#include "kurtail-constants.h"

#include "llama-impl.h"

#include "ggml-backend.h"

#include <cinttypes>
#include <stdexcept>

ggml_tensor * kurtail_constants::make(ggml_backend_buffer_type_t buft, int64_t cols, int64_t rows, const std::vector<float> & values,
                                      const char * name, bool no_alloc) {
    ggml_init_params params = { ggml_tensor_overhead(), nullptr, true };
    contexts.emplace_back(ggml_init(params));
    ggml_tensor * matrix = ggml_new_tensor_2d(contexts.back().get(), GGML_TYPE_F32, cols, rows);
    ggml_set_name(matrix, name);
    if (no_alloc) {
        buffers.emplace_back(ggml_backend_buft_alloc_buffer(buft, 0));
        matrix->buffer = buffers.back().get();
        return matrix;
    }
    buffers.emplace_back(ggml_backend_alloc_ctx_tensors_from_buft(contexts.back().get(), buft));
    if (!buffers.back()) {
        throw std::runtime_error(format("kurtail: cannot allocate %s, %" PRId64 " x %" PRId64, name, cols, rows));
    }
    // In the CPU's memory it is no weight to the scheduler: a GPU takes upon itself large products with weights from there,
    // and this one belongs beside the CPU's operation that reads it.
    if (!ggml_backend_buft_is_host(buft)) {
        ggml_backend_buffer_set_usage(buffers.back().get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    }
    ggml_backend_tensor_set(matrix, values.data(), 0, ggml_nbytes(matrix));
    return matrix;
}
