// Portable kernel, and what the others must agree with.
#pragma once

#include "kt4-layout.h"

#include "ggml-cpu-impl.h"
#include "simd-mappings.h"

#include <cmath>

namespace ggml::cpu::kt4 {

// One rounding where the hardware has that, as the vector kernels do it: then their results are these to the last bit.
inline float multiply_add(float a, float b, float c) {
#ifdef FP_FAST_FMAF
    return fmaf(a, b, c);
#else
    return a*b + c;
#endif
}

// dst[c][0..15] = 16 rows of weights times column c of a panel of N columns, nb blocks long
template <int N, int BLOCK>
void multiply_generic(int64_t nb, const group_block<BLOCK> * w, const char * panel, float * const * dst) {
    float acc[N][GROUP_ROWS] = {};
    for (int64_t b = 0; b < nb; ++b, panel += N*column_block(BLOCK)) {
        float d[N];
        memcpy(d, panel, sizeof(d));
        const int8_t * q = (const int8_t *) panel + (sizeof(float) + sizeof(int32_t))*N;

        int sum[N][GROUP_ROWS] = {};
        for (int p = 0; p < BLOCK/8; ++p) {
            for (int r = 0; r < GROUP_ROWS; ++r) {
                const uint8_t * bytes = w[b].qs + 4*(p*GROUP_ROWS + r);
                for (int i = 0; i < 4; ++i) {
                    const int lo = BIASED ? (bytes[i] & 15) - 8 : (int8_t) (uint8_t) (bytes[i] << 4) >> 4;
                    const int hi = BIASED ? (bytes[i] >> 4) - 8 : (int8_t) bytes[i] >> 4;
                    for (int c = 0; c < N; ++c) {
                        sum[c][r] += lo*q[4*(p*N + c) + i] + hi*q[4*((p + BLOCK/8)*N + c) + i];
                    }
                }
            }
        }
        for (int c = 0; c < N; ++c) {
            for (int r = 0; r < GROUP_ROWS; ++r) {
                acc[c][r] = multiply_add(sum[c][r], GGML_CPU_FP16_TO_FP32(w[b].d[r])*d[c], acc[c][r]);
            }
        }
    }
    for (int c = 0; c < N; ++c) {
        memcpy(dst[c], acc[c], sizeof(acc[c]));
    }
}

} // namespace ggml::cpu::kt4
