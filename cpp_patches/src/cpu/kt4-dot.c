// Dot product of two kt4 rows: the path of ggml's type traits (tests, flash attention, src1 already quantized).
// Matrix products with f32 activations go through kt4-matmul.cpp.

#include "kt4-cpu.h"
#include "kt4-quants.h"

#include "ggml-cpu-impl.h"
#include "simd-mappings.h"

#include <assert.h>

void ggml_vec_dot_kt4_kt4_generic(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) {
    assert(n % QK_KT4 == 0);
    assert(nrc == 1);
    GGML_UNUSED(bs); GGML_UNUSED(bx); GGML_UNUSED(by); GGML_UNUSED(nrc);

    const block_kt4 * x = vx;
    const block_kt4 * y = vy;

    float sumf = 0.0f;
    for (int i = 0; i < n/QK_KT4; ++i) {
        int sum = 0;
        for (int j = 0; j < QK_KT4/2; ++j) {
            const int xl = (int8_t) (uint8_t) (x[i].qs[j] << 4) >> 4;
            const int yl = (int8_t) (uint8_t) (y[i].qs[j] << 4) >> 4;
            const int xh = (int8_t) x[i].qs[j] >> 4;
            const int yh = (int8_t) y[i].qs[j] >> 4;
            sum += xl*yl + xh*yh;
        }
        sumf += sum * (GGML_CPU_FP16_TO_FP32(x[i].d)*GGML_CPU_FP16_TO_FP32(y[i].d));
    }
    *s = sumf;
}

void ggml_vec_dot_kt4_kt4(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) {
#if defined(__AVX2__)
    assert(n % QK_KT4 == 0);
    assert(nrc == 1);
    GGML_UNUSED(bs); GGML_UNUSED(bx); GGML_UNUSED(by); GGML_UNUSED(nrc);

    const block_kt4 * x = vx;
    const block_kt4 * y = vy;

    const __m256i mask  = _mm256_set1_epi8(0x0F);
    const __m256i eight = _mm256_set1_epi8(8);
    const __m256i ones  = _mm256_set1_epi16(1);
    __m256 acc = _mm256_setzero_ps();

    for (int i = 0; i < n/QK_KT4; ++i) {
        const __m256i px = _mm256_loadu_si256((const __m256i *) x[i].qs);
        const __m256i py = _mm256_loadu_si256((const __m256i *) y[i].qs);
        // x + 8 is unsigned, y stays signed: maddubs wants one of each; sum(x*y) = sum((x+8)*y) - 8*sum(y)
        const __m256i xl = _mm256_xor_si256(_mm256_and_si256(px, mask), eight);
        const __m256i xh = _mm256_xor_si256(_mm256_and_si256(_mm256_srli_epi16(px, 4), mask), eight);
        const __m256i yl = _mm256_sub_epi8(_mm256_xor_si256(_mm256_and_si256(py, mask), eight), eight);
        const __m256i yh = _mm256_sub_epi8(_mm256_xor_si256(_mm256_and_si256(_mm256_srli_epi16(py, 4), mask), eight), eight);
        const __m256i dot  = _mm256_add_epi16(_mm256_maddubs_epi16(xl, yl), _mm256_maddubs_epi16(xh, yh));
        const __m256i bias = _mm256_add_epi16(_mm256_maddubs_epi16(eight, yl), _mm256_maddubs_epi16(eight, yh));
        const __m256i sum  = _mm256_madd_epi16(_mm256_sub_epi16(dot, bias), ones);
        const __m256  d    = _mm256_set1_ps(GGML_CPU_FP16_TO_FP32(x[i].d)*GGML_CPU_FP16_TO_FP32(y[i].d));
        acc = _mm256_add_ps(acc, _mm256_mul_ps(_mm256_cvtepi32_ps(sum), d));
    }

    __m128 r = _mm_add_ps(_mm256_castps256_ps128(acc), _mm256_extractf128_ps(acc, 1));
    r = _mm_add_ps(r, _mm_movehl_ps(r, r));
    r = _mm_add_ss(r, _mm_movehdup_ps(r));
    *s = _mm_cvtss_f32(r);
#else
    ggml_vec_dot_kt4_kt4_generic(n, s, bs, vx, bx, vy, by, nrc);
#endif
}
