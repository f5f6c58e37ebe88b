// Products with few columns (generation): bound by reading weights. Four lanes a block of 64, each with 8 of its 32 bytes;
// a warp reads 8 blocks of a row at a time and its lanes' sums are added at the end.
#pragma once

#include "kt4-block.h"

namespace ggml::cuda::kt4 {

constexpr int GEMV_COLUMNS = 8; // at most
constexpr int GEMV_WARPS   = 4;

// rows a warp computes together: they share the activations' loads, which are the greater part with more columns
KT4_HD constexpr int gemv_rows(int columns) { return columns == 1 ? 1 : 2; }

struct gemv_args {
    const char  * weights;
    int64_t       row_bytes;
    int64_t       plane_bytes, plane3_bytes; // strides of dimensions 2 and 3; experts are dimension 2
    int           rows;
    int           blocks;
    const char  * codes;  // bytes form
    const float * scales;
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

struct alignas(8) two_words { uint32_t v[2]; };

template <int COLUMNS, class M> KT4_HD void gemv(M & m, const gemv_args & a) {
    constexpr int ROWS = gemv_rows(COLUMNS);
    const int lane = m.thread() % 32;
    const int part = lane % 4;
    const int row0 = (m.block_x()*GEMV_WARPS + m.thread()/32)*ROWS;
    const int z    = m.block_z();
    if (row0 >= a.rows) {
        return; // a whole warp
    }

    const int    padded  = padded_blocks(a.blocks);
    const char * weights = a.weights;
    int64_t      column  = (int64_t) z*COLUMNS;
    if (a.ids) {
        const int token = z / a.slots;
        const int slot  = z % a.slots;
        weights += a.ids[token*a.ids_token + slot*a.ids_slot]*a.plane_bytes;
        column   = (int64_t) token*a.token_columns + slot % a.token_columns;
    } else {
        weights += z % a.ne2 / a.ratio2 * a.plane_bytes + z / a.ne2 / a.ratio3 * a.plane3_bytes;
    }

    const char * row[ROWS];
    KT4_UNROLL
    for (int r = 0; r < ROWS; ++r) {
        row[r] = weights + (row0 + r < a.rows ? row0 + r : row0)*a.row_bytes;
    }

    float sum[ROWS][COLUMNS] = {};
    for (int b = lane/4; b < a.blocks; b += 8) {
        uint32_t low[ROWS][2], high[ROWS][2];
        float    d[ROWS];
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
            d[r] = multiply(half_value(*(const uint16_t *) block), BYTE_SCALE);
        }
        KT4_UNROLL
        for (int c = 0; c < COLUMNS; ++c) {
            const int64_t     index = (column + c)*padded + b;
            const two_words * x  = (const two_words *) (a.codes + index*WIDE_BYTES);
            const two_words   x0 = x[part];
            const two_words   x1 = x[part + 4];
            const float       dx = a.scales[index];
            KT4_UNROLL
            for (int r = 0; r < ROWS; ++r) {
                int s = m.dot4(low [r][0], x0.v[0], 0);
                s     = m.dot4(low [r][1], x0.v[1], s);
                s     = m.dot4(high[r][0], x1.v[0], s);
                s     = m.dot4(high[r][1], x1.v[1], s);
                sum[r][c] = multiply_add((float) s, multiply(d[r], dx), sum[r][c]);
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
                a.out[(int64_t) z*a.out_plane + c*a.out_column + row0 + r] = sum[r][c];
            }
        }
    }
}

} // namespace ggml::cuda::kt4
