#include "kt4-layout.h"

namespace ggml::cpu::kt4 {

void pack_group(const char * w, size_t stride, int n, int64_t nb, block_kt4x16 * out) {
    constexpr uint32_t FLIP = BIASED ? 0x88888888 : 0; // two's complement nibble -> nibble + 8
    for (int64_t b = 0; b < nb; ++b) {
        for (int r = 0; r < GROUP_ROWS; ++r) {
            block_kt4 row = {};
            if (r < n) {
                memcpy(&row, w + r*stride + b*sizeof(block_kt4), sizeof(row));
            }
            out[b].d[r] = row.d;
            for (int p = 0; p < QK_KT4/8; ++p) {
                uint32_t word;
                memcpy(&word, row.qs + 4*p, sizeof(word));
                word ^= FLIP;
                memcpy(out[b].qs + 4*(p*GROUP_ROWS + r), &word, sizeof(word));
            }
        }
    }
}

} // namespace ggml::cpu::kt4
