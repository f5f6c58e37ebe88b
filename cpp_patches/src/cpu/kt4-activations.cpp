#include "kt4-activations.h"
#include "kt4-cpu.h"

#include "ggml-cpu-impl.h"
#include "simd-mappings.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace ggml::cpu::kt4 {

constexpr int LEVELS[] = KT4_LEVELS;
constexpr int N_LEVELS = sizeof(LEVELS)/sizeof(LEVELS[0]);

constexpr bool levels_fit() {
    for (int r : LEVELS) {
        const int a = r < 0 ? -r : r;
        if (a < 16 || a > 56) {
            return false;
        }
    }
    return N_LEVELS <= 8;
}
static_assert(levels_fit(), "KT4_LEVELS: at most 8 levels of 16..56 quarters");

#if defined(__AVX2__)
struct level_table {
    int16_t levels[N_LEVELS];
    int16_t steps [N_LEVELS];

    constexpr level_table() : levels(), steps() {
        for (int l = 0; l < N_LEVELS; ++l) {
            levels[l] = (int16_t) LEVELS[l];
            steps [l] = (int16_t) KT4_STEP(LEVELS[l]);
        }
    }
};
constexpr level_table TABLE;
#endif

static float inverse(float d) {
    const float id = 1.0f/d;
    return std::isfinite(id) ? id : 0.0f;
}

static float to_half_and_back(float d) {
    d = d > 65504.0f ? 65504.0f : d < -65504.0f ? -65504.0f : d;
#if defined(__F16C__)
    return _cvtsh_ss(_cvtss_sh(d, 0)); // upstream's macros are a function and a table of 256 KiB on x86
#else
    return GGML_CPU_FP16_TO_FP32(GGML_CPU_FP32_TO_FP16(d));
#endif
}

static void quantize_block_8_ref(const float * x, int8_t * q, float * d_out) {
    float amax = 0.0f;
    for (int j = 0; j < QK_KT4; ++j) {
        amax = fabsf(x[j]) > amax ? fabsf(x[j]) : amax;
    }
    const float d  = amax/127.0f;
    const float id = inverse(d);
    for (int j = 0; j < QK_KT4; ++j) {
        const float r = rintf(x[j]*id);
        q[j] = (int8_t) (r >= 127.0f ? 127.0f : r >= -127.0f ? r : -127.0f);
    }
    *d_out = to_half_and_back(d);
}

static void quantize_block_ref(const float * x, int bits, int8_t * q, float * d_out, int32_t * bias) {
    if (bits == 4) {
        block_kt4 block;
        quantize_row_kt4_ref(x, &block, QK_KT4);
        for (int j = 0; j < QK_KT4/2; ++j) {
            q[j]            = (int8_t) ((int8_t) (uint8_t) (block.qs[j] << 4) >> 4);
            q[j + QK_KT4/2] = (int8_t) ((int8_t) block.qs[j] >> 4);
        }
        *d_out = GGML_CPU_FP16_TO_FP32(block.d);
    } else {
        quantize_block_8_ref(x, q, d_out);
    }
    int sum[2] = {};
    for (int j = 0; j < QK_KT4; ++j) {
        sum[j/2 % 2] += q[j];
    }
    *bias = bias_of(sum[0], sum[1]);
}

#if defined(__AVX2__)
// codes of 64 values and what undoes the +8 of the weights
static void store_codes(__m256i a, __m256i b, __m256i c, __m256i d, int8_t * q, int32_t * bias) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7); // undo the lane-wise packing, twice
    const __m256i ones  = _mm256_set1_epi8(1);
    const __m256i p0 = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(a, b), order);
    const __m256i p1 = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(c, d), order);
    _mm256_storeu_si256((__m256i *) q, p0);
    _mm256_storeu_si256((__m256i *) (q + 32), p1);
    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(ones, p0), _mm256_maddubs_epi16(ones, p1));
    __m128i sum = _mm_add_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    sum = _mm_add_epi16(sum, _mm_shuffle_epi32(sum, 0x4E));
    sum = _mm_add_epi16(sum, _mm_shuffle_epi32(sum, 0xB1));
    const int32_t both = _mm_cvtsi128_si32(sum); // at most 32*127 each
    *bias = bias_of((int16_t) both, (int16_t) (both >> 16));
}

