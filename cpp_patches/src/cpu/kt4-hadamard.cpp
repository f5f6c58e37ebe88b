// R3 and R4: the fast Walsh-Hadamard transform. Pieces of 64 stay in registers for their six steps.

#include "kt4-activations.h"

#include "ggml-cpu-impl.h"

#include <cmath>

namespace ggml::cpu::kt4 {

// steps of lengths [from, n)
static void steps(float * y, int64_t from, int64_t n) {
    for (int64_t len = from; len < n; len *= 2) {
        for (int64_t i = 0; i < n; i += 2*len) {
            for (int64_t j = i; j < i + len; ++j) {
                const float u = y[j];
                const float v = y[j + len];
                y[j]       = u + v;
                y[j + len] = u - v;
            }
        }
    }
}

#if defined(__AVX2__)
static inline void step(__m256 & u, __m256 & v) {
    const __m256 sum = _mm256_add_ps(u, v);
    v = _mm256_sub_ps(u, v);
    u = sum;
}

// the whole transform of 64 values, without its scale
static void hadamard_64(const float * x, float * y, __m256 scale) {
    // where a lane is the second of a pair it is subtracted from the first: (-itself) + first
    const __m256 odd1 = _mm256_setr_ps(0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f);
    const __m256 odd2 = _mm256_setr_ps(0.0f, 0.0f, -0.0f, -0.0f, 0.0f, 0.0f, -0.0f, -0.0f);
    const __m256 odd4 = _mm256_setr_ps(0.0f, 0.0f, 0.0f, 0.0f, -0.0f, -0.0f, -0.0f, -0.0f);
    __m256 v[8];
    for (int k = 0; k < 8; ++k) {
        __m256 a = _mm256_mul_ps(_mm256_loadu_ps(x + 8*k), scale);
        a = _mm256_add_ps(_mm256_permute_ps(a, 0xB1), _mm256_xor_ps(a, odd1));
        a = _mm256_add_ps(_mm256_permute_ps(a, 0x4E), _mm256_xor_ps(a, odd2));
        v[k] = _mm256_add_ps(_mm256_permute2f128_ps(a, a, 0x01), _mm256_xor_ps(a, odd4));
    }
    for (int len = 1; len < 8; len *= 2) {
        for (int i = 0; i < 8; i += 2*len) {
            for (int j = i; j < i + len; ++j) {
                step(v[j], v[j + len]);
            }
        }
    }
    for (int k = 0; k < 8; ++k) {
        _mm256_storeu_ps(y + 8*k, v[k]);
    }
}
#endif

void hadamard(const float * x, float * y, int64_t n) {
    const float scale = 1.0f/sqrtf((float) n);
#if defined(__AVX2__)
    if (n >= 64) {
        for (int64_t i = 0; i < n; i += 64) {
            hadamard_64(x + i, y + i, _mm256_set1_ps(scale));
        }
        steps(y, 64, n);
        return;
    }
#endif
    for (int64_t i = 0; i < n; ++i) {
        y[i] = x[i]*scale;
    }
    steps(y, 1, n);
}

bool compute_hadamard(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * x = dst->src[1];
    if (dst->op != GGML_OP_MUL_MAT || ggml_get_op_params_i32(dst, 1) != GGML_HINT_SRC0_IS_HADAMARD || params->use_ref ||
        x->type != GGML_TYPE_F32 || x->nb[0] != sizeof(float) || dst->type != GGML_TYPE_F32 || dst->nb[0] != sizeof(float)) {
        return false;
    }
    const int64_t n = ggml_nrows(x);
    for (int64_t i = n*params->ith/params->nth; i < n*(params->ith + 1)/params->nth; ++i) {
        const int64_t i1 = i % x->ne[1];
        const int64_t i2 = i / x->ne[1] % x->ne[2];
        const int64_t i3 = i / (x->ne[1]*x->ne[2]);
        hadamard((const float *) ((const char *) x->data + i1*x->nb[1] + i2*x->nb[2] + i3*x->nb[3]),
                 (float *) ((char *) dst->data + i1*dst->nb[1] + i2*dst->nb[2] + i3*dst->nb[3]), x->ne[0]);
    }
    return true;
}

} // namespace ggml::cpu::kt4
