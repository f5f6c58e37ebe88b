// NEON with dot products: a register holds 4 rows times 4 values, a group of 16 rows four of them. Weight nibbles become
// bytes of 16 times their value by one instruction each (a shift, or a mask), so sums are 16 times the product: the
// scale takes that back, exactly.
#pragma once

#include "../kt4-layout.h"

#if defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD)

#include <arm_neon.h>

namespace ggml::cpu::kt4 {

// as multiply_generic
template <int N, int BLOCK>
void multiply_neon(int64_t nb, const group_block<BLOCK> * w, const char * panel, float * const * dst) {
    float32x4_t acc[N][4];
    for (int c = 0; c < N; ++c) {
        for (int g = 0; g < 4; ++g) {
            acc[c][g] = vdupq_n_f32(0.0f);
        }
    }
    for (int64_t b = 0; b < nb; ++b, panel += N*column_block(BLOCK)) {
        const int8_t * q = (const int8_t *) panel + (sizeof(float) + sizeof(int32_t))*N;
        int32x4_t sum[N][4];
        for (int c = 0; c < N; ++c) {
            for (int g = 0; g < 4; ++g) {
                sum[c][g] = vdupq_n_s32(0);
            }
        }
        const auto word = [](const int8_t * p) {
            int32_t x;
            memcpy(&x, p, sizeof(x));
            return vreinterpretq_s8_s32(vdupq_n_s32(x));
        };
        for (int p = 0; p < BLOCK/8; ++p) {
            int8x16_t lo[4], hi[4];
            for (int g = 0; g < 4; ++g) {
                const int8x16_t v = vld1q_s8((const int8_t *) w[b].qs + 64*p + 16*g);
                lo[g] = vshlq_n_s8(v, 4);
                hi[g] = vandq_s8(v, vdupq_n_s8((int8_t) 0xF0));
            }
            for (int c = 0; c < N; ++c) {
                const int8x16_t xl = word(q + 4*(p*N + c));
                const int8x16_t xh = word(q + 4*((p + BLOCK/8)*N + c));
                for (int g = 0; g < 4; ++g) {
                    sum[c][g] = vdotq_s32(vdotq_s32(sum[c][g], lo[g], xl), hi[g], xh);
                }
            }
        }
        for (int g = 0; g < 4; ++g) {
            const float32x4_t dw = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *) w[b].d + 4*g)));
            for (int c = 0; c < N; ++c) {
                float d;
                memcpy(&d, panel + 4*c, sizeof(d));
                // the integer sum is a multiple of 16, so dividing it first loses nothing and no scale becomes denormal
                const float32x4_t s = vcvtq_f32_s32(vshrq_n_s32(sum[c][g], 4));
                acc[c][g] = vfmaq_f32(acc[c][g], s, vmulq_n_f32(dw, d));
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
