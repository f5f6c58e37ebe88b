// Products with many columns (prompts), on the integer matrix units. Weights in groups of 16 rows (kt4-layout.h).
//
// A block of threads computes BM rows x BN columns in steps of one or two kt4 blocks: the next step's operands are copied to
// shared memory while this one's are multiplied, 16 rows x 8 columns x 64 values at a time, by one s4 instruction or two of
// s8. docs/cuda.md gives the reasons for the sizes.
//
// Scales are two multiply-adds an output and block, in the order of blocks, for every configuration alike:
//   scaled = sum of the block's integer products * activation scale, rounded once
//   out    = fma(scaled, weight scale, out)
// The first is exact with 4-bit activations: a sum of at most 2^12 times a half of 11 bits. Its multiply-add takes the
// accumulator's start away as well: fma(START + sum, scale, -START*scale), where START*scale is exact.
#pragma once

#include "kt4-block.h"

namespace ggml::cuda::kt4 {

struct gemm_args {
    const char  * weights;
    int64_t       plane_bytes, plane3_bytes; // strides of dimensions 2 and 3; experts are dimension 2
    int           rows;
    int           blocks;
    const char       * codes;
    const two_floats * scales;
    int           columns; // of a plane
    float       * out;
    int64_t       out_column, out_plane; // in floats; experts write to one plane, 0

    // plane z of the activations reads plane z % ne2 / ratio2 of the weights, z / ne2 / ratio3 of dimension 3
    int           ne2, ratio2, ratio3;

