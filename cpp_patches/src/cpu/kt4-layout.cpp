#include "kt4-layout.h"

#include <cstddef>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace ggml::cpu::kt4 {

constexpr uint8_t FLIP = BIASED ? 0x88 : 0; // two's complement nibble -> nibble + 8

#if defined(__SSE2__)
// 4 words of 4 rows, each `stride` bytes from the next: to the same word of the 4 rows side by side
static void transpose_words(const uint8_t * from, size_t stride, uint8_t * to) {
    __m128i r[4];
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm_xor_si128(_mm_loadu_si128((const __m128i *) (from + i*stride)), _mm_set1_epi8((char) FLIP));
    }
    const __m128i a = _mm_unpacklo_epi32(r[0], r[1]);
    const __m128i b = _mm_unpacklo_epi32(r[2], r[3]);
    const __m128i c = _mm_unpackhi_epi32(r[0], r[1]);
    const __m128i d = _mm_unpackhi_epi32(r[2], r[3]);
    constexpr int NEXT = 4*GROUP_ROWS;
    _mm_storeu_si128((__m128i *) (to + 0*NEXT), _mm_unpacklo_epi64(a, b));
    _mm_storeu_si128((__m128i *) (to + 1*NEXT), _mm_unpackhi_epi64(a, b));
    _mm_storeu_si128((__m128i *) (to + 2*NEXT), _mm_unpacklo_epi64(c, d));
    _mm_storeu_si128((__m128i *) (to + 3*NEXT), _mm_unpackhi_epi64(c, d));
}

constexpr size_t CACHE_LINE = 64;

static void pack_whole_group(const char * w, size_t stride, int64_t nb, block_kt4x16 * out) {
    for (int64_t b = 0; b < nb; ++b) {
        const uint8_t * first = (const uint8_t *) w + b*sizeof(block_kt4); // the first row's block
        // The next group, in the order of memory: 16 rows side by side are more streams than the hardware foresees, and
        // two fifths of the time went into waiting for them.
        for (size_t i = 0; i < sizeof(block_kt4x16); i += CACHE_LINE) {
            _mm_prefetch(w + GROUP_ROWS*stride + b*sizeof(block_kt4x16) + i, _MM_HINT_T0);
        }
        for (int r = 0; r < GROUP_ROWS; ++r) {
            memcpy(&out[b].d[r], first + offsetof(block_kt4, d) + r*stride, sizeof(ggml_half));
        }
        for (int r = 0; r < GROUP_ROWS; r += 4) {
            const uint8_t * from = first + offsetof(block_kt4, qs) + r*stride;
            transpose_words(from,      stride, out[b].qs + 4*r);
            transpose_words(from + 16, stride, out[b].qs + 4*r + 4*4*GROUP_ROWS);
        }
    }
}
#endif

void pack_group(const char * w, size_t stride, int n, int64_t nb, block_kt4x16 * out) {
#if defined(__SSE2__)
    if (n == GROUP_ROWS) {
        pack_whole_group(w, stride, nb, out);
        return;
    }
#endif
    for (int64_t b = 0; b < nb; ++b) {
        for (int r = 0; r < GROUP_ROWS; ++r) {
            block_kt4 row = {};
            if (r < n) {
                memcpy(&row, w + r*stride + b*sizeof(block_kt4), sizeof(row));
            }
            out[b].d[r] = row.d;
            for (int i = 0; i < QK_KT4/2; ++i) {
                out[b].qs[4*(i/4*GROUP_ROWS + r) + i % 4] = (uint8_t) (row.qs[i] ^ FLIP);
            }
        }
    }
}

} // namespace ggml::cpu::kt4
