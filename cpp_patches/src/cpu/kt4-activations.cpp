#include "kt4-activations.h"

#include "ggml-cpu-impl.h"
#include "simd-mappings.h"

#include <cmath>

namespace ggml::cpu::kt4 {

static float inverse(float d) {
    const float id = 1.0f/d;
    return std::isfinite(id) ? id : 0.0f;
}

static float to_half_and_back(float d) {
    d = d > 65504.0f ? 65504.0f : d < -65504.0f ? -65504.0f : d;
    return GGML_CPU_FP16_TO_FP32(GGML_CPU_FP32_TO_FP16(d));
}

// 4 bits: the largest magnitude (first of equals) goes to -8; 8 bits: to +-127
static void quantize_block_ref(const float * x, int bits, int8_t * q, float * d_out, int32_t * bias) {
    float amax = 0.0f;
    float max  = 0.0f;
    for (int j = 0; j < QK_KT4; ++j) {
        if (fabsf(x[j]) > amax) {
            amax = fabsf(x[j]);
            max  = x[j];
        }
    }
    const float d  = bits == 4 ? max / -8.0f : amax / 127.0f;
    const float id = inverse(d);
    const float lo = bits == 4 ? -8.0f : -127.0f;
    const float hi = bits == 4 ?  7.0f :  127.0f;

    for (int l = 0; l < column::LANES; ++l) {
        bias[l] = 0;
    }
    for (int j = 0; j < QK_KT4; ++j) {
        const float r = rintf(x[j]*id);
        const int   c = (int) (r >= hi ? hi : r >= lo ? r : lo);
        q[j] = (int8_t) c;
        bias[j/4 % column::LANES] -= 8*c;
    }
    *d_out = to_half_and_back(d);
}

#if defined(__AVX2__)
static void quantize_block_avx2(const float * x, int bits, int8_t * q, float * d_out, int32_t * bias) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 v[8];
    __m256 m = _mm256_setzero_ps();
    for (int k = 0; k < 8; ++k) {
        v[k] = _mm256_loadu_ps(x + 8*k);
        // operand order: a NaN in x leaves m as it was, as the comparison of the reference does
        m = _mm256_max_ps(_mm256_andnot_ps(sign, v[k]), m);
    }
    __m128 m4 = _mm_max_ps(_mm256_extractf128_ps(m, 1), _mm256_castps256_ps128(m));
    m4 = _mm_max_ps(m4, _mm_movehl_ps(m4, m4));
    m4 = _mm_max_ss(m4, _mm_movehdup_ps(m4));
    const float amax = _mm_cvtss_f32(m4);

    float d = amax / 127.0f;
    if (bits == 4) {
        float max = amax;
        const __m256 vmax = _mm256_set1_ps(amax);
        for (int k = 0; k < 8; ++k) { // the sign of the first value with that magnitude
            const int hit = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_andnot_ps(sign, v[k]), vmax, _CMP_EQ_OQ));
            if (hit) {
                max = x[8*k + __builtin_ctz(hit)];
                break;
            }
        }
        d = max / -8.0f;
    }
    const __m256 id = _mm256_set1_ps(inverse(d));
    const __m256 lo = _mm256_set1_ps(bits == 4 ? -8.0f : -127.0f);
    const __m256 hi = _mm256_set1_ps(bits == 4 ?  7.0f :  127.0f);

    __m256i c[8];
    for (int k = 0; k < 8; ++k) {
        // max returns its second operand for NaN: lo, as the reference
        const __m256 r = _mm256_min_ps(_mm256_max_ps(_mm256_mul_ps(v[k], id), lo), hi);
        c[k] = _mm256_cvtps_epi32(r); // nearest, ties to even; clamping first gives the same code
    }
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7); // undo the lane-wise packing
    const __m256i ones  = _mm256_set1_epi16(1);
    __m256i sum = _mm256_setzero_si256();
    for (int k = 0; k < 2; ++k) {
        const __m256i a = _mm256_packs_epi32(c[4*k + 0], c[4*k + 1]);
        const __m256i b = _mm256_packs_epi32(c[4*k + 2], c[4*k + 3]);
        const __m256i p = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(a, b), order);
        _mm256_storeu_si256((__m256i *) (q + 32*k), p);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(8), p), ones));
    }

    *d_out = to_half_and_back(d);
    _mm256_storeu_si256((__m256i *) bias, _mm256_sub_epi32(_mm256_setzero_si256(), sum));
}
#endif

void quantize_column(const float * x, char * base, int64_t nb, int bits, bool ref) {
    int8_t  * q    = (int8_t  *)  base;
    float   * d    = (float   *) (base + nb*QK_KT4);
    int32_t * bias = (int32_t *) (base + nb*(QK_KT4 + sizeof(float)));

    for (int64_t b = 0; b < nb; ++b) {
#if defined(__AVX2__)
        if (!ref) {
            quantize_block_avx2(x + b*QK_KT4, bits, q + b*QK_KT4, d + b, bias + b*column::LANES);
            continue;
        }
#endif
        quantize_block_ref(x + b*QK_KT4, bits, q + b*QK_KT4, d + b, bias + b*column::LANES);
    }
    GGML_UNUSED(ref);
}

} // namespace ggml::cpu::kt4
