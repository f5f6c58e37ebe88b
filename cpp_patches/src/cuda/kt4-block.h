// One block: what quantize_row_kt4_ref does (kt4-quants.c), and its steps for the kernels that share a block out.
#pragma once

#include "kt4-machine.h"

#ifdef __CUDACC__
#    include <cuda_fp16.h>
#else
#    include "ggml.h"
#endif

namespace ggml::cuda::kt4 {

constexpr int UNIT     = 1024; // KT4_UNIT
constexpr int N_LEVELS = 8;

// KT4_LEVELS and their steps in units. tests/cpp/test-kt4-cuda.cpp compares with kt4.h.
KT4_HD constexpr int level(int l) {
    return l == 0 ? 32 : l == 1 ? 35 : l == 2 ? 33 : l == 3 ? 36 : l == 4 ? 34 : l == 5 ? 31 : l == 6 ? 29 : 37;
}
KT4_HD constexpr int level_step(int l) { return (32*UNIT + level(l)/2)/level(l); }

KT4_HD uint16_t half_bits(float x) {
#ifdef __CUDACC__
    return __half_as_ushort(__float2half_rn(x));
#else
    return ggml_fp32_to_fp16(x);
#endif
}

KT4_HD float half_value(uint16_t bits) {
#ifdef __CUDACC__
    return __half2float(__ushort_as_half(bits));
#else
    return ggml_fp16_to_fp32(bits);
#endif
}

// nearest half that is finite
KT4_HD uint16_t scale_bits(float d) { return half_bits(d > 65504.0f ? 65504.0f : d < -65504.0f ? -65504.0f : d); }

// 0 where 1/d overflows, or d is 0
KT4_HD float inverse(float d) {
    const float id = divide(1.0f, d);
    return fabsf(id) <= 3.402823466e38f ? id : 0.0f;
}

// in whole numbers, UNIT to a step of the plain rule; the comparisons give NaN a value
KT4_HD int whole(float x, float id) {
    const float r = rintf(multiply(multiply(x, id), (float) UNIT));
    return r >= 8.0f*UNIT ? 8*UNIT : r >= -8.0f*UNIT ? (int) r : -8*UNIT;
}

KT4_HD int level_code(int y, int r) {
    const int c = (y*r + (1 << 14)) >> 15;
    return c > 7 ? 7 : c < -8 ? -8 : c;
}

// of KT4_LEVELS[l], of one value
KT4_HD int level_error(int y, int l) {
    const int diff = y - level_step(l)*level_code(y, level(l));
    return diff*diff;
}

KT4_HD float level_scale(float max, int r) { return divide(max, multiply(-0.25f, (float) r)); }

KT4_HD int code8(float x, float id) {
    const float r = rintf(multiply(x, id));
    return r >= 127.0f ? 127 : r >= -127.0f ? (int) r : -127;
}

// x: [64] -> y: 34 bytes, 2-byte aligned
KT4_HD void quantize_block(const float * x, uint16_t * y) {
    float amax = 0.0f;
    float max  = 0.0f;
    for (int j = 0; j < BLOCK; ++j) {
        if (fabsf(x[j]) > amax) {
            amax = fabsf(x[j]);
            max  = x[j];
        }
    }
    const float id = inverse(multiply(max, -0.125f));
    int best   = 0;
    int best_e = 0x7FFFFFFF;
    for (int l = 0; l < N_LEVELS; ++l) {
        int e = 0;
        for (int j = 0; j < BLOCK; ++j) {
            e += level_error(whole(x[j], id), l);
        }
        if (e < best_e) {
            best_e = e;
            best   = l;
        }
    }
    const int r = level(best);
    y[0] = scale_bits(level_scale(max, r));
    for (int j = 0; j < BLOCK/2; j += 2) {
        const int lo = (level_code(whole(x[j],     id), r) & 15) | (level_code(whole(x[j + 32], id), r) & 15) << 4;
        const int hi = (level_code(whole(x[j + 1], id), r) & 15) | (level_code(whole(x[j + 33], id), r) & 15) << 4;
        y[1 + j/2] = (uint16_t) (lo | hi << 8);
    }
}

} // namespace ggml::cuda::kt4