static void quantize_block_8_avx2(const float * x, int8_t * q, float * d_out, int32_t * bias) {
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
    const float d = _mm_cvtss_f32(m4)/127.0f;

    const __m256 id = _mm256_set1_ps(inverse(d));
    const __m256 lo = _mm256_set1_ps(-127.0f);
    const __m256 hi = _mm256_set1_ps( 127.0f);
    __m256i c[8];
    for (int k = 0; k < 8; ++k) {
        // max returns its second operand for NaN: lo, as the reference
        const __m256 r = _mm256_min_ps(_mm256_max_ps(_mm256_mul_ps(v[k], id), lo), hi);
        c[k] = _mm256_cvtps_epi32(r); // nearest, ties to even; clamping first gives the same code
    }
    *d_out = to_half_and_back(d);
    store_codes(_mm256_packs_epi32(c[0], c[1]), _mm256_packs_epi32(c[2], c[3]),
                _mm256_packs_epi32(c[4], c[5]), _mm256_packs_epi32(c[6], c[7]), q, bias);
}

// the first element of largest magnitude; 0 for a block of zeros and NaN
static float signed_max(const float * x) {
    __m256 hi = _mm256_setzero_ps();
    __m256 lo = _mm256_setzero_ps();
    for (int k = 0; k < 8; ++k) { // operand order: NaN leaves both as they were
        const __m256 v = _mm256_loadu_ps(x + 8*k);
        hi = _mm256_max_ps(v, hi);
        lo = _mm256_min_ps(v, lo);
    }
    const __m128 sign = _mm_set1_ps(-0.0f);
    const __m128 hi4  = _mm_max_ps(_mm256_extractf128_ps(hi, 1), _mm256_castps256_ps128(hi));
    const __m128 lo4  = _mm_xor_ps(_mm_min_ps(_mm256_extractf128_ps(lo, 1), _mm256_castps256_ps128(lo)), sign);
    __m128 m = _mm_max_ps(_mm_unpacklo_ps(hi4, lo4), _mm_unpackhi_ps(hi4, lo4)); // hi, -lo, hi, -lo
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    const __m128 most  = m;
    const __m128 least = _mm_movehdup_ps(m);
    if (_mm_comieq_ss(most, least)) { // rare: both signs have that magnitude, or all is zero
        const float amax = _mm_cvtss_f32(most);
        for (int j = 0; j < QK_KT4 && amax > 0.0f; ++j) {
            if (fabsf(x[j]) == amax) {
                return x[j];
            }
        }
        return 0.0f;
    }
    // no branch: half of them would be mispredicted
    return _mm_cvtss_f32(_mm_or_ps(_mm_max_ss(most, least), _mm_and_ps(_mm_cmplt_ss(most, least), sign)));
}

static __m256i level_codes(__m256i y, __m256i level) {
    const __m256i c = _mm256_mulhrs_epi16(y, level);
    return _mm256_max_epi16(_mm256_min_epi16(c, _mm256_set1_epi16(7)), _mm256_set1_epi16(-8));
}

// A block on its way through the search. AVX-512 gains nothing here: measured on Zen 4, with and without VNNI.
struct search_state {
    float   max;
    float   id;
    __m256i y[4];    // the values as whole numbers, in packing order
    __m256i sums[8]; // of each level's squared errors, 8 to be added
};

static void search_levels(const float * x, search_state & s) {
    const __m256 id   = _mm256_set1_ps(s.id);
    const __m256 unit = _mm256_set1_ps(KT4_UNIT);
    __m256i y[4];
    for (int k = 0; k < 4; ++k) {
        const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(x + 16*k    ), id), unit));
        const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(x + 16*k + 8), id), unit));
        // NaN has become the least integer
        y[k] = _mm256_max_epi16(_mm256_packs_epi32(a, b), _mm256_set1_epi16(-8*KT4_UNIT));
        s.y[k] = y[k];
    }
#pragma GCC unroll 1 // unrolled, multiplications by the known steps become chains of shifts and additions
    for (int l = 0; l < N_LEVELS; ++l) {
        const __m256i level = _mm256_set1_epi16(TABLE.levels[l]);
        const __m256i step  = _mm256_set1_epi16(TABLE.steps[l]);
        __m256i sum = _mm256_setzero_si256();
        for (int k = 0; k < 4; ++k) {
            const __m256i diff = _mm256_sub_epi16(y[k], _mm256_mullo_epi16(level_codes(y[k], level), step));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(diff, diff));
        }
        s.sums[l] = sum;
    }
    for (int l = N_LEVELS; l < 8; ++l) {
        s.sums[l] = _mm256_set1_epi32(INT32_MAX/8); // loses to every real sum
    }
}

