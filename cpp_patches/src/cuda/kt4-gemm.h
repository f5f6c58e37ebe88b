// Products with many columns (prompts), on the integer matrix units.
//
// A block of threads computes BM rows x BN columns in steps of two kt4 blocks (128 values):
//   copy    the next step's weights as they lie in the file, and activations, to shared memory, while this one is computed
//   unpack  this step's weights: nibbles to 16-byte aligned chunks, scales to floats
//   compute 16 rows x 8 columns x 64 values at a time: one s4 instruction, or two of s8; then the scales
// docs/cuda.md gives the reasons for the sizes. Blocks of a row are added in their order, one rounding each:
// out = fma(sum of the block's integer products, weight scale * activation scale, out), for every configuration alike.
#pragma once

#include "kt4-block.h"

namespace ggml::cuda::kt4 {

// An accumulator that starts here is, read as a float, 1.5 * 2^23 + sum for |sum| < 2^22: conversion to float is then a
// subtraction, which runs at full rate where the conversion runs at a quarter or half. The sums are at most 64*16*8*128 = 2^20.
constexpr int   ACCUMULATOR_START = 0x4B400000;
constexpr float ACCUMULATOR_ZERO  = 12582912.0f;

struct gemm_args {
    const char  * weights;
    int           row_bytes;
    int64_t       plane_bytes, plane3_bytes; // strides of dimensions 2 and 3; experts are dimension 2
    int           rows;
    int           blocks;
    bool          words;  // weights, row_bytes and planes are multiples of 4
    const char  * codes;
    const float * scales;
    int           columns; // of a plane
    float       * out;
    int64_t       out_column, out_plane; // in floats

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
    static constexpr int  THREADS = WARPS_M*WARPS_N*32;
    static constexpr int  MF = BM/WARPS_M/16;  // fragments of a warp
    static constexpr int  NF = BN/WARPS_N/8;
    static constexpr int  STEP   = 2;          // kt4 blocks
    static constexpr int  STAGES = 2;          // taken in turns
    static constexpr int  RAW_PITCH = 80;      // bytes of a row's 68, from the 16-byte boundary before them
    static constexpr int  A_CHUNKS  = STEP*2;  // 16 bytes each, of a row
    static constexpr int  B_CHUNKS  = STEP*(PACKED ? 2 : 4);

    static_assert(BM % (WARPS_M*16) == 0 && BN % (WARPS_N*8) == 0 && (NF % 2 == 0 || !PACKED), "tiles of 16 x 8, pairs of them");

