#include "kt4-quants.h"

#include "ggml-impl.h"
#include "ggml-quants.h"

#include <assert.h>
#include <limits.h>
#include <math.h>

// largest finite half: a scale beyond it would become infinite
#define KT4_MAX_SCALE 65504.0f

static inline float kt4_clamp_scale(float d) {
    return d > KT4_MAX_SCALE ? KT4_MAX_SCALE : d < -KT4_MAX_SCALE ? -KT4_MAX_SCALE : d;
}

// 0 where the block is all zeros, or so small that 1/d overflows: its codes are then all zero as well
static inline float kt4_inverse(float d) {
    const float id = 1.0f/d;
    return isfinite(id) ? id : 0.0f;
}

static inline int kt4_code(float x, float id) {
    // x*id lies in [-8, 8] up to rounding; the comparisons also give NaN a code instead of undefined behaviour
    const float r = rintf(x * id);
    return r >= 7.0f ? 7 : r >= -8.0f ? (int) r : -8;
}

static inline void kt4_pack(const int8_t * GGML_RESTRICT q, block_kt4 * GGML_RESTRICT y) {
    for (int j = 0; j < QK_KT4/2; ++j) {
        y->qs[j] = (uint8_t) ((q[j] & 0x0F) | ((q[j + QK_KT4/2] & 0x0F) << 4));
    }
}

static inline int kt4_unpack_lo(uint8_t b) { return (int8_t) (uint8_t) (b << 4) >> 4; }
static inline int kt4_unpack_hi(uint8_t b) { return (int8_t) b >> 4; }

// the first element with the largest magnitude
static inline float kt4_signed_max(const float * x) {
    float amax = 0.0f;
    float max  = 0.0f;
    for (int j = 0; j < QK_KT4; ++j) {
        if (fabsf(x[j]) > amax) {
            amax = fabsf(x[j]);
            max  = x[j];
        }
    }
    return max;
}

// (y*R + half) >> 15 is round(y/KT4_UNIT * R/32): one pmulhrsw
static inline int kt4_level_code(int y, int level) {
    const int c = (y*level + (1 << 14)) >> 15;
    return c > 7 ? 7 : c < -8 ? -8 : c;
}

// The search is over whole numbers: their sums do not depend on the order of addition, so every width of SIMD, numpy
// and torch choose the same level, and 16 bits a value are twice as fast as floats.
static int kt4_best_level(const int16_t * y) {
    static const int levels[] = KT4_LEVELS;
    int best   = levels[0];
    int best_e = INT_MAX;
    for (size_t l = 0; l < sizeof(levels)/sizeof(levels[0]); ++l) {
        const int step = KT4_STEP(levels[l]);
        int e = 0;
        for (int j = 0; j < QK_KT4; ++j) {
            const int diff = y[j] - step*kt4_level_code(y[j], levels[l]);
            e += diff*diff;
        }
        if (e < best_e) {
            best_e = e;
            best   = levels[l];
        }
    }
    return best;
}

void quantize_row_kt4_ref(const float * GGML_RESTRICT x, block_kt4 * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_KT4 == 0);

    for (int64_t i = 0; i < k/QK_KT4; ++i, x += QK_KT4) {
        const float max = kt4_signed_max(x);
        const float id  = kt4_inverse(max / -8.0f);

        int16_t v[QK_KT4];
        for (int j = 0; j < QK_KT4; ++j) {
            // |x*id| <= 8 up to rounding; the comparisons give NaN a value instead of undefined behaviour
            const float r = rintf(x[j]*id*KT4_UNIT);
            v[j] = (int16_t) (r >= 8*KT4_UNIT ? 8*KT4_UNIT : r >= -8*KT4_UNIT ? r : -8*KT4_UNIT);
        }
        const int level = kt4_best_level(v);

        int8_t q[QK_KT4];
        for (int j = 0; j < QK_KT4; ++j) {
            q[j] = (int8_t) kt4_level_code(v[j], level);
        }
        y[i].d = GGML_FP32_TO_FP16(kt4_clamp_scale(max/(-0.25f*level)));
        kt4_pack(q, &y[i]);
    }
}

void dequantize_row_kt4(const block_kt4 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_KT4 == 0);

    for (int64_t i = 0; i < k/QK_KT4; ++i) {
        const float d = GGML_FP16_TO_FP32(x[i].d);
        for (int j = 0; j < QK_KT4/2; ++j) {
            y[i*QK_KT4 + j]            = kt4_unpack_lo(x[i].qs[j]) * d;
            y[i*QK_KT4 + j + QK_KT4/2] = kt4_unpack_hi(x[i].qs[j]) * d;
        }
    }
}

// Scale search with an importance matrix: the maximum goes to a level between -5.6 and -9 or 5.6 and 9, whichever
// loses least. Finer than KT4_LEVELS: nobody waits for it.
static void quantize_row_kt4_weighted(const float * GGML_RESTRICT x, block_kt4 * GGML_RESTRICT y, int64_t k, const float * GGML_RESTRICT w) {
    for (int64_t i = 0; i < k/QK_KT4; ++i, x += QK_KT4, w += QK_KT4) {
        const float max    = kt4_signed_max(x);
        float       best_d = max / -8.0f;
        float       best_e = INFINITY;

        for (int s = -17; s <= 17; ++s) {
            const float level = s < 0 ? -5.6f + 0.2f*(s + 1) : 5.6f + 0.2f*(s - 1);
            if (s == 0 || max == 0.0f) {
                continue;
            }
            const float d  = GGML_FP16_TO_FP32(GGML_FP32_TO_FP16(kt4_clamp_scale(max/level)));
            const float id = kt4_inverse(d);
            float e = 0.0f;
            for (int j = 0; j < QK_KT4; ++j) {
                const float err = x[j] - d*kt4_code(x[j], id);
                e += w[j]*err*err;
            }
            if (e < best_e) {
                best_e = e;
                best_d = d;
            }
        }

        const float id = kt4_inverse(best_d);
        int8_t q[QK_KT4];
        for (int j = 0; j < QK_KT4; ++j) {
            q[j] = (int8_t) kt4_code(x[j], id);
        }
        y[i].d = GGML_FP32_TO_FP16(kt4_clamp_scale(best_d));
        kt4_pack(q, &y[i]);
    }
}

size_t quantize_kt4(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix) {
    const size_t row_size = ggml_row_size(GGML_TYPE_KT4, n_per_row);
    for (int64_t row = 0; row < nrows; ++row) {
        block_kt4 * y = (block_kt4 *) ((char *) dst + row*row_size);
        if (imatrix) {
            quantize_row_kt4_weighted(src + row*n_per_row, y, n_per_row, imatrix);
        } else {
            quantize_row_kt4_ref(src + row*n_per_row, y, n_per_row);
        }
    }
    return nrows*row_size;
}
