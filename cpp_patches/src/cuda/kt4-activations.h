// Activations of a product: the Hadamard transform where asked (R4), then 4 or 8 bits in blocks of 64, in one pass.
// A thread holds 8 values next to each other, 8 threads a block, 32 a piece of 256; longer transforms go through shared
// memory. Sums and codes are the CPU's to the last bit (src/cpu/kt4-activations.*, kt4-hadamard.cpp).
#pragma once

#include "kt4-block.h"

namespace ggml::cuda::kt4 {

constexpr int THREAD_VALUES    = 8;
constexpr int QUANTIZE_THREADS = 128;
constexpr int HADAMARD_MAX     = 8192; // 1024 threads

struct activation_rows {
    const char * x;              // f32, rows contiguous
    int64_t      nb1, nb2, nb3;  // bytes
    int          ne1, ne2;
    int          values;         // in a row
    bool         vectors;        // rows are 16-byte aligned
    int          hadamard;       // size of a transform, a power of two that divides the row; 0: none
    float        scale;          // 1/sqrt(hadamard)
};

inline int quantize_threads(int hadamard) {
    return hadamard > QUANTIZE_THREADS*THREAD_VALUES ? hadamard/THREAD_VALUES : QUANTIZE_THREADS;
}

inline size_t quantize_shared(int hadamard) {
    return hadamard > 32*THREAD_VALUES ? quantize_threads(hadamard)*THREAD_VALUES*sizeof(float) : 0;
}

// values [first, first + 8) of a row, 0 beyond its end
KT4_HD void load_values(const activation_rows & a, int64_t row, int first, float (&v)[THREAD_VALUES]) {
    const int64_t i1 = row % a.ne1;
    const int64_t i2 = row / a.ne1 % a.ne2;
    const int64_t i3 = row / a.ne1 / a.ne2;
    const float * x = (const float *) (a.x + i1*a.nb1 + i2*a.nb2 + i3*a.nb3) + first;
    if (a.vectors && first + THREAD_VALUES <= a.values) {
        KT4_UNROLL
        for (int h = 0; h < 2; ++h) {
            const four_floats f = ((const four_floats *) x)[h];
            KT4_UNROLL
            for (int j = 0; j < 4; ++j) {
                v[4*h + j] = f.v[j];
            }
        }
        return;
    }
    KT4_UNROLL
    for (int j = 0; j < THREAD_VALUES; ++j) {
        v[j] = first + j < a.values ? x[j] : 0.0f;
    }
}

// Every thread of the block takes part. Steps from short to long, as the CPU's: the same additions.
template <class M> KT4_HD void transform(M & m, int n, float scale, float (&v)[THREAD_VALUES]) {
    KT4_UNROLL
    for (int j = 0; j < THREAD_VALUES; ++j) {
        v[j] = multiply(v[j], scale);
    }
    KT4_UNROLL
    for (int len = 1; len < THREAD_VALUES; len *= 2) {
        if (len < n) {
            KT4_UNROLL
            for (int j = 0; j < THREAD_VALUES; ++j) {
                if ((j & len) == 0) {
                    const float u = v[j];
                    const float w = v[j + len];
                    v[j]       = add(u,  w);
                    v[j + len] = add(u, -w);
                }
            }
        }
    }
    for (int mask = 1; mask < n/THREAD_VALUES && mask < 32; mask *= 2) {
        const bool second = (m.thread() & mask) != 0;
        KT4_UNROLL
        for (int j = 0; j < THREAD_VALUES; ++j) {
            const float w = m.shuffle_xor(v[j], mask);
            v[j] = add(second ? -v[j] : v[j], w);
        }
    }
    float * shared = (float *) m.shared(); // [8][threads]
    for (int mask = 32; mask < n/THREAD_VALUES; mask *= 2) {
        const bool second = (m.thread() & mask) != 0;
        KT4_UNROLL
        for (int j = 0; j < THREAD_VALUES; ++j) {
            shared[j*m.threads() + m.thread()] = v[j];
        }
        m.sync();
        KT4_UNROLL
        for (int j = 0; j < THREAD_VALUES; ++j) {
            const float w = shared[j*m.threads() + (m.thread() ^ mask)];
            v[j] = add(second ? -v[j] : v[j], w);
        }
        m.sync();
    }
}

// R4 where it stands alone: block x is a row, y a piece of it. y: rows contiguous.
template <class M> KT4_HD void hadamard(M & m, const activation_rows & a, float * y) {
    const int64_t row = m.block_x();
    const int   first = (m.block_y()*m.threads() + m.thread())*THREAD_VALUES;
    float v[THREAD_VALUES];
    load_values(a, row, first, v);
    transform(m, a.hadamard, a.scale, v);
    KT4_UNROLL
    for (int j = 0; j < THREAD_VALUES; ++j) {
        if (first + j < a.values) {
            y[row*a.values + first + j] = v[j];
        }
    }
}

// the first element of largest magnitude of a block
template <class M> KT4_HD float signed_max(M & m, const float (&v)[THREAD_VALUES]) {
    float max = 0.0f;
    KT4_UNROLL
    for (int j = 0; j < THREAD_VALUES; ++j) {
        max = fabsf(v[j]) > fabsf(max) ? v[j] : max;
    }
    KT4_UNROLL
    for (int mask = 1; mask < BLOCK/THREAD_VALUES; mask *= 2) {
        const float other   = m.shuffle_xor(max, mask);
        const bool  earlier = (m.thread() & mask) != 0; // the other's elements come before mine
        max = fabsf(other) > fabsf(max) || (earlier && fabsf(other) == fabsf(max)) ? other : max;
    }
    return max;
}

// the level of least error. y: whole numbers. Each thread ends with the sum of one level.
template <class M> KT4_HD int best_level(M & m, const int (&y)[THREAD_VALUES]) {
    int e[N_LEVELS];
    KT4_UNROLL
    for (int l = 0; l < N_LEVELS; ++l) {
        e[l] = 0;
        KT4_UNROLL
        for (int j = 0; j < THREAD_VALUES; ++j) {
            e[l] += level_error(y[j], l);
        }
    }
    KT4_UNROLL
    for (int mask = N_LEVELS/2; mask > 0; mask /= 2) {
        const bool upper = (m.thread() & mask) != 0;
        KT4_UNROLL
        for (int l = 0; l < mask; ++l) {
            const int kept = upper ? e[l + mask] : e[l];
            const int sent = upper ? e[l] : e[l + mask];
            e[l] = kept + m.shuffle_xor(sent, mask);
        }
    }
    // at most 64 * 1990^2: an error and its level fit into 31 bits
    int key = e[0]*N_LEVELS + (m.thread() & (N_LEVELS - 1));
    KT4_UNROLL
    for (int mask = 1; mask < N_LEVELS; mask *= 2) {
        const int other = m.shuffle_xor(key, mask);
        key = other < key ? other : key;
    }
    return key & (N_LEVELS - 1);
}

struct quantized_rows {
    char       * codes;  // [rows][padded_blocks][32 or 64 bytes]
    two_floats * scales; // [rows][padded_blocks]
};

// Block x of the grid is a row, y a piece of it. PACKED only with 4 BITS.
template <int BITS, bool PACKED, class M> KT4_HD void quantize(M & m, const activation_rows & a, const quantized_rows & out) {
    static_assert(BITS == 8 || BITS == 4, "activations have 4 or 8 bits");
    static_assert(BITS == 4 || !PACKED, "only 4 bits are packed");
    const int64_t row   = m.block_x();
    const int     first = (m.block_y()*m.threads() + m.thread())*THREAD_VALUES;
    float v[THREAD_VALUES];
    load_values(a, row, first, v);
    if (a.hadamard > 0) {
        transform(m, a.hadamard, a.scale, v);
    }

    int   q[THREAD_VALUES];
    float d;
    if (BITS == 4) {
        const float max = signed_max(m, v);
        const float id  = inverse(multiply(max, -0.125f));
        KT4_UNROLL
        for (int j = 0; j < THREAD_VALUES; ++j) {
            q[j] = whole(v[j], id);
        }
        const int r = level(best_level(m, q));
        KT4_UNROLL
        for (int j = 0; j < THREAD_VALUES; ++j) {
            q[j] = level_code(q[j], r);
        }
        d = level_scale(max, r);
    } else {
        d = divide(fabsf(signed_max(m, v)), 127.0f);
        const float id = inverse(d);
        KT4_UNROLL
        for (int j = 0; j < THREAD_VALUES; ++j) {
            q[j] = code8(v[j], id);
        }
    }

    uint32_t words[2];
    KT4_UNROLL
    for (int h = 0; h < 2; ++h) {
        const uint32_t mask = PACKED ? 15 : 255;
        words[h] = (q[4*h] & mask) | (q[4*h + 1] & mask) << 8 | (q[4*h + 2] & mask) << 16 | (q[4*h + 3] & mask) << 24;
        if (PACKED) { // elements 32 later
            words[h] |= m.shuffle_xor(words[h], BLOCK/THREAD_VALUES/2) << 4;
        }
    }
    const int blocks  = padded_blocks(a.values/BLOCK);
    const int block   = first / BLOCK;
    const int element = first % BLOCK;
    if (block >= blocks) {
        return;
    }
    const int64_t index = row*blocks + block;
    if (!PACKED || element < BLOCK/2) {
        char * to = out.codes + index*(PACKED ? PACKED_BYTES : WIDE_BYTES);
        KT4_UNROLL
        for (int h = 0; h < 2; ++h) {
            *(uint32_t *) (to + (PACKED ? element + 4*h : bytes_place(element + 4*h))) = words[h];
        }
    }
    if (element == 0) {
        const float scale = multiply(half_value(scale_bits(d)), PACKED ? 1.0f : BYTE_SCALE);
        out.scales[index] = { { scale, multiply(scale, -ACCUMULATOR_ZERO) } };
    }
}

} // namespace ggml::cuda::kt4