    // shared memory, in bytes from its beginning
    static constexpr int RAW      = 0;                         // a stage: weights as in the file,
    static constexpr int B        = BM*RAW_PITCH;              // activations,
    static constexpr int B_SCALES = B + BN*B_CHUNKS*16;        // [STEP][BN]
    static constexpr int STAGE    = B_SCALES + STEP*BN*4;
    static constexpr int A        = STAGES*STAGE;              // unpacked weights
    static constexpr int A_SCALES = A + BM*A_CHUNKS*16;        // [STEP][BM]
    static constexpr int SOURCES  = A_SCALES + STEP*BM*4;      // [BN]: the tile's columns; the last one's again beyond the end
    static constexpr int SHARED   = SOURCES + BN*4;
    static_assert(STAGE % 16 == 0, "chunks are aligned");
};

// The sizes there are (docs/cuda.md): the largest with two blocks a multiprocessor and no register spilled.
template <bool PACKED> struct gemm_configs;
template <> struct gemm_configs<true> {
    using large  = gemm_config<128, 128, 1, 8, true>;
    using medium = gemm_config< 64,  64, 2, 4, true>;
    using small  = gemm_config< 64,  32, 4, 1, true>;
};
template <> struct gemm_configs<false> {
    using large  = gemm_config<128, 64, 4, 2, false>;
    using medium = gemm_config< 64, 64, 2, 4, false>;
    using small  = gemm_config< 64, 32, 4, 1, false>;
};

// Where chunk c of a row lies. Eight rows' chunks of the same c, which ldmatrix reads at once, fall on different banks.
KT4_HD int a_position(int row, int c) { return (row*4 + (c ^ (row >> 1 & 3)))*16; }
template <int CHUNKS> KT4_HD int b_position(int column, int c) {
    return (column*CHUNKS + (CHUNKS == 4 ? c ^ (column >> 1 & 3) : c ^ (column & 7)))*16;
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

// where row `row`'s piece of a step begins, modulo 16
KT4_HD int piece_offset(const gemm_args & a, const char * plane, int row, int step) {
    return ((uint32_t) (uintptr_t) plane + (uint32_t) row*(uint32_t) a.row_bytes + (uint32_t) step*2*BLOCK_BYTES) & 15;
}

// stage: where it begins
template <class C, class M> KT4_HD void copy_step(M & m, const gemm_args & a, const char * plane, int row0, int step, int stage) {
    const int thread = m.thread();
    const int left   = a.blocks - step*C::STEP;
    const int bytes  = (left < C::STEP ? left : C::STEP)*BLOCK_BYTES;
    if (a.words) {
        // Pieces start at multiples of 4: five chunks of 16 cover their 68 bytes. Eight lanes a row; rows that a thread
        // meets are a multiple of 16 apart, so all begin alike.
        constexpr int ROWS = C::THREADS/8;
        const int row    = thread / 8;
        const int c      = thread % 8;
        const int offset = piece_offset(a, plane, row0 + row, step);
        const char * from = plane + (int64_t) (row0 + row)*a.row_bytes + (step*C::STEP*BLOCK_BYTES - offset + 16*c);
        const int    to   = stage + C::RAW + row*C::RAW_PITCH + 16*c;
        if (16*c < offset + bytes) {
            KT4_UNROLL
            for (int i = 0; i < C::BM; i += ROWS) {
                if (row0 + row + i < a.rows) {
                    m.copy16(to + i*C::RAW_PITCH, from + (int64_t) i*a.row_bytes);
                }
            }
        }
    } else {
        // An odd number of blocks: rows start at multiples of 2. A warp a row, 18 words.
        constexpr int ROWS = C::THREADS/32;
        const int row    = thread / 32;
        const int w      = thread % 32;
        const int offset = piece_offset(a, plane, row0 + row, step) & 3;
        const char * from = plane + (int64_t) (row0 + row)*a.row_bytes + (step*C::STEP*BLOCK_BYTES - offset + 4*w);
        int          to   = stage + C::RAW + row*C::RAW_PITCH + 4*w;
        if (4*w < offset + bytes) {
            const int rows = a.rows - row0 < C::BM ? a.rows - row0 : C::BM;
            KT4_ROLLED
            for (int i = row; i < rows; i += ROWS) {
                m.copy4(to, from);
                to   += ROWS*C::RAW_PITCH;
                from += (int64_t) ROWS*a.row_bytes;
            }
        }
    }

    const int   padded  = padded_blocks(a.blocks);
    const int * sources = (const int *) (m.shared() + C::SOURCES);
    constexpr int COLUMNS = C::THREADS/C::B_CHUNKS; // at a time
    static_assert(C::BN % COLUMNS == 0, "whole passes");
    KT4_UNROLL
    for (int i = 0; i < C::BN; i += COLUMNS) {
        const int column = i + thread/C::B_CHUNKS;
        const int c      = thread % C::B_CHUNKS;
        const int block  = sources[column]*padded + step*C::STEP;
        m.copy16(stage + C::B + b_position<C::B_CHUNKS>(column, c), a.codes + (int64_t) block*(C::PACKED ? PACKED_BYTES : WIDE_BYTES) + 16*c);
    }
    static_assert(C::BN*C::STEP <= C::THREADS, "one pass");
    if (thread < C::BN*C::STEP) {
        const int column = thread / C::STEP;
        const int b      = thread % C::STEP;
        m.copy4(stage + C::B_SCALES + (b*C::BN + column)*4, a.scales + (sources[column]*padded + step*C::STEP + b));
    }
}

struct alignas(16) four_words { uint32_t v[4]; };

template <class C, class M> KT4_HD void unpack_step(M & m, const gemm_args & a, const char * plane, int row0, int step, int stage) {
    static_assert(C::BM*C::STEP <= C::THREADS, "one pass");
    if (m.thread() < C::BM*C::STEP) {
        const int row = m.thread() % C::BM;
        const int b   = m.thread() / C::BM;
        const int offset = piece_offset(a, plane, row0 + row, step) & (a.words ? 15 : 3);
        const int begin  = offset + b*BLOCK_BYTES;
        const int odd    = begin & 2;
        const uint32_t * w = (const uint32_t *) (m.shared() + stage + C::RAW + row*C::RAW_PITCH + (begin - odd));
        uint32_t word[9];
        KT4_UNROLL
        for (int j = 0; j < 9; ++j) {
            word[j] = w[j];
        }
        KT4_UNROLL
        for (int h = 0; h < 2; ++h) {
            four_words q;
            KT4_UNROLL
            for (int j = 0; j < 4; ++j) {
                q.v[j] = funnel(word[4*h + j], word[4*h + j + 1], 16 + 8*odd);
            }
            *(four_words *) (m.shared() + C::A + a_position(row, 2*b + h)) = q;
        }
        // the last step may have one block; what the second holds counts for nothing
        const float d = half_value((uint16_t) (word[0] >> 8*odd));
        ((float *) (m.shared() + C::A_SCALES))[b*C::BM + row] = step*C::STEP + b < a.blocks ? multiply(d, C::PACKED ? 1.0f : BYTE_SCALE) : 0.0f;
    }
}

struct alignas(8) two_floats { float v[2]; };

// one fragment: 16 rows x 8 columns of one block
KT4_HD void add_scaled(float (&out)[4], const int (&c)[4], const float (&dw)[2], const two_floats & dx) {
    KT4_UNROLL
    for (int j = 0; j < 4; ++j) {
        out[j] = multiply_add(add(as_float(c[j]), -ACCUMULATOR_ZERO), multiply(dw[j/2], dx.v[j%2]), out[j]);
    }
}

template <class C, class M> KT4_HD void compute_step(M & m, int stage, float (&out)[C::MF][C::NF][4]) {
    const int lane = m.thread() % 32;
    const int warp = m.thread() / 32;
    const int row0 = warp % C::WARPS_M * C::MF*16;
    const int col0 = warp / C::WARPS_M * C::NF*8;

    KT4_ROLLED
    for (int b = 0; b < C::STEP; ++b) {
        const float * a_scales = (const float *) (m.shared() + C::A_SCALES) + b*C::BM + row0 + lane/4;
        const float * b_scales = (const float *) (m.shared() + stage + C::B_SCALES) + b*C::BN + col0 + lane % 4 * 2;
        // the columns' fragments stay in registers while rows pass
        uint32_t   x [C::NF][C::PACKED ? 2 : 4];
        two_floats dx[C::NF];
        KT4_UNROLL
        for (int k = 0; k < C::NF; ++k) {
            dx[k] = *(const two_floats *) (b_scales + 8*k);
            if constexpr (!C::PACKED) { // 64 bytes of 8 columns
                m.load_matrices(x[k], stage + C::B + b_position<C::B_CHUNKS>(col0 + 8*k + lane % 8, 4*b + lane/8));
            } else if (k % 2 == 0) {    // 32 bytes of 16 columns
                uint32_t pair[4];
                m.load_matrices(pair, stage + C::B + b_position<C::B_CHUNKS>(col0 + 8*k + lane/16*8 + lane % 8, 2*b + lane/8 % 2));
                x[k][0] = pair[0];
                x[k][1] = pair[1];
                x[k + 1][0] = pair[2];
                x[k + 1][1] = pair[3];
            }
        }
        KT4_UNROLL
        for (int i = 0; i < C::MF; ++i) {
            // registers 0, 1: rows 0..7 and 8..15 of the first 16 bytes; 2, 3: of the second
            uint32_t w[4];
            m.load_matrices(w, C::A + a_position(row0 + 16*i + lane % 16, 2*b + lane/16));
            const float dw[2] = { a_scales[16*i], a_scales[16*i + 8] };
            if constexpr (C::PACKED) {
                KT4_UNROLL
                for (int k = 0; k < C::NF; ++k) {
                    int c[4] = { ACCUMULATOR_START, ACCUMULATOR_START, ACCUMULATOR_START, ACCUMULATOR_START };
                    m.mma_s4(c, w, x[k][0], x[k][1]);
                    add_scaled(out[i][k], c, dw, dx[k]);
                }
            } else {
                const uint32_t low [4] = { low_codes (w[0]), low_codes (w[1]), low_codes (w[2]), low_codes (w[3]) };
                const uint32_t high[4] = { high_codes(w[0]), high_codes(w[1]), high_codes(w[2]), high_codes(w[3]) };
                KT4_UNROLL
                for (int k = 0; k < C::NF; ++k) {
                    int c[4] = { ACCUMULATOR_START, ACCUMULATOR_START, ACCUMULATOR_START, ACCUMULATOR_START };
                    m.mma_s8(c, low,  x[k][0], x[k][1]);
                    m.mma_s8(c, high, x[k][2], x[k][3]);
                    add_scaled(out[i][k], c, dw, dx[k]);
                }
            }
        }
    }
}

template <class C, class M> KT4_HD void store_tile(M & m, const gemm_args & a, int row0, int col0, const float (&out)[C::MF][C::NF][4]) {
    const column_range range = columns_of(a, m.block_z());
    float * plane = a.bounds ? a.out : a.out + m.block_z()*a.out_plane;
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
    const char * weights = weights_of(a, m.block_z());
    const int row0    = m.block_y()*C::BM;
    const int steps   = (a.blocks + C::STEP - 1)/C::STEP;
    const int columns = columns_of(a, m.block_z()).n;

    KT4_ROLLED
    for (int col0 = m.block_x()*C::BN; col0 < columns; col0 += m.grid_x()*C::BN) {
        if (m.thread() < C::BN) { // the barrier that ends the tile before was after its last reading of these
            const column_range range = columns_of(a, m.block_z());
            const int column = range.first + (col0 + m.thread() < columns ? col0 + m.thread() : columns - 1);
            ((int *) (m.shared() + C::SOURCES))[m.thread()] = a.bounds ? a.from[column] : column;
        }
        float out[C::MF][C::NF][4] = {};
        KT4_ROLLED
        for (int step = -1; step < steps; ++step) { // the first only copies
            m.wait();
            m.sync(); // this step is there; nobody reads the one before
            const int stage = (step & 1)*C::STAGE;
            if (step + 1 < steps) {
                copy_step<C>(m, a, weights, row0, step + 1, C::STAGE - stage);
            }
            if (step >= 0) {
                unpack_step<C>(m, a, weights, row0, step, stage);
                m.sync();
                compute_step<C>(m, stage, out);
            }
        }
        store_tile<C>(m, a, row0, col0, out);
    }
}

} // namespace ggml::cuda::kt4
