// kt4 on the CUDA backend. Hooked into ggml-cuda (see cpp_patches/README.md).
#pragma once

#include "ggml-backend.h"

struct ggml_backend_cuda_context;

// HIP and MUSA compile ggml-cuda's sources too: there the type can be read, but has no kernels (supports_op says so).
#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)
#    define GGML_CUDA_HAS_KT4 0
#else
#    define GGML_CUDA_HAS_KT4 1
#    include "kt4-block.h"
#endif

// Two values for upstream's templates: get_rows, cpy, convert
static __device__ __forceinline__ void dequantize_kt4(const void * vx, const int64_t ib, const int iqs, float2 & v) {
    const block_kt4 * x = (const block_kt4 *) vx + ib;
    const float d = x->d;
    const int   b = (int8_t) x->qs[iqs];
    v.x = (float) ((int8_t) (b << 4) >> 4)*d;
    v.y = (float) (b >> 4)*d;
}

// likewise set_rows, cpy
static __device__ void quantize_f32_kt4_block(const float * __restrict__ x, block_kt4 * __restrict__ y) {
#if GGML_CUDA_HAS_KT4
    ggml::cuda::kt4::quantize_block(x, (uint16_t *) y);
#else
    GGML_UNUSED_VARS(x, y);
    NO_DEVICE_CODE;
#endif
}

static __device__ __forceinline__ void cpy_blck_f32_kt4(const char * x, char * y) {
    quantize_f32_kt4_block((const float *) x, (block_kt4 *) y);
}

#if GGML_CUDA_HAS_KT4

// MUL_MAT and MUL_MAT_ID with kt4 weights; cc: compute capability as ggml-cuda counts it
bool ggml_cuda_kt4_supports_mul_mat(const ggml_tensor * dst, int cc);
void ggml_cuda_kt4_mul_mat(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
void ggml_cuda_kt4_mul_mat_id(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// A product that is marked as a Hadamard transform, of sizes upstream has no kernel for. Returns false for any other.
bool ggml_cuda_kt4_hadamard(ggml_backend_cuda_context & ctx, const ggml_tensor * x, ggml_tensor * dst);

// Quantizes what several products of the graph read, from node i on, once for all of them, a Hadamard transform with it: the
// products then find it (ggml_backend_cuda_context::kt4_shared). Returns how many further nodes are done, with node i; else 0.
int ggml_cuda_kt4_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int i);

// The buffer type that holds weights in groups of 16 rows: what ggml_backend_dev_get_extra_bufts is for a device; whether a
// type is it; whether a tensor's data are in groups; whether an operation reads no such data, or is a product by them.
ggml_backend_buffer_type_t * ggml_cuda_kt4_extra_buffer_types(ggml_backend_dev_t device);
bool ggml_cuda_kt4_is_buffer_type(ggml_backend_buffer_type_t buft);
bool ggml_cuda_kt4_in_groups(const ggml_tensor * t);
bool ggml_cuda_kt4_supports_buffers(const ggml_tensor * op, ggml_backend_dev_t device);

namespace ggml::cuda::kt4 {

// weights as in the file, with any strides; planes of dimensions 2 and 3
struct weight_rows {
    char  * data;
    int64_t row_bytes, plane_bytes, plane3_bytes;
    int     rows, blocks, planes, planes3;
};

} // namespace ggml::cuda::kt4

// into groups, or out of them; groups: planes one after another, each filled up to whole groups
void ggml_cuda_kt4_repack(const ggml::cuda::kt4::weight_rows & plain, char * groups, bool into, cudaStream_t stream);

#else

inline ggml_backend_buffer_type_t * ggml_cuda_kt4_extra_buffer_types(ggml_backend_dev_t) { return nullptr; }
inline bool ggml_cuda_kt4_is_buffer_type(ggml_backend_buffer_type_t) { return false; }
inline bool ggml_cuda_kt4_supports_buffers(const ggml_tensor *, ggml_backend_dev_t) { return true; }
inline bool ggml_cuda_kt4_supports_mul_mat(const ggml_tensor *, int) { return false; }
inline void ggml_cuda_kt4_mul_mat   (ggml_backend_cuda_context &, ggml_tensor *) { GGML_ABORT("kt4 has no HIP or MUSA kernels"); }
inline void ggml_cuda_kt4_mul_mat_id(ggml_backend_cuda_context &, ggml_tensor *) { GGML_ABORT("kt4 has no HIP or MUSA kernels"); }
inline bool ggml_cuda_kt4_hadamard(ggml_backend_cuda_context &, const ggml_tensor *, ggml_tensor *) { return false; }
inline int  ggml_cuda_kt4_fuse(ggml_backend_cuda_context &, const ggml_cgraph *, int) { return 0; }

#endif
