// The two layouts that the matrix kernels read: weights in groups of 16 rows, activations in panels of a few columns.
// Both interleave what one vector instruction multiplies: 16 rows (or all columns of a panel) times 4 values.
// BLOCK is 64 for kt4, and 32 where attention reads keys of the q4_0 cache through the same kernels.
#pragma once

#include "kt4-quants.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace ggml::cpu::kt4 {

// --- weights

constexpr int GROUP_ROWS = 16;

// One block of 16 rows. As large as the 16 blocks it is made of, so repacking needs no more memory.
template <int BLOCK>
struct group_block {
    ggml_half d[GROUP_ROWS];
    // 32-bit word p*16 + r is bytes 4p..4p+3 of row r's block: low nibbles are its elements 4p..4p+3, high nibbles
    // BLOCK/2 further
    uint8_t qs[GROUP_ROWS*BLOCK/2];
};
using block_kt4x16 = group_block<QK_KT4>;
static_assert(sizeof(block_kt4x16) == GROUP_ROWS*sizeof(block_kt4), "repacked weights take no more memory");

// x86 multiplies unsigned by signed bytes: there nibbles are stored plus 8 (0..15)
#if defined(__x86_64__) || defined(_M_X64)
constexpr bool BIASED = true;
#else
constexpr bool BIASED = false;
#endif

// rows [0, n) of w, n <= 16, each nb blocks long and `stride` bytes apart -> nb blocks of a group; rows beyond n are zero
void pack_group(const char * w, size_t stride, int n, int64_t nb, block_kt4x16 * out);

// --- activations

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
constexpr int PANEL_COLUMNS = 8; // 8 integer and 8 float sums of 16 rows in 32 registers
#else
constexpr int PANEL_COLUMNS = 4;
#endif

// AVX2 without VNNI sums in int16, even and odd pairs of values apart; `bias` then holds two of them
#if defined(__AVX2__) && !(defined(__AVX512VNNI__) && defined(__AVX512BW__)) && !defined(__AVXVNNI__)
constexpr bool SPLIT_BIAS = true;
#else
constexpr bool SPLIT_BIAS = false;
#endif

// -8 * the sum of the codes, given those of even and of odd pairs; as two int16 where the kernel sums in those
inline int32_t bias_of(int even, int odd) {
    return SPLIT_BIAS ? (int32_t) ((uint32_t) (uint16_t) (-8*even) | (uint32_t) (uint16_t) (-8*odd) << 16) : -8*(even + odd);
}

// A panel of N <= PANEL_COLUMNS columns (the last one of a matrix is narrower) is, for each block of 64 values:
//   float   d[N]         scales, rounded to half
//   int32_t bias[N]      -8 * the sum of the codes: undoes the +8 of biased weights
//   int8_t  q[16][N][4]  codes, -8..7 or -127..127
// (of 32 values: q[8][N][4])
constexpr size_t column_block(int block) { return sizeof(float) + sizeof(int32_t) + block; } // bytes of one column
constexpr size_t COLUMN_BLOCK = column_block(QK_KT4);

inline size_t column_size(int64_t nb) { return nb*COLUMN_BLOCK; }

// where a column's values go, and where a panel begins
struct panel_position {
    size_t offset; // of the panel
    int    width;
    int    column; // within the panel

    panel_position(int64_t column, int64_t n_columns, int64_t nb) {
        const int64_t first = column / PANEL_COLUMNS * PANEL_COLUMNS;
        this->offset = first*column_size(nb);
        this->width  = (int) std::min<int64_t>(PANEL_COLUMNS, n_columns - first);
        this->column = (int) (column - first);
    }
};

// one block of one column into the panel's block
template <int BLOCK = QK_KT4>
void store_column_block(char * block, int width, int column, const int8_t * q, float d, int32_t bias) {
    memcpy(block + sizeof(float)*column, &d, sizeof(d));
    memcpy(block + sizeof(float)*(width + column), &bias, sizeof(bias));
    char * codes = block + (sizeof(float) + sizeof(int32_t))*width + 4*column;
    for (int t = 0; t < BLOCK/4; ++t) {
        memcpy(codes + 4*width*t, q + 4*t, 4);
    }
}

// the same from a panel of one column, which is how a column is kept before it is known which panels want it
inline void copy_column_block(char * block, int width, int column, const char * single) {
    float   d;
    int32_t bias;
    memcpy(&d,    single,     sizeof(d));
    memcpy(&bias, single + 4, sizeof(bias));
    store_column_block(block, width, column, (const int8_t *) single + 8, d, bias);
}

} // namespace ggml::cpu::kt4
