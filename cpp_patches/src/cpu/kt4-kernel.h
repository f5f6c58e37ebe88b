// The kernel this translation unit's instruction set offers.
#pragma once

#include "kt4-kernel-generic.h"
#include "arm/kt4-kernel-i8mm.h"
#include "arm/kt4-kernel-neon.h"
#include "x86/kt4-kernel-avx2.h"
#include "x86/kt4-kernel-avx512.h"

namespace ggml::cpu::kt4 {

template <int N, int BLOCK>
void multiply_fixed(int64_t nb, const group_block<BLOCK> * w, const char * panel, float * const * dst, bool ref) {
    if (ref) {
        multiply_generic<N, BLOCK>(nb, w, panel, dst);
        return;
    }
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
    multiply_avx512<N, BLOCK>(nb, w, panel, dst);
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
    multiply_avx2<N, BLOCK>(nb, w, panel, dst);
#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD) && defined(__ARM_FEATURE_MATMUL_INT8)
    if constexpr (N % 2 == 0) {
        multiply_i8mm<N, BLOCK>(nb, w, panel, dst);
    } else {
        multiply_neon<N, BLOCK>(nb, w, panel, dst);
    }
#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD)
    multiply_neon<N, BLOCK>(nb, w, panel, dst);
#else
    multiply_generic<N, BLOCK>(nb, w, panel, dst);
#endif
}

// dst[c][0..15] = 16 rows of weights times column c of a panel `width` columns wide, nb blocks long. ref: portable code
template <int BLOCK>
void multiply(int64_t nb, const group_block<BLOCK> * w, const char * panel, int width, float * const * dst, bool ref) {
    static_assert(PANEL_COLUMNS <= 8, "a case for each width");
    switch (width) {
        case 1: multiply_fixed<1, BLOCK>(nb, w, panel, dst, ref); break;
        case 2: multiply_fixed<2, BLOCK>(nb, w, panel, dst, ref); break;
        case 3: multiply_fixed<3, BLOCK>(nb, w, panel, dst, ref); break;
        case 4: multiply_fixed<4, BLOCK>(nb, w, panel, dst, ref); break;
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
        case 5: multiply_fixed<5, BLOCK>(nb, w, panel, dst, ref); break;
        case 6: multiply_fixed<6, BLOCK>(nb, w, panel, dst, ref); break;
        case 7: multiply_fixed<7, BLOCK>(nb, w, panel, dst, ref); break;
        case 8: multiply_fixed<8, BLOCK>(nb, w, panel, dst, ref); break;
#endif
    }
}

} // namespace ggml::cpu::kt4
