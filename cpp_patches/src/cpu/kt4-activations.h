// Activations of a kt4 product: quantized to 4 or 8 bits in blocks of 64 and kept as one byte a value, because
// that is what the dot product multiplies by; the codes are those of docs/format.md.
#pragma once

#include "kt4-quants.h"

#include <stddef.h>
#include <stdint.h>

namespace ggml::cpu::kt4 {

// One column (row of src1) of nb blocks. The three arrays lie one behind the other in the work buffer.
struct column {
    const int8_t  * q;    // [nb*64] codes, -8..7 or -127..127
    const float   * d;    // [nb] scales, rounded to half
    const int32_t * bias; // [nb*LANES] undoes the +8 that makes weight nibbles unsigned: in lane l
                          // -8 * the sum of codes 4l..4l+3 and 32+4l..32+4l+3, where the kernels sum those products.
                          // One value a block would do, but then large lanes cancel in floating point.

    static constexpr int LANES = QK_KT4/8;

    static size_t size(int64_t nb) { return nb*(QK_KT4 + sizeof(float) + LANES*sizeof(int32_t)); }

    static column at(const char * base, int64_t nb) {
        return {
            (const int8_t  *)  base,
            (const float   *) (base + nb*QK_KT4),
            (const int32_t *) (base + nb*(QK_KT4 + sizeof(float))),
        };
    }
};

// x: [nb*64] -> base: column::size(nb) bytes. bits is 4 or 8. ref: portable code only.
void quantize_column(const float * x, char * base, int64_t nb, int bits, bool ref);

} // namespace ggml::cpu::kt4
