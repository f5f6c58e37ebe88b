// Reference conversions of kt4. Same contract as their neighbours in ggml-quants.h.
#pragma once

#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

// k is a multiple of QK_KT4
GGML_API void quantize_row_kt4_ref(const float * GGML_RESTRICT x, block_kt4 * GGML_RESTRICT y, int64_t k);
GGML_API void dequantize_row_kt4(const block_kt4 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);

// quantize nrows rows; with an importance matrix the scale of each block minimises the weighted squared error
// returns the bytes written
GGML_API size_t quantize_kt4(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix);

#ifdef __cplusplus
}
#endif
