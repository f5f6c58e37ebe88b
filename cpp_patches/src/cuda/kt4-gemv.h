// Products with few columns (generation): bound by reading weights.
//
// Weights in groups of 16 rows (kt4-layout.h): a block of threads is a group, its warps take every GROUP_WARPS-th block of
// 64; a lane has 16 values of two rows. Weights as in the file: four lanes a block, each with 8 of its 32 bytes, a warp 8
// blocks of a row at a time. Sums of lanes, and of warps, are added at the end. Scales as in kt4-gemm.h.
#pragma once

#include "kt4-block.h"

namespace ggml::cuda::kt4 {

constexpr int GEMV_COLUMNS = 8; // at most
constexpr int GEMV_WARPS   = 4;
constexpr int GROUP_WARPS  = 8;

// rows a warp computes together where weights are as in the file: they share the activations' loads, which are the greater
// part with more columns
KT4_HD constexpr int gemv_rows(int columns) { return columns == 1 ? 1 : 2; }

// blocks whose loads are under way together, where weights are in groups
KT4_HD constexpr int gemv_unroll(int columns) { return columns == 1 ? 4 : columns == 2 ? 2 : 1; }

// bytes of shared memory, where weights are in groups
inline size_t gemv_shared(int columns) { return GROUP_WARPS*GROUP_ROWS*sizeof(float)*columns; }

struct gemv_args {
    const char  * weights;
    int64_t       row_bytes; // where weights are as in the file
    int64_t       plane_bytes, plane3_bytes; // strides of dimensions 2 and 3; experts are dimension 2
    int           rows;
    int           blocks;
    const char       * codes; // bytes form
    const two_floats * scales;
    float       * out;
    int64_t       out_column, out_plane; // in floats

    // plane z of the activations reads plane z % ne2 / ratio2 of the weights, z / ne2 / ratio3 of dimension 3
    int           ne2, ratio2, ratio3;

