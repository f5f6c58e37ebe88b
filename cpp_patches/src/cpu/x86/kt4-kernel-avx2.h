// AVX2: a register holds 8 rows times 4 values, a group of 16 rows two of them. Without VNNI, products are summed in
// int16 over a whole block: an int16 lane takes 32 products of a row, which stay within 32*8*127 once `bias` has
// undone the +8 (what wraps around on the way comes back). Float sums stay in memory: they are touched once a block.
#pragma once

#include "../kt4-layout.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>

namespace ggml::cpu::kt4 {

// sum += 4 products a lane: as two int16 (no VNNI) or one int32
inline __m256i dot4(__m256i sum, __m256i w, __m256i x) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(sum, w, x);
#elif defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, w, x);
#else
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x));
#endif
}

// as multiply_generic
template <int N, int BLOCK>
void multiply_avx2(int64_t nb, const group_block<BLOCK> * w, const char * panel, float * const * dst) {
    const __m256i mask = _mm256_set1_epi8(0x0F);
    const auto word = [](const char * p) {
        int32_t x;
        memcpy(&x, p, sizeof(x));
        return _mm256_set1_epi32(x);
    };

    __m256 acc[N][2];
    for (int c = 0; c < N; ++c) {
        acc[c][0] = acc[c][1] = _mm256_setzero_ps();
    }
    for (int64_t b = 0; b < nb; ++b, panel += N*column_block(BLOCK)) {
        const char * q = panel + (sizeof(float) + sizeof(int32_t))*N;
        __m256i sum[N][2];
        for (int c = 0; c < N; ++c) {
            sum[c][0] = sum[c][1] = word(panel + 4*(N + c));
        }
#pragma GCC unroll 8
        for (int p = 0; p < BLOCK/8; ++p) {
            const __m256i v0 = _mm256_loadu_si256((const __m256i *) (w[b].qs + 64*p));
            const __m256i v1 = _mm256_loadu_si256((const __m256i *) (w[b].qs + 64*p + 32));
            const __m256i lo0 = _mm256_and_si256(v0, mask);
            const __m256i lo1 = _mm256_and_si256(v1, mask);
            for (int c = 0; c < N; ++c) {
                const __m256i x = word(q + 4*(p*N + c));
                sum[c][0] = dot4(sum[c][0], lo0, x);
                sum[c][1] = dot4(sum[c][1], lo1, x);
            }
            const __m256i hi0 = _mm256_and_si256(_mm256_srli_epi16(v0, 4), mask);
            const __m256i hi1 = _mm256_and_si256(_mm256_srli_epi16(v1, 4), mask);
            for (int c = 0; c < N; ++c) {
                const __m256i x = word(q + 4*((p + BLOCK/8)*N + c));
                sum[c][0] = dot4(sum[c][0], hi0, x);
                sum[c][1] = dot4(sum[c][1], hi1, x);
            }
        }
        for (int h = 0; h < 2; ++h) {
            const __m256 dw = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (w[b].d + 8*h)));
            for (int c = 0; c < N; ++c) {
                __m256i s = sum[c][h];
                if (SPLIT_BIAS) {
                    s = _mm256_madd_epi16(s, _mm256_set1_epi16(1));
                }
                float d;
                memcpy(&d, panel + 4*c, sizeof(d));
                acc[c][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(s), _mm256_mul_ps(dw, _mm256_set1_ps(d)), acc[c][h]);
            }
        }
    }
    for (int c = 0; c < N; ++c) {
        _mm256_storeu_ps(dst[c],     acc[c][0]);
        _mm256_storeu_ps(dst[c] + 8, acc[c][1]);
    }
}

} // namespace ggml::cpu::kt4

#endif