// the first of the least sums
static int best_level(const __m256i * s) {
    const __m256i a = _mm256_hadd_epi32(_mm256_hadd_epi32(s[0], s[1]), _mm256_hadd_epi32(s[2], s[3]));
    const __m256i b = _mm256_hadd_epi32(_mm256_hadd_epi32(s[4], s[5]), _mm256_hadd_epi32(s[6], s[7]));
    const __m256i e = _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31)); // lane l: level l
    __m256i m = _mm256_min_epi32(e, _mm256_permute2x128_si256(e, e, 0x01));
    m = _mm256_min_epi32(m, _mm256_shuffle_epi32(m, 0x4E));
    m = _mm256_min_epi32(m, _mm256_shuffle_epi32(m, 0xB1));
    return LEVELS[__builtin_ctz(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(e, m))))];
}

// n <= TOGETHER blocks to the codes and scales of quantize_row_kt4_ref. Step by step for all of them: each step is a
// chain of dependent instructions, and one block's chain hides behind the others'.
constexpr int TOGETHER = 4;

static void quantize_blocks_4_avx2(const float * x, int n, int8_t * q, float * d, int32_t * bias) {
    search_state s[TOGETHER];
    int r[TOGETHER];
    for (int i = 0; i < n; ++i) {
        s[i].max = signed_max(x + i*QK_KT4);
        s[i].id  = inverse(s[i].max / -8.0f);
    }
    for (int i = 0; i < n; ++i) {
        search_levels(x + i*QK_KT4, s[i]);
    }
    for (int i = 0; i < n; ++i) {
        r[i] = best_level(s[i].sums);
    }
    for (int i = 0; i < n; ++i) {
        const __m256i level = _mm256_set1_epi16((short) r[i]);
        const __m256i * y = s[i].y;
        d[i] = to_half_and_back(s[i].max/(-0.25f*r[i]));
        store_codes(level_codes(y[0], level), level_codes(y[1], level), level_codes(y[2], level), level_codes(y[3], level),
                    q + i*QK_KT4, bias + i);
    }
}
#endif

void quantize_blocks(const float * x, int64_t n, int bits, int8_t * q, float * d, int32_t * bias, bool ref) {
#if defined(__AVX2__)
    if (!ref && bits == 4) {
        for (int64_t b = 0; b < n; b += TOGETHER) {
            quantize_blocks_4_avx2(x + b*QK_KT4, (int) std::min<int64_t>(TOGETHER, n - b), q + b*QK_KT4, d + b, bias + b);
        }
        return;
    }
    if (!ref) {
        for (int64_t b = 0; b < n; ++b) {
            quantize_block_8_avx2(x + b*QK_KT4, q + b*QK_KT4, d + b, bias + b);
        }
        return;
    }
#endif
    for (int64_t b = 0; b < n; ++b) {
        quantize_block_ref(x + b*QK_KT4, bits, q + b*QK_KT4, d + b, bias + b);
    }
    GGML_UNUSED(ref);
}

} // namespace ggml::cpu::kt4

void quantize_row_kt4(const float * GGML_RESTRICT x, void * GGML_RESTRICT vy, int64_t k) {
    constexpr int64_t AT_ONCE = 16;
    int8_t  q[AT_ONCE*QK_KT4];
    float   d[AT_ONCE];
    int32_t bias[AT_ONCE];
    block_kt4 * y = (block_kt4 *) vy;
    for (int64_t left = k/QK_KT4; left > 0; left -= AT_ONCE) {
        const int64_t n = std::min(left, AT_ONCE);
        ggml::cpu::kt4::quantize_blocks(x, n, 4, q, d, bias, false);
        for (int64_t b = 0; b < n; ++b, ++y, x += QK_KT4) {
            const int8_t * codes = q + b*QK_KT4;
            y->d = GGML_CPU_FP32_TO_FP16(d[b]);
            for (int j = 0; j < QK_KT4/2; ++j) {
                y->qs[j] = (uint8_t) ((codes[j] & 0x0F) | (uint8_t) (codes[j + QK_KT4/2] << 4));
            }
        }
    }
}