    // MUL_MAT_ID, else null: z counts (token, slot); a column each
    const int   * ids;
    int64_t       ids_token, ids_slot; // in ints
    int           slots;
    int           token_columns;       // columns of activations a token, 1 or slots
};

struct plane_of {
    const char * weights;
    int64_t      column; // the first
};

KT4_HD plane_of gemv_plane(const gemv_args & a, int z, int columns) {
    if (a.ids) {
        const int token = z / a.slots;
        const int slot  = z % a.slots;
        return { a.weights + a.ids[token*a.ids_token + slot*a.ids_slot]*a.plane_bytes, (int64_t) token*a.token_columns + slot % a.token_columns };
    }
    return { a.weights + z % a.ne2 / a.ratio2 * a.plane_bytes + z / a.ne2 / a.ratio3 * a.plane3_bytes, (int64_t) z*columns };
}

// 16 codes' products more
template <class M> KT4_HD int dot16(M & m, const uint32_t (&low)[2], const uint32_t (&high)[2], const uint32_t (&x)[4]) {
    int s = m.dot4(low [0], x[0], ACCUMULATOR_START);
    s     = m.dot4(low [1], x[1], s);
    s     = m.dot4(high[0], x[2], s);
    return  m.dot4(high[1], x[3], s);
}

// s: from dot16
KT4_HD float add_scaled(int s, float dw, const two_floats & dx, float sum) {
    return multiply_add(multiply_add(as_float(s), dx.v[0], dx.v[1]), dw, sum);
}

template <int COLUMNS, class M> KT4_HD void gemv_groups(M & m, const gemv_args & a) {
    const int lane  = m.thread() % 32;
    const int warp  = m.thread() / 32;
    const int group = m.block_x();
    const int padded = padded_blocks(a.blocks);
    const plane_of plane = gemv_plane(a, m.block_z(), COLUMNS);
    const char * weights = plane.weights + group*group_bytes(a.blocks);
    const char * nibbles = weights + lane*16;
    const char * scales  = weights + (int64_t) a.blocks*GROUP_BLOCK + lane/4*4;
    const char       * codes = a.codes  + plane.column*padded*WIDE_BYTES + lane % 4*16;
    const two_floats * dx    = a.scales + plane.column*padded;

    float sum[2][COLUMNS] = {};
    KT4_UNROLL_BY(gemv_unroll(COLUMNS))
    for (int b = warp; b < a.blocks; b += GROUP_WARPS) {
        const four_words q = *(const four_words *) (nibbles + (int64_t) b*GROUP_BLOCK);
        const uint32_t   d = *(const uint32_t *) (scales + (int64_t) b*GROUP_SCALES);
        uint32_t low[2][2], high[2][2];
        KT4_UNROLL
        for (int h = 0; h < 2; ++h) {
            low [h][0] = low_codes (q.v[h]);
            low [h][1] = low_codes (q.v[h + 2]);
            high[h][0] = high_codes(q.v[h]);
            high[h][1] = high_codes(q.v[h + 2]);
        }
        const float dw[2] = { half_value((uint16_t) d), half_value((uint16_t) (d >> 16)) };
        KT4_UNROLL
        for (int c = 0; c < COLUMNS; ++c) {
            const four_words x = *(const four_words *) (codes + ((int64_t) c*padded + b)*WIDE_BYTES);
            const two_floats s = dx[(int64_t) c*padded + b];
            KT4_UNROLL
            for (int h = 0; h < 2; ++h) {
                sum[h][c] = add_scaled(dot16(m, low[h], high[h], x.v), dw[h], s, sum[h][c]);
            }
        }
    }

    float * partial = (float *) m.shared(); // [GROUP_WARPS][COLUMNS][16]
    KT4_UNROLL
    for (int c = 0; c < COLUMNS; ++c) {
        KT4_UNROLL
        for (int h = 0; h < 2; ++h) {
            KT4_UNROLL
            for (int mask = 1; mask < 4; mask *= 2) {
                sum[h][c] = add(sum[h][c], m.shuffle_xor(sum[h][c], mask));
            }
            if (lane % 4 == 0) {
                partial[(warp*COLUMNS + c)*GROUP_ROWS + 8*h + lane/4] = sum[h][c];
            }
        }
    }
    m.sync();
    const int c   = m.thread() / GROUP_ROWS;
    const int row = group*GROUP_ROWS + m.thread() % GROUP_ROWS;
    if (c < COLUMNS && row < a.rows) {
        float total = partial[m.thread()];
        KT4_UNROLL
        for (int w = 1; w < GROUP_WARPS; ++w) {
            total = add(total, partial[w*COLUMNS*GROUP_ROWS + m.thread()]);
        }
        a.out[(int64_t) m.block_z()*a.out_plane + c*a.out_column + row] = total;
    }
}

template <int COLUMNS, class M> KT4_HD void gemv(M & m, const gemv_args & a) {
    constexpr int ROWS = gemv_rows(COLUMNS);
    const int lane = m.thread() % 32;
    const int part = lane % 4;
    const int row0 = (m.block_x()*GEMV_WARPS + m.thread()/32)*ROWS;
    if (row0 >= a.rows) {
        return; // a whole warp
    }
    const int padded = padded_blocks(a.blocks);
    const plane_of plane = gemv_plane(a, m.block_z(), COLUMNS);
    const char * row[ROWS];
    KT4_UNROLL
    for (int r = 0; r < ROWS; ++r) {
        row[r] = plane.weights + (row0 + r < a.rows ? row0 + r : row0)*a.row_bytes;
    }

    float sum[ROWS][COLUMNS] = {};
    for (int b = lane/4; b < a.blocks; b += 8) {
        uint32_t low[ROWS][2], high[ROWS][2];
        float    dw[ROWS];
        KT4_UNROLL
        for (int r = 0; r < ROWS; ++r) {
            const char * block  = row[r] + (int64_t) b*BLOCK_BYTES;
            const char * bytes  = block + 2 + 8*part;
            const int    odd    = (int) ((uintptr_t) bytes & 2); // blocks are 2-byte aligned: read whole words around
            const uint32_t * w  = (const uint32_t *) (bytes - odd);
            const uint32_t w0 = w[0];
            const uint32_t w1 = w[1];
            const uint32_t w2 = odd ? w[2] : 0;
            const uint32_t q0 = funnel(w0, w1, 8*odd);
            const uint32_t q1 = funnel(w1, w2, 8*odd);
            low [r][0] = low_codes(q0);
            low [r][1] = low_codes(q1);
            high[r][0] = high_codes(q0);
            high[r][1] = high_codes(q1);
            dw[r] = half_value(*(const uint16_t *) block);
        }
        KT4_UNROLL
        for (int c = 0; c < COLUMNS; ++c) {
            const int64_t index = (plane.column + c)*padded + b;
            uint32_t x[4];
            KT4_UNROLL
            for (int j = 0; j < 4; ++j) {
                x[j] = *(const uint32_t *) (a.codes + index*WIDE_BYTES + bytes_place(j/2*32 + 8*part + j % 2*4));
            }
            const two_floats dx = a.scales[index];
            KT4_UNROLL
            for (int r = 0; r < ROWS; ++r) {
                sum[r][c] = add_scaled(dot16(m, low[r], high[r], x), dw[r], dx, sum[r][c]);
            }
        }
    }

    KT4_UNROLL
    for (int r = 0; r < ROWS; ++r) {
        KT4_UNROLL
        for (int c = 0; c < COLUMNS; ++c) {
            KT4_UNROLL
            for (int mask = 16; mask > 0; mask /= 2) {
                sum[r][c] = add(sum[r][c], m.shuffle_xor(sum[r][c], mask));
            }
            if (lane == 0 && row0 + r < a.rows) {
                a.out[(int64_t) m.block_z()*a.out_plane + c*a.out_column + row0 + r] = sum[r][c];
            }
        }
    }
}

} // namespace ggml::cuda::kt4
