// AVX-512 VNNI: a register holds 16 rows times 4 values. On Zen 4 a 512-bit vpdpbusd starts every cycle, which bounds
// this at 64 products a cycle; scales take 2 of every 18 slots.
#pragma once

#include "../kt4-layout.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)

#include <immintrin.h>

namespace ggml::cpu::kt4 {

// as multiply_generic
template <int N, int BLOCK>
void multiply_avx512(int64_t nb, const group_block<BLOCK> * w, const char * panel, float * const * dst) {
    constexpr int CHAINS = N == 1 ? 4 : N == 2 ? 2 : 1; // vpdpbusd takes 4 cycles: so many sums in flight at least
    const __m512i mask = _mm512_set1_epi8(0x0F);

    __m512 acc[N];
    for (int c = 0; c < N; ++c) {
        acc[c] = _mm512_setzero_ps();
    }
    for (int64_t b = 0; b < nb; ++b, panel += N*column_block(BLOCK)) {
        const char * q = panel + (sizeof(float) + sizeof(int32_t))*N;
        const auto word = [](const char * p) {
            int32_t x;
            memcpy(&x, p, sizeof(x));
            return _mm512_set1_epi32(x);
        };

        __m512i sum[N][CHAINS];
        for (int c = 0; c < N; ++c) {
            sum[c][0] = word(panel + 4*(N + c));
            for (int k = 1; k < CHAINS; ++k) {
                sum[c][k] = _mm512_setzero_si512();
            }
        }
#pragma GCC unroll 8
        for (int p = 0; p < BLOCK/8; ++p) {
            const __m512i v  = _mm512_loadu_si512(w[b].qs + 64*p);
            const __m512i lo = _mm512_and_si512(v, mask);
            const __m512i hi = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask);
            for (int c = 0; c < N; ++c) {
                __m512i & s = sum[c][2*p % CHAINS];
                s = _mm512_dpbusd_epi32(s, lo, word(q + 4*(p*N + c)));
            }
            for (int c = 0; c < N; ++c) {
                __m512i & s = sum[c][(2*p + 1) % CHAINS];
                s = _mm512_dpbusd_epi32(s, hi, word(q + 4*((p + BLOCK/8)*N + c)));
            }
        }
        const __m512 dw = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) w[b].d));
        for (int c = 0; c < N; ++c) {
            __m512i s = sum[c][0];
            for (int k = 1; k < CHAINS; ++k) {
                s = _mm512_add_epi32(s, sum[c][k]);
            }
            float d;
            memcpy(&d, panel + 4*c, sizeof(d));
            acc[c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(s), _mm512_mul_ps(dw, _mm512_set1_ps(d)), acc[c]);
        }
    }
    for (int c = 0; c < N; ++c) {
        _mm512_storeu_ps(dst[c], acc[c]);
    }
}

} // namespace ggml::cpu::kt4

#endif