    // MUL_MAT_ID, else null: z is the expert; its columns are those of from[i] -> to[i] with bounds[z] <= i < bounds[z + 1]
    const int   * bounds;
    const int   * from;
    const int   * to;
};

template <int BM_, int BN_, int WARPS_M_, int WARPS_N_, bool PACKED_> struct gemm_config {
    static constexpr int  BM = BM_, BN = BN_, WARPS_M = WARPS_M_, WARPS_N = WARPS_N_;
    static constexpr bool PACKED  = PACKED_;   // activations as nibbles for s4, else as bytes for s8
    static constexpr int  WARPS   = WARPS_M*WARPS_N;
    static constexpr int  THREADS = WARPS*32;
    static constexpr int  MF = BM/WARPS_M/16;  // fragments of a warp
    static constexpr int  NF = BN/WARPS_N/8;
    static constexpr int  KEPT = MF < 2 ? MF : 2; // of rows, in registers while columns pass
    static constexpr int  GROUPS = BM/GROUP_ROWS;
    static constexpr int  STEP   = PACKED ? 2 : 1;   // kt4 blocks
    static constexpr int  COLUMN = 64;               // bytes of a column's step: four chunks of 16
    static constexpr int  STAGES = 2;                // taken in turns
    static constexpr int  A_PASSES = GROUPS*STEP/WARPS; // a warp copies a group's block at a time,
    static constexpr int  B_ROUND  = THREADS/4;         // all of them this many columns
    static constexpr int  B_PASSES = BN/B_ROUND;

    static_assert(BM % (WARPS_M*16) == 0 && BN % (WARPS_N*16) == 0, "tiles of 16 x 8, pairs of them");
    static_assert(GROUPS*STEP % WARPS == 0 && WARPS % STEP == 0 && BN % B_ROUND == 0 && B_ROUND % 8 == 0, "whole passes");
    static_assert(GROUPS*STEP*2 <= THREADS, "weight scales in one pass");

    // shared memory, in bytes from the beginning of a stage
    static constexpr int A        = 0;                                   // weights: [STEP][GROUPS][512]
    static constexpr int A_SCALES = A + STEP*GROUPS*GROUP_BLOCK;         // [STEP][GROUPS][16] halves
    static constexpr int B        = A_SCALES + STEP*GROUPS*GROUP_SCALES; // activations: [BN][64], see b_position
    static constexpr int B_SCALES = B + BN*COLUMN;                       // [STEP][BN] two_floats
    static constexpr int STAGE    = B_SCALES + BN*STEP*8;
    static constexpr int SHARED   = STAGES*STAGE;
    static_assert(B % 64 == 0 && STAGE % 64 == 0, "chunks are aligned");
};

// The sizes there are (docs/cuda.md): the largest with two blocks a multiprocessor and no register spilled.
template <bool PACKED> struct gemm_configs {
    using large  = gemm_config<128, 128, PACKED ? 2 : 4, 2, PACKED>;
    using medium = gemm_config< 64,  64, 2, 2, PACKED>;
    using small  = gemm_config< 64,  32, 4, 1, PACKED>;
};

// Where chunk c of a column's step lies, from the activations' beginning. What a warp reads at once falls on different
// banks: nibbles are read by ldmatrix, 8 columns' chunks of the same c; bytes by 16-byte loads, all chunks of a column.
template <class C> KT4_HD uint32_t b_position(uint32_t column, uint32_t c) {
    return column*C::COLUMN + (C::PACKED ? c ^ (column >> 1 & 3) : c)*16;
}

// the columns of plane or expert z, from the first
struct column_range {
    int first;
    int n;
};

KT4_HD column_range columns_of(const gemm_args & a, int z) {
    if (a.bounds) {
        return { a.bounds[z], a.bounds[z + 1] - a.bounds[z] };
    }
    return { z*a.columns, a.columns };
}

KT4_HD const char * weights_of(const gemm_args & a, int z) {
    if (a.bounds) {
        return a.weights + z*a.plane_bytes;
    }
    return a.weights + z % a.ne2 / a.ratio2 * a.plane_bytes + z / a.ne2 / a.ratio3 * a.plane3_bytes;
}

// What a thread copies to shared memory in the next step: where it lies, in bytes from the tile's first group and from the
// beginning of the codes. The rest is cheaper to compute again than to keep.
template <class C> struct copies {
    uint32_t a[C::A_PASSES];
    uint32_t b[C::B_PASSES];
};

// of group g of a tile; rows beyond the end are the last ones again, and not stored
KT4_HD uint32_t group_place(const gemm_args & a, int row0, uint32_t g) {
    const uint32_t last = groups_of(a.rows - row0) - 1;
    return (g < last ? g : last)*(uint32_t) group_bytes(a.blocks);
}

template <class C, class M> KT4_HD copies<C> tile_copies(M & m, const gemm_args & a, int row0, int col0) {
    const uint32_t thread = m.thread();
    const uint32_t warp   = thread / 32;
    copies<C> c;
    KT4_UNROLL
    for (int i = 0; i < C::A_PASSES; ++i) {
        c.a[i] = group_place(a, row0, warp/C::STEP + i*(C::WARPS/C::STEP)) + warp % C::STEP*GROUP_BLOCK + thread % 32*16;
    }
    const column_range range = columns_of(a, m.block_z());
    KT4_UNROLL
    for (int i = 0; i < C::B_PASSES; ++i) { // columns beyond the end are the last one again
        const int column = col0 + i*C::B_ROUND + (int) (thread/4);
        const int j = range.first + (column < range.n ? column : range.n - 1);
        c.b[i] = (uint32_t) (a.bounds ? a.from[j] : j)*(uint32_t) padded_blocks(a.blocks)*(C::COLUMN/C::STEP) + thread % 4*16;
    }
    return c;
}

// tile: its first group of weights; stage: where it begins
template <class C, class M> KT4_HD void copy_step(M & m, const gemm_args & a, const char * tile, copies<C> & c, int row0, int step, int stage) {
    const uint32_t thread = m.thread();
    const uint32_t warp   = thread / 32;
    const bool there = C::STEP == 1 || step*C::STEP + (int) (warp % C::STEP) < a.blocks; // the last block may be half a step
    const uint32_t to_a = C::A + (warp % C::STEP*C::GROUPS + warp/C::STEP)*GROUP_BLOCK + thread % 32*16;
    KT4_UNROLL
    for (int i = 0; i < C::A_PASSES; ++i) {
        if (there) { // else what lies there meets activations of scale 0
            m.copy16(stage + to_a + i*(C::WARPS/C::STEP)*GROUP_BLOCK, tile + c.a[i]);
        }
        c.a[i] += C::STEP*GROUP_BLOCK;
    }
    if (thread < C::GROUPS*C::STEP*2) { // a block beyond the end has the last one's: a scale times 0 has to be 0
        const uint32_t group = thread/(2*C::STEP);
        const uint32_t b     = thread/2 % C::STEP;
        const uint32_t block = step*C::STEP + b < (uint32_t) a.blocks ? step*C::STEP + b : a.blocks - 1;
        m.copy16(stage + C::A_SCALES + (b*C::GROUPS + group)*GROUP_SCALES + thread % 2*16,
                 tile + (group_place(a, row0, group) + a.blocks*GROUP_BLOCK + block*GROUP_SCALES + thread % 2*16));
    }
    const uint32_t to_b = C::B + b_position<C>(thread/4, thread % 4);
    const uint32_t to_b_scales = C::B_SCALES + (thread % 4*C::BN + thread/4)*8;
    KT4_UNROLL
    for (int i = 0; i < C::B_PASSES; ++i) {
        m.copy16(stage + to_b + i*C::B_ROUND*C::COLUMN, a.codes + c.b[i]);
        if (thread % 4 < C::STEP) {
            m.copy8(stage + to_b_scales + i*C::B_ROUND*8, (const char *) a.scales + (c.b[i]/C::COLUMN*(C::STEP*8) + thread % 4*8));
        }
        c.b[i] += C::COLUMN;
    }
}

// one fragment: 16 rows x 8 columns of one block; dx: two_floats of a lane's two columns
KT4_HD void add_scaled(float (&out)[4], const int (&c)[4], const float (&dw)[2], const four_words & dx) {
    KT4_UNROLL
    for (int j = 0; j < 4; ++j) {
        out[j] = multiply_add(multiply_add(as_float(c[j]), as_float(dx.v[j % 2*2]), as_float(dx.v[j % 2*2 + 1])), dw[j/2], out[j]);
    }
}

// Where a lane's part of its warp's operands lies in a stage.
struct lane_places {
    uint32_t rows, scales, columns, column_scales;
};

template <class C, class M> KT4_HD lane_places places_of(M & m) {
    const uint32_t lane   = m.thread() % 32u;
    const uint32_t warp   = m.thread() / 32u;
    const uint32_t group0 = warp % C::WARPS_M * C::MF;
    const uint32_t col0   = warp / C::WARPS_M * C::NF*8;
    return {
        C::A        + group0*GROUP_BLOCK  + lane*16,
        C::A_SCALES + group0*GROUP_SCALES + lane/4*4,
        C::B + (C::PACKED ? b_position<C>(col0 + lane/16*8 + lane % 8, lane/8 % 2) : b_position<C>(col0 + lane/4, lane % 4)),
        C::B_SCALES + (col0 + lane % 4*2)*(uint32_t) sizeof(two_floats),
    };
}

template <class C, class M> KT4_HD void compute_step(M & m, const lane_places & p, int stage, float (&out)[C::MF][C::NF][4]) {
    KT4_UNROLL
    for (int b = 0; b < C::STEP; ++b) {
        const uint32_t columns = (stage + p.columns) ^ b*32; // b_position: block 1 has the two chunks further on
        KT4_UNROLL
        for (int i0 = 0; i0 < C::MF; i0 += C::KEPT) {
            uint32_t w [C::KEPT][C::PACKED ? 4 : 8];
            float    dw[C::KEPT][2];
            KT4_UNROLL
            for (int i = 0; i < C::KEPT; ++i) {
                const int group = b*C::GROUPS + i0 + i;
                const four_words q = m.load16(stage + p.rows   + group*GROUP_BLOCK);
                const uint32_t   d = m.load4 (stage + p.scales + group*GROUP_SCALES);
                dw[i][0] = half_value((uint16_t) d);
                dw[i][1] = half_value((uint16_t) (d >> 16));
                KT4_UNROLL
                for (int j = 0; j < 4; ++j) {
                    if constexpr (C::PACKED) {
                        w[i][j] = q.v[j];
                    } else {
                        w[i][j]     = low_codes (q.v[j]);
                        w[i][j + 4] = high_codes(q.v[j]);
                    }
                }
            }
            four_words x = {};
            KT4_UNROLL
            for (int k = 0; k < C::NF; ++k) {
                if constexpr (!C::PACKED) { // lower, lower, upper, upper nibbles
                    x = m.load16(columns + 8*k*C::COLUMN);
                } else if (k % 2 == 0) {    // of two fragments
                    m.load_matrices(x.v, columns + 8*k*C::COLUMN);
                }
                const four_words dx = m.load16(stage + p.column_scales + (b*C::BN + 8*k)*8);
                KT4_UNROLL
                for (int i = 0; i < C::KEPT; ++i) {
                    int c[4] = { ACCUMULATOR_START, ACCUMULATOR_START, ACCUMULATOR_START, ACCUMULATOR_START };
                    if constexpr (C::PACKED) {
                        m.mma_s4(c, w[i], x.v[k % 2*2], x.v[k % 2*2 + 1]);
                    } else {
                        const uint32_t low [4] = { w[i][0], w[i][1], w[i][2], w[i][3] };
                        const uint32_t high[4] = { w[i][4], w[i][5], w[i][6], w[i][7] };
                        m.mma_s8(c, low,  x.v[0], x.v[1]);
                        m.mma_s8(c, high, x.v[2], x.v[3]);
                    }
                    add_scaled(out[i0 + i][k], c, dw[i], dx);
                }
            }
        }
    }
}

template <class C, class M> KT4_HD void store_tile(M & m, const gemm_args & a, int row0, int col0, const float (&out)[C::MF][C::NF][4]) {
    const column_range range = columns_of(a, m.block_z());
    float * plane = a.out + m.block_z()*a.out_plane;
    const int lane = m.thread() % 32;
    const int warp = m.thread() / 32;
    row0 += warp % C::WARPS_M * C::MF*16 + lane/4;
    col0 += warp / C::WARPS_M * C::NF*8  + lane % 4 * 2;
    KT4_UNROLL
    for (int k = 0; k < C::NF; ++k) {
        KT4_UNROLL
        for (int j = 0; j < 2; ++j) {
            const int column = col0 + 8*k + j;
            if (column >= range.n) {
                continue;
            }
            float * to = plane + (a.bounds ? a.to[range.first + column] : column)*a.out_column + row0;
            KT4_UNROLL
            for (int i = 0; i < C::MF; ++i) {
                KT4_UNROLL
                for (int h = 0; h < 2; ++h) {
                    if (row0 + 16*i + 8*h < a.rows) {
                        to[16*i + 8*h] = out[i][k][2*h + j];
                    }
                }
            }
        }
    }
}

// Block y of the grid is a tile of rows, x one of columns (next to each other, they read the same weights), z a plane or
// expert. An expert with more columns than the grid has tiles takes them in turns.
template <class C, class M> KT4_HD void gemm(M & m, const gemm_args & a) {
    const int row0    = m.block_y()*C::BM;
    const int steps   = (a.blocks + C::STEP - 1)/C::STEP;
    const int columns = columns_of(a, m.block_z()).n;
    const char * tile = weights_of(a, m.block_z()) + row0/GROUP_ROWS*group_bytes(a.blocks);
    const lane_places places = places_of<C>(m);

    KT4_ROLLED
    for (int col0 = m.block_x()*C::BN; col0 < columns; col0 += m.grid_x()*C::BN) {
        copies<C> next = tile_copies<C>(m, a, row0, col0);
        float out[C::MF][C::NF][4] = {};
        KT4_ROLLED
        for (int step = -1; step < steps; ++step) { // the first only copies
            m.wait();
            m.sync(); // this step is there; nobody reads the one before
            const int stage = (step & 1)*C::STAGE;
            if (step + 1 < steps) {
                copy_step<C>(m, a, tile, next, row0, step + 1, C::STAGE - stage);
            }
            if (step >= 0) {
                compute_step<C>(m, places, stage, out);
            }
        }
        store_tile<C>(m, a, row0, col0, out);
    }
}

} // namespace ggml::cuda::kt4
