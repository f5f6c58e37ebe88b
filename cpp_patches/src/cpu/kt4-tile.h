// The inner product of a few kt4 weight rows with a few quantized columns. 4-bit and 8-bit activations share it:
// both are bytes here, and a weight nibble (0..15 after adding 8) times a byte never leaves int16.
#pragma once

#include "kt4-activations.h"

#include "ggml-cpu-impl.h"
#include "simd-mappings.h"

namespace ggml::cpu::kt4 {

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
constexpr int TILE_COLS = 4; // 16 sums in 32 registers
#else
constexpr int TILE_COLS = 2; // 8 sums in 16 registers
#endif
constexpr int TILE_ROWS = 4;

// out[r*C + c] = dot of weight row r and column c, both nb blocks long
template <int R, int C>
void tile_ref(int64_t nb, const block_kt4 * const * w, const column * cols, float * out) {
    for (int r = 0; r < R; ++r) {
        for (int c = 0; c < C; ++c) {
            float sum = 0.0f;
            for (int64_t b = 0; b < nb; ++b) {
                const uint8_t * qw = w[r][b].qs;
                const int8_t  * qx = cols[c].q + b*QK_KT4;
                int dot = 0;
                for (int j = 0; j < QK_KT4/2; ++j) {
                    dot += ((int8_t) (uint8_t) (qw[j] << 4) >> 4) * qx[j] + ((int8_t) qw[j] >> 4) * qx[j + QK_KT4/2];
                }
                sum += dot * (GGML_CPU_FP16_TO_FP32(w[r][b].d)*cols[c].d[b]);
            }
            out[r*C + c] = sum;
        }
    }
}

#if defined(__AVX2__)
template <int R, int C>
void tile_avx2(int64_t nb, const block_kt4 * const * w, const column * cols, float * out) {
    const __m256i mask = _mm256_set1_epi8(0x0F);
    const __m256i flip = _mm256_set1_epi8((char) 0x88); // two's complement nibble -> nibble + 8
#if !defined(__AVX512VNNI__) || !defined(__AVX512VL__)
    const __m256i ones = _mm256_set1_epi16(1);
#endif

    __m256 acc[R][C];
    for (int r = 0; r < R; ++r) {
        for (int c = 0; c < C; ++c) {
            acc[r][c] = _mm256_setzero_ps();
        }
    }

    for (int64_t b = 0; b < nb; ++b) {
        __m256i lo[C], hi[C];
        for (int c = 0; c < C; ++c) {
            lo[c] = _mm256_loadu_si256((const __m256i *) (cols[c].q + b*QK_KT4));
            hi[c] = _mm256_loadu_si256((const __m256i *) (cols[c].q + b*QK_KT4 + QK_KT4/2));
        }
        for (int r = 0; r < R; ++r) {
            const __m256i p  = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *) w[r][b].qs), flip);
            const __m256i wl = _mm256_and_si256(p, mask);
            const __m256i wh = _mm256_and_si256(_mm256_srli_epi16(p, 4), mask);
            const float   dw = GGML_CPU_FP16_TO_FP32(w[r][b].d);
            for (int c = 0; c < C; ++c) {
                __m256i sum = _mm256_loadu_si256((const __m256i *) (cols[c].bias + b*column::LANES));
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
                sum = _mm256_dpbusd_epi32(sum, wl, lo[c]);
                sum = _mm256_dpbusd_epi32(sum, wh, hi[c]);
#else
                // int16 holds a block: 2 products of at most 15*127, twice
                const __m256i s16 = _mm256_add_epi16(_mm256_maddubs_epi16(wl, lo[c]), _mm256_maddubs_epi16(wh, hi[c]));
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(s16, ones));
#endif
                acc[r][c] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(dw*cols[c].d[b]), acc[r][c]);
            }
        }
    }

    for (int r = 0; r < R; ++r) {
        for (int c = 0; c < C; ++c) {
            __m128 s = _mm_add_ps(_mm256_castps256_ps128(acc[r][c]), _mm256_extractf128_ps(acc[r][c], 1));
            s = _mm_add_ps(s, _mm_movehl_ps(s, s));
            s = _mm_add_ss(s, _mm_movehdup_ps(s));
            out[r*C + c] = _mm_cvtss_f32(s);
        }
    }
}
#endif

template <int R, int C>
void tile(int64_t nb, const block_kt4 * const * w, const column * cols, float * out, bool ref) {
#if defined(__AVX2__)
    if (!ref) {
        tile_avx2<R, C>(nb, w, cols, out);
        return;
    }
#endif
    tile_ref<R, C>(nb, w, cols, out);
    GGML_UNUSED(ref);
}

} // namespace ggml::cpu::kt4
