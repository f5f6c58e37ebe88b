// NEON with matrix products of 8-bit integers: one instruction multiplies 2 rows by 2 columns, 8 values each, so twice as
// much as a dot product. Weights become 16 times their value as in kt4-kernel-neon.h.
#pragma once

#include "../kt4-layout.h"

#if defined(__ARM_NEON) && defined(__ARM_FEATURE_MATMUL_INT8)

#include <arm_neon.h>

namespace ggml::cpu::kt4 {

// as multiply_generic; columns go in pairs
template <int N, int BLOCK>
void multiply_i8mm(int64_t nb, const group_block<BLOCK> * w, const char * panel, float * const * dst) {
    static_assert(N == 2 || N == 4, "pairs of columns");
    constexpr int ROW_PAIRS = GROUP_ROWS/2;

    float32x4_t acc[N][4];
    for (int c = 0; c < N; ++c) {
        for (int g = 0; g < 4; ++g) {
            acc[c][g] = vdupq_n_f32(0.0f);
        }
    }
    // the words of N columns at one position
    const auto words = [](const int8_t * p) {
        if constexpr (N == 4) {
            return vreinterpretq_s32_s8(vld1q_s8(p));
        } else {
            const int32x2_t pair = vreinterpret_s32_s8(vld1_s8(p));
            return vcombine_s32(pair, pair);
        }
    };
    // both words of columns 2i and 2i + 1
    const auto columns = [&words](const int8_t * p, int i) {
        const int32x4_t a = words(p);
        const int32x4_t b = words(p + 4*N);
        return vreinterpretq_s8_s32(i == 0 ? vzip1q_s32(a, b) : vzip2q_s32(a, b));
    };

    for (int64_t b = 0; b < nb; ++b, panel += N*column_block(BLOCK)) {
        const int8_t * q = (const int8_t *) panel + (sizeof(float) + sizeof(int32_t))*N;
        int32x4_t sum[ROW_PAIRS][N/2]; // [row 0, column 0], [0, 1], [1, 0], [1, 1]
        for (int r = 0; r < ROW_PAIRS; ++r) {
            for (int c = 0; c < N/2; ++c) {
                sum[r][c] = vdupq_n_s32(0);
            }
        }
        for (int p = 0; p < BLOCK/8; p += 2) {
            int8x16_t xl[N/2], xh[N/2];
            for (int c = 0; c < N/2; ++c) {
                xl[c] = columns(q + 4*N*p, c);
                xh[c] = columns(q + 4*N*(p + BLOCK/8), c);
            }
            for (int g = 0; g < 4; ++g) {
                const int32x4_t v0 = vreinterpretq_s32_u8(vld1q_u8(w[b].qs + 64*p + 16*g));
                const int32x4_t v1 = vreinterpretq_s32_u8(vld1q_u8(w[b].qs + 64*(p + 1) + 16*g));
                const int8x16_t pairs[2] = { vreinterpretq_s8_s32(vzip1q_s32(v0, v1)), vreinterpretq_s8_s32(vzip2q_s32(v0, v1)) };
                for (int i = 0; i < 2; ++i) {
                    const int8x16_t lo = vshlq_n_s8(pairs[i], 4);
                    const int8x16_t hi = vandq_s8(pairs[i], vdupq_n_s8((int8_t) 0xF0));
                    for (int c = 0; c < N/2; ++c) {
                        sum[2*g + i][c] = vmmlaq_s32(vmmlaq_s32(sum[2*g + i][c], lo, xl[c]), hi, xh[c]);
                    }
                }
            }
        }
        float d[N];
        memcpy(d, panel, sizeof(d));
        for (int g = 0; g < 4; ++g) {
            const float32x4_t dw = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *) w[b].d + 4*g)));
            for (int c = 0; c < N; ++c) {
                const int32x4_t a = sum[2*g][c/2];
                const int32x4_t z = sum[2*g + 1][c/2];
                const int32x4_t s = c % 2 == 0 ? vuzp1q_s32(a, z) : vuzp2q_s32(a, z);
                acc[c][g] = vfmaq_f32(acc[c][g], vcvtq_f32_s32(vshrq_n_s32(s, 4)), vmulq_n_f32(dw, d[c]));
            }
        }
    }
    for (int c = 0; c < N; ++c) {
        for (int g = 0; g < 4; ++g) {
            vst1q_f32(dst[c] + 4*g, acc[c][g]);
        }
    }
}

} // namespace ggml::cpu::kt4

#endif
